"""Sensitivities and allocations for people: a heat map, a curve of size against damage, tables, TensorBoard."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure  # without pyplot: no window, no global state
from torch import Tensor, from_numpy
from torch.utils.tensorboard import SummaryWriter

from eacmoe_lightning.budget.allocation import Allocator
from eacmoe_lightning.budget.sensitivity import LEAST, Sensitivity
from eacmoe_lightning.calibration.recipe import PARTS
from eacmoe_lightning.run.files import whole_directory, write_atomically, write_json
from eacmoe_lightning.weight_grids import WeightGrid

POINTS = 25  # of the curve
DECADES = 4  # of the heat map's colours
COLUMN, ROW = 0.16, 0.3  # inches of a field


def write(output: Path, sensitivity: Sensitivity, allocator: Allocator, model: str) -> None:
    """Writes `sensitivity.md`, `heatmap.png`, `curve.png`, `curve.json` and TensorBoard logs."""
    shown = curve(allocator)
    figures = {"heatmap": heat_map(sensitivity), "curve": curve_figure(shown)}
    for name, figure in figures.items():
        write_atomically(output / f"{name}.png", lambda partial, f=figure: f.savefig(partial, format="png", dpi=120))
    write_json(output / "curve.json", shown)
    text = markdown(sensitivity, shown, model)
    write_atomically(output / "sensitivity.md", lambda partial: partial.write_text(text))
    with whole_directory(output / "tensorboard") as partial, SummaryWriter(str(partial)) as writer:
        for name, figure in figures.items():
            writer.add_image(name, pixels(figure), dataformats="HWC")
        writer.add_text("sensitivity", text)
    print(f"{output}: sensitivity.md, heatmap.png, curve.png; pass it as --model.sensitivity")


def curve(allocator: Allocator) -> list[dict[str, float]]:
    """Predicted damage over size, from the smallest to the largest choices: rows of `bits`, `nbytes` and `damage`."""
    sizes = np.geomspace(allocator.smallest, allocator.largest, POINTS)
    rows = [allocator.allocate(float(size) * (1 + 1e-9)) for size in sizes]
    return [{"bits": row.bits, "nbytes": row.nbytes, "damage": row.damage} for row in rows]


def curve_figure(rows: list[dict[str, float]], measured: dict[str, tuple[float, float]] | None = None) -> Figure:
    """The curve, and beside it what was measured: by text, bits and divergence."""
    figure = Figure((6, 3.6), layout="constrained")
    axes = figure.subplots()
    axes.plot([row["bits"] for row in rows], [row["damage"] for row in rows], marker=".")
    for text, point in (measured or {}).items():
        axes.plot(*point, "x", label=f"this run, {text}")
    if measured:
        axes.legend(fontsize=7)
    axes.set_yscale("log")
    axes.set_xlabel("bits a weight, with scales and zero points")
    axes.set_ylabel("predicted KL divergence, nats a token")
    axes.grid(alpha=0.3)
    return figure


def heat_map(sensitivity: Sensitivity) -> Figure:
    """Blocks down; attention, shared experts and each routed expert across; nats at the least measured width."""
    width = sensitivity.widths[0]
    rows = [by_column(sensitivity, block["block"], width) for block in sensitivity.blocks]
    columns = list(dict.fromkeys(name for row in rows for name in row))
    values = np.array([[row.get(name, np.nan) for name in columns] for row in rows])
    return _field(values, columns, f"nats a token lost with this weight alone at {width:g} bits", is_log=True)


def by_column(sensitivity: Sensitivity, block: int, width: float) -> dict[str, float]:
    """The damage of a block's attention, shared experts and each routed expert at a width, as far as it has them."""
    damages = {
        part: sensitivity.part(block, part, width)
        for part in ("attention", "shared")
        if any(name.startswith(f"{block:03d}.{part}.") for name in sensitivity.damage)
    }
    if "error" in sensitivity.blocks[block]:
        experts = sensitivity.experts(block, width).values()
        damages |= {str(e): sum(values) for e, values in enumerate(zip(*experts, strict=True))}
    return damages


def allocation_map(grids: Iterable[WeightGrid]) -> Figure:
    """The same picture of what was chosen: the mean bits of attention, shared experts and each routed expert."""
    widths: dict[int, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for grid in grids:
        numbers = range(grid.shape[0]) if grid.experts is None else grid.experts
        for name in [grid.part] if grid.part != "experts" else map(str, numbers):
            widths[grid.block][name].append(grid.bits)
    first = dict.fromkeys(("attention", "shared"), 0)
    columns = sorted({name for row in widths.values() for name in row}, key=lambda n: (n not in first, len(n), n))
    rows = [
        [np.mean(widths[block][name]) if widths[block][name] else np.nan for name in columns]
        for block in sorted(widths)
    ]
    return _field(np.array(rows), columns, "bits of the codes", is_log=False)


def _field(values: np.ndarray, columns: list[str], label: str, is_log: bool) -> Figure:
    figure = Figure((2.2 + COLUMN * len(columns), 1.4 + ROW * len(values)), layout="constrained")
    axes = figure.subplots()
    most = max(float(np.nanmax(values)), 10 * LEAST)
    norm = LogNorm(max(most / 10**DECADES, LEAST), most, clip=True) if is_log else None
    image = axes.imshow(values, norm=norm, cmap="viridis_r" if is_log else "viridis", aspect="auto")
    names = [name for name in columns if not name.isdigit()]
    step = max(1, (len(columns) - len(names)) // 16)
    at = [i for i, name in enumerate(columns) if not name.isdigit() or int(name) % step == 0]
    axes.set_xticks(at, [columns[i] for i in at], rotation=90, fontsize=7)
    axes.set_yticks(range(len(values)), range(len(values)), fontsize=7)
    axes.set_xlabel("part, and number of the routed expert", fontsize=8)
    axes.set_ylabel("block", fontsize=8)
    figure.colorbar(image, ax=axes).set_label(label, fontsize=8)
    return figure


def pixels(figure: Figure) -> Tensor:
    """[height, width, 3] uint8."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return from_numpy(np.asarray(canvas.buffer_rgba())[..., :3].copy())


def markdown(sensitivity: Sensitivity, rows: list[dict[str, float]], model: str) -> str:
    parts = [part for part in PARTS if any(f".{part}." in name for name in sensitivity.damage)]
    head = [f"{part}, {width:g} bit" for part in parts for width in sensitivity.widths]
    lines = [f"| block | {' | '.join(head)} |", "|---" * (len(head) + 1) + "|"]
    for block in sensitivity.blocks:
        index = block["block"]
        has = {part for part in parts if any(n.startswith(f"{index:03d}.{part}.") for n in sensitivity.damage)}
        values = [
            f"{sensitivity.part(index, part, width):.5f}" if part in has else ""
            for part in parts
            for width in sensitivity.widths
        ]
        lines.append(f"| {index} | {' | '.join(values)} |")
    sizes = [f"| {r['bits']:.3f} | {r['nbytes'] / 1e9:.4g} | {r['damage']:.4f} |" for r in rows]
    return (
        f"# What {model} loses\n\nNats of KL divergence per token with one part of one block quantized and all else "
        "the original.\n\n" + "\n".join(lines) + "\n\n## Size and predicted divergence\n\nBits of a quantized weight "
        "with scales and zero points, gigabytes of all of them, and what the choice by size would lose.\n\n"
        "| bits | GB | nats |\n|---|---|---|\n" + "\n".join(sizes) + "\n"
    )
