"""Products with packed weights, behind two operators that choose their kernel by device, dtype and shape.

    torch.ops.eacmoe.linear     [..., I] times one packed weight [O, I]
    torch.ops.eacmoe.experts    all routed experts of a block in one call

`linear` and `experts` of this module are the same, without torch's dispatcher where nothing needs it: at decode it
takes longer than a small product.

On CPU they are our C++ (`csrc/`), compiled when the package is installed and loaded without any tie to torch's ABI; on
CUDA Humming where it is installed (`humming_kernels.py`), else a Triton kernel (`triton_kernels.py`); elsewhere, and
where nothing of that was found, weights are decoded one at a time and multiplied by torch. A packed weight is always
its three tensors as they lie on disk (`grid.packed`): nothing is repacked, so a file can be mapped and used (Humming
alone makes a copy in its own layout).
"""

from __future__ import annotations

import ctypes
import math
import os
import sys
import sysconfig
import warnings
from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.nn import functional as F

from eacmoe_lightning import waiting
from eacmoe_lightning.quantization.grid import Quantized, one_or_each
from eacmoe_lightning.quantization.packing import expert_codes, unpack

CUDA = ("humming", "triton", "decode")  # kernels for GPUs, best first
LEVELS = ("portable", "avx2", "avx512", "amx")  # instruction sets of the C++ kernels; avx512 includes VNNI and VBMI
INTERFACE = 7  # of csrc/kernels.cpp; a checkout may have moved on since its kernels were compiled
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
ACTIVATIONS = {"silu": 0, "gelu": 1, "gelu_tanh": 2, "relu": 3}
# tokens of an expert from which decoding to float32 and torch's product beat our float32 kernel
MANY_FLOAT32 = {"portable": 192, "avx2": 2048}


class _Packed(ctypes.Structure):
    """`struct Packed` of csrc/packed.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("codes", "scale", "zero_point", "bias")),
        ("rows", ctypes.c_int64),
        ("cols", ctypes.c_int64),
        ("group", ctypes.c_int32),
        ("bits", ctypes.c_int32),
    ]


class Dense(ctypes.Structure):
    """`struct Dense` of csrc/decode_step.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("weight", "bias")),
        *((name, ctypes.c_int64) for name in ("rows", "cols")),
        ("dtype", ctypes.c_int32),
    ]


class Choice(ctypes.Structure):
    """`struct Choice` of csrc/decode_step.h."""

    _fields_ = [
        ("correction", ctypes.c_void_p),
        ("chosen", ctypes.c_int64),
        ("scale", ctypes.c_float),
        *((name, ctypes.c_int32) for name in ("sigmoid", "normalised", "rounded")),
    ]


class Attention(ctypes.Structure):
    """`struct Attention` of csrc/attention.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("q", "k", "v", "mask")),
        *((name, ctypes.c_int64) for name in ("batch", "heads", "kv_heads", "length", "width", "value_width")),
        *((name, ctypes.c_int64) for name in ("q_batch", "q_head", "k_batch", "k_head", "k_token")),
        *((name, ctypes.c_int64) for name in ("v_batch", "v_head", "v_token", "mask_batch")),
        ("scale", ctypes.c_float),
        ("dtype", ctypes.c_int32),
    ]


@cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels, or None with one warning where they are not built."""
    path = Path(__file__).with_name(f"_kernels{sysconfig.get_config_var('EXT_SUFFIX')}")
    try:
        lib = ctypes.CDLL(str(path))
        if (found := lib.eacmoe_interface()) != INTERFACE:
            raise OSError(f"{path.name} has interface {found}, not {INTERFACE}: it was compiled from other sources")
    except (OSError, AttributeError) as error:
        warnings.warn(
            f"the CPU kernels cannot be loaded ({error}): packed models will run several times slower, through torch. "
            "Install a C++ compiler and reinstall eacmoe-lightning to have them",
            stacklevel=2,
        )
        return None
    pointer, long, word = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    packed = ctypes.POINTER(_Packed)
    lib.eacmoe_linear.argtypes = [word, word, packed, pointer, word, long, pointer, word]
    lib.eacmoe_experts.argtypes = [word, word, packed, pointer, packed, pointer, word, word, pointer, word]
    lib.eacmoe_experts.argtypes += [long, pointer, pointer, long, long, pointer, word]
    lib.eacmoe_mlp.argtypes = [word, word, packed, packed, packed, word, pointer, word, long, pointer, word]
    dense, choice = ctypes.POINTER(Dense), ctypes.POINTER(Choice)
    lib.eacmoe_dense.argtypes = [word, dense, pointer, word, long, pointer, word]
    lib.eacmoe_route.argtypes = [word, dense, choice, pointer, word, long, pointer, word, pointer]
    lib.eacmoe_route.argtypes += [pointer, word, word]
    lib.eacmoe_norm.argtypes = [word, word, pointer, word, ctypes.c_float, pointer, word, long, long, pointer]
    lib.eacmoe_attention.argtypes = [ctypes.POINTER(Attention), pointer, word]
    lib.eacmoe_use_openmp.argtypes = [pointer]
    for name in ("linear", "experts", "use_openmp", "mlp", "dense", "route", "norm", "attention"):
        getattr(lib, f"eacmoe_{name}").restype = None
    if waiting.spins():
        lib.eacmoe_use_openmp(_openmp_of_torch())
    return lib


def _openmp_of_torch() -> ctypes.c_void_p | None:
    """`GOMP_parallel` of the OpenMP runtime that torch has loaded; GNU's, LLVM's and Intel's have it."""
    name = {"darwin": "libtorch_cpu.dylib"}.get(sys.platform, "libtorch_cpu.so")
    try:
        loaded = ctypes.CDLL(str(Path(torch.__file__).with_name("lib") / name))
        return ctypes.cast(loaded.GOMP_parallel, ctypes.c_void_p)
    except (OSError, AttributeError):
        return None


@cache
def level() -> str | None:
    """The instruction set in use, one of LEVELS; None without compiled kernels. EACMOE_CPU chooses a lower one.

    Raises:
        ValueError: EACMOE_CPU is none of LEVELS, or above what this CPU has.
    """
    if library() is None:
        return None
    best = library().eacmoe_level()
    chosen = os.environ.get("EACMOE_CPU", LEVELS[best])
    if chosen not in LEVELS or LEVELS.index(chosen) > best:
        raise ValueError(f"EACMOE_CPU={chosen!r} is not one of {LEVELS[: best + 1]}, which this CPU has")
    return chosen


def level_number() -> int:
    """`level` as the C++ kernels take it."""
    return LEVELS.index(level())


def describe(
    codes: Tensor, scale: Tensor, zero_point: Tensor, bias: Tensor | None, in_features: int, bits: int
) -> _Packed:
    """A weight as the C++ kernels read it; its tensors must live until they have.

    Raises:
        RuntimeError: it is elsewhere than in host memory.
    """
    if not codes.is_cpu:
        raise RuntimeError(
            f"a packed weight is on {codes.device}, and its input on the CPU. accelerate does not bring packed weights "
            "back that it moved away (`offload_buffers`): load the model with eacmoe_lightning.load_offloaded"
        )
    rows, groups = scale.shape[-2:]
    pointers = codes.data_ptr(), scale.data_ptr(), zero_point.data_ptr(), None if bias is None else bias.data_ptr()
    return _Packed(*pointers, rows, in_features, in_features // groups, bits)


def _decode(codes, scale, zero_point, in_features, bits, dtype) -> Tensor:
    return Quantized(unpack(codes, bits, in_features), scale, zero_point, bits).dequantize(dtype)


# --- the operators ------------------------------------------------------------------------------------------------

_ops = torch.library.Library("eacmoe", "DEF")
_ops.define(
    "linear(Tensor x, Tensor codes, Tensor scale, Tensor zero_point, Tensor? bias, int bits, bool int8) -> Tensor"
)
_ops.define(
    "experts(Tensor x, Tensor ids, Tensor weights, Tensor up_codes, Tensor up_scale, Tensor up_zero_point, "
    "Tensor? up_bias, int[] up_bits, Tensor down_codes, Tensor down_scale, Tensor down_zero_point, Tensor? down_bias, "
    "int[] down_bits, bool gated, str activation, bool int8) -> Tensor"
)  # bits: one number, or one for each expert, whose codes then lie flat one after another


def _linear(x, codes, scale, zero_point, bias, bits, int8):
    weight = _decode(codes, scale, zero_point, x.shape[-1], bits, x.dtype)
    return F.linear(x, weight, None if bias is None else bias.to(x.dtype))


def _has_kernel(x: Tensor, tokens: int, int8: bool) -> bool:
    """Whether the C++ kernels take these activations, of so many tokens a weight."""
    if level() is None or x.dtype not in DTYPES:
        return False
    return x.dtype != torch.float32 or int8 or tokens < MANY_FLOAT32.get(level(), math.inf)


def _linear_cpu(x, codes, scale, zero_point, bias, bits, int8):
    *leading, in_features = x.shape
    tokens = math.prod(leading)
    if not _has_kernel(x, tokens, int8):
        return _linear(x, codes, scale, zero_point, bias, bits, int8)
    x, bias = x.contiguous(), None if bias is None else bias.float()
    out = x.new_empty((*leading, scale.shape[-2]))
    library().eacmoe_linear(
        level_number(),
        int8,
        describe(codes, scale, zero_point, bias, in_features, bits),
        x.data_ptr(),
        DTYPES[x.dtype],
        tokens,
        out.data_ptr(),
        torch.get_num_threads(),
    )
    return out


def activate(hidden: Tensor, gated: bool, activation: str) -> Tensor:
    """[n, 2F] (gate, then up) or [n, F] -> [n, F]."""
    gate, up = hidden.chunk(2, -1) if gated else (hidden, None)
    match activation:
        case "silu":
            gate = F.silu(gate)
        case "gelu":
            gate = F.gelu(gate)
        case "gelu_tanh":
            gate = F.gelu(gate, approximate="tanh")
        case "relu":
            gate = F.relu(gate)
    return gate if up is None else gate * up


def loop_over_experts(x: Tensor, ids: Tensor, weights: Tensor, num_experts: int, expert) -> Tensor:
    """[N, D] -> [N, D]: `expert(e, rows)` on the tokens of each selected expert, summed by weight in float32.

    Ids outside 0 .. num_experts - 1 are skipped: a pruned (token, expert) pair.
    """
    out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for e in ids.unique().tolist():
        if 0 <= e < num_experts:
            token, choice = torch.where(ids == e)
            out.index_add_(0, token, expert(e, x[token]).float() * weights[token, choice, None].float())
    return out.to(x.dtype)


def _experts(x, ids, weights, up_codes, up_scale, up_zero_point, up_bias, up_bits, down_codes, down_scale, *rest):
    down_zero_point, down_bias, down_bits, gated, activation, int8 = rest
    up = up_codes, up_scale, up_zero_point, up_bias, up_bits
    down = down_codes, down_scale, down_zero_point, down_bias, down_bits

    def multiply(rows, stack, e):
        codes, scale, zero_point, bias, bits = stack
        bits = bits[0] if len(bits) == 1 else bits
        width = bits if isinstance(bits, int) else bits[e]
        codes, bias = expert_codes(codes, bits, e, rows.shape[-1]), None if bias is None else bias[e]
        return _linear(rows, codes, scale[e], zero_point[e], bias, width, int8)

    def expert(e, rows):
        return multiply(activate(multiply(rows, up, e), gated, activation), down, e)

    return loop_over_experts(x, ids, weights, len(up_scale), expert)


@cache
def cuda_kernels() -> list[ModuleType]:
    """The modules with kernels for CUDA that are installed, best first; EACMOE_CUDA asks for a later one of CUDA.

    Raises:
        ValueError: EACMOE_CUDA is none of CUDA.
    """
    chosen = os.environ.get("EACMOE_CUDA", CUDA[0])
    if chosen not in CUDA:
        raise ValueError(f"EACMOE_CUDA={chosen!r} is none of {CUDA}")
    found, missing = [], []
    for name in CUDA[CUDA.index(chosen) : -1]:
        try:
            found.append(import_module(f"eacmoe_lightning.runtime.{name}_kernels"))
        except (ImportError, OSError, RuntimeError) as error:  # Humming loads libraries of CUDA when it is imported
            missing.append(str(error))
    if not found and missing:
        warnings.warn(f"packed models will run slowly on this GPU ({'; '.join(missing)})", stacklevel=2)
    return found


def _kernels_for(x: Tensor, *weights: tuple) -> ModuleType | None:
    """The first module that takes these activations and weights (codes, scale, in_features, bits)."""
    return next((kernels for kernels in cuda_kernels() if kernels.takes(x, *weights)), None)


def _linear_cuda(x, codes, scale, zero_point, bias, bits, int8):
    kernels = _kernels_for(x, (codes, scale, x.shape[-1], bits))
    if kernels is None:
        return _linear(x, codes, scale, zero_point, bias, bits, int8)
    with torch.cuda.device_of(x):  # kernels are launched on the current device
        return kernels.linear(x, codes, scale, zero_point, bias, bits)


def _experts_cuda(x, ids, weights, up_codes, up_scale, up_zero_point, up_bias, up_bits, *rest):
    down_codes, down_scale, down_zero_point, down_bias, down_bits, gated, activation, _ = rest
    up = up_codes, up_scale, up_zero_point, up_bias, one_or_each(up_bits)
    down = down_codes, down_scale, down_zero_point, down_bias, one_or_each(down_bits)
    widths = x.shape[-1], _width(down_codes, down_scale, down_bits)
    kernels = _kernels_for(x, *((w[0], w[1], width, w[4]) for w, width in zip((up, down), widths, strict=True)))
    if kernels is None:
        return _experts(x, ids, weights, up_codes, up_scale, up_zero_point, up_bias, up_bits, *rest)
    with torch.cuda.device_of(x):
        return kernels.experts(x, ids, weights, up, down, lambda hidden: activate(hidden, gated, activation))


def _width(codes: Tensor, scale: Tensor, bits: list[int]) -> int:
    """in_features of a stack of experts."""
    num_experts, out_features, _ = scale.shape
    return codes.numel() * 8 // (out_features * sum(bits) * (num_experts if len(bits) == 1 else 1))


@cache
def _each(bits: tuple[int, ...]) -> ctypes.Array:
    """Bits of each expert as the kernels read them."""
    return (ctypes.c_uint8 * len(bits))(*bits)


def _experts_cpu(x, ids, weights, up_codes, up_scale, up_zero_point, up_bias, up_bits, down_codes, down_scale, *rest):
    down_zero_point, down_bias, down_bits, gated, activation, int8 = rest
    if not _has_kernel(x, ids.numel() // len(up_scale), int8):
        args = (up_codes, up_scale, up_zero_point, up_bias, up_bits, down_codes, down_scale, *rest)
        return _experts(x, ids, weights, *args)
    x, ids, weights = x.contiguous(), ids.long().contiguous(), weights.float().contiguous()
    up_bias = None if up_bias is None else up_bias.float().contiguous()
    down_bias = None if down_bias is None else down_bias.float().contiguous()
    width = _width(down_codes, down_scale, down_bits)
    up_each, down_each = (_each(tuple(bits)) if len(bits) > 1 else None for bits in (up_bits, down_bits))
    out = torch.empty_like(x)
    library().eacmoe_experts(
        level_number(),
        int8,
        describe(up_codes, up_scale, up_zero_point, up_bias, x.shape[-1], up_bits[0]),
        up_each,
        describe(down_codes, down_scale, down_zero_point, down_bias, width, down_bits[0]),
        down_each,
        gated,
        ACTIVATIONS[activation],
        x.data_ptr(),
        DTYPES[x.dtype],
        len(x),
        ids.data_ptr(),
        weights.data_ptr(),
        ids.shape[-1],
        len(up_scale),
        out.data_ptr(),
        torch.get_num_threads(),
    )
    return out


_ops.impl("linear", _linear_cpu, "CPU")
_ops.impl("experts", _experts_cpu, "CPU")
_ops.impl("linear", _linear_cuda, "CUDA")
_ops.impl("experts", _experts_cuda, "CUDA")
for _device in ("MPS", "XPU"):
    _ops.impl("linear", _linear, _device)
    _ops.impl("experts", _experts, _device)


def _no_gradient(*_: Any) -> NoReturn:
    raise RuntimeError(
        "packed weights pass no gradient on. To train, or to attribute a model's outputs, load it decoded: "
        "eacmoe_lightning.load(path, packed=False)"
    )


for _name in ("linear", "experts"):
    torch.library.register_autograd(f"eacmoe::{_name}", _no_gradient, lib=_ops)


def goes_direct(x: Tensor) -> bool:
    """Whether the kernels may be called past torch's dispatcher: nothing traces, compiles, maps or differentiates."""
    if type(x) is not Tensor or not x.is_cpu or torch.is_grad_enabled():
        return False
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return False
    return torch._C._get_tracing_state() is None and torch._C._functorch.peek_interpreter_stack() is None


def linear(x: Tensor, *weight) -> Tensor:
    """torch.ops.eacmoe.linear: [..., I] -> [..., O]."""
    return _linear_cpu(x, *weight) if goes_direct(x) else torch.ops.eacmoe.linear(x, *weight)


def experts(x: Tensor, *block) -> Tensor:
    """torch.ops.eacmoe.experts: [N, D] -> [N, D]."""
    return _experts_cpu(x, *block) if goes_direct(x) else torch.ops.eacmoe.experts(x, *block)


@torch.library.register_fake("eacmoe::linear", lib=_ops)
def _(x, codes, scale, zero_point, bias, bits, int8):
    return x.new_empty(*x.shape[:-1], scale.shape[-2])


@torch.library.register_fake("eacmoe::experts", lib=_ops)
def _(x, *args):
    return torch.empty_like(x)
