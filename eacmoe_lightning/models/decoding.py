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
    modelopt            X.weight in float8 as above; or two FP4 values a byte, X.weight_scale and X.weight_scale_2

Symmetric weights may come without X.qzeros.

Where transformers decodes a scheme itself, the values are those that it gives. Tensors say what is quantized: a weight
that is stored alone is an ordinary one, whatever the config lists as left out.

Letters: O/I out/in features, G groups of inputs, b bits, E experts.
"""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from eacmoe_lightning.models.weight_files import Stored

FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)  # e2m1
FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
# what engines store for activations and the cache of keys and values: no weight depends on it
ACTIVATIONS = re.compile(
    r"(^|[._])(activation_scale|input_scale|input_scale_inv|input_zero_point|input_global_scale|output_scale"
    r"|qscale_act|[qkv]_scale|kv_scale|prob_scale)$"
)
# what is left of a quantized checkpoint whose config is lost
QUANTIZED = re.compile(
    r"(_scale_inv|weight_scale|_scales|\.scales|qscale_weight|_blocks|\.qweight|\.qzeros|\.g_idx|weight_packed"
    r"|weight_zero_point|weight_g_idx|weight_global_scale|weight_scale_2|\.absmax|\.quant_map|\.nested_absmax"
    r"|\.nested_quant_map|quant_state\.\w+|\.SCB|\.weight_format)$"
)


# root mean squares of weights: beyond these no model has any, and those that models have
SMALLEST, LARGEST, PLAUSIBLE = 1e-6, 30.0, (1e-4, 3.0)
REMEDY = "the files or their config.json (--model.name_or_path) were changed: download them again"


class Scheme(ABC):
    """How one quantization method stores weights.

    Args:
        config: the `quantization_config` of the original's config.json.
        stored: every tensor on disk.

    Attributes:
        SCALES: which of a weight's tensors scale it.
        parts: by ordinary key of each quantized weight, the keys on disk that it is made of, by what they are.
        description: what the report says about the original.

    Raises:
        ValueError: the original uses a variant that cannot be decoded.
    """

    SCALES: tuple[str, ...] = ("scale", "scales")

    def __init__(self, config: Mapping[str, Any], stored: Mapping[str, Stored]) -> None:
        self.config = config
        self.parts: dict[str, dict[str, str]] = self.find(stored)
        self.description: str = self.describe()

    @abstractmethod
    def find(self, stored: Mapping[str, Stored]) -> dict[str, dict[str, str]]:
        """The value of `parts`."""

    @abstractmethod
    def decode(self, key: str, parts: Mapping[str, Tensor]) -> Tensor:
        """The weight with this ordinary key, from its tensors by what they are."""

    def checked(self, key: str, parts: Mapping[str, Tensor]) -> Tensor:
        """The same, if it can be the weight of a model.

        Raises:
            ValueError: it holds NaN, or its size says that a scale is stored as its reciprocal.
        """
        weight = self.decode(key, parts)
        size = root_mean_square(weight)
        if not math.isfinite(size):
            raise ValueError(f"{key} decodes to NaN or infinite values as {self.description}: {REMEDY}")
        if not size or SMALLEST < size < LARGEST:
            return weight
        for kind in self.SCALES:
            if kind in parts and parts[kind].is_floating_point():
                reciprocal = {kind: parts[kind].float().reciprocal()}
                other = root_mean_square(self.decode(key, {**parts, **reciprocal}))
                if PLAUSIBLE[0] < other < PLAUSIBLE[1]:
                    raise ValueError(
                        f"{key} decodes to weights of {size:.2g} (root mean square) as {self.description}, and to "
                        f"{other:.2g} if {self.parts[key][kind]} were the reciprocal of the scale: another program has "
                        "stored scales that divide, or has changed them. Pass a model with scales that multiply "
                        "(--model.name_or_path)"
                    )
        return weight

    @abstractmethod
    def describe(self) -> str:
        """The value of `description`."""


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
        return tuple(size) if size else None

    def describe(self) -> str:
        return "float8" + (" in blocks of {} x {}".format(*self.block) if self.block else "")


class ModelOpt(Float8):
    """NVIDIA's: float8 with a scale for a weight, and NVFP4, whose scales for 16 inputs have a scale of their own."""

    ALGORITHMS = ("FP8", "NVFP4", "MIXED_PRECISION")
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
            key = whole.removesuffix("_scale_2")
            if key != whole and key in stored:
                parts[key] = {"weight": key, "scale": f"{key}_scale", "whole": whole}
                _require(key, {kind: name for kind, name in parts[key].items() if name in stored}, ("scale",))
        return parts

    def decode(self, key: str, parts: Mapping[str, Tensor]) -> Tensor:
        if "whole" not in parts:
            return super().decode(key, parts)
        values = unpack_fp4(parts["weight"])
        scale = parts["scale"].float() * parts["whole"].float()
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
        super().__init__(config, stored)

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
                    _require(found["packed"], found, ("shape",))
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
            decoded = scaled(key, weight, scale, self._block)
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
            None if grid is None else spread(key, grid, codes.shape, self._block, group) for grid in (scale, zero_point)
        )
        steps = codes if zero_point is None else codes - zero_point
        return (steps.float() * scale.float()).to(scale.dtype)  # the scale's dtype is that of the library's product

    def _decode_fp4(self, key: str, parts: Mapping[str, Tensor]) -> Tensor:
        values, scale = unpack_fp4(parts["packed"]), parts["scale"]
        scale = exponents(scale) if scale.dtype == torch.uint8 else scale.float()
        if (whole := parts.get("global_scale")) is not None:
            scale = scale / whole.float()
        return (values * spread(key, scale, values.shape, None)).bfloat16()  # which the library makes of it

    @property
    def _block(self) -> tuple[int, int] | None:
        blocks = [weights["block_structure"] for weights in self._weights if weights.get("block_structure")]
        return tuple(blocks[0]) if blocks else None

    def _is_asymmetric(self, bits: int | None) -> bool:
        """Whether all weights of this width (None: of every width) have zero points by the config."""
        grids = [weights for weights in self._weights if bits in (None, weights["num_bits"])]
        return bool(grids) and all(weights.get("symmetric") is False for weights in grids)

    def _bits(self, key: str, words: int, in_features: int) -> int:
        """The width of codes of which `in_features` take this number of words."""
        widths = {weights["num_bits"] for weights in self._weights}
        fitting = [bits for bits in sorted(widths) if -(-in_features * bits // 32) == words]
        if len(fitting) != 1 or 32 % fitting[0]:
            raise ValueError(
                f"{key}: {words} words for {in_features} inputs are not codes of {sorted(widths)} bits "
                "(config_groups); 2, 4 and 8 bits are known"
            )
        return fitting[0]

    def describe(self) -> str:
        kinds = sorted({f"{weights['num_bits']}-bit {weights['type']}" for weights in self._weights})
        return f"compressed-tensors, {' and '.join(kinds)}"


class GPTQ(Scheme):
    """Codes packed along the inputs; the inputs of a group are listed in `g_idx` (activation order)."""

    def __init__(self, config: Mapping[str, Any], stored: Mapping[str, Stored]) -> None:
        form = config.get("checkpoint_format") or config.get("format") or "gptq"
        form = "marlin" if config.get("is_marlin_format") else form
        if form not in ("gptq", "gptq_v2"):
            raise ValueError(
                f"it is GPTQ in the format {form!r}, in the order of a kernel, and only 'gptq' and 'gptq_v2' can be "
                "decoded: pass the model that it was made of"
            )
        super().__init__(config, stored)

    def find(self, stored: Mapping[str, Stored]) -> dict[str, dict[str, str]]:
        return _words(stored, ("qweight", "qzeros", "scales", "g_idx"), self.config.get("sym") is True)

    def decode(self, key: str, parts: Mapping[str, Tensor]) -> Tensor:
        qweight, scales, qzeros, group = (parts.get(kind) for kind in ("qweight", "scales", "qzeros", "g_idx"))
        groups, out_features = scales.shape
        if group is not None and not group.numel():
            group = None
        if qzeros is not None and qzeros.numel():
            bits = qzeros.shape[1] * 32 // out_features
        else:
            qzeros, bits = None, self._bits(len(qweight), groups, group)
        codes = unpack_words(qweight.T, bits)  # [O, I]
        in_features = codes.shape[-1]
        if group is None:
            group = torch.arange(in_features) // -(-in_features // groups)
        group = group.long()
        zero_point: Tensor | int = 2 ** (bits - 1)
        if qzeros is not None:
            zero_point = self._zero_point(key, codes, unpack_words(qzeros, bits).T[:, group], bits)
        return (codes - zero_point).float() * scales.float().T[:, group]

    def _bits(self, words: int, groups: int, group: Tensor | None) -> int:
        """The width of codes that take this number of words along the inputs."""
        if group is not None:
            return words * 32 // group.numel()
        group_size = self.config.get("group_size") or -1
        return words * 32 // (groups * group_size) if group_size > 0 else self.config["bits"]

    def _zero_point(self, key: str, codes: Tensor, stored: Tensor, bits: int) -> Tensor | int:
        """The zero point of each code [O, I], from what is stored, which is 1 less in version 1 of the format.

        The config says which version it is. Zero points of symmetric weights are in the middle, whatever it says.

        Raises:
            ValueError: the rows lie one step beside 0 by the config, and around 0 in the other version.
        """
        middle, left_out, is_symmetric = 2 ** (bits - 1), int(not self._is_v2), self.config.get("sym")
        first = int(stored.flatten()[0])
        if (stored == first).all():
            is_middle = is_symmetric is not False and first in (middle, middle - 1)
            if is_middle or (is_symmetric and not first):  # some leave zeros in the place of what nobody reads
                return middle
        zero_point = stored + left_out
        if bits <= 4:  # the steps of more bits are so small that a mean of one may be the model's own
            mean = (codes - zero_point).float().mean(-1)  # of each row, in steps
            other = mean + (1 if left_out else -1)
            if mean.abs().median() > 0.6 and other.abs().median() < 0.3:
                this, that = ("gptq", "gptq_v2") if left_out else ("gptq_v2", "gptq")
                raise ValueError(
                    f"{key}: its rows lie one step beside 0 as {this!r}, and around 0 as {that!r}, so its zero points "
                    f'are stored as in {that!r}: write "checkpoint_format": "{that}" in the `quantization_config` of '
                    "config.json (--model.name_or_path)"
                )
        return zero_point

    @property
    def _is_v2(self) -> bool:
        """Whether zero points are stored as they are by the config; version 1 stores them less 1."""
        return (self.config.get("checkpoint_format") or self.config.get("format")) == "gptq_v2"

    def describe(self) -> str:
        return f"GPTQ, {self.config.get('bits')} bits in groups of {self.config.get('group_size')}"


class AWQ(Scheme):
    """Codes packed along the outputs, in the order of the GEMM kernel."""

    ORDER = {4: (0, 2, 4, 6, 1, 3, 5, 7), 8: (0, 2, 1, 3)}  # outputs of a word, from its lowest bits

    def __init__(self, config: Mapping[str, Any], stored: Mapping[str, Stored]) -> None:
        version = str(config.get("version") or "gemm").lower()
        self._num_bits = config.get("bits", config.get("w_bit", 4))
        if version != "gemm" or self._num_bits not in self.ORDER:
            raise ValueError(
                f"it is AWQ of version {version!r} with {self._num_bits} bits; version 'gemm' with 4 or 8 is known"
            )
        super().__init__(config, stored)

    def find(self, stored: Mapping[str, Stored]) -> dict[str, dict[str, str]]:
        is_symmetric = self.config.get("sym") is True or self.config.get("zero_point") is False
        return _words(stored, ("qweight", "qzeros", "scales"), is_symmetric)

    def decode(self, key: str, parts: Mapping[str, Tensor]) -> Tensor:
        scales = parts["scales"].float()  # [G, O]
        bits = parts["qweight"].shape[1] * 32 // scales.shape[1]
        codes = self._unpack(parts["qweight"], bits)  # [I, O]
        group_size = len(codes) // len(scales)
        if "qzeros" in parts:
            zero_point = self._unpack(parts["qzeros"], bits).repeat_interleave(group_size, 0)
        else:
            zero_point = 2 ** (bits - 1)
        return ((codes - zero_point).float() * scales.repeat_interleave(group_size, 0)).T.contiguous()

    def _unpack(self, words: Tensor, bits: int) -> Tensor:
        order = torch.tensor(self.ORDER[bits])
        return unpack_words(words, bits).unflatten(-1, (-1, len(order)))[..., order.argsort()].flatten(-2)

    def describe(self) -> str:
        group_size = self.config.get("group_size", self.config.get("q_group_size"))
        return f"AWQ, {self._num_bits} bits in groups of {group_size}"


def auto_round(config: Mapping[str, Any], stored: Mapping[str, Stored]) -> Scheme:
    """The scheme of AutoRound's own configs, which stores words as GPTQ or AWQ does."""
    form = str(config.get("packing_format") or "auto_gptq").rpartition(":")[2]
    if form == "auto_gptq" or (form == "auto_round" and config.get("sym")):
        return GPTQ({**config, "checkpoint_format": "gptq"}, stored)
    if form == "auto_awq":
        return AWQ({**config, "version": "gemm"}, stored)
    raise ValueError(
        f"it is quantized by auto-round in the format {form!r}, and only 'auto_gptq', 'auto_awq' and symmetric "
        "'auto_round' can be decoded: pass the full-precision model that it was made of"
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


def scheme_of(config: Mapping[str, Any], stored: Mapping[str, Stored]) -> Scheme:
    """The scheme of a `quantization_config`.

    Raises:
        ValueError: it cannot be decoded.
    """
    method = str(config.get("quant_method", "")).lower()
    if method not in SCHEMES:
        raise ValueError(
            f"it is quantized by {method or 'an unnamed method'} (`quantization_config` in its config.json), and only "
            f"{', '.join(SCHEMES)} can be decoded: pass the full-precision model that it was made of"
        )
    return SCHEMES[method](config, stored)


def stored_bits(config: Mapping[str, Any]) -> float:
    """Bits on disk per quantized weight, with scales and zero points, by its `quantization_config`."""
    method = str(config.get("quant_method", "")).lower()
    if method == "compressed-tensors":
        groups = [group["weights"] for group in config["config_groups"].values() if group.get("weights")]
        sizes = [(weights["num_bits"], weights.get("group_size") or 0) for weights in groups]
        return max(bits + (16 / group_size if group_size > 0 else 0) for bits, group_size in sizes)
    if method in ("gptq", "awq", "auto-round"):
        bits, group_size = config.get("bits") or 4, config.get("group_size") or 128
        return bits + ((16 + bits) / group_size if group_size > 0 else 0)
    if method == "modelopt" and str(config.get("quant_algo")).upper() == "NVFP4":
        return 4.5
    return 4.25 if method == "mxfp4" else 8.0


# --- the arithmetic of the formats -----------------------------------------------------------------------------


def scaled(key: str, weight: Tensor, scale: Tensor, block: tuple[int, int] | None) -> Tensor:
    """A weight [..., O, I] in float8 (or int8: two FP4 values a byte) times its scales -> float32."""
    values = unpack_fp4(weight) if weight.dtype == torch.int8 else weight.float()
    scale = exponents(scale) if scale.dtype == torch.uint8 else scale.float()
    return values * spread(key, scale, values.shape, block)


def root_mean_square(weight: Tensor) -> float:
    return float(torch.linalg.vector_norm(weight, dtype=torch.float32)) / math.sqrt(max(weight.numel(), 1))


def exponents(stored: Tensor) -> Tensor:
    """Powers of two, stored as exponents with a bias of 127 (E8M0) -> float32."""
    return torch.exp2(stored.float() - 127)


def spread(
    key: str, grid: Tensor, shape: torch.Size, block: tuple[int, int] | None, group: Tensor | None = None
) -> Tensor:
    """Scales or zero points as a tensor that broadcasts over a weight.

    Args:
        key: of the weight, for the error.
        grid: one value, one a row [O], one for each weight of a stack [E], or [..., rows of blocks, columns of blocks].
        shape: [..., O, I], of the weight.
        block: rows and columns of a block, the last ones of which may be cut off; None: the grid divides the weight.
            A grid with a row for each of the weight's, or with one row, is not of blocks.
        group: [I] the column of the grid of each input; None: neighbours.

    Raises:
        ValueError: the grid does not fit the weight.
    """
    if grid.numel() == 1:
        return grid.reshape(())
    if grid.ndim == 1:  # a value a row, or one for each weight of a stack
        grid = grid[:, None] if len(shape) == 2 else grid[:, None, None]
    if group is not None:
        return grid[..., group.long()]
    if block and grid.ndim > 1 and grid.shape[-2] not in (1, shape[-2]):
        blocks = tuple(-(-size // width) for size, width in zip(shape[-2:], block, strict=True))
        if tuple(grid.shape[-2:]) != blocks:
            raise ValueError(
                f"{key}: scales {tuple(grid.shape)} do not fit a weight {tuple(shape)}, which has {blocks} blocks of "
                f"{block[0]} x {block[1]} (`quantization_config` in its config.json)"
            )
    for dim in (-2, -1):
        parts, size = grid.shape[dim] if grid.ndim >= -dim else 1, shape[dim]
        if parts == 1:
            continue
        width = block[dim] if block and -(-size // block[dim]) == parts else size // parts
        if -(-size // width) != parts:
            raise ValueError(f"{key}: scales {tuple(grid.shape)} do not fit a weight {tuple(shape)}")
        grid = grid.repeat_interleave(width, dim).narrow(dim, 0, size)
    return grid


def unpack_fp4(packed: Tensor) -> Tensor:
    """Two FP4 values a byte, the first in the low bits: [..., n] -> float32 [..., 2 n]."""
    table = torch.tensor(FP4, dtype=torch.float32)
    nibbles = packed.contiguous().view(torch.uint8).int()
    return torch.stack([table[nibbles & 15], table[nibbles >> 4]], -1).flatten(-2)


def unpack_words(words: Tensor, bits: int) -> Tensor:
    """int32 [..., n] -> codes [..., n * 32 / bits], int32, a little-endian stream of bits."""
    if 32 % bits == 0:
        shift = torch.arange(0, 32, bits, dtype=torch.int32)
        return ((words[..., None] >> shift) & (2**bits - 1)).flatten(-2)
    stream = (words[..., None] >> torch.arange(32, dtype=torch.int32)) & 1
    codes = stream.flatten(-2).unflatten(-1, (-1, bits))
    return (codes << torch.arange(bits, dtype=torch.int32)).sum(-1, dtype=torch.int32)


def _scaled_by(key: str) -> Iterable[str]:
    """The keys of the weights that a tensor of this name may be the scale of."""
    for suffix, replacement in (
        ("_scale_inv", ""),
        ("weight_scale", "weight"),
        ("_scale", ""),
        (".scale", ".weight"),
        (".qscale_weight", ".weight"),
    ):
        if key.endswith(suffix):
            yield key.removesuffix(suffix) + replacement


def _words(stored: Iterable[str], kinds: Sequence[str], is_symmetric: bool) -> dict[str, dict[str, str]]:
    """`Scheme.parts` of linears in words: all have `qweight` and `scales`, and `qzeros` unless they are symmetric."""
    parts = {}
    for key in stored:
        if key.endswith(".qweight"):
            name = key.removesuffix(".qweight")
            found = {kind: f"{name}.{kind}" for kind in kinds if f"{name}.{kind}" in stored}
            _require(key, found, ("scales",) if is_symmetric else ("scales", "qzeros"))
            parts[f"{name}.weight"] = found
    return parts


def _require(key: str, parts: Mapping[str, str], kinds: Iterable[str]) -> None:
    if missing := [kind for kind in kinds if kind not in parts]:
        raise ValueError(f"{key} has no {missing[0]} beside it: a file is missing, or it is of an unknown variant")
