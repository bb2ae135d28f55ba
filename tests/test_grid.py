"""The grid: packing is lossless, decoding follows the formula, rounding is to nearest, the range search only helps."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from eacmoe_lightning.quantization.grid import Grid, Quantized, encode, fit_scale, round_to_nearest
from eacmoe_lightning.quantization.packing import expert_codes, pack, unpack

BITS = range(2, 9)


def weights(*shape: int, seed: int = 0) -> torch.Tensor:
    """Normal weights with a few outliers, so that clipping has something to clip."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(*shape, generator=generator)
    return torch.where(torch.rand(*shape, generator=generator) < 0.02, 6 * w, w)


# --- codes on disk


@given(st.integers(1, 8), st.integers(1, 70), st.integers(1, 3), st.integers(0, 2**31))
def test_unpack_is_the_inverse_of_pack(bits, length, rows, seed):
    codes = torch.randint(
        0, 2**bits, (rows, 2, length), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8
    )
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8 and packed.shape == (rows, 2, -(-length // 8) * bits)
    assert torch.equal(unpack(packed, bits, length), codes) and packed.is_contiguous()


def test_experts_of_mixed_bits_are_stored_one_after_another():
    bits, generator = (3, 8, 2), torch.Generator().manual_seed(0)
    codes = torch.stack([torch.randint(0, 2**b, (5, 16), generator=generator, dtype=torch.uint8) for b in bits])
    packed = pack(codes, bits)
    assert packed.shape == (5 * 2 * (3 + 8 + 2),)
    assert torch.equal(packed[30:110].view(5, 16), codes[1])  # 8 bits: the codes themselves, after 5 x 2 x 3 bytes
    assert torch.equal(expert_codes(packed, bits, 2, 16), pack(codes[2], 2))
    assert torch.equal(unpack(packed, bits, 16), codes)


def test_packed_bytes_are_the_codes_in_little_endian_order():
    # 3 bits: 1, 2, ..., 7, 0 as one 24-bit number, the first code in its lowest bits
    number = sum(code << (3 * place) for place, code in enumerate([1, 2, 3, 4, 5, 6, 7, 0]))
    assert pack(torch.ones(2, 8, dtype=torch.uint8), 3).is_contiguous()  # kernels read it row after row
    packed = pack(torch.tensor([1, 2, 3, 4, 5, 6, 7, 0], dtype=torch.uint8), 3)
    assert packed.tolist() == list(number.to_bytes(3, "little"))


@pytest.mark.parametrize("bits", BITS)
def test_largest_code_fills_every_bit(bits):
    packed = pack(torch.full((16,), 2**bits - 1, dtype=torch.uint8), bits)
    assert packed.tolist() == [255] * (2 * bits)


# --- decoding


def test_dequantize_is_code_minus_zero_point_times_scale():
    quantized = Quantized(
        codes=torch.tensor([[0, 3, 1, 2], [3, 3, 0, 1]], dtype=torch.uint8),
        scale=torch.tensor([[0.5, 2.0], [0.25, 1.0]], dtype=torch.float16),
        zero_point=torch.tensor([[1, 0], [3, 2]], dtype=torch.uint8),
        bits=2,
    )
    assert quantized.group_size == 2
    assert quantized.dequantize().tolist() == [[-0.5, 1.0, 2.0, 4.0], [0.0, 0.0, -2.0, -1.0]]
    stack = Quantized(*(torch.stack([t, t]) for t in (quantized.codes, quantized.scale, quantized.zero_point)), bits=2)
    assert torch.equal(stack.dequantize()[1], quantized.dequantize())
    assert quantized.dequantize(torch.bfloat16).dtype == torch.bfloat16


# --- rounding


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("clip_search", [False, True])
def test_codes_are_in_range_and_nearest(bits, symmetric, clip_search):
    grid, w = Grid(bits, 32, symmetric, clip_search), weights(20, 128)
    quantized = round_to_nearest(w, grid)
    assert quantized.codes.max() <= 2**bits - 1 and quantized.zero_point.max() <= 2**bits - 1
    scale = quantized.scale.float().repeat_interleave(32, -1)
    zero = quantized.zero_point.float().repeat_interleave(32, -1)
    every = (torch.arange(2**bits)[:, None, None] - zero) * scale  # [codes, O, I], all values on the grid
    best = (every - w).abs().amin(0)
    torch.testing.assert_close((quantized.dequantize() - w).abs(), best, rtol=0, atol=1e-5)
    inside = (w >= every[0]) & (w <= every[-1])
    assert ((quantized.dequantize() - w).abs() <= scale / 2 * (1 + 1e-4))[inside].all() and inside.float().mean() > 0.7


@pytest.mark.parametrize("bits", BITS)
def test_min_max_ranges_hardly_clip(bits):
    """Minimum and maximum lie on the grid up to half a step and the scale's rounding to float16."""
    w = weights(20, 128)
    quantized = round_to_nearest(w, Grid(bits, 32, clip_search=False))
    step = quantized.scale.float().repeat_interleave(32, -1)
    assert ((quantized.dequantize() - w).abs() <= step * (0.5 + (2**bits - 1) * 2**-11 + 1e-4)).all()


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("offset", [-7.0, 0.0, 7.0])
def test_zero_is_represented_exactly(symmetric, offset):
    """A weight of zero stays zero, even if its group lies on one side of zero."""
    w = weights(8, 64) + offset
    w[:, ::9] = 0
    for clip_search in (False, True):
        decoded = round_to_nearest(w, Grid(3, 32, symmetric, clip_search)).dequantize()
        assert (decoded[:, ::9] == 0).all() and not (decoded == 0).all()


def test_symmetric_fixes_the_middle_code():
    assert (round_to_nearest(weights(8, 64), Grid(4, 32, symmetric=True)).zero_point == 8).all()
    assert (round_to_nearest(weights(8, 64) + 9, Grid(4, 32, symmetric=False)).zero_point == 0).all()


@pytest.mark.parametrize("symmetric", [False, True])
def test_a_group_of_zeros_decodes_to_zeros(symmetric):
    w = weights(4, 64)
    w[1, 32:] = 0
    decoded = round_to_nearest(w, Grid(2, 32, symmetric)).dequantize()
    assert (decoded[1, 32:] == 0).all() and torch.isfinite(decoded).all()


def test_values_of_the_grid_come_back_unchanged():
    """Rounding values on the grid loses nothing, if codes cover the full range and float16 holds the scale."""
    codes = torch.arange(16).repeat(6, 4).float()
    scale, zero = torch.tensor([0.5, 0.25, 1, 2, 3, 0.125])[:, None], torch.tensor([0, 3, 15, 8, 7, 1.0])[:, None]
    w = (codes - zero) * scale
    for clip_search in (False, True):
        quantized = round_to_nearest(w, Grid(4, 64, clip_search=clip_search))
        assert torch.equal(quantized.dequantize(), w) and torch.equal(quantized.codes.float(), codes)


def test_scales_are_float16_before_they_are_used():
    """The codes belong to the stored float16 scale, not to a more precise one."""
    scale, zero = fit_scale(weights(50, 64), Grid(3, 64))
    assert torch.equal(scale, scale.half().float()) and torch.equal(zero, zero.round())
    w = weights(50, 64)
    quantized = round_to_nearest(w, Grid(3, 64))
    again = encode(w, quantized.scale.float(), quantized.zero_point.float(), Grid(3, 64))
    assert torch.equal(again, quantized.codes.float())


# --- the range search


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("symmetric", [False, True])
def test_clip_search_is_never_worse_than_min_max_in_the_weighted_error(bits, symmetric):
    w, importance = weights(64, 128), torch.rand(128, generator=torch.Generator().manual_seed(1)) ** 4

    def errors(clip_search: bool) -> torch.Tensor:
        """[O, G] weighted squared error of each group."""
        decoded = round_to_nearest(w, Grid(bits, 32, symmetric, clip_search), importance).dequantize()
        return ((decoded - w).square() * importance).unflatten(-1, (4, 32)).sum(-1)

    assert (errors(True) <= errors(False) * (1 + 1e-5)).all()
    if bits <= 4:
        assert errors(True).sum() < 0.95 * errors(False).sum()  # and it improves on it


def test_importance_decides_what_is_clipped():
    w = torch.linspace(-1, 1, 32)[None].repeat(2, 1)
    w[:, 0] = 12.0  # an outlier
    unimportant, important = torch.ones(32), torch.ones(32)
    unimportant[0], important[0] = 0, 1000
    grid = Grid(2, 32)
    clipped = round_to_nearest(w, grid, unimportant).dequantize()
    kept = round_to_nearest(w, grid, important).dequantize()
    assert (clipped[:, 1:] - w[:, 1:]).square().sum() < (kept[:, 1:] - w[:, 1:]).square().sum()
    assert (kept[:, 0] - 12).abs().max() < 0.5 < (clipped[:, 0] - 12).abs().min()
