"""GPTQ's column loop over one group, its only part that is not a matrix product: in C++, in Triton, or in torch.

The rows of a weight are independent, so the loop runs over many rows at once. Its columns are sequential: the error of
each one relative to `old` changes what later columns are rounded from:

    v_j = value_j - sum_{k<j} e_k F_kj,   q_j = v_j rounded,   e_j = q_j - old_j

Two methods use it. In GPTQ `old` is the original weight and H = F diag(p) F^T; in coordinate descent `old` is the
previous decoded weight and F_kj = H_kj / H_jj (see gptq.py). In GPTQ the sum of p_j (v_j - q_j)^2 is the loss that the
group adds, so several scales can be tried and each row keeps its best.
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

from eacmoe_lightning.quantization.grid import Grid, encode, fit_scale, ranges, rounding_error

LEVELS = ("portable", "avx2", "avx512")  # instruction sets of csrc/column_loop.cpp
UNROLL = 4  # columns that csrc/column_loop.cpp takes at a time


def column_loop(
    value: Tensor, old: Tensor, factor: Tensor, weight: Tensor, scale: Tensor, zero: Tensor, grid: Grid
) -> tuple[Tensor, Tensor, Tensor]:
    """Rounds one group of columns.

    Args:
        value, old: float32 [S, O, g], may be views of wider tensors; not changed.
        factor: F [S, g, g] float32; only entries right of the diagonal are read.
        weight: [S, g], the weight of (v_j - q_j)^2 in the loss.
        scale, zero: float32 [S, O, C], the candidates of each row. The candidate of least loss is chosen, the first one
            among equals.

    Returns:
        Codes [S, O, g] uint8, e [S, O, g] float32, and the index of the chosen candidate [S, O].
    """
    run = loop_in_torch
    if _is_compiled(value):
        run = _compiled
    elif value.device.type == "cuda" and triton_loop() is not None:
        run = triton_loop().column_loop
    return run(value, old, factor, weight, scale, zero, grid)


def fit_range(value: Tensor, grid: Grid, importance: Tensor) -> tuple[Tensor, Tensor]:
    """`grid.fit_scale` of one group of columns; where the C++ loop is built, by that loop without coupling of columns.

    Args:
        value: float32 [S, O, g], may be a view of a wider tensor.
        importance: [S, g].

    Returns:
        scale, zero_point: float32 [S, O].
    """
    if not grid.clip_search or not _is_compiled(value):
        return fit_scale(value, grid, importance.unsqueeze(1))
    scale, zero = ranges(value, grid)
    chosen = least_error(value, importance, scale, zero, grid).unsqueeze(-1)
    return scale.gather(-1, chosen)[..., 0], zero.gather(-1, chosen)[..., 0]


def least_error(value: Tensor, importance: Tensor, scale: Tensor, zero: Tensor, grid: Grid) -> Tensor:
    """Which scale and zero point round a group of columns with the least weighted squared error.

    Args:
        value: float32 [S, O, g], may be a view of a wider tensor.
        importance: [S, g].
        scale, zero: float32 [S, O, C], the candidates.

    Returns:
        Index of the best candidate [S, O], the first one among equals.
    """
    if _is_compiled(value):
        return _compiled(value, value, None, importance, scale, zero, grid)[2]
    weights = importance.unsqueeze(1)
    candidates = zip(scale.unbind(-1), zero.unbind(-1), strict=True)
    errors = [rounding_error(value, one, origin, grid, weights) for one, origin in candidates]
    return torch.stack(errors, -1).argmin(-1)


def loop_in_torch(value, old, factor, weight, scale, zero, grid) -> tuple[Tensor, Tensor, Tensor]:
    """`column_loop` on any device; the reference implementation."""
    num, rows, candidates = scale.shape
    chosen = torch.zeros(num, rows, dtype=torch.long, device=value.device)
    if candidates > 1:  # try each candidate as a row
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
    """Whether the C++ loop is built and can take these columns."""
    return value.device.type == "cpu" and value.shape[-1] % UNROLL == 0 and library() is not None


@cache
def library() -> ctypes.CDLL | None:
    """The compiled loop; None, after one warning, where it is not built."""
    path = Path(__file__).with_name(f"_column_loop{sysconfig.get_config_var('EXT_SUFFIX')}")
    try:
        lib = ctypes.CDLL(str(path))
        run = lib.eacmoe_column_loop  # libraries of an older interface lack this name
    except (OSError, AttributeError) as error:
        warnings.warn(
            f"GPTQ's compiled loop cannot be loaded ({error}): GPTQ runs in torch, many times slower. To build the "
            "loop, install a C++ compiler and reinstall eacmoe-lightning",
            stacklevel=2,
        )
        return None
    run.argtypes = [ctypes.c_int, ctypes.POINTER(_Columns), ctypes.c_int64, ctypes.c_int64]
    run.restype = None
    return lib


@cache
def triton_loop() -> ModuleType | None:
    """The Triton loop for CUDA; None, after one warning, where Triton is missing."""
    try:
        return import_module("eacmoe_lightning.quantization.triton_column_loop")
    except ImportError as error:
        warnings.warn(f"GPTQ runs slowly on this GPU because Triton is missing ({error})", stacklevel=2)
        return None


@cache
def level() -> int:
    """The best instruction set of this CPU, as an index into LEVELS."""
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
    if factor is not None:  # without a factor, columns are not coupled and only the choice is needed
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
    else:  # ctypes releases the GIL
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(lambda t: run(level(), task, cuts[t], cuts[t + 1]), range(threads)))
    return codes, errors, chosen.long()


def _with_rows_in_line(tensor: Tensor) -> Tensor:
    """[S, O, g] with one stride between all S * O rows; a copy if the tensor has no such layout."""
    in_line = tensor.stride(2) == 1 and tensor.stride(0) == tensor.shape[1] * tensor.stride(1)
    return tensor if in_line else tensor.contiguous()
