"""The analysis as figures; `write` saves them as PNG and as TensorBoard images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib.patheffects as effects
import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import Normalize
from matplotlib.figure import Figure  # without pyplot: no window, no global state
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator
from torch.utils.tensorboard import SummaryWriter

from eacmoe_lightning.run.files import write_atomically

OUTLINE = [effects.withStroke(linewidth=2, foreground="white")]


def write(output: Path, figures: dict[str, Figure]) -> None:
    """Writes each figure to `<name>.png` in `output`, and as an image to `output/tensorboard`."""
    writer = SummaryWriter(output / "tensorboard")
    for name, figure in figures.items():
        write_atomically(output / f"{name}.png", lambda partial, f=figure: f.savefig(partial, format="png", dpi=120))
        writer.add_image(f"analysis/{name}", _pixels(figure), dataformats="HWC")
    writer.close()


def _pixels(figure: Figure) -> np.ndarray:
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())  # [height, width, 4]


def similarity(description: dict[str, Any]) -> Figure:
    """Cosines between texts (EAC-MoE, figure 2); a frame marks those above the threshold."""
    cosines = description["similarity"]
    names, matrix, threshold = cosines["texts"], cosines["matrix"], cosines["threshold"]
    figure = Figure(figsize=(2.5 + 0.8 * len(names), 2 + 0.7 * len(names)), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(matrix, vmin=0, vmax=1, cmap="viridis")
    bar = figure.colorbar(image, ax=axes, label="cosine of selection frequencies")
    bar.ax.axhline(threshold, color="red", linewidth=2)
    for i, row in enumerate(matrix):
        for j, value in enumerate(row):
            axes.text(j, i, f"{value:.2f}", ha="center", va="center", path_effects=OUTLINE)
            if value > threshold:
                axes.add_patch(Rectangle((j - 0.46, i - 0.46), 0.92, 0.92, fill=False, edgecolor="red", linewidth=2))
    axes.set_xticks(range(len(names)), names, rotation=45, ha="right")
    axes.set_yticks(range(len(names)), names)
    axes.set_title(f"Red: above {threshold}")
    return figure


def frequency(description: dict[str, Any]) -> Figure:
    """Each expert's load over the mean, block by block, a panel per text; blank where a block has fewer experts."""
    names, rows = description["similarity"]["texts"], description["blocks"]
    width = max(row["num_experts"] for row in rows)
    columns = min(3, len(names))
    lines = -(-len(names) // columns)
    size = (1 + columns * min(8, 1.2 + 0.14 * width), lines * (1.2 + 0.16 * len(rows)))
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False, sharex=True, sharey=True).flatten()
    for axes, name in zip(panels, names, strict=False):
        image = torch.full((len(rows), width), torch.nan)
        for i, row in enumerate(rows):
            image[i, : row["num_experts"]] = torch.tensor(row["texts"][name]["frequency"]) * row["num_experts"]
        shown = axes.imshow(image.numpy(), aspect="auto", norm=Normalize(0, 3), cmap="magma", interpolation="nearest")
        axes.set_title(name)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_yticks(range(len(rows)), [row["block"] for row in rows])
    for axes in panels[len(names) :]:
        axes.set_axis_off()
    figure.supxlabel("expert")
    figure.supylabel("block")
    figure.colorbar(shown, ax=list(panels), label="load over the mean (cut at 3)")
    return figure


def cross(table: dict[str, Any]) -> Figure:
    """Nats lost and tokens with changed selections; calibrated on (down), evaluated on (across)."""
    rows, columns = table["calibrated_on"], table["evaluated_on"]
    figure = Figure(figsize=(4 + 1.6 * len(columns), 2 + 0.7 * len(rows)), layout="constrained")
    panels = (
        ("nats per token lost", table["lost"], "{:.3f}"),
        ("tokens with any selection changed", table["changed"]["any"], "{:.1%}"),
    )
    for axes, (title, matrix, form) in zip(figure.subplots(1, 2), panels, strict=True):
        axes.imshow(matrix, cmap="viridis_r")
        for i, row in enumerate(matrix):
            for j, value in enumerate(row):
                axes.text(j, i, form.format(value), ha="center", va="center", path_effects=OUTLINE)
        axes.set_xticks(range(len(columns)), columns, rotation=45, ha="right")
        axes.set_yticks(range(len(rows)), rows)
        axes.set_xlabel("evaluated on")
        axes.set_ylabel("calibrated on")
        axes.set_title(title)
    return figure


def balance(description: dict[str, Any], floor: float) -> Figure:
    """Entropy, load of the busiest expert and coverage by block, a line for each text."""
    figure = Figure(figsize=(12, 3.5), layout="constrained")
    names, rows = description["similarity"]["texts"], description["blocks"]
    panels = {
        "entropy": "entropy of selections, over log E",
        "max_over_mean": "busiest expert's load over the mean",
        "coverage_above_floor": f"share of experts with {floor:g} of the mean load or more",
    }
    all_axes = figure.subplots(1, len(panels))
    for axes, (key, title) in zip(all_axes, panels.items(), strict=True):
        for name in names:
            axes.plot([row["block"] for row in rows], [row["texts"][name][key] for row in rows], "o-", label=name)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("block")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    all_axes[0].legend(fontsize=8)
    return figure


def skipping(result: dict[str, Any]) -> Figure:
    """Perplexity, share skipped and time by alpha (EAC-MoE, figure 7); baselines are crosses at the share they drop."""
    rows = [row for row in result["rows"] if row["alpha"] is not None]
    others = [row for row in result["rows"] if row["alpha"] is None]
    alphas, texts = [row["alpha"] for row in rows], list(rows[0]["perplexity"])
    figure = Figure(figsize=(16, 3.6), layout="constrained")
    loss, answers, share, trade = figure.subplots(1, 4)
    for text in texts:
        loss.plot(alphas, [row["perplexity"][text] / rows[0]["perplexity"][text] for row in rows], "o-", label=text)
    loss.axhline(1 + result["tolerance"], color="gray", linestyle="--", label="tolerance")
    loss.set_title("perplexity relative to no skipping", fontsize=10)
    for text in rows[0]["accuracy"]:
        answers.plot(alphas, [row["accuracy"][text] for row in rows], "o-", label=text)
    answers.set_title("questions answered correctly" if rows[0]["accuracy"] else "no questions", fontsize=10)
    for key, label in (
        ("experts_skipped", "(sequence, expert) pairs skipped"),
        ("pairs_dropped", "(token, expert) pairs dropped"),
        ("latency", "time relative to no skipping"),
    ):
        share.plot(alphas, [row[key] for row in rows], "o-", label=label)
    share.set_title("share skipped, and time", fontsize=10)
    trade.plot([row["pairs_dropped"] for row in rows], [1 + row["increase"] for row in rows], "o-", label="PESF")
    for row in others:
        trade.plot([row["pairs_dropped"]], [1 + row["increase"]], "x", markersize=9, label=row["name"])
    trade.set_title("relative perplexity of the worst text, by pairs dropped", fontsize=10)
    for axes in (loss, answers, share):
        axes.set_xlabel("alpha")
        if result["recommended"]:
            axes.axvline(result["recommended"], color="green", linewidth=1)
    trade.set_xlabel("(token, expert) pairs dropped")
    for axes in (loss, share, trade):
        axes.legend(fontsize=7)
    return figure
