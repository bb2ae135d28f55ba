"""What one disturbed part does to a model's predictions, for many parts in one reading of the model.

A probe is the model with one part of one block quantized, all else being the original; or with experts missing in
every block. Up to its first change its hidden states are the original's; from there on it has hidden states of its own,
which run through the later blocks beside the original's. They lie in files, and one block is in memory at a time. After
the last block the predictions of every probe are compared with the original's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from eacmoe_lightning.evaluation.divergence import compare
from eacmoe_lightning.models.block import Block
from eacmoe_lightning.models.moe import MoEModel
from eacmoe_lightning.models.routing import Routing
from eacmoe_lightning.routers.router_weights import weight_rule
from eacmoe_lightning.run.hidden import HiddenFile, State, StateFile, StateWriter, moved

ORIGINAL = "original"


@contextmanager
def without_experts(block: Block, dropped: Sequence[int]) -> Iterator[None]:
    """The block selects among its other experts, with the weights that its router would give them without these.

    Groups of experts are not looked at.

    Raises:
        ValueError: no known rule gives the router's weights.
    """
    dropped = torch.tensor(dropped, dtype=torch.int64)

    def select(routing: Routing, _: Tensor | None) -> Routing:
        gone = dropped.to(routing.logits.device)
        rule = weight_rule(block.router, routing.logits, routing.weights, routing.ids)
        ids = block.choice(routing.logits).index_fill(1, gone, -torch.inf).topk(routing.ids.shape[1]).indices
        logits = routing.logits.index_fill(1, gone, -torch.inf)
        return Routing(logits, ids, rule(logits, ids))

    handle = block.watch_router(select)
    try:
        yield
    finally:
        handle.remove()


class Probes:
    """The hidden states of the original and of all probes at the input of one block.

    Args:
        moe: the original, streamed.
        windows: [S, T] token ids.
        batch_size: windows per forward pass.
        directory: of the files of hidden states.
        counts: bool [S, T], the tokens that count; None: all of them.
        position_ids: int64 [S, T], as in `MoEModel.call`.

    Attributes:
        names: of the probes that have left their block.
    """

    def __init__(
        self,
        moe: MoEModel,
        windows: Tensor,
        batch_size: int,
        directory: Path,
        counts: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> None:
        self.moe, self.windows, self.directory = moe, windows, directory
        self.counts, self.position_ids = counts, position_ids
        self.slices = [slice(i, i + batch_size) for i in range(0, len(windows), batch_size)]
        self.names: list[str] = []
        self._files: dict[str, StateFile] = {}  # at the input of the current block; empty at block 0
        self._next: dict[str, StateFile] = {}

    def add(self, block: Block, name: str) -> None:
        """Runs a probe through the block as it is now: a new one from the original's states, another from its own."""
        self._next[name] = self._through(block, name, name if name in self._files else ORIGINAL)

    def advance(self, block: Block) -> None:
        """Runs the original and all other probes through the block, which is the original's again.

        Then the probes stand before the next block. Finished files survive a kill; those before the block stay until
        `forget`.
        """
        for name in (ORIGINAL, *self.names):
            if name not in self._next:
                self._next[name] = self._through(block, name, name)
        self._files, self._next = self._next, {}
        self.names = sorted(set(self._files) - {ORIGINAL})

    def forget(self, index: int) -> None:
        """Deletes the states at the input of this block and of earlier ones."""
        for file in self.directory.glob("block_*"):
            if int(file.name[6:9]) <= index:
                file.unlink()

    def read(self, index: int, names: list[str]) -> None:
        """Opens the stored states of these probes at the input of block `index`.

        Raises:
            StoreError: a file is missing or damaged, or holds other windows.
        """
        self.names = sorted(names)
        every = (ORIGINAL, *self.names) if index else ()
        self._files = {name: StateFile.open(self._path(index, name), self._note) for name in every}

    def can_read(self, index: int, names: list[str]) -> bool:
        every = (ORIGINAL, *names) if index else ()
        return all(HiddenFile.is_finished(self._path(index, name)) for name in every)

    @torch.no_grad()
    def divergences(self) -> dict[str, float]:
        """After the last block: the mean KL(original || probe) of each probe's predictions, nats per token."""
        total, tokens = dict.fromkeys(self.names, 0.0), 0
        for row in range(len(self.windows)):
            rows = slice(row, row + 1)
            ids = self.windows[rows].to(self.moe.device)
            counts = torch.ones_like(ids[0, 1:], dtype=torch.bool) if self.counts is None else self.counts[row, 1:]
            base = self._logits(ORIGINAL, rows, ids)[0, :-1]
            tokens += int(counts.sum())
            for name in self.names:
                compared = compare(base, self._logits(name, rows, ids)[0, :-1], ids[0, 1:])
                total[name] += float(compared.kl[counts.cpu()].double().sum())
        return {name: value / max(tokens, 1) for name, value in total.items()}

    def _logits(self, name: str, rows: slice, ids: Tensor) -> Tensor:
        return self.moe.head(moved(self._files[name][rows], self.moe.device), ids)

    @torch.no_grad()
    def _through(self, block: Block, name: str, source: str) -> StateFile:
        writer = StateWriter(self._path(block.index + 1, name), None)
        for rows, state in zip(self.slices, self._states(source), strict=True):
            positions = None if self.position_ids is None else self.position_ids[rows].to(self.moe.device)
            call = self.moe.call(block.index, self.windows[rows].to(self.moe.device), state, positions)
            writer.append(block.forward(call)[0])
        return writer.finish(self._note)

    def _states(self, name: str) -> Iterator[State | None]:
        for rows in self.slices:
            yield moved(self._files[name][rows], self.moe.device) if name in self._files else None

    def _path(self, index: int, name: str) -> Path:
        return self.directory / f"block_{index:03d}.{name}"

    @property
    def _note(self) -> dict:
        return {"windows": list(self.windows.shape)}
