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

from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path

import lightning as L
import torch
from torch import Tensor
from transformers import AutoTokenizer

from eacmoe_lightning.text import heldout_names, read_documents, token_windows


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


class TextWindows(L.LightningDataModule):
    """Calibration and held-out text as windows of tokens.

    A text is named by a source: `bundled:NAME`, a local file or directory, or a data set such as
    `wikitext/wikitext-2-raw-v1:train` (eacmoe_lightning/text.py has the grammar).

    Args:
        calibration: source of the text that is calibrated on.
        heldout: sources of the texts that are evaluated on: one, a list, or {name: source}; None
            takes every held-out text of the package.
        predict: source of the text to predict on; None takes the held-out texts.
        num_windows: calibration windows, drawn at random (the EAC-MoE paper takes 128).
        window_length: tokens per window (2048 in the paper).
        batch_size: calibration windows per step, over all processes.
        num_heldout_windows: windows per held-out text, from its start; None takes all.
        heldout_batch_size: held-out windows per step and process.
        tokenizer: name or path of the tokenizer; `bundled` is the package's own model.
        seed: of the choice of windows and of their order.

    Raises:
        ValueError, FileNotFoundError: on setup, naming the option: see `read_documents` and
            `token_windows`.
    """

    def __init__(
        self,
        calibration: str = "bundled:calibration",
        heldout: dict[str, str] | list[str] | str | None = None,
        predict: str | None = None,
        num_windows: int = 128,
        window_length: int = 2048,
        batch_size: int = 4,
        num_heldout_windows: int | None = None,
        heldout_batch_size: int = 8,
        tokenizer: str = "bundled",
        seed: int = 0,
    ):
        super().__init__()
        for option, value in (
            ("batch_size", batch_size),
            ("heldout_batch_size", heldout_batch_size),
        ):
            if value < 1:
                raise ValueError(f"--data.{option}={value} must be at least 1")
        self.calibration = calibration
        self.heldout = name_sources(heldout)
        self.predict = predict
        self.num_windows = num_windows
        self.window_length = window_length
        self.batch_size = batch_size
        self.num_heldout_windows = num_heldout_windows
        self.heldout_batch_size = heldout_batch_size
        self.tokenizer = tokenizer
        self.seed = seed

    @property
    def heldout_names(self) -> list[str]:
        """Names of the held-out texts, in the order of their loaders."""
        return list(self.heldout)

    @cached_property
    def calibration_windows(self) -> Tensor:
        """Token ids [S, T] of the calibration text, the same on every rank."""
        return self._windows("calibration", self.calibration, "num_windows", self.num_windows, self.seed)

    @cached_property
    def heldout_windows(self) -> dict[str, Tensor]:
        """Token ids [S_i, T] of each held-out text, from its start."""
        limit = self.num_heldout_windows
        return {
            name: self._windows("heldout", source, "num_heldout_windows", limit)
            for name, source in self.heldout.items()
        }

    @cached_property
    def predict_windows(self) -> Tensor:
        """Token ids [S, T] of the text to predict on, where `predict` names one."""
        return self._windows("predict", self.predict, "num_heldout_windows", None)

    def setup(self, stage: str) -> None:
        """Reads what the stage needs, so that a bad source is reported before any work."""
        if stage == "fit":
            _ = self.calibration_windows
        if stage == "predict" and self.predict is not None:
            _ = self.predict_windows
        else:
            _ = self.heldout_windows

    def train_dataloader(self) -> WindowLoader:
        return WindowLoader(
            self.calibration_windows,
            self.batch_size,
            shuffle=True,
            seed=self.seed,
            epoch=lambda: self.trainer.current_epoch if self.trainer else 0,
            **self._ranks(),
        )

    def val_dataloader(self) -> list[WindowLoader]:
        return [self._in_order(windows) for windows in self.heldout_windows.values()]

    def test_dataloader(self) -> list[WindowLoader]:
        return self.val_dataloader()

    def predict_dataloader(self) -> list[WindowLoader]:
        if self.predict is None:
            return self.val_dataloader()
        return [self._in_order(self.predict_windows)]

    def _in_order(self, windows: Tensor) -> WindowLoader:
        return WindowLoader(windows, self.heldout_batch_size, shuffle=False, **self._ranks())

    def _ranks(self) -> dict[str, int]:
        if self.trainer is None:
            return {"rank": 0, "world_size": 1}
        return {"rank": self.trainer.global_rank, "world_size": self.trainer.world_size}

    @cached_property
    def _tokenizer(self):
        from eacmoe_lightning.originals import resolve_model

        try:
            return AutoTokenizer.from_pretrained(resolve_model(self.tokenizer))
        except (OSError, ValueError) as error:
            raise FileNotFoundError(
                f"no tokenizer can be loaded from {self.tokenizer!r} (--data.tokenizer, by default "
                f"--model.name_or_path): pass `bundled` or a directory that holds one. {error}"
            ) from error

    def _windows(self, option: str, source: str, number: str, num: int | None, seed: int | None = None) -> Tensor:
        """Windows [S, T] of one source, with the option that named it in any error."""
        tokenizer = self._tokenizer
        try:
            return token_windows(
                read_documents(source),
                tokenizer,
                num,
                self.window_length,
                seed,
                source=source,
                option=f"--data.{number}",
            )
        except FileNotFoundError as error:
            raise FileNotFoundError(f"--data.{option}: {error}") from error
        except ValueError as error:
            raise ValueError(f"--data.{option}: {error}") from error


def name_sources(sources: dict[str, str] | list[str] | str | None, option: str = "--data.heldout") -> dict[str, str]:
    """Names for held-out sources: `prose` for bundled:prose, the stem of a file, else the source.

    Raises:
        ValueError: two sources get the same name.
    """
    if sources is None:
        sources = [f"bundled:{name}" for name in heldout_names()]
    if isinstance(sources, dict):
        return dict(sources)
    if isinstance(sources, str):
        sources = [sources]
    named: dict[str, str] = {}
    for source in sources:
        bundled = source.startswith("bundled:")
        name = source.removeprefix("bundled:") if bundled else Path(source).stem
        if name in named:
            raise ValueError(
                f"{option}: {named[name]} and {source} would both be called {name!r}; pass "
                "{name: source} instead of a list"
            )
        named[name] = source
    return named
