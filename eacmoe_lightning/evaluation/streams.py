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

from eacmoe_lightning.models.block import Block
from eacmoe_lightning.models.moe import MoEModel


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
    hidden: MutableMapping[tuple[int, str], Tensor] | None = None,
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
    embedded = _Embedded(reference, batches), _Embedded(other, batches) if other is not None else None
    hidden = {} if hidden is None else hidden
    for j in range(len(batches)):
        hidden.update({(j, name): embedded[name in OF_SUBJECT].embed(j) for name in names})
    moe_block = 0
    for i in range(len(reference.blocks)):
        with reference.loaded(i) as block, other.loaded(i) if other is not None else nullcontext() as twin:
            for j in range(len(batches)):
                kwargs = [e.kwargs(j, i) if e is not None else {} for e in embedded]
                streams = {name: hidden[j, name].to(reference.device) for name in names}
                selected = _through_block(block, twin, streams, kwargs, split)
                hidden.update({(j, name): stream for name, stream in streams.items()})
                if block.is_moe and on_selections is not None:
                    on_selections(j, moe_block, *selected)
        moe_block += block.is_moe

    def nll(j: int, name: str) -> Tensor:
        head = (other if name in OF_SUBJECT else reference).head
        windows = zip(hidden[j, name].to(reference.device).split(1), batches[j].split(1), strict=True)
        return torch.cat([next_token_nll(head(h), ids) for h, ids in windows])  # logits of one window at a time

    return [{name: nll(j, name) for name in names} for j in range(len(batches))]


OF_SUBJECT = ("compressed", "weight_damage")  # streams that run through the subject's weights


class _Embedded:
    """Hidden states [B, T, D] before block 0, and the blocks' keyword arguments, which depend on the shape only."""

    def __init__(self, moe: MoEModel, batches: Sequence[Tensor]) -> None:
        self.moe, self.batches = moe, batches
        self._shapes = [tuple(batch.shape) for batch in batches]
        self._kwargs: dict[tuple[int, ...], list[dict]] = {}

    def embed(self, batch: int) -> Tensor:
        hidden, kwargs = self.moe.embed(self.batches[batch].to(self.moe.device))
        self._kwargs.setdefault(self._shapes[batch], kwargs)
        return hidden

    def kwargs(self, batch: int, block: int) -> dict:
        return self._kwargs[self._shapes[batch]][block]


def _through_block(
    block: Block, twin: Block | None, streams: dict[str, Tensor], kwargs: list[dict], split: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Runs a batch's streams through a block and its twin; returns the expert ids that each of them selected."""
    streams["original"], routing = block.forward(streams["original"], kwargs[0])
    ids = routing.ids if routing is not None else None
    if twin is None:
        return ids, None
    streams["compressed"], twin_routing = twin.forward(streams["compressed"], kwargs[1])
    twin_ids = twin.original_ids(twin_routing.ids) if twin_routing is not None else None
    if split:
        streams["selection_damage"], _ = block.forward(streams["selection_damage"], kwargs[0], twin_ids)
        streams["weight_damage"], _ = twin.forward(streams["weight_damage"], kwargs[1], ids)
    return ids, twin_ids


def next_token_nll(logits: Tensor, input_ids: Tensor) -> Tensor:
    """Logits [B, T, V] and token ids [B, T] -> negative log-likelihoods [B, T-1] in nats, float32."""
    targets = input_ids[:, 1:].flatten().to(logits.device)
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), targets, reduction="none").view(
        len(input_ids), -1
    )


def token_log_likelihoods(model: MoEModel, input_ids: Tensor) -> Tensor:
    """Token ids [B, T] -> log-likelihoods [B, T-1] in nats of every token but the first."""
    return -run_batches(None, model, [input_ids])[0]["original"]
