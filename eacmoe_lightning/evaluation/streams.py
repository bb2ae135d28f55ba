"""Runs the original and the compressed model side by side and compares each token's loss and selected experts.

Both run on the same text with one block of each in memory. One pass gives up to four streams (EAC-MoE, table 1):

    original          full precision
    compressed        as it would be served
    selection_damage  original weights, but the experts that the compressed model selected
    weight_damage     compressed weights, but the experts that the original selected
"""

from __future__ import annotations

from collections.abc import Callable, MutableMapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from eacmoe_lightning.models.block import Block, Call
from eacmoe_lightning.models.moe import MoEModel
from eacmoe_lightning.run.hidden import State, moved, rows_of


@dataclass
class Streams:
    """The results of one batch of windows: negative log-likelihoods in nats and selected experts."""

    nll: dict[str, Tensor]  # by stream: [B, T-1]
    original_ids: list[Tensor]  # per MoE block [N, K]
    compressed_ids: list[Tensor]


def run_streams(original: MoEModel | None, subject: MoEModel, input_ids: Tensor, split: bool = False) -> Streams:
    """`run_batches` on one batch [B, T]; keeps all selected experts."""
    streams = Streams({}, [], [])

    def keep(batch: int, block: int, ids: Tensor, compressed_ids: Tensor | None) -> None:
        streams.original_ids.append(ids)
        if compressed_ids is not None:
            streams.compressed_ids.append(compressed_ids)

    streams.nll = run_batches(original, subject, [input_ids], split, keep)[0]
    return streams


# batch, MoE block, the original's expert ids [N, K], and the compressed model's, or None without one
OnSelections = Callable[[int, int, Tensor, Tensor | None], None]


@torch.no_grad()
def run_batches(
    original: MoEModel | None,
    subject: MoEModel,
    batches: Sequence[Tensor],
    split: bool = False,
    on_selections: OnSelections | None = None,
    hidden: MutableMapping[tuple[int, str], State] | None = None,
) -> list[dict[str, Tensor]]:
    """Runs batches of tokens [B, T] through the original and the subject side by side, block by block.

    All batches run through a block before the next block is loaded, so each block is loaded once.

    Args:
        original: the reference model; None if the subject is itself an original. Then only one stream runs, `original`.
        subject: the model that is evaluated.
        batches: token ids [B, T].
        split: whether to run `selection_damage` and `weight_damage` too.
        on_selections: called with the selected experts of every batch and MoE block.
        hidden: holds the hidden states between blocks, by batch and stream (for example a `run.hidden.Shelf`); None
            keeps them in memory.

    Returns:
        Per batch, by stream: negative log-likelihoods [B, T-1] in nats.
    """
    reference, other = (original, subject) if original is not None else (subject, None)
    names = ["original"] + (["compressed"] if other is not None else [])
    names += ["selection_damage", "weight_damage"] if other is not None and split else []
    hidden = {} if hidden is None else hidden
    moe_block = 0
    for i in range(len(reference.blocks)):
        with reference.loaded(i) as block, other.loaded(i) if other is not None else nullcontext() as twin:
            for j in range(len(batches)):
                ids = batches[j].to(reference.device)
                calls = {}
                for name in names:
                    state = moved(hidden[j, name], reference.device) if i else None
                    calls[name] = (other if name in OF_SUBJECT else reference).call(i, ids, state)
                states, selected = _through_block(block, twin, calls, split)
                hidden.update({(j, name): state for name, state in states.items()})
                if block.is_moe and on_selections is not None:
                    on_selections(j, moe_block, *selected)
        moe_block += block.is_moe

    def nll(j: int, name: str) -> Tensor:
        head = (other if name in OF_SUBJECT else reference).head
        state, ids = moved(hidden[j, name], reference.device), batches[j].to(reference.device)
        windows = (slice(row, row + 1) for row in range(len(ids)))  # logits of one window at a time
        return torch.cat([next_token_nll(head(rows_of(state, rows), ids[rows]), ids[rows]) for rows in windows])

    return [{name: nll(j, name) for name in names} for j in range(len(batches))]


OF_SUBJECT = ("compressed", "weight_damage")  # streams that run through the subject's weights


def _through_block(
    block: Block, twin: Block | None, calls: dict[str, Call], split: bool
) -> tuple[dict[str, State], tuple[Tensor | None, Tensor | None]]:
    """Runs a batch's streams through a block and its twin: their outputs, and the expert ids that each selected."""
    states: dict[str, State] = {}
    states["original"], routing = block.forward(calls["original"])
    ids = routing.ids if routing is not None else None
    if twin is None:
        return states, (ids, None)
    states["compressed"], twin_routing = twin.forward(calls["compressed"])
    twin_ids = twin.original_ids(twin_routing.ids) if twin_routing is not None else None
    if split:
        states["selection_damage"], _ = block.forward(calls["selection_damage"], twin_ids)
        states["weight_damage"], _ = twin.forward(calls["weight_damage"], ids)
    return states, (ids, twin_ids)


def next_token_nll(logits: Tensor, input_ids: Tensor) -> Tensor:
    """Logits [B, T, V] and token ids [B, T] -> negative log-likelihoods [B, T-1] in nats, float32."""
    targets = input_ids[:, 1:].flatten().to(logits.device)
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), targets, reduction="none").view(
        len(input_ids), -1
    )


def token_log_likelihoods(model: MoEModel, input_ids: Tensor) -> Tensor:
    """Token ids [B, T] -> log-likelihoods [B, T-1] in nats of every token but the first."""
    return -run_batches(None, model, [input_ids])[0]["original"]
