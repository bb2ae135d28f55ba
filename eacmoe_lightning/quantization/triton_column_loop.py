"""GPTQ's column loop on GPUs: a Triton program takes some rows through all columns of a group, candidate by candidate.

The rows' values stay in registers; torch would start several kernels for each column. What is proven, and how, stands
in tests/test_triton_column_loop.py: equality with torch's loop under Triton's interpreter. Imported only with Triton.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from eacmoe_lightning.quantization.grid import Grid

ROWS = 16  # of a program: with more, values spill out of the registers


@triton.jit
def _loop(
    value,  # [S, O, g] with strides
    old,  # [S, O, g] with strides
    factor,  # [S, g, g]
    weight,  # [S, g]
    scale,  # [S, O, C]
    zero,  # [S, O, C]
    codes,  # [S, O, g] uint8
    errors,  # [S, O, g]
    chosen,  # [S, O] int64
    problem_stride,
    row_stride,
    old_problem_stride,
    old_row_stride,
    num_rows,
    top,
    C: tl.constexpr,
    g: tl.constexpr,
    PADDED: tl.constexpr,  # a power of two, g or above
    ROWS: tl.constexpr,
):
    problem = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, PADDED)
    inside = row < num_rows
    both = inside[:, None] & (column < g)[None, :]
    values = tl.load(value + problem * problem_stride + row[:, None] * row_stride + column[None, :], both, 0.0)
    olds = tl.load(old + problem * old_problem_stride + row[:, None] * old_row_stride + column[None, :], both, 0.0)
    at = problem * num_rows + row
    best = tl.full([ROWS], 0, tl.int64)
    best_loss = tl.full([ROWS], float("inf"), tl.float32)
    SEARCHES: tl.constexpr = C if C > 1 else 0
    for c in range(SEARCHES + 1):  # the last time with each row's best
        last = c == SEARCHES
        own = tl.where(last, best, c)
        s = tl.load(scale + at * C + own, inside, 1.0)
        z = tl.load(zero + at * C + own, inside, 0.0)
        w = values
        loss = tl.full([ROWS], 0.0, tl.float32)
        for j in range(g):
            here = (column == j)[None, :]
            x = tl.sum(tl.where(here, w, 0.0), 1)
            f = tl.load(factor + (problem * g + j) * g + column, column < g, 0.0)
            code = tl.minimum(tl.maximum(tl.div_rn(x, s) + z, 0.0), top)
            code = (code + 12582912.0) - 12582912.0  # to the nearest whole number, ties to even
            rounded = (code - z) * s
            e = rounded - tl.sum(tl.where(here, olds, 0.0), 1)
            w -= tl.where((column > j)[None, :], e[:, None] * f[None, :], 0.0)
            loss += (x - rounded) * (x - rounded) * tl.load(weight + problem * g + j)
            if last:
                tl.store(codes + at * g + j, code.to(tl.uint8), inside)
                tl.store(errors + at * g + j, e, inside)
        better = (loss < best_loss) & (c < SEARCHES)
        best = tl.where(better, c, best)
        best_loss = tl.where(better, loss, best_loss)
    tl.store(chosen + at, best, inside)


def column_loop(
    value: Tensor, old: Tensor, factor: Tensor, weight: Tensor, scale: Tensor, zero: Tensor, grid: Grid
) -> tuple[Tensor, Tensor, Tensor]:
    """See `eacmoe_lightning.column_loop.column_loop`."""
    num, rows, columns = value.shape
    value, old = (t if t.stride(2) == 1 else t.contiguous() for t in (value, old))
    factor, weight, scale, zero = (t.contiguous() for t in (factor, weight, scale, zero))
    codes = torch.empty(value.shape, dtype=torch.uint8, device=value.device)
    errors = torch.empty(value.shape, device=value.device)
    chosen = torch.empty(num, rows, dtype=torch.int64, device=value.device)
    with torch.cuda.device_of(value):  # Triton launches on the current device
        _loop[(num, triton.cdiv(rows, ROWS))](
            *(value, old, factor, weight, scale, zero, codes, errors, chosen),
            *(value.stride(0), value.stride(1), old.stride(0), old.stride(1), rows, float(grid.max_code)),
            C=scale.shape[-1],
            g=columns,
            PADDED=triton.next_power_of_2(columns),
            ROWS=ROWS,
            enable_fp_fusion=False,  # rounded where torch rounds: the same codes, bit for bit
        )
    return codes, errors, chosen
