"""Which expert a full cache evicts.

A decoder visits its blocks in a cycle, so evicting the least recently used expert evicts just what comes next.
Selection frequencies, as a run collects them (`expert_frequency.json`), predict better which experts are needed again.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence

Place = tuple[int, int]  # block, expert

PRIOR = 32.0  # the given frequencies of a block weigh as much as this many uses
DECAY = 0.999  # factor on the weight of a use, for every later use


class Policy(ABC):
    @abstractmethod
    def used(self, place: Place) -> None:
        """Records that an expert was requested."""

    @abstractmethod
    def victim(self, candidates: Iterable[Place]) -> Place | None:
        """The candidate to evict; None if there are no candidates."""


class LeastRecent(Policy):
    """Evicts the least recently used expert."""

    def __init__(self) -> None:
        self.clock, self.last = 0, {}

    def used(self, place: Place) -> None:
        self.clock += 1
        self.last[place] = self.clock

    def victim(self, candidates: Iterable[Place]) -> Place | None:
        return min(candidates, key=lambda place: self.last.get(place, 0), default=None)


class LeastFrequent(LeastRecent):
    """Evicts the least frequently used expert; older uses count less.

    Args:
        loads: selections per expert to start from, by block, on any scale.
    """

    def __init__(self, loads: Mapping[int, Sequence[float]] | None = None) -> None:
        super().__init__()
        self.unit = 1.0  # weight of the latest use; it grows, so that older counts need not be decayed
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
    """The policy named `frequency` or `lru`.

    Raises:
        ValueError: there is no such policy.
    """
    if name not in ("frequency", "lru"):
        raise ValueError(f"eviction={name!r} is neither 'frequency' nor 'lru'")
    return LeastRecent() if name == "lru" else LeastFrequent(loads)
