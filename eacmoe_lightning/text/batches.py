"""The data module: which windows are calibrated on, which are held out, and who gets them when.

Two orders of the same kind of batch. *Calibration* runs in shuffled global batches, epoch after
epoch, and must go on after a checkpoint with exactly the next batch. *Held-out* text runs once, in
order.

With several processes each window has one owner: rank r of R owns the contiguous shard
`[r*S//R, (r+1)*S//R)`, so that the hidden states of a window can stay where they are computed. The
global batch does not depend on R: every rank is given those of its members that it owns (perhaps
none) and the size of the whole, so that summing `local_sum / global_size` over ranks is the mean
that one process would have computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor


def shard(num: int, rank: int, world_size: int) -> range:
    """The windows that a rank owns, of `num`: contiguous, disjoint over ranks, and all together."""
    return range(rank * num // world_size, (rank + 1) * num // world_size)


def calibration_batches(num: int, batch_size: int, seed: int, rank: int, world_size: int) -> list[tuple[Tensor, int]]:
    """One epoch: a rank's members [b] (b may be 0) of each global batch, and that batch's size.

    The `num` windows are shuffled with `seed`; a global batch is `batch_size` of them, the last one
    may be smaller.
    """
    order = torch.randperm(num, generator=torch.Generator().manual_seed(seed))
    own = shard(num, rank, world_size)
    return [(batch[(batch >= own.start) & (batch < own.stop)], len(batch)) for batch in order.split(batch_size)]


def heldout_batches(num: int, batch_size: int, rank: int, world_size: int) -> list[tuple[Tensor, int]]:
    """A rank's windows in order, `batch_size` at a time, and how many all ranks see in that step.

    Every rank gets the same number of batches, so that none waits for another forever: the ranks
    with fewer windows are given empty batches at the end.
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


class WindowLoader:
    """Deals out windows as batches, from memory; Lightning can stop it and go on anywhere.

    Yields dicts: `index` int64 [b], the windows' numbers in `windows`; `input_ids` int64 [b, T];
    `global_size` int, the number of windows of this batch over all ranks. b may be 0 where there
    are several ranks.

    Lightning keeps `state_dict()` in its checkpoints (`loops.fit_loop.combined_loader`), and asks
    for `load_state_dict()` before the first batch after a restart. The length is always that of the
    whole epoch, because Lightning counts the batches before the restart itself.

    Args:
        windows: [S, T] token ids, the same on every rank.
        batch_size: windows per global batch if shuffled, per rank and batch if not.
        shuffle: deal out `calibration_batches`, else `heldout_batches`.
        seed: epoch e is shuffled with seed + e, with a generator of its own.
        rank, world_size: whose batches.
        epoch: asked at the start of every pass for the number of the epoch.
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
    ):
        self.windows = windows
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.epoch = epoch
        self._position = {"epoch": 0, "num_dealt": 0}  # of the pass under way
        self._resumed: dict[str, int] | None = None  # a position loaded and not yet gone on from

    def batches(self, epoch: int) -> list[tuple[Tensor, int]]:
        """This rank's window numbers [b] and the global size, for each batch of an epoch."""
        num = len(self.windows)
        if not self.shuffle:
            return heldout_batches(num, self.batch_size, self.rank, self.world_size)
        seed = self.seed + epoch
        return calibration_batches(num, self.batch_size, seed, self.rank, self.world_size)

    def __len__(self) -> int:
        return len(self.batches(0))

    def __iter__(self) -> Iterator[dict[str, Tensor | int]]:
        # A generator: nothing here runs before the first batch is asked for, by when Lightning,
        # which calls iter() earlier, knows its epoch.
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
            }

    def state_dict(self) -> dict[str, int]:
        """Epoch and number of batches dealt out in it; the one last yielded counts as done."""
        return dict(self._position)

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Goes on after a `state_dict()`; a pass of any other epoch starts at its first batch."""
        self._resumed = dict(state_dict)
