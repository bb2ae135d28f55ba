"""A study as tables: for programs (JSON, CSV) and for people (markdown), beside the paper's results.

"Lost" always means nats per token above the untouched model's, averaged over the texts.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Mapping
from typing import Any

from eacmoe_lightning.routers.expert_shift import RATES
from eacmoe_lightning.study import paper
from eacmoe_lightning.study.cells import DEPTHS, Cell

COLUMNS = ("blocks", "experts", "kind", "mode", "bound", "seed")  # these identify a row


def row_of(cell: Cell, measured: dict[str, Any], baseline: dict[str, Any]) -> dict[str, Any]:
    """One flat row: the cell and its measurement.

    Args:
        measured: result of `Measurement.measure`, with that of `Disturbance.summary` under `disturbance`.
        baseline: `Measurement.baseline`.
    """
    seed = cell.seed if cell.is_random else None
    names = (cell.blocks, cell.experts, cell.kind, cell.bound.mode, cell.bound.value, seed)
    row: dict[str, Any] = dict(zip(COLUMNS, names, strict=True))
    row["relative_error"] = measured["disturbance"]["relative_error"]
    row["bits"] = measured["disturbance"].get("bits")
    row["lost"] = lost(measured, baseline)
    row["kl"] = measured.get("divergence", {}).get("kl")  # older studies did not measure it
    row["accuracy"] = _mean(measured["accuracy"][text] for text in baseline["accuracy"])
    row |= {f"perplexity {text}": math.exp(measured["nats"][text]) for text in baseline["nats"]}
    row |= {f"accuracy {text}": measured["accuracy"][text] for text in baseline["accuracy"]}
    row |= {f"changed {rate}": measured["expert_shift"][rate] for rate in (*RATES, "selections")}
    return row


def points(
    cells: Iterable[Cell], results: Mapping[str, dict[str, Any]], size_bytes: int, expert_bits: float
) -> list[dict[str, Any]]:
    """The places of cells whose errors are a codec's in a plot of size against divergence (`evaluation/pareto.py`).

    Args:
        cells: noises are left out, since they store nothing.
        results: of `Measurement.measure` by the cell's key, with that of `Disturbance.summary` under `disturbance`.
        size_bytes: of the untouched model's files of weights.
        expert_bits: that a weight of its experts takes there.
    """
    places = []
    for cell in cells:
        measured = results[cell.key]
        disturbance, divergence = measured["disturbance"], measured.get("divergence")
        if divergence and disturbance.get("stored_bytes"):
            saved = disturbance["num_weights"] * expert_bits / 8 - disturbance["stored_bytes"]
            places.append({"name": cell.key, "size": size_bytes - saved, "bits": disturbance["bits"], **divergence})
    return places


def lost(measured: dict[str, Any], baseline: dict[str, Any]) -> float:
    """Nats per token above the untouched model's, averaged over the texts."""
    return _mean(measured["nats"][text] - nats for text, nats in baseline["nats"].items())


def _mean(values: Iterable[float]) -> float | None:
    values = list(values)
    return sum(values) / len(values) if values else None


def over_seeds(rows: list[dict[str, Any]], column: str, **wanted: Any) -> float | None:
    """The mean of a column over the rows with the wanted values; None if there are none."""
    values = [row[column] for row in rows if all(row[name] == value for name, value in wanted.items())]
    return _mean(value for value in values if value is not None)


def to_csv(rows: list[dict[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]) if rows else COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


# --- shallow, middle, deep --------------------------------------------------------------------------------------


def depth_summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each kind and bound with errors in all experts of all three depths: the loss at each, and their order.

    Returns:
        Rows with `kind`, `mode`, `bound`, `lost.<depth>`, `accuracy.<depth>`, `order` (from fragile to robust, by loss)
        and `agrees` (whether the middle blocks are the most fragile and the deep the most robust, as in the paper).
    """
    summary = []
    for kind, mode, bound in _ordered((row["kind"], row["mode"], row["bound"]) for row in rows):
        wanted = {"experts": "all", "kind": kind, "mode": mode, "bound": bound}
        losses = {depth: over_seeds(rows, "lost", blocks=depth, **wanted) for depth in DEPTHS}
        if None in losses.values():
            continue
        order = sorted(losses, key=lambda depth: -losses[depth])
        summary.append(
            {
                "kind": kind,
                "mode": mode,
                "bound": bound,
                "lost": losses,
                "accuracy": {depth: over_seeds(rows, "accuracy", blocks=depth, **wanted) for depth in DEPTHS},
                "order": order,
                "agrees": order == paper.CLAIM,
            }
        )
    return summary


def _ordered(items: Iterable) -> list:
    return list(dict.fromkeys(items))


# --- markdown ---------------------------------------------------------------------------------------------------


def markdown(
    title: str, notes: list[str], baseline: dict[str, Any], rows: list[dict[str, Any]], sections: list[str]
) -> str:
    """The whole report.

    Args:
        notes: lines below the title: command, commit, machine.
        sections: further sections in markdown, to go before the table of all rows.
    """
    texts = list(baseline["nats"])
    parts = [f"# {title}", "  \n".join(notes)]
    parts.append(
        "## Untouched model\n\n"
        + table(["", *texts], [
            ["perplexity", *(f"{math.exp(baseline['nats'][t]):.3f}" for t in texts)],
            *([["accuracy", *(f"{baseline['accuracy'][t]:.3f}" for t in texts)]] if baseline["accuracy"] else []),
        ])
    )  # fmt: skip
    parts += [_depth_markdown(rows, baseline), *_grids(rows), *sections]
    parts.append(
        "## All cells\n\n" + table(list(rows[0]) if rows else [], [[_cell(v) for v in r.values()] for r in rows])
    )
    return "\n\n".join(part for part in parts if part) + "\n"


def _depth_markdown(rows: list[dict[str, Any]], baseline: dict[str, Any]) -> str:
    summary = depth_summary(rows)
    if not summary:
        return ""
    ours = [
        [
            f"{s['kind']} {s['mode']} {s['bound']:g}",
            *(f"{s['lost'][depth]:+.4f}" for depth in DEPTHS),
            *(_cell(s["accuracy"][depth]) for depth in DEPTHS),
            " > ".join(s["order"]),
        ]
        for s in summary
    ]
    theirs = [
        [f"paper, Gaussian {alpha:g}", "", "", "", *(f"{paper.GROUPS[d][alpha]:.2f}" for d in DEPTHS), ""]
        for alpha in (0.3, 0.5)
    ]
    head = ["all experts", *(f"lost, {d}" for d in DEPTHS), *(f"accuracy, {d}" for d in DEPTHS), "fragile > robust"]
    agreeing = sum(s["agrees"] for s in summary)
    accuracy = _mean(baseline["accuracy"].values())
    comparison = f", against {accuracy:.3f} here" if accuracy is not None else ""
    return (
        "## Shallow, middle and deep blocks\n\n"
        "Nats per token lost and accuracy, with errors in all experts of about a third of the blocks. The paper "
        f"(Moonlight, Gaussian noise) reports accuracy only: {paper.BASELINE:.2f} without errors{comparison}.\n\n"
        + table(head, ours + theirs)
        + "\n\nThe paper claims that middle blocks are the most fragile and deep ones the most robust. "
        f"That holds here in {agreeing} of {len(summary)} rows."
    )


def _grids(rows: list[dict[str, Any]]) -> list[str]:
    """One table of losses and accuracies, blocks by bounds, for each kind and choice of experts."""
    parts = []
    for kind, experts, mode in _ordered((row["kind"], row["experts"], row["mode"]) for row in rows):
        shown = [row for row in rows if (row["kind"], row["experts"], row["mode"]) == (kind, experts, mode)]
        bounds, blocks = _ordered(row["bound"] for row in shown), _ordered(row["blocks"] for row in shown)
        bits = [over_seeds(shown, "bits", bound=bound) for bound in bounds]
        body = []
        for name in blocks:
            losses = [over_seeds(shown, "lost", blocks=name, bound=bound) for bound in bounds]
            accuracies = [over_seeds(shown, "accuracy", blocks=name, bound=bound) for bound in bounds]
            body.append([name, *(_cell(v, "+.4f") for v in losses), *(_cell(v) for v in accuracies)])
        if any(value is not None for value in bits):
            body.append(["bits per weight", *(_cell(v, ".2f") for v in bits), *("" for _ in bounds)])
        head = ["blocks", *(f"lost, {b:g}" for b in bounds), *(f"accuracy, {b:g}" for b in bounds)]
        parts.append(f"## {kind}, {experts} experts, bound relative to {mode}\n\n" + table(head, body))
    return parts


def _cell(value: Any, form: str = ".4g") -> str:
    if value is None:
        return ""
    return format(value, form) if isinstance(value, float) else str(value)


def table(head: list[str], rows: list[list]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)
