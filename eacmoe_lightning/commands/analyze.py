"""`eacmoe analyze`: which experts a model selects for which text, as JSON, PNG and TensorBoard images."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from eacmoe_lightning.analysis.cross import cross_summary, cross_table
from eacmoe_lightning.analysis.selection import describe, select
from eacmoe_lightning.analysis.skipping_sweep import summary as skipping_summary
from eacmoe_lightning.analysis.skipping_sweep import sweep
from eacmoe_lightning.commands.configs import find_config
from eacmoe_lightning.commands.cross import fit_rows
from eacmoe_lightning.compressed.loading import load
from eacmoe_lightning.compressed.opening import open_model
from eacmoe_lightning.evaluation.choice_task import make_questions
from eacmoe_lightning.run.files import write_json
from eacmoe_lightning.skipping import PESF
from eacmoe_lightning.skipping.selection import Survivors
from eacmoe_lightning.text.sources import name_sources
from eacmoe_lightning.text.windows import read_windows


def analyze(
    model: str,
    output: str,
    texts: dict[str, str] | list[str] | str | None = None,
    num_windows: int | None = 16,
    window_length: int = 512,
    batch_size: int = 8,
    floor: float = 0.3,
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
    device: str = "cpu",
    alphas: list[float] | None = None,
    tolerance: float = 0.01,
    survivors: Survivors = "keep",
    rescue: float | None = None,
    num_questions: int = 0,
    baselines: bool = False,
    cross: str | None = None,
    cross_calibration: dict[str, str] | list[str] | str | None = None,
    cross_windows: int = 24,
) -> dict[str, Any]:
    """Selection frequencies of each text, how alike texts are to the routers, coverage and load balance.

    With `--alphas '[0.1, 0.3, 0.5, 0.7]'` also what skipping rarely selected experts (PESF) costs and saves, and which
    alpha to take; a compressed model runs packed there. In `analysis.json` under `skipping` (see
    `skipping.sweep.sweep`), in `skipping.png` and in TensorBoard.

    Leaves `analysis.json` (its keys: see `selection.describe`), `similarity.png`, `frequency.png`, `balance.png` and
    `tensorboard/` in the output directory.

    Args:
        model: A run directory, a compressed directory or an original model (`bundled`, a directory or a hub id).
        output: The directory to write to.
        texts: Sources, as for --data.heldout: one, a list, or {name: source}; null: the held-out texts of the package.
        num_windows: Windows of each text, from its start; null takes all.
        window_length: Tokens per window.
        batch_size: Windows at a time.
        floor: An expert below this share of the mean load counts as idle in `coverage_above_floor`; PESF skips experts
            by the same measure (its alpha).
        dtype: In which the model is loaded.
        device: On which it runs.
        alphas: Candidates in (0, 1] for PESF; null leaves the sweep out.
        tolerance: The share of its perplexity that any text may lose under the alpha that is recommended.
        survivors: Of a token that loses an expert: keep (their weights), renormalize or reroute.
        rescue: In [0, 1]: a rare expert still runs for a token that gives it this share of its largest weight; null,
            as in the paper: for none.
        num_questions: Continuation questions of each text, answered under every candidate.
        baselines: Also measure truncation to ceil(2K/3) experts, EES and ODP, calibrated on the package's text.
        cross: A config of fit, a file or a name such as tiny-2.06: also compresses the model once for each text,
            evaluates every result on all of them, and leaves the tables in `cross.json` and `cross.png`. The runs are
            kept in `cross/`, and an interrupted analysis goes on when it is started again.
        cross_calibration: Sources to calibrate on, by the names of the texts that are of their kind; null: the second
            half of each text, and its first half is evaluated.
        cross_windows: Windows to calibrate on.

    Raises:
        FileNotFoundError: there is no such model or text.
        ValueError: the model has no experts, a text is too short, or an option is out of range.
    """
    for option, value in (("batch_size", batch_size), ("window_length", window_length)):
        if value < 1:
            raise ValueError(f"{option}={value} (--{option}) is below 1")
    if not 0 <= floor <= 1:
        raise ValueError(f"floor={floor} (--floor) is not in [0, 1]")
    for alpha in alphas or ():
        PESF(alpha, survivors, rescue)  # says what is wrong before anything runs
    if cross is not None:
        find_config(cross, "--cross")
    opened = open_model(model, dtype)
    if cross is not None and opened.is_compressed:
        raise ValueError(f"{model} (--model) is compressed already: --cross compresses an original")
    directory, subject = opened.directory, opened.in_memory()
    subject.model.to(device)
    sources = name_sources(texts, "--texts")
    if cross is not None and cross_calibration is None:
        cross_calibration = {name: f"{source}[50%:]" for name, source in sources.items()}
        sources = {name: f"{source}[:50%]" for name, source in sources.items()}
    windows = {name: read_windows(source, directory, num_windows, window_length) for name, source in sources.items()}
    from eacmoe_lightning.analysis import figures  # matplotlib takes a second: only where it is needed

    selections = {name: select(subject, own, batch_size) for name, own in windows.items()}
    description = describe(selections, [block.index for block in subject.moe_blocks], floor)
    place = Path(output)
    place.mkdir(parents=True, exist_ok=True)
    drawn = {
        "similarity": figures.similarity(description),
        "frequency": figures.frequency(description),
        "balance": figures.balance(description, floor),
    }
    if alphas:
        served = subject.model  # as it is served: a compressed model packed
        if opened.is_compressed:
            served = load(directory, dtype).to(device)
        count = num_questions and {"num_questions": num_questions, "context_length": window_length * 3 // 4}
        description["skipping"] = sweep(
            served,
            windows,
            alphas,
            tolerance,
            survivors,
            rescue,
            batch_size,
            read_windows("bundled:calibration", directory, 16, window_length) if baselines else None,
            {name: make_questions(own, **count) for name, own in windows.items()} if count else None,
        )
        drawn["skipping"] = figures.skipping(description["skipping"])
    figures.write(place, drawn)
    settings = {"model": model, "sources": sources, "window_length": window_length, "floor": floor, "dtype": dtype}
    write_json(place / "analysis.json", settings | description)
    print(summary(description, floor))
    if alphas:
        print(skipping_summary(description["skipping"]))
    if cross is not None:
        del subject  # fit loads it again
        options = {"config": cross, "model.name_or_path": model, "data.heldout": sources}
        options |= {"data.num_heldout_windows": num_windows, "data.num_windows": cross_windows}
        options |= {"data.window_length": window_length, "trainer.enable_progress_bar": False}
        rows = fit_rows(place / "cross", options, name_sources(cross_calibration, "--cross_calibration"))
        description["cross"] = cross_table(rows)
        figures.write(place, {"cross": figures.cross(description["cross"])})
        write_json(place / "cross.json", description["cross"])
        print(cross_summary(description["cross"]))
    print(f"{place}: analysis.json, figures, tensorboard --logdir {place}")
    return description


def summary(description: dict[str, Any], floor: float) -> str:
    """A few lines for the terminal."""
    said = description["similarity"]
    names, width = said["texts"], max(12, *(len(name) for name in said["texts"]))
    lines = ["cosine of selection frequencies (last column: even against odd windows of the text itself)"]
    lines.append(" " * width + "".join(f" {name[:9]:>9s}" for name in [*names, "within"]))
    for name, row in zip(names, said["matrix"], strict=True):
        within = said["within"][name]
        lines.append(f"{name:{width}s}" + "".join(f" {v:9.3f}" for v in row) + (f" {within:9.3f}" if within else ""))
    lines.append(f"alike (above {said['threshold']}): {', '.join('-'.join(p) for p in said['similar']) or 'none'}")
    head = ("perplexity", "coverage", f">= {floor:g} mean", "entropy", "max/mean")
    lines.append(" " * width + "".join(f" {name:>11s}" for name in head))
    for name, values in description["texts"].items():
        shares = f" {values['coverage']:11.1%} {values['coverage_above_floor']:11.1%}"
        lines.append(
            f"{name:{width}s} {values['perplexity']:11.3f}{shares} {values['entropy']:11.3f}"
            f" {values['max_over_mean']:11.2f}"
        )
    return "\n".join(lines)
