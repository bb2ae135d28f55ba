"""GPTQ (arXiv 2210.17323) and a refinement after it: codes and scales [..., O, I] that preserve a layer's outputs.

H = 2/n sum x x^T over the inputs of the layer is factored once, as F diag(p) F^T with a unit upper triangular F. The
loss of the dequantized weight Q is then

    sum_x |(W - Q) x|^2 = n/2 tr (W - Q) H (W - Q)^T = n/2 sum_j p_j |((W - Q) F)_j|^2

and column j of (W - Q) F is w_j - q_j plus the errors that earlier columns pass on. So each column in turn is rounded
from w_j + sum_{k<j} (w_k - q_k) F_kj. The paper rounds the same numbers, which it gets from the Cholesky factor of
H^-1. That factor is diag(p)^-1/2 F^-1 (QuIP, arXiv 2307.13304, shows this for its LDLQ); F needs a quarter of the
arithmetic and no inverse. Beyond the paper:

    order    visits groups, and the inputs within a group, by falling importance; a group stays together, so no index
             has to be stored
    search   tries several scales and zero points for each group, and keeps those whose column loop adds the least loss
    refine   sweeps over the groups: least squares for a group's scales and coordinate descent for its codes (QuantEase,
             arXiv 2309.01885) alternate, with all other groups fixed; neither can raise the loss

One call solves a stack of problems, such as the experts of a block.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from eacmoe_lightning.quantization.column_loop import column_loop, fit_range
from eacmoe_lightning.quantization.grid import Grid, Quantized, neighbours

DAMPING = 0.05  # default everywhere; the GPTQ paper's 0.01 loses more at 2 bit (docs/findings/gptq.md)
MAX_DAMPING_STEPS = 4  # how often damping is raised tenfold before a Hessian counts as impossible to factor
CACHED = 16 << 20  # bytes of a stack's weights that a CPU solves together
TOGETHER = 256 << 20  # the same for a GPU
TURNS = 2  # times that codes and scales of a group alternate in a sweep
TILE = 256  # columns of a tile in products with a triangular matrix


class NotFinite(ValueError):
    """A weight or a Hessian holds NaN or infinite values."""

    def __init__(self) -> None:
        super().__init__("a weight or Hessian holds NaN or infinite values")


def solve(
    weight: Tensor,
    hessian: Tensor,
    grid: Grid,
    damping: float = DAMPING,
    act_order: bool = False,
    search: bool = False,
    refine: int = 0,
) -> tuple[Quantized, Tensor]:
    """Codes that minimise the layer's output error sum_x |(W - Q) x|^2 (GPTQ, algorithm 1; see the module docstring).

    Args:
        weight: [..., O, I], any float dtype; not changed. The arithmetic is float32.
        hessian: [..., I, I] float32. Its scale does not matter.
        damping: added to the diagonal, as a share of its mean.
        act_order: visit groups, and inputs within a group, by falling diagonal of H.
        search: choose scale and zero point of each group by the loss that its column loop adds.
        refine: number of sweeps after the last column.

    Returns:
        Codes of shape [..., O, I] with scale and zero point [..., O, I / group_size]; and their `output_error` [...],
        without inputs that are always zero, computed from the losses that the solver has already.

    Raises:
        NotFinite: a Hessian or weight is not finite.
        ValueError: in_features is not a multiple of group_size, or a Hessian cannot be factored even with 10^4 times
            the damping.
    """
    if (columns := weight.shape[-1]) % grid.group_size:
        raise ValueError(
            f"in_features={columns} is not a multiple of group_size={grid.group_size} (--model.group_size)"
        )

    def orders(importance: Tensor) -> tuple[Tensor, ...]:
        order, groups = _orders(importance, grid.group_size)
        return order, groups, groups

    def rows(w: Tensor, system: System) -> SolvedRows:
        return _solve_rows(w, system, grid, search, refine)

    (codes, scale, zero), error = solve_by_rows(weight, hessian, damping, orders if act_order else None, rows)
    return Quantized(codes, scale, zero, grid.bits), error


@dataclass(frozen=True)
class System:
    """What all rows of a stack of S problems share, with the inputs in the order in which they are visited.

    Attributes:
        h: [S, I, I], damped; `factor` and `pivot` are its F [S, I, I] and p [S, I].
        added: [S], the damping in it.
    """

    h: Tensor
    factor: Tensor
    pivot: Tensor
    added: Tensor


@dataclass(frozen=True)
class SolvedRows:
    """Some rows [S, O, I] as a solver leaves them.

    Attributes:
        tensors: [S, O, *] each, as they are stored, in the order of visiting.
        loss, zero_loss: [S] float64, the loss and the loss of a weight of zeros, without the damping.
    """

    tensors: tuple[Tensor, ...]
    loss: Tensor
    zero_loss: Tensor


def solve_by_rows(
    weight: Tensor,
    hessian: Tensor,
    damping: float,
    orders: Callable[[Tensor], tuple[Tensor, ...]] | None,
    solve_rows: Callable[[Tensor, System], SolvedRows],
) -> tuple[list[Tensor], Tensor]:
    """The frame of a solver: checks, order, damping and factoring once, then as many rows at a time as caches hold.

    Args:
        weight: [..., O, I]; `hessian`: [..., I, I].
        orders: from the importance of the inputs [S, I], where the last dimension of each of the solver's tensors comes
            from, [S, *] each; the first is the order of the inputs. None: everything in its place.
        solve_rows: solves rows w [S, O', I], float32.

    Returns:
        The solver's tensors [..., O, *], every entry in its place, and the relative squared output errors [...].

    Raises:
        NotFinite, ValueError: as `solve`.
    """
    lead, (rows, columns) = weight.shape[:-2], weight.shape[-2:]
    flat = weight.detach().reshape(-1, rows, columns)  # [S, O, I]
    h = hessian.float().reshape(-1, columns, columns)  # [S, I, I]
    if not torch.isfinite(h).all():
        raise NotFinite
    diagonal = h.diagonal(dim1=-2, dim2=-1)  # [S, I]
    dead = diagonal <= 0
    live = (diagonal * ~dead).sum(-1, keepdim=True) / (~dead).sum(-1, keepdim=True).clamp(min=1)  # [S, 1]
    diagonal = torch.where(dead, torch.where(live > 0, live, 1.0), diagonal)
    places: tuple[Tensor, ...] = ()
    if orders is not None:
        places = orders(diagonal)
        order = places[0]
        h, diagonal = in_order(in_order(h, order, 0), order, 1), diagonal.gather(1, order)
    else:
        h = h.clone()
    h.diagonal(dim1=-2, dim2=-1).copy_(diagonal)
    system = System(h, *damped_factor(h, damping))

    results: list[Tensor] = []
    loss = zero_loss = torch.zeros(len(flat), dtype=torch.float64, device=flat.device)
    together = rows_together(len(flat), columns, flat.device)
    for part in (slice(start, start + together) for start in range(0, rows, together)):
        w = flat[:, part].float()
        if not torch.isfinite(w).all():
            raise NotFinite
        w = w.masked_fill(dead.unsqueeze(1), 0)  # inputs that are always zero: no output depends on their weights
        solved = solve_rows(in_order(w, order, 1) if places else w, system)
        loss, zero_loss = loss + solved.loss, zero_loss + solved.zero_loss
        tensors = solved.tensors
        if places:
            tensors = tuple(in_order(t, place.argsort(-1), 1) for t, place in zip(tensors, places, strict=True))
        results = results or [t.new_empty(len(flat), rows, t.shape[-1]) for t in tensors]
        for result, tensor in zip(results, tensors, strict=True):
            result[:, part] = tensor
    error = (loss.clamp(min=0) / zero_loss.clamp(min=1e-30)).float().reshape(lead)
    return [tensor.unflatten(0, lead) if lead else tensor[0] for tensor in results], error


def _solve_rows(w: Tensor, system: System, grid: Grid, search: bool, refine: int) -> SolvedRows:
    """Solves some rows [S, O, I]; rows do not depend on each other. The tensors are codes, scale and zero point."""
    codes, scale, zero, residual = _columns(w, system.factor, system.pivot, grid, search)

    def sweep(gradient: Tensor, keep_gradient: bool) -> Tensor:
        return _sweep(gradient, system.h, codes, scale, zero, grid, keep_gradient)

    def decoded() -> Tensor:
        return (_steps(codes, zero) * scale.unsqueeze(-1)).flatten(-2)

    loss, zero_loss = refined_losses(w, residual, system, refine, sweep, decoded)
    return SolvedRows((codes, scale.half(), zero.to(torch.uint8)), loss, zero_loss)


def refined_losses(
    w: Tensor,
    residual: Tensor,
    system: System,
    refine: int,
    sweep: Callable[[Tensor, bool], Tensor],
    decoded: Callable[[], Tensor],
) -> tuple[Tensor, Tensor]:
    """Refines rows that the columns have left, and measures them.

    Args:
        w: [S, O, I].
        residual: (W - Q) F [S, O, I] after the last column; overwritten.
        refine: number of sweeps.
        sweep: improves the rows, given (W - Q) H and whether that is needed afterwards; the decrease of the loss [S].
        decoded: the decoded rows [S, O, I] as they are then.

    Returns:
        The loss, and the loss of a weight of zeros (`SolvedRows`).
    """
    root = system.pivot.sqrt().unsqueeze(1)
    loss, zero_loss = _squares(residual.mul_(root)), _squares(_by_factor(w, system.factor).mul_(root))
    if refine:
        gradient = _by_transposed(residual.mul_(root), system.factor)  # (W - Q) H
        for sweeps_left in reversed(range(refine)):
            loss -= sweep(gradient, sweeps_left > 0)
    delta = decoded().sub_(w)
    return loss - system.added * _squares(delta), zero_loss - system.added * _squares(w)


def _squares(x: Tensor) -> Tensor:
    """Sum of squares over the last two dimensions, [S]; float64, because nearly equal sums are subtracted later."""
    return torch.linalg.vector_norm(x, dim=-1).double().square().sum(-1)


def _orders(diagonal: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """The orders of inputs [S, I] and of groups [S, G] by falling importance; a group's inputs stay together."""
    importance = diagonal.unflatten(-1, (-1, group_size))  # [S, G, g]
    groups = importance.mean(-1).argsort(dim=-1, descending=True, stable=True)
    within = importance.argsort(dim=-1, descending=True, stable=True)
    within = within.gather(1, groups.unsqueeze(-1).expand_as(within))
    return (groups.unsqueeze(-1) * group_size + within).flatten(1), groups


def in_order(x: Tensor, order: Tensor, dim: int) -> Tensor:
    """Reorders each matrix of a stack [S, A, B] along its rows (dim 0) or columns (dim 1) by its row of `order` [S, n].

    `gather` would need an index twice as large as the stack.
    """
    ordered = torch.empty_like(x, memory_format=torch.contiguous_format)
    for matrix, places, out in zip(x, order, ordered, strict=True):
        torch.index_select(matrix, dim, places, out=out)
    return ordered


def damped_factor(h: Tensor, damping: float) -> tuple[Tensor, Tensor, Tensor]:
    """Factors H + d I = F diag(p) F^T with d = damping * mean(diag H), raised tenfold until the factoring succeeds.

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
        lower, info = torch.linalg.cholesky_ex(h.flip(-2, -1))  # upper factor: flip, take the lower one, flip back
        if not info.any():
            factor = lower.flip(-2, -1)
            root = factor.diagonal(dim1=-2, dim2=-1).clone()
            return factor.div_(root.unsqueeze(-2)), root.square(), added * mean[:, 0]
    raise ValueError(
        f"the Hessians of {int((info != 0).sum())} of {len(h)} matrices cannot be factored, even with damping "
        f"{damping * 10**MAX_DAMPING_STEPS}. Raise --model.damping, calibrate on more text (--data.num_windows), or "
        "look for dead or exploding activations in this block"
    )


def _columns(
    w: Tensor, factor: Tensor, pivot: Tensor, grid: Grid, search: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """GPTQ without refinement: codes [S, O, I] uint8, scale and zero point [S, O, G] float32, (W - Q) F [S, O, I]."""
    value = w.clone()  # what columns are rounded from; once a group is rounded, its columns hold (W - Q) F
    codes = torch.empty(w.shape, dtype=torch.uint8, device=w.device)
    scale = w.new_empty(*w.shape[:2], w.shape[-1] // grid.group_size)
    zero = torch.empty_like(scale)
    for start in range(0, w.shape[-1], grid.group_size):  # a group is also the chunk of lazy updates
        end, group = start + grid.group_size, start // grid.group_size
        here, old, inner = value[:, :, start:end], w[:, :, start:end], factor[:, start:end, start:end]
        free = old + torch.linalg.solve_triangular(inner, here - old, upper=True, left=False, unitriangular=True)
        s, z = fit_range(free, grid, pivot[:, start:end])  # fitted to the group's optimal weights before rounding
        s, z = neighbours(s, z, grid) if search else (s[..., None], z[..., None])  # [S, O, C]
        codes[:, :, start:end], moved, chosen = column_loop(here, old, inner, pivot[:, start:end], s, z, grid)
        scale[:, :, group], zero[:, :, group] = (t.gather(-1, chosen[..., None])[..., 0] for t in (s, z))
        here.sub_(old).baddbmm_(moved, inner, alpha=-1)
        value[:, :, end:].baddbmm_(moved, factor[:, start:end, end:], alpha=-1)
    return codes, scale, zero, value


def _by_factor(x: Tensor, factor: Tensor) -> Tensor:
    """x F, [S, O, I], skipping tiles of F below the diagonal."""
    ends = range(TILE, x.shape[-1] + TILE, TILE)
    return torch.cat([x[:, :, :end] @ factor[:, :end, end - TILE : end] for end in ends], -1)


def _by_transposed(x: Tensor, factor: Tensor) -> Tensor:
    """x F^T, [S, O, I], skipping tiles of F below the diagonal."""
    starts = range(0, x.shape[-1], TILE)
    return torch.cat([x[:, :, start:] @ factor[:, start : start + TILE, start:].mT for start in starts], -1)


def _steps(codes: Tensor, zero: Tensor) -> Tensor:
    """Code minus zero point, [S, O, G, g] float32."""
    return codes.unflatten(-1, (zero.shape[-1], -1)) - zero.unsqueeze(-1)


def _sweep(
    gradient: Tensor, h: Tensor, codes: Tensor, scale: Tensor, zero: Tensor, grid: Grid, keep_gradient: bool
) -> Tensor:
    """Improves scales and codes of each group in turn, with all other groups fixed.

    With the row a of (code - zero) in a group and K the group's block of H, least squares changes the row's scale by
    (a gradient^T) / (a K a^T). The new scale is rounded to float16, and the old one stays if it would not be positive.

    Args:
        gradient: [S, O, I], (W - Q) H. Updated in place if `keep_gradient`; otherwise its contents are undefined
            afterwards.
        h: [S, I, I].
        codes, scale, zero: [S, O, I] and [S, O, G]; codes and scales are changed in place.

    Returns:
        The decrease of the loss tr (W - Q) H (W - Q)^T, [S] float64.
    """
    gain = gradient.new_zeros(len(gradient), dtype=torch.float64)
    for start in range(0, gradient.shape[-1], grid.group_size):
        end, group = start + grid.group_size, start // grid.group_size
        inner = h[:, start:end, start:end].contiguous()
        diagonal = inner.diagonal(dim1=-2, dim2=-1)
        factor = inner / diagonal.unsqueeze(-2)
        initial, s, z = gradient[:, :, start:end], scale[:, :, group, None], zero[:, :, group, None]
        steps = codes[:, :, start:end] - z
        product, decoded, current = steps @ inner, steps * s, initial
        old = decoded
        for turn in range(TURNS + 1):
            shift = (steps * current).sum(-1, keepdim=True) / (steps * product).sum(-1, keepdim=True)
            optimum = (s + shift).half().float()
            better = torch.where((optimum > 0) & optimum.isfinite(), optimum, s)  # NaN where all steps are zero
            current = current - (better - s) * product
            s, decoded = better, steps * better
            if turn < TURNS:
                wanted = decoded + current / diagonal.unsqueeze(1)
                new, moved, _ = column_loop(wanted, decoded, factor, diagonal, s, z, grid)
                change = moved @ inner
                current, product, steps = current - change, product + change / s, new - z
        codes[:, :, start:end], scale[:, :, group] = new, s[..., 0]
        moved = decoded - old
        gain += (moved * (initial + current)).sum(-1).double().sum(-1)
        first = 0 if keep_gradient else end
        gradient[:, :, first:].baddbmm_(moved, h[:, start:end, first:], alpha=-1)
    return gain


def rows_together(num: int, columns: int, device: torch.device) -> int:
    """How many rows of each of `num` problems are solved at a time; more would take memory and be no faster."""
    return max(1, (CACHED if device.type == "cpu" else TOGETHER) // (4 * num * columns))


def working_bytes(num: int, rows: int, columns: int, device: torch.device) -> int:
    """Peak memory of solving a stack of `num` problems [O, I], in addition to Hessians and weights."""
    rows = min(rows, rows_together(num, columns, device))
    return 4 * num * (4 * columns * columns + 8 * rows * columns)


def output_error(weight: Tensor, quantized: Quantized, hessian: Tensor) -> Tensor:
    """Relative squared output error tr((W-Q) H (W-Q)^T) / tr(W H W^T), one number per problem [...]."""
    w = weight.float()
    delta = w - quantized.dequantize()
    h = hessian.float()
    return ((delta @ h) * delta).sum((-2, -1)) / ((w @ h) * w).sum((-2, -1)).clamp(min=1e-30)
