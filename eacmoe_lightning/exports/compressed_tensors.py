"""The `pack-quantized` format of compressed-tensors, which transformers, vLLM and SGLang read.

Per linear [O, I] with G groups of inputs and b bits:

    weight_packed      int32 [O, I * b / 32]    codes along the inputs, a little-endian stream of bits
    weight_scale       [O, G]
    weight_zero_point  int32 [O * b / 32, G]    along the outputs, packed the same way; only of asymmetric weights
    weight_shape       int64 [2]                O and I

The format's codes and zero points are signed, -2^(b-1) .. 2^(b-1) - 1, and stored with 2^(b-1) added, which makes them
exactly ours. `config_groups` says which linears have which grid. Routers and everything else that is not quantized are
listed under `ignore`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from eacmoe_lightning.exports.check import Difference, Reference
from eacmoe_lightning.exports.checkpoint import check_draft, write_checkpoint
from eacmoe_lightning.exports.gptq import read_bits, to_int32
from eacmoe_lightning.exports.source import Source
from eacmoe_lightning.models.draft import draft_prefixes
from eacmoe_lightning.quantization.grid import Quantized
from eacmoe_lightning.target_rules import Target
from eacmoe_lightning.weight_grids import WeightGrid, fused_names

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
    linears, symmetric = source.linear_names(row.names), symmetry(weights)
    has_none = {name: symmetric[scheme_of(weight)] for weight in weights for name in linears[weight.name]}

    def shards() -> Iterator[dict[str, Tensor]]:
        for shard in source.shards(row.names):
            tensors = dict(shard.dense)
            for linear in shard.linears:
                tensors |= to_tensors(linear.name, linear.quantized, source.dtype, has_none[linear.name])
            yield tensors

    ignored = source.unquantized_modules()
    ignored += fused_names(ignored) + [f"re:{re.escape(prefix)}.*" for prefix in draft_prefixes(source.draft)]
    config = quantization_config(weights, linears, ignored)
    write_checkpoint(source, directory, shards(), config)


def read_back(source: Source, row: Target, directory: Path) -> Difference:
    """Reloads the export with transformers in a fresh process, or where that cannot, decodes it by the format's rules.

    transformers drops zero points of experts and knows one scheme for all of them.
    """
    check_draft(source, directory)
    config = json.loads((directory / "config.json").read_text())["quantization_config"]
    groups = config["config_groups"].values()
    one_scheme = sum(any(is_experts(target) for target in group["targets"]) for group in groups) == 1
    if one_scheme and all(group["weights"]["symmetric"] for group in groups):
        return Reference(source).compare_loaded(directory)
    decoded: dict[str, Tensor] = {}
    for file in sorted(directory.glob("*.safetensors")):
        decoded |= decode(load_file(file), config)
    decoded = {name: tensor for name, tensor in decoded.items() if name not in source.draft}
    return Reference(source).compare_decoded(source, decoded, directory)


def to_tensors(linear: str, quantized: Quantized, dtype: torch.dtype, symmetric: bool) -> dict[str, Tensor]:
    """The tensors of one linear, by name in the checkpoint.

    Args:
        linear: module name.
        quantized: codes [O, I].
        dtype: the model's. Readers multiply in the dtype of the scale, so scales are stored as float16 for a float16
            model and as float32, which is exact, for any other.
        symmetric: whether no zero points are stored; they are the middle code then.
    """
    codes = torch.nn.functional.pad(quantized.codes, (0, -quantized.codes.shape[-1] % 32))
    tensors = {
        f"{linear}.weight_packed": to_int32(codes, quantized.bits),
        f"{linear}.weight_scale": quantized.scale.to(torch.float16 if dtype == torch.float16 else torch.float32),
        f"{linear}.weight_shape": torch.tensor(quantized.codes.shape, dtype=torch.int64),
    }
    if not symmetric:
        zero_point = torch.nn.functional.pad(quantized.zero_point, (0, 0, 0, -len(quantized.zero_point) % 32))
        tensors[f"{linear}.weight_zero_point"] = to_int32(zero_point.T.contiguous(), quantized.bits).T.contiguous()
    return tensors


def scheme_of(weight: WeightGrid) -> tuple[int, int, bool]:
    """What weights of one config group have in common: bits, group size, and whether they are experts."""
    return weight.bits, weight.group_size, weight.part == "experts"


def symmetry(weights: list[WeightGrid]) -> dict[tuple[int, int, bool], bool]:
    """By scheme, whether all of its weights are symmetric, so that no zero points are stored."""
    return {key: all(w.symmetric for w in weights if scheme_of(w) == key) for key in map(scheme_of, weights)}


def quantization_config(weights: list[WeightGrid], linears: dict[str, list[str]], ignored: list[str]) -> dict[str, Any]:
    """The `quantization_config` of config.json.

    Args:
        weights: every quantized weight; the experts of a block have one grid.
        linears: module names of each weight's linears in the original, by parameter name.
        ignored: modules with matrices that are not quantized.
    """
    symmetric = symmetry(weights)
    experts = [weight for weight in weights if weight.part == "experts"]
    one_scheme = len({(weight.bits, weight.group_size) for weight in experts}) == 1
    targets: dict[tuple[int, int, bool], list[str]] = {}
    for weight in sorted(weights, key=lambda w: w.part != "experts"):  # the experts' groups first
        names = [EXPERTS if one_scheme else experts_of(weight)] if weight.part == "experts" else linears[weight.name]
        group_targets = targets.setdefault(scheme_of(weight), [])
        group_targets.extend(name for name in names if name not in group_targets)
    groups = {
        f"group_{i}": {
            # SGLang compares the class of a linear that it fuses before the names of its parts, so wholes are named.
            "targets": names + fused_names(names),
            "weights": {
                "num_bits": bits,
                "type": "int",
                "symmetric": symmetric[bits, group_size, is_expert],
                "strategy": "group",
                "group_size": group_size,
                "dynamic": False,
            },
            "input_activations": None,
            "output_activations": None,
            "format": "pack-quantized",
        }
        for i, ((bits, group_size, is_expert), names) in enumerate(targets.items())
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "version": LIBRARY,
        "config_groups": groups,
        "ignore": ignored,
    }


def experts_of(weight: WeightGrid) -> str:
    """The target of the experts in a weight's block, under the names of the checkpoint and of any engine."""
    layers, number = re.match(r"(?:.*?\.)?(\w+)\.(\d+)\.", weight.name).groups()
    return rf"re:.*\b{layers}\.{number}\..*\.experts\.\d+\..*"


def is_experts(target: str) -> bool:
    return target.startswith("re:") and target.endswith(EXPERTS.removeprefix("re:.*"))


# --- decoding, for the check: written from the format's definition alone, in NumPy


def grid_of(linear: str, config: dict[str, Any]) -> dict[str, Any]:
    """The scheme that a reader uses for a linear of this name.

    Raises:
        ValueError: there is none.
    """
    for group in config["config_groups"].values():
        for target in group["targets"]:
            if re.match(target[3:], linear) if target.startswith("re:") else target == linear:
                return group["weights"]
    raise ValueError(f"{linear} is packed, but no target of config_groups names it")


def decode(tensors: dict[str, Tensor], config: dict[str, Any]) -> dict[str, Tensor]:
    """The weights [O, I] float32 that a reader of the format gets, and the other tensors unchanged.

    Raises:
        ValueError: the shapes do not fit the config.
    """
    tensors, weights = dict(tensors), {}
    for name in [name for name in tensors if name.endswith(".weight_packed")]:
        linear = name.removesuffix(".weight_packed")
        scheme = grid_of(linear, config)
        bits, group_size = scheme["num_bits"], scheme["group_size"]
        packed, scale, shape = (tensors.pop(f"{linear}.weight_{kind}").numpy() for kind in ("packed", "scale", "shape"))
        out_features, in_features = (int(n) for n in shape)
        if packed.shape != (out_features, -(-in_features * bits // 32)) or scale.shape[1] * group_size != in_features:
            raise ValueError(
                f"{linear}: weight_packed is {packed.shape} and weight_scale is {scale.shape}, which does not fit "
                f"{out_features} x {in_features} at {bits} bits in groups of {group_size}"
            )
        steps = read_bits(packed, bits)[:, :in_features].astype(np.float32)  # [O, I]
        if scheme["symmetric"]:
            zero_point = np.full(scale.shape, 2 ** (bits - 1), dtype=np.float32)
        else:
            zero_point = read_bits(tensors.pop(f"{linear}.weight_zero_point").numpy().T, bits).T[:out_features]
        steps -= zero_point.repeat(group_size, axis=1)
        weights[f"{linear}.weight"] = torch.from_numpy(steps * scale.astype(np.float32).repeat(group_size, axis=1))
    return weights | tensors
