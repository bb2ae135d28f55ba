"""Both hidden streams of this process's windows: their way through the blocks and their files between blocks.

x is the output of the full-precision blocks, x_hat that of the compressed ones, each [S, T, D]. They are stored in
files (`run.hidden`) and moved to the model's device in batches. More is stored in files: the inputs of the current
block's attention output projection, of its router, and of its experts if they differ; and, for the joint stage, the
original router's logits of every block.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from eacmoe_lightning.calibration.overflow import refuse_overflow
from eacmoe_lightning.models.block import Block, Call
from eacmoe_lightning.models.moe import MoEModel
from eacmoe_lightning.models.resumption import Resumption, find_resumption
from eacmoe_lightning.models.routing import Routing
from eacmoe_lightning.run.directory import RunDirectory
from eacmoe_lightning.run.hidden import HiddenFile, HiddenWriter, State, StateFile, StateWriter, hidden_of, moved
from eacmoe_lightning.run.ranks import Ranks

WITH = {"x": "with the original's weights", "x_hat": "with the compressed weights"}


class Streams:
    """x and x_hat at the input of one block.

    Args:
        moe: the model whose blocks the streams run through.
        windows: [S, T] token ids of this process.
        first_window: global index of the first of these windows.
        batch_size: windows per forward pass.
        run: the run directory, which holds the streams' files.
        ranks: this process among those of the run.
        dtype: storage dtype of hidden states; None stores them in theirs, which loses nothing.
        keep_teachers: keep the original router logits of all blocks for the joint stage.
        counts: bool [S, T], the tokens that count in what is measured and solved; None: all of them.
        sources: bool [C, S], the windows of each calibration text; None does not tell them apart.
        position_ids: int64 [S, T], as in `MoEModel.call`.
        is_one: whether x_hat is x, because no block is compressed; then only x advances.
        embedding: the compressed model's embedding, by parameter name, where it is not the original's.
    """

    def __init__(
        self,
        moe: MoEModel,
        windows: Tensor,
        first_window: int,
        batch_size: int,
        run: RunDirectory,
        ranks: Ranks,
        dtype: torch.dtype | None = None,
        keep_teachers: bool = True,
        counts: Tensor | None = None,
        sources: Tensor | None = None,
        position_ids: Tensor | None = None,
        is_one: bool = False,
        embedding: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.moe, self.windows, self.first_window, self.run, self.ranks = moe, windows, first_window, run, ranks
        self.dtype, self.keep_teachers, self.counts, self.sources = dtype, keep_teachers, counts, sources
        self.position_ids, self.names = position_ids, ("x",) if is_one else ("x", "x_hat")
        # by stream: what stands in for the original's weights outside the blocks
        self.weights: dict[str, Mapping[str, Tensor]] = {"x": {}, "x_hat": embedding or {}}
        self.slices = [slice(i, i + batch_size) for i in range(0, len(windows), batch_size)]
        self.x: StateFile
        self.x_hat: StateFile
        self._writers: dict[str, StateWriter] = {}  # by stream: the output of the current block
        self._resumed: tuple[Resumption, HiddenFile] | None = None  # where x_hat goes on inside the current block
        self._teachers: dict[int, HiddenFile] = {}  # by block: the original router's logits [S, T, E]

    def embed(self) -> None:
        """Sets both streams to the input of block 0, the embedded tokens."""
        self.x = self.x_hat = self._embedded("x")
        if self.weights["x_hat"]:
            self.x_hat = self._embedded("x_hat")

    def _embedded(self, name: str) -> StateFile:
        writer = self._new(f"block_000.{name}")
        for rows in self.slices:
            hidden = self.moe.with_weights(self.weights[name], partial(self.moe.embed, *self._batch(rows)))
            refuse_overflow("the embedding's output", hidden, self.dtype)
            writer.append(hidden)
        return writer.written()

    # --- through a block ----------------------------------------------------------------------------

    def advance(self, block: Block, name: str) -> Routing | None:
        """Runs stream `x` or `x_hat` through the block with its current weights.

        The block's input is kept until `step`.

        Returns:
            The router's output for all tokens; None for a dense block.

        Raises:
            ValueError: the block's output is not finite.
        """
        writer, routings = self._new(f"block_{block.index + 1:03d}.{name}"), []
        for rows in self.slices:
            output, routing = block.forward(self._call(block, name, rows))
            where = f"{block.name} (block {block.index}): its output {WITH[name]}"
            refuse_overflow(where, hidden_of(output), self.dtype)
            writer.append(output)
            routings.append(routing)
        self._writers[name] = writer
        return concatenate(routings) if block.is_moe else None

    def step(self, index: int, keep: bool = True) -> None:
        """Makes the advanced streams the current ones, at the input of block `index`.

        With `keep` they are finished files that survive a kill. The files of the previous block are kept as well,
        because the last checkpoint may need them; older ones are deleted.
        """
        old = {self.x.path: self.x, self.x_hat.path: self.x_hat}.values()
        written = [self._writers.pop(name) for name in self.names]
        files = [writer.finish(self._note) if keep else writer.written() for writer in written]
        self.x, self.x_hat = files[0], files[-1]
        for file in old:
            if file.path.name.startswith("."):  # a partial file, never finished
                file.delete()
        if keep:
            self.ranks.barrier()
            for file in self._directory.glob("block_*"):
                if int(file.name[6:9]) < index - 1:
                    file.unlink()

    def to_device(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.moe.device)

    def inputs_of(self, block: Block, module: nn.Module, beside_experts: bool = False) -> Iterator[Tensor]:
        """The inputs of one of the block's modules in the compressed stream, in pieces [n, I].

        With `beside_experts` the routed experts are skipped if the module's input does not depend on their output, as
        that of shared experts does not.
        """
        for rows in self.slices:
            call = self._call(block, "x_hat", rows)
            if rows == self.slices[0]:
                leave_out = beside_experts and block.is_moe and not block.depends_on_experts(module, call)
            with block.without_experts() if leave_out else nullcontext():
                x = block.input_of(module, call)
            yield x

    def keep_attention(self, block: Block, name: str, inputs: Iterator[Tensor]) -> Iterator[Tensor]:
        """Passes on the inputs [n, I] of a linear; if attention ends in it, they are also written to a file.

        Passes of the compressed stream through this block then start there, until `forget_attention`.
        """
        if self._resumed or not (at := find_resumption(block, name, self._call(block, "x_hat", slice(0, 1)))):
            yield from inputs
            return
        writer = None
        for rows, x in zip(self.slices, inputs, strict=True):
            writer = writer or HiddenWriter(self._directory / "attention", x.dtype)
            writer.append(x.view(len(self.windows[rows]), -1, x.shape[-1]))
            yield x
        self._resumed = at, writer.written()

    def forget_attention(self) -> None:
        """Makes all passes whole again, because the weights of attention change or the block is finished."""
        if self._resumed is not None:
            self._resumed[1].delete()
        self._resumed = None

    def counted(self, x: Tensor, rows: slice = slice(None)) -> Tensor:
        """Of values [n, ...] for the tokens of the windows `rows`, one or several for each token, those that count.

        Values that are not of single tokens all count.
        """
        if self.counts is None:
            return x
        mask = self.counts[rows].flatten()
        repeats, rest = divmod(len(x), len(mask))
        return x[mask.repeat_interleave(repeats).to(x.device)] if repeats and not rest else x

    def keep_router_input(self, block: Block) -> HiddenFile:
        """Writes what the router reads in the compressed stream [S, T, R] to a file, which the caller deletes."""
        return self._keep("router_input", (block.router_input(call) for call in self.calls(block)))

    def keep_expert_input(self, block: Block) -> HiddenFile:
        """Writes what the experts read in the compressed stream to a file, which the caller deletes.

        It is [S, T, D], or [S, T * K, D] in a model whose experts get a row for each pair of a token and an expert.
        """
        experts = block.experts.module
        return self._keep("expert_input", (block.input_of(experts, call) for call in self.calls(block)))

    def _keep(self, name: str, pieces: Iterator[Tensor]) -> HiddenFile:
        writer = HiddenWriter(self._directory / name, self.dtype or self.moe.model.dtype)
        for rows, piece in zip(self.slices, pieces, strict=True):
            writer.append(piece.view(len(self.windows[rows]), -1, piece.shape[-1]))
        return writer.written(self.moe.model.dtype)  # in which routers and experts read it, whatever is stored

    def first_call(self, block: Block) -> Call:
        """The block's call for the first batch of the compressed stream."""
        return self._call(block, "x_hat", self.slices[0])

    def calls(self, block: Block) -> Iterator[Call]:
        """The block's calls for all batches of the compressed stream."""
        for rows in self.slices:
            yield self._call(block, "x_hat", rows)

    def _call(self, block: Block, name: str, rows: slice | Tensor) -> Call:
        ids, positions = self._batch(rows)
        state = moved(getattr(self, name)[rows], self.moe.device)
        call = partial(self.moe.call, block.index, ids, state, positions)
        call = self.moe.with_weights(self.weights[name], call)
        resumes = self._resumed is not None and name == "x_hat" and isinstance(rows, slice)
        return replace(call, within=partial(self._after_attention, rows)) if resumes else call

    def _after_attention(self, rows: slice) -> AbstractContextManager[None]:
        resumption, inputs = self._resumed
        return resumption.start(self.to_device(inputs[rows]))

    def _batch(self, rows: slice) -> tuple[Tensor, Tensor | None]:
        """Token ids [B, T] of these windows, and their positions if they hold several documents."""
        positions = None if self.position_ids is None else self.to_device(self.position_ids[rows])
        return self.to_device(self.windows[rows]), positions

    # --- by window, for training -----------------------------------------------------------------------

    def local(self, window_ids: Tensor) -> Tensor:
        """Turns global window indices [b] into indices of this process's windows, in host memory."""
        return window_ids.cpu() - self.first_window

    def block_rows(self, block: Block, local: Tensor) -> tuple[Call, Tensor]:
        """The block's call on x_hat, and its original's output on x [b, T, D], for windows of this process [b]."""
        call = self._call(block, "x_hat", local)
        return call, self.to_device(hidden_of(self._writers["x"].written()[local]))

    def added_square(self) -> float:
        """Mean square over all processes of what the advanced block adds to x: its output there minus its input."""
        total, output = torch.zeros(2, dtype=torch.float64), self._writers["x"].written()
        for rows in self.slices:
            added = hidden_of(output[rows]).float() - hidden_of(self.x[rows]).float()
            added = self.counted(added.flatten(0, 1), rows)
            total += torch.tensor([added.square().sum(dtype=torch.float64).item(), added.numel()], dtype=torch.float64)
        square, number = self.ranks.sum(total).tolist()
        return max(square / max(number, 1), torch.finfo(torch.float32).tiny)

    def last_rows(self, window_ids: Tensor) -> State:
        """What the original's last block hands over for the windows with these global indices [b].

        Only after the last block. In host memory.
        """
        return self.x[self.local(window_ids)]

    def teacher_rows(self, block: Block, window_ids: Tensor) -> Tensor:
        """The original router's logits [b*T, E] of a block, for the experts that it still has; as `last_rows`."""
        if block.index not in self._teachers:
            self._teachers[block.index] = HiddenFile.open(self._teacher_path(block.index), self._note)
        return self._teachers[block.index][self.local(window_ids)].flatten(0, 1).float()[:, block.kept]

    # --- files ------------------------------------------------------------------------------------------

    @property
    def _directory(self) -> Path:
        return self.run.streams(self.ranks.rank, self.ranks.world)

    def _new(self, name: str) -> StateWriter:
        return StateWriter(self._directory / name, self.dtype)

    def _paths(self, index: int) -> list[Path]:
        return [self._directory / f"block_{index:03d}.{name}" for name in self.names]

    def _teacher_path(self, index: int) -> Path:
        """The file of the original router's logits of one block, for the joint stage."""
        return self._directory / f"teacher_{index:03d}"

    @property
    def _note(self) -> dict:
        return {"windows": [self.first_window, len(self.windows)]}

    def write_teacher(self, index: int, logits: Tensor) -> None:
        """Writes the original router's logits [N, E] for the joint stage, if there is one."""
        if self.keep_teachers:
            writer = HiddenWriter(self._teacher_path(index), torch.float16)
            writer.append(logits.view(*self.windows.shape, -1))
            writer.finish(self._note)

    def can_read(self, index: int) -> bool:
        """Whether every process has stored its streams for block `index` and all earlier blocks' teacher logits."""
        files = self._paths(index)
        if self.keep_teachers:
            files += [self._teacher_path(block.index) for block in self.moe.moe_blocks if block.index < index]
        is_complete = all(HiddenFile.is_finished(path) for path in files)
        return int(self.ranks.sum(torch.tensor(int(is_complete)))) == self.ranks.world

    def read(self, index: int) -> None:
        """Opens the stored streams at the input of block `index`.

        Raises:
            StoreError: a file is damaged or holds other windows.
        """
        files = [StateFile.open(path, self._note) for path in self._paths(index)]
        self.x, self.x_hat = files[0], files[-1]


def concatenate(routings: list[Routing]) -> Routing:
    """Joins the routings of several batches into one, in host memory."""
    return Routing(*(torch.cat([getattr(r, f).cpu() for r in routings]) for f in ("logits", "ids", "weights")))
