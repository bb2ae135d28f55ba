"""A compressed directory, as tensors of a checkpoint: every export starts from it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from eacmoe_lightning.compressed import float32
from eacmoe_lightning.compressed.directory import untied
from eacmoe_lightning.compressed.format import DRAFT, KQUANTS, LATTICE, REST, SHARD, original_config, read_config
from eacmoe_lightning.compressed.opening import open_compressed
from eacmoe_lightning.exports.linears import WEIGHT, Rows, original_linears, unstacked_linears
from eacmoe_lightning.models.block import Block
from eacmoe_lightning.models.draft import without_draft
from eacmoe_lightning.models.moe import MoEModel
from eacmoe_lightning.models.pruned_config import has_shapes_of
from eacmoe_lightning.models.shrink import KEPT
from eacmoe_lightning.models.transformers_loader import empty_model, original_names
from eacmoe_lightning.quantization.grid import Quantized
from eacmoe_lightning.quantization.kquant import TYPES
from eacmoe_lightning.quantization.packing import quantized_names, take_quantized
from eacmoe_lightning.quantization.quantizers import QuantizedWeight
from eacmoe_lightning.run.files import StoreError, first_of, read_tensors
from eacmoe_lightning.weight_grids import WeightGrid, by_bits

Names = Literal["original", "unstacked"]  # of the linears in a checkpoint, see `target_rules.Target.names`


@dataclass(frozen=True)
class Linear:
    """One quantized linear.

    Attributes:
        name: module name in the checkpoint.
        quantized: codes [O, I].
    """

    name: str
    quantized: Quantized


@dataclass(frozen=True)
class Shard:
    """The tensors of one file of an export.

    Attributes:
        linears: quantized linears.
        dense: all other tensors, under their names in the checkpoint, in the dtypes that the model has in the export's
            dtype.
    """

    linears: list[Linear]
    dense: dict[str, Tensor]


class Source:
    """A compressed directory to export.

    Args:
        path: a run directory or a compressed directory.
        dtype: dtype of the tensors that are not quantized: `auto` (the one the model was calibrated in), `float32`,
            `bfloat16` or `float16`.
        trust_remote_code: whether Python code that came with the original may run.

    Raises:
        FileNotFoundError: there is no compressed model.
        ValueError: a newer version of this package wrote it, or its blocks have different numbers of experts.

    Attributes:
        draft: tensors of the draft layers under the original's names, written unchanged.
        outside_types: llama.cpp's types of the output head and the embedding, if they are in its blocks.
    """

    def __init__(self, path: str | Path, dtype: str = "auto", trust_remote_code: bool = False) -> None:
        self.path = open_compressed(path, dtype, trust_remote_code=trust_remote_code).directory
        self.directory_config = read_config(self.path)
        self.dtype_name = self.directory_config["dtype"] if dtype == "auto" else dtype
        self.dtype: torch.dtype = getattr(torch, self.dtype_name)
        self.config: PreTrainedConfig = original_config(self.directory_config)
        self.config.dtype = self.dtype
        file = self.path / DRAFT
        self.draft: dict[str, Tensor] = read_tensors(file)[0] if file.exists() else {}
        if not self.draft:
            self.config = without_draft(self.config)
        self.skeleton: PreTrainedModel = empty_model(self.config, self.dtype)
        self.moe = MoEModel(self.skeleton)
        if self.moe.is_pruned:
            if not has_shapes_of(self.config, self.moe):
                numbers = [block.num_experts for block in self.moe.moe_blocks]
                raise ValueError(
                    f"{path} (--source) has {min(numbers)} to {max(numbers)} experts in its blocks. No other program "
                    "loads different numbers: prune with --pruning.keep, which keeps the same number in every block"
                )
            delattr(self.config.get_text_config(), KEPT)
        self.weights: dict[str, Tensor] = {  # every quantized weight, [..., O, I] on meta
            name: weight for block in self.moe.blocks for name, (_, weight) in self.quantized(block).items()
        }
        self._stacks: dict[str, Block] = {
            name: block
            for block in self.moe.moe_blocks
            for name, (part, _) in block.weights().items()
            if part == "experts"
        }
        self.outside_types = {name: kind for name, kind in self.in_blocks.items() if name not in self.weights}
        self.decoded: list[str] = []  # quantized weights that are written decoded
        self.parameters: dict[str, Tensor] = untied(self.skeleton)  # on meta, tied ones once

    @property
    def quantization(self) -> dict[str, Any]:
        return self.directory_config["quantization"]

    def quantized(self, block: Block | None) -> dict[str, tuple[str, Tensor]]:
        """Part and weight ([..., O, I] on meta) of each quantized weight in a block, by parameter name."""
        weights = block.weights() if block else {}
        return {name: part_and_weight for name, part_and_weight in weights.items() if name in self.quantization["bits"]}

    @property
    def on_lattice(self) -> list[str]:
        """Weights quantized on a lattice; all others are on the group-wise grid."""
        return self.quantization.get(LATTICE, [])

    @property
    def in_blocks(self) -> dict[str, str]:
        """Weights in llama.cpp's blocks, with their types."""
        return self.quantization.get(KQUANTS, {})

    def decode(self, names: Iterable[str]) -> None:
        """Has these weights written decoded, as if they were not quantized."""
        for name in names:
            self.decoded.append(name)
            del self.weights[name]

    def files(self) -> Iterator[tuple[Block | None, dict[str, Tensor]]]:
        """The tensors of each file: each block with its tensors, then None with all others.

        Raises:
            StoreError: a file or a tensor is missing, or a file is truncated or altered.
        """
        for block in self.moe.blocks:
            path = self.path / SHARD.format(block.index)
            tensors, _ = read_tensors(path)
            names = [f"{name}.{kind}" for name in self.quantized(block) for kind in self._kinds(name)]
            if missing := [name for name in names if name not in tensors]:
                raise StoreError(f"{path} lacks {first_of(missing, 'tensor')}: restore it from a backup")
            yield block, tensors
        yield None, self._rest()

    def _rest(self) -> dict[str, Tensor]:
        """The tensors outside the blocks; an output head on the grid is decoded, which every format can hold."""
        tensors, bits = read_tensors(self.path / REST)[0], self.quantization["bits"]
        for name in quantized_names(tensors) & bits.keys() - self.outside_types.keys():
            weight = self.parameters[name]
            head = take_quantized(tensors, name, bits[name], weight.shape[-1])
            tensors[name] = head.dequantize(weight.dtype)
        return tensors

    def _kinds(self, name: str) -> tuple[str, ...]:
        """The kinds of tensors that a weight needs."""
        if name in self.in_blocks:
            return ("blocks",)
        return ("stream", "scale") if name in self.on_lattice else ("codes", "scale", "zero_point")

    def grids(self) -> list[WeightGrid]:
        """The grid of each quantized weight, one for each width of its experts; zero points show the symmetry."""
        grids = []
        for block, tensors in self.files():
            for name, (part, weight) in self.quantized(block).items():
                bits, group_size = self.quantization["bits"][name], self.quantization["group_sizes"][name]
                if name in self.on_lattice:
                    shape = tuple(weight.shape)
                    grids.append(WeightGrid(name, block.index, part, shape, bits, group_size, False, on_lattice=True))
                    continue
                if name in self.in_blocks:
                    kind = TYPES[self.in_blocks[name]]
                    groups = dict(group_size=kind.group, symmetric=kind.grid.symmetric, kquant=kind.name)
                    grids.append(WeightGrid(name, block.index, part, tuple(weight.shape), bits, **groups))
                    continue
                zero_point = tensors[f"{name}.zero_point"]
                for width, experts in by_bits(bits):
                    shape, zero_points = tuple(weight.shape), zero_point
                    if experts is not None:
                        shape, zero_points = (len(experts), *shape[1:]), zero_point[list(experts)]
                    symmetric = bool((zero_points == 2 ** (width - 1)).all())
                    grids.append(WeightGrid(name, block.index, part, shape, width, group_size, symmetric, experts))
        return grids

    def blocks(self) -> Iterator[tuple[Block | None, dict[str, QuantizedWeight], dict[str, Tensor]]]:
        """Each block, then None: its quantized weights by parameter name, and all its other tensors."""
        for block, tensors in self.files():
            outside = {name: self.parameters[name] for name in self.outside_types}
            weights = {name: weight for name, (_, weight) in self.quantized(block).items()} if block else outside
            bits = self.quantization["bits"]
            quantized = {n: take_quantized(tensors, n, bits[n], w.shape[-1]) for n, w in weights.items()}
            yield block, quantized, tensors

    def narrowed(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Tensors that are not quantized, by name in memory, in the export's dtype where the model keeps no other.

        What the original stores in float32 stays so.
        """
        in_float32 = self.directory_config["original"].get(float32.KEY, ())
        stays = {name for name, tensor in tensors.items() if name in in_float32 or not tensor.is_floating_point()}
        return {n: tensor if n in stays else tensor.to(self.parameters[n].dtype) for n, tensor in tensors.items()}

    def shards(self, names: Names) -> Iterator[Shard]:
        """The model's tensors, one block at a time.

        Raises:
            ValueError: names are the original's, and it keeps the experts of a block in one tensor.
        """
        to_checkpoint = self.original_names if names == "original" else self.unstacked_names
        for _, weights, unquantized in self.blocks():
            for name in weights.keys() & set(self.decoded):
                unquantized[name] = weights.pop(name).dequantize(self.dtype)
            linears = [linear for name, quantized in weights.items() for linear in self.split(name, quantized, names)]
            yield Shard(linears, to_checkpoint(self.narrowed(unquantized)))

    def original_names(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Tensors in memory converted to the names and shapes of the original's checkpoint."""
        return original_names(self.skeleton, tensors)

    def unstacked_names(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Tensors in memory, with weights and biases of stacks of experts split into linears, [O, I] and [O]."""
        split: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            weight, kind = name.removesuffix("_bias"), "bias" if name.endswith("_bias") else "weight"
            if weight not in self._stacks:
                split[name] = tensor
                continue
            if kind == "weight":
                tensor = self._stacks[weight].as_parameter(weight, tensor)
            parts = unstacked_linears(weight, tensor.shape[:2])
            split |= {f"{part.name}.{kind}": part.of(tensor).clone() for part in parts}
        return split

    def stacked_names(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The inverse of `unstacked_names`."""
        tensors = dict(tensors)
        for weight, block in self._stacks.items():
            shape = block.experts.weight(weight.rpartition(".")[2]).shape[:2]
            for kind, name in (("weight", weight), ("bias", f"{weight}_bias")):
                if name in self.parameters:
                    rows = [tensors.pop(f"{part.name}.{kind}") for part in unstacked_linears(weight, shape)]
                    stack = torch.cat(rows).unflatten(0, shape)
                    tensors[name] = block.as_parameter(weight, stack) if kind == "weight" else stack
        return tensors

    def linear_names(self, names: Names) -> dict[str, list[str]]:
        """Module names in the checkpoint of the linears in each quantized weight, by its name in memory."""
        return {name: [part.name for part in self._parts(name, names)] for name in self.weights}

    def ordinary_linears(self) -> list[str]:
        """Module names in memory of a block's linears that are not quantized, or written as if they were not."""
        names = [*self.decoded, *self.quantization.get("unquantized", {})]
        return [name.removesuffix(WEIGHT) for name in names]

    def unquantized_modules(self) -> list[str]:
        """Modules with matrices that are not quantized, under both the original's names and those in memory, sorted."""
        matrices = {n: t for n, t in self.skeleton.state_dict().items() if t.ndim == 2 and n not in self.weights}
        return sorted({name.removesuffix(WEIGHT) for name in (*matrices, *self.original_names(matrices))})

    def split(self, name: str, quantized: Quantized, names: Names) -> list[Linear]:
        """One weight in memory, split into the linears of the checkpoint."""
        tensors = quantized.codes, quantized.scale, quantized.zero_point
        return [
            Linear(
                part.name,
                Quantized(
                    *(part.of(tensor).contiguous() for tensor in tensors),
                    quantized.bits if isinstance(quantized.bits, int) else quantized.bits[part.expert],
                ),
            )
            for part in self._parts(name, names)
        ]

    def _parts(self, name: str, names: Names) -> list[Rows]:
        """Where the linears of a weight in memory lie in it."""
        shape = self.weights[name].shape[:-1]
        if names == "original":
            return original_linears(self.skeleton, name, shape)
        if name in self._stacks:
            return unstacked_linears(name, shape)
        return [Rows(name.removesuffix(WEIGHT), None, slice(None))]
