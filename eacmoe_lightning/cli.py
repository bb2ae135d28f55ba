"""The command line: which words run which command, and errors for people."""

from __future__ import annotations

import os
import sys
import traceback
from pathlib import Path

from jsonargparse import auto_cli
from lightning.pytorch.cli import ArgsType

from eacmoe_lightning.commands.analyze import analyze
from eacmoe_lightning.commands.fit import CommandLine
from eacmoe_lightning.commands.plan import plan
from eacmoe_lightning.commands.prune import prune
from eacmoe_lightning.commands.study import study
from eacmoe_lightning.exports.export import export
from eacmoe_lightning.run.files import StoreError

FUNCTIONS = {"analyze": analyze, "export": export, "prune": prune, "study": study}  # their arguments are the options


def main(args: ArgsType = None) -> None:
    """Runs the command line; errors of the user's making end in one message and exit code 1.

    With EACMOE_DEBUG=1 in the environment they come with their traceback.
    """
    words = sys.argv[1:] if args is None else args
    command = words[0] if words else None
    try:
        if command in FUNCTIONS:
            program = f"{Path(sys.argv[0]).name} {command}"
            auto_cli(FUNCTIONS[command], args=words[1:], prog=program, as_positional=False)
        elif command == "plan":
            plan(words[1:])
        else:
            CommandLine(args)
    except (ValueError, FileNotFoundError, StoreError) as error:
        if os.environ.get("EACMOE_DEBUG") == "1":
            raise
        frame = traceback.extract_tb(error.__traceback__)[-1]
        print(
            f"error: {error}\n({frame.name} in {os.path.basename(frame.filename)}; EACMOE_DEBUG=1 shows more)",
            file=sys.stderr,
        )
        sys.exit(1)
