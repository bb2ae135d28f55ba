"""Keys and values that grow in place while a model generates.

transformers' dynamic cache makes a new tensor of all keys and one of all values for each token and layer. That is most
of a decode step of a long text beside packed weights, and of a batch of many texts. `grow_in_place` gives the
full-attention layers of the cache that a model is called with tensors with room to spare, in which new tokens find
their place. Attention sees the same numbers, as views.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers.cache_utils import DynamicCache, DynamicLayer

LEAST_SPARE, SPARE = 256, 0.25  # places that a growth leaves free: so many, or this share of those taken


def grow_in_place(model: nn.Module) -> RemovableHandle:
    """Has the layers of every `DynamicCache` that this model is called with grow in place from then on.

    Returns:
        A handle that ends it: `remove()`. Layers that grow in place go on doing so.
    """
    return model.register_forward_pre_hook(_adopt, with_kwargs=True)


def with_room(tokens: int) -> int:
    """Tokens for which there is room at most when so many have been cached."""
    return tokens + max(LEAST_SPARE, int(SPARE * tokens))


def _adopt(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    for cache in (*args, *kwargs.values()):  # its name differs between versions of transformers
        if type(cache) is DynamicCache and not cache.offloading and not torch.compiler.is_compiling():
            for layer in cache.layers:
                if type(layer) is DynamicLayer:
                    layer.__class__ = GrowingLayer


class GrowingLayer(DynamicLayer):
    """A layer of the cache whose `keys` and `values` [B, H, T, D] are the beginnings of larger tensors, its rooms."""

    rooms: tuple[Tensor | None, Tensor | None] = (None, None)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Appends the keys and values [B, H, n, D] of n tokens. Returns all of them, [B, H, T + n, D]."""
        if torch.is_grad_enabled():  # a backward pass may need what stands in the rooms
            self.rooms = (None, None)
            return super().update(key_states, value_states, *args, **kwargs)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys, key_room = _append(self.keys, key_states, self.rooms[0])
        self.values, value_room = _append(self.values, value_states, self.rooms[1])
        self.rooms = key_room, value_room
        return self.keys, self.values


def _append(held: Tensor, new: Tensor, room: Tensor | None) -> tuple[Tensor, Tensor]:
    """What is held [B, H, T, D], or an empty tensor, with the new tokens after it, and the room that this lies in."""
    start = held.shape[-2] if held.numel() else 0
    end = start + new.shape[-2]
    if room is None or not _takes(room, held, new, end):
        room = new.new_empty(*new.shape[:-2], with_room(end), new.shape[-1])
        if start:
            room[..., :start, :] = held
    room[..., start:end, :] = new
    return room[..., :end, :], room


def _takes(room: Tensor, held: Tensor, new: Tensor, end: int) -> bool:
    """Whether what is held is the beginning of `room`, and new tokens may be written behind it."""
    is_beginning = held.data_ptr() == room.data_ptr() and held.stride() == room.stride()
    fits = end <= room.shape[-2] and held.shape[:-2] == new.shape[:-2] and held.dtype == new.dtype
    return is_beginning and fits and (torch.is_inference_mode_enabled() or not room.is_inference())
