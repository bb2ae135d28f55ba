"""A study as a heat map: blocks down, bounds across, nats lost as colour; a panel for each kind and set of experts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure  # without pyplot: no window, no global state
from torch.utils.tensorboard import SummaryWriter

from eacmoe_lightning.run.files import whole_directory, write_atomically
from eacmoe_lightning.study.report import over_seeds

LEAST = 1e-4  # nats at the light end of the colours; smaller losses and gains get the same colour
PANEL = (3.4, 0.42)  # inches: width of a panel, height of a row


def draw(rows: list[dict[str, Any]]) -> Figure:
    """The heat map of a study's rows (`report.row_of`); each field shows nats lost and, below, the accuracy."""
    kinds = list(dict.fromkeys(row["kind"] for row in rows))
    choices = list(dict.fromkeys(row["experts"] for row in rows))
    largest = max((row["lost"] for row in rows), default=1.0)
    norm = LogNorm(LEAST, max(largest, 10 * LEAST), clip=True)
    num_blocks = len({row["blocks"] for row in rows})
    figure = Figure((PANEL[0] * len(choices) + 0.8, (PANEL[1] * num_blocks + 0.9) * len(kinds)), layout="constrained")
    panels = figure.subplots(len(kinds), len(choices), squeeze=False)
    image = None
    for panel_row, kind in zip(panels, kinds, strict=True):
        for panel, experts in zip(panel_row, choices, strict=True):
            shown = [row for row in rows if row["kind"] == kind and row["experts"] == experts]
            blocks = list(dict.fromkeys(row["blocks"] for row in shown))
            bounds = list(dict.fromkeys((row["mode"], row["bound"]) for row in shown))
            values = [[_value(shown, "lost", b, bound) for bound in bounds] for b in blocks]
            image = panel.imshow(
                [[max(v, LEAST) if v is not None else float("nan") for v in line] for line in values],
                norm=norm,
                cmap="viridis_r",
                aspect="auto",
            )
            for i, name in enumerate(blocks):
                for j, bound in enumerate(bounds):
                    _write(panel, i, j, values[i][j], _value(shown, "accuracy", name, bound), norm)
            panel.set_xticks(range(len(bounds)), [f"{value:g}" for _, value in bounds])
            panel.set_yticks(range(len(blocks)), blocks)
            panel.set_title(f"{kind}, {experts} experts", fontsize=9)
            panel.set_xlabel("bound: " + ", ".join(dict.fromkeys(mode for mode, _ in bounds)), fontsize=8)
    if image is not None:
        figure.colorbar(image, ax=panels, label="nats per token lost", shrink=0.6)
    return figure


def _value(rows: list[dict[str, Any]], column: str, blocks: str, bound: tuple[str, float]) -> float | None:
    return over_seeds(rows, column, blocks=blocks, mode=bound[0], bound=bound[1])


def _write(panel, i: int, j: int, lost: float | None, accuracy: float | None, norm) -> None:
    if lost is None:
        return
    text = f"{lost:+.3f}" + (f"\n{accuracy:.2f}" if accuracy is not None else "")
    dark = norm(max(lost, LEAST)) > 0.6
    panel.text(j, i, text, ha="center", va="center", fontsize=6, color="white" if dark else "black")


def write(figure: Figure, path: Path) -> None:
    """Writes the heat map as PNG."""
    write_atomically(path, lambda partial: figure.savefig(partial, format="png", dpi=150))


def log_to_tensorboard(directory: Path, figure: Figure, rows: list[dict[str, Any]]) -> None:
    """Logs the heat map, and each row's loss, accuracy and changed selections over the bound; replaces earlier logs."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    pixels = np.asarray(canvas.buffer_rgba())[..., :3]  # [height, width, 3]
    with whole_directory(directory) as partial, SummaryWriter(str(partial)) as writer:
        writer.add_image("heat map", pixels, dataformats="HWC")
        for row in rows:
            step = round(1000 * row["bound"])  # of the bound: TensorBoard's axis takes whole numbers
            curve = f"{row['kind']}, {row['experts']} experts, blocks {row['blocks']}"
            curve += "" if row["seed"] is None else f", seed {row['seed']}"
            for column in ("lost", "accuracy", "changed any"):
                if row[column] is not None:
                    writer.add_scalar(f"{column}/{curve}", row[column], step)
