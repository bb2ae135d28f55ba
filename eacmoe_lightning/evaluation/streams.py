"""Runs the original and the compressed model side by side and compares predictions, hidden states and selections.

Both run on the same text with one block of each in memory. One pass gives up to five streams (the first four: EAC-MoE,
table 1):

    original          full precision
    compressed        as it would be served
    selection_damage  original weights, but the experts that the compressed model selected
    weight_damage     compressed weights, but the experts that the original selected
    noise_floor       the original, with what each block hands on rounded to bfloat16 (`rounded`)
"""

from __future__ import annotations

from collections.abc import Callable, Collection, MutableMapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from eacmoe_lightning.evaluation.divergence import PerToken, compare_to, joined, log_probabilities, nll_of
from eacmoe_lightning.models.block import Block, Call
from eacmoe_lightning.models.moe import MoEModel
from eacmoe_lightning.routers.expert_shift import num_changed
from eacmoe_lightning.routers.router_weights import forced_weights
from eacmoe_lightning.run.hidden import State, hidden_of, moved, rows_of

NOISE_FLOOR = "noise_floor"
BFLOAT16_ERROR = 2**-8  # the largest relative error of rounding to bfloat16
OF_SUBJECT = ("compressed", "weight_damage")  # streams that run through the subject's weights


@dataclass
class Streams:
    """The results of one batch of windows: negative log-likelihoods in nats and selected experts."""

    nll: dict[str, Tensor]  # by stream: [B, T-1]
    original_ids: list[Tensor]  # per MoE block [N, K]
    compressed_ids: list[Tensor]


@dataclass
class AfterBlock:
    """What a batch of N tokens shows at a block.

    Attributes:
        block: number of the block.
        moe_block: its number among the MoE blocks; None for a dense one.
        ids, compressed_ids: [N, K], the experts that the original and the compressed model selected; None in a dense
            block, and `compressed_ids` without a compressed model.
        distance: by stream, |h - original's h| / |original's h| of the hidden states that leave the block, [N].
        effect: `effect_of_selection` of each token, [N]; None if it cannot be had.
    """

    block: int
    moe_block: int | None
    ids: Tensor | None
    compressed_ids: Tensor | None
    distance: dict[str, Tensor] = field(default_factory=dict)
    effect: Tensor | None = None


OnBlock = Callable[[int, AfterBlock], None]  # gets the number of the batch
OnTokens = Callable[[int, str, PerToken], None]  # gets the numbers of the batch, the stream and its B * (T-1) tokens


def run_streams(original: MoEModel | None, subject: MoEModel, input_ids: Tensor, split: bool = False) -> Streams:
    """`run_batches` on one batch [B, T]; keeps all selected experts."""
    streams = Streams({}, [], [])

    def keep(batch: int, after: AfterBlock) -> None:
        if after.ids is not None:
            streams.original_ids.append(after.ids)
        if after.compressed_ids is not None:
            streams.compressed_ids.append(after.compressed_ids)

    streams.nll = run_batches(original, subject, [input_ids], split, keep)[0]
    return streams


@torch.no_grad()
def run_batches(
    original: MoEModel | None,
    subject: MoEModel,
    batches: Sequence[Tensor],
    split: bool = False,
    on_block: OnBlock | None = None,
    hidden: MutableMapping[tuple[int, str], State] | None = None,
    on_tokens: OnTokens | None = None,
    noise_floor: Collection[int] = (),
) -> list[dict[str, Tensor]]:
    """Runs batches of tokens [B, T] through the original and the subject side by side, block by block.

    All batches run through a block before the next block is loaded, so each block is loaded once.

    Args:
        original: the reference model; None if the subject is itself an original. Then only one stream runs, `original`.
        subject: the model that is evaluated.
        batches: token ids [B, T].
        split: whether to run `selection_damage` and `weight_damage` too.
        on_block: called with what every batch shows at every block.
        hidden: holds the hidden states between blocks, by batch and stream (for example a `run.hidden.Shelf`); None
            keeps them in memory.
        on_tokens: called with the predictions of every batch and stream beside those of `original`. The logits of one
            window are in memory at a time.
        noise_floor: the batches that run `noise_floor` too.

    Returns:
        Per batch, by stream: negative log-likelihoods [B, T-1] in nats.
    """
    reference, other = (original, subject) if original is not None else (subject, None)
    names = ["original"] + (["compressed"] if other is not None else [])
    names += ["selection_damage", "weight_damage"] if other is not None and split else []
    names_of = [names + ([NOISE_FLOOR] if j in noise_floor else []) for j in range(len(batches))]
    hidden = {} if hidden is None else hidden
    moe_block = 0
    for i in range(len(reference.blocks)):
        with reference.loaded(i) as block, other.loaded(i) if other is not None else nullcontext() as twin:
            for j in range(len(batches)):
                ids = batches[j].to(reference.device)
                calls = {}
                for name in names_of[j]:
                    state = moved(hidden[j, name], reference.device) if i else None
                    calls[name] = (other if name in OF_SUBJECT else reference).call(i, ids, state)
                after = AfterBlock(i, moe_block if block.is_moe else None, None, None)
                states = _through_block(block, twin, calls, after, measure=on_block is not None)
                hidden.update({(j, name): state for name, state in states.items()})
                if on_block is not None:
                    on_block(j, after)
        moe_block += block.is_moe

    def head(j: int) -> dict[str, Tensor]:
        nll, tokens = {name: [] for name in names_of[j]}, {name: [] for name in names_of[j][1:]}
        states = {name: moved(hidden[j, name], reference.device) for name in names_of[j]}
        ids = batches[j].to(reference.device)
        for row in range(len(ids)):  # logits of one window at a time
            rows, targets, base = slice(row, row + 1), ids[row, 1:], None
            for name, state in states.items():
                model = other if name in OF_SUBJECT else reference
                logits = model.head(rows_of(state, rows), ids[rows])
                if on_tokens is None:
                    nll[name].append(next_token_nll(logits, ids[rows]))
                elif base is None:  # the original comes first
                    base = log_probabilities(logits[0, :-1])
                    nll[name].append(nll_of(base, targets).unsqueeze(0))
                else:
                    compared = compare_to(base, logits[0, :-1], targets)
                    tokens[name].append(compared)
                    nll[name].append(compared.nll.to(ids.device).unsqueeze(0))
        for name, parts in tokens.items() if on_tokens is not None else ():
            on_tokens(j, name, joined(parts))
        return {name: torch.cat(rows) for name, rows in nll.items()}

    return [head(j) for j in range(len(batches))]


def _through_block(
    block: Block, twin: Block | None, calls: dict[str, Call], after: AfterBlock, measure: bool
) -> dict[str, State]:
    """Runs a batch's streams through a block and its twin, and fills `after`. Returns the streams' outputs."""
    states: dict[str, State] = {}
    experts: list[tuple[Tensor, ...]] = []
    watching = measure and twin is not None and block.is_moe
    handle = block.watch_experts(lambda *io: experts.append(io)) if watching else None
    try:
        states["original"], routing = block.forward(calls["original"])
    finally:
        if handle is not None:
            handle.remove()
    after.ids = routing.ids if routing is not None else None
    if NOISE_FLOOR in calls:
        states[NOISE_FLOOR] = rounded(block.forward(calls[NOISE_FLOOR])[0], seed=block.index)
    if twin is not None:
        states["compressed"], twin_routing = twin.forward(calls["compressed"])
        after.compressed_ids = twin.original_ids(twin_routing.ids) if twin_routing is not None else None
        if len(experts) == 1:
            after.effect = effect_of_selection(block, routing.logits, *experts[0], after.compressed_ids)
    if "selection_damage" in calls:
        states["selection_damage"], _ = block.forward(calls["selection_damage"], after.compressed_ids)
        states["weight_damage"], _ = twin.forward(calls["weight_damage"], after.ids)
    if measure:
        base = hidden_of(states["original"]).float().flatten(0, 1)
        for name, state in states.items():
            if name != "original":
                moved_by = (hidden_of(state).float().flatten(0, 1) - base).norm(dim=-1)
                after.distance[name] = moved_by / base.norm(dim=-1).clamp(min=1e-30)
    return states


def rounded(state: State, seed: int) -> State:
    """What a block hands on, rounded to bfloat16 and back.

    Where it is in bfloat16 already, noise of at most one rounding error takes the place of rounding: uniform, drawn
    from `seed`, the same for every window [T, ...].
    """

    def one(x: Tensor) -> Tensor:
        if not x.is_floating_point():
            return x
        if x.dtype != torch.bfloat16:
            return x.bfloat16().to(x.dtype)
        noise = torch.rand(x.shape[1:], generator=torch.Generator().manual_seed(seed)).to(x.device)
        return (x.float() * (1 + BFLOAT16_ERROR * (2 * noise - 1))).bfloat16()

    return tree_map_only(Tensor, one, state)


def effect_of_selection(
    block: Block, logits: Tensor, x: Tensor, ids: Tensor, weights: Tensor, output: Tensor, forced: Tensor
) -> Tensor | None:
    """How far a changed selection alone moves the sum of the routed experts: |changed - output| / |output|, [N].

    The experts, their inputs and the router are the original's; only the selection is another, with the weights that
    the router gives to it. So neither quantized weights nor earlier blocks count. It is 0 where the selection is the
    same.

    Args:
        block: the original's block.
        logits: [N, E] of its router.
        x, ids, weights, output: [N, D], [N, K], [N, K] and [N, D], what its experts read and return.
        forced: [N, K], the other selection.

    Returns:
        None if no known rule gives the router's weights, if the experts read a row for each pair of a token and an
        expert, or if the other model skips experts.
    """
    if ids.shape != forced.shape or int(forced.max()) >= block.num_experts:
        return None
    effect = torch.zeros(len(x), device=x.device)
    rows = num_changed(ids, forced).nonzero().squeeze(-1)
    if not len(rows):
        return effect
    try:
        changed_weights = forced_weights(block.router, logits, weights, ids, forced)[rows]
    except ValueError:
        return None
    changed = block.experts.module(x[rows], forced[rows].to(ids.dtype), changed_weights.to(weights.dtype))
    before = output[rows].float()
    effect[rows] = (changed.float() - before).norm(dim=-1) / before.norm(dim=-1).clamp(min=1e-30)
    return effect


def next_token_nll(logits: Tensor, input_ids: Tensor) -> Tensor:
    """Logits [B, T, V] and token ids [B, T] -> negative log-likelihoods [B, T-1] in nats, float32."""
    targets = input_ids[:, 1:].flatten().to(logits.device)
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), targets, reduction="none").view(
        len(input_ids), -1
    )


def token_log_likelihoods(model: MoEModel, input_ids: Tensor) -> Tensor:
    """Token ids [B, T] -> log-likelihoods [B, T-1] in nats of every token but the first."""
    return -run_batches(None, model, [input_ids])[0]["original"]
