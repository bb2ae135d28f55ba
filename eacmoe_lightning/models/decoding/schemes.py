"""Decodes quantized originals: each scheme's tensors on disk become ordinary weights under their ordinary keys.

What is stored for a weight `X.weight` [O, I], by `quant_method`:

    fp8, fbgemm_fp8     X.weight in float8 (or two FP4 values a byte); X.weight_scale_inv or X.weight_scale for each
                        block, each row or the whole weight
    mxfp4               X_blocks [E, O, G, 16], two FP4 values a byte; X_scales [E, O, G]; X is [E, G * 32, O]
    compressed-tensors  X.weight_packed (int32; uint8: two FP4 values a byte) or X.weight (int8, float8);
                        X.weight_scale (uint8: exponents), _zero_point, _shape, _g_idx, _global_scale
    gptq                X.qweight [I * b / 32, O]; X.qzeros and X.scales [G, O]; X.g_idx [I]
    awq                 X.qweight [I, O * b / 32]; X.qzeros and X.scales [G, O]
    auto-round          as gptq or awq, by its `packing_format`
    modelopt            X.weight in float8 as above; or two FP4 values a byte, X.weight_scale and X.weight_scale_2; for
                        both X.pre_quant_scale [I], if the layer scales its inputs

Symmetric weights may come without X.qzeros.

Where transformers decodes a scheme itself, the values are those that it gives. Tensors say what is quantized: a weight
that is stored alone is an ordinary one, whatever the config lists as left out.

Letters: O/I out/in features, G groups of inputs, b bits, E experts.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from eacmoe_lightning.models.decoding.compressed_tensors import CompressedTensors
from eacmoe_lightning.models.decoding.floats import MXFP4, Float8, ModelOpt
from eacmoe_lightning.models.decoding.scheme import Scheme
from eacmoe_lightning.models.decoding.words import AWQ, GPTQ, auto_round
from eacmoe_lightning.models.weight_files import Stored

# what engines store for activations and the cache of keys and values: no weight depends on it
ACTIVATIONS = re.compile(
    r"(^|[._])(activation_scale|input_scale|input_scale_inv|input_zero_point|input_global_scale|output_scale"
    r"|qscale_act|[qkv]_scale|kv_scale|prob_scale)$"
)
# what is left of a quantized checkpoint whose config is lost
QUANTIZED = re.compile(
    r"(_scale_inv|weight_scale|_scales|\.scales|qscale_weight|_blocks|\.qweight|\.qzeros|\.g_idx|weight_packed"
    r"|weight_zero_point|weight_g_idx|weight_global_scale|weight_scale_2|pre_quant_scale|\.absmax|\.quant_map|\.nested_absmax"
    r"|\.nested_quant_map|quant_state\.\w+|\.SCB|\.weight_format)$"
)

SCHEMES: dict[str, Callable[[Mapping[str, Any], Mapping[str, Stored]], Scheme]] = {
    "fp8": Float8,
    "fbgemm_fp8": Float8,
    "mxfp4": MXFP4,
    "compressed-tensors": CompressedTensors,
    "gptq": GPTQ,
    "awq": AWQ,
    "auto-round": auto_round,
    "modelopt": ModelOpt,
}
ALIASES = {  # other names, of older versions of the programs and of engines
    "auto_round": "auto-round",
    "intel/auto-round": "auto-round",
    "gptqmodel": "gptq",
    "modelopt_fp4": "modelopt",
    "modelopt_mixed": "modelopt",
    "modelopt_mxfp8": "modelopt",
}


def scheme_of(config: Mapping[str, Any], stored: Mapping[str, Stored]) -> Scheme:
    """The scheme of a `quantization_config`.

    Raises:
        ValueError: it cannot be decoded.
    """
    method = _method(config)
    if method not in SCHEMES:
        raise ValueError(
            f"it is quantized by {method or 'an unnamed method'} (`quantization_config` in its config.json), and only "
            f"{', '.join(SCHEMES)} can be decoded: pass the full-precision model that it was made of"
        )
    return SCHEMES[method](config, stored)


def _method(config: Mapping[str, Any]) -> str:
    method = str(config.get("quant_method", "")).lower()
    return ALIASES.get(method, method)


def stored_bits(config: Mapping[str, Any]) -> float:
    """Bits on disk per quantized weight, with scales and zero points, by its `quantization_config`."""
    method = _method(config)
    if method == "compressed-tensors":
        groups = [group["weights"] for group in config["config_groups"].values() if group.get("weights")]
        sizes = [(weights["num_bits"], weights.get("group_size") or 0) for weights in groups]
        return max(bits + (16 / group_size if group_size > 0 else 0) for bits, group_size in sizes)
    if method in ("gptq", "awq", "auto-round"):
        bits, group_size = config.get("bits") or 4, config.get("group_size") or 128
        return bits + ((16 + bits) / group_size if group_size > 0 else 0)
    if method == "modelopt" and "NVFP4" in str(config.get("quant_algo")).upper():
        return 4.5
    return 4.25 if method == "mxfp4" else 8.0
