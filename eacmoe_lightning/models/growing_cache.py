"""Keys and values that grow in place while a model generates.

transformers' dynamic cache makes a new tensor of all keys and one of all values for each token and layer. That is most
of a decode step of a long text beside packed weights, and of a batch of many texts. `grow_in_place` gives the layers of
the cache that a model is called with tensors with room to spare, in which new tokens find their place. Attention sees
the same numbers, as views. Nothing is written where another view may lie: shallow copies of a layer share its room, and
only the one whose tokens end where the room's do goes on in it. Layers that keep more than keys and values are left as
they are.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from eacmoe_lightning.models.transformers_modules import cache_of

LEAST_SPARE, SPARE = 256, 0.25  # places that a growth leaves free: so many, or this share of those taken
FEW = 8  # new tokens up to which a sliding window moves in its room


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
    cache = cache_of(kwargs)
    plain_class = getattr(cache, "plain_class", type(cache))  # of a cache that a skipping rule follows
    if plain_class is DynamicCache and not cache.offloading and not torch.compiler.is_compiling():
        for layer in cache.layers:
            layer.__class__ = GROWING.get(type(layer), type(layer))


class Room:
    """A tensor [B, H, R, D] with room to spare, of which the first `end` places have been given to tokens."""

    def __init__(self, new: Tensor, places: int) -> None:
        self.tensor, self.end = new.new_empty(*new.shape[:-2], places, new.shape[-1]), 0

    def follows(self, held: Tensor, new: Tensor) -> bool:
        """Whether the new tokens' place behind those held is in this room, is free, and may be written."""
        room = self.tensor
        if held.untyped_storage().data_ptr() != room.untyped_storage().data_ptr() or held.stride() != room.stride():
            return False
        if not held.shape[:-2] == new.shape[:-2] == room.shape[:-2] or held.dtype != new.dtype:
            return False
        place = (held.storage_offset() - room.storage_offset()) // room.stride(-2) + held.shape[-2]
        may = torch.is_inference_mode_enabled() or not room.is_inference()
        return may and place == self.end and place + new.shape[-2] <= room.shape[-2]

    def add(self, new: Tensor) -> None:
        """Writes tokens [B, H, n, D] behind the others."""
        self.tensor[..., self.end : self.end + new.shape[-2], :] = new
        self.end += new.shape[-2]

    def last(self, tokens: int) -> Tensor:
        """A view of the last tokens [B, H, tokens, D]."""
        return self.tensor[..., self.end - tokens : self.end, :]


class GrowingLayer(DynamicLayer):
    """A layer of the cache whose `keys` and `values` [B, H, T, D] are parts of larger tensors, its rooms."""

    rooms: tuple[Room | None, Room | None] = (None, None)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Appends the keys and values [B, H, n, D] of n tokens. Returns all of them, [B, H, T + n, D]."""
        if torch.is_grad_enabled():  # a backward pass may need what stands in the rooms
            self.rooms = (None, None)
            return super().update(key_states, value_states, *args, **kwargs)
        self.keys, self.values = self._appended(key_states, value_states)
        return self.keys, self.values

    def _appended(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        keys, key_room = _append(self.keys, key_states, self.rooms[0])
        values, value_room = _append(self.values, value_states, self.rooms[1])
        self.rooms = key_room, value_room
        return keys, values


class GrowingWindowLayer(DynamicSlidingWindowLayer, GrowingLayer):
    """A layer that keeps a sliding window of tokens: it moves on in its rooms, and at their end into new ones."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Appends tokens as `GrowingLayer` does and returns all, but keeps the last `sliding_window` - 1 of them."""
        records = getattr(self, "record_past", False)  # keeps more, for a `crop` to come
        if torch.is_grad_enabled() or records or key_states.shape[-2] > FEW:
            self.rooms = (None, None)  # those of a prompt would stay much larger than the window
            return DynamicSlidingWindowLayer.update(self, key_states, value_states, *args, **kwargs)
        keys, values = self._appended(key_states, value_states)
        self.cumulative_length += key_states.shape[-2]
        self.keys, self.values = (part[:, :, -self.sliding_window + 1 :, :] for part in (keys, values))
        return keys, values


GROWING = {DynamicLayer: GrowingLayer, DynamicSlidingWindowLayer: GrowingWindowLayer}


def _append(held: Tensor, new: Tensor, room: Room | None) -> tuple[Tensor, Room]:
    """What is held [B, H, T, D], or an empty tensor, with the new tokens after it, and the room that this lies in."""
    length = held.shape[-2] if held.numel() else 0
    if room is None or not room.follows(held, new):
        room = Room(new, with_room(length + new.shape[-2]))
        if length:
            room.add(held)
    room.add(new)
    return room.last(length + new.shape[-2]), room
