"""GGUF, the one-file format of llama.cpp: our codes in ggml's blocks, which decode to exactly our model's values.

The file holds the model's architecture and sizes as keys, the tokenizer, and a tensor for each weight (the experts of a
block stacked). The `gguf` package's tables give the names. The same package's decoder checks the file.

llama.cpp has a fixed computation for each architecture (`gguf_architectures`); `gguf_keys` refuses models that it would
compute differently.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from eacmoe_lightning.compressed.format import REST
from eacmoe_lightning.exports import ggml_blocks
from eacmoe_lightning.exports.check import Difference, Reference
from eacmoe_lightning.exports.gguf_architectures import Architecture
from eacmoe_lightning.exports.gguf_keys import architecture_of, keys_of, warn_of_rounding
from eacmoe_lightning.exports.gguf_tensors import DENSE, Entry, by_rows, plan, shapes_of, widths_of
from eacmoe_lightning.exports.gguf_tokenizer import add_tokenizer
from eacmoe_lightning.exports.source import Source
from eacmoe_lightning.quantization.grid import Quantized
from eacmoe_lightning.quantization.kquant import KQuant
from eacmoe_lightning.quantization.kquant_bytes import to_bytes
from eacmoe_lightning.run.files import first_of, read_tensors
from eacmoe_lightning.target_rules import Target
from eacmoe_lightning.version import __version__
from eacmoe_lightning.weight_grids import WeightGrid

if TYPE_CHECKING:
    import gguf

FILE = "model.gguf"


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

    architecture = architecture_of(source.moe)
    entries = plan(source.moe, _types(source, weights), architecture)
    warn_of_rounding(source.moe)
    if source.draft:
        warnings.warn(f"the file has no place for the {len(source.draft)} tensors of the draft layers", stacklevel=2)
    if others := source.parameters.keys() - shapes_of(source.moe).keys():
        warnings.warn(
            f"the file holds the language model only, without {first_of(sorted(others), 'tensor')}: for images "
            "llama.cpp needs a second file, which its convert_hf_to_gguf.py makes of the original with --mmproj",
            stacklevel=2,
        )
    writer = gguf.GGUFWriter(directory / FILE, architecture.name)
    _add_keys(writer, source, architecture, entries)
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

    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(directory / FILE).tensors}
    entries = plan(source.moe, _types(source, source.grids()), architecture_of(source.moe))
    tensors = {name: torch.empty(shape) for name, shape in shapes_of(source.moe).items()}
    for entry in entries:
        tensor = stored[entry.name]
        decoded = gguf.dequantize(tensor.data, tensor.tensor_type).reshape(entry.shape)
        entry.give_back(torch.from_numpy(decoded.copy()), tensors[entry.parameter])
    tensors = {name: by_rows(source.moe, name, tensor).contiguous() for name, tensor in tensors.items()}
    if others := source.parameters.keys() - tensors.keys():
        tensors |= {name: tensor for name, tensor in read_tensors(source.path / REST)[0].items() if name in others}
    has_rounded = any(entry.type == "F16" and entry.parameter in source.weights for entry in entries)
    rounded = "float16" if has_rounded else None
    return Reference(source).compare_decoded(source, source.original_names(tensors), directory, rounded)


def _types(source: Source, weights: list[WeightGrid]) -> dict[str, str]:
    """The ggml type of each quantized parameter."""
    types = {name: ggml_blocks.exact_type([w for w in weights if w.name == name]) for name in source.weights}
    return types | source.outside_types


def _blocks(source: Source) -> Iterator[dict[str, Tensor | Quantized]]:
    for _, quantized, unquantized in source.blocks():
        yield quantized | {name: by_rows(source.moe, name, tensor) for name, tensor in unquantized.items()}


def _encoded(entry: Entry, value: Tensor | Quantized) -> Tensor:
    """One tensor as the file stores it."""
    if entry.is_zero:
        return torch.zeros(entry.shape)
    dtype = {kind: dtype for dtype, kind in DENSE.items()}.get(entry.type)
    if not isinstance(value, Tensor) and (entry.is_transposed or (entry.moves_columns and dtype)):
        value = value.dequantize()
    if entry.moves_columns and not isinstance(value, Tensor):
        is_kquant = isinstance(value, KQuant)
        return entry.take_blocks(to_bytes(value) if is_kquant else ggml_blocks.to_blocks(value, entry.type))
    if isinstance(value, KQuant):
        return entry.take(to_bytes(value))
    if isinstance(value, Quantized):
        parts = (entry.take(part) for part in (value.codes, value.scale, value.zero_point))
        return ggml_blocks.to_blocks(Quantized(*parts, value.bits), entry.type)
    return entry.take(value).to(dtype)


def _add_keys(writer: gguf.GGUFWriter, source: Source, architecture: Architecture, entries: list[Entry]) -> None:
    """The sizes and options that llama.cpp builds the model from."""
    import gguf

    writer.add_name(Path(str(source.directory_config["original"]["name_or_path"])).name)
    writer.add_quantized_by(f"eacmoe-lightning {__version__}")
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for name, value in keys_of(source.moe, architecture, widths_of(entries)).items():
        getattr(writer, f"add_{name}")(value)
