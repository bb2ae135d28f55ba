"""compressed-tensors, the format of llm-compressor and vLLM."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from eacmoe_lightning.models.decoding.arithmetic import FLOAT8, exponents, scaled, spread, unpack_fp4, unpack_words
from eacmoe_lightning.models.decoding.scheme import REMEDY, Scheme, Split, require
from eacmoe_lightning.models.weight_files import Stored


class CompressedTensors(Scheme):
    """Integers packed in words, int8, float8 and FP4, as the library compressed-tensors stores them."""

    SCALES = ("scale", "global_scale")
    FORMATS = (
        *("pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "dense", "mixed-precision"),
        *("nvfp4-pack-quantized", "mxfp4-pack-quantized", "mxfp8-quantized"),
    )

    def __init__(self, config: Mapping[str, Any], stored: Mapping[str, Stored]) -> None:
        if config.get("transform_config"):
            raise ValueError(
                "its weights are rotated (`transform_config` of compressed-tensors), and only engines that rotate the "
                "activations too can run them"
            )
        groups = (config.get("config_groups") or {}).values()
        formats = [config.get("format"), *(group.get("format") for group in groups)]
        formats.append((config.get("sparsity_config") or {}).get("format"))
        if unknown := [form for form in formats if form and form not in self.FORMATS]:
            raise ValueError(
                f"it is in the format {unknown[0]} of compressed-tensors, and only {', '.join(self.FORMATS)} can be "
                "decoded: pass the full-precision model that it was made of"
            )
        self._weights = [group["weights"] for group in groups if group.get("weights")]
        self._blocks = [block for weights in self._weights if (block := _block_of(weights)) is not None]
        super().__init__(config, stored)

    @property
    def split(self) -> Split | None:
        return "alternating"  # llm-compressor and AutoRound

    def find(self, stored: Mapping[str, Stored]) -> dict[str, dict[str, str]]:
        parts = {}
        for key in stored:
            if not key.endswith("weight_scale"):
                continue
            name = key.removesuffix("_scale")
            kinds = ("packed", "zero_point", "shape", "g_idx", "global_scale")
            found = {kind: f"{name}_{kind}" for kind in kinds if f"{name}_{kind}" in stored} | {"scale": key}
            if name in stored:
                found["weight"] = name
            if "packed" in found:
                kind = stored[found["packed"]].dtype
                if kind not in (torch.int32, torch.uint8):
                    raise ValueError(f"{found['packed']} holds neither integers in 32-bit words nor FP4 in bytes")
                if kind == torch.int32:
                    require(found["packed"], found, ("shape",))
            if "packed" in found or "weight" in found:
                parts[name] = found
        return parts

    def decode(self, key: str, parts: Mapping[str, Tensor]) -> Tensor:
        scale = parts["scale"]
        if "packed" in parts and parts["packed"].dtype == torch.uint8:
            return self._decode_fp4(key, parts)
        if "packed" in parts:
            shape = parts["shape"].tolist()
            bits = self._bits(key, parts["packed"].shape[-1], shape[-1])
            codes = unpack_words(parts["packed"], bits)[..., : shape[-1]] - 2 ** (bits - 1)
            zero_point = parts.get("zero_point")
            if zero_point is not None and zero_point.dtype == torch.int32:  # packed along the rows; int8 before 0.10
                zero_point = unpack_words(zero_point.mT, bits)[..., : shape[-2]].mT - 2 ** (bits - 1)
        elif (weight := parts["weight"]).dtype in FLOAT8:
            decoded = scaled(key, weight, scale, self._block(key, scale, weight))
            if ".experts." in key or scale.dtype == torch.uint8:  # exponents: bfloat16 would lose nothing either
                return decoded
            return decoded.to(scale.dtype)  # as transformers decodes the two
        else:
            codes, zero_point, bits = weight.int(), parts.get("zero_point"), None
        if zero_point is None and self._is_asymmetric(bits):
            raise ValueError(f"{key} has no zero points, and config_groups says that it is not symmetric: {REMEDY}")
        if zero_point is not None:
            zero_point = zero_point.int()
        group = parts.get("g_idx")
        scale, zero_point = (
            None if grid is None else spread(key, grid, codes.shape, self._block(key, grid, codes), group)
            for grid in (scale, zero_point)
        )
        steps = codes if zero_point is None else codes - zero_point
        return (steps.float() * scale.float()).to(scale.dtype)  # the scale's dtype is that of the library's product

    def _decode_fp4(self, key: str, parts: Mapping[str, Tensor]) -> Tensor:
        values, scale = unpack_fp4(parts["packed"]), parts["scale"]
        scale = exponents(scale) if scale.dtype == torch.uint8 else scale.float()
        if (whole := parts.get("global_scale")) is not None:
            scale = scale / whole.float()
        return (values * spread(key, scale, values.shape, None)).bfloat16()  # which the library makes of it

    def _block(self, key: str, grid: Tensor, weight: Tensor) -> tuple[int, int] | None:
        """The rows and columns of a weight that share a value of the grid, as the groups of the config have it.

        Raises:
            ValueError: several fit, and differ.
        """
        shape = weight.shape[-2:]
        fitting = [
            block
            for block in self._blocks
            if grid.shape[-2:] == tuple(-(-size // width) for size, width in zip(shape, block, strict=True))
        ]
        if len({tuple(map(min, block, shape)) for block in fitting}) > 1:
            raise ValueError(
                f"{key}: its scales {tuple(grid.shape)} are of blocks of {fitting[0]} or of {fitting[1]} "
                f"(config_groups in its config.json): {REMEDY}"
            )
        return fitting[0] if fitting else next((block for block in self._blocks if block[0] > 1), None)

    def _is_asymmetric(self, bits: int | None) -> bool:
        """Whether all weights of this width (None: of every width) have zero points by the config."""
        grids = [weights for weights in self._weights if bits in (None, weights["num_bits"])]
        return bool(grids) and all(weights.get("symmetric") is False for weights in grids)

    def _bits(self, key: str, words: int, in_features: int) -> int:
        """The width of codes of which `in_features` take this number of words."""
        widths = {weights["num_bits"] for weights in self._weights}
        fitting = [bits for bits in sorted(widths) if -(-in_features * bits // 32) == words]
        if len(fitting) != 1:
            raise ValueError(
                f"{key}: {words} words for {in_features} inputs are not codes of {sorted(widths)} bits, one after "
                f"another (config_groups): {REMEDY}"
            )
        return fitting[0]

    def describe(self) -> str:
        kinds = sorted({f"{weights['num_bits']}-bit {weights['type']}" for weights in self._weights})
        return f"compressed-tensors, {' and '.join(kinds)}"


def _block_of(weights: Mapping[str, Any]) -> tuple[int, int] | None:
    """The rows and columns of a block in one group of the config; None: it has no blocks.

    Raises:
        ValueError: the config says no two sizes.
    """
    block, group_size = weights.get("block_structure"), weights.get("group_size") or 0
    if not block:
        return (1, group_size) if group_size > 0 else None
    sizes = block.lower().split("x") if isinstance(block, str) else block
    try:
        rows, columns = map(int, sizes)
    except (TypeError, ValueError):
        rows = columns = 0
    if min(rows, columns) < 1:
        raise ValueError(f"block_structure={block!r} in `quantization_config` of its config.json is not two sizes")
    return rows, columns
