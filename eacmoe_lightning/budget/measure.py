"""Measures what each weight of a model loses at each width, with one block in memory; each block once.

The blocks run in order, on the original's hidden states. In each of them, for each width, the attention, the shared and
the routed experts are quantized one after another as `fit` would, all else being the original. Then

- the part's probe starts: after the last block, the KL divergence of its predictions is the part's *damage*
  (`probes.py`), on windows that the solver did not see;
- for the routed experts, the *error* of each expert and projection is measured: with this weight alone quantized, the
  mean square over the expert's tokens of the change of its weighted output, |g (f_quantized(x) - f(x))|^2.

Damage says how much a block's experts matter beside those of other blocks, and beside attention; errors share it out
among them (`sensitivity.py`).

With `drops`, further probes miss a share of the experts in every block, those with the lowest scores: what pruning
alone would lose.

A directory holds the results of finished blocks and the hidden states before the next, so a killed measurement goes on.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eacmoe_lightning.budget.probes import Probes, without_experts
from eacmoe_lightning.budget.sensitivity import BLOCKS, FILE, Sensitivity, drop_name, probe_name, read, write
from eacmoe_lightning.calibration.inputs import BlockInputs
from eacmoe_lightning.calibration.recipe import PARTS, Recipe
from eacmoe_lightning.calibration.solver import BlockSolver
from eacmoe_lightning.calibration.streams import Streams
from eacmoe_lightning.models.block import Block
from eacmoe_lightning.models.experts import Groups
from eacmoe_lightning.models.moe import MoEModel
from eacmoe_lightning.models.routing import Routing
from eacmoe_lightning.pruning.rule import PruningRule
from eacmoe_lightning.pruning.scores import measured as scored
from eacmoe_lightning.quantization.gram import tokens_by_expert
from eacmoe_lightning.routers.expert_shift import expert_load
from eacmoe_lightning.run.directory import RunDirectory, refuse_other_settings
from eacmoe_lightning.run.files import StoreError, write_json
from eacmoe_lightning.run.hidden import HiddenFile
from eacmoe_lightning.run.lock import LOCK
from eacmoe_lightning.run.ranks import Ranks

WIDTHS = (2, 3, 4)  # that are measured by default
DROPS = (0.125, 0.25, 0.375, 0.5)  # shares of the experts that are measured as missing
PROBE_TOKENS = 4096  # that the probes run on by default, in at most a quarter of the windows
TOKENS = 512  # of an expert, on which its error is measured
FEWEST = 16  # an expert with fewer tokens borrows those with the highest logits for it


@dataclass(frozen=True)
class Text:
    """The calibration windows [S, T], which of their tokens count, and positions where they hold several documents."""

    windows: Tensor
    counts: Tensor | None = None
    position_ids: Tensor | None = None

    def of(self, rows: Tensor) -> Text:
        return Text(*(None if part is None else part[rows] for part in vars(self).values()))


def default_probes(num_windows: int, window_length: int) -> int:
    """The number of windows that the probes run on.

    Raises:
        ValueError: none would be left for the solver.
    """
    if num_windows < 2:
        raise ValueError(
            f"--data.num_windows {num_windows}: measuring takes 2 calibration windows or more, as those on which "
            "weights are solved do not show what they lose"
        )
    return max(1, min(PROBE_TOKENS // window_length, num_windows // 4))


def split(text: Text, num_probes: int, seed: int) -> tuple[Text, Text]:
    """The windows for the solver, and those that the probes run on, drawn at random.

    Raises:
        ValueError: no window would be left for the solver.
    """
    number = len(text.windows)
    if not 1 <= num_probes < number:
        raise ValueError(
            f"--probe_windows {num_probes} of {number} calibration windows (--data.num_windows) leave none to one of "
            f"the two: pass 1 to {number - 1}"
        )
    order = torch.randperm(number, generator=torch.Generator().manual_seed(seed))
    return text.of(order[num_probes:].sort().values), text.of(order[:num_probes].sort().values)


def identity_of(recipe: Recipe, fingerprint: str | None) -> dict[str, Any]:
    """What sensitivities depend on besides the text: the original and how weights are quantized, but for bits.

    Args:
        fingerprint: of the original (`models.fingerprint`).
    """
    settings = recipe.uniform(4).record()
    bits = ("bits", "attention_bits", "shared_expert_bits", "head_bits")  # the head is the original's
    return {"model.fingerprint": fingerprint} | {f"model.{k}": v for k, v in settings.items() if k not in bits}


def measure(
    moe: MoEModel,
    recipe: Recipe,
    text: Text,
    output: Path,
    identity: dict[str, Any],
    widths: Sequence[int | float] = WIDTHS,
    num_probes: int = 8,
    batch_size: int = 8,
    seed: int = 0,
    drops: Sequence[float] = (),
    criterion: str = "reap",
    on_block: Callable[[int], None] = lambda block: None,
) -> Sensitivity:
    """Measures a model, or goes on where a killed measurement ended.

    Args:
        moe: the original, streamed.
        recipe: groups and quantizer; its bits do not matter.
        text: the calibration windows.
        output: a directory, new or of a measurement with the same identity.
        identity: everything else that the result depends on.
        widths: bits that are measured, ascending.
        num_probes: windows among the calibration windows that only the probes run on.
        batch_size: windows per forward pass.
        seed: chooses these windows.
        drops: shares of the experts that probes miss in every block; stored are those that `dropped_shares` gives.
        criterion: the score of an expert (`pruning.scores`).
        on_block: called after each block.

    Raises:
        ValueError: the directory holds a measurement with other settings.
        StoreError: a file of it is damaged.
    """
    for_solver, for_probes = split(text, num_probes, seed)
    scores_experts, drops = bool(drops), dropped_shares(moe.moe_blocks, drops)
    run, num_blocks = RunDirectory(output), len(moe.blocks)
    identity = identity | {"widths": list(widths), "probe_windows": num_probes, "seed": seed}
    if scores_experts:
        identity |= {"drops": list(drops), "pruning.criterion": criterion}
    _claim(run, identity)
    if (output / FILE).exists():
        run.drop_streams()  # a kill may have left them
        return read(output)
    ranks, states = Ranks(), run.streams(0, 1)
    streams = Streams(
        moe, for_solver.windows, 0, batch_size, run, ranks, None, False, for_solver.counts, None,
        for_solver.position_ids, is_one=True,
    )  # fmt: skip
    probes = Probes(moe, for_probes.windows, batch_size, states / "probes", for_probes.counts, for_probes.position_ids)
    finished = [json.loads(path.read_text()) for path in sorted((output / BLOCKS).glob("block_*.json"))]
    names = [name for block in finished for name in block["probes"]]
    start = len(finished)
    if start and not (streams.can_read(start) and probes.can_read(start, names)):
        raise StoreError(f"the hidden states in {states} are missing: delete {output} and measure again")
    with torch.no_grad():
        streams.embed()
        if start:
            streams.read(start)
            probes.read(start, names)
        for index in range(start, num_blocks):
            with moe.loaded(index) as block:
                result = _measure_block(block, num_blocks, recipe, streams, probes, widths, ranks)
                if scores_experts and block.is_moe:
                    result["score"] = _measure_drops(block, streams, probes, drops, criterion)
                    result["probes"] += [drop_name(share) for share in drops if index == moe.moe_blocks[0].index]
                else:
                    streams.advance(block, "x")
                probes.advance(block)
            streams.step(index + 1)
            write_json(output / BLOCKS / f"block_{index:03d}.json", result)
            probes.forget(index)
            finished.append(result)
            on_block(index)
    damage = probes.divergences()
    sensitivity = write(output, identity, widths, finished, damage)
    run.drop_streams()
    return sensitivity


def _claim(run: RunDirectory, identity: dict[str, Any]) -> None:
    """Writes the identity of a measurement, or checks that the directory's is the same."""
    output = run.path
    path = output / "identity.json"
    identity = json.loads(json.dumps(identity))
    if path.exists():
        held = json.loads(path.read_text())
        refuse_other_settings(f"{output} (--output) holds sensitivities", held, identity, "another --output")
        return
    known = (".", LOCK, run.sampled.name)
    names = sorted(p.name for p in output.iterdir()) if output.exists() else []
    if strangers := [name for name in names if not name.startswith(known)]:
        raise ValueError(
            f"{output} (--output) is not empty and holds no sensitivities: {strangers[:3]}. Pass an empty directory"
        )
    (output / BLOCKS).mkdir(parents=True, exist_ok=True)
    write_json(path, identity)


def _measure_block(
    block: Block,
    num_blocks: int,
    recipe: Recipe,
    streams: Streams,
    probes: Probes,
    widths: Sequence[int | float],
    ranks: Ranks,
) -> dict[str, Any]:
    """The results of one block, and its probes."""
    inputs = BlockInputs(block, streams)
    result: dict[str, Any] = {"block": block.index, "name": block.name, "probes": [], "relative_error": {}}
    if block.is_moe:
        inputs.keep_router_input()
        result["load"] = expert_load(inputs.route().ids, block.num_experts).tolist()
        result["error"] = {projection: {} for projection in block.experts.projections}
    for part in PARTS:
        weights = {name: weight for name, (of, weight) in block.weights().items() if of == part}
        original = {name: weight.clone() for name, weight in weights.items()}
        for width in widths if weights else ():
            solver = BlockSolver(block, num_blocks, recipe.uniform(width), ranks)
            if part != "experts":
                inputs.solve_part(solver, part)
            else:
                with inputs.of_experts() as (rows, routing):
                    solver.solve_experts(rows, routing)
                    for projection, errors in _expert_errors(block, original, rows, routing).items():
                        result["error"][projection][f"{width:g}"] = errors
            for name, error in solver.error.items():
                result["relative_error"].setdefault(name, {})[f"{width:g}"] = error
            name = probe_name(block.index, part, width)
            probes.add(block, name)
            result["probes"].append(name)
            for name, weight in weights.items():
                weight.copy_(original[name])
    inputs.delete()
    return result


def _measure_drops(
    block: Block, streams: Streams, probes: Probes, drops: Sequence[float], criterion: str
) -> list[float]:
    """Takes x through a block, and the probes that miss these shares of its experts.

    Returns:
        The score of each expert [E], the lowest of which are missed.
    """
    counted = [partial(streams.counted, rows=rows) for rows in streams.slices]
    with scored(block, criterion, counted) as scores:
        streams.advance(block, "x")
    score = scores.finish(streams.ranks).tolist()
    for share in drops:
        kept = kept_of(block, score, keep_of(block, share), criterion)
        with without_experts(block, sorted({*range(block.num_experts)} - {*kept})):
            probes.add(block, drop_name(share))
    return score


def keep_of(block: Block, share: float) -> int:
    """The number of experts that a block keeps if this share of them is dropped: all groups keep the same number."""
    groups = Groups.of(block)
    of_group = max(round((1 - share) * block.num_experts / groups.number), groups.least(block.top_k))
    return max(of_group * groups.number, block.top_k)


def dropped_shares(blocks: Sequence[Block], shares: Sequence[float]) -> list[float]:
    """The shares of the experts that are missing if every block keeps `keep_of` of these, ascending; without 0."""
    total, found = sum(block.num_experts for block in blocks), set()
    for share in shares:
        missing = total - sum(keep_of(block, share) for block in blocks)
        found |= {missing / total} if missing else set()
    return sorted(found)


def kept_of(block: Block, scores: Sequence[float], number: int, criterion: str) -> list[int]:
    """The experts that stay, as `PruningRule` chooses them by these scores [E]."""
    rule = PruningRule(criterion, keep=number)
    return rule.choose(torch.tensor(scores, dtype=torch.float64), block.top_k, Groups.of(block).number)


def _expert_errors(
    block: Block, original: dict[str, Tensor], rows: HiddenFile, routing: Routing
) -> dict[str, list[float]]:
    """By projection, each expert's mean squared error |g (f_quantized(x) - f(x))|^2 with this weight alone quantized.

    Args:
        block: whose experts are quantized now.
        original: their weights before, by parameter name.
        rows: [N, D], the experts' inputs.
        routing: the router's output on them.
    """
    experts, errors = block.experts, {projection: [] for projection in block.experts.projections}
    before = {p: original[f"{block.name}.{block.experts_name}.{p}"] for p in experts.projections}
    up_name, device = experts.up_name, experts.weight(experts.up_name).device
    tokens = tokens_by_expert(routing.ids, block.num_experts)
    typical = routing.weights[routing.ids < block.num_experts].float().mean()
    for e, own in enumerate(tokens):
        slots = (routing.ids[own] == e).int().argmax(-1)
        weights = routing.weights[own, slots].float()
        if len(own) < FEWEST:
            logits = routing.logits[:, e].index_fill(0, own, -torch.inf)
            borrowed = logits.topk(min(FEWEST - len(own), len(logits))).indices
            own, weights = torch.cat([own, borrowed]), torch.cat([weights, typical.expand(len(borrowed))])
        chosen = torch.linspace(0, len(own) - 1, min(len(own), TOKENS)).round().long()
        x, g = rows[own[chosen]].to(device), weights[chosen].to(device)
        h, up = experts.intermediate(x, e, before[up_name][e]), before["down_proj"][e]
        changes = {
            up_name: torch.nn.functional.linear(experts.intermediate(x, e) - h, up),
            "down_proj": torch.nn.functional.linear(h, experts.weight("down_proj")[e] - up),
        }
        for projection, change in changes.items():
            errors[projection].append(float((change.float().square().sum(-1) * g.square()).mean()))
    return errors
