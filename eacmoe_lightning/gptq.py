"""GPTQ (arXiv 2210.17323) and what follows it: codes and scales that keep a layer's outputs, [..., O, I] from Hessians.

In the notation of the paper: H = 2/n sum x x^T over the inputs of the layer, U the upper Cholesky factor of
H^-1. Rounding column j by e_j = (w_j - q_j) / U_jj changes every later column by -e_j U_j,:, and adds e_j^2 to the
loss sum_x |(W - Q) x|^2. Beyond the paper:

    order    groups, and the inputs within a group, by falling importance; a group stays together, so no index is needed
    search   a group's scale and zero point are those whose column loop adds the least loss, of several
    refine   scales by least squares against H, given the codes; then coordinate descent over the codes, given the
             scales (QuantEase, arXiv 2309.01885); neither can raise the loss

One call solves a stack of problems (the experts of a block) together.
"""

from __future__ import annotations

import torch
from torch import Tensor

from eacmoe_lightning.column_loop import column_loop, fit_range
from eacmoe_lightning.grid import Grid, Quantized, neighbours

MAX_DAMPING_STEPS = 4  # each ten times the last, before a Hessian is given up


def gptq(
    weight: Tensor,
    hessian: Tensor,
    grid: Grid,
    damping: float = 0.01,
    act_order: bool = False,
    search: bool = False,
    refine: int = 0,
) -> Quantized:
    """`solve` without its error."""
    return solve(weight, hessian, grid, damping, act_order, search, refine)[0]


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
        refine: rounds of scales by least squares and coordinate descent over the codes, after the last column.

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
    w = weight.detach().float().reshape(-1, rows, columns).clone()  # [S, O, I]
    h = hessian.float().reshape(-1, columns, columns).clone()  # [S, I, I]
    if not torch.isfinite(w).all() or not torch.isfinite(h).all():
        raise ValueError("a weight or Hessian holds NaN or infinite values: look at the original checkpoint's block")

    diagonal = h.diagonal(dim1=-2, dim2=-1)  # [S, I] view
    dead = diagonal <= 0
    w.masked_fill_(dead.unsqueeze(1), 0)  # inputs that are always zero: nothing depends on their weight
    live = (diagonal * ~dead).sum(-1, keepdim=True) / (~dead).sum(-1, keepdim=True).clamp(min=1)  # [S, 1]
    diagonal.copy_(torch.where(dead, torch.where(live > 0, live, 1.0), diagonal))

    if act_order:
        order, group_order = _orders(diagonal, grid.group_size)  # [S, I], [S, G]
        w = w.gather(2, order.unsqueeze(1).expand_as(w))
        h = h.gather(1, order.unsqueeze(2).expand_as(h)).gather(2, order.unsqueeze(1).expand_as(h))
    u, h, added = damped_factor(h, damping)
    original, target = w.clone(), w @ h
    codes, scale, zero, loss = _columns(w, u, grid, search)
    del u, w
    whole = _inner(target, original)
    for _ in range(refine):
        scale, _ = _refit(target, h, codes, scale, zero)
        codes = _descend(original, h, codes, scale, zero, grid)
    if refine:
        scale, gain = _refit(target, h, codes, scale, zero)
        loss = whole + gain
    delta = (_steps(codes, zero) * scale.unsqueeze(-1)).flatten(-2).sub_(original)
    loss, whole = loss - added * _inner(delta, delta), whole - added * _inner(original, original)  # as without damping
    error = (loss.clamp(min=0) / whole.clamp(min=1e-30)).float().reshape(lead)

    if act_order:
        codes = torch.empty_like(codes).scatter_(2, order.unsqueeze(1).expand_as(codes), codes)
        place = group_order.unsqueeze(1).expand_as(scale)
        scale, zero = (torch.empty_like(t).scatter_(2, place, t) for t in (scale, zero))
    shape = (*lead, rows, columns // grid.group_size)
    quantized = Quantized(
        codes.reshape(weight.shape), scale.half().reshape(shape), zero.to(torch.uint8).reshape(shape), grid.bits
    )
    return quantized, error


def _inner(a: Tensor, b: Tensor) -> Tensor:
    """Sum of products over the last two dimensions, [S] float64: what is subtracted later is nearly equal."""
    return (a * b).sum(-1).double().sum(-1)


def _orders(diagonal: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """Inputs [S, I] and groups [S, G] by falling importance; a group's inputs stay together."""
    importance = diagonal.unflatten(-1, (-1, group_size))  # [S, G, g]
    groups = importance.mean(-1).argsort(dim=-1, descending=True, stable=True)
    within = importance.argsort(dim=-1, descending=True, stable=True)
    within = within.gather(1, groups.unsqueeze(-1).expand_as(within))
    return (groups.unsqueeze(-1) * group_size + within).flatten(1), groups


def damped_factor(h: Tensor, damping: float) -> tuple[Tensor, Tensor, Tensor]:
    """Upper Cholesky factor of (H + d I)^-1 with d = damping * mean(diag H), what is in the brackets, [S, I, I], and d
    [S], ten times larger as often as that is needed.

    `h` is used up.
    """
    mean, added = h.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None], 0.0  # [S, 1]
    for step in range(MAX_DAMPING_STEPS + 1):
        h.diagonal(dim1=-2, dim2=-1).add_((damping * 10**step - added) * mean)
        added = damping * 10**step
        lower, info = torch.linalg.cholesky_ex(h)
        if not info.any():
            upper, info = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not info.any():
                return upper, h, added * mean[:, 0]
    raise ValueError(
        f"the Hessian of {int((info != 0).sum())} of {len(h)} matrices cannot be factored, even with damping "
        f"{damping * 10**MAX_DAMPING_STEPS}. Raise --model.damping, calibrate on more text (--data.num_windows), or "
        "look for dead or exploding activations in this block"
    )


def _columns(w: Tensor, u: Tensor, grid: Grid, search: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """GPTQ's own part; `w` [S, O, I] is used up. Codes [S, O, I] uint8, scale and zero point [S, O, G] float32, and the
    loss [S] float64."""
    num, rows, columns = w.shape
    loss = w.new_zeros(num, dtype=torch.float64)
    codes = torch.empty(w.shape, dtype=torch.uint8, device=w.device)
    scale, zero = w.new_empty(num, rows, columns // grid.group_size), w.new_empty(num, rows, columns // grid.group_size)
    importance = u.diagonal(dim1=-2, dim2=-1).square().reciprocal()  # what an error costs that later columns repair
    for start in range(0, columns, grid.group_size):  # a group is also the chunk of lazy updates
        end, group = start + grid.group_size, start // grid.group_size
        chunk, factor = w[:, :, start:end], u[:, start:end, start:end].contiguous()
        s, z = fit_range(chunk, grid, importance[:, start:end])
        s, z = neighbours(s, z, grid) if search else (s[..., None], z[..., None])  # [S, O, C]
        codes[:, :, start:end], errors, chosen = column_loop(chunk, factor, s, z, grid)
        scale[:, :, group], zero[:, :, group] = (t.gather(-1, chosen[..., None])[..., 0] for t in (s, z))
        loss += _inner(errors, errors)
        w[:, :, end:].baddbmm_(errors, u[:, start:end, end:], alpha=-1)
    return codes, scale, zero, loss


def _steps(codes: Tensor, zero: Tensor) -> Tensor:
    """Code minus zero point, [S, O, G, g] float32."""
    return codes.unflatten(-1, (zero.shape[-1], -1)) - zero.unsqueeze(-1)


def _refit(target: Tensor, h: Tensor, codes: Tensor, scale: Tensor, zero: Tensor) -> tuple[Tensor, Tensor]:
    """The scales [S, O, G] of least loss (w - As) H (w - As)^T of each row for its codes; A [I, G] holds code - zero.

    The normal equations (A^T H A) s = A^T H w of all rows at once; `target` [S, O, I] is w H. A row whose solution is
    worse once it is rounded to float16, or not positive, keeps its scales. Also the loss that the scales leave, less
    w H w^T: [S] float64.
    """
    a, groups = _steps(codes, zero), scale.shape[-1]
    right = (a * target.unflatten(-1, (groups, -1))).sum(-1)  # [S, O, G]
    normal = target.new_empty(*scale.shape, groups)  # [S, O, G, G], symmetric
    for k, part in enumerate(h.chunk(groups, dim=1)):
        upper = part.unflatten(-1, (groups, -1))[:, :, k:].flatten(-2)  # [S, g, (G - k) g]
        normal[:, :, k, k:] = ((a[:, :, k] @ upper).unflatten(-1, (groups - k, -1)) * a[:, :, k:]).sum(-1)
        normal[:, :, k:, k] = normal[:, :, k, k:]
    unused = normal.diagonal(dim1=-2, dim2=-1) <= 0  # a group whose codes all decode to zero
    solvable = normal + torch.diag_embed(torch.where(unused, 1.0, 1e-6 * normal.diagonal(dim1=-2, dim2=-1)))
    fitted = torch.linalg.solve_ex(solvable, right.unsqueeze(-1))[0].squeeze(-1).half().float()
    fitted = torch.where((fitted > 0) & fitted.isfinite(), fitted, scale)

    def loss(s: Tensor) -> Tensor:  # [S, O]
        return ((normal @ s.unsqueeze(-1)).squeeze(-1) * s).sum(-1) - 2 * (right * s).sum(-1)

    new, old = loss(fitted), loss(scale)
    better = new < old
    return torch.where(better.unsqueeze(-1), fitted, scale), torch.where(better, new, old).double().sum(-1)


def _descend(w: Tensor, h: Tensor, codes: Tensor, scale: Tensor, zero: Tensor, grid: Grid) -> Tensor:
    """One sweep of coordinate descent: each code in turn becomes the best for all other codes as they are."""
    q = (_steps(codes, zero) * scale.unsqueeze(-1)).flatten(-2)  # [S, O, I]
    gradient = (w - q) @ h
    diagonal = h.diagonal(dim1=-2, dim2=-1)
    codes = torch.empty_like(codes)
    for start in range(0, w.shape[-1], grid.group_size):
        end, group = start + grid.group_size, start // grid.group_size
        old = q[:, :, start:end].contiguous()
        wanted = old + gradient[:, :, start:end] / diagonal[:, None, start:end]
        factor = h[:, start:end, start:end] / diagonal[:, None, start:end]
        s, z = scale[:, :, group, None], zero[:, :, group, None]
        codes[:, :, start:end], change, _ = column_loop(wanted, factor, s, z, grid, old)
        gradient[:, :, end:].baddbmm_(change, h[:, start:end, end:], alpha=-1)
    return codes


def working_bytes(rows: int, columns: int) -> int:
    """Memory that one problem [O, I] of a stack takes at most, beside its Hessian and weight."""
    return 4 * (4 * columns * columns + 8 * rows * columns)


def output_error(weight: Tensor, quantized: Quantized, hessian: Tensor) -> Tensor:
    """Relative squared output error tr((W-Q) H (W-Q)^T) / tr(W H W^T), one number per problem [...]."""
    w = weight.float()
    delta = w - quantized.dequantize()
    h = hessian.float()
    return ((delta @ h) * delta).sum((-2, -1)) / ((w @ h) * w).sum((-2, -1)).clamp(min=1e-30)
