"""GPTQ against a textbook implementation in float64, against round-to-nearest, and in edge cases."""

import numpy as np
import pytest
import torch
from torch import Tensor

from eacmoe_lightning.quantization.gptq import DAMPING, _sweep, damped_factor, output_error, solve
from eacmoe_lightning.quantization.grid import Grid, Quantized, round_to_nearest

GRID = Grid(bits=3, group_size=16, clip_search=False)


def gptq(*args, **options) -> Quantized:
    """`solve` without the error that it returns."""
    return solve(*args, **options)[0]


def problem(rows: int = 24, columns: int = 64, tokens: int = 200, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight [O, I] and the Hessian [I, I] of correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    x = torch.randn(tokens, columns, generator=generator) @ torch.randn(columns, columns, generator=generator)
    x *= torch.logspace(-1, 0.5, columns)[torch.randperm(columns, generator=generator)]
    return weight, 2 / tokens * x.T @ x


def textbook(weight: Tensor, hessian: Tensor, grid: Grid, damping: float, act_order: bool = False) -> np.ndarray:
    """The dequantized weight [O, I] of GPTQ, as OBQ in a fixed order with explicit updates of the inverse Hessian.

    Ranges are minimum to maximum. Each group's scale is computed from its weights when the group begins. With
    act_order, groups are visited by falling mean of diag(H), and columns within a group by falling diag(H).
    """
    w, h = weight.double().numpy().copy(), hessian.double().numpy()
    columns = w.shape[1]
    inverse = np.linalg.inv(h + damping * np.diag(h).mean() * np.eye(columns))

    def scale_of(group: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        low, high = np.minimum(group.min(1), 0), np.maximum(group.max(1), 0)
        scale = ((high - low) / grid.max_code).astype(np.float16).astype(np.float64)
        return scale, np.round(-low / scale)

    groups = [range(start, start + grid.group_size) for start in range(0, columns, grid.group_size)]
    if act_order:
        groups = sorted(groups, key=lambda group: -np.diag(h)[list(group)].mean())
        groups = [sorted(group, key=lambda j: -h[j, j]) for group in groups]
    result = np.zeros_like(w)
    for group in groups:
        scale, zero = scale_of(w[:, list(group)])
        for j in group:
            result[:, j] = (np.clip(np.round(w[:, j] / scale + zero), 0, grid.max_code) - zero) * scale
            w -= np.outer((w[:, j] - result[:, j]) / inverse[j, j], inverse[j])
            inverse -= np.outer(inverse[:, j], inverse[j]) / inverse[j, j]  # remove row and column j
            inverse[j, j] = 1  # no longer used; keeps 0/0 away
    return result


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_equals_the_textbook_algorithm(act_order, seed):
    weight, hessian = problem(seed=seed)
    ours = gptq(weight, hessian, GRID, damping=0.02, act_order=act_order)
    theirs = torch.from_numpy(textbook(weight, hessian, GRID, 0.02, act_order)).float()
    same = (ours.dequantize() - theirs).abs() < 1e-3
    assert same.float().mean() > 0.995  # values near the middle of two codes may round differently in float32
    delta = weight - theirs
    error = ((delta @ hessian) * delta).sum() / ((weight @ hessian) * weight).sum()
    torch.testing.assert_close(output_error(weight, ours, hessian), error, rtol=0.02, atol=0)


@pytest.mark.parametrize("clip_search", [False, True])
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
def test_with_a_diagonal_hessian_it_is_round_to_nearest(clip_search, act_order, symmetric):
    weight, _ = problem()
    diagonal = torch.rand(64, generator=torch.Generator().manual_seed(3)) + 0.1
    grid = Grid(3, 16, symmetric, clip_search)
    ours = gptq(weight, torch.diag(diagonal), grid, act_order=act_order)
    rounded = round_to_nearest(weight, grid, diagonal + DAMPING * diagonal.mean())
    for field in ("codes", "scale", "zero_point"):
        assert torch.equal(getattr(ours, field), getattr(rounded, field))


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_output_error_is_below_round_to_nearest_on_correlated_inputs(act_order, bits):
    grid, ours, rounded = Grid(bits, 16, clip_search=False), [], []
    for seed in range(4):
        weight, hessian = problem(seed=seed)
        ours.append(output_error(weight, gptq(weight, hessian, grid, act_order=act_order), hessian))
        rounded.append(output_error(weight, round_to_nearest(weight, grid), hessian))
        assert ours[-1] < rounded[-1]
    assert sum(ours) < (0.7 if bits > 2 else 1) * sum(rounded)


def test_output_error_is_the_share_of_squared_outputs():
    weight, _ = problem()
    x = torch.randn(500, 64, generator=torch.Generator().manual_seed(9))
    quantized = round_to_nearest(weight, GRID)
    direct = (x @ (weight - quantized.dequantize()).T).square().sum() / (x @ weight.T).square().sum()
    torch.testing.assert_close(output_error(weight, quantized, x.T @ x), direct, rtol=1e-4, atol=0)
    stack = gptq(weight.repeat(3, 1, 1), (x.T @ x).repeat(3, 1, 1), GRID)
    assert output_error(weight.repeat(3, 1, 1), stack, (x.T @ x).repeat(3, 1, 1)).shape == (3,)


@pytest.mark.parametrize("refine", [0, 1])
@pytest.mark.parametrize("damping", [0.01, 0.5])
def test_the_error_that_solve_returns_is_the_output_error(damping, refine):
    problems = [problem(seed=seed) for seed in range(3)]
    weights, hessians = (torch.stack(tensors) for tensors in zip(*problems, strict=True))
    hessians[1, 5] = hessians[1, :, 5] = 0  # an input that is always zero
    quantized, error = solve(weights, hessians, Grid(2, 16), damping, True, True, refine)
    torch.testing.assert_close(error, output_error(weights, quantized, hessians), rtol=1e-3, atol=0)


@pytest.mark.parametrize("act_order", [False, True])
def test_a_stack_is_solved_like_its_members(act_order):
    problems = [problem(seed=seed) for seed in range(5)]
    grid = Grid(2, 16)
    weights, hessians = (torch.stack(tensors) for tensors in zip(*problems, strict=True))
    stack = gptq(weights, hessians, grid, act_order=act_order)
    assert stack.codes.shape == (5, 24, 64) and stack.scale.shape == stack.zero_point.shape == (5, 24, 4)
    for i, (weight, hessian) in enumerate(problems):
        alone = gptq(weight, hessian, grid, act_order=act_order)
        assert (stack.codes[i] == alone.codes).float().mean() > 0.995
        together = output_error(weights, stack, hessians)[i]
        torch.testing.assert_close(together, output_error(weight, alone, hessian), rtol=0.02, atol=0)


@pytest.mark.parametrize("act_order", [False, True])
def test_codes_come_back_in_the_weight_s_order(act_order):
    """With 8 bits the decoded weight is close to the weight, in whatever order columns were visited."""
    weight, hessian = problem()
    decoded = gptq(weight, hessian, Grid(8, 16), damping=1.0, act_order=act_order).dequantize()
    assert torch.corrcoef(torch.stack([decoded.flatten(), weight.flatten()]))[0, 1] > 0.999


# A dead input gets the mean of the live diagonal. A constant such as 1 would fail here at 1e-8.
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("factor", [1e-8, 1e8])
def test_the_hessian_s_scale_does_not_matter(act_order, factor):
    weight, hessian = problem()
    hessian[5] = hessian[:, 5] = 0  # an input that is always zero
    plain = gptq(weight, hessian, GRID, act_order=act_order)
    scaled = gptq(weight, hessian * factor, GRID, act_order=act_order)
    assert (plain.codes == scaled.codes).float().mean() > 0.99


@pytest.mark.parametrize("act_order", [False, True])
def test_inputs_that_are_always_zero_do_not_affect_the_others(act_order):
    weight, hessian = problem()
    dead = torch.tensor([0, 17, 63])
    hessian[dead] = 0
    hessian[:, dead] = 0
    weight[:, dead] = 1e4  # would ruin the scale of its group
    quantized = gptq(weight, hessian, GRID, act_order=act_order)
    assert torch.isfinite(quantized.dequantize()).all()
    live = weight.clone()
    live[:, dead] = 0
    assert output_error(live, quantized, hessian) < output_error(live, round_to_nearest(live, GRID), hessian)


def test_the_arguments_are_not_changed():
    weight, hessian = problem()
    hessian[:, 3] = hessian[3] = 0
    before = weight.clone(), hessian.clone()
    gptq(weight, hessian, GRID, act_order=True, search=True, refine=1)
    assert torch.equal(weight, before[0]) and torch.equal(hessian, before[1])


@pytest.mark.parametrize("tokens", [1, 3, 40])
def test_fewer_tokens_than_inputs_are_handled_by_damping(tokens):
    weight, hessian = problem(tokens=tokens)  # a singular Hessian
    quantized = gptq(weight, hessian, GRID)
    assert torch.isfinite(quantized.dequantize()).all()
    assert output_error(weight, quantized, hessian) < output_error(weight, round_to_nearest(weight, GRID), hessian)


def test_the_error_for_a_hessian_that_cannot_be_factored_names_remedies():
    weight, hessian = problem()
    with pytest.raises(ValueError, match="1 of 2 matrices.*--model.damping.*--data.num_windows"):
        gptq(torch.stack([weight, weight]), torch.stack([hessian, hessian - 1e9 * (1 - torch.eye(64))]), GRID)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", [0, 1])
def test_nonfinite_values_are_refused(value, where):
    tensors = problem()
    tensors[where][2, 3] = value
    with pytest.raises(ValueError, match="NaN or infinite"):
        gptq(*tensors, GRID)


def test_the_error_for_a_wrong_group_size_names_it_and_in_features():
    with pytest.raises(ValueError, match=r"in_features=64 is not a multiple of group_size=24 \(--model.group_size\)"):
        gptq(*problem(), Grid(3, 24))


# --- beyond the paper: scale search, refitted scales, coordinate descent


def damped(hessian: Tensor, damping: float = DAMPING) -> Tensor:
    return hessian + damping * hessian.diagonal().mean() * torch.eye(len(hessian))


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_search_lowers_the_loss_of_a_group(bits, symmetric):
    """With one group the loop's loss is the whole loss, and the fitted scale is among the candidates."""
    grid = Grid(bits, 64, symmetric)
    weight, hessian = problem()
    plain, searched = (output_error(weight, gptq(weight, hessian, grid, search=s), damped(hessian)) for s in (0, 1))
    assert searched < 0.98 * plain


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("act_order", [False, True])
def test_every_sweep_of_refinement_lowers_the_loss(bits, act_order):
    weight, hessian = problem()
    grid = Grid(bits, 16)
    losses = [output_error(weight, gptq(weight, hessian, grid, DAMPING, act_order, True, r), damped(hessian)) for r in
              range(4)]  # fmt: skip
    assert losses[1] < 0.98 * losses[0]
    assert all(later <= earlier * (1 + 1e-5) for earlier, later in zip(losses, losses[1:], strict=False))


def start(grid: Grid) -> tuple[Tensor, ...]:
    """A problem rounded to nearest, as a stack of one: weight, Hessian, codes, scale, zero point."""
    weight, hessian = problem()
    rounded = round_to_nearest(weight, grid)
    return tuple(t[None] for t in (weight, hessian, rounded.codes, rounded.scale.float(), rounded.zero_point.float()))


def residual(weight: Tensor, codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    steps = codes.unflatten(-1, (scale.shape[-1], -1)) - zero[..., None]
    return weight - (steps * scale[..., None]).flatten(-2)


@pytest.mark.parametrize("keep_gradient", [False, True])
def test_a_sweep_returns_its_gain_and_updates_the_gradient(keep_gradient):
    grid = Grid(3, 16)
    weight, hessian, codes, scale, zero = start(grid)

    def loss() -> Tensor:
        delta = residual(weight, codes, scale, zero)
        return ((delta @ hessian) * delta).sum()

    before, gradient = loss(), residual(weight, codes, scale, zero) @ hessian
    gain = _sweep(gradient, hessian, codes, scale, zero, grid, keep_gradient)
    assert gain > 0.05 * before
    torch.testing.assert_close(gain[0].float(), before - loss(), rtol=1e-3, atol=0)
    if keep_gradient:
        expected = residual(weight, codes, scale, zero) @ hessian
        torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))


def test_after_a_sweep_the_last_group_s_scales_are_optimal():
    """Against least squares in float64, with all other groups fixed."""
    grid = Grid(3, 16)
    weight, hessian, codes, scale, zero = start(grid)
    _sweep(residual(weight, codes, scale, zero) @ hessian, hessian, codes, scale, zero, grid, False)
    others = scale.clone()
    others[..., -1] = 0
    target = residual(weight, codes, others, zero).double()[0]  # what the last group has to approximate
    steps = torch.zeros(24, 64, dtype=torch.float64)
    steps[:, -16:] = codes[0, :, -16:] - zero[0, :, -1:]
    h = hessian[0].double()
    exact = ((steps @ h) * target).sum(-1) / ((steps @ h) * steps).sum(-1)
    torch.testing.assert_close(scale[0, :, -1].double(), exact, rtol=2e-3, atol=0)  # scales are float16


def test_a_group_that_decodes_to_zeros_keeps_its_scale():
    weight, hessian = problem()
    weight[:, 16:32] = 0
    quantized = gptq(weight, hessian, Grid(2, 16), search=True, refine=2)
    assert torch.isfinite(quantized.scale).all() and (quantized.scale > 0).all()
    codes = torch.full((1, 24, 64), 1, dtype=torch.uint8)
    scale, zero = torch.full((1, 24, 4), 0.5), torch.ones(1, 24, 4)
    gradient = torch.zeros(1, 24, 64)  # the weights are zero too, so nothing can be gained
    gain = _sweep(gradient, hessian[None], codes, scale, zero, Grid(2, 16), True)
    assert gain == 0 and (scale == 0.5).all() and (codes == 1).all()


def test_repeated_sweeps_reach_a_coordinate_wise_optimum_of_the_codes():
    """In the end no change of a single code by one step lowers the loss."""
    grid = Grid(3, 16)
    weight, hessian, codes, scale, zero = start(grid)
    gradient = residual(weight, codes, scale, zero) @ hessian
    for _ in range(60):
        _sweep(gradient, hessian, codes, scale, zero, grid, True)
    delta = residual(weight, codes, scale, zero).double()[0]
    h, steps = hessian[0].double(), scale[0].double().repeat_interleave(16, -1)  # [O, I]
    gradient, diagonal = delta @ h, h.diagonal()
    for sign in (-1, 1):  # raising a code by one moves q by one step
        allowed = (codes[0].int() + sign >= 0) & (codes[0].int() + sign <= 7)
        change = -2 * sign * steps * gradient + steps.square() * diagonal
        assert (change[allowed] > -1e-3 * float(change.abs().mean())).all()


def test_the_factor_reproduces_the_damped_hessian():
    hessian = problem()[1][None]
    h = hessian.clone()
    factor, pivot, added = damped_factor(h, 0.05)
    torch.testing.assert_close(added, 0.05 * hessian.diagonal(dim1=-2, dim2=-1).mean(-1))
    torch.testing.assert_close(h, hessian + added[:, None, None] * torch.eye(64))
    torch.testing.assert_close((factor * pivot[:, None]) @ factor.mT, h, rtol=1e-4, atol=1e-4)
    assert (factor.diagonal(dim1=1, dim2=2) == 1).all() and factor.tril(-1).count_nonzero() == 0


@pytest.mark.parametrize("act_order", [False, True])
def test_solving_rows_in_parts_equals_solving_them_together(act_order, monkeypatch):
    weight, hessian = problem(rows=25)
    weight, hessian = torch.stack([weight, -weight]), torch.stack([hessian, 2 * hessian])
    whole, error = solve(weight, hessian, Grid(2, 16), 0.01, act_order, True, 1)
    monkeypatch.setattr("eacmoe_lightning.quantization.gptq.CACHED", 4 * 2 * 64 * 7)  # 7 rows of each problem
    parts, parts_error = solve(weight, hessian, Grid(2, 16), 0.01, act_order, True, 1)
    assert (parts.codes == whole.codes).float().mean() > 0.99  # sums may run in another order
    torch.testing.assert_close(parts_error, error, rtol=1e-3, atol=0)
