"""What the ways in which OpenMP threads wait for work cost, on an idle and on a busy machine.

    python benchmarks/waiting.py --json waiting.json

Work: `fit` is a small fit of the bundled model, `joint` the pass over all routers inside it, `decode` one token through
a packed layer of Qwen1.5-MoE's shape at 3 bit, without a cache. Every policy has a process for each kind of work, which
is made ready once and is stopped (SIGSTOP) while it is not its turn, so that no thread of it spins beside the others.
Policies take turns, A B A B; a row has the medians over the rounds, and the ratio of every policy to `passive`. `idle`
is the machine as it is; for `busy` the script starts as many single-threaded loops as there are cores (--busy N).

Policies: `brief` is this package's: threads spin for a moment, then sleep. `passive` sleeps at once, `unset` is what
OpenMP does by itself (libgomp spins for much longer, then sleeps), `active` spins on; beside busy loops a turn of it
takes many minutes. Run it on a machine with nothing else to do: a quarter of an hour without `active`. Linux only.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch  # before the package, which would settle the policy
from inference_models import SHAPES, VOCABULARY, bf16_model, packed_model
from kept_rows import write_rows

from eacmoe_lightning.cli import main as command_line
from eacmoe_lightning.run.provenance import processor
from eacmoe_lightning.waiting import BRIEF

POLICIES = {
    "passive": {"OMP_WAIT_POLICY": "passive"},
    "brief": BRIEF,
    "unset": {},
    "active": {"OMP_WAIT_POLICY": "active"},
}
SHAPE, BITS = "qwen1.5-moe", 3
TURNS = {"fit": 1, "decode": 5}  # in a round
SECONDS = 150  # after which a policy takes no further turn at one kind of work


def make_fit(args: argparse.Namespace) -> Callable[[], dict[str, float]]:
    words = ["fit", "--config", "tiny", "--trainer.enable_progress_bar=false", f"--data.num_windows={args.windows}"]
    words += [f"--data.window_length={args.length}", "--data.num_heldout_windows=1", "--model.min_expert_tokens=32"]

    def turn() -> dict[str, float]:
        with tempfile.TemporaryDirectory() as folder:
            start = time.perf_counter()
            command_line([*words, f"--trainer.default_root_dir={folder}/run"])
            seconds = time.perf_counter() - start
            cost = json.loads(Path(folder, "run", "report.json").read_text())["cost"]
        return {"fit": seconds, "joint": cost["joint"]["seconds"]}

    return turn


def make_decode(args: argparse.Namespace) -> Callable[[], dict[str, float]]:
    model = packed_model(bf16_model(SHAPES[SHAPE]), BITS)
    token = torch.randint(0, VOCABULARY, (1, 1), generator=torch.Generator().manual_seed(0))

    @torch.inference_mode()
    def turn() -> dict[str, float]:
        start = time.perf_counter()
        for _ in range(args.steps):
            model(token, use_cache=False)
        return {"decode": (time.perf_counter() - start) / args.steps}

    return turn


MAKE = {"fit": make_fit, "decode": make_decode}


def work(kind: str, args: argparse.Namespace) -> None:
    """In a process of its own: a turn, and its seconds as a line of JSON, for every line of the input."""
    answers, sys.stdout = sys.stdout, sys.stderr
    sys.argv = sys.argv[:1]  # LightningCLI would warn of them
    turn = MAKE[kind](args)
    turn()  # the first is slower
    print("{}", file=answers, flush=True)
    for _ in sys.stdin:
        print(json.dumps(turn()), file=answers, flush=True)


class Worker:
    """`work` in a process with a policy, stopped between its turns."""

    def __init__(self, kind: str, policy: str, args: argparse.Namespace, log: Path) -> None:
        kept = {key: value for key, value in os.environ.items() if key not in ("OMP_WAIT_POLICY", *BRIEF)}
        sizes = [f"--{name}={getattr(args, name)}" for name in ("windows", "length", "steps")]
        self.log = log
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--work", kind, *sizes],
            env=kept | POLICIES[policy] | {"OMP_NUM_THREADS": str(args.threads)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log.open("w"),
            text=True,
        )
        self._answer()

    def turn(self) -> dict[str, float]:
        self.process.send_signal(signal.SIGCONT)
        self.process.stdin.write("turn\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, float]:
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"a worker ended:\n{self.log.read_text()[-4000:]}")
        self.process.send_signal(signal.SIGSTOP)
        return json.loads(line)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


@contextlib.contextmanager
def busy(count: int) -> Iterator[None]:
    """So many processes that do nothing but keep a core busy."""
    loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


def take_turns(workers: dict[str, Worker], turns: int) -> dict[str, dict[str, list[float]]]:
    """Seconds of every turn, by what was timed and by policy."""
    found: dict[str, dict[str, list[float]]] = {}
    used = dict.fromkeys(workers, 0.0)
    for _ in range(turns):
        for policy, worker in workers.items():
            if used[policy] >= SECONDS:
                continue
            start = time.perf_counter()
            for name, seconds in worker.turn().items():
                found.setdefault(name, {}).setdefault(policy, []).append(seconds)
            used[policy] += time.perf_counter() - start
    return found


def measure(kind: str, args: argparse.Namespace, folder: Path) -> Iterator[dict]:
    workers: dict[str, Worker] = {}
    try:
        for policy in args.policies:
            workers[policy] = Worker(kind, policy, args, folder / f"{kind}-{policy}.log")
        for load, count in (("idle", 0), ("busy", args.busy)):
            with busy(count):
                found = take_turns(workers, args.rounds * TURNS[kind])
            for name, by_policy in found.items():
                medians = {policy: statistics.median(seconds) for policy, seconds in by_policy.items()}
                yield {"work": name, "load": load, "busy": count, "threads": args.threads} | {
                    "seconds": medians,
                    "turns": by_policy,
                    "ratio_to_passive": {policy: s / medians["passive"] for policy, s in medians.items()},
                }
    finally:
        for worker in workers.values():
            worker.close()


def show(row: dict) -> None:
    cells = [
        f"{policy} {1e3 * seconds:10.1f} ms ({row['ratio_to_passive'][policy]:5.2f})"
        for policy, seconds in row["seconds"].items()
    ]
    print(f"{row['work']:7s} {row['load']}  {'   '.join(cells)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", choices=list(MAKE), default=list(MAKE))
    parser.add_argument("--policies", nargs="+", choices=list(POLICIES), default=["passive", "brief", "unset"])
    parser.add_argument("--rounds", type=int, default=3, help="of a fit (decode: 5 times as many)")
    parser.add_argument("--windows", type=int, default=16, help="that fit calibrates on")
    parser.add_argument("--length", type=int, default=64, help="tokens in a window")
    parser.add_argument("--steps", type=int, default=50, help="tokens that are decoded in a turn")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--busy", type=int, default=os.cpu_count(), help="loops beside the work")
    parser.add_argument("--json", type=Path, help="where the rows are written")
    parser.add_argument("--work", choices=list(MAKE), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        work(args.work, args)
        return
    if "passive" not in args.policies:
        parser.error("the ratios need passive among --policies")
    print(f"{processor()}, {args.threads} threads, torch {torch.__version__}; medians, in brackets as ratio to passive")
    rows: list[dict] = []
    with tempfile.TemporaryDirectory() as folder:
        for kind in args.kinds:
            for row in measure(kind, args, Path(folder)):
                rows.append(row)
                show(row)
                write_rows(args.json, rows)


if __name__ == "__main__":
    main()
