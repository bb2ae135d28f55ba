"""Kills small jobs at random times, continues each with the same command, and compares the ends bit for bit.

    python scripts/random_kills.py --kills 100 --seed 0

Each job is a tiny random model with other options (`JOBS`). It runs once undisturbed. Then it runs again and again in
new directories: an attempt gets SIGKILL or SIGTERM after a random time, the same command with `--ckpt_path auto`
follows, and after a few kills an attempt is left to end. The seed decides times and signals; where a kill falls depends
on the machine. Exit code 0: all ends were the same, and SIGTERM always gave 143.

Every attempt is forked from this process, which has imported everything and computed nothing. Needs the package with
its extra `test`; three or four seconds a kill on two cores.
"""

from __future__ import annotations

import argparse
import collections
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent.parent / "tests")]

import jobs  # noqa: E402
import tiny_models  # noqa: E402
from transformers import AutoTokenizer  # noqa: E402

from eacmoe_lightning.cli import main  # noqa: E402
from eacmoe_lightning.models.originals import BUNDLED  # noqa: E402

SMALL = {"model__block_epochs": 2, "data__num_heldout_windows": 2, "data__heldout": "bundled:prose"}
JOBS = {  # by model family
    "mixtral": {"model__joint_epochs": 1},
    "qwen3_moe": {"model__router_method": "sgd", "model__joint_epochs": 2, "checkpoint__every_n_train_steps": 1},
    "deepseek": {"model__joint_epochs": 1, "pruning__criterion": "reap", "pruning__alpha": 0.9},
    "qwen2_moe": {"model__quantizer": "lattice", "model__bits": 2.75, "model__joint_epochs": 1},
    "phimoe": {"model__router_method": "none", "model__dtype": "bfloat16"},
}
KILLS_A_RUN = 8  # at most; then the run is left to end
SIGNALS = (signal.SIGKILL, signal.SIGTERM)


def forked(work: Callable[[], None], log: Path) -> int:
    """Starts `work` in a forked process whose output goes to `log`; returns its process id."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, 1)
        os.dup2(file, 2)
        work()
        status = 0
    except SystemExit as end:
        status = end.code or 0
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def ended(pid: int, seconds: float | None = None) -> int | None:
    """The exit code of a process, negative for a signal; None if it still runs after so many seconds."""
    deadline = None if seconds is None else time.monotonic() + seconds
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if deadline is not None and time.monotonic() >= deadline:
            return None
        time.sleep(0.002)


def where(run: Path) -> str:
    """How far a run has come, by its files."""
    if not (run / "run.json").exists():
        return "before the run began"
    if (run / "report.md").exists():
        return "after the report"
    if (run / "compressed").exists():
        return "after the model was written"
    if not (run / "checkpoints" / "last.ckpt").exists():
        return "before the first checkpoint"
    return f"after block {len(list((run / 'blocks').glob('block_*')))}"


def result(run: Path) -> dict[str, bytes]:
    return {
        f"{part}/{name}": data for part in ("blocks", "compressed") for name, data in jobs.contents(run / part).items()
    }


class Trial:
    """One job: its undisturbed result, and runs of it that are killed.

    Args:
        family: names the model and its options (`JOBS`).
        place: an empty directory.
    """

    def __init__(self, family: str, place: Path) -> None:
        self.place, self.family, self.log = place, family, place / "log"
        model = place / "model"
        assert ended(forked(lambda: save(family, model), self.log)) == 0, self.log.read_text()
        self.options = (model, SMALL | JOBS[family])
        started = time.monotonic()
        code = ended(self.start(place / "undisturbed"))
        assert code == 0, self.log.read_text()[-4000:]
        self.seconds = time.monotonic() - started
        self.expected = result(place / "undisturbed")

    def start(self, run: Path) -> int:
        model, options = self.options
        words = ["fit", *jobs.options(model, run, **options), "--ckpt_path", "auto"]
        return forked(lambda: main(words), self.log)

    def killed(self, kills: int, random_: random.Random) -> tuple[list[str], list[str]]:
        """Runs the job once with at most so many kills.

        Returns:
            What was killed where, and what was wrong.
        """
        run, places, wrong = self.place / "killed", [], []
        shutil.rmtree(run, ignore_errors=True)
        while True:
            pid, sent = self.start(run), random_.choice(SIGNALS)
            code = ended(pid, random_.uniform(0, self.seconds) if len(places) < kills else None)
            if code is None:
                os.kill(pid, sent)
                code, place = ended(pid), where(run)
                if code not in (-sent, 128 + sent):  # it may have ended by itself just then
                    wrong += [] if code == 0 else [f"{sent.name} {place}: exit code {code}"]
                places.append(f"{sent.name} {place}")
            elif code != 0:
                wrong.append(f"an attempt after {places} ended with exit code {code}")
            if code == 0 or wrong:
                break
        if not wrong and result(run) != self.expected:
            differ = [name for name in self.expected if result(run).get(name) != self.expected[name]]
            wrong.append(f"after {places}: {differ} differ")
        if left := [str(path) for path in run.rglob("*") if path.name.endswith((".partial", ".old", ".lock"))]:
            wrong.append(f"after {places}: {left} are left")
        return places, [f"{self.family}: {what}" for what in wrong]


def save(family: str, folder: Path) -> None:
    tiny_models.save(family, folder, AutoTokenizer.from_pretrained(BUNDLED))


def run_kills(kills: int, seed: int, families: list[str], place: Path) -> list[str]:
    """Kills jobs of these families in turn until so many kills have happened, and prints a count; returns faults."""
    random_, counts, faults, runs = random.Random(seed), collections.Counter(), [], 0
    trials = []
    for family in families:
        (place / family).mkdir(parents=True)
        trials.append(Trial(family, place / family))
        print(f"{family}: {trials[-1].seconds:.1f} s undisturbed", flush=True)
    while (done := sum(counts.values())) < kills:
        trial = trials[runs % len(trials)]
        places, wrong = trial.killed(min(random_.randint(2, KILLS_A_RUN), kills - done), random_)
        counts.update(places)
        faults, runs = faults + wrong, runs + 1
        print(f"run {runs}, {trial.family}: {', '.join(places) or 'no kill in time'}", *wrong, sep="\n  ", flush=True)
    print(f"{sum(counts.values())} kills in {runs} runs, {len(faults)} faults (seed {seed})")
    for what, count in sorted(counts.items()):
        print(f"{count:4d} {what}")
    return faults


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--families", nargs="+", choices=JOBS, default=list(JOBS))
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="random-kills-") as folder:
        sys.exit(bool(run_kills(chosen.kills, chosen.seed, chosen.families, Path(folder))))
