"""Calibrated on A, evaluated on B, for every pair of texts: how much of a compression holds off its calibration text.

A row of the table is a whole `fit` that calibrates on one text and is evaluated on all of them. Each keeps its run
directory, so an interrupted table goes on where it was; a finished row is kept as `<text>.json` beside it.
"""

from __future__ import annotations

import math
from typing import Any

from eacmoe_lightning.routers.expert_shift import RATES


def cross_table(rows: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The rows as matrices [calibrated on][evaluated on].

    Returns:
        `calibrated_on`, `evaluated_on`; `perplexity`, `lost` (nats per token above the original), `changed.<rate>`
        (share of tokens with any, half, all selections changed, and of selections); `own` and `other`: the means of
        `lost` and `changed.any` where both texts are the same and where not (null where there is no such pair).
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
    own, other = result["own"], result["other"]
    if own["lost"] is not None and other["lost"] is not None:
        lines.append(
            f"lost on the text calibrated on {own['lost']:.4f}, on others {other['lost']:.4f}; "
            f"changed {own['changed_any']:.2%}, {other['changed_any']:.2%}"
        )
    return "\n".join(lines)
