"""GPTQ on llama.cpp's blocks (`kquant.py`); see `gptq.py` for the method, F, p and the frame.

The scales of a block's groups are multiples of one number, so a block is fitted as a whole when its first column is
reached: each group's scale and minimum by weighted least squares, then the two units that represent them best. Group by
group the column loop then tries the multiples around the fitted ones and keeps those that add the least loss. In the
refinement each group's multiples, its codes, and at the end of the block its two units take turns; each is set to the
value on its grid that is nearest to the optimum with all others fixed, so none can raise the loss.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from eacmoe_lightning.quantization.column_loop import column_loop, least_error
from eacmoe_lightning.quantization.gptq import DAMPING, TURNS, SolvedRows, System, refined_losses, solve_by_rows
from eacmoe_lightning.quantization.grid import SCALE_FACTORS, SHRINKS
from eacmoe_lightning.quantization.kquant import BlockType, KQuant

FITS = 2  # times that codes and least squares alternate in the first fit of a group
UNITS = torch.linspace(0.6, 1.1, 26)  # factors of the largest scale over the largest multiple that are tried as unit
MINIMUM_SHIFTS = (0.0, -0.5, 0.5)  # in codes, by which the search moves a group's minimum


def solve(
    weight: Tensor,
    hessian: Tensor,
    kind: BlockType,
    damping: float = DAMPING,
    act_order: bool = False,
    search: bool = False,
    refine: int = 0,
) -> tuple[KQuant, Tensor]:
    """Codes and scales that minimise the layer's output error sum_x |(W - Q) x|^2.

    Args:
        weight: [..., O, I], any float dtype; not changed. The arithmetic is float32.
        hessian: [..., I, I] float32. Its scale does not matter.
        kind: the type; its block must divide I.
        damping: added to the diagonal, as a share of its mean.
        act_order: visit blocks, groups within a block, and inputs within a group, by falling diagonal of H.
        search: choose each group's scale and minimum by the loss that its column loop adds.
        refine: number of sweeps after the last column.

    Returns:
        The quantized weight, and its relative squared output error [...].

    Raises:
        NotFinite, ValueError: as `gptq.solve`.
    """

    def orders(importance: Tensor) -> tuple[Tensor, ...]:
        inputs, blocks, groups = _orders(importance, kind)
        return inputs, blocks, blocks, groups, groups

    def rows(w: Tensor, system: System) -> SolvedRows:
        return _solve_rows(w, system, kind, search, refine)

    fields, error = solve_by_rows(weight, hessian, damping, orders if act_order else None, rows)
    return KQuant(*fields, kind.name), error


def _orders(importance: Tensor, kind: BlockType) -> tuple[Tensor, Tensor, Tensor]:
    """The orders of inputs [S, I], blocks [S, B] and groups [S, G] by falling importance.

    A block's groups stay together, and a group's inputs.
    """
    per_block = kind.block // kind.group
    groups = importance.unflatten(-1, (-1, per_block, kind.group))  # [S, B, groups of a block, g]
    blocks = groups.mean((-2, -1)).argsort(dim=-1, descending=True, stable=True)
    places = groups.mean(-1).argsort(dim=-1, descending=True, stable=True)  # of groups in their block
    places += torch.arange(places.shape[1], device=places.device)[:, None] * per_block
    places = places.gather(1, blocks.unsqueeze(-1).expand_as(places)).flatten(1)  # [S, G]
    within = groups.flatten(1, 2).argsort(dim=-1, descending=True, stable=True)  # [S, G, g]
    within = within.gather(1, places.unsqueeze(-1).expand_as(within))
    return (places.unsqueeze(-1) * kind.group + within).flatten(1), blocks, places


@dataclass
class _Rows:
    """Rows [S, O, I] in the making; floats, and all but the codes on their grids.

    Attributes:
        codes: [S, O, I] uint8.
        unit, minimum_unit: [S, O, B], `KQuant.scale` and `KQuant.minimum`.
        multiple, minimum: [S, O, G], the sub-scales and sub-minimums.
    """

    kind: BlockType
    codes: Tensor
    unit: Tensor
    minimum_unit: Tensor
    multiple: Tensor
    minimum: Tensor

    @classmethod
    def empty(cls, shape: torch.Size, kind: BlockType, device: torch.device) -> _Rows:
        *rows, columns = shape
        sizes = 2 * [columns // kind.block] + 2 * [columns // kind.group]
        codes = torch.empty(shape, dtype=torch.uint8, device=device)
        return cls(kind, codes, *(torch.empty(*rows, size, device=device) for size in sizes))

    def fields(self) -> tuple[Tensor, ...]:
        """The tensors of `KQuant`."""
        halves = self.unit.half(), self.minimum_unit.half()
        return self.codes, *halves, self.multiple.to(torch.int16), self.minimum.to(torch.int16)

    def group(self, group: int) -> tuple[Tensor, Tensor]:
        """Scale and minimum of a group, [S, O] each."""
        block = group * self.kind.group // self.kind.block
        scale = self.unit[:, :, block] * self.multiple[:, :, group]
        return scale, self.minimum_unit[:, :, block] * self.minimum[:, :, group]

    def decoded(self, start: int, end: int) -> Tensor:
        """The weights of some columns, which are whole blocks, [S, O, n]."""
        kind, groups = self.kind, slice(start // self.kind.group, end // self.kind.group)
        units = [unit[:, :, start // kind.block : end // kind.block] for unit in (self.unit, self.minimum_unit)]
        units = [unit.repeat_interleave(kind.block // kind.group, -1) for unit in units]
        scale, minimum = units[0] * self.multiple[:, :, groups], units[1] * self.minimum[:, :, groups]
        steps = self.codes[:, :, start:end].unflatten(-1, (-1, kind.group)) - float(kind.offset)
        return (steps * scale.unsqueeze(-1) - minimum.unsqueeze(-1)).flatten(-2)


def _solve_rows(w: Tensor, system: System, kind: BlockType, search: bool, refine: int) -> SolvedRows:
    rows, residual = _columns(w, system, kind, search)

    def sweep(gradient: Tensor, keep_gradient: bool) -> Tensor:
        return _sweep(gradient, system.h, rows)

    def decoded() -> Tensor:
        return rows.decoded(0, w.shape[-1])

    loss, zero_loss = refined_losses(w, residual, system, refine, sweep, decoded)
    return SolvedRows(rows.fields(), loss, zero_loss)


def _columns(w: Tensor, system: System, kind: BlockType, search: bool) -> tuple[_Rows, Tensor]:
    """GPTQ without refinement: the rows, and (W - Q) F [S, O, I]."""
    factor, pivot = system.factor, system.pivot
    value = w.clone()  # what columns are rounded from; once a group is rounded, its columns hold (W - Q) F
    rows = _Rows.empty(w.shape, kind, w.device)
    for first in range(0, w.shape[-1], kind.block):
        last = first + kind.block
        inner = factor[:, first:last, first:last]
        old, here = w[:, :, first:last], value[:, :, first:last]
        free = old + torch.linalg.solve_triangular(inner, here - old, upper=True, left=False, unitriangular=True)
        _fit_block(rows, first, free, pivot[:, first:last])
        moved = torch.empty_like(free)
        for start in range(0, kind.block, kind.group):
            end, group = start + kind.group, (first + start) // kind.group
            columns, own = slice(first + start, first + end), inner[:, start:end, start:end]
            part, weights = here[:, :, start:end], pivot[:, columns]
            multiple, minimum = _candidates(rows, group, search)  # [S, O, C]
            block = first // kind.block
            scale = rows.unit[:, :, block, None] * multiple
            zero = kind.offset + rows.minimum_unit[:, :, block, None] * minimum / scale
            codes, moved[:, :, start:end], chosen = column_loop(
                part, old[:, :, start:end], own, weights, scale, zero, kind.grid
            )
            rows.codes[:, :, columns] = codes
            for target, candidates in ((rows.multiple, multiple), (rows.minimum, minimum)):
                target[:, :, group] = candidates.gather(-1, chosen[..., None])[..., 0]
            if not kind.is_super:  # the unit is the scale
                rows.unit[:, :, block] *= rows.multiple[:, :, group]
                rows.multiple[:, :, group] = 1
            part.sub_(old[:, :, start:end]).baddbmm_(moved[:, :, start:end], own, alpha=-1)
            here[:, :, end:].baddbmm_(moved[:, :, start:end], inner[:, start:end, end:], alpha=-1)
        value[:, :, last:].baddbmm_(moved, factor[:, first:last, last:], alpha=-1)
    return rows, value


def _fit_block(rows: _Rows, first: int, free: Tensor, importance: Tensor) -> None:
    """Fits the units and multiples of the block whose first column is `first` to weights `free` [S, O, block]."""
    kind, block = rows.kind, first // rows.kind.block
    fits = [
        _fit_group(free[:, :, start : start + kind.group], importance[:, start : start + kind.group], kind)
        for start in range(0, kind.block, kind.group)
    ]
    scale, minimum, scale_weight, minimum_weight = (torch.stack(t, -1) for t in zip(*fits, strict=True))
    groups = slice(first // kind.group, (first + kind.block) // kind.group)
    if not kind.is_super:
        rows.unit[:, :, block], rows.minimum_unit[:, :, block] = _halves(scale[..., 0]), 0
        rows.multiple[:, :, groups], rows.minimum[:, :, groups] = 1, 0
        return
    unit, multiple = _units(scale, scale_weight, *kind.sub_scales)
    rows.unit[:, :, block], rows.multiple[:, :, groups] = unit, multiple
    if kind.most_minimum:
        unit, multiple = _units(minimum, minimum_weight, 0, kind.most_minimum)
        rows.minimum_unit[:, :, block], rows.minimum[:, :, groups] = unit, multiple
    else:
        rows.minimum_unit[:, :, block], rows.minimum[:, :, groups] = 0, 0


def _fit_group(value: Tensor, importance: Tensor, kind: BlockType) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Scale and minimum of a group of weights [S, O, g] by weighted least squares, [S, O] each, and how much the loss
    depends on either."""
    low, high = value.amin(-1).clamp(max=0), value.amax(-1)
    shrinks = value.new_tensor(SHRINKS)
    if kind.most_minimum:
        spread = (high - low).clamp(min=1e-12).unsqueeze(-1)
        scale = spread * shrinks / kind.grid.max_code
        minimum = -low.unsqueeze(-1) * shrinks
    else:  # either sign: the lowest code is one step farther from zero than the highest
        signs = [1.0, -1.0] if kind.bits < 8 else [1.0]
        most = value.abs().amax(-1).clamp(min=1e-12).unsqueeze(-1)
        scale = torch.cat([sign * most * shrinks / kind.offset for sign in signs], -1)
        minimum = torch.zeros_like(scale)
    zero = kind.offset + minimum / scale
    chosen = least_error(value, importance, scale, zero, kind.grid).unsqueeze(-1)
    scale, minimum = scale.gather(-1, chosen)[..., 0], minimum.gather(-1, chosen)[..., 0]
    weights = importance.unsqueeze(1)
    for _ in range(FITS):
        zero = kind.offset + minimum / scale
        steps = (value / scale.unsqueeze(-1) + zero.unsqueeze(-1)).round_().clamp_(0, kind.grid.max_code) - kind.offset
        cc, cv = (weights * steps.square()).sum(-1), (weights * steps * value).sum(-1)
        slope, bend = cv / cc, torch.zeros_like(cv)
        if kind.most_minimum:
            c, v, n = (weights * steps).sum(-1), (weights * value).sum(-1), weights.sum(-1)
            both = (n * cv - c * v) / (n * cc - c.square())
            least = (both * c - v) / n
            slope, bend = torch.where(least > 0, both, slope), least.clamp(min=0)
        usable = slope.isfinite() & bend.isfinite() & (slope * scale > 0)
        scale, minimum = torch.where(usable, slope, scale), torch.where(usable, bend, minimum)
    return scale, minimum, cc, weights.sum(-1).expand_as(cc)


def _units(value: Tensor, weight: Tensor, low: int, high: int) -> tuple[Tensor, Tensor]:
    """The unit [S, O] (float16's values) and multiples [S, O, n] that represent numbers with the least weighted error.

    Multiples lie within low .. high. Where numbers may be negative (low < 0) the largest one takes the lowest multiple.
    """
    if low < 0:
        largest = value.gather(-1, value.abs().argmax(-1, keepdim=True))[..., 0] / low
    else:
        largest = value.amax(-1) / high
    units = _halves(largest.unsqueeze(-1) * UNITS.to(value))  # [S, O, U]
    best = multiples = unit = None
    for candidate in units.unbind(-1):
        rounded = (value / candidate.unsqueeze(-1)).round_().clamp_(low, high)
        error = (weight * (rounded * candidate.unsqueeze(-1) - value).square()).sum(-1)
        if best is None:
            best, unit, multiples = error, candidate, rounded
        better = error < best
        best, unit = torch.where(better, error, best), torch.where(better, candidate, unit)
        multiples = torch.where(better.unsqueeze(-1), rounded, multiples)
    return unit, multiples


def _halves(unit: Tensor) -> Tensor:
    """Units rounded to float16, and its smallest number in place of 0."""
    least = torch.where(unit < 0, -(2.0**-24), 2.0**-24)
    return torch.where(unit.half() == 0, least, unit.half().float())


def _candidates(rows: _Rows, group: int, search: bool) -> tuple[Tensor, Tensor]:
    """Multiples around the fitted ones of a group, [S, O, C] each; the first pair is the fitted one."""
    kind, block = rows.kind, group * rows.kind.group // rows.kind.block
    multiple, minimum = rows.multiple[:, :, group, None], rows.minimum[:, :, group, None]
    factors, shifts = (SCALE_FACTORS, MINIMUM_SHIFTS if kind.most_minimum else (0.0,)) if search else ((1.0,), (0.0,))
    pairs = [(1.0, 0.0), *((f, s) for s in shifts for f in factors if (f, s) != (1.0, 0.0))]
    factor, shift = multiple.new_tensor(pairs).unbind(-1)
    if not kind.is_super:
        unit = rows.unit[:, :, block, None]
        scale = (unit * factor).half().float()
        scale = torch.where((scale != 0) & scale.isfinite(), scale, unit)
        return scale / unit, minimum.expand_as(scale)
    scales = _nonzero((multiple * factor).round(), multiple, kind)
    unit, minimum_unit = rows.unit[:, :, block, None], rows.minimum_unit[:, :, block, None]
    moved = torch.where(minimum_unit > 0, shift * unit * scales / minimum_unit, 0.0)
    return scales, (minimum + moved.round()).clamp(0, kind.most_minimum)


def _nonzero(multiple: Tensor, like: Tensor, kind: BlockType) -> Tensor:
    """Multiples within their range, and 1 in place of 0, by which the column loop could not divide; of `like`'s sign.

    Without a sign (`like` is 0 as well) it is positive.
    """
    low, high = kind.sub_scales
    one = torch.where(like < 0, -1.0, 1.0)
    return torch.where(multiple * one < 1, one, multiple).clamp(low, high)


def _sweep(gradient: Tensor, h: Tensor, rows: _Rows) -> Tensor:
    """Improves multiples and codes of each group in turn, and the units of each block, with all others fixed.

    Args:
        gradient: [S, O, I], (W - Q) H; updated in place.
        h: [S, I, I].
        rows: changed in place.

    Returns:
        The decrease of the loss tr (W - Q) H (W - Q)^T, [S] float64.
    """
    kind = rows.kind
    gain = gradient.new_zeros(len(gradient), dtype=torch.float64)
    for first in range(0, gradient.shape[-1], kind.block):
        last = first + kind.block
        whole = h[:, first:last, first:last].contiguous()
        here = gradient[:, :, first:last].clone()  # the block's own part of the gradient, kept up to date
        initial, before = here.clone(), rows.decoded(first, last)
        for start in range(0, kind.block, kind.group):
            own = slice(start, start + kind.group)
            moved = _refit_group(rows, (first + start) // kind.group, here[:, :, own], whole[:, own, own].contiguous())
            here.baddbmm_(moved, whole[:, own], alpha=-1)
        _refit_units(rows, first, here, whole)
        moved = rows.decoded(first, last) - before
        current = torch.baddbmm(initial, moved, whole, alpha=-1)
        gain += (moved * (initial + current)).sum(-1).double().sum(-1)
        gradient.baddbmm_(moved, h[:, first:last], alpha=-1)
    return gain


def _refit_group(rows: _Rows, group: int, gradient: Tensor, h: Tensor) -> Tensor:
    """Refits a group's multiples and codes; how much its weights [S, O, g] change.

    Args:
        gradient: [S, O, g]; h: [S, g, g].
    """
    kind, block = rows.kind, group * rows.kind.group // rows.kind.block
    columns = slice(group * kind.group, (group + 1) * kind.group)
    diagonal = h.diagonal(dim1=-2, dim2=-1)
    factor, total = h / diagonal.unsqueeze(-2), h.sum(-1).unsqueeze(1)
    unit, minimum_unit = rows.unit[:, :, block], rows.minimum_unit[:, :, block]
    scale, minimum = rows.group(group)
    steps = rows.codes[:, :, columns] - float(kind.offset)
    old = decoded = steps * scale.unsqueeze(-1) - minimum.unsqueeze(-1)
    for turn in range(TURNS + 1):
        product = steps @ h
        optimum = scale + (steps * gradient).sum(-1) / (steps * product).sum(-1)  # NaN where all steps are zero
        if kind.is_super:
            fitted = _nonzero((optimum / unit).nan_to_num(0).round(), rows.multiple[:, :, group], kind) * unit
        else:
            fitted = optimum.half().float()
        usable = optimum.isfinite() & fitted.isfinite() & (fitted * scale > 0)
        fitted = torch.where(usable, fitted, scale)
        gradient = gradient - (fitted - scale).unsqueeze(-1) * product
        scale = fitted
        if kind.most_minimum:
            optimum = minimum - gradient.sum(-1) / total.sum(-1)
            fitted = (optimum / minimum_unit).nan_to_num(0, 0, 0).round().clamp(0, kind.most_minimum) * minimum_unit
            gradient = gradient + (fitted - minimum).unsqueeze(-1) * total
            minimum = fitted
        decoded = steps * scale.unsqueeze(-1) - minimum.unsqueeze(-1)
        if turn < TURNS:
            wanted = decoded + gradient / diagonal.unsqueeze(1)
            zero = (kind.offset + minimum / scale).unsqueeze(-1)
            codes, moved, _ = column_loop(wanted, decoded, factor, diagonal, scale.unsqueeze(-1), zero, kind.grid)
            gradient, steps = gradient - moved @ h, codes - float(kind.offset)
            rows.codes[:, :, columns] = codes
    if kind.is_super:
        rows.multiple[:, :, group] = (scale / unit).round()
        if kind.most_minimum:
            rows.minimum[:, :, group] = (minimum / minimum_unit).nan_to_num(0, 0, 0).round()
    else:
        rows.unit[:, :, block] = scale
    return decoded - old


def _refit_units(rows: _Rows, first: int, gradient: Tensor, h: Tensor) -> None:
    """Refits the two units of a block of a K-quant, given its own gradient [S, O, block] and H [S, block, block]."""
    kind, block = rows.kind, first // rows.kind.block
    if not kind.is_super:
        return
    groups = slice(first // kind.group, (first + kind.block) // kind.group)
    steps = rows.codes[:, :, first : first + kind.block].unflatten(-1, (-1, kind.group)) - float(kind.offset)
    along = (steps * rows.multiple[:, :, groups, None]).flatten(-2)  # how the weights move with the unit
    rows.unit[:, :, block], moved = _stepped(rows.unit[:, :, block], along, gradient, h)
    if kind.most_minimum:
        gradient = gradient - moved @ h
        along = -rows.minimum[:, :, groups].repeat_interleave(kind.group, -1)
        rows.minimum_unit[:, :, block], _ = _stepped(rows.minimum_unit[:, :, block], along, gradient, h)


def _stepped(unit: Tensor, along: Tensor, gradient: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """The unit [S, O] of least loss among float16's numbers, and how the weights [S, O, n] move with it."""
    shift = (along * gradient).sum(-1) / (along * (along @ h)).sum(-1)
    fitted = (unit + shift).half().float()
    fitted = torch.where(fitted.isfinite() & (fitted * unit > 0), fitted, unit)
    return fitted, along * (fitted - unit).unsqueeze(-1)
