"""GGUF, the one-file format of llama.cpp: our codes in ggml's blocks, which decode to exactly our model's values.

The file holds the model's architecture and sizes as keys, the tokenizer, and a tensor for each weight (the experts of a
block stacked). The `gguf` package's tables give the names. The same package's decoder checks the file.

llama.cpp has a fixed computation for each architecture. `_check` refuses models that it would compute differently.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from eacmoe_lightning.exports import ggml_blocks
from eacmoe_lightning.exports.check import Difference, Reference
from eacmoe_lightning.exports.gguf_tokenizer import add_tokenizer
from eacmoe_lightning.exports.source import Source
from eacmoe_lightning.models.block import Block
from eacmoe_lightning.quantization.grid import Quantized
from eacmoe_lightning.quantization.kquant import KQuant
from eacmoe_lightning.quantization.kquant_bytes import to_bytes
from eacmoe_lightning.targets import Target, WeightGrid
from eacmoe_lightning.version import __version__

if TYPE_CHECKING:
    import gguf

FILE = "model.gguf"
DENSE = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


@dataclass(frozen=True)
class Architecture:
    """How llama.cpp computes a model type.

    Attributes:
        name: llama.cpp's name for the architecture.
        interleaved: whether rotary embeddings rotate adjacent rows of a head instead of its two halves. The rows of the
            query and key projections are then reordered.
        renormalizes: whether the weights of the selected experts are divided by their sum.
        leading_dense: whether the first blocks may be dense.
    """

    name: str
    interleaved: bool
    renormalizes: bool
    leading_dense: bool = False


ARCHITECTURES = {  # by transformers' model_type
    "mixtral": Architecture("llama", interleaved=True, renormalizes=True),
    "qwen2_moe": Architecture("qwen2moe", interleaved=False, renormalizes=False),
    "qwen3_moe": Architecture("qwen3moe", interleaved=False, renormalizes=True),
    "deepseek": Architecture("deepseek", interleaved=True, renormalizes=False, leading_dense=True),
}


@dataclass(frozen=True)
class Entry:
    """One tensor of the file.

    Attributes:
        name: its name in the file.
        parameter: the parameter in memory that it comes from.
        shape: its shape in the file, [..., O, I] or [O].
        type: its ggml type.
        half: the half of the parameter's rows that it holds: 0 (gate) or 1 (up); None: all rows.
        heads: number of heads of a query or key projection whose rows are reordered; 0: no reordering.
    """

    name: str
    parameter: str
    shape: tuple[int, ...]
    type: str
    half: int | None = None
    heads: int = 0

    def take(self, tensor: Tensor) -> Tensor:
        """Its rows of a parameter [..., O, *] or [O], in the file's order."""
        if self.half is not None:
            tensor = tensor.chunk(2, dim=-2)[self.half]
        if self.heads:
            tensor = tensor.unflatten(0, (self.heads, 2, -1)).transpose(1, 2).flatten(0, 2)
        return tensor

    def give_back(self, tensor: Tensor) -> Tensor:
        """The same rows in the parameter's order."""
        return tensor.unflatten(0, (self.heads, -1, 2)).transpose(1, 2).flatten(0, 2) if self.heads else tensor


def require_library() -> None:
    """Raises ValueError if the `gguf` package is missing."""
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise ValueError('--format gguf needs the package gguf: pip install "eacmoe-lightning[export]"') from error


def write(source: Source, weights: list[WeightGrid], row: Target, directory: Path) -> None:
    """Fills the directory with `model.gguf`, with one block in memory at a time.

    Raises:
        ValueError: llama.cpp computes this model differently, or cannot hold its tokenizer or one of its tensors.
    """
    import gguf

    architecture = _check(source)
    entries = plan(source, weights, architecture)
    if source.draft:
        warnings.warn(f"the file has no place for the {len(source.draft)} tensors of the draft layers", stacklevel=2)
    writer = gguf.GGUFWriter(directory / FILE, architecture.name)
    _add_keys(writer, source, architecture)
    add_tokenizer(writer, source.path, source.moe.config.vocab_size)
    for entry in entries:
        kind = gguf.GGMLQuantizationType[entry.type]
        size = gguf.quant_shape_to_byte_shape(entry.shape, kind)
        writer.add_tensor_info(entry.name, entry.shape, None, int(torch.Size(size).numel()), kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    remaining = iter(entries)
    for tensors in _blocks(source):
        for entry in [next(remaining) for e in entries if e.parameter in tensors]:
            writer.write_tensor_data(_encoded(entry, tensors[entry.parameter]).contiguous().view(torch.uint8).numpy())
    writer.close()


def read_back(source: Source, row: Target, directory: Path) -> Difference:
    """Decodes every tensor with the `gguf` package, and compares the model that results."""
    import gguf

    tensors: dict[str, Tensor] = {}
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(directory / FILE).tensors}
    entries = plan(source, source.grids(), _check(source))
    for entry in entries:
        tensor = stored[entry.name]
        decoded = gguf.dequantize(tensor.data, tensor.tensor_type).reshape(entry.shape)
        rows = entry.give_back(torch.from_numpy(decoded.copy()))
        shape = source.parameters[entry.parameter].shape
        if entry.half:
            rows = torch.cat([tensors[entry.parameter], rows], dim=-2)
        tensors[entry.parameter] = rows if entry.half == 0 else rows.view(shape)
    has_rounded = any(entry.type == "F16" and entry.parameter in source.weights for entry in entries)
    rounded = "float16" if has_rounded else None
    return Reference(source).compare_decoded(source, source.original_names(tensors), directory, rounded)


def plan(source: Source, weights: list[WeightGrid], architecture: Architecture) -> list[Entry]:
    """The tensors of the file in order: block by block, then all others.

    Raises:
        ValueError: llama.cpp's architecture has no place for a tensor.
    """
    import gguf

    config, blocks = source.moe.config, source.moe.blocks
    number = next(number for number, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture.name)
    names = gguf.get_tensor_name_map(number, len(blocks))
    types = {name: ggml_blocks.exact_type([w for w in weights if w.name == name]) for name in source.weights}
    routers = {block.router_parameter_name for block in source.moe.calibrated_blocks}
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    entries = []
    for parameter, tensor in source.parameters.items():
        if parameter in types:
            kind = types[parameter]
        else:
            is_small = tensor.ndim == 1 or tensor.shape[0] == 1 or parameter in routers
            kind = "F32" if is_small else DENSE[tensor.dtype]
        module, suffix = parameter, "weight"
        if tensor.ndim < 3:
            module, _, suffix = parameter.rpartition(".")
        projection, shape = module.rpartition(".")[2], tuple(tensor.shape)
        if projection == "gate_up_proj":
            halves = [(0, module.replace("gate_up_proj", "gate_proj")), (1, module.replace("gate_up_proj", "up_proj"))]
            shape = (*shape[:-2], shape[-2] // 2, shape[-1])
        else:
            halves = [(None, module)]
        num_heads = heads.get(projection, 0) if architecture.interleaved else 0
        for half, submodule in halves:
            name = names.get_name(submodule)
            if name is None:
                raise ValueError(
                    f"{parameter}: llama.cpp's architecture {architecture.name} has no such tensor: export with "
                    "--format dense"
                )
            entries.append(
                Entry(f"{name}.{suffix}", parameter, shape[1:] if shape[0] == 1 else shape, kind, half, num_heads)
            )
    order = {name: i for i, name in enumerate([f"{block.name}." for block in blocks])}
    return sorted(entries, key=lambda e: next((i for n, i in order.items() if e.parameter.startswith(n)), len(order)))


def _blocks(source: Source) -> Iterator[dict[str, Tensor | Quantized]]:
    for _, quantized, unquantized in source.blocks():
        yield quantized | unquantized


def _encoded(entry: Entry, value: Tensor | Quantized) -> Tensor:
    """One tensor as the file stores it."""
    if isinstance(value, KQuant):
        return entry.take(to_bytes(value))
    if isinstance(value, Quantized):
        parts = (entry.take(part) for part in (value.codes, value.scale, value.zero_point))
        return ggml_blocks.to_blocks(Quantized(*parts, value.bits), entry.type)
    dtype = {kind: dtype for dtype, kind in DENSE.items()}[entry.type]
    return entry.take(value).to(dtype)


# --- keys


def _check(source: Source) -> Architecture:
    """llama.cpp's architecture for a model.

    Raises:
        ValueError: llama.cpp has none, or would compute something else.
    """
    config, moe = source.moe.config, source.moe
    architecture = ARCHITECTURES.get(source.config.model_type)
    remedy = "export with --format dense, and convert that with llama.cpp's scripts if they know the model"
    if architecture is None:
        raise ValueError(
            f"--format gguf knows {', '.join(ARCHITECTURES)}, not {source.config.model_type}"
            f"{' (llama.cpp weights its experts by another rule)' if source.config.model_type == 'phimoe' else ''}: "
            f"{remedy}"
        )
    rotary = getattr(config, "rope_parameters", None) or {}
    expected = {
        "hidden_act": (config.hidden_act, "silu"),
        "rope_type": (rotary.get("rope_type", "default"), "default"),
        "sliding_window": (getattr(config, "sliding_window", None) or None, None),
        "norm_topk_prob": (getattr(config, "norm_topk_prob", architecture.renormalizes), architecture.renormalizes),
        "routed_scaling_factor": (getattr(config, "routed_scaling_factor", None) or 1.0, 1.0),
    }
    for option, (value, supported) in expected.items():
        if value != supported:
            raise ValueError(
                f"the model has {option}={value!r}, but llama.cpp's architecture {architecture.name} has "
                f"{supported!r}: {remedy}"
            )
    dense = [block.index for block in moe.blocks if not block.is_moe]
    if dense != (list(range(len(dense))) if architecture.leading_dense else []):
        raise ValueError(
            f"blocks {dense} have no experts, and llama.cpp's architecture {architecture.name} expects some: {remedy}"
        )
    return architecture


def _add_keys(writer: gguf.GGUFWriter, source: Source, architecture: Architecture) -> None:
    """The sizes that llama.cpp builds the model from."""
    import gguf

    config, moe = source.moe.config, source.moe
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    width = moe.moe_blocks[0].experts.weight("down_proj").shape[-1]
    writer.add_name(Path(str(source.directory_config["original"]["name_or_path"])).name)
    writer.add_quantized_by(f"eacmoe-lightning {__version__}")
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(config.vocab_size)
    writer.add_block_count(len(moe.blocks))
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_expert_count(moe.num_experts)
    writer.add_expert_used_count(moe.top_k)
    writer.add_expert_feed_forward_length(width)
    if shared := _shared_width(moe.moe_blocks[0]):
        writer.add_expert_shared_feed_forward_length(shared)
        writer.add_expert_shared_count(shared // width)
    if architecture.leading_dense:
        writer.add_leading_dense_block_count(len(moe.blocks) - len(moe.moe_blocks))


def _shared_width(block: Block) -> int:
    """The total width of a block's shared experts; 0 if there are none."""
    widths = [weight.shape[-1] for name, (part, weight) in block.weights().items()
              if part == "shared" and ".down_proj." in name]  # fmt: skip
    return sum(widths)
