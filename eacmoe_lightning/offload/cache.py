"""The cache between the compressed store and the computation: it bounds memory, evicts experts and fetches ahead.

A block opens a `Window` on the experts that it is about to run. The window starts to fetch those that the cache lacks,
as many as there is room for, and waits for each when the block requests it. Experts of an open window are pinned; where
they do not all fit, each is unpinned when the block requests the next. All bookkeeping happens in the thread that runs
the model; workers only fill slots.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Collection, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass

import torch
from torch import Tensor

from eacmoe_lightning.offload.counters import Counters
from eacmoe_lightning.offload.fetch import Fetcher
from eacmoe_lightning.offload.jobs import Part, parts_of
from eacmoe_lightning.offload.policy import Place, Policy
from eacmoe_lightning.offload.slots import Slots, nbytes_of
from eacmoe_lightning.offload.store import ExpertStore, Key


@dataclass
class Entry:
    """One expert in the cache."""

    slot: int
    future: Future[float] | None  # of its fetch; None: the slot is filled
    is_prediction: bool  # prefetched and not requested yet
    is_pinned: bool = False  # in use or about to be, so it cannot be evicted

    @property
    def is_ready(self) -> bool:
        return self.future is None or self.future.done()


class ExpertCache:
    """Cached experts of the blocks that share one layout.

    Args:
        slots: the memory that holds them.
    """

    def __init__(self, slots: Slots, store: ExpertStore, fetcher: Fetcher, policy: Policy, counters: Counters) -> None:
        self.slots, self.store, self.fetcher, self.policy, self.counters = slots, store, fetcher, policy, counters
        self.projections = tuple(name for name, _ in slots.layout)
        self.expert_bytes = nbytes_of(slots.layout)
        self.is_packed = len(slots.parts[0]) > 1
        self.parts: dict[Place, tuple[tuple[Part, ...], ...]] = {}
        self.entries: dict[Place, Entry] = {}
        self.fetching: dict[Place, Entry] = {}  # those of the entries whose fetch nobody has waited for
        self.held: Counter[int] = Counter()  # number of entries of each block
        self.free = list(range(slots.capacity))[::-1]

    @property
    def capacity(self) -> int:
        return self.slots.capacity

    def holds(self, block: int, num_experts: int) -> bool:
        """Whether all experts of a block are here or on their way."""
        return self.held[block] == num_experts

    def window(self, block: int, experts: Sequence[int]) -> Window:
        """A context manager for a block that will request these experts in this order."""
        return Window(self, block, experts)

    def prefetch(self, block: int, experts: Sequence[int]) -> None:
        """Starts to fetch experts that are likely to be requested, the likeliest first, while there is room."""
        predicted = {(block, expert) for expert in experts}
        for expert in experts:
            if (block, expert) not in self.entries and not self.start((block, expert), True, predicted):
                return

    def start(self, place: Place, is_prediction: bool, protected: Collection[Place] = ()) -> bool:
        """Starts to fetch an expert, without evicting any of `protected` for it.

        Returns:
            Whether a slot could be freed.

        Raises:
            StoreError: the store's file was truncated after it was opened.
        """
        self.store.check_size()
        slot = self._take_slot(protected)
        if slot is None:
            return False
        future = self.fetcher.submit(self.slots.loader(slot, self._records(place), self.parts_of(place)))
        self.entries[place] = self.fetching[place] = Entry(slot, future, is_prediction)
        self.held[place[0]] += 1
        self.counters.prefetches += is_prediction
        self._count_bytes(place, 1)
        return True

    def wait(self, place: Place) -> int:
        """Waits for an expert whose fetch has started; returns its slot.

        Raises:
            RecordError: the expert's record is damaged.
        """
        entry = self.entries[place]
        if entry.future is not None:
            try:
                self.counters.decode_seconds += entry.future.result()
            except Exception:
                self.free.append(self.forget(place).slot)
                raise
            entry.future = None
            self.fetching.pop(place)
        return entry.slot

    def drop_queued(self, wanted: Collection[Place]) -> None:
        """Cancels prefetches of experts that are not wanted, unless a worker has started on them."""
        for place, entry in list(self.fetching.items()):
            if not entry.is_pinned and place not in wanted and entry.future.cancel():
                self.free.append(self.forget(place).slot)
                self.counters.prefetches -= 1
                self._count_bytes(place, -1)

    def wait_for_room(self) -> None:
        """Waits until some prefetch ends, so that its expert can be evicted."""
        in_flight = [entry.future for entry in self.fetching.values() if not (entry.is_pinned or entry.is_ready)]
        wait(in_flight, return_when=FIRST_COMPLETED)

    def _take_slot(self, protected: Collection[Place]) -> int | None:
        """A free slot, or that of an expert evicted for it."""
        if self.free:
            return self.free.pop()
        idle = (p for p, entry in self.entries.items() if not entry.is_pinned and entry.is_ready and p not in protected)
        victim = self.policy.victim(idle)
        if victim is None:
            return None
        entry = self.forget(victim)
        self.counters.evictions += 1
        self.counters.useless_prefetches += entry.is_prediction
        return entry.slot

    def forget(self, place: Place) -> Entry:
        """Takes an expert out of the cache; its slot is the caller's."""
        self.fetching.pop(place, None)
        self.held[place[0]] -= 1
        return self.entries.pop(place)

    def parts_of(self, place: Place) -> tuple[tuple[Part, ...], ...]:
        """An expert's tensors, projection by projection."""
        if place not in self.parts:
            headers = (self.store.header(Key(*place, projection)) for projection in self.projections)
            self.parts[place] = tuple(parts_of(header, self.is_packed) for header in headers)
        return self.parts[place]

    def _records(self, place: Place) -> tuple[tuple[int, int, str], ...]:
        keys = [Key(*place, projection) for projection in self.projections]
        return tuple((*self.store.places[key], self.store.name_of(key)) for key in keys)

    def _count_bytes(self, place: Place, sign: int) -> None:
        moved = sum(self.store.places[Key(*place, projection)][1] for projection in self.projections)
        self.counters.bytes_moved += sign * moved
        self.counters.bytes_saved += sign * (self.expert_bytes - moved)


class Window:
    """The experts that a block is about to run, in this order.

    Attributes:
        fits: whether the cache holds all of them at once.
    """

    def __init__(self, cache: ExpertCache, block: int, experts: Sequence[int]) -> None:
        self.cache, self.block, self.experts = cache, block, list(experts)
        self.fits = len(self.experts) <= cache.capacity
        self.next = 0  # position of the first expert whose fetch may not have started
        self.current: int | None = None

    def __enter__(self) -> Window:
        cache, places = self.cache, [(self.block, expert) for expert in self.experts]
        cache.drop_queued(places)
        for place in places:
            cache.policy.used(place)
            entry = cache.entries.get(place)
            if entry is None:
                cache.counters.misses += 1
                continue
            cache.counters.hits += entry.is_ready
            cache.counters.late += not entry.is_ready
            entry.is_prediction, entry.is_pinned = False, self.fits
        self._fetch_ahead()
        return self

    def __exit__(self, *_: object) -> None:
        for expert in self.experts:
            if (entry := self.cache.entries.get((self.block, expert))) is not None:
                entry.is_pinned = False

    def _fetch_ahead(self) -> None:
        """Starts to fetch the next experts, in their order, while slots can be freed."""
        start = time.perf_counter()
        while self.next < len(self.experts):
            place = (self.block, self.experts[self.next])
            if place not in self.cache.entries and not self.cache.start(place, is_prediction=False):
                break
            self.cache.entries[place].is_pinned = True
            self.next += 1
        self.cache.counters.stall_seconds += time.perf_counter() - start

    def slot(self, expert: int) -> int:
        """The filled slot of an expert, valid until another is requested (or, if all fit, until the window closes).

        Raises:
            RecordError: the expert's record is damaged.
        """
        if expert != self.current:
            if self.current is not None and not self.fits:
                self.cache.entries[self.block, self.current].is_pinned = False
            self.current = expert
            self._fetch_ahead()
        start = time.perf_counter()
        while (self.block, expert) not in self.cache.entries:
            self.cache.wait_for_room()
            self._fetch_ahead()
        slot = self.cache.wait((self.block, expert))
        self.cache.counters.stall_seconds += time.perf_counter() - start
        return slot

    def slots(self) -> list[int]:
        """The slots of all experts of a window that fits."""
        assert self.fits
        return [self.slot(expert) for expert in self.experts]


class Weights:
    """Stands in for a stacked weight [E, ...]; indexing it fetches that expert."""

    def __init__(self, window: Window, projection: str) -> None:
        self.window = window
        (self.stack,) = window.cache.slots.stack(projection)

    def __getitem__(self, expert: Tensor | int) -> Tensor:
        return self.stack[self.window.slot(int(expert))]


def slot_table(window: Window, num_experts: int, device: torch.device) -> Tensor:
    """int64 [E + 1]: the slot of each expert in the window; S, an id that is skipped, for all others."""
    table = torch.full((num_experts + 1,), window.cache.capacity, dtype=torch.long)
    table[torch.tensor(window.experts, dtype=torch.long)] = torch.tensor(window.slots(), dtype=torch.long)
    return table.to(device, non_blocking=True)
