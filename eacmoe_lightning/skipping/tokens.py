"""The sequence of each of a router's N tokens, and which tokens are padding, from the decoder's arguments.

A router sees [N, D] and knows neither. The decoder is called with [B, T] tokens and an attention mask in one of the
forms that transformers uses: none, [B, past + T], or prepared [B, 1, T, keys] (one, or one for each kind of layer).
"""

from __future__ import annotations

import inspect
import itertools
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from eacmoe_lightning.models.transformers_modules import cache_of, is_paged


@dataclass
class Tokens:
    """The tokens of one forward pass.

    Attributes:
        real: [B, T] bool, False for padding.
        memory: a rule's state for each sequence, [B, ...] by name, kept between forward passes with the same cache.
        is_continued: whether `memory` already holds the state of earlier passes.
        last: how many tokens of each sequence, its last ones, some blocks get alone (those of Gemma 4 that read the
            keys of others, where `generate` asks for the last logits); 0: every block gets all.
        past: how many tokens of each sequence the cache held before, for rules that ask for it.
        texts: where rows hold several texts, which of the B * T tokens each text has, for rules that ask for it.
    """

    real: Tensor
    memory: dict[str, Tensor] = field(default_factory=dict)
    is_continued: bool = False
    last: int = 0
    past: int = 0
    texts: list[slice] = field(default_factory=list)

    def of_router(self, number: int) -> Tokens | None:
        """The tokens of a router that got this number of them; None if it is unknown which these are."""
        batch, length = self.shape
        if number == batch * length:
            return self
        if not self.last or number != batch * self.last:
            return None
        return replace(self, real=self.real[:, -self.last :], past=self.past + length - self.last, texts=[])

    def of_text(self, text: slice) -> Tokens:
        """One of `texts` as a sequence of its own."""
        return Tokens(self.real.flatten()[None, text])

    @property
    def shape(self) -> tuple[int, int]:
        """B, T."""
        return self.real.shape[0], self.real.shape[1]

    @property
    def is_step(self) -> bool:
        """One token per sequence: a step of generation, or a prompt of one token."""
        return self.real.shape[1] == 1


def named_arguments(decoder: nn.Module, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a decoder's forward pass by name."""
    if not args:
        return kwargs
    return kwargs | inspect.signature(decoder.forward).bind_partial(*args).arguments


def packed_texts(arguments: dict[str, Any], uses_cache: bool) -> list[slice]:
    """The texts in rows that hold several, as slices of the B * T tokens; none where each row is one sequence.

    transformers keeps texts apart where positions do not go on by 1, if there is neither a mask nor a cache.
    """
    positions = arguments.get("position_ids")
    uses_cache = uses_cache if arguments.get("use_cache") is None else arguments["use_cache"]
    has_more = uses_cache or arguments.get("attention_mask") is not None or cache_of(arguments) is not None
    if has_more or not isinstance(positions, Tensor) or positions.ndim != 2:
        return []
    inputs = arguments.get("input_ids")
    batch, length = (arguments["inputs_embeds"] if inputs is None else inputs).shape[:2]
    begins = torch.ones(batch, length, dtype=torch.bool)
    begins[:, 1:] = positions.cpu().diff(dim=1) != 1
    starts = [*begins.flatten().nonzero().flatten().tolist(), batch * length]
    return [slice(*pair) for pair in itertools.pairwise(starts)] if len(starts) > batch + 1 else []


def real_tokens(arguments: dict[str, Any]) -> Tensor:
    """[B, T] bool: which of the decoder's tokens are not padding.

    Raises:
        ValueError: the attention mask has an unknown form.
    """
    inputs = arguments.get("input_ids")
    inputs = arguments["inputs_embeds"] if inputs is None else inputs
    batch, length = inputs.shape[:2]
    mask = arguments.get("attention_mask")
    if isinstance(mask, dict):  # one for each kind of layer, with the same padding
        mask = next((m for m in mask.values() if m is not None), None)
    cache = cache_of(arguments)
    if mask is None or is_paged(cache):
        return torch.ones(batch, length, dtype=torch.bool, device=inputs.device)
    if isinstance(mask, Tensor) and mask.ndim == 2:
        return mask[:, -length:].bool()
    if not isinstance(mask, Tensor) or mask.ndim != 4:
        raise ValueError(
            f"an attention mask of type {type(mask).__name__}{_shape(mask)} does not distinguish padding from tokens, "
            "so no expert can be skipped: pass a mask of [batch, length], or none"
        )
    past = 0 if cache is None else int(cache.get_seq_length())
    past = past if past + length <= mask.shape[-1] else mask.shape[-1] - length  # a sliding window has fewer keys
    diagonal = mask[:, 0].diagonal(past, -2, -1)  # only padding does not attend to itself
    return (diagonal if diagonal.dtype == torch.bool else diagonal == 0).expand(batch, length)


def _shape(mask: Any) -> str:
    return f" and shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else ""
