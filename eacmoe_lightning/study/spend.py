"""Spends a budget of bytes: measures points with the codec, chooses bounds, and evaluates the model on unused text.

Each budget is the bytes that one global bound takes, so both are compared at equal bytes: chosen bounds never take
more. Bounds chosen by block and expert are compared also with those chosen by block alone and by expert alone.
"""

from __future__ import annotations

import hashlib
import math
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eacmoe_lightning.budget.optimizer import Point, allocate
from eacmoe_lightning.models.moe import MoEModel
from eacmoe_lightning.offload.codecs import Bound
from eacmoe_lightning.run.files import write_json
from eacmoe_lightning.study.budget import LADDER, Sensitivity, frequencies
from eacmoe_lightning.study.cells import stable_seed
from eacmoe_lightning.study.disturb import disturb, disturbed
from eacmoe_lightning.study.measure import Measurement
from eacmoe_lightning.study.report import lost, table
from eacmoe_lightning.study.results import Results
from eacmoe_lightning.text.windows import digest

Place = tuple[int, int]  # block, expert
CHOICES = {"by block and expert": (True, True), "by block": (True, False), "by expert": (False, True)}  # of `damages`


def measure_points(moe: MoEModel, kind: str) -> dict[str, list[list[float]]]:
    """For each `block,expert` and each bound of the ladder: the records' bytes and r^2."""
    points: dict[str, list[list[float]]] = {}
    for block in moe.moe_blocks:
        for expert in range(block.num_experts):
            weights = [block.experts.weight(projection)[expert] for projection in block.experts.projections]
            energy = sum(w.double().square().sum().item() for w in weights)
            measured = points[f"{block.index},{expert}"] = []
            for bound in LADDER:
                results = [disturb(w, kind, Bound("mean", bound), torch.Generator()) for w in weights]
                error = sum(
                    (w.double() - changed.double()).square().sum().item()
                    for w, (changed, _) in zip(weights, results, strict=True)
                )
                measured.append([sum(size for _, size in results), error / max(energy, 1e-300)])
    return points


def damages(
    points: dict[str, list[list[float]]], load: dict[int, Tensor], nats: dict[int, float], blocks: bool, experts: bool
) -> dict[Place, list[Point]]:
    """Points with the damage of the model in `budget`.

    Args:
        points: result of `measure_points`.
        load: by block index, [E] tokens routed to each expert.
        nats: c_b by block index.
        blocks: whether to use each block's c_b, or the mean for all.
        experts: whether to use each expert's f, or 1 / E for all.
    """
    mean = sum(nats.values()) / len(nats)
    by_place = {}
    for name, measured in points.items():
        block, expert = (int(part) for part in name.split(","))
        share = float(frequencies(load[block])[expert]) if experts else 1 / len(load[block])
        weight = (nats[block] if blocks else mean) * share
        by_place[block, expert] = [
            Point(bound, int(size), weight * error) for bound, (size, error) in zip(LADDER, measured, strict=True)
        ]
    return by_place


def spend(
    moe: MoEModel,
    measurement: Measurement,
    sensitivity: Sensitivity,
    load: dict[int, Tensor],
    kind: str,
    bounds: list[Bound],
    results: Results,
    output: Path,
) -> list[dict[str, Any]]:
    """For each global bound: the loss with it, and with bounds chosen for the same bytes.

    Args:
        measurement: on text that neither the sensitivities nor the loads were measured on.
        load: by block index, [E] tokens routed to each expert in the study.
        results: holds finished measurements, and receives new ones.
        output: receives `bounds-<bound>.json`: the codec of each expert, chosen by block and expert.

    Returns:
        Rows with `mode`, `bound`, `choice`, `bytes`, `bits`, `lost` and `perplexity <text>`.
    """
    key = f"points of {kind}"
    if key not in results:
        results.add(key, measure_points(moe, kind))
    windows = digest(*(text.windows for text in measurement.texts.values()))
    points, all_experts, rows = results[key], {b.index: list(range(b.num_experts)) for b in moe.moe_blocks}, []

    def evaluate(choice: str, chosen: dict[Place, Bound], bound: Bound) -> dict[str, Any]:
        bounds = hashlib.sha256(repr(sorted((*place, b.mode, b.value) for place, b in chosen.items())).encode())
        name = f"bytes of {kind} {bound.mode} {bound.value:g}, {choice}, {bounds.hexdigest()[:16]}"
        name += f", windows {windows[:16]}"
        if name not in results:
            measurement.seek(min(all_experts))
            bound_of, seed_of = (lambda block, expert: chosen[block, expert]), partial(stable_seed, 0)
            with disturbed(moe.blocks, all_experts, kind, bound_of, seed_of) as disturbance:
                results.add(name, measurement.measure() | {"disturbance": disturbance.summary()})
        measured = results[name]
        disturbance = measured["disturbance"]
        row = {"mode": bound.mode, "bound": bound.value, "choice": choice}
        row |= {"bytes": disturbance["stored_bytes"], "bits": disturbance["bits"]}
        row["lost"] = lost(measured, measurement.baseline)
        texts = measurement.baseline["nats"]
        rows.append(row | {f"perplexity {text}": math.exp(measured["nats"][text]) for text in texts})
        print(
            f"{choice}, bytes of {bound.mode} {bound.value:g}: {row['lost']:+.4f} nats, {row['bits']:.3f} bits",
            flush=True,
        )
        return row

    for bound in bounds:
        same_bound = {(block, expert): bound for block, experts in all_experts.items() for expert in experts}
        budget = evaluate("one bound", same_bound, bound)["bytes"]
        for choice, (by_block, by_expert) in CHOICES.items():
            allocation = allocate(damages(points, load, sensitivity.nats, by_block, by_expert), budget)
            chosen = {place: Bound("mean", point.choice) for place, point in allocation.items()}
            evaluate(choice, chosen, bound)
            if by_block and by_expert:
                codecs = {
                    b: [f"{kind}:mean:{chosen[b, e].value!r}" for e in experts] for b, experts in all_experts.items()
                }
                write_json(output / f"bounds-{bound.value:g}.json", {"budget_bytes": budget, "codecs": codecs})
    return rows


def markdown(rows: list[dict[str, Any]], sensitivity: Sensitivity) -> str:
    """The report's section on budgets."""
    blocks = ", ".join(f"{block}: {c:.3g}" for block, c in sensitivity.nats.items())
    body = [
        [f"{r['bound']:g}", r["choice"], r["bytes"], f"{r['bits']:.3f}", f"{r['lost']:+.5f}"]
        + [f"{value:.3f}" for name, value in r.items() if name.startswith("perplexity")]
        for r in rows
    ]
    texts = [name for name in rows[0] if name.startswith("perplexity")]
    return (
        "## Bounds by budget\n\nOne global bound against bounds chosen for the same bytes (`study/budget.py`), on the "
        f"windows after those of the study. Sensitivity by block, in nats for a relative error of 1: {blocks}. It "
        f"explains {sensitivity.explained:.0%} of the variance of the losses of single blocks.\n\n"
        + table(["bytes of bound", "chosen", "bytes", "bits per weight", "nats lost", *texts], body)
    )
