"""GPTQ's column loop over one group, the only part of it that is no matrix product: in C++, in Triton, or in torch.

A row of a weight meets no other row, so the loop runs over many rows at once; columns come one after another, each
error changing what the later ones are rounded from. Two methods share the loop, with what it leaves in e:

    GPTQ                 v_j = value_j - sum_{k<j} e_k F_kj,   e_j = (v_j - q_j) / F_jj,   F the factor U
    coordinate descent   the same v_j,                         e_j = q_j - old_j,          F = H_kj / H_jj

In GPTQ the sum of e_j^2 is the loss that the group adds. So several scales can be tried, each row keeping its best.
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

from eacmoe_lightning.grid import Grid, encode, fit_scale, ranges

LEVELS = ("portable", "avx2", "avx512")  # instruction sets of csrc/column_loop.cpp
UNROLL = 4  # it takes so many columns at a time


def column_loop(
    value: Tensor, factor: Tensor, scale: Tensor, zero: Tensor, grid: Grid, old: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Rounds one group of columns.

    Args:
        value: float32 [S, O, g], a view of a wider tensor or not; left as it is.
        factor: [S, g, g] float32, see above; what is left of the diagonal is not read.
        scale, zero: [S, O, C], candidates of each row, float32. Without `old` the one of least sum of e_j^2 is
            taken, the first of equals; with it there is one.
        old: [S, O, g] decoded weights: coordinate descent.

    Returns:
        codes [S, O, g] uint8, e [S, O, g] float32, and which candidate was taken [S, O].
    """
    run = loop_in_torch
    if value.device.type == "cpu" and value.shape[-1] % UNROLL == 0 and library() is not None:
        run = _compiled
    elif value.device.type == "cuda" and triton_loop() is not None:
        run = triton_loop().column_loop
    return run(value, factor, scale, zero, grid, old)


def fit_range(value: Tensor, grid: Grid, importance: Tensor) -> tuple[Tensor, Tensor]:
    """`grid.fit_scale` of one group of columns, in C++ where that is built: the loop without anything between columns.

    Args:
        value: float32 [S, O, g], a view of a wider tensor or not.
        importance: [S, g].

    Returns:
        scale, zero_point: float32 [S, O].
    """
    if not grid.clip_search or value.device.type != "cpu" or value.shape[-1] % UNROLL or not _has_ranges():
        return fit_scale(value, grid, importance.unsqueeze(1))
    scale, zero = ranges(value, grid)
    chosen = _compiled(value, importance.sqrt(), scale, zero, grid, None)[2].unsqueeze(-1)
    return scale.gather(-1, chosen)[..., 0], zero.gather(-1, chosen)[..., 0]


def loop_in_torch(value, factor, scale, zero, grid, old=None) -> tuple[Tensor, Tensor, Tensor]:
    """`column_loop` on any device: the reference."""
    num, rows, candidates = scale.shape
    chosen = torch.zeros(num, rows, dtype=torch.long, device=value.device)
    if candidates > 1:  # as so many more rows
        repeated = value.repeat_interleave(candidates, 1)
        loss = _pass(repeated, factor, scale.flatten(1), zero.flatten(1), grid, None)[1].square().sum(-1)
        chosen = loss.view(scale.shape).argmin(-1)
    pick = chosen[..., None]
    codes, errors = _pass(value, factor, scale.gather(-1, pick)[..., 0], zero.gather(-1, pick)[..., 0], grid, old)
    return codes.to(torch.uint8), errors, chosen


def _pass(value, factor, scale, zero, grid, old) -> tuple[Tensor, Tensor]:
    value = value.clone()
    codes, errors = torch.empty_like(value), torch.empty_like(value)
    for j in range(value.shape[-1]):
        code = encode(value[..., j], scale, zero, grid)
        rounded = (code - zero) * scale
        error = (value[..., j] - rounded) / factor[:, None, j, j] if old is None else rounded - old[..., j]
        value[..., j + 1 :] -= error[..., None] * factor[:, None, j, j + 1 :]
        codes[..., j], errors[..., j] = code, error
    return codes, errors


@cache
def library() -> ctypes.CDLL | None:
    """The compiled loop, or None with one warning where it is not built."""
    path = Path(__file__).with_name(f"_column_loop{sysconfig.get_config_var('EXT_SUFFIX')}")
    try:
        lib = ctypes.CDLL(str(path))
    except OSError as error:
        warnings.warn(
            f"GPTQ's compiled loop cannot be loaded ({error}): it will run through torch, many times slower. Install "
            "a C++ compiler and reinstall eacmoe-lightning to have it",
            stacklevel=2,
        )
        return None
    lib.eacmoe_columns.argtypes = [ctypes.c_int, ctypes.POINTER(_Columns), ctypes.c_int64, ctypes.c_int64]
    lib.eacmoe_columns.restype = None
    return lib


@cache
def _has_ranges() -> bool:
    """Whether the compiled loop is there, and no older than `fit_range`."""
    return library() is not None and hasattr(library(), "eacmoe_columns_without_factor")


@cache
def triton_loop() -> ModuleType | None:
    """The loop for CUDA; None without Triton."""
    try:
        return import_module("eacmoe_lightning.triton_column_loop")
    except ImportError as error:
        warnings.warn(f"GPTQ will run slowly on this GPU, without Triton ({error})", stacklevel=2)
        return None


@cache
def level() -> int:
    """The best instruction set of this CPU, by its place in LEVELS."""
    return library().eacmoe_columns_level()


class _Columns(ctypes.Structure):
    """`struct Columns` of csrc/column_loop.cpp."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("value", "old", "factor", "inverse", "scale", "zero")),
        *((name, ctypes.c_void_p) for name in ("codes", "errors", "chosen")),
        *((name, ctypes.c_int64) for name in ("problems", "rows", "columns", "stride", "candidates")),
        ("top", ctypes.c_float),
    ]


def _compiled(value, factor, scale, zero, grid, old) -> tuple[Tensor, Tensor, Tensor]:
    num, rows, columns = value.shape
    stride = value.stride(1)
    strided = value.stride(0) == rows * stride and value.stride(2) == 1
    if not strided or (old is not None and old.stride() != value.stride()):
        value, old, stride = value.contiguous(), None if old is None else old.contiguous(), columns
    factor, scale, zero = factor.contiguous(), scale.contiguous(), zero.contiguous()
    if factor.ndim == 2:  # [S, g]: what an error of a column counts, and nothing between columns
        factor, inverse, codes, errors = None, factor, None, None
    else:
        inverse = factor.diagonal(dim1=-2, dim2=-1).reciprocal()
        codes, errors = torch.empty(value.shape, dtype=torch.uint8), torch.empty(value.shape)
    chosen = torch.empty(num, rows, dtype=torch.int32)
    tensors = value, old, factor, inverse, scale, zero, codes, errors, chosen
    pointers = (None if tensor is None else tensor.data_ptr() for tensor in tensors)
    task = _Columns(*pointers, num, rows, columns, stride, scale.shape[-1], grid.max_code)
    run, threads, total = library().eacmoe_columns, torch.get_num_threads(), num * rows
    cuts = [total * t // threads for t in range(threads + 1)]
    if threads == 1:
        run(level(), task, 0, total)
    else:  # ctypes lets go of the interpreter's lock
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(lambda t: run(level(), task, cuts[t], cuts[t + 1]), range(threads)))
    return codes, errors, chosen.long()
