"""The GPTQ checkpoint formats `gptq` (v1) and `gptq_v2`, which GPTQModel, AutoGPTQ and their readers use.

Per linear [O, I] with G groups of inputs and b bits:

    qweight  int32 [I * b / 32, O]    codes along the inputs, a little-endian stream of bits
    qzeros   int32 [G, O * b / 32]    zero points along the outputs, packed the same way; v1 subtracts 1
    scales   float16 [G, O]
    g_idx    int32 [I]                the group of each input

`quantization_config` gives the grid of most linears. Its `dynamic` gives the grids of the others by regular expression,
each after "+:", and of modules that are not quantized after "-:". The first one that matches from the start of a
module's name counts.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from eacmoe_lightning.exports.check import Difference, Reference
from eacmoe_lightning.exports.checkpoint import check_draft, write_checkpoint
from eacmoe_lightning.exports.source import Source
from eacmoe_lightning.models.draft import draft_prefixes
from eacmoe_lightning.quantization.grid import Quantized
from eacmoe_lightning.quantization.packing import pack
from eacmoe_lightning.run.files import write_json
from eacmoe_lightning.target_rules import Target
from eacmoe_lightning.version import __version__
from eacmoe_lightning.weight_grids import WeightGrid, fused_names, wholes_of

SUFFIXES = ("qweight", "qzeros", "scales", "g_idx")


def write(source: Source, weights: list[WeightGrid], row: Target, directory: Path) -> None:
    """Fills the directory with shards and config."""
    is_v2 = row.format == "gptq_v2"

    def shards() -> Iterator[dict[str, Tensor]]:
        for shard in source.shards(row.names):
            tensors = dict(shard.dense)
            for linear in shard.linears:
                tensors |= to_tensors(linear.name, linear.quantized, is_v2)
            yield tensors

    ordinary = source.unquantized_modules() if row.fuses else source.ordinary_linears()
    modules = [f"{re.escape(name)}$" for name in ordinary + (fused_names(ordinary) if row.fuses else [])]
    modules += [re.escape(prefix) for prefix in draft_prefixes(source.draft)]
    config = quantization_config(weights, source.linear_names(row.names), is_v2, modules, row.fuses)
    write_checkpoint(source, directory, shards(), config)
    write_json(directory / "quantize_config.json", config)  # readers of v1 look here


def read_back(source: Source, row: Target, directory: Path) -> Difference:
    """Decodes every word by the format's rules, and compares the model that results."""
    config = json.loads((directory / "quantize_config.json").read_text())
    decoded: dict[str, Tensor] = {}
    for file in sorted(directory.glob("*.safetensors")):
        decoded |= decode(load_file(file), config)
    check_draft(source, directory)
    decoded = {name: tensor for name, tensor in decoded.items() if name not in source.draft}
    if row.names == "unstacked":
        decoded = source.original_names(source.stacked_names(decoded))
    return Reference(source).compare_decoded(source, decoded, directory)


def to_tensors(linear: str, quantized: Quantized, is_v2: bool) -> dict[str, Tensor]:
    """The four tensors of one linear, by name in the checkpoint.

    Args:
        linear: module name.
        quantized: codes [O, I]; I and O are multiples of 32.
        is_v2: whether zero points are stored unchanged; if not, they are stored less 1 and none may be 0.
    """
    zero_point = quantized.zero_point if is_v2 else quantized.zero_point - 1
    in_features = quantized.codes.shape[-1]
    tensors = (
        to_int32(quantized.codes, quantized.bits).T,
        to_int32(zero_point.T.contiguous(), quantized.bits),
        quantized.scale.T,
        torch.arange(in_features, dtype=torch.int32) // quantized.group_size,
    )
    return {f"{linear}.{suffix}": t.contiguous() for suffix, t in zip(SUFFIXES, tensors, strict=True)}


def to_int32(codes: Tensor, bits: int) -> Tensor:
    """uint8 codes [..., n] -> int32 [..., n * bits / 32], a little-endian stream of bits; n is a multiple of 32."""
    return pack(codes, bits).view(torch.int32)


def quantization_config(
    weights: list[WeightGrid],
    linears: dict[str, list[str]],
    is_v2: bool,
    unquantized: Iterable[str] = (),
    fuses: bool = False,
) -> dict[str, Any]:
    """The `quantization_config` of config.json.

    Args:
        weights: every quantized weight.
        linears: module names of each weight's linears, by parameter name.
        is_v2: whether the format is gptq_v2.
        unquantized: regular expressions for modules that no reader may take for quantized ones: linears that are
            written as ordinary weights, and draft layers.
        fuses: whether readers load linears of the same inputs as one, under names of their own; and take the grid of
            experts from where `dynamic` names none.
    """
    counts = Counter()
    for weight in [w for w in weights if w.part == "experts"] if fuses else weights:
        counts[weight.bits, weight.group_size] += weight.shape[0] if len(weight.shape) == 3 else 1
    if not counts:
        raise ValueError("nothing in this model is quantized: pass --format dense")
    (bits, group_size), _ = counts.most_common(1)[0]
    dynamic = {f"-:{pattern}": {} for pattern in unquantized}
    for weight in weights:
        if (weight.bits, weight.group_size) != (bits, group_size):
            pattern = f"+:{_pattern(weight, weights, linears[weight.name], fuses)}"
            dynamic[pattern] = {"bits": weight.bits, "group_size": weight.group_size}
    symmetric = all(weight.symmetric for weight in weights)
    return {
        "quant_method": "gptq",
        "checkpoint_format": "gptq_v2" if is_v2 else "gptq",
        "format": "gptq_v2" if is_v2 else "gptq",
        "bits": bits,
        "group_size": group_size,
        "sym": symmetric,
        "desc_act": False,
        "lm_head": False,
        "pack_dtype": "int32",
        "dynamic": dynamic,
        "meta": {"quantizer": [f"eacmoe-lightning:{__version__}"]},
    }


def _pattern(weight: WeightGrid, weights: list[WeightGrid], linears: list[str], fuses: bool) -> str:
    """A regular expression for one weight's linears, under their checkpoint names and those in transformers; if readers
    fuse linears, also under the name of the whole, and whatever they have before the number of the layer."""
    path = weight.name[: re.match(r"\D*\d+\.", weight.name).end()]
    layer = r".*\b" + re.escape(".".join(path.rsplit(".", 3)[-3:])) if fuses else re.escape(path)
    if weight.part != "experts":
        names = {*linears, weight.name.removesuffix(".weight")}
        if fuses:
            names |= {whole for name in names for whole in wholes_of(name)}
        return "|".join(f"{layer}{re.escape(name.removeprefix(path))}$" for name in sorted(names))
    siblings = [w for w in weights if w.part == "experts" and w.block == weight.block]
    if len({(w.bits, w.group_size) for w in siblings}) == 1:
        return rf"{layer}.*\bexperts(\.|$)"
    ids = r"\d+" if weight.experts is None else f"({'|'.join(map(str, weight.experts))})"
    projection = weight.name.rpartition(".")[2]
    names = {name.rpartition(".")[2] for name in linears}
    names |= {"gate_proj", "up_proj"} if projection == "gate_up_proj" else {projection}
    return rf"{layer}.*\bexperts\.{ids}\.({'|'.join(sorted(names))})$"


# --- decoding, for the check: written from the format's definition alone, in NumPy


def grid_of(linear: str, config: dict[str, Any]) -> tuple[int, int]:
    """Bits and group size that a reader uses for a module of this name."""
    for pattern, override in config["dynamic"].items():
        if pattern.startswith("+:") and re.match(pattern.removeprefix("+:"), linear):
            return override["bits"], override["group_size"]
    return config["bits"], config["group_size"]


def decode(tensors: dict[str, Tensor], config: dict[str, Any]) -> dict[str, Tensor]:
    """The weights [O, I] float32 that a reader of the format gets, and the other tensors unchanged.

    Raises:
        ValueError: the shapes do not fit the config.
    """
    tensors, weights = dict(tensors), {}
    for name in [name for name in tensors if name.endswith(".qweight")]:
        linear = name.removesuffix(".qweight")
        qweight, qzeros, scales, g_idx = (tensors.pop(f"{linear}.{suffix}").numpy() for suffix in SUFFIXES)
        bits, group_size = grid_of(linear, config)
        (in_features,), (groups, out_features) = g_idx.shape, scales.shape
        if qweight.shape != (in_features * bits // 32, out_features) or groups != in_features // group_size:
            raise ValueError(
                f"{linear}: qweight is {qweight.shape} and scales are {scales.shape}, which does not fit "
                f"{out_features} x {in_features} at {bits} bits in groups of {group_size}"
            )
        codes = read_bits(qweight.T, bits)  # [O, I]
        zero_point = read_bits(qzeros, bits) + (config["checkpoint_format"] == "gptq")  # [G, O]
        steps = codes.T - zero_point[g_idx]  # [I, O]
        weights[f"{linear}.weight"] = torch.from_numpy((steps.astype(np.float32) * scales[g_idx].astype(np.float32)).T)
    return weights | tensors


def read_bits(words: np.ndarray, bits: int) -> np.ndarray:
    """int32 [R, W] -> int32 [R, W * 32 / bits], starting at the lowest bit of the first word."""
    stream = np.unpackbits(np.ascontiguousarray(words).view(np.uint8), axis=1, bitorder="little")
    return stream.reshape(len(words), -1, bits).astype(np.int32) @ (1 << np.arange(bits, dtype=np.int32))
