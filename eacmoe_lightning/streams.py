"""Both hidden streams of this process's windows, and where they rest between blocks.

x is what full precision produces, x_hat what the compressed prefix produces, each [S, T, D] in float32 in host memory;
batches of them visit the model's device. The original router's logits are kept beside them: the joint stage needs those
of every block again.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from eacmoe_lightning.adapter import Block, MoEModel, Routing
from eacmoe_lightning.ranks import Ranks
from eacmoe_lightning.store import RunDirectory, StoreError, read_tensors, write_tensors


class Streams:
    """x and x_hat before one block.

    Args:
        moe: the model whose blocks they run through.
        windows: [S, T] token ids of this process.
        first_window: global index of the first of them.
        batch_size: windows per forward pass.
        run, ranks: where the streams are kept, and whose they are.
    """

    def __init__(
        self, moe: MoEModel, windows: Tensor, first_window: int, batch_size: int, run: RunDirectory, ranks: Ranks
    ) -> None:
        self.moe, self.windows, self.first_window, self.run, self.ranks = moe, windows, first_window, run, ranks
        self.slices = [slice(i, i + batch_size) for i in range(0, len(windows), batch_size)]
        self.x = self.x_hat = torch.empty(0)
        self._kwargs: dict[int, list[dict]] = {}  # by batch size: each block's keyword arguments
        self._teachers: dict[int, Tensor] = {}  # by block: the original router's logits [S, T, E]

    def embed(self) -> None:
        """Both streams before block 0."""
        hidden = []
        for rows in self.slices:
            h, kwargs = self.moe.embed(self.windows[rows].to(self.moe.device))
            self._kwargs.setdefault(len(h), kwargs)
            hidden.append(h)
        self.x = self.x_hat = torch.cat(hidden).float().cpu()

    # --- through a block ----------------------------------------------------------------------------

    def forward(self, block: Block, stream: Tensor) -> tuple[Tensor, Routing | None]:
        """[S, T, D] through the block as it now is, and what its router said of all tokens."""
        outputs, routings = [], []
        for rows in self.slices:
            output, routing = block.forward(self._batch(stream, rows), self._kwargs_of(block, rows))
            outputs.append(output.to(stream.device, stream.dtype))
            routings.append(routing)
        return torch.cat(outputs), concatenate(routings) if block.is_moe else None

    def to_device(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.moe.device)

    def inputs_of(self, block: Block, module: nn.Module) -> Iterator[Tensor]:
        """What reaches a module of the block in the compressed stream: pieces [n, I]."""
        for rows in self.slices:
            yield block.input_of(module, self._batch(self.x_hat, rows), self._kwargs_of(block, rows))

    def input_groups(self, block: Block) -> list[list[str]]:
        first = self.slices[0]
        return block.input_groups(self._batch(self.x_hat, first), self._kwargs_of(block, first))

    def _kwargs_of(self, block: Block, rows: slice) -> dict:
        return self._kwargs[len(self.windows[rows])][block.index]

    def _batch(self, stream: Tensor, rows: slice) -> Tensor:
        return stream[rows].to(self.moe.device, self.moe.model.dtype)

    # --- by window, for training -----------------------------------------------------------------------

    def local(self, window_ids: Tensor) -> Tensor:
        """Global window indices [b] as indices into this process's windows, in host memory."""
        return window_ids.cpu() - self.first_window

    def joint_rows(self, window_ids: Tensor) -> tuple[Tensor, dict[int, Tensor]]:
        """Of some windows by global index [b]: the original's last hidden state [b, T, D], and by MoE block the
        original router's logits [b*T, E]. Only behind the last block."""
        for block in self.moe.moe_blocks if not self._teachers else ():
            tensors, _ = read_tensors(self._teacher_file(block.index))
            self._teachers[block.index] = tensors["logits"].view(*self.x.shape[:2], -1)
        local = self.local(window_ids)
        return self.x[local], {i: logits[local].flatten(0, 1).float() for i, logits in self._teachers.items()}

    # --- files ------------------------------------------------------------------------------------------

    def _file(self, index: int):
        return self.run.streams(index, self.ranks.rank, self.ranks.world)

    def _teacher_file(self, index: int):
        return self.run.teacher(index, self.ranks.rank, self.ranks.world)

    @property
    def _note(self) -> dict:
        return {"windows": [self.first_window, len(self.windows)]}

    def write(self, index: int) -> None:
        """Keeps the streams before block `index`; those of the block before stay, a checkpoint may lie there."""
        path = self._file(index)
        write_tensors(path, {"x": self.x, "x_hat": self.x_hat}, self._note)
        self.ranks.barrier()
        for old in path.parent.glob("block_*.safetensors"):
            if int(old.stem.rpartition("_")[2]) < index - 1:
                old.unlink()

    def write_teacher(self, index: int, logits: Tensor) -> None:
        write_tensors(self._teacher_file(index), {"logits": logits.half()}, self._note)

    def can_read(self, index: int) -> bool:
        """Whether every process has its streams before block `index`, and the teacher's logits up to there."""
        files = [self._teacher_file(block.index) for block in self.moe.moe_blocks if block.index < index]
        found = all(path.exists() for path in (self._file(index), *files))
        return int(self.ranks.sum(torch.tensor(int(found)))) == self.ranks.world

    def read(self, index: int) -> None:
        tensors, note = read_tensors(self._file(index))
        if note != self._note:
            raise StoreError(
                f"{self._file(index)} holds the streams of other windows; delete it and continue with --ckpt_path last"
            )
        self.x, self.x_hat = tensors["x"], tensors["x_hat"]


def concatenate(routings: list[Routing]) -> Routing:
    """One `Routing` of many, in host memory."""
    return Routing(*(torch.cat([getattr(r, f).cpu() for r in routings]) for f in ("logits", "ids", "weights")))
