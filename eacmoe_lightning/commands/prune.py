"""`eacmoe prune` removes experts from a finished model without repeating its run.

It uses the block loop of `fit` (`calibration.blocks.Calibration`) with nothing to quantize. The given model is the
reference: its stream x gives the experts' scores and the routers' targets. The stream x_hat of the pruned prefix gives
the routers' inputs. The codes of the experts that stay are those of the given model, bit for bit.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from eacmoe_lightning.calibration.blocks import Calibration
from eacmoe_lightning.calibration.recipe import Recipe, nominal_bits
from eacmoe_lightning.calibration.streams import Streams
from eacmoe_lightning.commands.own_options import check_window_length, text_of
from eacmoe_lightning.compressed.finished import FinishedBlocks
from eacmoe_lightning.compressed.format import read_config
from eacmoe_lightning.compressed.opening import OpenedModel, open_model
from eacmoe_lightning.compressed.sizes import HEAD, stored_parts
from eacmoe_lightning.evaluation.evaluate import evaluate
from eacmoe_lightning.evaluation.report import add_quality, head, removed_experts, write
from eacmoe_lightning.evaluation.report_text import summary
from eacmoe_lightning.exports.run_result import write_result
from eacmoe_lightning.models.block import Block
from eacmoe_lightning.models.fingerprint import fingerprint
from eacmoe_lightning.models.moe import MoEModel
from eacmoe_lightning.models.originals import stored_name
from eacmoe_lightning.models.streamed import StreamedModel
from eacmoe_lightning.pruning.rule import PruningRule
from eacmoe_lightning.quantization.quantizers import QuantizedWeight
from eacmoe_lightning.routers.losses import TopKMSE
from eacmoe_lightning.run.block_file import read_block
from eacmoe_lightning.run.device import device_of
from eacmoe_lightning.run.directory import RunDirectory, refuse_other_settings
from eacmoe_lightning.run.files import read_json
from eacmoe_lightning.run.lock import LOCK, RunLock
from eacmoe_lightning.run.memory import Watch
from eacmoe_lightning.run.provenance import origin
from eacmoe_lightning.run.ranks import Ranks
from eacmoe_lightning.skipping.apply import set_skipping
from eacmoe_lightning.text.sources import name_sources, stored_source
from eacmoe_lightning.text.windows import SEEDS, digest, read_windows
from eacmoe_lightning.version import __version__

NOTHING = Recipe(quantizer="none")  # the block loop quantizes nothing


def prune(
    model: str,
    output: str,
    pruning: PruningRule,
    routers: Literal["none", "ridge"] = "none",
    ridge: float = 1e-3,
    calibration: str = "bundled:calibration",
    num_windows: int = 128,
    window_length: int = 512,
    batch_size: int = 4,
    texts: dict[str, str] | list[str] | str | None = None,
    num_heldout_windows: int | None = 16,
    seed: int = 0,
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
    device: str = "cpu",
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Removes the experts that matter least on a text from a finished model, compressed or not.

    The output is a run directory with `compressed/`, `report.json` and `report.md`. The report lists the removed
    experts and the perplexity before and after. An unquantized model whose blocks keep equally many experts is also
    written to `dense/`. If the model skips experts (PESF), the setting is off during pruning and kept in the output. An
    interrupted run resumes at its current block when the same command is started again.

    Args:
        model: A run directory, a compressed directory or an original model (`bundled`, a directory or a hub id).
        output: Directory to write to.
        pruning: Rule that chooses the experts to keep.
        routers: How the pruned blocks' routers are calibrated: none, or ridge (closed form per block, towards the given
            model's logits of the experts that stay).
        ridge: Strength of ridge's penalty on drift from the given router, relative to the mean squared router input.
        calibration: Source of the text on which experts are scored and routers calibrated.
        num_windows: Number of calibration windows, drawn at random.
        window_length: Tokens per window.
        batch_size: Windows per batch.
        texts: Sources of the evaluation texts: one source, a list, or {name: source}. null takes the bundled held-out
            texts; [] takes none, and the report is then without an evaluation.
        num_heldout_windows: Number of windows from the start of each evaluation text; null takes all.
        seed: Seed for the choice of calibration windows.
        dtype: Dtype to run the model in; auto is the dtype as stored.
        device: Device that the model runs on.
        trust_remote_code: Whether Python code that came with the model may run, where transformers has no class for it.

    Raises:
        FileNotFoundError: there is no such model or text.
        ValueError: the model has no experts or was pruned before, the rule does not suit it, a text is too short, or
            the output directory holds something else.
        StoreError: a file is damaged, or the written model does not reload identically.
    """
    for option, value in (("batch_size", batch_size), ("ridge", ridge)):
        if value <= 0:
            raise ValueError(f"{option}={value} (--{option}) is not positive")
    check_window_length(window_length)
    if seed not in SEEDS:
        raise ValueError(f"seed={seed} (--seed) is not from -2^63 to 2^63 - 1")
    if pruning.keep == "auto":
        raise ValueError("keep=auto (--pruning.keep) serves `fit` with a size: pass a number")
    device_of(device)  # raises now
    given = open_model(model, dtype, trust_remote_code=trust_remote_code)
    moe = whole(given.streamed(device))
    if moe.is_pruned:
        raise ValueError(f"{model} (--model) was pruned before: prune the model that it was made from")
    pruning.check(moe)
    sources = name_sources(texts, "--texts")
    read = partial(
        read_windows, tokenizer=given.directory, window_length=window_length, trust_remote_code=trust_remote_code
    )
    with text_of("--calibration"):
        windows = read(calibration, num_windows=num_windows, seed=seed)
    of_texts = {"num_windows": num_heldout_windows, "option": "--num_heldout_windows"}
    with text_of("--texts"):
        heldout = {name: read(source, **of_texts) for name, source in sources.items()}
    identity = {
        "version": __version__,
        "model": stored_name(model),
        "fingerprint": fingerprint(str(given.directory)),
        "pruning": asdict(pruning),
        "routers": [routers, ridge],
        "calibration": stored_source(calibration),
        "calibration_digest": digest(windows),
        "windows": [num_windows, window_length, batch_size, seed],
        "texts": {name: stored_source(source) for name, source in sources.items()},
        "texts_digest": digest(*heldout.values()),
        "num_heldout_windows": num_heldout_windows,
        "dtype": dtype,
    }
    run = RunDirectory(output)
    if report := finished_report(run, identity):
        print(f"{output} is already finished{summary(report)}")
        return report
    with RunLock(run.path, "--output"):
        run.start(identity, resume=run.manifest.exists())
        prune_blocks(moe, windows, batch_size, run, pruning, ridge if routers == "ridge" else None)
        stats, trained = [], {}
        for block in moe.blocks:
            _, router, block_stats = read_block(run, block.index)
            stats.append(block_stats)
            trained |= router
        pruned = whole(StreamedModel(FinishedBlocks(given.weights, run, trained), device))
        with costed(run, None, "write"):
            codes = (cut_out(given, block) for block in pruned.blocks)
            description = describe(given) | {"pruning": asdict(pruning) | {"routers": routers}}
            source = str(given.directory) if given.is_compressed else stored_name(model)
            head_codes = given.weights.head if given.is_compressed else None
            about = description, windows[:1], identity["fingerprint"], trust_remote_code
            write_result(run, pruned, source, codes, *about, head=head_codes)
        with costed(run, None, "evaluate"):
            reference = whole(given.streamed(device))
            measured = partial(evaluate, reference, texts=heldout, batch_size=batch_size, scratch=run.scratch(0))
            evaluation = None
            if heldout:
                after = before = measured(pruned)
                if routers != "none":
                    before = measured(whole(StreamedModel(FinishedBlocks(given.weights, run), device)))
                evaluation = {"before": before, "after": after}
        bits = average_bits(pruned, run.compressed)
        report = origin(identity, seed) | head(run, reference, model, given.size_bytes, bits, stats)
        report["router"] = {"method": routers}
        report["pruning"] = removed_experts(asdict(pruning), [s for s in stats if s.pruning is not None])
        add_quality(report, stats, evaluation)
        write(run, report)
        run.drop_streams()
    print(summary(report))
    return report


def whole(moe: StreamedModel) -> StreamedModel:
    """The model with expert skipping off, so that every selected expert runs."""
    set_skipping(moe.model, None)
    return moe


def finished_report(run: RunDirectory, identity: dict[str, Any]) -> dict[str, Any] | None:
    """The report of a finished run with the same settings; None if there is work to do.

    Raises:
        ValueError: the directory holds another result or other files.
    """
    where = f"{run.path} (--output)"
    if run.manifest.exists():
        earlier = read_json(run.manifest)
        given = json.loads(json.dumps(identity))
        refuse_other_settings(f"{where} holds a result", earlier, given, "another --output, or the earlier settings")
        is_finished = (run.path / "report.md").exists()  # the last file to be written
        return read_json(run.path / "report.json") if is_finished else None
    if run.path.exists() and any(path.name != LOCK for path in run.path.iterdir()):
        raise ValueError(f"{where} is not empty: pass an empty or a new directory")
    return None


def prune_blocks(
    moe: MoEModel, windows: Tensor, batch_size: int, run: RunDirectory, rule: PruningRule, ridge: float | None
) -> None:
    """Prunes one block after another and writes its statistics and its router; finished blocks are skipped.

    Args:
        moe: the model; its blocks are shrunk.
        windows: token ids [S, T] of the calibration text.
        ridge: strength of the closed form's penalty; None leaves the routers unchanged.
    """
    streams = Streams(moe, windows, 0, batch_size, run, Ranks(), keep_teachers=False)
    loop = Calibration(moe, NOTHING, streams, run, Ranks(), partial(costed, run), rule)
    first = next((b.index for b in moe.blocks if not run.block(b.index).exists()), len(moe.blocks))
    for index in range(first, len(moe.blocks)):
        block, router = moe.blocks[index], None
        if block.calibrates:
            router = moe.read([block.router_parameter_name])[block.router_parameter_name]
        loop.enter(index, {})
        if block.calibrates and ridge is not None:
            with costed(run, index, "router"):
                num_targets = TopKMSE().num_targets(block.num_experts, block.top_k)
                router[block.kept] = loop.ridge_router(num_targets, ridge).to(router.dtype)
        loop.solve(router)
        stats = loop.leave()
        if block.is_moe:
            pruned = stats.pruning
            print(
                f"block {index}: {len(pruned.kept)} of {len(pruned.scores)} experts stay; "
                f"{pruned.removed_selections:.2%} of the selections went to the others",
                flush=True,
            )


def cut_out(given: OpenedModel, block: Block) -> dict[str, QuantizedWeight]:
    """The quantized weights of a pruned block, taken from the given model; empty if that is not quantized."""
    if not given.is_compressed:
        return {}
    parts = {name: part for name, (part, _) in block.weights().items()}
    quantized, kept = given.weights.quantized(block.index), block.expert_numbers
    return {name: q.of_experts(kept) if parts[name] == "experts" else q for name, q in quantized.items()}


def describe(given: OpenedModel) -> dict[str, Any]:
    """The description of the quantization for the new config, taken from the given model's config."""
    if not given.is_compressed:
        return {"method": "none", "router_method": "none", "quantizer": "none"}
    quantization = read_config(given.directory)["quantization"]
    return {key: value for key, value in quantization.items() if key not in ("bits", "group_sizes")}


def average_bits(moe: MoEModel, directory: Path) -> dict[str, float]:
    """Average bits of the blocks' weights: `nominal` as the paper counts, `true` with scales and zero points."""
    parts = [numbers for part, numbers in stored_parts(directory, moe).items() if part != HEAD]
    if not parts:
        return dict.fromkeys(("nominal", "true"), nominal_bits(moe, NOTHING))
    total = sum(number for number, _, _ in parts)
    codes, stored = sum(number * bits for number, bits, _ in parts), sum(size for _, _, size in parts)
    return {"nominal": codes / total, "true": 8 * stored / total}


@contextmanager
def costed(run: RunDirectory, block: int | None, phase: str) -> Iterator[None]:
    """Records the cost of a phase."""
    watch = Watch()
    yield
    run.add_cost(block, phase, watch.cost())
