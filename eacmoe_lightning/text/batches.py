"""Batches of windows: their order, and which rank gets which windows.

There are two orders. *Calibration* runs in shuffled global batches for several epochs, and must
continue after a checkpoint with exactly the next batch. *Held-out* text runs once, in order.

With several processes each window has one owner: rank r of R owns the contiguous shard
`[r*S//R, (r+1)*S//R)`, so that the hidden states of a window stay where they are computed. The
global batch does not depend on R: every rank gets the members that it owns (possibly none) and the
size of the whole batch. The sum of `local_sum / global_size` over ranks is then the mean that a
single process computes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor


def shard(num: int, rank: int, world_size: int) -> range:
    """The windows, out of `num`, that a rank owns: contiguous; each window has exactly one owner."""
    return range(rank * num // world_size, (rank + 1) * num // world_size)


def calibration_batches(num: int, batch_size: int, seed: int, rank: int, world_size: int) -> list[tuple[Tensor, int]]:
    """One epoch: a rank's members [b] (b may be 0) of each global batch, and the size of that batch.

    The `num` windows are shuffled with `seed`. A global batch has `batch_size` of them; the last one
    may have fewer.
    """
    order = torch.randperm(num, generator=torch.Generator().manual_seed(seed))
    owned = shard(num, rank, world_size)
    return [(batch[(batch >= owned.start) & (batch < owned.stop)], len(batch)) for batch in order.split(batch_size)]


def heldout_batches(num: int, batch_size: int, rank: int, world_size: int) -> list[tuple[Tensor, int]]:
    """A rank's windows in order, `batch_size` at a time, and the number of windows of all ranks in that step.

    Every rank gets the same number of batches, so that no rank waits forever for another: ranks with
    fewer windows get empty batches at the end.
    """
    shards = [shard(num, r, world_size) for r in range(world_size)]
    starts = range(0, max(map(len, shards)), batch_size)
    return [
        (
            torch.tensor(shards[rank][start : start + batch_size], dtype=torch.int64),
            sum(len(owned[start : start + batch_size]) for owned in shards),
        )
        for start in starts
    ]


ON_HOST = ("index", "counts")  # of a batch: what the host reads, which needs no way to the device and back


class WindowLoader:
    """Yields windows as batches, from memory. Lightning can stop and resume it after any batch.

    Yields dicts: `index` int64 [b], the windows' numbers in `windows`; `input_ids` int64 [b, T];
    `global_size` int, the number of windows in this batch over all ranks. With several ranks b may be 0.
    With `weights` or `held_back`, also `weights` [b, T], `counts` bool [b], whether any token of a window counts, and
    `global_tokens` int, the number of tokens that count in this batch over all ranks. With `position_ids`, also
    `position_ids` int64 [b, T].

    Lightning keeps `state_dict()` in its checkpoints (`loops.fit_loop.combined_loader`) and calls
    `load_state_dict()` before the first batch after a restart. The length is always that of the
    whole epoch, because Lightning itself counts the batches before the restart.

    Args:
        windows: [S, T] token ids, the same on every rank.
        batch_size: windows per global batch if shuffled, per rank and batch if not.
        shuffle: whether to yield `calibration_batches`; if not, `heldout_batches`.
        seed: epoch e is shuffled with seed + e, independently of the global random state.
        rank, world_size: this process, and the number of processes.
        epoch: called at the start of every pass for the number of the epoch.
        weights: bool [S, T], the tokens that count; None: all, and batches have no weights.
        held_back: the number of an epoch -> bool [S], the windows whose tokens do not count in it; None: all count.
        position_ids: int64 [S, T], positions of the tokens in their documents; None: batches have none.
    """

    def __init__(
        self,
        windows: Tensor,
        batch_size: int,
        shuffle: bool,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        epoch: Callable[[], int] = lambda: 0,
        weights: Tensor | None = None,
        held_back: Callable[[int], Tensor | None] = lambda epoch: None,
        position_ids: Tensor | None = None,
    ):
        self.windows = windows
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.epoch = epoch
        self.weights = weights
        self.held_back = held_back
        self.position_ids = position_ids
        self._position = {"epoch": 0, "num_dealt": 0}  # in the present pass
        self._resumed: dict[str, int] | None = None  # a loaded position that the next pass starts from

    def batches(self, epoch: int) -> list[tuple[Tensor, int]]:
        """This rank's window numbers [b] and the global size, for each batch of an epoch."""
        return self._batches(epoch, self.rank, self.world_size)

    def _batches(self, epoch: int, rank: int, world_size: int) -> list[tuple[Tensor, int]]:
        num = len(self.windows)
        if not self.shuffle:
            return heldout_batches(num, self.batch_size, rank, world_size)
        return calibration_batches(num, self.batch_size, self.seed + epoch, rank, world_size)

    def _weights(self, epoch: int, number: int, index: Tensor) -> dict[str, Tensor | int]:
        """The weights of a batch of an epoch, by the names of the batch."""
        weights, held_back = self.weights, self.held_back(epoch)
        if held_back is not None:
            weights = torch.ones_like(self.windows, dtype=torch.bool) if weights is None else weights
            weights = weights & ~held_back.unsqueeze(1)
        if weights is None:
            return {}
        ranks = [self._batches(epoch, rank, self.world_size)[number][0] for rank in range(self.world_size)]
        return {
            "weights": weights[index],  # [b, T]
            "counts": weights[index].any(1),  # [b]
            "global_tokens": int(weights[torch.cat(ranks)].sum()),
        }

    def __len__(self) -> int:
        return len(self.batches(0))

    def __iter__(self) -> Iterator[dict[str, Tensor | int]]:
        # A generator: nothing here runs before the first batch is requested. Lightning calls iter()
        # earlier, before it knows its epoch.
        epoch = self.epoch()
        resumed, self._resumed = self._resumed, None
        first = resumed["num_dealt"] if resumed is not None and resumed["epoch"] == epoch else 0
        for number, (index, global_size) in enumerate(self.batches(epoch)):
            if number < first:
                continue
            self._position = {"epoch": epoch, "num_dealt": number + 1}
            yield {
                "index": index,
                "input_ids": self.windows[index],  # [b, T]
                "global_size": global_size,
                **self._weights(epoch, number, index),
                **({} if self.position_ids is None else {"position_ids": self.position_ids[index]}),  # [b, T]
            }

    def state_dict(self) -> dict[str, int]:
        """The epoch and the number of batches yielded in it; the last one counts as done."""
        return dict(self._position)

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Continues after the position of a `state_dict()`; a pass of another epoch starts at its first batch."""
        self._resumed = dict(state_dict)
