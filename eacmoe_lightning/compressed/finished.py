"""The weights of a compressed model as a run holds them: codes from its block files, and the trained parameters."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping

from torch import Tensor
from transformers import PreTrainedModel

from eacmoe_lightning.models.checkpoint import Checkpoint
from eacmoe_lightning.models.head import output_head
from eacmoe_lightning.models.moe import MoEModel
from eacmoe_lightning.models.shrink import KEPT, kept_part
from eacmoe_lightning.quantization.quantizers import QuantizedWeight
from eacmoe_lightning.run.block_file import read_block, read_head, read_stats
from eacmoe_lightning.run.directory import RunDirectory


class FinishedBlocks:
    """The compressed weights of a run that has finished all blocks (a `models.streamed.Weights`).

    Attributes:
        head: the run's quantized output head by parameter name; empty if it is not quantized.

    Args:
        original: gives every weight that is neither quantized nor trained.
        run: the run whose block files hold the codes.
        trained: routers and norms by parameter name; all others are the original's.
        trained_weight: parameter name, and a weight as its block's file holds it -> as it is after training.
        unquantized: the linears that stay as they are, as in `MoEModel.unquantized`.
    """

    def __init__(
        self,
        original: Checkpoint,
        run: RunDirectory,
        trained: Mapping[str, Tensor] | None = None,
        trained_weight: Callable[[str, QuantizedWeight], QuantizedWeight] = lambda name, weight: weight,
        unquantized: dict[str, str] | None = None,
    ) -> None:
        self.unquantized, self.head = unquantized or {}, read_head(run)
        self.original, self.run = original, run
        self.trained, self.trained_weight = trained or {}, trained_weight
        self._moe = MoEModel(original.skeleton())
        self._kept = {
            str(block.index): removed.kept
            for block in self._moe.blocks
            if (removed := read_stats(run, block.index).pruning) is not None
        }
        if self._kept:
            self._moe = MoEModel(self.skeleton())
        self._owners = {name: block for block in self._moe.blocks for name in block.weights()}
        state = self._moe.model.state_dict()
        self._shapes = {name: tensor.shape for name, tensor in state.items()}
        self._dtypes = {name: tensor.dtype for name, tensor in state.items()}
        self._tied: set[str] = set()  # what the original's files may hold besides, and the quantized embedding replaces
        if self.head and (head := output_head(self._moe.model)).weight in self.head and head.is_tied:
            self._tied = {f"{head.module}.weight"}

    def __str__(self) -> str:
        return f"{self.run.path}, with {self.original}"

    def skeleton(self) -> PreTrainedModel:
        model = self.original.skeleton()
        if self._kept:  # MoEModel removes the other experts
            model.config = copy.deepcopy(model.config)
            setattr(model.config.get_text_config(), KEPT, self._kept)
        return model

    def quantized(self, index: int) -> dict[str, QuantizedWeight]:
        """A block's quantized weights by parameter name, with their final scales and codes."""
        return {name: self.trained_weight(name, weight) for name, weight in read_block(self.run, index)[0].items()}

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        names = list(names)
        weights = {n: self.trained[n].detach().to("cpu", self._dtypes[n]) for n in names if n in self.trained}
        for index in sorted({self._owners[n].index for n in names if n in self._owners}):
            block = self._moe.blocks[index]
            for name, quantized in self.quantized(index).items():
                if name in names:
                    weights[name] = block.as_parameter(name, quantized.dequantize(self._dtypes[name])).contiguous()
        weights |= {n: head.dequantize(self._dtypes[n]) for n, head in self.head.items() if n in names}
        unchanged = self.original.read([n for n in names if n not in weights and n not in self._tied])
        blocks = self._moe.moe_blocks
        return weights | {name: kept_part(blocks, name, t, self._shapes[name]) for name, t in unchanged.items()}

    def prefetch(self, names: Iterable[str]) -> None:
        self.original.prefetch([name for name in names if name not in self._owners and name not in self.trained])
