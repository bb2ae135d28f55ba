"""The command line, `eacmoe` and `python train.py`: which words run which command, and errors for people."""

from __future__ import annotations

import inspect
import os
import sys
import threading
import traceback
from collections.abc import Sequence
from pathlib import Path

import torch.distributed
from jsonargparse import auto_cli
from lightning.pytorch.cli import ArgsType
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from eacmoe_lightning.commands.analyze import analyze
from eacmoe_lightning.commands.chat import chat
from eacmoe_lightning.commands.configs import NamedConfigParser
from eacmoe_lightning.commands.fit import CommandLine
from eacmoe_lightning.commands.plan import plan
from eacmoe_lightning.commands.prune import prune
from eacmoe_lightning.commands.report import report
from eacmoe_lightning.commands.sensitivity import sensitivity
from eacmoe_lightning.commands.serve import serve
from eacmoe_lightning.commands.study import study
from eacmoe_lightning.commands.table import table
from eacmoe_lightning.exports.export import export
from eacmoe_lightning.run.files import FullDisk, StoreError, is_disk_full
from eacmoe_lightning.run.provenance import remember_command
from eacmoe_lightning.run.stopping import Stopping
from eacmoe_lightning.version import __version__

# they parse their words themselves
PARSERS = {"plan": plan, "sensitivity": sensitivity, "report": report, "table": table, "serve": serve, "chat": chat}
FUNCTIONS = {"analyze": analyze, "export": export, "prune": prune, "study": study}  # their arguments are the options
COMMANDS = {
    "fit": "Calibrates and quantizes a model, and writes the compressed one with a report.",
    "validate": "Perplexity and expert-shift of a run or a model on held-out texts.",
    "test": "The same; --model.split_damage also says how much of the damage is selection.",
    "predict": "Log-likelihood of every token of a text.",
    "plan": "What `fit` with the same options will take, before anything runs.",
    "sensitivity": inspect.getdoc(sensitivity).splitlines()[0],
    "report": inspect.getdoc(report).splitlines()[0],
    "table": inspect.getdoc(table).splitlines()[0],
    "serve": inspect.getdoc(serve).splitlines()[0],
    "chat": inspect.getdoc(chat).splitlines()[0],
} | {name: inspect.getdoc(function).splitlines()[0] for name, function in FUNCTIONS.items()}


# what opening or making files raises where a path is another kind of thing
WRONG_PATH = (FileExistsError, IsADirectoryError, NotADirectoryError, PermissionError)

RESTART = {  # what a message says when a signal or a full disk ends the command
    "fit": ": the same command with --ckpt_path auto goes on, and all finished work is kept",
    **dict.fromkeys(
        ("prune", "sensitivity", "study", "table"), ": the same command goes on, and all finished work is kept"
    ),
}


def main(args: ArgsType = None) -> None:
    """Runs the command line; errors of the user's making end in one message and exit code 1.

    SIGTERM, SIGINT and SIGHUP end it with exit codes 143, 130 and 129.

    With EACMOE_DEBUG=1 in the environment they come with their traceback.
    """
    if args is None and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # for class paths of the user's own modules, as `python train.py` finds them
    words = sys.argv[1:] if args is None else args
    command = words[0] if words else None
    remember_command(args if isinstance(args, list) else None)
    threading.excepthook = _quiet_if_disk_is_full
    try:
        with Stopping(lambda: RESTART.get(command, "")):
            _run(command, words, args)
        remember_command(None)
    except Exception as error:
        if (message := _full_disk(error, command) or _lost_process(error, command)) is not None:
            _report(error, message)
        if isinstance(error, WRONG_PATH) and error.filename is not None:
            _report(error, f"{error.strerror}: {error.filename}. Pass another path")
        if not isinstance(error, (ValueError, FileNotFoundError, StoreError, MisconfigurationException)):
            raise
        _report(error, str(error))


def _run(command: str | None, words: Sequence[str], args: ArgsType) -> None:
    if command in FUNCTIONS:
        program = f"{Path(sys.argv[0]).name} {command}"
        auto_cli(FUNCTIONS[command], args=words[1:], prog=program, as_positional=False, parser_class=NamedConfigParser)
    elif command in PARSERS:
        PARSERS[command](words[1:])
    elif command in (None, "-h", "--help"):
        print(overview())
    elif command == "--version":
        print(__version__)
    elif command in COMMANDS or command.startswith("-"):  # options before the command are Lightning's
        CommandLine(args)
    else:
        raise ValueError(f"there is no command {command}: {', '.join(COMMANDS)}")


def _report(error: BaseException, message: str) -> None:
    """Prints a message for people and exits with 1.

    Raises:
        BaseException: the error itself, if EACMOE_DEBUG=1 asks for its traceback.
    """
    if os.environ.get("EACMOE_DEBUG") == "1":
        raise error
    frame = traceback.extract_tb(error.__traceback__)[-1]
    print(
        f"error: {message}\n({frame.name} in {os.path.basename(frame.filename)}; EACMOE_DEBUG=1 shows more)",
        file=sys.stderr,
    )
    sys.exit(1)


def _full_disk(error: BaseException, command: str | None) -> str | None:
    """The message for a full disk; None for other errors.

    TensorBoard, Lightning and loggers meet a full disk too, turn it into other errors, and raise it again while
    Lightning ends the job. A message of this package names the file, so it goes first.
    """
    chain = [error]
    while (before := chain[-1].__cause__ or chain[-1].__context__) is not None and before not in chain:
        chain.append(before)
    full = [link for link in chain if is_disk_full(link)]
    if not full:
        return None
    named = [str(link) for link in chain if isinstance(link, FullDisk)]
    message = named[0] if named else f"the disk or quota is full ({full[-1]}). Free some space"
    return message + RESTART.get(command, "")


def _lost_process(error: BaseException, command: str | None) -> str | None:
    """The message for a process that other processes of the job have left alone; None for other errors.

    NCCL's errors have a class of their own; gloo's are RuntimeErrors that name its source file.
    """
    is_gloo = type(error) is RuntimeError and "gloo/" in str(error)
    is_taken_port = "EADDRINUSE" in str(error)
    if is_taken_port or not (is_gloo or isinstance(error, torch.distributed.DistError)):
        return None
    return (
        "another process of this job has ended or cannot be reached. If one has printed another error, that is the "
        f"reason{RESTART.get(command, '')} ({str(error).strip().splitlines()[0]})"
    )


def _quiet_if_disk_is_full(failure: threading.ExceptHookArgs) -> None:
    """The hook for exceptions in threads: TensorBoard's thread raises a full disk again where `main` reports it."""
    if failure.exc_value is None or not is_disk_full(failure.exc_value):
        threading.__excepthook__(failure)


def overview() -> str:
    """A line for each command."""
    program = Path(sys.argv[0]).name
    lines = [f"{name:9s} {text}" for name, text in COMMANDS.items()]
    return "\n".join([f"usage: {program} COMMAND [options]", "", *lines, "", f"{program} COMMAND --help: its options"])
