"""The `pack-quantized` format of compressed-tensors, which transformers, vLLM and SGLang read.

Per linear [O, I] with G groups of inputs and b bits:

    weight_packed  int32 [O, I * b / 32]    codes along the inputs, a little-endian stream of bits
    weight_scale   [O, G]
    weight_shape   int64 [2]                O and I

The format's codes are signed, -2^(b-1) .. 2^(b-1) - 1, and stored with 2^(b-1) added, which makes them exactly the
codes of our symmetric grid. `config_groups` says which linears have which grid. Routers and everything else that is not
quantized are listed under `ignore`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eacmoe_lightning.exports.check import Difference, Reference
from eacmoe_lightning.exports.checkpoint import check_draft, write_checkpoint
from eacmoe_lightning.exports.gptq import to_int32
from eacmoe_lightning.exports.source import Source
from eacmoe_lightning.models.draft import draft_prefixes
from eacmoe_lightning.quantization.grid import Quantized
from eacmoe_lightning.targets import Target, WeightGrid

LIBRARY = "0.20.0"  # the release whose loader was tested
EXPERTS = r"re:.*\.experts\.\d+\..*"


def require_library() -> None:
    """Raises ValueError if the library that reloads the export is missing."""
    try:
        import compressed_tensors as library  # noqa: F401
    except ImportError as error:
        raise ValueError(
            "--format compressed-tensors checks the export with the library of that name, which is not installed: "
            'pip install "eacmoe-lightning[export]"'
        ) from error


def write(source: Source, weights: list[WeightGrid], row: Target, directory: Path) -> None:
    """Fills the directory with shards and config."""
    linears = source.linear_names(row.names)

    def shards() -> Iterator[dict[str, Tensor]]:
        for shard in source.shards(row.names):
            tensors = dict(shard.dense)
            for linear in shard.linears:
                tensors |= to_tensors(linear.name, linear.quantized, source.dtype)
            yield tensors

    draft = [f"re:{re.escape(prefix)}.*" for prefix in draft_prefixes(source.draft)]
    config = quantization_config(weights, linears, source.unquantized_modules() + draft)
    write_checkpoint(source, directory, shards(), config)


def read_back(source: Source, row: Target, directory: Path) -> Difference:
    """Reloads the export with transformers, which uses the library, in a fresh process."""
    check_draft(source, directory)
    return Reference(source).compare_loaded(directory)


def to_tensors(linear: str, quantized: Quantized, dtype: torch.dtype) -> dict[str, Tensor]:
    """The three tensors of one linear, by name in the checkpoint.

    Args:
        linear: module name.
        quantized: symmetric codes [O, I].
        dtype: the model's. Readers multiply in the dtype of the scale, so scales are stored as float16 for a float16
            model and as float32, which is exact, for any other.
    """
    codes = torch.nn.functional.pad(quantized.codes, (0, -quantized.codes.shape[-1] % 32))
    return {
        f"{linear}.weight_packed": to_int32(codes, quantized.bits),
        f"{linear}.weight_scale": quantized.scale.to(torch.float16 if dtype == torch.float16 else torch.float32),
        f"{linear}.weight_shape": torch.tensor(quantized.codes.shape, dtype=torch.int64),
    }


def quantization_config(weights: list[WeightGrid], linears: dict[str, list[str]], ignored: list[str]) -> dict[str, Any]:
    """The `quantization_config` of config.json.

    Args:
        weights: every quantized weight; all experts have one grid.
        linears: module names of each weight's linears in the original, by parameter name.
        ignored: modules with matrices that are not quantized.
    """
    targets: dict[tuple[int, int], list[str]] = {}
    for weight in sorted(weights, key=lambda w: w.part != "experts"):  # the experts' group first
        # SGLang looks for the experts' scheme under `Linear`; every other linear is named or ignored.
        names = [EXPERTS, "Linear"] if weight.part == "experts" else linears[weight.name]
        group_targets = targets.setdefault((weight.bits, weight.group_size), [])
        group_targets.extend(name for name in names if name not in group_targets)
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
