"""Text that a model writes itself, in batches with a cache of keys and values, as transformers' `generate` runs it.

A token is drawn by the inverse of the cumulative distribution at a number between 0 and 1 that is given for its place.
So no random state is touched, and a window depends on its own numbers alone, up to rounding in batches of another size.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedConfig, PreTrainedModel

from eacmoe_lightning.models.growing_cache import grow_in_place, with_room

MOST_ROWS = 512  # windows in a batch
BATCH_BYTES = {"cpu": 2 << 30, "cuda": 8 << 30}  # of keys, values and logits in a batch
ROWS = 32  # windows whose distributions are summed up at a time, in float64
LOGIT_BYTES, SUM_BYTES = 12, 24  # of a window's next token, for each word of the vocabulary


class Opened(Protocol):
    """What the windows of a batch are given (`text.openings.Openings`)."""

    ends: frozenset[int]

    def tokens(self, row: int, number: int) -> list[int]:
        """The window's opening with this number, from 0."""


def sample(
    model: PreTrainedModel, openings: Opened, uniforms: Tensor, temperature: float, num_ids: int
) -> tuple[Tensor, Tensor]:
    """Windows that the model continues.

    Args:
        model: a causal language model, wholly in memory.
        openings: what each window begins with and, after a token of `openings.ends`, goes on with.
        uniforms: float64 [B, T], between 0 and 1: where on the cumulative distribution each token is drawn.
        temperature: divides the logits.
        num_ids: token ids from here on are not drawn.

    Returns:
        Token ids, int64 [B, T], and which of them the model chose, bool [B, T].

    Raises:
        ValueError: the model cannot generate, or a logit is NaN or infinite.
    """
    if not model.can_generate():
        raise ValueError(f"{type(model).__name__} cannot generate text")
    first = torch.tensor([openings.tokens(row, 0)[:1] for row in range(len(uniforms))], device=model.device)
    draw = _Draw(openings, uniforms.to(model.device), temperature, num_ids)
    before, model.generation_config = model.generation_config, GenerationConfig()  # no end, no penalties
    growing = grow_in_place(model)
    try:
        ids = first
        if uniforms.shape[1] > 1:
            ids = model.generate(
                first,
                attention_mask=torch.ones_like(first),
                max_new_tokens=uniforms.shape[1] - 1,
                do_sample=False,
                use_cache=True,
                logits_processor=LogitsProcessorList([draw]),
            )
    finally:
        growing.remove()
        model.generation_config = before
    if not torch.isfinite(draw.totals).all():
        raise ValueError("its logits are NaN or infinite")
    return ids.cpu(), draw.chose


class _Draw(LogitsProcessor):
    """Leaves one token of each row's distribution, which `generate` then takes as the best."""

    def __init__(self, openings: Opened, uniforms: Tensor, temperature: float, num_ids: int) -> None:
        self.openings, self.uniforms, self.temperature, self.num_ids = openings, uniforms, temperature, num_ids
        self.chose = torch.zeros(uniforms.shape, dtype=torch.bool)
        self.totals = torch.ones(len(uniforms), dtype=torch.float64, device=uniforms.device)
        self.given = [openings.tokens(row, 0)[1:] for row in range(len(uniforms))]
        self.number = [0] * len(uniforms)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        place = input_ids.shape[1]
        tokens = torch.cat([self._drawn(*rows) for rows in zip(
            scores.split(ROWS), self.uniforms[:, place : place + 1].split(ROWS), self.totals.split(ROWS), strict=True
        )])  # fmt: skip
        self.chose[:, place] = True
        if self.openings.ends or any(self.given):
            for row, token in self._given(input_ids[:, -1], place):
                tokens[row], self.chose[row, place] = token, False
        return torch.full_like(scores, -torch.inf).scatter_(1, tokens, 0.0)

    def _drawn(self, scores: Tensor, uniforms: Tensor, totals: Tensor) -> Tensor:
        """Tokens [b, 1]. `totals` [b] adds up what is not a number."""
        scores = scores[:, : self.num_ids].double() / self.temperature
        sums = scores.softmax(-1).cumsum(-1)
        totals += sums[:, -1]
        return torch.searchsorted(sums, uniforms * sums[:, -1:], right=True).clamp(max=sums.shape[1] - 1)

    def _given(self, last: Tensor, place: int) -> list[tuple[int, int]]:
        """The rows that are given a token at this place, and the token."""
        given = []
        for row, token in enumerate(last.tolist()):
            if token in self.openings.ends and self.chose[row, place - 1]:
                self.number[row] += 1
                self.given[row] = self.openings.tokens(row, self.number[row])
            if self.given[row]:
                given.append((row, self.given[row].pop(0)))
        return given


def cache_bytes(config: PreTrainedConfig, itemsize: int) -> int:
    """Bytes of keys and values that a token leaves in the cache, at most.

    Args:
        config: of the text model.
        itemsize: bytes per number.
    """

    def size(name: str) -> int:
        return getattr(config, name, None) or 0

    heads = size("num_attention_heads")
    if latent := size("qk_nope_head_dim") + size("qk_rope_head_dim"):  # transformers caches what it expands
        numbers = heads * (latent + size("v_head_dim"))
    else:
        numbers = 2 * (size("num_key_value_heads") or heads) * (size("head_dim") or config.hidden_size // max(heads, 1))
    return config.num_hidden_layers * numbers * itemsize


def batch_size(config: PreTrainedConfig, itemsize: int, num_windows: int, window_length: int, device: str) -> int:
    """Windows that are sampled at a time, as even as batches of at most `MOST_ROWS` and `BATCH_BYTES` allow.

    The same model, windows and type of device (`cpu` or `cuda`) give the same batches on every machine.
    """
    window = window_length * cache_bytes(config, itemsize) + LOGIT_BYTES * config.vocab_size
    most = min(BATCH_BYTES.get(device, BATCH_BYTES["cpu"]) // window, MOST_ROWS)
    batches = -(-num_windows // max(1, most))
    return -(-num_windows // batches)


def working_bytes(config: PreTrainedConfig, itemsize: int, windows: int, window_length: int) -> int:
    """Memory that sampling a batch of windows takes beside the weights: the cache, logits and their sums."""
    cached = with_room(window_length) * cache_bytes(config, itemsize)
    return windows * (cached + LOGIT_BYTES * config.vocab_size) + ROWS * SUM_BYTES * config.vocab_size
