"""Original and compressed model side by side, block by block: what each token's loss and each selection became.

Both run on the same text, one block of each in memory at a time, and one pass gives four streams (EAC-MoE, table 1):

    original          full precision
    compressed        as it would be served
    selection_damage  original weights, but the experts that the compressed model selected
    weight_damage     compressed weights, but the experts that the original selected"""

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
    """What one batch of windows gave: negative log-likelihoods in nats and selections."""

    nll: dict[str, Tensor]  # by stream: [B, T-1]
    original_ids: list[Tensor]  # per MoE block [N, K]
    compressed_ids: list[Tensor]


def run_streams(original: MoEModel | None, subject: MoEModel, input_ids: Tensor, split: bool = False) -> Streams:
    """`run_batches` of one batch [B, T], with all selections kept."""
    streams = Streams({}, [], [])

    def keep(batch: int, block: int, ids: Tensor, compressed_ids: Tensor | None) -> None:
        streams.original_ids.append(ids)
        if compressed_ids is not None:
            streams.compressed_ids.append(compressed_ids)

    streams.nll = run_batches(original, subject, [input_ids], split, keep)[0]
    return streams


# batch, MoE block, the original's ids [N, K] and, where there is one beside it, the compressed model's
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
    """Runs batches of tokens [B, T] through the original and the subject side by side, all of them block by block.

    Each block is in memory once, whatever the number of batches. Without an original, the subject is itself one: only
    its own stream runs, under the name `original`. Hidden states rest in `hidden` between blocks, by batch and stream:
    in memory, or on a `streaming.hidden.Shelf`.

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
    """Hidden states [B, T, D] before block 0, and each block's keyword arguments, which depend on the shape only."""

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
    """Takes one batch's streams through a block of the original and its twin; what experts the two selected."""
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
    """[B, T, V], [B, T] -> [B, T-1] nats, float32."""
    targets = input_ids[:, 1:].flatten().to(logits.device)
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), targets, reduction="none").view(
        len(input_ids), -1
    )


def token_log_likelihoods(model: MoEModel, input_ids: Tensor) -> Tensor:
    """[B, T] -> [B, T-1] nats."""
    return -run_batches(None, model, [input_ids])[0]["original"]
