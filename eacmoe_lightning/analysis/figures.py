"""The analysis as figures; `write` leaves them as PNG and as TensorBoard images."""

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

from eacmoe_lightning.store import write_atomically

OUTLINE = [effects.withStroke(linewidth=2, foreground="white")]


def write(output: Path, figures: dict[str, Figure]) -> None:
    """`<name>.png` in `output` for each figure, and the same in `output/tensorboard`."""
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
    """Cosines between texts (EAC-MoE, figure 2); what is above the threshold is framed."""
    said = description["similarity"]
    names, matrix, threshold = said["texts"], said["matrix"], said["threshold"]
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
    """Every expert's load over the mean, block by block, a panel for each text. Removed experts are blank."""
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


def balance(description: dict[str, Any], floor: float) -> Figure:
    """Entropy, busiest expert and coverage by block, a line for each text."""
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
