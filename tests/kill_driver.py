"""Runs one job again and again, each time killed with SIGKILL at an exact place, until nothing is left to kill.

`python kill_driver.py PLACES -- OPTIONS OF FIT`, PLACES as JSON: a list of [kind, what, n], each for one attempt,
killed at the n-th time that something happens after its start:

    phase    a phase begins; what: "BLOCK PHASE", "None joint" and the like
    call     a function is called; what: its dotted name, the object that holds it before the last dot
    replace  a written file is about to be renamed into place, cut in half as if the disk had not kept up; what: a part
             of its final path

The first attempt starts the run, the others and a last one without a kill continue it with --ckpt_path last. Every
attempt is a process of its own, forked from this one, which has imported everything and run nothing.
"""

import json
import os
import pydoc
import signal
import sys
from functools import partial

from lightning.pytorch import LightningModule, Trainer

from eacmoe_lightning.cli import main
from eacmoe_lightning.job.block_callback import BlockCallback


class Countdown:
    def __init__(self, n: int) -> None:
        self.left = n

    def __call__(self) -> None:
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)


class KillInPhase(BlockCallback):
    """A callback like a user's, named on the command line."""

    def __init__(self, what: str, n: int) -> None:
        self.what, self.tick = what, Countdown(n)

    def on_phase_start(self, trainer: Trainer, module: LightningModule, block: int | None, phase: str) -> None:
        if f"{block} {phase}" == self.what:
            self.tick()


def arm(kind: str, what: str, n: int) -> list[str]:
    """Prepares the kill; options to add to the command line."""
    tick = Countdown(n)
    if kind == "phase":
        killer = {"class_path": "kill_driver.KillInPhase", "init_args": {"what": what, "n": n}}
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
    """Exit status, negative for a signal."""
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
    places, words = json.loads(sys.argv[1]), sys.argv[3:]
    for number, place in enumerate([*places, None]):
        resume = ["--ckpt_path", "last"] if number else []
        print("STATUS", json.dumps([place, attempt(place, [*words, *resume])]), flush=True)
