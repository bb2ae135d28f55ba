"""Several runs of one model, by size and divergence from the original: which are worth their size."""

from __future__ import annotations

import math
from typing import Any

from eacmoe_lightning.evaluation.report_html import render

ALL_NAMES = 12  # of more points, only those on the line have their names in the plot
RUNS = "a compressed model"  # what a point is
WIDTH, HEIGHT = 720, 440
LEFT, RIGHT, TOP, BOTTOM = 80, 690, 30, 380  # edges of the plot, in the same units


def point(name: str, report: dict[str, Any], divergence: dict[str, Any]) -> dict[str, Any]:
    """A run's place in the plot.

    Args:
        name: shown beside it.
        report: the run's report.
        divergence: the report's, or that of a later evaluation.
    """
    size = report["size_bytes"]["compressed"]
    bits = report["bits"].get("all", report["bits"]["true"])
    return {"name": name, "size": size, "bits": bits, **divergence["mean"]["compressed"]}


def mark_best(points: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The points in order of size, with `best`: whether no other is at most as large and at most as far away."""
    ordered, lowest = sorted(points, key=lambda p: (p["size"], p["kl"])), math.inf
    rows = []
    for one in ordered:
        rows.append(one | {"best": one["kl"] < lowest})
        lowest = min(lowest, one["kl"])
    return rows


def page(model: str, texts: list[str], points: list[dict[str, Any]], kind: str = RUNS) -> str:
    """The plot and its table as one HTML file without network.

    Args:
        model: the original's name.
        texts: on which the divergence was measured.
        points: as `point` makes them.
        kind: what a point is.
    """
    rows = mark_best(points)
    factor, unit = (1e9, "GB") if max(row["size"] for row in rows) >= 1e9 else (1e6, "MB")
    x, x_ticks = _axis([row["size"] / factor for row in rows], LEFT, RIGHT)
    y, y_ticks = _axis([row["kl"] for row in rows], BOTTOM, TOP)
    places = [
        {
            "x": round(x(row["size"] / factor), 1),
            "y": round(y(row["kl"]), 1),
            "label": row["name"],
            "best": row["best"],
            "is_named": row["best"] or len(rows) <= ALL_NAMES,
        }
        for row in rows
    ]
    for place in places:  # names stay inside the picture
        on_right = place["x"] < (LEFT + RIGHT) / 2
        place |= {"dx": 10 if on_right else -10, "anchor": "start" if on_right else "end"}
    plot = {
        "width": WIDTH, "height": HEIGHT, "left": LEFT, "right": RIGHT, "top": TOP, "bottom": BOTTOM, "unit": unit,
        "x": x_ticks, "y": y_ticks, "points": places,
        "line": " ".join(f"{place['x']},{place['y']}" for place in places if place["best"]),
    }  # fmt: skip
    return render("pareto.html.jinja", name=model, kind=kind, texts=texts, rows=rows, plot=plot)


def _axis(values: list[float], start: float, end: float):
    """The place of a value on an axis that begins at 0, and its ticks."""
    most = max(0.0, *values) * 1.08 or 1.0  # rounding can leave a divergence of 0 below 0
    step = 10 ** math.floor(math.log10(most))
    step = next(step * part for part in (0.1, 0.2, 0.5, 1, 2) if most / (step * part) <= 7)

    def place(value: float) -> float:
        return start + (end - start) * value / most

    ticks = [{"at": round(place(step * i), 1), "label": f"{step * i:.4g}"} for i in range(int(most / step) + 1)]
    return place, ticks
