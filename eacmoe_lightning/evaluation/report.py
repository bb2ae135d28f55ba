"""The report of a run: `report.json` with stable keys, the same to read in `report.md`, and `report.html`.

Keys, with dots for nesting:

    command, config, versions, commit, seed, machine
    model.blocks|experts|top_k
    model.stored        dtype of the original's weights on disk, or the scheme that they are quantized by
    bits.nominal        as the paper counts
    bits.true           with scales and zero points, over the same weights: those of the blocks
    bits.head           with scales and zero points, over the output head; left out if that is not quantized
    bits.all|original   everything in the files of weights, over all weights of the original: of the result and before
    model.weights       their number, embeddings included
    size_bytes.original|compressed
    perplexity.<text>.original|compressed|before
                        before: the compressed model with the original's routers; left out if the block stage has
                        trained the weights together with the routers
    divergence.texts.<text>.compressed|noise_floor|before.<figure>
                        from the original (evaluation/divergence.py, `statistics`): kl.mean|error|median|p90|p99|p99_9
                        |max, same_top, mean_dp, rms_dp, log_ppl_ratio, each with its <figure>_error, tokens,
                        by_confidence[].from|to|share|kl; nats and shares
    divergence.mean.compressed|noise_floor|before.kl|kl_error|same_top|rms_dp|log_ppl_ratio
                        plain mean over the texts
    divergence.blocks[].block|compressed|noise_floor
                        mean relative distance of the hidden states after each block from the original's
    heldout_digest.<text>
                        of the token ids of the windows that the text was judged on
    expert_shift.mean.before|after.any|half|all|selections|weighted
                        over the held-out texts; weighted: mean over tokens of how far the changed selection alone moves
                        the experts' output, relative to it (evaluation/streams.py, `effect_of_selection`)
    expert_shift.calibration.before|after, expert_shift.blocks[]
    router.method
    reconstruction.<block>.held_back|taken|moved
                        the block stage (run/block_file.py, Reconstruction)
    coverage.<text>.windows|selections|experts|reached|only|blocks.<block>
                        what each calibration text's tokens reach by the original's routers (evaluation/coverage.py)
    sampled.<text>.model|windows|tokens|chosen|documents|document_tokens|scripts.<script>|languages.<language>
                        calibration text that a model wrote (`self`); chosen: tokens that it was not given; documents:
                        how many, and their mean length; scripts: shares of the letters; languages: of the windows
    coverage.<text>.full
                        of separate or packed documents: their share of the windows' tokens
    experts.starved     number of starved experts
    experts.starved_by_block
    cost.<phase>.seconds|peak_bytes|read_bytes|written_bytes|share
                        read and written: disk traffic
    cost.total_seconds

If experts were removed:

    pruning.rule|experts|removed
    pruning.removed_selections
                        mean over blocks
    pruning.blocks.<block>.kept|removed|removed_selections|scores|below_alpha
                        below_alpha: experts that stay although alpha would remove them, since a token selects top_k
    pruning.below_alpha number of these experts

The original in `perplexity` is then the unpruned model. The report of `prune` has the same keys, with the model that it
was given in place of the original.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from eacmoe_lightning.calibration.recipe import Recipe, nominal_bits, num_quantized
from eacmoe_lightning.compressed.card import add_quality_to_card, write_card
from eacmoe_lightning.compressed.directory import CompressedWeights
from eacmoe_lightning.compressed.format import is_compressed, size_of
from eacmoe_lightning.compressed.sizes import HEAD, stored_parts
from eacmoe_lightning.evaluation.report_html import html
from eacmoe_lightning.evaluation.report_text import markdown
from eacmoe_lightning.models.moe import MoEModel
from eacmoe_lightning.models.streamed import StreamedModel
from eacmoe_lightning.pruning.rule import PruningRule
from eacmoe_lightning.quantization.packing import STORED
from eacmoe_lightning.routers.expert_shift import mean_rates
from eacmoe_lightning.run.block_file import BlockStats
from eacmoe_lightning.run.directory import RunDirectory
from eacmoe_lightning.run.files import read_tensors, write_atomically, write_json


def build(
    run: RunDirectory,
    moe: StreamedModel,
    name_or_path: str,
    recipe: Recipe,
    router: dict[str, Any],
    pruning: PruningRule | None,
    blocks: list[BlockStats],
    evaluation: dict[str, dict] | None,
) -> dict[str, Any]:
    """The report of a finished run, without the fields of `provenance.origin`.

    Args:
        run: the run directory.
        moe, name_or_path: the original model, streamed from its files.
        recipe, pruning: how the model was compressed.
        router: stored in the report as `router`.
        blocks: statistics of every block (`Calibration.leave`).
        evaluation: results of `evaluate` under `before` and `after`; None if there was no evaluation.
    """
    moe_stats = [s for s in blocks if s.is_moe]
    files = moe.weights.files
    uncalibrated = [block.index for block in moe.moe_blocks if not block.calibrates]
    bits = {"nominal": nominal_bits(moe, recipe), "true": _true_bits(run, moe, recipe)}
    report = head(run, moe, name_or_path, files.size_bytes, bits, blocks) | {
        "router": router | ({"uncalibrated": uncalibrated} if uncalibrated else {}),
        "unquantized": moe.unquantized,
        "experts": {
            "starved": sum(len(s.starved) for s in moe_stats),
            "starved_by_block": {s.block: s.starved for s in moe_stats if s.starved},
        },
        "quantization_error": {name: value for s in blocks for name, value in s.error.items()},
    }
    if trained := {s.block: asdict(s.reconstruction) for s in blocks if s.reconstruction is not None}:
        report["reconstruction"] = trained
    report["model"]["stored"] = files.description
    add_quality(report, blocks, evaluation)
    if pruning:
        report["pruning"] = removed_experts(pruning.record(), moe_stats)
    return report


def head(
    run: RunDirectory,
    moe: StreamedModel,
    name_or_path: str,
    size_bytes: int,
    bits: dict[str, float],
    blocks: list[BlockStats],
) -> dict[str, Any]:
    """What the reports of `fit` and `prune` begin with.

    Args:
        run: the run directory, with the result in it.
        moe, name_or_path, size_bytes: the model that the result was made from.
        bits: average bits of the quantized weights, `nominal` and `true`.
        blocks: see `build`.
    """
    weights = sum(parameter.numel() for parameter in moe.weights.skeleton().parameters())  # also those pruned since
    compressed = size_of(run.compressed)
    if is_compressed(run.compressed) and (of_head := stored_parts(run.compressed, moe).get(HEAD)):
        number, _, stored = of_head
        bits = bits | {"head": 8 * stored / number}
    return {
        "model": {
            "name_or_path": name_or_path,
            "type": moe.config.model_type,
            "blocks": len(moe.blocks),
            "moe_blocks": len(moe.moe_blocks),
            "experts": len(next(s.expert_load["original"] for s in blocks if s.is_moe)),
            "top_k": moe.top_k,
            "weights": weights,
        },
        "bits": bits | {"all": 8 * compressed / weights, "original": 8 * size_bytes / weights},
        "size_bytes": {"original": size_bytes, "compressed": compressed},
        "cost": cost(run),
    }


def add_quality(report: dict[str, Any], blocks: list[BlockStats], evaluation: dict[str, dict] | None) -> None:
    """Adds perplexity, divergence and expert-shift to a report; arguments as in `build`."""
    moe_stats = [s for s in blocks if s.is_moe]
    calibration = {when: [s.expert_shift[when] for s in moe_stats] for when in ("before", "after")}
    report["expert_shift"] = {"calibration": {when: mean_rates(rows) for when, rows in calibration.items()}}
    report["perplexity"] = {}
    per_block = [{"block": s.block, "calibration": s.expert_shift} for s in moe_stats]
    if evaluation:
        report["perplexity"] = {text: dict(values) for text, values in evaluation["after"]["perplexity"].items()}
        if "before" in evaluation:
            for text, values in evaluation["before"]["perplexity"].items():
                report["perplexity"][text]["before"] = values["compressed"]
        report["divergence"] = _divergence(evaluation)
        report["heldout_digest"] = evaluation["after"]["heldout_digest"]
        shifts = {when: result["expert_shift"] for when, result in evaluation.items()}
        report["expert_shift"]["mean"] = {when: shift["mean"] for when, shift in shifts.items()}
        report["expert_shift"]["texts"] = {
            text: {when: shift["texts"][text] for when, shift in shifts.items()} for text in shifts["after"]["texts"]
        }
        for number, row in enumerate(per_block):
            row["heldout"] = {when: shift["blocks"][number] for when, shift in shifts.items()}
    else:
        report["expert_shift"]["mean"] = report["expert_shift"]["calibration"]
    report["expert_shift"]["blocks"] = per_block


def _divergence(evaluation: dict[str, dict]) -> dict[str, Any]:
    """The divergence `after`, and beside it that of the compressed model `before`."""
    after, before = evaluation["after"]["divergence"], evaluation.get("before", {}).get("divergence")
    if before is None:
        return after
    return after | {
        "mean": after["mean"] | {"before": before["mean"]["compressed"]},
        "texts": {
            text: streams | {"before": before["texts"][text]["compressed"]} for text, streams in after["texts"].items()
        },
    }


def write(run: RunDirectory, report: dict[str, Any]) -> None:
    """Writes the report's files to the run directory, and its figures into the cards; `report.md` is the last."""
    write_json(run.path / "report.json", report)
    write_atomically(run.path / "report.html", lambda partial: partial.write_text(html(report), "utf-8"))
    if run.compressed.exists():
        write_card(run.compressed, MoEModel(CompressedWeights(run.compressed).skeleton()), report)
        if run.dense.exists():
            add_quality_to_card(run.dense, report)
    write_atomically(run.path / "report.md", lambda partial: partial.write_text(markdown(report)))


def removed_experts(rule: dict[str, Any], blocks: list[BlockStats]) -> dict[str, Any]:
    """The removed experts, and the share of the calibration text's selections that went to them."""
    removed = {s.block: s.pruning for s in blocks}
    return {
        "rule": rule,
        "experts": sum(len(s.kept) + len(s.removed) for s in removed.values()),
        "removed": sum(len(s.removed) for s in removed.values()),
        "removed_selections": sum(s.removed_selections for s in removed.values()) / len(removed),
        "below_alpha": sum(len(s.below_alpha) for s in removed.values()),
        "blocks": {block: asdict(s) for block, s in removed.items()},
    }


def _true_bits(run: RunDirectory, moe, recipe: Recipe) -> float:
    """Stored bits per quantized weight, with scales and zero points."""
    if not recipe.quantizes:
        return nominal_bits(moe, recipe)
    stored = 0
    for block in moe.blocks:
        tensors, _ = read_tensors(run.block(block.index))
        stored += sum(tensor.nbytes for name, tensor in tensors.items() if name.endswith(STORED))
    return 8 * stored / num_quantized(moe)


def cost(run: RunDirectory) -> dict[str, Any]:
    rows = run.read_costs()
    total = sum(row["seconds"] for row in rows)
    phases: dict[str, Any] = {}
    for row in rows:
        phase = phases.setdefault(row["phase"], {"seconds": 0.0, "peak_bytes": 0, "read_bytes": 0, "written_bytes": 0})
        phase["peak_bytes"] = max(phase["peak_bytes"], row["peak_bytes"])
        for name in ("seconds", "read_bytes", "written_bytes"):
            phase[name] += row.get(name, 0)  # older runs did not count disk traffic
    for phase in phases.values():
        phase["share"] = phase["seconds"] / total if total else 0.0
    return {**phases, "total_seconds": total}
