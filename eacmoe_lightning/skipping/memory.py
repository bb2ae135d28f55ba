"""What a rule remembers of the sequences in a cache. It lies on the cache, so it is copied and pickled with it.

A cache with a memory is of a subclass of its class, whose methods change the memory as they change the sequences.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache as once
from typing import Any, ClassVar

from torch import Tensor

Memory = dict[str, Tensor]  # by name, [B, ...]


def memory_of(cache: Any, key: str) -> Memory | None:
    """A copy of what was remembered under this key; None without one, or if the cache was reset.

    Raises:
        ValueError: tokens that were counted were removed from the cache.
    """
    if not isinstance(cache, Followed) or cache.memory_key != key or not cache.get_seq_length():
        return None
    if cache.memory is None:
        raise ValueError(
            "tokens were removed from the cache, but a rule with `decode` cannot remove them from its expert counts: "
            "leave out `decode`, or what guesses tokens (an assistant model, `prompt_lookup_num_tokens`)"
        )
    return dict(cache.memory) or None


def remember(cache: Any, key: str, memory: Memory) -> None:
    """Puts a memory on a cache, in place of the one that it had."""
    if not isinstance(cache, Followed):
        cache.__class__ = _followed(type(cache))
    cache.memory_key, cache.memory = key, memory


class Followed:
    """A cache with a memory: reordered beams, selected and repeated sequences and a reset change both.

    Attributes:
        plain_class: the cache's own class.
        memory_key: whose the memory is.
        memory: the state of each sequence; None if tokens were removed, whose experts are counted in it.
    """

    plain_class: ClassVar[type]
    memory_key: str
    memory: Memory | None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        self._change(lambda state: state.index_select(0, beam_idx.to(state.device)))

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._change(lambda state: state[indices.to(state.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self._change(lambda state: state.repeat_interleave(repeats, 0))

    def reset(self) -> None:
        super().reset()
        self.memory = {}

    def crop(self, *args: Any, **kwargs: Any) -> None:
        before = int(self.get_seq_length())
        super().crop(*args, **kwargs)
        if int(self.get_seq_length()) != before:
            self.memory = None

    def _change(self, change: Callable[[Tensor], Tensor]) -> None:
        if self.memory:
            self.memory = {name: change(state) for name, state in self.memory.items()}

    def __reduce_ex__(self, protocol: Any) -> tuple:
        return _rebuild, (self.plain_class,), dict(vars(self))


@once
def _followed(plain_class: type) -> type:
    return type(plain_class.__name__, (Followed, plain_class), {"plain_class": plain_class})


def _rebuild(plain_class: type) -> Any:
    """An empty cache with a memory, for copies and pickles."""
    followed = _followed(plain_class)
    return followed.__new__(followed)
