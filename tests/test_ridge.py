"""The router's closed form against brute-force least squares, expert by expert."""

import numpy as np
import pytest
import torch
from torch import Tensor

from eacmoe_lightning.models.routing import LogitMap
from eacmoe_lightning.routers.losses import TopKMSE
from eacmoe_lightning.routers.ridge import NormalEquations, experts_together, solve, working_bytes

N, D, E = 300, 12, 6


@pytest.fixture
def rows() -> tuple[Tensor, Tensor, Tensor]:
    """Router inputs [N, D] of the compressed stream, teacher logits [N, E] and the original weight [E, D]."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(E, D, generator=generator)
    original = torch.randn(N, D, generator=generator)
    x = original + 0.3 * torch.randn(N, D, generator=generator)
    return x, original @ weight.T, weight


def calibrated(x: Tensor, teacher: Tensor, weight: Tensor, k: int, ridge: float) -> Tensor:
    return solve(weight, sums(slice(0, E), k).add(x, teacher - x @ weight.T, teacher.topk(k).indices), ridge)


def sums(experts: slice, k: int) -> NormalEquations:
    return NormalEquations(experts, D, torch.device("cpu"), shared=k == E)


@pytest.mark.parametrize("k", [1, 2, 4, E])
@pytest.mark.parametrize("ridge", [1e-6, 1e-2, 1.0])
def test_equals_least_squares_with_augmented_rows(rows, k, ridge):
    x, teacher, weight = rows
    ours = calibrated(x, teacher, weight, k, ridge)
    mask = (teacher >= teacher.sort(descending=True).values[:, k - 1 : k]).numpy()
    xs, ts, ws = (tensor.double().numpy() for tensor in rows)
    mean = np.mean([np.mean(np.sum(xs[mask[:, e]] ** 2, axis=0)) for e in range(E)])  # mean over all experts' grams
    for e in range(E):
        a = np.vstack([xs[mask[:, e]], np.sqrt(ridge * mean) * np.eye(D)])  # the penalty on drift as D more rows
        b = np.concatenate([ts[mask[:, e], e] - xs[mask[:, e]] @ ws[e], np.zeros(D)])
        update = np.linalg.lstsq(a, b, rcond=None)[0]
        np.testing.assert_allclose(ours[e].numpy(), ws[e] + update, rtol=0, atol=2e-4 if ridge < 1e-3 else 2e-5)


@pytest.mark.parametrize("k", [2, E])
def test_sums_over_chunks_add_up(rows, k):
    x, teacher, weight = rows
    ids, residual = teacher.topk(k).indices, teacher - x @ weight.T
    whole, parts = sums(slice(0, E), k).add(x, residual, ids), sums(slice(0, E), k)
    for s in (slice(0, 31), slice(31, 31), slice(31, N)):
        parts.add(x[s], residual[s], ids[s])
    for name in ("gram", "cross", "squares"):
        torch.testing.assert_close(getattr(parts, name), getattr(whole, name), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("k", [2, E])
def test_solving_experts_in_parts_equals_solving_them_together(rows, k):
    x, teacher, weight = rows
    ids, residual = teacher.topk(k).indices, teacher - x @ weight.T
    parts = [solve(weight, sums(slice(*ends), k).add(x, residual, ids), 1e-3) for ends in ((0, 1), (1, 4), (4, E))]
    torch.testing.assert_close(torch.cat(parts), calibrated(x, teacher, weight, k, 1e-3), rtol=0, atol=1e-6)


def test_as_many_experts_are_solved_together_as_memory_allows():
    """DeepSeek-V3: 256 experts, hidden size 7168; 206 MB for each sum, 822 MB for each matrix being solved."""
    assert experts_together(256, 7168, 2.0) == 6
    assert working_bytes(6, 7168) == (6 * 4 + 16) * 7168**2 < 2**31 < working_bytes(7, 7168)
    assert [experts_together(60, 2048, gib) for gib in (1e-9, 2.0)] == [1, 60]
    assert experts_together(60, 2048, 1e-9, shared=True) == 60


def test_if_all_experts_are_targets_the_shared_matrix_equals_separate_ones(rows):
    x, teacher, weight = rows
    apart = NormalEquations(slice(0, E), D, torch.device("cpu"))
    apart.add(x, teacher - x @ weight.T, teacher.topk(E).indices)
    torch.testing.assert_close(solve(weight, apart, 1e-3), calibrated(x, teacher, weight, E, 1e-3), rtol=0, atol=1e-6)


def test_a_strong_ridge_leaves_the_weight_unchanged(rows):
    x, teacher, weight = rows
    torch.testing.assert_close(calibrated(x, teacher, weight, 2, 1e9), weight, rtol=0, atol=1e-6)
    drift = [(calibrated(x, teacher, weight, 2, ridge) - weight).norm() for ridge in (1e-3, 1e-1, 10, 1e9)]
    assert drift == sorted(drift, reverse=True) and drift[0] > 0.1


@pytest.mark.parametrize("k", [2, 3, E])
@pytest.mark.parametrize("ridge", [1e-6, 1e-3, 1e-1, 10])
def test_the_loss_on_the_same_tokens_never_increases(rows, k, ridge):
    x, teacher, weight = rows
    after = TopKMSE(k)(x @ calibrated(x, teacher, weight, k, ridge).T, teacher, 2).mean()
    before = TopKMSE(k)(x @ weight.T, teacher, 2).mean()
    assert after <= before
    if ridge <= 1e-3:
        assert after < 0.97 * before


def test_an_unshifted_stream_needs_no_change(rows):
    x, _, weight = rows
    torch.testing.assert_close(calibrated(x, x @ weight.T, weight, 2, 1e-3), weight, rtol=0, atol=1e-5)


def test_a_linear_shift_is_undone(rows):
    """If the compressed stream is an invertible linear map of the original one, the closed form finds the inverse."""
    x, _, weight = rows
    shift = torch.eye(D) + 0.2 * torch.randn(D, D, generator=torch.Generator().manual_seed(5))
    expected = weight @ torch.linalg.inv(shift)
    torch.testing.assert_close(calibrated(x @ shift.T, x @ weight.T, weight, E, 1e-10), expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize("to_logits", [LogitMap(scale=0.5), LogitMap(cap=8.0), LogitMap(scale=0.25, cap=3.0)])
def test_a_linear_shift_before_a_router_that_scales_or_caps_its_logits_is_undone(rows, to_logits):
    """The closed form is solved in the products of input and matrix, which the original's logits are mapped back to."""
    x, _, weight = rows
    shift = torch.eye(D) + 0.2 * torch.randn(D, D, generator=torch.Generator().manual_seed(5))
    teacher = to_logits(x @ weight.T)
    ours = calibrated(x @ shift.T, to_logits.products(teacher), weight, E, 1e-10)
    torch.testing.assert_close(to_logits(x @ shift.T @ ours.T), teacher, rtol=0, atol=1e-2)


def test_an_expert_that_no_token_targets_keeps_its_row(rows):
    x, teacher, weight = rows
    teacher = teacher.clone()
    teacher[:, 3] -= 1000
    ours = calibrated(x, teacher, weight, 2, 1e-3)
    assert torch.equal(ours[3], weight[3]) and not torch.allclose(ours[2], weight[2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_dtype_of_the_weight_is_kept(rows, dtype):
    x, teacher, weight = rows
    assert calibrated(x, teacher, weight.to(dtype).float(), 2, 1e-3).dtype == torch.float32
    added = sums(slice(0, E), 2).add(x, teacher - x @ weight.T, teacher.topk(2).indices)
    assert solve(weight.to(dtype), added, 1e-3).dtype == dtype
