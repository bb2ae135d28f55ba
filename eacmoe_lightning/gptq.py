"""GPTQ (arXiv 2210.17323): round a weight column by column, spreading each error over what is left.

In the notation of the paper: H = 2/n sum x x^T over the inputs of the layer, U the upper Cholesky factor of
H^-1. Rounding column j by e_j = (w_j - q_j) / U_jj changes every later column by -e_j U_j,:. One call solves a
stack of problems (the experts of a block) together: weights [..., O, I] with Hessians [..., I, I].
"""

from __future__ import annotations

import torch
from torch import Tensor

from eacmoe_lightning.grid import Grid, Quantized, encode, fit_scale

MAX_DAMPING_STEPS = 4  # each ten times the last, before a Hessian is given up


def gptq(
    weight: Tensor,
    hessian: Tensor,
    grid: Grid,
    damping: float = 0.01,
    act_order: bool = False,
) -> Quantized:
    """Codes that minimise the layer's output error sum_x |(W - Q) x|^2, greedily (GPTQ, algorithm 1).

    Args:
        weight: [..., O, I], any float dtype; computed in float32 and not changed.
        hessian: [..., I, I] float32. Its scale does not matter.
        damping: added to the diagonal, as a share of its mean.
        act_order: visit the columns by descending diagonal of H. Scales then come from the original
            weights (static groups), so that codes stay in their place and need no index.

    Returns:
        Codes of shape [..., O, I], scale and zero point [..., O, I / group_size].

    Raises:
        ValueError: in_features is not a multiple of group_size, or a Hessian or weight is not finite, or a
            Hessian cannot be factored even with 10^4 times the damping.
    """
    lead, (rows, columns) = weight.shape[:-2], weight.shape[-2:]
    if columns % grid.group_size:
        raise ValueError(
            f"in_features={columns} is not a multiple of group_size={grid.group_size} (--model.group_size)"
        )
    w = weight.detach().float().reshape(-1, rows, columns).clone()  # [S, O, I]
    h = hessian.float().reshape(-1, columns, columns).clone()  # [S, I, I]
    if not torch.isfinite(w).all() or not torch.isfinite(h).all():
        raise ValueError("a weight or Hessian holds NaN or infinite values: look at the original checkpoint's block")

    diagonal = h.diagonal(dim1=-2, dim2=-1)  # [S, I] view
    dead = diagonal <= 0
    w.masked_fill_(dead.unsqueeze(1), 0)  # inputs that are always zero: nothing depends on their weight
    live = (diagonal * ~dead).sum(-1, keepdim=True) / (~dead).sum(-1, keepdim=True).clamp(min=1)  # [S, 1]
    diagonal.copy_(torch.where(dead, torch.where(live > 0, live, 1.0), diagonal))

    groups = columns // grid.group_size
    if act_order:
        order = diagonal.argsort(dim=-1, descending=True, stable=True)  # [S, I]
        importance = diagonal.unflatten(-1, (groups, -1)).unsqueeze(1)
        scale, zero = fit_scale(w.unflatten(-1, (groups, -1)), grid, importance)  # [S, O, G]
        group_of = order // grid.group_size
        w = w.gather(2, order.unsqueeze(1).expand_as(w))
        h = h.gather(1, order.unsqueeze(2).expand_as(h)).gather(2, order.unsqueeze(1).expand_as(h))
        diagonal = h.diagonal(dim1=-2, dim2=-1)
    else:
        scale, zero = w.new_empty(len(w), rows, groups), w.new_empty(len(w), rows, groups)
    u = _inverse_factor(h, damping)  # [S, I, I] upper

    codes = torch.empty_like(w)
    for start in range(0, columns, grid.group_size):  # a group is also the chunk of lazy updates
        end = start + grid.group_size
        chunk, factor = w[:, :, start:end], u[:, start:end, start:end]
        if act_order:
            column_scale = scale.gather(2, group_of[:, None, start:end].expand(-1, rows, -1))
            column_zero = zero.gather(2, group_of[:, None, start:end].expand(-1, rows, -1))
        else:
            s, z = fit_scale(chunk, grid, diagonal[:, None, start:end])
            scale[:, :, start // grid.group_size], zero[:, :, start // grid.group_size] = s, z
            column_scale, column_zero = s[..., None].expand_as(chunk), z[..., None].expand_as(chunk)
        errors = torch.empty_like(chunk)
        for j in range(grid.group_size):
            s, z, column = column_scale[:, :, j], column_zero[:, :, j], chunk[:, :, j]
            code = encode(column, s, z, grid)
            error = (column - (code - z) * s) / factor[:, None, j, j]
            chunk[:, :, j + 1 :] -= error[..., None] * factor[:, None, j, j + 1 :]
            codes[:, :, start + j], errors[:, :, j] = code, error
        w[:, :, end:] -= errors @ u[:, start:end, end:]

    if act_order:
        codes = torch.empty_like(codes).scatter_(2, order.unsqueeze(1).expand_as(codes), codes)
    shape = (*lead, rows, groups)
    return Quantized(
        codes.to(torch.uint8).reshape(weight.shape),
        scale.half().reshape(shape),
        zero.to(torch.uint8).reshape(shape),
        grid.bits,
    )


def _inverse_factor(h: Tensor, damping: float) -> Tensor:
    """Upper Cholesky factor of (H + damping * mean(diag H) * I)^-1, [S, I, I]."""
    mean = h.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None]  # [S, 1]
    for step in range(MAX_DAMPING_STEPS + 1):
        damped = h + torch.diag_embed((damping * 10**step * mean).expand(-1, h.shape[-1]))
        lower, info = torch.linalg.cholesky_ex(damped)
        if not info.any():
            upper, info = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not info.any():
                return upper
    raise ValueError(
        f"the Hessian of {int((info != 0).sum())} of {len(h)} matrices cannot be factored, even with damping "
        f"{damping * 10**MAX_DAMPING_STEPS}. Raise --model.damping, calibrate on more text (--data.num_windows), or "
        "look for dead or exploding activations in this block"
    )


def output_error(weight: Tensor, quantized: Quantized, hessian: Tensor) -> Tensor:
    """Relative squared output error tr((W-Q) H (W-Q)^T) / tr(W H W^T), one number per problem [...]."""
    w = weight.float()
    delta = w - quantized.dequantize()
    h = hessian.float()
    return ((delta @ h) * delta).sum((-2, -1)) / ((w @ h) * w).sum((-2, -1)).clamp(min=1e-30)
