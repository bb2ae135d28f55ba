"""The file of a compressed block: its codes, scales and zero points, its router and its statistics."""

from __future__ import annotations

from torch import Tensor

from eacmoe_lightning.quantization.grid import Quantized
from eacmoe_lightning.quantization.packing import take_quantized
from eacmoe_lightning.run.directory import RunDirectory
from eacmoe_lightning.run.files import read_tensors


def read_block(run: RunDirectory, index: int) -> tuple[dict[str, Quantized], dict[str, Tensor], dict]:
    """A written block: quantized weights, other tensors (the router) and statistics, by parameter name."""
    tensors, note = read_tensors(run.block(index))
    quantized = {name: take_quantized(tensors, name, **spec) for name, spec in note["quantized"].items()}
    return quantized, tensors, note["stats"]
