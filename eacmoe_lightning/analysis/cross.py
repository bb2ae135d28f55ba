"""Calibrated on A, evaluated on B, for every pair of texts: how well compression holds outside its calibration text.

A row of the table is a full `fit` that calibrates on one text and evaluates on all of them. Each row keeps its run
directory, so an interrupted table resumes; a finished row is kept beside it as `<text>.json`.
"""

from __future__ import annotations

import math
from typing import Any

from eacmoe_lightning.routers.expert_shift import RATES


def cross_table(rows: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The rows as matrices [calibrated on][evaluated on].

    Returns:
        `calibrated_on`, `evaluated_on`; `original` (perplexity by text), `perplexity`, `lost` (nats per token above the
        original), `changed.<rate>` (share of tokens with any, half or all selections changed, and share of selections
        changed); `own` and `other`, the means of `lost` and `changed.any` over pairs of the same text and of different
        texts (null if there is no such pair).
    """
    names = list(rows)
    evaluated = rows[names[0]]["perplexity"]
    texts = [name for name in names if name in evaluated] + sorted(evaluated.keys() - rows.keys())
    perplexity = [[row["perplexity"][text]["compressed"] for text in texts] for row in rows.values()]
    lost = [
        [math.log(row["perplexity"][t]["compressed"] / row["perplexity"][t]["original"]) for t in texts]
        for row in rows.values()
    ]
    changed = {
        rate: [[row["changed"][text][rate] for text in texts] for row in rows.values()]
        for rate in (*RATES, "selections")
    }
    result = {
        "calibrated_on": names,
        "evaluated_on": texts,
        "original": {text: next(iter(rows.values()))["perplexity"][text]["original"] for text in texts},
        "perplexity": perplexity,
        "lost": lost,
        "changed": changed,
    }
    pairs = [(i, j, name == text) for i, name in enumerate(names) for j, text in enumerate(texts)]
    for key, wanted in (("own", True), ("other", False)):
        cells = [(i, j) for i, j, same in pairs if same == wanted]
        result[key] = {
            "lost": _mean([lost[i][j] for i, j in cells]),
            "changed_any": _mean([changed["any"][i][j] for i, j in cells]),
        }
    return result


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None


def cross_summary(result: dict[str, Any]) -> str:
    """A few lines for the terminal."""
    texts, lines = result["evaluated_on"], []
    for title, matrix, form in (
        ("nats per token lost; calibrated on (rows), evaluated on (columns)", result["lost"], "{:10.4f}"),
        ("tokens with any selection changed", result["changed"]["any"], "{:10.2%}"),
    ):
        lines += [title, " " * 12 + "".join(f"{text[:9]:>10s}" for text in texts)]
        for name, row in zip(result["calibrated_on"], matrix, strict=True):
            lines.append(f"{name:12s}" + "".join(form.format(value) for value in row))
    same, other = result["own"], result["other"]
    if same["lost"] is not None and other["lost"] is not None:
        lines.append(
            f"lost {same['lost']:.4f} on the calibration text, {other['lost']:.4f} on other texts; "
            f"changed {same['changed_any']:.2%} and {other['changed_any']:.2%}"
        )
    return "\n".join(lines)
