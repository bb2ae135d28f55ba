"""GPTQ on a lattice and entropy coding, against definitions, plain loops and each other."""

import math
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eacmoe_lightning.offload.codecs import codec, decode, read_header
from eacmoe_lightning.offload.codecs.entropy import Entropy
from eacmoe_lightning.quantization.entropy_coding import decode_codes, encode_codes
from eacmoe_lightning.quantization.grid import Grid, round_to_nearest
from eacmoe_lightning.quantization.lattice import (
    Lattice,
    column_steps,
    entropy,
    factored,
    gptq_on_lattice,
    round_to_lattice,
    step_for_bits,
)
from eacmoe_lightning.quantization.packing import pack


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def hessians(num: int, size: int, seed: int = 1) -> torch.Tensor:
    """Hessians of strongly correlated inputs: far from diagonal."""
    x = gaussian(num, 4 * size, size, seed=seed) @ (gaussian(num, size, size, seed=seed + 1) + 2)
    return x.mT @ x


def loss(weight, lattice, hessian) -> torch.Tensor:
    delta = (weight - lattice.dequantize()).double()
    return ((delta @ hessian.double()) * delta).sum((-2, -1))


def test_with_a_diagonal_hessian_it_rounds_to_nearest():
    weight = gaussian(2, 5, 24)
    h = torch.diag_embed(gaussian(2, 24, seed=3).abs() + 0.1)
    step = torch.full((2, 24), 0.25)
    solved, nearest = gptq_on_lattice(weight, factored(h)[0], step), round_to_lattice(weight, step)
    assert torch.equal(solved.codes, nearest.codes)
    assert (weight - nearest.dequantize()).abs().max() <= 0.125


def test_it_equals_the_paper_s_loop():
    """Against the paper's algorithm in float64, one column at a time."""
    weight, step = gaussian(1, 3, 140), torch.full((1, 140), 0.5)
    h = hessians(1, 140)
    factor, _ = factored(h, 0.01)
    h = h[0].double() + 0.01 * h[0].double().diagonal().mean() * torch.eye(140)
    w, u = weight[0].double().clone(), torch.linalg.cholesky(torch.linalg.inv(h), upper=True)
    codes = torch.empty_like(w)
    for j in range(140):
        codes[:, j] = (w[:, j] / 0.5).round()
        w[:, j:] -= ((w[:, j] - codes[:, j] * 0.5) / u[j, j])[:, None] * u[j, j:]
    differing = (gptq_on_lattice(weight, factor, step).codes[0] != codes).double().mean()
    assert differing < 0.02  # ties fall differently in float32 and float64


def test_error_compensation_and_column_steps_lower_the_loss_at_equal_entropy():
    weight, h = gaussian(4, 64, 96), hessians(4, 96)
    (factor, pivot), losses = factored(h), {}
    for name, shape in (("one step", torch.ones(4, 96)), ("columns", column_steps(pivot))):
        step = step_for_bits(weight, shape, 3.0, shared=False)
        nearest, solved = round_to_lattice(weight, shape * step), gptq_on_lattice(weight, factor, shape * step)
        assert entropy(nearest.codes).tolist() == pytest.approx([3.0] * 4, abs=0.02)
        losses[name] = loss(weight, solved, h)
        assert (losses[name] < 0.8 * loss(weight, nearest, h)).all()
    assert (losses["columns"] < losses["one step"]).all()


def test_with_a_shared_factor_finer_steps_get_more_bits():
    weight, shape = gaussian(3, 256, 64), torch.tensor([0.5, 1.0, 2.0])[:, None].expand(3, 64)
    step = step_for_bits(weight, shape, 4.0, shared=True)
    assert (step == step[0]).all()
    bits = entropy(round_to_lattice(weight, shape * step).codes)
    assert bits.mean().item() == pytest.approx(4.0, abs=0.02)
    assert (bits[:-1] - bits[1:]).tolist() == pytest.approx([1.0, 1.0], abs=0.1)  # half the step, one bit more


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(-70, 70), max_size=300),
    st.integers(-(2**30), 2**30),
    st.none() | st.integers(1, 4),
    st.integers(0, 2**31),
)
def test_decoding_inverts_encoding(codes, offset, cases, seed):
    codes = np.array(codes, np.int64) + offset
    given = None if cases is None else np.random.default_rng(seed).integers(0, cases, len(codes)).astype(np.uint8)
    assert decode_codes(encode_codes(codes, given), len(codes), given).tolist() == codes.tolist()


def test_the_size_is_the_entropy():
    codes = torch.randn(1 << 17, generator=torch.Generator().manual_seed(5)).mul(0.7).round().int().numpy()
    shares = [count / len(codes) for count in Counter(codes.tolist()).values()]
    shannon = -sum(p * math.log2(p) for p in shares)
    bits = 8 * len(encode_codes(codes)) / len(codes)
    assert shannon < bits < 1.002 * shannon
    assert entropy(torch.from_numpy(codes)[None, None]).item() == pytest.approx(shannon)


def test_a_given_zero_point_saves_its_information():
    """Codes of two kinds, each constant: once the kind is given, nothing is left to encode."""
    kinds = np.arange(4096, dtype=np.uint8) % 2
    assert len(encode_codes(kinds * 3)) > 512 and len(encode_codes(kinds * 3, kinds)) < 64


@pytest.mark.parametrize("bits", [2, 3])
def test_entropy_coded_codes_are_smaller_than_with_zstd(bits):
    q = round_to_nearest(gaussian(256, 512), Grid(bits, 128))
    tensors = (pack(q.codes, bits), q.scale, q.zero_point)
    sizes = {name: len(codec(f"{name}:{bits}:128").encode_packed(tensors)) for name in ("packed", "packed-zstd")}
    ours = len(codec(f"packed-entropy:{bits}:128").encode_packed(tensors))
    assert ours < 0.98 * sizes["packed-zstd"] < sizes["packed"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_lattice_s_record_decodes_to_the_lattice(dtype):
    weight = gaussian(40, 64) * 0.02
    lattice = round_to_lattice(weight[None], column_steps(factored(hessians(1, 64))[1]) * 0.01)
    one = Lattice(lattice.codes[0], lattice.scale[0])
    record = codec("entropy:mean:0.3").encode_lattice(one, dtype)
    assert torch.equal(decode(record), one.dequantize(dtype))
    assert read_header(record).codec == Entropy.name and read_header(record).shape == (40, 64)
    with pytest.raises(ValueError, match="span more than 4096"):
        codec("entropy:mean:0.3").encode_lattice(Lattice(torch.tensor([[0, 9000]]), torch.ones(1, 2).half()), dtype)
