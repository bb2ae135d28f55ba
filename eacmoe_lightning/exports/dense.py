"""Decoded weights under the original's names: as large as the original, and loadable wherever the original is."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from eacmoe_lightning.exports.check import Difference, Reference
from eacmoe_lightning.exports.checkpoint import check_draft, write_checkpoint
from eacmoe_lightning.exports.source import Source
from eacmoe_lightning.target_rules import Target
from eacmoe_lightning.weight_grids import WeightGrid


def write(source: Source, weights: list[WeightGrid], row: Target, directory: Path) -> None:
    """Fills the directory with shards and config."""
    write_checkpoint(source, directory, _shards(source))


def read_back(source: Source, row: Target, directory: Path) -> Difference:
    """Reloads the export with transformers in a fresh process."""
    check_draft(source, directory)
    return Reference(source).compare_loaded(directory)


def _shards(source: Source) -> Iterator[dict[str, Tensor]]:
    for block, quantized, unquantized in source.blocks():
        decoded = {name: q.dequantize(source.parameters[name].dtype) for name, q in quantized.items()}
        if block is not None:
            decoded = {name: block.as_parameter(name, weight) for name, weight in decoded.items()}
        yield source.original_names(decoded | source.narrowed(unquantized))
