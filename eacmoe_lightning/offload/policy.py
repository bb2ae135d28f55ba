"""Which expert leaves a full cache.

A decoder visits its blocks in a circle, and least recently used evicts just what comes round next; selection
frequencies, as a run collects them (`expert_frequency.json`), know better which experts come round at all.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence

Place = tuple[int, int]  # block, expert

PRIOR = 32.0  # how many uses of a block its given frequencies are worth
DECAY = 0.999  # of a use, with every later one


class Policy(ABC):
    @abstractmethod
    def used(self, place: Place) -> None:
        """An expert was asked for."""

    @abstractmethod
    def victim(self, candidates: Iterable[Place]) -> Place | None:
        """The candidate that leaves; None without candidates."""


class LeastRecent(Policy):
    """The one whose last use lies furthest back."""

    def __init__(self) -> None:
        self.clock, self.last = 0, {}

    def used(self, place: Place) -> None:
        self.clock += 1
        self.last[place] = self.clock

    def victim(self, candidates: Iterable[Place]) -> Place | None:
        return min(candidates, key=lambda place: self.last.get(place, 0), default=None)


class LeastFrequent(LeastRecent):
    """The one that is selected most rarely: given frequencies to begin with, then uses, older ones counting less.

    Args:
        loads: selections per expert, by block; any scale.
    """

    def __init__(self, loads: Mapping[int, Sequence[float]] | None = None) -> None:
        super().__init__()
        self.unit = 1.0  # grows instead of all counts decaying
        self.counts: dict[Place, float] = {}
        for block, load in (loads or {}).items():
            total = sum(load) or 1
            self.counts |= {(block, expert): PRIOR * value / total for expert, value in enumerate(load)}

    def used(self, place: Place) -> None:
        super().used(place)
        self.unit /= DECAY
        self.counts[place] = self.counts.get(place, 0.0) + self.unit
        if self.unit > 1e100:
            self.counts = {place: count / self.unit for place, count in self.counts.items()}
            self.unit = 1.0

    def victim(self, candidates: Iterable[Place]) -> Place | None:
        return min(candidates, key=lambda place: (self.counts.get(place, 0.0), self.last.get(place, 0)), default=None)


def policy(name: str, loads: Mapping[int, Sequence[float]] | None = None) -> Policy:
    """`frequency` or `lru`.

    Raises:
        ValueError: neither.
    """
    if name not in ("frequency", "lru"):
        raise ValueError(f"eviction {name!r} is neither 'frequency' nor 'lru'")
    return LeastRecent() if name == "lru" else LeastFrequent(loads)
