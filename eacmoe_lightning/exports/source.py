"""A compressed directory under the names of the original's checkpoint: what every export starts from.

In memory transformers 5 stacks a block's experts (`model.layers.0.mlp.experts.gate_up_proj` [E, 2F, D]); on the hub
each expert has linears of its own (`model.layers.0.block_sparse_moe.experts.3.w1.weight`). transformers knows the way
back, as `save_pretrained` takes it. It is walked here with codes, scales and zero points in the place of the weights.

Engines that build transformers' modules and take the stacks apart again (GPTQModel) look for a third kind of names,
`model.layers.0.mlp.experts.3.gate_proj.weight`; those are called unstacked here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from eacmoe_lightning import compressed
from eacmoe_lightning.adapter import Block, MoEModel
from eacmoe_lightning.grid import Quantized, take_quantized
from eacmoe_lightning.models.transformers_loader import original_names
from eacmoe_lightning.pruning.surgery import KEPT, has_shapes_of
from eacmoe_lightning.store import StoreError, read_tensors
from eacmoe_lightning.targets import WeightGrid, by_bits

WEIGHT = ".weight"


@dataclass(frozen=True)
class Linear:
    """One quantized linear.

    Attributes:
        original: its module name in the original's checkpoint.
        unstacked: its module name in transformers' module tree, as if experts were not stacked.
        parameter: name of the parameter in memory that it is a part of.
        quantized: codes [O, I].
    """

    original: str
    unstacked: str
    parameter: str
    quantized: Quantized


@dataclass(frozen=True)
class Shard:
    """Some of a model's tensors.

    Attributes:
        linears: that are quantized.
        dense: everything else in the export's dtype, under the names in memory.
    """

    linears: list[Linear]
    dense: dict[str, Tensor]


class Source:
    """A compressed directory to be exported.

    Args:
        path: a run directory or a compressed directory.
        dtype: of what is not quantized: `auto` (in which it was calibrated), `float32`, `bfloat16` or `float16`.

    Raises:
        FileNotFoundError: there is no compressed model.
        ValueError: a newer version of this package wrote it, or its blocks have different numbers of experts.
    """

    def __init__(self, path: str | Path, dtype: str = "auto") -> None:
        path = Path(path)
        if (path / "run.json").exists() and not compressed.is_compressed(path / "compressed"):
            raise FileNotFoundError(
                f"the run in {path} (--source) has no compressed model yet: finish it with `fit --ckpt_path last`"
            )
        self.path = path / "compressed" if compressed.is_compressed(path / "compressed") else path
        if not compressed.is_compressed(self.path):
            raise FileNotFoundError(
                f"{path} (--source) is neither a run directory nor a compressed directory of eacmoe-lightning"
            )
        self.directory_config = compressed.read_config(self.path)
        self.dtype_name = self.directory_config["dtype"] if dtype == "auto" else dtype
        self.dtype: torch.dtype = getattr(torch, self.dtype_name)
        original = dict(self.directory_config["original"]["config"])
        self.config: PreTrainedConfig = AutoConfig.for_model(original.pop("model_type"), **original)
        self.config.dtype = self.dtype
        with torch.device("meta"):
            self.skeleton: PreTrainedModel = AutoModelForCausalLM.from_config(self.config)
        self.moe = MoEModel(self.skeleton)
        if self.moe.is_pruned:
            if not has_shapes_of(self.config, self.moe):
                numbers = [block.num_experts for block in self.moe.moe_blocks]
                raise ValueError(
                    f"{path} (--source) has {min(numbers)} to {max(numbers)} experts in its blocks. No other program "
                    "loads a number that varies: prune with --pruning.keep, the same number in every block"
                )
            delattr(self.config.get_text_config(), KEPT)
        self.weights: dict[str, Tensor] = {  # [..., O, I] on meta, of everything quantized
            name: weight for block in self.moe.blocks for name, (_, weight) in self.quantized(block).items()
        }
        self.parameters: dict[str, Tensor] = compressed.untied(self.skeleton)  # on meta, each once

    @property
    def quantization(self) -> dict[str, Any]:
        return self.directory_config["quantization"]

    def quantized(self, block: Block | None) -> dict[str, tuple[str, Tensor]]:
        """The part and the weight [..., O, I] on meta of everything quantized in a block, by parameter name."""
        weights = block.weights() if block else {}
        return {name: found for name, found in weights.items() if name in self.quantization["bits"]}

    def files(self) -> Iterator[tuple[Block | None, dict[str, Tensor]]]:
        """Every file's tensors: of each block, then the rest (None).

        Raises:
            StoreError: a file or a tensor is missing, or truncated or altered.
        """
        for block in self.moe.blocks:
            path = self.path / compressed.SHARD.format(block.index)
            tensors, _ = read_tensors(path)
            names = [f"{n}.{kind}" for n in self.quantized(block) for kind in ("codes", "scale", "zero_point")]
            if missing := [name for name in names if name not in tensors]:
                raise StoreError(f"{path} lacks {missing[0]} and {len(missing) - 1} more: restore it from a backup")
            yield block, tensors
        yield None, read_tensors(self.path / compressed.REST)[0]

    def grids(self) -> list[WeightGrid]:
        """How each quantized weight is stored, its symmetry as its zero points have it; experts by their bits."""
        found = []
        for block, tensors in self.files():
            for name, (part, weight) in self.quantized(block).items():
                bits, zero_point = self.quantization["bits"][name], tensors[f"{name}.zero_point"]
                group_size = self.quantization["group_sizes"][name]
                for width, experts in by_bits(bits):
                    shape, own = tuple(weight.shape), zero_point
                    if experts is not None:
                        shape, own = (len(experts), *shape[1:]), zero_point[list(experts)]
                    symmetric = bool((own == 2 ** (width - 1)).all())
                    found.append(WeightGrid(name, block.index, part, shape, width, group_size, symmetric, experts))
        return found

    def blocks(self) -> Iterator[tuple[Block | None, dict[str, Quantized], dict[str, Tensor]]]:
        """Of each block, then of the rest (None): quantized weights by parameter name, and all other tensors."""
        for block, tensors in self.files():
            weights, bits = self.quantized(block), self.quantization["bits"]
            quantized = {n: take_quantized(tensors, n, bits[n], w.shape[-1]) for n, (_, w) in weights.items()}
            yield block, quantized, tensors

    def narrowed(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Tensors that are not quantized, in the export's dtype."""
        return {n: t.to(self.dtype) if t.is_floating_point() else t for n, t in tensors.items()}

    def shards(self) -> Iterator[Shard]:
        """The model's tensors, a block at a time.

        Raises:
            ValueError: the original keeps the experts of a block in one tensor, so that they have no names.
        """
        for _, weights, rest in self.blocks():
            linears = [linear for name, quantized in weights.items() for linear in self.split(name, quantized)]
            yield Shard(linears, self.narrowed(rest))

    def original_names(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Tensors in memory as the original's checkpoint has them."""
        return original_names(self.skeleton, tensors)

    def linear_names(self, kind: str) -> dict[str, list[str]]:
        """Module names of the linears that each quantized weight in memory is made of; `kind` as in `Target.names`."""
        return {
            name: [unstacked if kind == "unstacked" else original for original, unstacked, _ in self._linears(name)]
            for name in self.weights
        }

    def unquantized_modules(self) -> list[str]:
        """Modules with matrices that are not quantized, under the original's names and those in memory, sorted."""
        own = {n: t for n, t in self.skeleton.state_dict().items() if t.ndim == 2 and n not in self.weights}
        return sorted({name.removesuffix(WEIGHT) for name in (*own, *self.original_names(own))})

    def split(self, name: str, quantized: Quantized) -> list[Linear]:
        """One weight in memory as the original's linears."""
        tensors = quantized.codes, quantized.scale, quantized.zero_point
        parts = [self.original_names({name: tensor}) for tensor in tensors]
        return [
            Linear(
                original,
                unstacked,
                name,
                Quantized(
                    *(part[original + WEIGHT].contiguous() for part in parts),
                    quantized.bits if isinstance(quantized.bits, int) else quantized.bits[expert],
                ),
            )
            for original, unstacked, expert in self._linears(name)
        ]

    def _linears(self, name: str) -> list[tuple[str, str, int | None]]:
        """Original and unstacked module name, and the expert, of each linear that a weight in memory is made of."""
        shape = self.weights[name].shape[:-1]
        rows = torch.arange(shape.numel()).view(*shape, 1)  # walks the way back to tell which of them ends up where
        found = []
        for original, taken in self.original_names({name: rows}).items():
            if taken.ndim != 2 or not original.endswith(WEIGHT) or (taken.diff(dim=0) != 1).any():
                raise ValueError(
                    f"{original}: the original {self.config.model_type} keeps the experts of a block in one tensor, "
                    "and this format needs a linear for each: export with --format dense"
                )
            unstacked, expert = name.removesuffix(WEIGHT), None
            if len(shape) == 2:
                module, _, projection = name.rpartition(".")
                expert, row = divmod(int(taken[0]), shape[1])
                if projection == "gate_up_proj":
                    projection = "up_proj" if row else "gate_proj"
                unstacked = f"{module}.{expert}.{projection}"
            found.append((original.removesuffix(WEIGHT), unstacked, expert))
        return found
