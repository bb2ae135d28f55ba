"""The compiled column loop against torch's, and sums over tokens against plain products."""

import pytest
import torch
from torch import Tensor

from eacmoe_lightning.quantization import column_loop as module
from eacmoe_lightning.quantization.column_loop import column_loop, fit_range, loop_in_torch
from eacmoe_lightning.quantization.gram import add_gram, mirror, tokens_by_expert
from eacmoe_lightning.quantization.grid import Grid, fit_scale

BUILT = module.library() is not None
LEVELS = range(module.level() + 1) if BUILT else ()


def test_the_loop_is_built_here():
    """CI has a compiler. Without this test nobody would notice that GPTQ runs through torch."""
    assert BUILT


def group(rows: int, columns: int, candidates: int, bits: int) -> tuple[Tensor, ...]:
    """Arguments of the loop: values and old values as views of wider weights, a unit upper factor and its pivots, and
    candidates of a plausible size."""
    g = torch.Generator().manual_seed(rows + columns)
    values = torch.randn(3, rows, 2 * columns, generator=g)[:, :, columns:]
    old = values + 0.1 * torch.randn(3, rows, 3 * columns, generator=g)[:, :, :columns]
    x = torch.randn(3, 2 * columns, columns, generator=g)
    factor = torch.linalg.cholesky((x.mT @ x / columns).flip(-2, -1)).flip(-2, -1)
    root = factor.diagonal(dim1=-2, dim2=-1)
    scale = (torch.rand(3, rows, candidates, generator=g) + 0.5) * 4 / 2**bits
    zero = torch.randint(0, 2**bits, scale.shape, generator=g).float()
    return values, old, factor / root.unsqueeze(-2), root.square(), scale, zero


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("rows, columns, candidates, bits", [(1, 8, 1, 3), (25, 16, 5, 2), (50, 128, 7, 4)])
def test_the_compiled_loop_equals_torch_s(level, threads, rows, columns, candidates, bits, monkeypatch):
    monkeypatch.setattr(module, "level", lambda: level)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    tensors = group(rows, columns, candidates, bits)
    before = [tensor.clone() for tensor in tensors]
    codes, errors, chosen = column_loop(*tensors, Grid(bits, columns))
    expected = loop_in_torch(*tensors, Grid(bits, columns))
    assert torch.equal(codes, expected[0]) and torch.equal(chosen, expected[2])
    torch.testing.assert_close(errors, expected[1], rtol=1e-4, atol=1e-5)
    assert all(map(torch.equal, tensors, before))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_compiled_range_search_equals_the_grid_s(level, bits, symmetric, monkeypatch):
    monkeypatch.setattr(module, "level", lambda: level)
    values, grid = group(50, 128, 1, bits)[0], Grid(bits, 128, symmetric)
    values[0, 3] = 0
    importance = torch.rand(3, 128, generator=torch.Generator().manual_seed(1)) + 0.1
    scale, zero = fit_range(values, grid, importance)
    expected = fit_scale(values, grid, importance.unsqueeze(1))
    same = (scale == expected[0]) & (zero == expected[1])
    assert same.float().mean() > 0.99  # two ranges may be equally good in float32

    def error(s: Tensor, z: Tensor) -> Tensor:
        codes = (values / s[..., None] + z[..., None]).round().clamp(0, grid.max_code)
        return (((codes - z[..., None]) * s[..., None] - values).square() * importance[:, None]).sum(-1)

    torch.testing.assert_close(error(scale, zero), error(*expected), rtol=1e-5, atol=0)


def test_each_row_keeps_its_own_best_candidate():
    """Without coupling between columns a row's loss is its rounding error, computed here for every candidate."""
    values, old, _, _, scale, zero = group(40, 16, 6, 2)
    grid, factor = Grid(2, 16), torch.eye(16).repeat(3, 1, 1)
    every = (values[..., None, :] / scale[..., None] + zero[..., None]).round().clamp(0, 3)  # [S, O, C, g]
    loss = ((every - zero[..., None]) * scale[..., None] - values[..., None, :]).square().sum(-1)
    chosen = column_loop(values, old, factor, torch.ones(3, 16), scale, zero, grid)[2]
    taken = loss.gather(-1, chosen[..., None])[..., 0]
    torch.testing.assert_close(taken, loss.amin(-1), rtol=1e-5, atol=0)


@pytest.mark.parametrize("shape", [(5, 8), (700, 256), (300, 600)])
def test_gram_is_the_product(shape):
    g = torch.Generator().manual_seed(0)
    x, weight = torch.randn(shape, generator=g), torch.rand(shape[0], generator=g)
    for given, product in ((None, x.T @ x), (weight, x.T @ (x * weight[:, None]))):
        total = mirror(add_gram(x.new_zeros(x.shape[1], x.shape[1]), x, given))
        torch.testing.assert_close(total, product, rtol=1e-4, atol=1e-3)
        assert torch.equal(total, total.T)


def test_tokens_by_expert_are_those_that_select_it():
    ids = torch.tensor([[0, 3], [3, 1], [4, 0], [3, 3]])  # 4 is out of range: a skipped selection
    assert [t.tolist() for t in tokens_by_expert(ids, 4)] == [[0, 2], [1], [], [0, 1, 3]]
