"""Runs jobs repeatedly, ending each attempt at an exact place, and then once more to the end.

Each line of its input is a job: a JSON list of its places and of its options of `fit`. A place is [kind, what, n] or
[kind, what, n, how], one for each attempt, which ends when an event happens for the n-th time. `how` is a signal
(SIGKILL without it), or `full`: from then on the system lets this process write no byte to any file, as on a full disk.
A line END follows the output of a job. Events:

    phase    a phase begins; what: "BLOCK PHASE", for example "0 experts" or "None joint"
    call     a function is called; what: its dotted name
    replace  a written file is about to be renamed to its final path; it is first cut in half, as if the disk had not
             kept up; what: a part of the final path

All attempts, and a last one that is not killed, are the same command with --ckpt_path auto. Each is forked from this
process, which has imported everything and run nothing.
"""

import json
import os
import pydoc
import resource
import signal
import sys
from functools import partial

from lightning.pytorch import LightningModule, Trainer

from eacmoe_lightning.cli import main
from eacmoe_lightning.job.block_callback import BlockCallback


class Countdown:
    """Ends this process at the n-th call."""

    def __init__(self, n: int, how: str) -> None:
        self.left, self.how = n, how

    def __call__(self) -> None:
        self.left -= 1
        if self.left == 0 and self.how == "full":
            resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
        elif self.left == 0:
            os.kill(os.getpid(), getattr(signal, self.how))


class KillInPhase(BlockCallback):
    """A callback that is passed on the command line, like a user's."""

    def __init__(self, what: str, n: int, how: str) -> None:
        self.what, self.tick = what, Countdown(n, how)

    def on_phase_start(self, trainer: Trainer, module: LightningModule, block: int | None, phase: str) -> None:
        if f"{block} {phase}" == self.what:
            self.tick()


def arm(kind: str, what: str, n: int, how: str = "SIGKILL") -> list[str]:
    """Prepares the end; returns options to add to the command line."""
    tick = Countdown(n, how)
    if kind == "phase":
        killer = {"class_path": "kill_driver.KillInPhase", "init_args": {"what": what, "n": n, "how": how}}
        return ["--trainer.callbacks", json.dumps([killer])]
    if kind == "call":
        owner, _, name = what.rpartition(".")
        owner = pydoc.locate(owner)
        original = getattr(owner, name)

        def called(*args, **kwargs):
            tick()
            return original(*args, **kwargs)

        setattr(owner, name, called)
    elif kind == "replace":
        replace = os.replace

        def cut(replace, source, target):
            if what in str(target):
                if tick.left == 1:
                    os.truncate(source, os.path.getsize(source) // 2)
                tick()
            return replace(source, target)

        os.replace = partial(cut, replace)
    else:
        raise ValueError(kind)
    return []


def attempt(place: list | None, words: list[str]) -> int:
    """Runs `fit` in a forked process and returns its exit status, negative for a signal."""
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            main(["fit", *words, *(arm(*place) if place else [])])
            status = 0
        except SystemExit as end:
            status = end.code or 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


if __name__ == "__main__":
    # a job in the background of a shell ignores the first, one under nohup the second, and so would all jobs here
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    for line in sys.stdin:
        places, words = json.loads(line)
        for place in [*places, None]:
            print("STATUS", json.dumps([place, attempt(place, [*words, "--ckpt_path", "auto"])]), flush=True)
        print("END", flush=True)
