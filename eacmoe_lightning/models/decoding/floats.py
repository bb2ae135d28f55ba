"""Weights in float8, and in FP4 with a scale for each block."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from eacmoe_lightning.models.decoding.arithmetic import FLOAT8, scaled, spread, unpack_fp4
from eacmoe_lightning.models.decoding.scheme import Scheme, require
from eacmoe_lightning.models.weight_files import Stored

NVFP4_GROUP = 16  # inputs that share a scale
FLOAT8_BLOCK = (128, 128)  # rows and columns that share one in ModelOpt's float8 of blocks


class Float8(Scheme):
    """Scaled float8 and FP4: one scale for a block of the weight, a row or all of it."""

    def find(self, stored: Mapping[str, Stored]) -> dict[str, dict[str, str]]:
        parts = {}
        for key in stored:
            for weight in _scaled_by(key):
                if weight in stored and weight != key and stored[weight].dtype in (*FLOAT8, torch.int8):
                    parts[weight] = {"weight": weight, "scale": key}
        return parts

    def decode(self, key: str, parts: Mapping[str, Tensor]) -> Tensor:
        return scaled(key, parts["weight"], parts["scale"], self.block)

    @property
    def block(self) -> tuple[int, int] | None:
        """Rows and columns that share a scale, if the config says so."""
        size = self.config.get("weight_block_size")
        if not size:
            return None
        if len(size) != 2 or min(size) < 1:
            raise ValueError(f"weight_block_size={size} in `quantization_config` of its config.json is not two sizes")
        return tuple(size)

    def describe(self) -> str:
        return "float8" + (" in blocks of {} x {}".format(*self.block) if self.block else "")


class ModelOpt(Float8):
    """NVIDIA's: float8 with a scale for a weight, and NVFP4, whose scales for 16 inputs have a scale of their own."""

    ALGORITHMS = (
        *("FP8", "FP8_PER_CHANNEL_PER_TOKEN", "FP8_PB_WO", "FP8_BLOCK_SCALES", "MXFP8"),
        *("NVFP4", "NVFP4_AWQ", "W4A16_NVFP4", "MIXED_PRECISION"),
    )
    SCALES = ("scale", "whole")

    def __init__(self, config: Mapping[str, Any], stored: Mapping[str, Stored]) -> None:
        config = config.get("quantization") or config  # as in hf_quant_config.json
        algorithm = str(config.get("quant_algo") or "FP8").upper()
        if algorithm not in self.ALGORITHMS:
            raise ValueError(
                f"it is quantized by modelopt as {algorithm}, and only {', '.join(self.ALGORITHMS)} can be decoded: "
                "pass the full-precision model that it was made of"
            )
        super().__init__(config | {"quant_algo": algorithm}, stored)

    def find(self, stored: Mapping[str, Stored]) -> dict[str, dict[str, str]]:
        parts = super().find(stored)
        for whole in stored:
            scale = whole.removesuffix("_2")
            for key in _scaled_by(scale) if whole.endswith("_scale_2") else ():
                if key in stored and key != scale:
                    parts[key] = {"weight": key, "scale": scale, "whole": whole}
                    require(key, {kind: name for kind, name in parts[key].items() if name in stored}, ("scale",))
        for key, found in parts.items():
            before = key.removesuffix("weight") + "pre_quant_scale"
            if before in stored:
                found["before"] = before
        return parts

    def decode(self, key: str, parts: Mapping[str, Tensor]) -> Tensor:
        weight = self._decode_fp4(key, parts) if "whole" in parts else self._decode_float8(key, parts)
        before = parts.get("before")  # by which the layer multiplies its inputs
        return weight if before is None else weight * before.float()

    def _decode_float8(self, key: str, parts: Mapping[str, Tensor]) -> Tensor:
        scale = parts["scale"]
        if is_of_blocks := scale.ndim == 4 and scale.shape[1] == scale.shape[3] == 1:  # [rows, 1, columns, 1]
            scale = scale[:, 0, :, 0]
        in_blocks = is_of_blocks or "BLOCK" in self.config["quant_algo"] or "_PB_" in self.config["quant_algo"]
        return scaled(key, parts["weight"], scale, FLOAT8_BLOCK if in_blocks else self.block)

    def _decode_fp4(self, key: str, parts: Mapping[str, Tensor]) -> Tensor:
        values = unpack_fp4(parts["weight"])
        scale = parts["scale"].float() * parts["whole"].float()
        if scale.shape[-1] * NVFP4_GROUP != values.shape[-1]:
            raise ValueError(
                f"{key}: scales {tuple(scale.shape)} do not fit a weight {tuple(values.shape)}: NVFP4 has one for "
                f"{NVFP4_GROUP} inputs"
            )
        return values * spread(key, scale, values.shape, None)

    def describe(self) -> str:
        return f"ModelOpt {self.config['quant_algo']}"


class MXFP4(Scheme):
    """gpt-oss: FP4 in groups of 32 inputs that share an exponent, experts stacked and transposed."""

    def find(self, stored: Mapping[str, Stored]) -> dict[str, dict[str, str]]:
        names = [key.removesuffix("_blocks") for key in stored if key.endswith("_blocks")]
        return {n: {"blocks": f"{n}_blocks", "scales": f"{n}_scales"} for n in names if f"{n}_scales" in stored}

    def decode(self, key: str, parts: Mapping[str, Tensor]) -> Tensor:
        blocks, scales = parts["blocks"], parts["scales"]
        if blocks.shape[:-1] != scales.shape:
            raise ValueError(f"{key}: blocks {tuple(blocks.shape)} do not fit scales {tuple(scales.shape)}")
        *stack, rows, groups, width = blocks.shape
        weight = torch.empty(*stack, groups * width * 2, rows, dtype=torch.bfloat16)  # which holds every such value
        for expert in range(len(blocks)):
            values = torch.ldexp(unpack_fp4(blocks[expert]), scales[expert].int()[..., None] - 127)
            weight[expert] = values.flatten(-2).T
        return weight

    def describe(self) -> str:
        return "MXFP4"


def _scaled_by(key: str) -> Iterable[str]:
    """The keys of the weights that a tensor of this name may be the scale of."""
    for suffix, replacement in (
        ("_scale_inv", ""),
        ("weight_scale", "weight"),
        ("_weight_scale", ""),
        ("_scale", ""),
        (".scale", ".weight"),
        (".qscale_weight", ".weight"),
    ):
        if key.endswith(suffix):
            yield key.removesuffix(suffix) + replacement
