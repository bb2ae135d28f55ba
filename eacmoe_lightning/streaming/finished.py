"""What a run has made of its original, block by block: the codes of its block files, decoded, and what was trained."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor
from transformers import PreTrainedModel

from eacmoe_lightning.adapter import MoEModel
from eacmoe_lightning.calibration import read_block
from eacmoe_lightning.grid import Quantized
from eacmoe_lightning.store import RunDirectory
from eacmoe_lightning.streaming.checkpoint import Checkpoint


class FinishedBlocks:
    """The weights of a compressed model of which a run holds all blocks (see `streaming.Weights`).

    Args:
        original: everything that is neither quantized nor trained.
        run: its block files hold the codes.
        trained: routers and norms by parameter name; those that are left out stay the original's.
        scales: other scales [..., O, G] than the solver's, by parameter name.
    """

    def __init__(
        self,
        original: Checkpoint,
        run: RunDirectory,
        trained: Mapping[str, Tensor] | None = None,
        scales: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.original, self.run = original, run
        self.trained, self.scales = trained or {}, scales or {}
        self._moe = MoEModel(original.skeleton())
        self._owners = {name: block for block in self._moe.blocks for name in block.weights()}

    def __str__(self) -> str:
        return f"{self.run.path}, with {self.original}"

    def skeleton(self) -> PreTrainedModel:
        return self.original.skeleton()

    def quantized(self, index: int) -> dict[str, Quantized]:
        """A block's codes, final scales and zero points by parameter name."""
        found = read_block(self.run, index)[0]
        for name in found.keys() & self.scales.keys():
            found[name].scale = self.scales[name].detach().cpu().half()
        return found

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        names = list(names)
        found = self.original.read([n for n in names if n not in self._owners and n not in self.trained])
        found |= {n: self.trained[n].detach().to("cpu", self.original.dtype) for n in names if n in self.trained}
        for index in sorted({self._owners[n].index for n in names if n in self._owners}):
            block = self._moe.blocks[index]
            for name, quantized in self.quantized(index).items():
                if name in names:
                    found[name] = block.as_parameter(name, quantized.dequantize(self.original.dtype)).contiguous()
        return found

    def prefetch(self, names: Iterable[str]) -> None:
        self.original.prefetch([name for name in names if name not in self._owners and name not in self.trained])
