"""Every kernel, bit width, group size, odd shape and row count against a float64 reference."""

import ctypes
import itertools
import mmap
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GptOssConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

from eacmoe_lightning.quantization.grid import Grid, Quantized, round_to_nearest
from eacmoe_lightning.quantization.packing import pack
from eacmoe_lightning.runtime import kernels
from eacmoe_lightning.runtime.packed_modules import PackedExperts, PackedLinear, PackedWeight

ROOT = Path(__file__).resolve().parent.parent
BUILT = kernels.library() is not None
LEVELS = kernels.LEVELS[: kernels.library().eacmoe_level() + 1] if BUILT else ()
# relative error of the whole product: rounding of the result, and of int8 activations
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 3.5e-3, torch.float16: 5e-4}
INT8_TOLERANCE = 0.02


def random_weight(shape: tuple[int, ...], bits: int, group_size: int, seed: int = 0) -> Quantized:
    g = torch.Generator().manual_seed(seed)
    groups = (*shape[:-1], shape[-1] // group_size)
    return Quantized(
        torch.randint(0, 2**bits, shape, generator=g).to(torch.uint8),
        (torch.rand(groups, generator=g) * 0.02 + 1e-4).half(),
        torch.randint(0, 2**bits, groups, generator=g).to(torch.uint8),
        bits,
    )


def tensors(q: Quantized) -> tuple[Tensor, Tensor, Tensor]:
    return pack(q.codes, q.bits), q.scale, q.zero_point


def linear(x: Tensor, q: Quantized, bias: Tensor | None = None, int8: bool = False) -> Tensor:
    return torch.ops.eacmoe.linear(x, *tensors(q), bias, q.bits, int8)


def error(result: Tensor, reference: Tensor) -> float:
    return float((result.double() - reference).norm() / reference.norm().clamp(min=1e-12))


@pytest.fixture(params=[*LEVELS, "torch"])
def level(request, monkeypatch) -> str:
    """Each instruction set that this CPU has, and the way without compiled kernels."""
    name = None if request.param == "torch" else request.param
    monkeypatch.setattr(kernels, "level", lambda: name)
    monkeypatch.setattr(kernels, "MANY_FLOAT32", dict.fromkeys(kernels.LEVELS, 10**9))  # ours, however many tokens
    return request.param


def test_the_kernels_are_built_here():
    """CI has a compiler: without this, all tests below would pass through torch."""
    assert BUILT


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize(
    "rows, width, group_size", [(33, 256, 128), (7, 24, 8), (50, 336, 336), (20, 1408, 1408), (40, 640, 320)]
)
def test_linear(level, bits, rows, width, group_size):
    q = random_weight((rows, width), bits, group_size)
    bias = torch.randn(rows, generator=torch.Generator().manual_seed(1))
    for dtype, tolerance in TOLERANCE.items():
        for count in (1, 2, 4, 5, 31, 200):
            x = torch.randn(count, width, generator=torch.Generator().manual_seed(count)).to(dtype)
            reference = x.double() @ q.dequantize(torch.float64).T + bias.double()
            # without kernels, weights are rounded to the activations' dtype
            allowed = tolerance * (2 if level == "torch" else 1)
            assert error(linear(x, q, bias), reference) < allowed
            assert error(linear(x, q, bias, int8=True), reference) < max(INT8_TOLERANCE, allowed)


@pytest.mark.parametrize("bits", [2, 3, 5, 8])
def test_float32_loses_no_digits_where_activations_have_one_sign(level, bits):
    """Zero points then take off nearly all that codes have summed up."""
    q = random_weight((40, 1024), bits, 256)
    q = replace(q, zero_point=torch.full_like(q.zero_point, 2 ** (bits - 1)))
    for count in (1, 4, 40):
        x = 3 + torch.rand(count, 1024, generator=torch.Generator().manual_seed(count))
        decoded = q.dequantize(torch.float64)
        dense = x @ decoded.float().T
        allowed = max(TOLERANCE[torch.float32], 3 * error(dense, x.double() @ decoded.T))
        assert error(linear(x, q), x.double() @ decoded.T) < allowed


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("count", [1, 9])
def test_what_is_no_number_stays_none(level, value, count):
    """A token that overflowed must not come out as a plausible one; the others are none the worse for it."""
    q, up, down = (
        random_weight((40, 256), 3, 128),
        random_weight((2, 64, 256), 3, 128),
        random_weight((2, 256, 64), 5, 32),
    )
    ids, weights = torch.tensor([[0, 1]]).expand(count, 2).contiguous(), torch.ones(count, 2)
    for dtype, int8, (gated, name) in itertools.product(TOLERANCE, (False, True), ((True, "silu"), (False, "relu"))):
        x = torch.randn(count, 256, generator=torch.Generator().manual_seed(0)).to(dtype)
        x[0, 37] = value
        part = down if not gated else random_weight((2, 256, 32), 5, 32)
        routed = torch.ops.eacmoe.experts(
            x, ids, weights, *tensors(up), None, [3], *tensors(part), None, [5], gated, name, int8
        )
        for result in (linear(x, q, int8=int8), routed):
            assert not result[0].isfinite().any()
            assert result[1:].isfinite().all()


@settings(max_examples=60, deadline=None)
@given(
    bits=st.integers(2, 8),
    rows=st.integers(1, 70),
    group_size=st.sampled_from([8, 16, 24, 32, 40, 64, 128, 136, 192, 256, 264]),
    groups=st.integers(1, 19),
    count=st.integers(1, 3) | st.integers(4, 40),
    threads=st.integers(1, 3),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    int8=st.booleans(),
)
def test_linear_of_any_shape(bits, rows, group_size, groups, count, threads, dtype, int8):
    q = random_weight((rows, group_size * groups), bits, group_size, seed=bits)
    x = torch.randn(count, group_size * groups, generator=torch.Generator().manual_seed(rows)).to(dtype)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        result = linear(x, q, int8=int8)
    finally:
        torch.set_num_threads(before)
    weight = q.dequantize(torch.float64)
    # against the sum of the products' sizes: a single output may cancel to almost nothing
    allowed = INT8_TOLERANCE if int8 else TOLERANCE[dtype]
    assert (result - x.double() @ weight.T).norm() < allowed * (x.double().abs() @ weight.abs().T).norm()


def test_linear_keeps_leading_dimensions_and_takes_no_rows():
    q = random_weight((24, 64), 3, 32)
    x = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(linear(x, q), linear(x.view(6, 64), q).view(2, 3, 24))
    assert linear(x[:0], q).shape == (0, 3, 24)
    strided = torch.randn(64, 5, generator=torch.Generator().manual_seed(1)).T
    torch.testing.assert_close(linear(strided, q), linear(strided.contiguous(), q))


def experts_reference(x, ids, weights, up, down, up_bias, down_bias, gated, activation) -> Tensor:
    out = torch.zeros(len(x), down.shape[-2], dtype=torch.float64)
    for n in range(len(x)):
        for k in range(ids.shape[1]):
            if 0 <= (e := int(ids[n, k])) < len(up):
                hidden = up[e] @ x[n].double() + up_bias[e].double()
                hidden = kernels.activate(hidden[None], gated, activation)[0]
                out[n] += float(weights[n, k]) * (down[e] @ hidden + down_bias[e].double())
    return out


@pytest.mark.parametrize("gated, activation", [(True, "silu"), (True, "gelu"), (False, "gelu_tanh"), (False, "relu")])
@pytest.mark.parametrize("count", [1, 3, 60])
def test_experts(level, gated, activation, count):
    """Mixed bits, odd widths, biases, skipped pairs (ids 6 and -1), experts without tokens."""
    g = torch.Generator().manual_seed(count)
    up = random_weight((6, 80 if gated else 40, 72), 3, 24)
    down = random_weight((6, 72, 40), 5, 8, seed=1)
    up_bias, down_bias = torch.randn(6, up.codes.shape[1], generator=g), torch.randn(6, 72, generator=g)
    ids = torch.stack([torch.randperm(7, generator=g)[:3] for _ in range(count)])
    ids[0, 0] = -1
    ids[ids == 4] = 5  # nobody selects expert 4
    weights = torch.rand(count, 3, generator=g)
    for dtype, tolerance in TOLERANCE.items():
        x = torch.randn(count, 72, generator=g).to(dtype)
        result = torch.ops.eacmoe.experts(
            x, ids, weights, *tensors(up), up_bias, [3], *tensors(down), down_bias, [5], gated, activation, False
        )
        decoded = (q.dequantize(torch.float64) for q in (up, down))
        reference = experts_reference(x, ids, weights, *decoded, up_bias, down_bias, gated, activation)
        assert result.dtype == dtype
        assert error(result, reference) < tolerance * (3 if level == "torch" else 2)  # two products


@pytest.mark.parametrize("count", [1, 50])
@pytest.mark.parametrize("uniform_down", [True, False])
def test_experts_with_bits_of_their_own(level, count, uniform_down):
    """Every width once, in one call; expert by expert it is what a stack of that width gives."""
    g = torch.Generator().manual_seed(count)
    bits = (3, 8, 2, 5, 4, 7, 6)
    up, down = random_weight((7, 80, 72), 2, 24), random_weight((7, 72, 40), 2, 8, seed=1)
    up.codes = torch.stack([c & 2**b - 1 for c, b in zip(random_weight((7, 80, 72), 8, 24).codes, bits, strict=True)])
    up.bits, down_widths = bits, [2]
    if not uniform_down:
        down.bits, down_widths = bits[::-1], list(bits[::-1])
    bias, none = torch.randn(7, 80, generator=g), torch.zeros(7, 72)
    ids = torch.stack([torch.randperm(8, generator=g)[:3] for _ in range(count)])  # 7 skips
    weights, x = torch.rand(count, 3, generator=g), torch.randn(count, 72, generator=g)
    packed = (*tensors(up), bias, list(bits), *tensors(down), None, down_widths, True, "silu", False)
    decoded = (q.dequantize(torch.float64) for q in (up, down))
    reference = experts_reference(x, ids, weights, *decoded, bias, none, True, "silu")
    assert error(torch.ops.eacmoe.experts(x, ids, weights, *packed), reference) < 2e-6


def test_the_number_of_threads_does_not_change_a_bit():
    up, down = random_weight((8, 96, 64), 3, 32), random_weight((8, 64, 48), 2, 16)
    g = torch.Generator().manual_seed(0)
    x, weights = torch.randn(900, 64, generator=g).bfloat16(), torch.rand(900, 2, generator=g)
    ids = torch.stack([torch.randperm(8, generator=g)[:2] for _ in range(900)])  # more than a piece of tokens an expert
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            arguments = (x, ids, weights, *tensors(up), None, [3], *tensors(down), None, [2], True, "silu", False)
            results += [torch.ops.eacmoe.experts(*arguments) for _ in range(5)]
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.skipif("amx" not in LEVELS, reason="needs a CPU with AMX that programs may use")
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("int8", [False, True])
def test_amx_gives_the_bits_of_avx512(dtype, int8, monkeypatch):
    """Its sums are the same integers, for any shape, and any number of tokens in blocks of 16."""
    results = {}
    for name in ("avx512", "amx"):
        monkeypatch.setattr(kernels, "level", lambda name=name: name)
        results[name] = found = []
        for bits, (rows, width, group_size) in itertools.product(
            range(2, 9), [(7, 24, 8), (33, 256, 128), (50, 336, 336), (1100, 640, 320)]
        ):
            q = random_weight((rows, width), bits, group_size)
            bias = torch.randn(rows, generator=torch.Generator().manual_seed(1))
            for count in (7, 8, 16, 17, 200, 390):
                x = torch.randn(count, width, generator=torch.Generator().manual_seed(count)).to(dtype)
                found.append(linear(x, q, bias, int8))
        up, down = random_weight((6, 2 * 200, 640), 3, 128), random_weight((6, 640, 200), 5, 40)
        g = torch.Generator().manual_seed(0)
        x, weights = torch.randn(700, 640, generator=g).to(dtype), torch.rand(700, 2, generator=g)
        ids = torch.stack([torch.randperm(7, generator=g)[:2] for _ in range(700)])  # 6 skips
        args = (x, ids, weights, *tensors(up), None, [3], *tensors(down), None, [5], True, "silu", int8)
        found.append(torch.ops.eacmoe.experts(*args))
    assert all(torch.equal(a, b) for a, b in zip(*results.values(), strict=True))


FORK = """
import os
import torch  # first, so that its threads spin and are used
from tests.test_kernels import random_weight, tensors

torch.set_num_threads(3)
x, weight = torch.randn(8, 256), (*tensors(random_weight((512, 256), 3, 128)), None, 3, False)
torch.randn(512, 512) @ torch.randn(512, 512)  # starts torch's threads
before, first = len(os.listdir("/proc/self/task")), torch.ops.eacmoe.linear(x, *weight)
print(len(os.listdir("/proc/self/task")) - before, flush=True)
if not (child := os.fork()):  # what torch itself would do on several threads hangs there
    os._exit(0 if torch.equal(torch.ops.eacmoe.linear(x, *weight), first) else 1)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.skipif(not BUILT or sys.platform != "linux", reason="needs the kernels and Linux")
def test_threads_that_spin_are_used_and_a_fork_has_its_own():
    """Beside torch's spinning threads more of them would wait for cores; a fork has none of its parent's."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_", "KMP_"))}
    done = subprocess.run(
        [sys.executable, "-c", FORK], cwd=ROOT, env=environment, capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout.split() == ["0", "0"]


def test_an_input_with_a_gradient_gets_an_error_instead_of_none():
    """Past torch's dispatcher the gradient would be lost."""
    x = torch.randn(2, 64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    weight = (*tensors(q := random_weight((8, 64), 3, 32)), None, q.bits, False)
    product = kernels.linear(x, *weight)
    with pytest.raises(RuntimeError, match="packed weights pass no gradient on"):
        product.sum().backward()
    with torch.no_grad():
        assert torch.equal(kernels.linear(x, *weight), torch.ops.eacmoe.linear(x, *weight))


def test_a_token_alone_is_a_token_among_others():
    """A token's result does not depend on the batch beyond float32's order of sums."""
    up, down = random_weight((4, 64, 128), 4, 64), random_weight((4, 128, 32), 4, 32)
    g = torch.Generator().manual_seed(0)
    x, ids, weights = torch.randn(50, 128, generator=g), torch.randint(0, 4, (50, 1), generator=g), torch.ones(50, 1)

    def run(rows: slice) -> Tensor:
        packed = (*tensors(up), None, [4], *tensors(down), None, [4], True, "silu", False)
        return torch.ops.eacmoe.experts(x[rows], ids[rows], weights[rows], *packed)

    torch.testing.assert_close(run(slice(None))[7:8], run(slice(7, 8)), rtol=1e-5, atol=1e-5)


def fill(weight: PackedWeight, dense: Tensor) -> Tensor:
    """Puts a rounded weight into a packed one; its decoded value."""
    q = round_to_nearest(dense, Grid(weight.bits, weight.group_size))
    for name, tensor in zip(("codes", "scale", "zero_point"), tensors(q), strict=True):
        getattr(weight, name).copy_(tensor)
    return q.dequantize()


@torch.no_grad()
def test_a_packed_linear_is_a_linear():
    dense = nn.Linear(64, 24)
    packed = PackedLinear(dense, 4, 32)
    weight = fill(packed.weight, dense.weight)
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(packed(x), F.linear(x, weight, dense.bias))


@torch.no_grad()
def test_experts_with_a_gating_of_their_own():
    """gpt_oss: transposed, interleaved, biased and clamped."""
    torch.manual_seed(0)
    config = GptOssConfig(hidden_size=32, intermediate_size=48, num_local_experts=4, num_experts_per_tok=2)
    config._experts_implementation = "eager"
    experts = GptOssExperts(config)
    for parameter in experts.parameters():
        nn.init.normal_(parameter, std=0.5)
    dense = {name: getattr(experts, name).clone() for name in ("gate_up_proj", "down_proj")}
    x, ids = torch.randn(9, 32), torch.stack([torch.randperm(4)[:2] for _ in range(9)])
    weights = torch.rand(9, 2)
    packed = PackedExperts(copy_of(experts, config), {"gate_up_proj": (8, 32), "down_proj": (8, 16)})
    assert packed.activation is None
    for name, weight in dense.items():
        decoded = fill(getattr(packed, name), weight.transpose(1, 2).contiguous())
        getattr(experts, name).copy_(decoded.transpose(1, 2))
    torch.testing.assert_close(packed(x, ids, weights), experts(x, ids, weights), rtol=1e-4, atol=1e-4)


def copy_of(experts: nn.Module, config) -> nn.Module:
    twin = type(experts)(config)
    twin.load_state_dict(experts.state_dict())
    return twin


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="protects a page by Linux's mprotect")
@pytest.mark.parametrize("bits", range(2, 9))
def test_nothing_is_read_beyond_the_codes(level, bits):
    """The codes end where a page ends, or begin where one begins, and the pages beside it must not be read: a mapped
    file may end there."""
    q, page = random_weight((9, 136), bits, 136), mmap.PAGESIZE
    codes, pages = tensors(q)[0], mmap.mmap(-1, 3 * mmap.PAGESIZE)
    libc, start = ctypes.CDLL(None, use_errno=True), torch.frombuffer(pages, dtype=torch.uint8).data_ptr()

    def protect(rights: int) -> None:
        for beside in (start, start + 2 * page):
            assert libc.mprotect(ctypes.c_void_p(beside), ctypes.c_size_t(page), rights) == 0

    for offset in (page, 2 * page - codes.numel()):
        place = torch.frombuffer(pages, dtype=torch.uint8, count=codes.numel(), offset=offset)
        place.copy_(codes.flatten())
        protect(0)
        try:
            for count, dtype in itertools.product((1, 7, 20), TOLERANCE):
                x = torch.ones(count, 136, dtype=dtype)
                for int8 in (False, True):
                    expected = torch.ops.eacmoe.linear(x, *tensors(q), None, bits, int8)
                    own = torch.ops.eacmoe.linear(x, place.view_as(codes), *tensors(q)[1:], None, bits, int8)
                    assert torch.equal(own, expected)
        finally:
            protect(mmap.PROT_READ | mmap.PROT_WRITE)


def test_kernels_of_other_sources_are_not_called(monkeypatch):
    message = f"has interface {kernels.INTERFACE}, not 99: it was compiled from other sources"
    monkeypatch.setattr(kernels, "INTERFACE", 99)
    with pytest.warns(UserWarning, match=message):
        assert kernels.library.__wrapped__() is None


def test_a_wrong_level_is_an_error(monkeypatch):
    unchecked: Callable = kernels.level.__wrapped__
    monkeypatch.setenv("EACMOE_CPU", "sse9")
    with pytest.raises(ValueError, match="EACMOE_CPU='sse9'"):
        unchecked()
