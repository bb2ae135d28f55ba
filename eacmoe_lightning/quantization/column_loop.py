"""GPTQ's column loop over one group, the only part of it that is no matrix product: in C++, in Triton, or in torch.

A row of a weight meets no other row, so the loop runs over many rows at once; columns come one after another, what each
one moved away from `old` changing what the later ones are rounded from:

    v_j = value_j - sum_{k<j} e_k F_kj,   q_j = v_j rounded,   e_j = q_j - old_j

Two methods share it, with F and `old` of their own: GPTQ, where `old` is the original weight and H = F diag(p) F^T, and
coordinate descent, where `old` is what was decoded before and F_kj = H_kj / H_jj (see gptq.py). In GPTQ the sum of
p_j (v_j - q_j)^2 is the loss that the group adds. So several scales can be tried, each row keeping its best.
"""

from __future__ import annotations

import ctypes
import sysconfig
import warnings
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from eacmoe_lightning.quantization.grid import Grid, encode, fit_scale, ranges

LEVELS = ("portable", "avx2", "avx512")  # instruction sets of csrc/column_loop.cpp
UNROLL = 4  # it takes so many columns at a time


def column_loop(
    value: Tensor, old: Tensor, factor: Tensor, weight: Tensor, scale: Tensor, zero: Tensor, grid: Grid
) -> tuple[Tensor, Tensor, Tensor]:
    """Rounds one group of columns.

    Args:
        value, old: float32 [S, O, g], views of wider tensors or not; left as they are.
        factor: F [S, g, g] float32; only what is right of the diagonal is read.
        weight: [S, g], what (v_j - q_j)^2 counts.
        scale, zero: [S, O, C], candidates of each row, float32. The one of least loss is taken, the first of equals.

    Returns:
        codes [S, O, g] uint8, e [S, O, g] float32, and which candidate was taken [S, O].
    """
    run = loop_in_torch
    if _is_compiled(value):
        run = _compiled
    elif value.device.type == "cuda" and triton_loop() is not None:
        run = triton_loop().column_loop
    return run(value, old, factor, weight, scale, zero, grid)


def fit_range(value: Tensor, grid: Grid, importance: Tensor) -> tuple[Tensor, Tensor]:
    """`grid.fit_scale` of one group of columns, in C++ where that is built: the loop without anything between columns.

    Args:
        value: float32 [S, O, g], a view of a wider tensor or not.
        importance: [S, g].

    Returns:
        scale, zero_point: float32 [S, O].
    """
    if not grid.clip_search or not _is_compiled(value):
        return fit_scale(value, grid, importance.unsqueeze(1))
    scale, zero = ranges(value, grid)
    chosen = _compiled(value, value, None, importance, scale, zero, grid)[2].unsqueeze(-1)
    return scale.gather(-1, chosen)[..., 0], zero.gather(-1, chosen)[..., 0]


def loop_in_torch(value, old, factor, weight, scale, zero, grid) -> tuple[Tensor, Tensor, Tensor]:
    """`column_loop` on any device: the reference."""
    num, rows, candidates = scale.shape
    chosen = torch.zeros(num, rows, dtype=torch.long, device=value.device)
    if candidates > 1:  # as so many more rows
        repeated = (t.repeat_interleave(candidates, 1) for t in (value, old))
        loss = _pass(*repeated, factor, weight, scale.flatten(1), zero.flatten(1), grid)[2]
        chosen = loss.view(scale.shape).argmin(-1)
    scale, zero = (t.gather(-1, chosen[..., None])[..., 0] for t in (scale, zero))
    codes, errors, _ = _pass(value, old, factor, weight, scale, zero, grid)
    return codes.to(torch.uint8), errors, chosen


def _pass(value, old, factor, weight, scale, zero, grid) -> tuple[Tensor, Tensor, Tensor]:
    value, loss = value.clone(), torch.zeros_like(scale)
    codes, errors = torch.empty_like(value), torch.empty_like(value)
    for j in range(value.shape[-1]):
        code = encode(value[..., j], scale, zero, grid)
        rounded = (code - zero) * scale
        loss += (value[..., j] - rounded).square() * weight[:, None, j]
        error = rounded - old[..., j]
        value[..., j + 1 :] -= error[..., None] * factor[:, None, j, j + 1 :]
        codes[..., j], errors[..., j] = code, error
    return codes, errors, loss


def _is_compiled(value: Tensor) -> bool:
    """Whether C++ takes these columns."""
    return value.device.type == "cpu" and value.shape[-1] % UNROLL == 0 and library() is not None


@cache
def library() -> ctypes.CDLL | None:
    """The compiled loop, or None with one warning where it is not built."""
    path = Path(__file__).with_name(f"_column_loop{sysconfig.get_config_var('EXT_SUFFIX')}")
    try:
        lib = ctypes.CDLL(str(path))
        run = lib.eacmoe_column_loop  # a name that libraries of an older interface lack
    except (OSError, AttributeError) as error:
        warnings.warn(
            f"GPTQ's compiled loop cannot be loaded ({error}): it will run through torch, many times slower. Install "
            "a C++ compiler and reinstall eacmoe-lightning to have it",
            stacklevel=2,
        )
        return None
    run.argtypes = [ctypes.c_int, ctypes.POINTER(_Columns), ctypes.c_int64, ctypes.c_int64]
    run.restype = None
    return lib


@cache
def triton_loop() -> ModuleType | None:
    """The loop for CUDA; None without Triton."""
    try:
        return import_module("eacmoe_lightning.quantization.triton_column_loop")
    except ImportError as error:
        warnings.warn(f"GPTQ will run slowly on this GPU, without Triton ({error})", stacklevel=2)
        return None


@cache
def level() -> int:
    """The best instruction set of this CPU, by its place in LEVELS."""
    return library().eacmoe_column_loop_level()


class _Columns(ctypes.Structure):
    """`struct Columns` of csrc/column_loop.cpp."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("value", "old", "factor", "weight", "scale", "zero")),
        *((name, ctypes.c_void_p) for name in ("codes", "errors", "chosen")),
        *((name, ctypes.c_int64) for name in ("problems", "rows", "columns", "value_stride", "old_stride")),
        ("candidates", ctypes.c_int64),
        ("top", ctypes.c_float),
    ]


def _compiled(value, old, factor, weight, scale, zero, grid) -> tuple[Tensor, Tensor, Tensor]:
    num, rows, columns = value.shape
    value, old = _with_rows_in_line(value), _with_rows_in_line(old)
    weight, scale, zero = weight.contiguous(), scale.contiguous(), zero.contiguous()
    codes = errors = None
    if factor is not None:  # else nothing is between columns, and only the choice is wanted
        factor = factor.contiguous()
        codes, errors = torch.empty(value.shape, dtype=torch.uint8), torch.empty(value.shape)
    chosen = torch.empty(num, rows, dtype=torch.int32)
    tensors = value, old, factor, weight, scale, zero, codes, errors, chosen
    pointers = (None if tensor is None else tensor.data_ptr() for tensor in tensors)
    sizes = num, rows, columns, value.stride(1), old.stride(1), scale.shape[-1]
    task = _Columns(*pointers, *sizes, grid.max_code)
    run, threads, total = library().eacmoe_column_loop, torch.get_num_threads(), num * rows
    cuts = [total * t // threads for t in range(threads + 1)]
    if threads == 1:
        run(level(), task, 0, total)
    else:  # ctypes lets go of the interpreter's lock
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(lambda t: run(level(), task, cuts[t], cuts[t + 1]), range(threads)))
    return codes, errors, chosen.long()


def _with_rows_in_line(tensor: Tensor) -> Tensor:
    """[S, O, g] whose rows, numbered through all problems, are equally far apart."""
    in_line = tensor.stride(2) == 1 and tensor.stride(0) == tensor.shape[1] * tensor.stride(1)
    return tensor if in_line else tensor.contiguous()
