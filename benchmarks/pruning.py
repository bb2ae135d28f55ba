"""Static pruning of an MoE: criteria, numbers of experts, and what recalibrating the routers recovers.

*In the run*: each setting is one `train.py fit --model.quantizer none` in a separate directory under --output. Experts
are removed by frequency or by REAP's saliency over the calibration text. The routers of the remaining experts stay
unchanged (`none`), are calibrated block by block in closed form (`ridge`), or then also together with the norms
(`joint`). *Finished*: with --finished RUN, one `train.py prune` of that compressed model, with routers unchanged and
with `ridge`. Losses are relative to the model before pruning. Held-out texts from the domains of the calibration text
are *in*, the others *out*. Finished runs are only read; interrupted ones continue.

    python benchmarks/pruning.py --output runs/pruning --json pruning.json
    python benchmarks/pruning.py --output runs/pruning --keep 15 --criteria reap --routers none joint
    python benchmarks/pruning.py --output runs/pruning --routers --finished runs/tiny
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import subprocess
import sys
from pathlib import Path

from kept_rows import write_rows

TRAIN = Path(__file__).resolve().parent.parent / "train.py"
ROUTERS = {
    "none": ["--model.router_method", "none"],
    "ridge": ["--model.router_method", "ridge", "--model.joint_epochs", "0"],
    "joint": ["--model.router_method", "ridge"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="directory of the runs")
    parser.add_argument("--config", type=Path, default=TRAIN.parent / "configs" / "tiny.yaml")
    parser.add_argument("--keep", type=int, nargs="+", default=[15, 10], help="experts that stay in each block")
    parser.add_argument("--criteria", nargs="+", default=["frequency", "reap"])
    parser.add_argument("--routers", nargs="*", default=list(ROUTERS), choices=list(ROUTERS), help="in the run")
    parser.add_argument("--finished", type=Path, help="a run directory or compressed directory")
    parser.add_argument("--windows", type=int, default=96, help="calibration windows")
    parser.add_argument("--heldout_windows", type=int, default=16, help="windows of each held-out text")
    parser.add_argument("--out_texts", nargs="+", default=["german"], help="held-out texts from other domains")
    parser.add_argument(
        "--options", nargs=argparse.REMAINDER, default=[], help="further options of fit; must come last"
    )
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows = []

    def add(keep: int, criterion: str, router: str, report: dict, state: str = "compressed") -> None:
        rows.append({"keep": keep, "criterion": criterion, "router": router, **row(report, args.out_texts, state)})
        print(json.dumps(rows[-1]), flush=True)
        write_rows(args.json, rows)

    for keep, router, criterion in itertools.product(args.keep, args.routers, args.criteria):
        run = args.output / f"keep{keep}-{criterion}-{router}"
        add(keep, criterion, router, fit(run, keep, criterion, router, args))
    for keep, criterion in itertools.product(args.keep, args.criteria) if args.finished else ():
        report = prune(args.output / f"finished-keep{keep}-{criterion}", keep, criterion, args)
        add(keep, criterion, "finished, none", report, "before")
        add(keep, criterion, "finished, ridge", report)
    print_table(rows)


def fit(run: Path, keep: int, criterion: str, router: str, args: argparse.Namespace) -> dict:
    """The report of a run, which is started or continued unless it is finished."""
    if not (run / "report.json").exists():
        command = ["fit", "--config", args.config, "--trainer.default_root_dir", run]
        command += ["--trainer.enable_progress_bar", "false", "--model.quantizer", "none"]
        command += ["--pruning.keep", keep, "--pruning.criterion", criterion]
        command += ["--data.num_windows", args.windows, "--data.num_heldout_windows", args.heldout_windows]
        command += [
            *args.options,
            *ROUTERS[router],
            "--ckpt_path",
            "auto",
        ]
        subprocess.run([sys.executable, TRAIN, *map(str, command)], check=True, stdout=subprocess.DEVNULL)
    return json.loads((run / "report.json").read_text())


def prune(output: Path, keep: int, criterion: str, args: argparse.Namespace) -> dict:
    """The report of pruning the finished model."""
    command = ["prune", "--model", args.finished, "--output", output, "--routers", "ridge"]
    command += ["--pruning.keep", keep, "--pruning.criterion", criterion]
    command += ["--num_windows", args.windows, "--num_heldout_windows", args.heldout_windows]
    subprocess.run([sys.executable, TRAIN, *map(str, command)], check=True, stdout=subprocess.DEVNULL)
    return json.loads((output / "report.json").read_text())


def row(report: dict, out_texts: list[str], state: str) -> dict:
    """Perplexities, and nats per token lost by pruning, in and out of the calibration domains.

    `state` is `compressed`, or `before` for the pruned model before its routers were calibrated.
    """
    perplexity = {text: values[state] for text, values in report["perplexity"].items()}
    lost = {t: math.log(v[state] / v["original"]) for t, v in report["perplexity"].items()}
    inside = [value for text, value in lost.items() if text not in out_texts]
    outside = [value for text, value in lost.items() if text in out_texts]
    return {
        "removed_selections": report["pruning"]["removed_selections"],
        "lost_in": sum(inside) / max(len(inside), 1),
        "lost_out": sum(outside) / max(len(outside), 1),
        "changed_any": report["expert_shift"]["mean"]["before" if state == "before" else "after"]["any"],
        "seconds": report["cost"]["total_seconds"],
        "original": {text: values["original"] for text, values in report["perplexity"].items()},
        "perplexity": perplexity,
    }


def print_table(rows: list[dict]) -> None:
    texts = list(rows[0]["perplexity"])
    head = ["keep", "criterion", "router", "selections removed", "lost, in", "lost, out", "any changed", *texts]
    lines = [
        head,
        ["---"] * len(head),
        ["all", "", "", "", "", "", "", *(f"{rows[0]['original'][t]:.3f}" for t in texts)],
    ]
    for r in rows:
        shares = [f"{r['removed_selections']:.2%}", f"{r['lost_in']:.4f}", f"{r['lost_out']:.4f}"]
        values = [f"{r['perplexity'][t]:.3f}" for t in texts]
        lines.append([r["keep"], r["criterion"], r["router"], *shares, f"{r['changed_any']:.1%}", *values])
    print("\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines))


if __name__ == "__main__":
    main()
