"""The `pack-quantized` format of compressed-tensors, which transformers, vLLM and SGLang read.

Per linear [O, I] with G groups of inputs and b bits:

    weight_packed  int32 [O, I * b / 32]    codes along the inputs, a little-endian stream of bits
    weight_scale   [O, G]
    weight_shape   int64 [2]                O and I

The format's codes are signed, -2^(b-1) .. 2^(b-1) - 1, and stored with 2^(b-1) added: these are the codes of our
symmetric grid as they are. `config_groups` says which linears have which grid; routers and everything else that is not
quantized stand under `ignore`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eacmoe_lightning.exports.check import Difference, Reference
from eacmoe_lightning.exports.checkpoint import write_checkpoint
from eacmoe_lightning.exports.gptq import to_int32
from eacmoe_lightning.exports.source import Source
from eacmoe_lightning.quantization.grid import Quantized
from eacmoe_lightning.targets import Target, WeightGrid

LIBRARY = "0.20.0"  # the release whose loader was tried
EXPERTS = r"re:.*\.experts\.\d+\..*"  # beside it `Linear`, where SGLang looks for the experts' scheme; no other is left


def require_library() -> None:
    """Raises ValueError where the library is missing that reads the result back."""
    try:
        import compressed_tensors as library  # noqa: F401
    except ImportError as error:
        raise ValueError(
            "--format compressed-tensors reads its result back with that library: "
            'pip install "eacmoe-lightning[export]"'
        ) from error


def write(source: Source, weights: list[WeightGrid], row: Target, directory: Path) -> None:
    """Fills the directory.

    Raises:
        ValueError: the original keeps the experts of a block in one tensor.
    """
    linears = source.linear_names(row.names)

    def shards() -> Iterator[dict[str, Tensor]]:
        for shard in source.shards():
            tensors = source.original_names(shard.dense)
            for linear in shard.linears:
                tensors |= to_tensors(linear.original, linear.quantized, source.dtype)
            yield tensors

    config = quantization_config(weights, linears, source.unquantized_modules())
    write_checkpoint(source, directory, shards(), config)


def read_back(source: Source, row: Target, directory: Path) -> Difference:
    """Opened by transformers, and through it by the library, in a fresh process."""
    return Reference(source).compare_loaded(directory)


def to_tensors(linear: str, quantized: Quantized, dtype: torch.dtype) -> dict[str, Tensor]:
    """The three tensors of one linear by their names in the checkpoint.

    Args:
        linear: module name.
        quantized: symmetric codes [O, I].
        dtype: of the model. Readers multiply in the scale's dtype: float16 where the model has it, else float32, in
            which our scales lose nothing.
    """
    codes = torch.nn.functional.pad(quantized.codes, (0, -quantized.codes.shape[-1] % 32))
    return {
        f"{linear}.weight_packed": to_int32(codes, quantized.bits),
        f"{linear}.weight_scale": quantized.scale.to(torch.float16 if dtype == torch.float16 else torch.float32),
        f"{linear}.weight_shape": torch.tensor(quantized.codes.shape, dtype=torch.int64),
    }


def quantization_config(weights: list[WeightGrid], linears: dict[str, list[str]], ignored: list[str]) -> dict[str, Any]:
    """The entry of config.json.

    Args:
        weights: every quantized weight, all experts with one grid.
        linears: the original's module names of each, by parameter name.
        ignored: modules with matrices that are not quantized.
    """
    targets: dict[tuple[int, int], list[str]] = {}
    for weight in sorted(weights, key=lambda w: w.part != "experts"):  # the experts' group first
        names = [EXPERTS, "Linear"] if weight.part == "experts" else linears[weight.name]
        own = targets.setdefault((weight.bits, weight.group_size), [])
        own.extend(name for name in names if name not in own)
    groups = {
        f"group_{i}": {
            "targets": names,
            "weights": {
                "num_bits": bits,
                "type": "int",
                "symmetric": True,
                "strategy": "group",
                "group_size": group_size,
                "dynamic": False,
            },
            "input_activations": None,
            "output_activations": None,
            "format": "pack-quantized",
        }
        for i, ((bits, group_size), names) in enumerate(targets.items())
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "version": LIBRARY,
        "config_groups": groups,
        "ignore": ignored,
    }
