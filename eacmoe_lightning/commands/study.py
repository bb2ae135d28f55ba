"""`eacmoe study` measures every cell once, saves each result immediately, and reports all of them."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from eacmoe_lightning.commands.own_options import check_least, check_window_length, refuse_others, text_of
from eacmoe_lightning.compressed.opening import OpenedModel, open_model
from eacmoe_lightning.compressed.sizes import stored_parts
from eacmoe_lightning.evaluation import pareto
from eacmoe_lightning.evaluation.choice_task import make_questions
from eacmoe_lightning.models.fingerprint import fingerprint
from eacmoe_lightning.models.moe import MoEModel
from eacmoe_lightning.models.originals import stored_name
from eacmoe_lightning.models.tokenizer import tokenizer_of
from eacmoe_lightning.offload.codecs.bound import Bound, Mode
from eacmoe_lightning.run.device import device_of
from eacmoe_lightning.run.files import write_atomically, write_json
from eacmoe_lightning.run.lock import RunLock
from eacmoe_lightning.run.provenance import command_line, commit, processor
from eacmoe_lightning.study import budget, report, spend
from eacmoe_lightning.study.cells import Cell, block_groups, choose_experts, plan, stable_seed
from eacmoe_lightning.study.disturb import NOISES, disturbed
from eacmoe_lightning.study.measure import Measurement, Text
from eacmoe_lightning.study.results import Results
from eacmoe_lightning.text.checks import check_length, check_tokens
from eacmoe_lightning.text.documents import documents
from eacmoe_lightning.text.sources import name_sources, stored_source
from eacmoe_lightning.text.windows import digest, read_sizes, token_windows

RESULTS = "cells.json"
POINT = "the model with the experts of some blocks stored by a codec, each weight within an error bound"
QUESTION_WINDOWS = 4  # windows per question: the question's window and others for the wrong continuations


def study(
    output: str,
    model: str = "bundled",
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "float32",
    device: str = "cpu",
    blocks: list[int | str] | int | str = ["each", "depth"],  # noqa: B006  (read only; jsonargparse shows it)
    experts: list[str] | str = ["all"],  # noqa: B006
    kinds: list[str] | str = ["sz3", "gaussian-noise"],  # noqa: B006
    bound_mode: Literal["absolute", "range", "mean"] = "mean",
    bounds: list[float] | float = [0.1, 0.3, 0.5, 0.8],  # noqa: B006
    seeds: list[int] | int = [0],  # noqa: B006
    heldout: dict[str, str] | list[str] | str | None = None,
    num_windows: int = 8,
    window_length: int = 512,
    num_questions: int = 32,
    context_length: int = 32,
    continuation_length: int = 16,
    budgets: list[float] | float = [],  # noqa: B006
    budget_windows: int = 8,
    batch_tokens: int = 4096,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Measures which errors experts tolerate: puts errors into chosen experts and measures the loss on held-out text.

    A killed study resumes at its current cell when the same command is started again. With more bounds, kinds or
    experts it measures only the new cells.

    Args:
        output: Directory for the results: cells.json, study.json, study.csv, study.md, heatmap.png, tensorboard and,
            for the cells of codecs, pareto.html (size against KL divergence).
        model: A run directory, a compressed directory or an original model (`bundled`, a directory or a hub id).
        dtype: Dtype of the model, in which errors are bounded.
        device: Device that the model runs on.
        blocks: Blocks to put errors into: `each` (every block with experts by itself), `depth` (shallow, middle and
            deep blocks, divided as in the paper), `all`, or blocks such as `0` or `0,2-3`, which get errors together.
            This option and those below take one value or a list; `[0,2]` is block 0, and then block 2, by itself.
        experts: Experts of these blocks: `all`, `most-N` or `least-N` (the N most or least selected), or `random-N`.
        kinds: Kinds of error: the real error of a codec (`sz3`, `uniform`), or noise of the same nominal size
            (`gaussian-noise` as in the paper, `uniform-noise`).
        bound_mode: Unit of the bounds: weight units (`absolute`), or relative to a weight matrix's range (`range`) or
            its mean |w| (`mean`, the paper's alpha).
        bounds: Error bounds to measure.
        seeds: Seeds of the noise and of random experts; every seed is measured.
        heldout: Sources of the texts, as for --data.heldout; null takes the bundled held-out texts.
        num_windows: Number of windows from the start of each text.
        window_length: Tokens per window.
        num_questions: Number of questions per text, each with four continuations to choose from; 0 asks none.
        context_length: Tokens of a question's context.
        continuation_length: Tokens of a continuation.
        budgets: Global bounds whose bytes to redistribute. A bound for each block and expert is chosen from the study's
            measurements of single blocks and compared with the global bound; the offloaded model takes the resulting
            bounds-*.json. The first of `kinds` is the codec.
        budget_windows: Number of windows per text for this comparison; they follow the windows of the study.
        batch_tokens: Tokens per forward pass.
        trust_remote_code: Whether Python code that came with the model may run, where transformers has no class for it.

    Raises:
        ValueError: an option is wrong, or the output holds a study of another model or other texts.
        FileNotFoundError: there is no such model or text.
        StoreError: the output cannot be read or written.
    """
    check_window_length(window_length)
    check_least(num_windows=(num_windows, 1), num_questions=(num_questions, 0), batch_tokens=(batch_tokens, 1))
    if num_questions:
        check_least(context_length=(context_length, 1), continuation_length=(continuation_length, 1))
    sizes = {"num_windows": num_windows, "window_length": window_length, "num_questions": num_questions}
    sizes |= {"context_length": context_length, "continuation_length": continuation_length}
    blocks = [str(block) for block in _several("blocks", blocks)]
    experts = _several("experts", experts)
    kinds, seeds = _several("kinds", kinds), _several("seeds", seeds)
    measured_bounds = _bounds_of("bounds", _several("bounds", bounds), bound_mode)
    global_bounds = _bounds_of("budgets", budgets if isinstance(budgets, list) else [budgets], bound_mode)
    if global_bounds:
        check_least(budget_windows=(budget_windows, 1))
    sources = name_sources(heldout, "--heldout")
    if not sources:
        raise ValueError("--heldout is empty: pass one or more sources, or null for the bundled texts")
    device_of(device)  # raises now
    refuse_others(Path(output), RESULTS)
    opened = open_model(model, dtype, trust_remote_code=trust_remote_code)
    directory, moe = opened.directory, opened.in_memory()
    moe.model.to(device)
    groups = block_groups(blocks, [block.index for block in moe.moe_blocks])
    cells = plan(groups, experts, kinds, measured_bounds, seeds)
    _check_budgets(global_bounds, groups, moe, kinds[0])
    read = partial(read_texts, sources, directory, trust_remote_code=trust_remote_code)
    heldout_texts, later_texts = read(**sizes), {}
    if global_bounds:
        later_texts = read(**sizes | {"num_windows": budget_windows, "num_questions": 0}, skip=num_windows)
    questions = [text.questions.input_ids for text in heldout_texts.values() if text.questions is not None]
    identity = {
        "model": stored_name(model),
        "fingerprint": fingerprint(str(directory)),
        "dtype": str(moe.model.dtype),
        "texts": {name: stored_source(source) for name, source in sources.items()},
        "texts_digest": digest(*(text.windows for text in heldout_texts.values()), *questions),
        **sizes,
    }
    for block in moe.moe_blocks:
        for choice in experts:
            choose_experts(choice, torch.zeros(block.num_experts), 0, block.index)  # raises now, not after an hour
    with RunLock(Path(output), "--output"):
        results = Results(Path(output) / RESULTS, identity)
        measurement = Measurement(moe, heldout_texts, batch_tokens)
        measure_cells(moe, measurement, cells, groups, results)

        cells.sort(key=lambda cell: list(groups).index(cell.blocks))  # in the order of --blocks
        rows = [report.row_of(cell, results[cell.key], measurement.baseline) for cell in cells]
        points = report.points(cells, results.rows, opened.size_bytes, expert_bits(opened, moe))
        _write(Path(output), model, measurement, rows, points)
        if global_bounds:
            sensitivity = budget.fit_sensitivity(_cells_to_fit(groups, measurement.load, rows, kinds[0]))
            later = Measurement(moe, later_texts, batch_tokens)
            spent = spend.spend(
                moe, later, sensitivity, measurement.load, kinds[0], global_bounds, results, Path(output)
            )
            _write_markdown(Path(output), model, measurement, rows, [spend.markdown(spent, sensitivity)])
        return {"baseline": measurement.baseline, "rows": rows}


def read_texts(
    sources: dict[str, str],
    model: Path,
    num_windows: int,
    window_length: int,
    num_questions: int,
    context_length: int,
    continuation_length: int,
    skip: int = 0,
    trust_remote_code: bool = False,
) -> dict[str, Text]:
    """The windows of every text, after the first `skip`, and its questions.

    Raises:
        FileNotFoundError, ValueError: a text cannot be read or is too short; the message names the option to change.
    """
    tokenizer = tokenizer_of(str(model), "--model", trust_remote_code)
    num_rows, positions = read_sizes(model)
    check_length(window_length, positions, "--window_length")
    texts, option = {}, "--num_windows" + (" + --budget_windows" if skip else "")
    for name, source in sources.items():
        cut = partial(token_windows, tokenizer=tokenizer, source=source)
        with text_of("--heldout"):
            windows = cut(documents(source), num_windows=skip + num_windows, window_length=window_length, option=option)
            if num_rows is not None:
                check_tokens(windows, num_rows, tokenizer, source)
        texts[name] = Text(windows[skip:])
        if num_questions:
            number, more = QUESTION_WINDOWS * num_questions, f"{QUESTION_WINDOWS} x --num_questions"
            length = context_length + continuation_length
            with text_of("--heldout", window_length="context_length + --continuation_length"):
                pieces = cut(documents(source), num_windows=number, window_length=length, seed=0, option=more)
                texts[name].questions = make_questions(pieces, num_questions, context_length, option=more)
    return texts


def measure_cells(
    moe: MoEModel, measurement: Measurement, cells: Iterable[Cell], groups: dict[str, list[int]], results: Results
) -> None:
    """Measures every cell that the results lack and adds it to them."""
    missing = [cell for cell in cells if cell.key not in results]
    for number, cell in enumerate(missing, 1):
        chosen = {b: choose_experts(cell.experts, measurement.load[b], cell.seed, b) for b in groups[cell.blocks]}
        measurement.seek(min(chosen))
        seed_of = partial(stable_seed, cell.seed)
        with disturbed(moe.blocks, chosen, cell.kind, lambda block, expert, c=cell: c.bound, seed_of) as disturbance:
            measured = measurement.measure()
        results.add(cell.key, measured | {"disturbance": disturbance.summary()})
        loss = report.lost(measured, measurement.baseline)
        print(f"[{number}/{len(missing)}] {cell.key}: {loss:+.4f} nats", flush=True)


def _several(option: str, values: Any) -> list[Any]:
    """The values of an option that takes one or a list.

    Raises:
        ValueError: the list is empty.
    """
    values = values if isinstance(values, list) else [values]
    if not values:
        raise ValueError(f"--{option} is empty: pass one or more values, or leave it out")
    return values


def _bounds_of(option: str, values: list[float], mode: Mode) -> list[Bound]:
    """The bounds of an option.

    Raises:
        ValueError: one is not positive.
    """
    try:
        return [Bound(mode, value) for value in values]
    except ValueError as error:
        raise ValueError(f"--{option}: {error}") from error


def _check_budgets(budgets: list[Bound], groups: dict[str, list[int]], moe: MoEModel, kind: str) -> None:
    """Raises ValueError if the study does not measure what `budgets` needs."""
    alone = {blocks[0] for blocks in groups.values() if len(blocks) == 1}
    if budgets and kind in NOISES:
        raise ValueError(f"{kind!r}, the first of --kinds, is not a codec: --budgets needs one there, such as sz3")
    if budgets and (left := sorted({block.index for block in moe.moe_blocks} - alone)):
        raise ValueError(f"blocks {left} are not measured by themselves: --budgets needs `each` in --blocks")
    most = budget.LADDER[-1]
    if beyond := [bound.value for bound in budgets if bound.mode == "mean" and bound.value > most]:
        raise ValueError(
            f"--budgets {beyond[0]:g}: experts get bounds from {budget.LADDER[0]:g} to {most:.3g} times mean |w|, none "
            f"of which takes as few bytes: pass at most {most:.3g}"
        )


def _cells_to_fit(
    groups: dict[str, list[int]], load: dict[int, Tensor], rows: list[dict[str, Any]], kind: str
) -> list[tuple[int, float, float]]:
    """The rows of single blocks as (block, disturbed share, loss), for `budget.fit_sensitivity`."""
    cells = []
    for row in rows:
        if row["kind"] == kind and len(blocks := groups[row["blocks"]]) == 1:
            chosen = choose_experts(row["experts"], load[blocks[0]], row["seed"] or 0, blocks[0])
            share = float(budget.frequencies(load[blocks[0]]).cpu()[chosen].sum())
            cells.append((blocks[0], share * row["relative_error"] ** 2, row["lost"]))
    return cells


def expert_bits(opened: OpenedModel, moe: MoEModel) -> float:
    """Bits that a weight of a model's experts takes on disk; of an original, the mean over all of its weights."""
    if opened.is_compressed and "experts" in (parts := stored_parts(opened.directory, moe)):
        number, _, size = parts["experts"]
        return 8 * size / number
    return 8 * opened.size_bytes / sum(parameter.numel() for parameter in moe.model.parameters())


def _write(
    output: Path, model: str, measurement: Measurement, rows: list[dict[str, Any]], points: list[dict[str, Any]]
) -> None:
    """Writes the report as JSON, CSV, Markdown, a heat map, TensorBoard and, if a codec was measured, a Pareto plot."""
    from eacmoe_lightning.study import heatmap  # importing matplotlib takes a second

    about = {"command": command_line(), "commit": commit(), "processor": processor(), "model": model}
    about |= {"baseline": measurement.baseline, "rows": rows, "depths": report.depth_summary(rows)}
    write_json(output / "study.json", about)
    _write_markdown(output, model, measurement, rows, [])
    write_atomically(output / "study.csv", lambda partial: partial.write_text(report.to_csv(rows)))
    figure = heatmap.draw(rows)
    heatmap.write(figure, output / "heatmap.png")
    heatmap.log_to_tensorboard(output / "tensorboard", figure, rows)
    if points:
        written = pareto.page(model, list(measurement.texts), points, POINT)
        write_atomically(output / "pareto.html", lambda partial: partial.write_text(written, "utf-8"))
    files = ["study.md", "study.json", "study.csv", "heatmap.png", *(["pareto.html"] if points else [])]
    print(f"{output}: {', '.join(files)}; tensorboard --logdir {output}", flush=True)


def _write_markdown(
    output: Path, model: str, measurement: Measurement, rows: list[dict[str, Any]], sections: list[str]
) -> None:
    shape = next(iter(measurement.texts.values())).windows.shape
    notes = [f"Command: `{command_line()}`", f"Commit: {commit()}", processor()]
    notes.append(f"{shape[0]} windows of {shape[1]} tokens of each text")
    text = report.markdown(f"Which experts of {model} tolerate what", notes, measurement.baseline, rows, sections)
    write_atomically(output / "study.md", lambda partial: partial.write_text(text))
