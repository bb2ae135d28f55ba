"""GPTQ (arXiv 2210.17323) and what follows it: codes and scales that keep a layer's outputs, [..., O, I] from Hessians.

H = 2/n sum x x^T over the inputs of the layer is factored once, as F diag(p) F^T with a unit upper triangular F. The
loss of codes Q is then

    sum_x |(W - Q) x|^2 = n/2 tr (W - Q) H (W - Q)^T = n/2 sum_j p_j |((W - Q) F)_j|^2

and column j of (W - Q) F holds w_j - q_j and what the columns before it have moved. So each column in turn is rounded
from w_j + sum_{k<j} (w_k - q_k) F_kj. The paper rounds the same numbers by way of the Cholesky factor of H^-1, which is
diag(p)^-1/2 F^-1 (QuIP, arXiv 2307.13304, shows it of its LDLQ); F takes a quarter of that factoring and no inverse.
Beyond the paper:

    order    groups, and the inputs within a group, by falling importance; a group stays together, so no index is needed
    search   a group's scale and zero point are those whose column loop adds the least loss, of several
    refine   sweeps over the groups: a group's scales by least squares and its codes by coordinate descent (QuantEase,
             arXiv 2309.01885), in turn, given all other groups; neither can raise the loss

One call solves a stack of problems (the experts of a block) together.
"""

from __future__ import annotations

import torch
from torch import Tensor

from eacmoe_lightning.quantization.column_loop import column_loop, fit_range
from eacmoe_lightning.quantization.grid import Grid, Quantized, neighbours

MAX_DAMPING_STEPS = 4  # each ten times the last, before a Hessian is given up
CACHED = 16 << 20  # bytes of a stack's weights that a CPU solves together
TOGETHER = 256 << 20  # the same of a GPU
TURNS = 2  # of codes and scales in a group, at each visit of a sweep
TILE = 256  # columns of a tile of a product with a triangle

NOT_FINITE = "a weight or Hessian holds NaN or infinite values: look at the original checkpoint's block"


def solve(
    weight: Tensor,
    hessian: Tensor,
    grid: Grid,
    damping: float = 0.01,
    act_order: bool = False,
    search: bool = False,
    refine: int = 0,
) -> tuple[Quantized, Tensor]:
    """Codes that minimise the layer's output error sum_x |(W - Q) x|^2 (GPTQ, algorithm 1, and see above).

    Args:
        weight: [..., O, I], any float dtype; computed in float32 and not changed.
        hessian: [..., I, I] float32. Its scale does not matter.
        damping: added to the diagonal, as a share of its mean.
        act_order: visit groups, and inputs within a group, by falling diagonal of H.
        search: choose scale and zero point of each group by the loss that its column loop adds.
        refine: sweeps of scales by least squares and coordinate descent over the codes, after the last column.

    Returns:
        Codes of shape [..., O, I], scale and zero point [..., O, I / group_size]; and what `output_error` says of them
        [...] (without inputs that are always zero), from the losses that are known here anyway.

    Raises:
        ValueError: in_features is not a multiple of group_size, or a Hessian or weight is not finite, or a
            Hessian cannot be factored even with 10^4 times the damping.
    """
    lead, (rows, columns) = weight.shape[:-2], weight.shape[-2:]
    if columns % grid.group_size:
        raise ValueError(
            f"in_features={columns} is not a multiple of group_size={grid.group_size} (--model.group_size)"
        )
    flat = weight.detach().reshape(-1, rows, columns)  # [S, O, I]
    h = hessian.float().reshape(-1, columns, columns)  # [S, I, I]
    if not torch.isfinite(h).all():
        raise ValueError(NOT_FINITE)
    diagonal = h.diagonal(dim1=-2, dim2=-1)  # [S, I]
    dead = diagonal <= 0
    live = (diagonal * ~dead).sum(-1, keepdim=True) / (~dead).sum(-1, keepdim=True).clamp(min=1)  # [S, 1]
    diagonal = torch.where(dead, torch.where(live > 0, live, 1.0), diagonal)
    if act_order:
        order, group_order = _orders(diagonal, grid.group_size)  # [S, I], [S, G]
        h, diagonal = in_order(in_order(h, order, 0), order, 1), diagonal.gather(1, order)
    else:
        h = h.clone()
    h.diagonal(dim1=-2, dim2=-1).copy_(diagonal)
    factor, pivot, added = damped_factor(h, damping)

    codes = torch.empty(flat.shape, dtype=torch.uint8, device=flat.device)
    scale = torch.empty(*flat.shape[:2], columns // grid.group_size, dtype=torch.float16, device=flat.device)
    zero = torch.empty(scale.shape, dtype=torch.uint8, device=flat.device)
    loss = whole = torch.zeros(len(flat), dtype=torch.float64, device=flat.device)
    together = rows_together(len(flat), columns, flat.device)
    for own in (slice(start, start + together) for start in range(0, rows, together)):
        w = flat[:, own].float()
        if not torch.isfinite(w).all():
            raise ValueError(NOT_FINITE)
        w = w.masked_fill(dead.unsqueeze(1), 0)  # inputs that are always zero: nothing depends on their weight
        w = in_order(w, order, 1) if act_order else w
        found, own_loss, own_whole = _solve_rows(w, h, factor, pivot, added, grid, search, refine)
        loss, whole = loss + own_loss, whole + own_whole
        if act_order:
            places = (order, group_order, group_order)
            found = (in_order(part, place.argsort(-1), 1) for part, place in zip(found, places, strict=True))
        for stored, part in zip((codes, scale, zero), found, strict=True):
            stored[:, own] = part
    error = (loss.clamp(min=0) / whole.clamp(min=1e-30)).float().reshape(lead)
    codes, scale, zero = (tensor.unflatten(0, lead) if lead else tensor[0] for tensor in (codes, scale, zero))
    return Quantized(codes, scale, zero, grid.bits), error


def _solve_rows(
    w: Tensor, h: Tensor, factor: Tensor, pivot: Tensor, added: Tensor, grid: Grid, search: bool, refine: int
) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor, Tensor]:
    """Some rows [S, O, I], which meet no others. Codes, scale and zero point; the loss that they leave, and that of a
    weight of zeros, both without what was added to the diagonal: [S] float64."""
    codes, scale, zero, away = _columns(w, factor, pivot, grid, search)
    root = pivot.sqrt().unsqueeze(1)
    loss, whole = _squares(away.mul_(root)), _squares(_by_factor(w, factor).mul_(root))
    if refine:
        gradient = _by_transposed(away.mul_(root), factor)  # (W - Q) H
        for sweeps_left in reversed(range(refine)):
            loss -= _sweep(gradient, h, codes, scale, zero, grid, sweeps_left > 0)
    delta = (_steps(codes, zero) * scale.unsqueeze(-1)).flatten(-2).sub_(w)
    return (codes, scale, zero), loss - added * _squares(delta), whole - added * _squares(w)


def _squares(x: Tensor) -> Tensor:
    """Sum of squares over the last two dimensions, [S] float64: what is subtracted later is nearly equal."""
    return torch.linalg.vector_norm(x, dim=-1).double().square().sum(-1)


def _orders(diagonal: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """Inputs [S, I] and groups [S, G] by falling importance; a group's inputs stay together."""
    importance = diagonal.unflatten(-1, (-1, group_size))  # [S, G, g]
    groups = importance.mean(-1).argsort(dim=-1, descending=True, stable=True)
    within = importance.argsort(dim=-1, descending=True, stable=True)
    within = within.gather(1, groups.unsqueeze(-1).expand_as(within))
    return (groups.unsqueeze(-1) * group_size + within).flatten(1), groups


def in_order(x: Tensor, order: Tensor, dim: int) -> Tensor:
    """Each matrix of a stack [S, A, B] with its rows (dim 0) or columns (1) in an order of its own, of `order` [S, n].

    (`gather` would write out an index as large as twice the stack.)
    """
    ordered = torch.empty_like(x, memory_format=torch.contiguous_format)
    for own, places, into in zip(x, order, ordered, strict=True):
        torch.index_select(own, dim, places, out=into)
    return ordered


def damped_factor(h: Tensor, damping: float) -> tuple[Tensor, Tensor, Tensor]:
    """Factors H + d I = F diag(p) F^T with d = damping * mean(diag H), ten times larger as often as that is needed.

    Args:
        h: [S, I, I]; d is added to it in place.

    Returns:
        F [S, I, I], upper triangular with ones on its diagonal; p [S, I]; d [S].

    Raises:
        ValueError: even 10^4 times the damping is not enough.
    """
    mean, added = h.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None], 0.0  # [S, 1]
    for step in range(MAX_DAMPING_STEPS + 1):
        h.diagonal(dim1=-2, dim2=-1).add_((damping * 10**step - added) * mean)
        added = damping * 10**step
        lower, info = torch.linalg.cholesky_ex(h.flip(-2, -1))  # the upper factor of H is the lower one from behind
        if not info.any():
            factor = lower.flip(-2, -1)
            root = factor.diagonal(dim1=-2, dim2=-1).clone()
            return factor.div_(root.unsqueeze(-2)), root.square(), added * mean[:, 0]
    raise ValueError(
        f"the Hessian of {int((info != 0).sum())} of {len(h)} matrices cannot be factored, even with damping "
        f"{damping * 10**MAX_DAMPING_STEPS}. Raise --model.damping, calibrate on more text (--data.num_windows), or "
        "look for dead or exploding activations in this block"
    )


def _columns(
    w: Tensor, factor: Tensor, pivot: Tensor, grid: Grid, search: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """GPTQ's own part: codes [S, O, I] uint8, scale and zero point [S, O, G] float32, and (W - Q) F [S, O, I]."""
    value = w.clone()  # what a column is rounded from, and behind it what is left of that: (W - Q) F
    codes = torch.empty(w.shape, dtype=torch.uint8, device=w.device)
    scale = w.new_empty(*w.shape[:2], w.shape[-1] // grid.group_size)
    zero = torch.empty_like(scale)
    for start in range(0, w.shape[-1], grid.group_size):  # a group is also the chunk of lazy updates
        end, group = start + grid.group_size, start // grid.group_size
        here, old, inner = value[:, :, start:end], w[:, :, start:end], factor[:, start:end, start:end]
        free = old + torch.linalg.solve_triangular(inner, here - old, upper=True, left=False, unitriangular=True)
        s, z = fit_range(free, grid, pivot[:, start:end])  # of the group's best weights, were they not rounded
        s, z = neighbours(s, z, grid) if search else (s[..., None], z[..., None])  # [S, O, C]
        codes[:, :, start:end], moved, chosen = column_loop(here, old, inner, pivot[:, start:end], s, z, grid)
        scale[:, :, group], zero[:, :, group] = (t.gather(-1, chosen[..., None])[..., 0] for t in (s, z))
        here.sub_(old).baddbmm_(moved, inner, alpha=-1)
        value[:, :, end:].baddbmm_(moved, factor[:, start:end, end:], alpha=-1)
    return codes, scale, zero, value


def _by_factor(x: Tensor, factor: Tensor) -> Tensor:
    """x F, [S, O, I], without what lies below the diagonal."""
    ends = range(TILE, x.shape[-1] + TILE, TILE)
    return torch.cat([x[:, :, :end] @ factor[:, :end, end - TILE : end] for end in ends], -1)


def _by_transposed(x: Tensor, factor: Tensor) -> Tensor:
    """x F^T, [S, O, I], likewise."""
    starts = range(0, x.shape[-1], TILE)
    return torch.cat([x[:, :, start:] @ factor[:, start : start + TILE, start:].mT for start in starts], -1)


def _steps(codes: Tensor, zero: Tensor) -> Tensor:
    """Code minus zero point, [S, O, G, g] float32."""
    return codes.unflatten(-1, (zero.shape[-1], -1)) - zero.unsqueeze(-1)


def _sweep(
    gradient: Tensor, h: Tensor, codes: Tensor, scale: Tensor, zero: Tensor, grid: Grid, goes_on: bool
) -> Tensor:
    """Takes each group in turn to better scales and codes, given all other groups as they are.

    With A = code - zero of a group [O, g] and its part K of H, the least-squares scale of a row moves by
    (a gradient^T) / (a K a^T). It is rounded to float16, and left where it would not be positive.

    Args:
        gradient: [S, O, I], (W - Q) H; right afterwards only if `goes_on`, else used up.
        h: [S, I, I].
        codes, scale, zero: [S, O, I] and [S, O, G]; codes and scales are changed in place.

    Returns:
        By how much the loss tr (W - Q) H (W - Q)^T has fallen, [S] float64.
    """
    gain = gradient.new_zeros(len(gradient), dtype=torch.float64)
    for start in range(0, gradient.shape[-1], grid.group_size):
        end, group = start + grid.group_size, start // grid.group_size
        own = h[:, start:end, start:end].contiguous()
        diagonal = own.diagonal(dim1=-2, dim2=-1)
        factor = own / diagonal.unsqueeze(-2)
        before, s, z = gradient[:, :, start:end], scale[:, :, group, None], zero[:, :, group, None]
        steps = codes[:, :, start:end] - z
        product, decoded, left = steps @ own, steps * s, before
        old = decoded
        for turn in range(TURNS + 1):
            away = (steps * left).sum(-1, keepdim=True) / (steps * product).sum(-1, keepdim=True)
            optimum = (s + away).half().float()
            better = torch.where((optimum > 0) & optimum.isfinite(), optimum, s)  # not so where all steps are zero
            left = left - (better - s) * product
            s, decoded = better, steps * better
            if turn < TURNS:
                wanted = decoded + left / diagonal.unsqueeze(1)
                new, moved, _ = column_loop(wanted, decoded, factor, diagonal, s, z, grid)
                change = moved @ own
                left, product, steps = left - change, product + change / s, new - z
        codes[:, :, start:end], scale[:, :, group] = new, s[..., 0]
        moved = decoded - old
        gain += (moved * (before + left)).sum(-1).double().sum(-1)
        first = 0 if goes_on else end
        gradient[:, :, first:].baddbmm_(moved, h[:, start:end, first:], alpha=-1)
    return gain


def rows_together(num: int, columns: int, device: torch.device) -> int:
    """How many rows of each of `num` problems are solved at a time: more would be no faster, and take memory."""
    return max(1, (CACHED if device.type == "cpu" else TOGETHER) // (4 * num * columns))


def working_bytes(num: int, rows: int, columns: int, device: torch.device) -> int:
    """Memory that a stack of `num` problems [O, I] takes at most, beside Hessians and weights."""
    rows = min(rows, rows_together(num, columns, device))
    return 4 * num * (4 * columns * columns + 8 * rows * columns)


def output_error(weight: Tensor, quantized: Quantized, hessian: Tensor) -> Tensor:
    """Relative squared output error tr((W-Q) H (W-Q)^T) / tr(W H W^T), one number per problem [...]."""
    w = weight.float()
    delta = w - quantized.dequantize()
    h = hessian.float()
    return ((delta @ h) * delta).sum((-2, -1)) / ((w @ h) * w).sum((-2, -1)).clamp(min=1e-30)
