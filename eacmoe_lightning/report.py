"""The report of a run: `report.json` with stable keys, and the same for people as `report.md`.

Keys (dots are nesting): `command`, `config`, `versions`, `commit`, `seed`, `machine`; `model.blocks`, `.experts`,
`.top_k`; `bits.nominal` (as the paper counts), `bits.true` (with scales and zero points, over the same weights);
`size_bytes.original`, `.compressed`; `perplexity.<text>.original|compressed|before` (before: the compressed model with
the original's routers); `expert_shift.mean.before|after.any|half|all|selections` over the held-out texts,
`expert_shift.calibration.before|after` and `expert_shift.blocks[]`; `router.method`; `experts.starved` (number) and
`experts.starved_by_block`; `cost.<phase>.seconds|peak_bytes|read_bytes|written_bytes|share` (read and written: disk
traffic), `cost.total_seconds`; where experts were removed `pruning.rule`, `.experts`, `.removed`,
`.removed_selections` (mean over blocks),
`pruning.blocks.<block>.kept|removed|removed_selections|scores|below_alpha` (the last: experts that stay although alpha
would remove them, since a token selects top_k), `pruning.below_alpha` (their number); `perplexity.<text>.original` is
then the one before pruning, and `.before` that of the pruned (and quantized) model with the original's routers. The
report of `prune` has the same keys, with the model that it was given in the place of the original.
"""

from __future__ import annotations

import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer

from eacmoe_lightning.calibration import PHASES
from eacmoe_lightning.compressed import size_of
from eacmoe_lightning.expert_shift import RATES, mean_rates
from eacmoe_lightning.originals import local_directory
from eacmoe_lightning.recipe import Recipe, nominal_bits, num_quantized
from eacmoe_lightning.store import RunDirectory, read_tensors, write_atomically, write_json

PACKAGES = ("eacmoe-lightning", "torch", "lightning", "transformers", "torchmetrics", "datasets")


def build(module, trainer: Trainer, blocks: list[dict], evaluation: dict[str, dict] | None) -> dict[str, Any]:
    """The report of a finished run.

    Args:
        module: the QESC module.
        blocks: statistics of every block, as `Calibration.leave` gives them.
        evaluation: `before` and `after` of `evaluate`, or None.
    """
    run, moe = module.run, module.moe
    moe_stats = [s for s in blocks if "expert_shift" in s]
    report = origin(module.identity(), trainer.datamodule.seed, trainer.world_size) | {
        "model": {
            "name_or_path": module.name_or_path,
            "type": moe.config.model_type,
            "blocks": len(moe.blocks),
            "moe_blocks": len(moe.moe_blocks),
            "experts": len(moe_stats[0]["expert_load"]["original"]),
            "top_k": moe.top_k,
        },
        "bits": {"nominal": nominal_bits(moe, module.recipe), "true": _true_bits(run, moe, module.recipe)},
        "size_bytes": {
            "original": size_of(local_directory(module.name_or_path)),
            "compressed": size_of(run.compressed),
        },
        "router": {"method": module.router_method, "joint_epochs": module.joint_epochs},
        "experts": {
            "starved": sum(len(s["starved"]) for s in moe_stats),
            "starved_by_block": {s["block"]: s["starved"] for s in moe_stats if s["starved"]},
        },
        "quantization_error": {name: value for s in blocks for name, value in s["error"].items()},
        "cost": cost(run),
    }
    add_quality(report, blocks, evaluation)
    if module.pruning:
        report["pruning"] = removed_experts(vars(module.pruning), moe_stats)
    return report


def origin(config: dict[str, Any], seed: int, num_processes: int = 1) -> dict[str, Any]:
    """Where a report's figures come from: command, settings, versions, commit, machine."""
    return {
        "command": " ".join(sys.argv),
        "config": config,
        "versions": {name: _version(name) for name in PACKAGES} | {"python": platform.python_version()},
        "commit": commit(),
        "seed": seed,
        "machine": {"processor": processor(), "threads": torch.get_num_threads(), "processes": num_processes},
    }


def add_quality(report: dict[str, Any], blocks: list[dict], evaluation: dict[str, dict] | None) -> None:
    """Puts perplexity and expert-shift into a report; arguments as in `build`."""
    moe_stats = [s for s in blocks if "expert_shift" in s]
    calibration = {when: [s["expert_shift"][when] for s in moe_stats] for when in ("before", "after")}
    report["expert_shift"] = {"calibration": {when: mean_rates(rows) for when, rows in calibration.items()}}
    report["perplexity"] = {}
    per_block = [{"block": s["block"], "calibration": s["expert_shift"]} for s in moe_stats]
    if evaluation:
        before, after = evaluation["before"], evaluation["after"]
        report["perplexity"] = {
            text: {**values, "before": before["perplexity"][text]["compressed"]}
            for text, values in after["perplexity"].items()
        }
        report["expert_shift"]["mean"] = {
            "before": before["expert_shift"]["mean"],
            "after": after["expert_shift"]["mean"],
        }
        report["expert_shift"]["texts"] = {
            text: {"before": before["expert_shift"]["texts"][text], "after": rates}
            for text, rates in after["expert_shift"]["texts"].items()
        }
        for row, b, a in zip(per_block, before["expert_shift"]["blocks"], after["expert_shift"]["blocks"], strict=True):
            row["heldout"] = {"before": b, "after": a}
    else:
        report["expert_shift"]["mean"] = report["expert_shift"]["calibration"]
    report["expert_shift"]["blocks"] = per_block


def write(run: RunDirectory, report: dict[str, Any]) -> None:
    write_json(run.path / "report.json", report)
    write_atomically(run.path / "report.md", lambda partial: partial.write_text(markdown(report)))


def summary(report: dict[str, Any]) -> str:
    """A few lines for the terminal."""
    bits, size, shift = report["bits"], report["size_bytes"], report["expert_shift"]["mean"]
    lines = [
        "",
        f"{report['model']['name_or_path']}: {report['model']['blocks']} blocks, {report['model']['experts']} experts, "
        f"top {report['model']['top_k']}, router {report['router']['method']}",
        f"bits {bits['nominal']:.2f} nominal, {bits['true']:.2f} with scales and zero points; "
        f"{size['original'] / 1e6:.1f} MB -> {size['compressed'] / 1e6:.1f} MB",
    ]
    if pruning := report.get("pruning"):
        lines.append(
            f"{pruning['removed']} of {pruning['experts']} experts removed ({pruning['rule']['criterion']}), which "
            f"{pruning['removed_selections']:.2%} of the selections went to"
        )
        if pruning["below_alpha"]:
            lines.append(
                f"{pruning['below_alpha']} experts are below alpha and stay: a token selects {report['model']['top_k']}"
            )
    for text, values in report["perplexity"].items():
        lines.append(f"perplexity {text:10s} {values['original']:8.3f} -> {values['compressed']:8.3f}")
    for rate in RATES:
        lines.append(
            f"tokens with {rate:4s} selections changed: {shift['before'][rate]:.2%} -> {shift['after'][rate]:.2%}"
        )
    cost = report["cost"]
    starved = f"{report['experts']['starved']} starved experts; " if "experts" in report else ""
    lines.append(f"{starved}{cost['total_seconds']:.0f} s in all")
    if calibration := sum(cost[phase]["seconds"] for phase in (*PHASES, "joint") if phase in cost):
        stages = {"router per block": "router", "joint stage": "joint"}
        said = (f"{name} {cost[phase]['seconds'] / calibration:.1%}" for name, phase in stages.items() if phase in cost)
        lines.append(f"router calibration, of the {calibration:.0f} s from reading to replaying: " + ", ".join(said))
    return "\n".join(lines)


def evaluation_summary(result: dict[str, Any], size_bytes: dict[str, int]) -> str:
    """What `validate` and `test` print: one row per text, and the change rates per block."""
    streams = list(next(iter(result["perplexity"].values())))
    lines = ["", "size: " + ", ".join(f"{name} {size / 1e6:.1f} MB" for name, size in size_bytes.items())]
    lines.append(f"{'perplexity':12s} " + " ".join(f"{name:>16s}" for name in streams))
    lines += [
        f"{text:12s} " + " ".join(f"{values[name]:16.3f}" for name in streams)
        for text, values in result["perplexity"].items()
    ]
    if shift := result["expert_shift"]:
        rates = list(shift["mean"])
        lines.append(f"{'changed':12s} " + " ".join(f"{rate:>16s}" for rate in rates))
        rows = [(f"block {row['block']}", row) for row in shift["blocks"]] + [("mean", shift["mean"])]
        lines += [f"{name:12s} " + " ".join(f"{row[rate]:16.2%}" for rate in rates) for name, row in rows]
    return "\n".join(lines)


def markdown(report: dict[str, Any]) -> str:
    shift, cost = report["expert_shift"], report["cost"]
    parts = [
        f"# {report['model']['name_or_path']} at {report['bits']['nominal']:.2f} bits",
        f"```\n{summary(report).strip()}\n```",
        f"Command: `{report['command']}`  \nCommit: {report['commit']}  \nSeed: {report['seed']}  \n"
        + ", ".join(f"{name} {number}" for name, number in report["versions"].items())
        + f"  \n{report['machine']['processor']}, {report['machine']['threads']} threads",
        "## Perplexity on held-out text\n\n"
        + "`original` is the model that this one was made of, `before` this one with its routers.\n\n"
        + _table(["text", "original", "before", "compressed"], [
            [t, *(f"{v[c]:.3f}" for c in ("original", "before", "compressed"))] for t, v in report["perplexity"].items()
        ]),
        "## Expert-shift per block\n\nShare of tokens with any, half or more, all selections changed.\n\n"
        + _table(
            ["block", "text", *(f"{r} {w}" for r in RATES for w in ("before", "after"))],
            [
                [row["block"], text, *(f"{row[text][w][r]:.2%}" for r in RATES for w in ("before", "after"))]
                for row in shift["blocks"]
                for text in ("calibration", "heldout")
                if text in row
            ],
        ),
        *([_starved_list(report["experts"])] if "experts" in report else []),
        *([_pruning_table(report["pruning"])] if "pruning" in report else []),
        "## Cost\n\n"
        + _table(["phase", "seconds", "share", "peak MB", "from disk MB", "to disk MB"], [
            [p, f"{c['seconds']:.1f}", f"{c['share']:.1%}",
             *(f"{c[size] / 2**20:.0f}" for size in ("peak_bytes", "read_bytes", "written_bytes"))]
            for p, c in cost.items() if isinstance(c, dict)
        ]),
    ]  # fmt: skip
    return "\n\n".join(parts) + "\n"


def _table(head: list[str], rows: list[list]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def removed_experts(rule: dict[str, Any], blocks: list[dict]) -> dict[str, Any]:
    """What was removed, and the share of the calibration text's selections that it had carried."""
    removed = {s["block"]: s["pruning"] for s in blocks}
    return {
        "rule": rule,
        "experts": sum(len(s["kept"]) + len(s["removed"]) for s in removed.values()),
        "removed": sum(len(s["removed"]) for s in removed.values()),
        "removed_selections": sum(s["removed_selections"] for s in removed.values()) / len(removed),
        "below_alpha": sum(len(s["below_alpha"]) for s in removed.values()),
        "blocks": removed,
    }


def _starved_list(experts: dict[str, Any]) -> str:
    lines = [f"- block {block}: starved experts {numbers}" for block, numbers in experts["starved_by_block"].items()]
    return "## Experts\n\n" + ("\n".join(lines) or "No expert was starved of calibration tokens.")


def _pruning_table(pruning: dict[str, Any]) -> str:
    said = ", ".join(f"{name} {value}" for name, value in pruning["rule"].items() if value is not None)
    rows = [
        [
            block,
            len(s["kept"]),
            " ".join(map(str, s["removed"])) or "none",
            f"{s['removed_selections']:.2%}",
            " ".join(map(str, s["below_alpha"])) or "none",
        ]
        for block, s in pruning["blocks"].items()
    ]
    return (
        f"## Removed experts\n\nRule: {said}. Selections: the share on the calibration text that went to them. Below "
        "alpha: experts that stay because a token selects top_k.\n\n"
        + _table(["block", "stay", "removed", "selections", "below alpha"], rows)
    )


def _true_bits(run: RunDirectory, moe, recipe: Recipe) -> float:
    """Stored bits per quantized weight: codes, scales and zero points."""
    if recipe.quantizer == "none":
        return nominal_bits(moe, recipe)
    stored = 0
    for block in moe.blocks:
        tensors, _ = read_tensors(run.block(block.index))
        stored += sum(
            t.numel() * t.element_size() for n, t in tensors.items() if n.endswith((".codes", ".scale", ".zero_point"))
        )
    return 8 * stored / num_quantized(moe)


def cost(run: RunDirectory) -> dict[str, Any]:
    rows = run.read_costs()
    total = sum(row["seconds"] for row in rows)
    phases: dict[str, Any] = {}
    for row in rows:
        phase = phases.setdefault(row["phase"], {"seconds": 0.0, "peak_bytes": 0, "read_bytes": 0, "written_bytes": 0})
        phase["peak_bytes"] = max(phase["peak_bytes"], row["peak_bytes"])
        for name in ("seconds", "read_bytes", "written_bytes"):
            phase[name] += row.get(name, 0)  # older runs did not count disk traffic
    for phase in phases.values():
        phase["share"] = phase["seconds"] / total if total else 0.0
    return {**phases, "total_seconds": total}


def _version(package: str) -> str:
    try:
        return version(package)
    except Exception:
        return "not installed"


def commit() -> str:
    """The commit of the checkout that this package runs from, or `unknown`."""
    where = Path(__file__).resolve().parent.parent
    try:
        out = subprocess.run(["git", "-C", where, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return out.stdout.strip() if out.returncode == 0 else "unknown"


def processor() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    try:
        names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        return names[0].partition(":")[2].strip()
    except (OSError, IndexError):
        return platform.processor() or platform.machine()
