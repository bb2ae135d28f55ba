"""`eacmoe analyze` reports which experts a model selects for each text, as JSON, PNG and TensorBoard images."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from eacmoe_lightning.analysis.cross import cross_summary, cross_table
from eacmoe_lightning.analysis.selection import describe, select
from eacmoe_lightning.analysis.skipping_sweep import summary as skipping_summary
from eacmoe_lightning.analysis.skipping_sweep import sweep
from eacmoe_lightning.commands.configs import find_config
from eacmoe_lightning.commands.cross import CrossRows
from eacmoe_lightning.commands.own_options import changed, check_least, check_window_length, refuse_others, text_of
from eacmoe_lightning.compressed.loading import load
from eacmoe_lightning.compressed.opening import open_model
from eacmoe_lightning.evaluation.choice_task import make_questions
from eacmoe_lightning.models.originals import stored_name
from eacmoe_lightning.run.device import device_of
from eacmoe_lightning.run.files import read_json, write_json
from eacmoe_lightning.skipping import PESF
from eacmoe_lightning.skipping.selection import Survivors
from eacmoe_lightning.text.sources import name_sources
from eacmoe_lightning.text.windows import read_windows

RESULT = "analysis.json"
NAMES = {  # of options of `fit`'s data; the longer names first
    "num_heldout_windows": "num_windows",
    "num_windows": "cross_windows",
    "calibration": "cross_calibration",
    "heldout": "texts",
}


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
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Reports selection frequencies, the similarity of texts to the routers, coverage and load balance.

    It writes `analysis.json` (`analysis.selection.describe` explains the keys), `similarity.png`, `frequency.png`,
    `balance.png` and `tensorboard/` to the output directory.

    With `--alphas '[0.1, 0.3, 0.5, 0.7]'` it also measures what skipping rarely selected experts (PESF) costs and
    saves, and recommends an alpha. A compressed model runs packed for this. The results are in `analysis.json` under
    `skipping` (see `analysis.skipping_sweep.sweep`), in `skipping.png` and in TensorBoard.

    Args:
        model: A run directory, a compressed directory or an original model (`bundled`, a directory or a hub id).
        output: Directory to write to.
        texts: Sources of the texts, as for --data.heldout: one source, a list, or {name: source}. null takes the
            bundled held-out texts.
        num_windows: Number of windows from the start of each text; null takes all.
        window_length: Tokens per window.
        batch_size: Windows per batch.
        floor: Experts below this share of the mean load do not count in `coverage_above_floor`. The alpha of PESF skips
            experts by the same measure.
        dtype: Dtype to load the model in.
        device: Device that the model runs on.
        alphas: Values in (0, 1] of PESF's alpha to measure; null skips the sweep.
        tolerance: Largest relative increase of any text's perplexity that the recommended alpha may cause.
        survivors: What happens to the other experts of a token when one is skipped: keep (their weights), renormalize
            or reroute.
        rescue: A share in [0, 1]: a rare expert still runs for a token that gives it at least this share of the token's
            largest weight. null rescues none, as in the paper.
        num_questions: Number of continuation questions per text, answered at every alpha.
        baselines: Also measure truncation to ceil(2K/3) experts, EES and ODP, calibrated on the bundled text.
        cross: A config of fit (a file, or a name such as tiny-2.06). The model is compressed once for each text, in
            this dtype (auto: that of the config) and on this device, every result is evaluated on all texts, and the
            tables go to `cross.json` and `cross.png`. The runs are kept in `cross/`, so that an interrupted analysis
            resumes when it is started again.
        cross_calibration: Sources of the calibration texts, named after the texts of the same kind. null calibrates on
            the second half of each text and evaluates on the first.
        cross_windows: Number of calibration windows for `cross`.
        trust_remote_code: Whether Python code that came with the model may run, where transformers has no class for it.

    Raises:
        FileNotFoundError: there is no such model or text.
        ValueError: the model has no experts, a text is too short, an option is out of range or without effect, or the
            output directory holds something else.
    """
    check_least(batch_size=(batch_size, 1), num_questions=(num_questions, 0))
    if not tolerance >= 0:
        raise ValueError(f"tolerance={tolerance} is negative (--tolerance): it is the increase in perplexity to accept")
    check_window_length(window_length)
    given = {"texts": texts, "alphas": alphas, "cross_calibration": cross_calibration}
    for option, value in given.items():
        if value is not None and not value:
            raise ValueError(f"--{option} is empty: pass one or more, or null")
    if alphas is None:
        of_alphas = {"num_questions": num_questions, "baselines": baselines, "tolerance": tolerance}
        _refuse_without("alphas", **of_alphas, survivors=survivors, rescue=rescue)
    if cross is None:
        _refuse_without("cross", cross_calibration=cross_calibration)
    if not 0 <= floor <= 1:
        raise ValueError(f"floor={floor} (--floor) is not in [0, 1]")
    for alpha in alphas or ():
        PESF(alpha, survivors, rescue)  # raises before any work starts if an option is wrong
    if cross is not None:
        find_config(cross, "--cross")
    device_of(device)  # raises now
    opened = open_model(model, dtype, trust_remote_code=trust_remote_code)
    if cross is not None and opened.is_compressed:
        raise ValueError(f"{model} (--model) is already compressed, but --cross compresses an original model")
    folder, directory = Path(output), opened.directory
    _refuse_other_model(folder, model)
    sources = name_sources(texts, "--texts")
    if cross is not None and cross_calibration is None:
        cross_calibration = {name: f"{source}[50%:]" for name, source in sources.items()}
        sources = {name: f"{source}[:50%]" for name, source in sources.items()}
    read = partial(read_windows, tokenizer=directory, window_length=window_length, trust_remote_code=trust_remote_code)
    with text_of("--texts"):
        windows = {name: read(source, num_windows=num_windows) for name, source in sources.items()}
    count = {"num_questions": num_questions, "context_length": window_length * 3 // 4}
    questions = {name: make_questions(ids, **count) for name, ids in windows.items()} if num_questions else None
    with text_of("--baselines"):
        calibration = read("bundled:calibration", num_windows=16) if baselines else None
    if cross is not None:
        options = {"config": cross, "model.name_or_path": model, "data.heldout": sources}
        options |= {"data.num_heldout_windows": num_windows, "data.num_windows": cross_windows}
        options |= {"data.window_length": window_length, "trainer.enable_progress_bar": False}
        options |= _places(device) | ({"model.dtype": dtype} if dtype != "auto" else {})
        options |= {"model.trust_remote_code": True} if trust_remote_code else {}
        calibrations = name_sources(cross_calibration, "--cross_calibration")
        with text_of("--cross", **NAMES):
            rows = CrossRows(folder / "cross", options, calibrations)
    from eacmoe_lightning.analysis import figures  # importing matplotlib takes a second

    subject = opened.in_memory()
    subject.model.to(device)
    selections = {name: select(subject, ids, batch_size) for name, ids in windows.items()}
    description = describe(selections, [block.index for block in subject.moe_blocks], floor)
    folder.mkdir(parents=True, exist_ok=True)
    drawings = {
        "similarity": figures.similarity(description),
        "frequency": figures.frequency(description),
        "balance": figures.balance(description, floor),
    }
    if alphas:
        served = subject.model  # a compressed model runs packed, as it is served
        if opened.is_compressed:
            served = load(directory, dtype, trust_remote_code=trust_remote_code).to(device)
        description["skipping"] = sweep(
            served, windows, alphas, tolerance, survivors, rescue, batch_size, calibration, questions
        )
        drawings["skipping"] = figures.skipping(description["skipping"])
    figures.write(folder, drawings)
    settings = {"model": stored_name(model), "sources": sources, "window_length": window_length}
    settings |= {"floor": floor, "dtype": dtype}
    write_json(folder / RESULT, settings | description)
    print(summary(description, floor))
    if alphas:
        print(skipping_summary(description["skipping"]))
    if cross is not None:
        del subject  # fit loads it again
        description["cross"] = _cross(folder, rows)
    print(f"{folder}: analysis.json, figures, tensorboard --logdir {folder}")
    return description


def _refuse_without(needed: str, **options: Any) -> None:
    """Raises ValueError for an option that has no effect without another, unless it is at its default."""
    if given := changed(analyze, **options):
        raise ValueError(f"--{given} needs --{needed}: pass that too, or leave it out")


def _refuse_other_model(folder: Path, model: str) -> None:
    """Raises ValueError if the output holds something else than an analysis of this model."""
    refuse_others(folder, RESULT)
    if (folder / RESULT).exists() and stored_name(held := read_json(folder / RESULT)["model"]) != stored_name(model):
        raise ValueError(
            f"{folder} (--output) holds an analysis of {held}, and this one is of {model}: pass another --output"
        )


def _places(device: str) -> dict[str, Any]:
    """The trainer's options for a device."""
    chosen = torch.device(device)
    return {
        "trainer.accelerator": chosen.type,
        "trainer.devices": 1 if chosen.type == "cpu" or chosen.index is None else [chosen.index],
    }


def _cross(folder: Path, rows: CrossRows) -> dict[str, Any]:
    """Compresses the model once for each calibration text, and writes and prints what each loses on all texts."""
    from eacmoe_lightning.analysis import figures  # importing matplotlib takes a second

    table = cross_table(rows.fit())
    figures.write(folder, {"cross": figures.cross(table)})
    write_json(folder / "cross.json", table)
    print(cross_summary(table))
    return table


def summary(description: dict[str, Any], floor: float) -> str:
    """A few lines for the terminal."""
    similarity = description["similarity"]
    names, width = similarity["texts"], max(12, *(len(name) for name in similarity["texts"]))
    lines = ["cosine of selection frequencies (last column: a text's even windows against its odd windows)"]
    lines.append(" " * width + "".join(f" {name[:9]:>9s}" for name in [*names, "within"]))
    for name, row in zip(names, similarity["matrix"], strict=True):
        within = similarity["within"][name]
        lines.append(f"{name:{width}s}" + "".join(f" {v:9.3f}" for v in row) + (f" {within:9.3f}" if within else ""))
    pairs = ", ".join("-".join(pair) for pair in similarity["similar"])
    lines.append(f"alike (above {similarity['threshold']}): {pairs or 'none'}")
    head = ("perplexity", "coverage", f">= {floor:g} mean", "entropy", "max/mean")
    lines.append(" " * width + "".join(f" {name:>11s}" for name in head))
    for name, values in description["texts"].items():
        shares = f" {values['coverage']:11.1%} {values['coverage_above_floor']:11.1%}"
        lines.append(
            f"{name:{width}s} {values['perplexity']:11.3f}{shares} {values['entropy']:11.3f}"
            f" {values['max_over_mean']:11.2f}"
        )
    return "\n".join(lines)
