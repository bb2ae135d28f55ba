"""Where a model's parameters go in a GGUF file: names, rows and shapes of its tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from eacmoe_lightning.compressed.directory import untied
from eacmoe_lightning.exports.gguf_architectures import Architecture
from eacmoe_lightning.models.find import is_of_another_part
from eacmoe_lightning.models.moe import MoEModel
from eacmoe_lightning.quantization.kquant import TYPES


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
    ".experts.up_proj": "ffn_up_exps.weight",
    ".experts.down_proj": "ffn_down_exps.weight",
    ".experts.down_proj_bias": "ffn_down_exps.bias",
    ".A_log": "ssm_a",
    ".mamba.D": "ssm_d",
    ".mixer.D": "ssm_d",
    ".dt_bias": "ssm_dt.bias",
    ".conv1d.weight": "ssm_conv1d.weight",
    ".conv1d.bias": "ssm_conv1d.bias",
}
COLUMNS = (".mamba.A_log", ".mamba.D", ".mixer.A_log", ".mixer.D")  # vectors that are a column in the file
SPLIT = {  # the same for parameters whose rows are those of two tensors
    ".experts.gate_up_proj": ("ffn_gate_exps.weight", "ffn_up_exps.weight"),
    ".experts.gate_up_proj_bias": ("ffn_gate_exps.bias", "ffn_up_exps.bias"),
    "shared_mlp.input_linear.weight": ("ffn_gate_shexp.weight", "ffn_up_shexp.weight"),
    ".kv_b_proj.weight": ("attn_k_b.weight", "attn_v_b.weight"),
    ".in_proj_qkvz.weight": ("attn_qkv.weight", "attn_gate.weight"),
}


@dataclass(frozen=True)
class Entry:
    """One tensor of the file: some rows of a parameter, or zeros.

    Attributes:
        name: its name in the file.
        parameter: the parameter in memory that it comes from.
        shape: its shape in the file, [..., O, I], or [..., O] of biases and norms.
        type: its ggml type.
        rows: which of the parameter's rows, in the file's order; None: all.
        dim: the dimension of the parameter that has the rows, counted from the last; -1 of a matrix: its columns.
        heads: the matrices into which the rows are split; 0: one.
        is_transposed: whether each of these matrices is transposed.
        change: of the values; only of tensors that are not quantized.
        is_zero: whether it is the bias of a linear without one; the parameter is the linear's weight.
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
    is_zero: bool = False

    @property
    def moves_columns(self) -> bool:
        return self.rows is not None and self.dim == -1 and len(self.shape) > 1

    def take_blocks(self, data: Tensor) -> Tensor:
        """Its bytes [O, bytes of a row] of a quantized matrix's, whose columns change places."""
        size = TYPES[self.type].block
        order = self.rows[::size] // size
        return data.unflatten(-1, (len(order), -1)).index_select(-2, order).flatten(-2)

    def take(self, parameter: Tensor) -> Tensor:
        """Its rows of a parameter [..., O, *] or [..., O]."""
        parameter = self.change.there(parameter.float()) if self.change else parameter
        tensor = parameter if self.rows is None else parameter.index_select(self.dim, self.rows)
        tensor = tensor.unflatten(0, (self.heads, -1)) if self.heads else tensor
        return tensor.transpose(1, 2) if self.is_transposed else tensor

    def give_back(self, tensor: Tensor, parameter: Tensor) -> None:
        """Copies the tensor to where its rows came from."""
        if self.is_zero:
            return
        tensor = self.change.back(tensor) if self.change else tensor
        tensor = tensor.transpose(1, 2) if self.is_transposed else tensor
        tensor = tensor.flatten(0, 1) if self.heads else tensor
        if self.rows is None:
            parameter.copy_(tensor.reshape(parameter.shape))
        else:
            shape = list(parameter.shape)
            shape[self.dim] = len(self.rows)
            parameter.index_copy_(parameter.ndim + self.dim, self.rows, tensor.reshape(shape))


def by_rows(moe: MoEModel, name: str, tensor: Tensor) -> Tensor:
    """A parameter in memory as [..., O, I]: some models keep stacks of experts transposed. It is its own inverse."""
    block = next((block for block in moe.moe_blocks if name.startswith(f"{block.name}.")), None)
    return block.as_parameter(name, tensor) if block and name in block.weights() else tensor


def shapes_of(moe: MoEModel) -> dict[str, tuple[int, ...]]:
    """The shape [..., O, I] of every parameter of the language model; tied ones once."""
    parameters = {name: tensor for name, tensor in untied(moe.model).items() if not is_of_another_part(name)}
    return {name: tuple(by_rows(moe, name, tensor).shape) for name, tensor in parameters.items()}


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
        if 0 in shape:
            raise ValueError(f"{parameter} has no element, which a GGUF file cannot hold: export with --format dense")
        index = next((i for i, block in enumerate(blocks) if parameter.startswith(f"{block.name}.")), len(blocks))
        prefix = f"blk.{blocks[index].index}." if index < len(blocks) else ""
        if pair := _by_ending(SPLIT, parameter):
            names = [prefix + name for name in pair]
        elif name := _by_ending(NAMES, parameter):
            names = [prefix + name]
        else:
            listed = parameter.replace(".language_model.", ".")
            if listed.startswith("model."):
                listed = f"{architecture.prefix}.{listed.removeprefix('model.')}"
            name = table.get_name(listed, try_suffixes=(".weight", ".bias"))
            names = [name] if name else []
        if not names or (names[0].endswith(".bias") and not _is_added(names[0], architecture)):
            raise ValueError(
                f"{parameter}: llama.cpp's architecture {architecture.name} has no such tensor: export with "
                "--format dense"
            )
        kind = types.get(parameter) or _dense_type(names[0], shape, parameters[parameter].dtype)
        by_block[index] += _entries(names, parameter, shape, kind, architecture, config)
        stem, is_weight = _stem(names[0]), parameter.endswith(".weight")
        if is_weight and stem in architecture.needs_biases and parameter[: -len("weight")] + "bias" not in parameters:
            by_block[index].append(Entry(f"{prefix}{stem}.bias", parameter, shape[:1], "F32", is_zero=True))
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
    if len(names) == 2:
        parts = _halves(_stem(names[0]), rows, architecture, config)
        pair = [
            Entry(name, parameter, (*shape[:dim], len(part), *shape[dim:][1:]), kind, part, dim)
            for name, part in zip(names, parts, strict=True)
        ]
        return _by_head(*pair, config.num_attention_heads) if _stem(names[0]) == "attn_k_b" else pair
    change = None
    if parameter.endswith(".A_log"):
        change = MINUS_EXP
    elif architecture.norms_less_one and names[0].endswith("_norm.weight") and _stem(names[0]) != "ssm_norm":
        change = PLUS_ONE
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}.get(_stem(names[0]), 0)
    if architecture.reorders and heads:
        rows = rows.view(heads, 2, -1).transpose(1, 2).flatten()
        return [Entry(names[0], parameter, shape, kind, rows, dim)]
    in_file = (*shape, 1) if parameter.endswith(COLUMNS) else tuple(n for n in shape if n > 1) or shape
    if parameter.endswith(".mixer.norm.weight") and config.n_groups > 1:  # a norm for each group of the state space
        in_file = (config.n_groups, shape[0] // config.n_groups)
    entry = Entry(names[0], parameter, in_file, kind, change=change)
    return [_tiled(entry, shape, config) if architecture.tiles_values and ".linear_attn." in parameter else entry]


def _tiled(entry: Entry, shape: tuple[int, ...], config: PreTrainedConfig) -> Entry:
    """The entry with linear attention's value heads in the file's order, wherever it has an entry for each.

    Quantized columns change places block by block, so no two heads may share one.
    """
    stem, keys, values = _stem(entry.name), config.linear_num_key_heads, config.linear_num_value_heads
    if stem == "ssm_norm" or keys == values:
        return entry
    dim = -1 if stem == "ssm_out" else -len(shape)
    before = 2 * keys * config.linear_key_head_dim if stem in ("attn_qkv", "ssm_conv1d") else 0
    order = torch.arange(before, shape[dim]).view(keys, values // keys, -1).transpose(0, 1).flatten()
    entry = replace(entry, rows=torch.cat([torch.arange(before), order]), dim=dim)
    is_cut = entry.moves_columns and entry.type in TYPES and config.linear_value_head_dim % TYPES[entry.type].block
    return replace(entry, type="F16") if is_cut else entry


def _halves(first: str, rows: Tensor, architecture: Architecture, config: PreTrainedConfig) -> tuple[Tensor, Tensor]:
    """The rows of each of the two tensors of a parameter, by the stem of the first."""
    if first == "attn_k_b":  # each head has rows for keys, then for values
        sizes = [config.qk_nope_head_dim, config.v_head_dim]
        keys, values = rows.view(config.num_attention_heads, -1).split(sizes, dim=1)
        return keys.flatten(), values.flatten()
    if first == "attn_qkv":  # each key head has rows for its query, its key, its values and their gates
        key, heads = config.linear_key_head_dim, config.linear_num_key_heads
        value = config.linear_value_head_dim * config.linear_num_value_heads // heads
        *qkv, gates = rows.view(heads, -1).split([key, key, value, value], dim=1)
        return torch.cat([part.flatten() for part in qkv]), gates.flatten()
    return (rows[0::2], rows[1::2]) if architecture.alternates else rows.chunk(2)


def _by_head(keys: Entry, values: Entry, heads: int) -> list[Entry]:
    """Both with a matrix for each head; that of the keys is transposed, so its quantized columns become rows."""
    shapes = [(heads, entry.shape[0] // heads, entry.shape[1]) for entry in (keys, values)]
    kind = keys.type if keys.type in DENSE.values() else "F16"
    transposed = (heads, shapes[0][2], shapes[0][1])
    return [
        replace(keys, shape=transposed, type=kind, heads=heads, is_transposed=True),
        replace(values, shape=shapes[1], heads=heads),
    ]


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
