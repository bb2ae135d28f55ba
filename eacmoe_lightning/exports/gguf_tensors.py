"""Where a model's parameters go in a GGUF file: names, rows and shapes of its tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from eacmoe_lightning.compressed.directory import untied
from eacmoe_lightning.exports.gguf_architectures import Architecture
from eacmoe_lightning.models.moe import MoEModel


@dataclass(frozen=True)
class Change:
    """A change of a tensor's values: from the model's to the file's, and back."""

    there: Callable[[Tensor], Tensor]
    back: Callable[[Tensor], Tensor]


PLUS_ONE = Change(lambda tensor: tensor + 1, lambda tensor: tensor - 1)
MINUS_EXP = Change(lambda tensor: -tensor.exp(), lambda tensor: (-tensor).log())
DENSE = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
NAMES = {  # of tensors whose parameters the `gguf` package's tables do not have, by how the parameter's name ends
    "lm_head.weight": "output.weight",
    "correction_bias": "exp_probs_b.bias",
    ".expert_bias": "exp_probs_b.bias",
    ".sinks": "attn_sinks.weight",
    ".router.weight": "ffn_gate_inp.weight",
    ".experts.down_proj": "ffn_down_exps.weight",
    ".experts.down_proj_bias": "ffn_down_exps.bias",
    ".linear_attn.A_log": "ssm_a",
    ".linear_attn.dt_bias": "ssm_dt.bias",
    ".linear_attn.conv1d.weight": "ssm_conv1d.weight",
}
GATE_AND_UP = {  # the same for parameters that hold the rows of gate and up
    ".experts.gate_up_proj": ("ffn_gate_exps.weight", "ffn_up_exps.weight"),
    ".experts.gate_up_proj_bias": ("ffn_gate_exps.bias", "ffn_up_exps.bias"),
    "shared_mlp.input_linear.weight": ("ffn_gate_shexp.weight", "ffn_up_shexp.weight"),
}


@dataclass(frozen=True)
class Entry:
    """One tensor of the file: some rows of a parameter.

    Attributes:
        name: its name in the file.
        parameter: the parameter in memory that it comes from.
        shape: its shape in the file, [..., O, I], or [..., O] of biases and norms.
        type: its ggml type.
        rows: which of the parameter's rows, in the file's order; None: all.
        dim: the dimension of the parameter that has the rows, counted from the last.
        heads: the matrices into which the rows are split; 0: one.
        is_transposed: whether each of these matrices is transposed.
        change: of the values; only of tensors that are not quantized.
    """

    name: str
    parameter: str
    shape: tuple[int, ...]
    type: str
    rows: Tensor | None = None
    dim: int = -2
    heads: int = 0
    is_transposed: bool = False
    change: Change | None = None

    def take(self, parameter: Tensor) -> Tensor:
        """Its rows of a parameter [..., O, *] or [..., O]."""
        parameter = self.change.there(parameter.float()) if self.change else parameter
        tensor = parameter if self.rows is None else parameter.index_select(self.dim, self.rows)
        tensor = tensor.unflatten(0, (self.heads, -1)) if self.heads else tensor
        return tensor.transpose(1, 2) if self.is_transposed else tensor

    def give_back(self, tensor: Tensor, parameter: Tensor) -> None:
        """Copies the tensor to where its rows came from."""
        tensor = self.change.back(tensor) if self.change else tensor
        tensor = tensor.transpose(1, 2) if self.is_transposed else tensor
        tensor = tensor.flatten(0, 1) if self.heads else tensor
        if self.rows is None:
            parameter.copy_(tensor.reshape(parameter.shape))
        else:
            parameter.index_copy_(parameter.ndim + self.dim, self.rows, tensor)


def by_rows(moe: MoEModel, name: str, tensor: Tensor) -> Tensor:
    """A parameter in memory as [..., O, I]: some models keep stacks of experts transposed. It is its own inverse."""
    block = next((block for block in moe.moe_blocks if name.startswith(f"{block.name}.")), None)
    return block.as_parameter(name, tensor) if block and name in block.weights() else tensor


def shapes_of(moe: MoEModel) -> dict[str, tuple[int, ...]]:
    """The shape [..., O, I] of every parameter; tied ones once."""
    return {name: tuple(by_rows(moe, name, tensor).shape) for name, tensor in untied(moe.model).items()}


def plan(moe: MoEModel, types: Mapping[str, str], architecture: Architecture) -> list[Entry]:
    """The tensors of the file in order: block by block, then all others.

    Args:
        moe: the model; it may be on the meta device.
        types: ggml type of each quantized parameter.
        architecture: from `architecture_of`.

    Raises:
        ValueError: llama.cpp's architecture has no place for a tensor, or would not use it.
    """
    import gguf

    config, blocks, parameters = moe.config, moe.blocks, untied(moe.model)
    number = next((number for number, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture.name), None)
    if number is None:
        raise ValueError(
            f"the installed package gguf does not know llama.cpp's architecture {architecture.name}: "
            "pip install --upgrade gguf"
        )
    table = gguf.get_tensor_name_map(number, len(blocks))
    by_block: list[list[Entry]] = [[] for _ in (*blocks, None)]
    for parameter, shape in shapes_of(moe).items():
        index = next((i for i, block in enumerate(blocks) if parameter.startswith(f"{block.name}.")), len(blocks))
        prefix = f"blk.{blocks[index].index}." if index < len(blocks) else ""
        if pair := _by_ending(GATE_AND_UP, parameter):
            names = [prefix + name for name in pair]
        elif architecture.latent and parameter.endswith(".kv_b_proj.weight"):
            names = [f"{prefix}attn_k_b.weight", f"{prefix}attn_v_b.weight"]
        elif parameter.endswith(".in_proj_qkvz.weight"):
            names = [f"{prefix}attn_qkv.weight", f"{prefix}attn_gate.weight"]
        elif name := _by_ending(NAMES, parameter):
            names = [prefix + name]
        else:
            name = table.get_name(parameter, try_suffixes=(".weight", ".bias"))
            names = [name] if name else []
        if not names or (names[0].endswith(".bias") and not _is_added(names[0], architecture)):
            raise ValueError(
                f"{parameter}: llama.cpp's architecture {architecture.name} has no such tensor: export with "
                "--format dense"
            )
        kind = types.get(parameter) or _dense_type(names[0], shape, parameters[parameter].dtype)
        by_block[index] += _entries(names, parameter, shape, kind, architecture, config)
        if architecture.needs_head and names == ["token_embd.weight"] and "lm_head.weight" not in parameters:
            by_block[index] += _entries(["output.weight"], parameter, shape, kind, architecture, config)
    return [entry for entries in by_block for entry in entries]


def widths_of(entries: list[Entry]) -> dict[str, int]:
    """The in_features of the down projections, by name of the tensor in a block without `.weight`."""
    widths = {_stem(entry.name): entry.shape[-1] for entry in entries if entry.name.endswith(".weight")}
    return {name: width for name, width in widths.items() if name.startswith("ffn_down")}


def _entries(
    names: list[str],
    parameter: str,
    shape: tuple[int, ...],
    kind: str,
    architecture: Architecture,
    config: PreTrainedConfig,
) -> list[Entry]:
    """The tensors that a parameter becomes."""
    dim = -1 if len(shape) == 1 or names[0].endswith(".bias") else -2
    rows = torch.arange(shape[dim])
    if names[0].endswith("attn_k_b.weight"):  # of each head, rows for its key and rows for its value
        heads, width = config.num_attention_heads, shape[-1]
        keys, values = rows.view(heads, -1).split([config.qk_nope_head_dim, config.v_head_dim], dim=1)
        key_shape, value_shape = (heads, width, keys.shape[1]), (heads, values.shape[1], width)
        decoded = kind if kind in DENSE.values() else "F16"  # the file's rows are the columns of the quantized weight
        return [
            Entry(names[0], parameter, key_shape, decoded, keys.flatten(), heads=heads, is_transposed=True),
            Entry(names[1], parameter, value_shape, kind, values.flatten(), heads=heads),
        ]
    if names[0].endswith("attn_qkv.weight"):  # of each key head: query, key, values and gates
        key, heads = config.linear_key_head_dim, config.linear_num_key_heads
        value = config.linear_value_head_dim * config.linear_num_value_heads // heads
        *qkv, gates = rows.view(heads, -1).split([key, key, value, value], dim=1)
        qkv, gates = torch.cat([part.flatten() for part in qkv]), gates.flatten()
        parts = zip(names, (qkv, gates), strict=True)
        return [Entry(name, parameter, (len(part), shape[-1]), kind, part) for name, part in parts]
    if len(names) == 2:
        gate, up = (rows[0::2], rows[1::2]) if architecture.alternates else rows.chunk(2)
        half = (*shape[:dim], len(gate), *shape[len(shape) + dim + 1 :])
        return [Entry(n, parameter, half, kind, r, dim) for n, r in zip(names, (gate, up), strict=True)]
    change = None
    if parameter.endswith(".A_log"):
        change = MINUS_EXP
    elif architecture.norms_less_one and names[0].endswith("_norm.weight") and _stem(names[0]) != "ssm_norm":
        change = PLUS_ONE
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}.get(_stem(names[0]), 0)
    if not architecture.reorders or not heads:
        return [Entry(names[0], parameter, tuple(n for n in shape if n > 1) or shape, kind, change=change)]
    rows = rows.view(heads, 2, -1).transpose(1, 2).flatten()
    return [Entry(names[0], parameter, shape, kind, rows, dim)]


def _dense_type(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> str:
    """The ggml type of a tensor that is not quantized: llama.cpp needs vectors, biases and convolutions in float32."""
    is_small = len(shape) == 1 or 1 in shape or name.endswith(".bias") or _stem(name) == "ffn_gate_inp"
    return "F32" if is_small else DENSE[dtype]


def _is_added(name: str, architecture: Architecture) -> bool:
    """Whether llama.cpp adds a bias."""
    return _stem(name) in (*architecture.biases, "exp_probs_b", "ssm_dt")


def _stem(name: str) -> str:
    """`attn_q` of `blk.3.attn_q.weight`."""
    return name.split(".")[-2]


def _by_ending(table: dict, name: str):
    return next((value for ending, value in table.items() if name.endswith(ending)), None)
