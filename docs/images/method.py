"""Draws the method as method.svg and method.png beside this script: `python docs/images/method.py`."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
matplotlib.rcParams |= {"svg.hashsalt": "method", "font.family": "DejaVu Sans"}  # the same bytes every time

from matplotlib import pyplot as plt  # noqa: E402
from matplotlib.patches import Circle, FancyArrowPatch, FancyBboxPatch  # noqa: E402

INK, MUTED, LINE, PANEL, PANEL_FILL = "#1f2933", "#4d5a66", "#8896a4", "#d5dbe1", "#f7f8fa"
ORIGINAL, ORIGINAL_FILL = "#2f6299", "#e4edf6"  # the full-precision stream x
COMPRESSED, COMPRESSED_FILL = "#a9541f", "#f9eadf"  # the compressed stream x_hat
TOP, BOTTOM = 41.0, 22.6  # heights of the two streams
ATTENTION, ROUTER, EXPERTS = 29.0, 47.5, 66.0  # centres of a block's parts
WIDTH, HEIGHT = 13.5, 8.4  # of their boxes
LEFT, RIGHT = 13.5, 81.0  # of the block
LAST = 100.0  # centre of what follows the last block
X, X_HAT = "x", "x\u0302"


def box(ax, x, y, width, height, edge, fill):
    style = "round,pad=0,rounding_size=0.9"
    ax.add_patch(FancyBboxPatch((x - width / 2, y - height / 2), width, height, style, ec=edge, fc=fill, lw=1.3))


def write(ax, x, y, text, color=INK, size=10.5, **options):
    """Lines of text, the baseline of the first one at y."""
    for i, line in enumerate(text.split("\n")):
        ax.text(x, y - 2.1 * i, line, color=color, fontsize=size, **{"ha": "center", "va": "baseline"} | options)


def title(ax, x, y, text):
    write(ax, x, y, text, size=11.5, weight="bold")


def arrow(ax, start, end, color=LINE):
    head = {"arrowstyle": "-|>", "mutation_scale": 14, "shrinkA": 0, "shrinkB": 0}
    ax.add_patch(FancyArrowPatch(start, end, lw=1.7, color=color, **head))


def phase(ax, x, y, number):
    ax.add_patch(Circle((x, y), 1.45, fc=INK, ec="white", lw=1.2, zorder=5))
    write(ax, x, y - 0.63, str(number), "white", weight="bold", zorder=6)


def stream(ax, y, name, edge, fill, texts):
    """A stream's way through the parts of a block, and on to what follows the last one."""
    ends = [10.3, *(x + side * WIDTH / 2 for x in (ATTENTION, ROUTER, EXPERTS) for side in (-1, 1)), LAST - 12.1]
    for start, end in zip(ends[::2], ends[1::2], strict=True):
        arrow(ax, (start, y), (end, y), edge)
    for x, part, text in zip((ATTENTION, ROUTER, EXPERTS), ("attention", "router", "experts"), texts, strict=True):
        box(ax, x, y, WIDTH, HEIGHT, edge, fill)
        title(ax, x, y + 0.7, part)
        write(ax, x, y - 1.8, text, MUTED)
    write(ax, 17.8, y + 1.2, name, edge, 14, style="italic")


def draw():
    figure, ax = plt.subplots(figsize=(11.4, 5.7))
    ax.set(xlim=(0, 114), ylim=(0, 57), aspect="equal")
    ax.axis("off")
    figure.subplots_adjust(0, 0, 1, 1)
    middle, tall, edge = (TOP + BOTTOM) / 2, TOP - BOTTOM + HEIGHT, BOTTOM - HEIGHT / 2

    box(ax, 5.5, middle, 9.5, tall, LINE, "white")
    title(ax, 5.5, middle + 1.2, "text")
    write(ax, 5.5, middle - 1.3, "windows\nof tokens", MUTED)

    # --- a block
    box(ax, (LEFT + RIGHT) / 2, 28.5, RIGHT - LEFT, 55, PANEL, PANEL_FILL)
    write(ax, (LEFT + RIGHT) / 2, 52.8, "one block after another; only one is in memory", size=11.5)
    stream(ax, TOP, X, ORIGINAL, ORIGINAL_FILL, ("full precision",) * 3)
    stream(ax, BOTTOM, X_HAT, COMPRESSED, COMPRESSED_FILL, ("4 bit", "calibrated", "2 or 3 bit"))
    write(ax, 84.4, TOP + 1.2, X, ORIGINAL, 14, style="italic")
    write(ax, 84.4, BOTTOM + 1.3, "blocks", COMPRESSED)
    phase(ax, ROUTER, TOP + HEIGHT / 2, 1)
    title(ax, ROUTER, TOP + 6.4, "observe")
    arrow(ax, (ROUTER, TOP - HEIGHT / 2), (ROUTER, BOTTOM + HEIGHT / 2), ORIGINAL)
    write(ax, ROUTER + 1.6, middle + 0.4, "which experts full\nprecision selects", ORIGINAL, ha="left")
    for number, x, name, text in (
        (2, ATTENTION, "GPTQ", "on what the\ncompressed blocks\nbefore it produce"),
        (3, ROUTER, "calibrate", "to select what\nfull precision\nselects"),
        (4, EXPERTS, "GPTQ", "of each expert on\nthe tokens that\nnow reach it"),
    ):
        phase(ax, x, edge, number)
        title(ax, x, edge - 3.8, name)
        write(ax, x, edge - 6.1, text, MUTED)
    phase(ax, 76.9, BOTTOM, 5)
    title(ax, 76.9, BOTTOM - 3.6, "replay")
    for x, name, text, color in (
        (21.4, X, "what full precision produces", ORIGINAL),
        (48.6, X_HAT, "what the compressed blocks produce", COMPRESSED),
    ):
        write(ax, x, 3.2, name, color, 14, style="italic")
        write(ax, x + 1.8, 3.2, text, MUTED, ha="left")

    # --- after the last block
    write(ax, LAST, 52.8, "after the last block", size=11.5)
    box(ax, LAST, middle, 24, tall, LINE, "white")
    title(ax, LAST, middle + 4.0, "joint stage")
    text = "routers, norms, scales\nand codes of all blocks\nare trained towards the\noriginal's predictions"
    write(ax, LAST, middle + 1.5, text, MUTED)
    arrow(ax, (LAST, edge), (LAST, 10.7))
    box(ax, LAST, 5.8, 24, 9.6, LINE, "white")
    title(ax, LAST, 6.8, "compressed/")
    write(ax, LAST, 4.4, "packed weights, read\nback and compared", MUTED)
    return figure


if __name__ == "__main__":
    figure = draw()
    for suffix, metadata in (("svg", {"Date": None}), ("png", {})):
        figure.savefig(Path(__file__).with_suffix(f".{suffix}"), dpi=170, facecolor="white", metadata=metadata)
