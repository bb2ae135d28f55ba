"""A compressed directory as a server needs it: linears under the original's names, experts as modules that run.

Nothing here imports vLLM.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eacmoe_lightning.compressed.format import KQUANTS, LATTICE, check_format
from eacmoe_lightning.exports.linears import Rows, original_linears
from eacmoe_lightning.exports.source import Source
from eacmoe_lightning.models.block import Block
from eacmoe_lightning.models.shrink import KEPT
from eacmoe_lightning.quantization.packing import expert_codes, take_quantized
from eacmoe_lightning.run.files import StoreError, first_of
from eacmoe_lightning.runtime.packed_modules import PackedExperts, PackedWeight

UNNAMED = ("deepseek",)  # model types whose attention has no names in vLLM; it is served decoded
NOAUX = {"scoring_func": "sigmoid", "topk_method": "noaux_tc"}
CONSTANTS = dict.fromkeys(("deepseek_v3", "deepseek_v32", "glm_moe_dsa"), NOAUX)  # of transformers' router, by type
STORED = {"codes": "weight_packed", "scale": "weight_scale", "zero_point": "weight_zero_point"}  # as servers call them


@dataclass(frozen=True)
class PackedRows:
    """A quantized linear of the original's checkpoint.

    Attributes:
        weight: name of the weight in memory that has its rows.
        rows: which of its rows.
        bits, group_size: of that weight.
    """

    weight: str
    rows: Rows
    bits: int
    group_size: int


def check_servable(config: Mapping[str, Any]) -> None:
    """Refuses what a server cannot run, from the config.json of a compressed directory alone.

    Raises:
        ValueError: a newer version wrote it, its weights lie on a lattice or in llama.cpp's blocks, or its blocks have
            different numbers of experts.
    """
    check_format(dict(config))
    if LATTICE in config["quantization"]:
        raise ValueError(
            "this model's weights lie on a lattice and are stored at their entropy, which no server decodes: export it "
            "with `eacmoe export --format dense` and serve that"
        )
    if KQUANTS in config["quantization"]:
        raise ValueError(
            "this model's weights are in llama.cpp's blocks: export it with `eacmoe export --format gguf` and serve "
            "that with llama.cpp"
        )
    original = config["original"]["config"]
    kept = (original.get("text_config") or original).get(KEPT) or {}
    numbers = {len(experts) for experts in kept.values()}
    if len(numbers) > 1:
        raise ValueError(
            f"this model has {min(numbers)} to {max(numbers)} experts in its blocks, but a server builds all blocks "
            "with one number: prune with --pruning.keep, which keeps the same number in every block"
        )


def check_router_options(config: Any) -> None:
    """Refuses a config without what vLLM's router reads from it and the router of transformers has as constants.

    Originals on the hub have these options. Models that transformers made do not, and vLLM would route by softmax.

    Args:
        config: the original's, as vLLM uses it.

    Raises:
        ValueError: an option is missing or says something else.
    """
    constants = CONSTANTS.get(config.model_type, {})
    if any(getattr(config, name, None) != value for name, value in constants.items()):
        raise ValueError(
            f"vLLM's router of {config.model_type} reads options that this model's config.json lacks: start it with "
            f"--hf-overrides '{json.dumps(constants)}'"
        )


class PackedModel:
    """A compressed directory.

    Args:
        path: the compressed directory.
        dtype: of the tensors that are not quantized: `auto` (as calibrated), `float32`, `bfloat16` or `float16`.

    Raises:
        FileNotFoundError: `path` holds no compressed model.
        ValueError: a newer version of this package wrote it, or its blocks have different numbers of experts.
    """

    def __init__(self, path: str | Path, dtype: str = "auto") -> None:
        self.source = Source(path, dtype)
        if self.source.moe.config.model_type in UNNAMED:
            parts = (self.source.quantized(block).items() for block in self.source.moe.blocks)
            self.source.decode([name for each in parts for name, (part, _) in each if part == "attention"])

    @cached_property
    def linears(self) -> dict[str, PackedRows]:
        """The quantized linears outside the experts, by module name in the original's checkpoint."""
        linears = {}
        for block in self.source.moe.blocks:
            for name, (part, weight) in self.source.quantized(block).items():
                if part != "experts" and name not in self.source.decoded:
                    grid = self._grid(name)
                    for rows in original_linears(self.source.skeleton, name, weight.shape[:-1]):
                        linears[rows.name] = PackedRows(name, rows, *grid)
        return linears

    @cached_property
    def expert_blocks(self) -> dict[int, Block]:
        """The blocks whose routed experts are quantized, by the number in the names of their parameters.

        Raises:
            ValueError: only one of a block's projections is quantized.
        """
        blocks = {}
        for block in self.source.moe.moe_blocks:
            experts = [name for name, (part, _) in block.weights().items() if part == "experts"]
            quantized = [name for name in experts if name in self.source.weights]
            if quantized and len(quantized) < len(experts):
                left = next(name for name in experts if name not in quantized)
                raise ValueError(
                    f"{left} is not quantized, but the other projection of the same experts is: a server runs both "
                    "packed or neither. Choose a --model.group_size that divides both widths"
                )
            if quantized:
                blocks[layer_number(block.name)] = block
        return blocks

    def _grid(self, name: str) -> tuple[int | tuple[int, ...], int]:
        bits = self.source.quantization["bits"][name]
        return bits if isinstance(bits, int) else tuple(bits), self.source.quantization["group_sizes"][name]

    def tensors(self, experts: dict[int, PackedExperts]) -> Iterator[tuple[str, Tensor]]:
        """The tensors of a checkpoint that a server's own loader reads, one file after another.

        Quantized linears are `<module>.weight_packed`, `.weight_scale` and `.weight_zero_point`; all others, and those
        that are served decoded, are as in the original's checkpoint. Quantized experts are not among them.

        Args:
            experts: filled with the experts of each block, by the number in the names of its parameters.

        Raises:
            StoreError: a file or a tensor is missing, or a file is truncated or altered.
        """
        linears: dict[str, list[PackedRows]] = {}
        for linear in self.linears.values():
            linears.setdefault(linear.weight, []).append(linear)
        numbers = {block.name: number for number, block in self.expert_blocks.items()}
        for block, stored in self.source.files():
            tensors = dict(stored)
            for name, (_, weight) in self.source.quantized(block).items():
                if name in self.source.decoded:
                    packed = take_quantized(tensors, name, self._grid(name)[0], weight.shape[-1])
                    tensors[name] = packed.dequantize(self.source.dtype)
                for linear in linears.get(name, ()):
                    for kind, parameter in STORED.items():
                        yield f"{linear.rows.name}.{parameter}", linear.rows.of(tensors[f"{name}.{kind}"])
                if name in linears:
                    for kind in STORED:
                        del tensors[f"{name}.{kind}"]
            if block and block.name in numbers:
                experts[numbers[block.name]] = self._take_experts(block, tensors)
            yield from self.source.original_names(self.source.narrowed(tensors)).items()
        yield from self.source.draft.items()

    def _take_experts(self, block: Block, tensors: dict[str, Tensor]) -> PackedExperts:
        """The experts of a block, with their tensors taken out of those of its file."""
        prefix = f"{block.name}.{block.experts_name}."
        names = [name for name, (part, _) in block.weights().items() if part == "experts"]
        with torch.device("meta"):
            packed = PackedExperts(
                block.experts.module, {name.removeprefix(prefix): self._grid(name) for name in names}
            )
        needed = {name for name, _ in packed.named_parameters()} | {name for name, _ in packed.named_buffers()}
        if missing := sorted(name for name in needed if prefix + name not in tensors):
            raise StoreError(f"{self.source.path} lacks {first_of([prefix + n for n in missing], 'tensor')}")
        for name in needed:
            owner, _, leaf = name.rpartition(".")
            module, tensor = packed.get_submodule(owner), tensors.pop(prefix + name)
            if leaf in module._parameters:
                tensor = torch.nn.Parameter(tensor.to(self.source.dtype), requires_grad=False)
            setattr(module, leaf, tensor)
        return packed


def layer_number(name: str) -> int:
    """The number of a decoder layer in a module name: 3 of `model.layers.3.mlp.experts`.

    Raises:
        ValueError: the name has none.
    """
    for part in name.split("."):
        if part.isdecimal():
            return int(part)
    raise ValueError(f"{name} is not in a numbered layer")


def shard_experts(experts: PackedExperts, rank: int, size: int) -> PackedExperts:
    """The experts of one of `size` processes, whose outputs add up: a slice of each expert's intermediate features.

    Args:
        experts: all experts; changed in place.
        rank: of the process.
        size: number of processes.

    Raises:
        ValueError: `size` does not divide the width of the experts, cuts a group of weights that share a scale, or
            the experts have gating of their own.
    """
    if size == 1:
        return experts
    up, down = getattr(experts, experts.up_name), experts.down_proj
    width = down.shape[-1]
    if experts.activation is None:
        raise ValueError("experts whose gating is the model's own run in one process: use a tensor parallel size of 1")
    if width % size or width // size % down.group_size:
        raise ValueError(
            f"a tensor parallel size of {size} cuts the experts' {width} features within groups of {down.group_size} "
            f"that share a scale: use one of {divisors(width, down.group_size)}"
        )
    part = width // size
    halves = 2 if experts.has_gate else 1
    rows = torch.cat([torch.arange(part) + half * width + rank * part for half in range(halves)])
    columns = slice(rank * part, (rank + 1) * part)
    setattr(experts, experts.up_name, _rows(up, rows))
    experts.down_proj = _columns(down, columns)
    if experts.has_bias:
        for name, own in ((experts.up_name, lambda bias: bias[:, rows]), ("down_proj", lambda bias: bias / size)):
            bias = getattr(experts, f"{name}_bias")
            setattr(experts, f"{name}_bias", torch.nn.Parameter(own(bias.data), requires_grad=False))
    return experts


def divisors(width: int, group_size: int) -> list[int]:
    """Numbers of processes that cut `width` features into whole groups."""
    groups = width // group_size
    return [n for n in range(1, groups + 1) if groups % n == 0]


def _rows(weight: PackedWeight, rows: Tensor) -> PackedWeight:
    num_experts = weight.shape[0]
    codes = [expert_codes(weight.codes, weight.bits, e, weight.shape[-1])[rows] for e in range(num_experts)]
    return _packed_weight(weight, (num_experts, len(rows), weight.shape[-1]), codes, weight.scale[:, rows], rows)


def _columns(weight: PackedWeight, columns: slice) -> PackedWeight:
    num_experts, out_features, in_features = weight.shape
    codes = []
    for e in range(num_experts):
        bits = weight.bits if isinstance(weight.bits, int) else weight.bits[e]
        of_expert = expert_codes(weight.codes, weight.bits, e, in_features)
        codes.append(of_expert[:, columns.start // 8 * bits : columns.stop // 8 * bits])
    groups = slice(columns.start // weight.group_size, columns.stop // weight.group_size)
    shape = (num_experts, out_features, columns.stop - columns.start)
    return _packed_weight(weight, shape, codes, weight.scale[..., groups], groups)


def _packed_weight(weight: PackedWeight, shape, codes: list[Tensor], scale: Tensor, taken) -> PackedWeight:
    zero_point = weight.zero_point[..., taken] if isinstance(taken, slice) else weight.zero_point[:, taken]
    with torch.device("meta"):
        part = PackedWeight(shape, weight.bits, weight.group_size, weight.dtype)
    part.codes = torch.stack(codes) if isinstance(weight.bits, int) else torch.cat([c.flatten() for c in codes])
    part.scale, part.zero_point = scale.contiguous(), zero_point.contiguous()
    return part
