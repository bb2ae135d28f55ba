"""The GPU kernel without a GPU: its results under Triton's interpreter, and its compilation for two architectures.

Needs Triton (`pip install triton`; any CUDA build of torch brings it). bfloat16 is compiled, not interpreted: Triton's
interpreter gets bfloat16 products wrong.
"""

import os
import subprocess
import sys

import pytest
import torch
from test_kernels import error, experts_reference, random_weight, tensors

from eacmoe_lightning.runtime import kernels

with pytest.MonkeyPatch.context() as context:
    context.setenv("TRITON_INTERPRET", "1")  # read when the kernel is defined
    pytest.importorskip("triton", reason="Triton is not installed: the GPU kernel is not tested")
    from eacmoe_lightning.runtime import triton_kernels as interpreted

TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3}


@pytest.fixture
def on_cuda(monkeypatch):
    """What the operators call on CUDA, here with CPU tensors; decoding is an error."""
    monkeypatch.setattr(kernels, "cuda_kernels", lambda: [interpreted])
    monkeypatch.setattr(kernels, "unpack", None)
    return kernels


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("bits", range(2, 9))
def test_linear(bits, dtype, on_cuda):
    q = random_weight((70, 96), bits, 48)
    bias = torch.randn(70, generator=torch.Generator().manual_seed(1))
    for count in (1, 17):
        x = torch.randn(2, count, 96, generator=torch.Generator().manual_seed(count)).to(dtype)
        reference = x.double() @ q.dequantize(torch.float64).T + bias.double()
        assert error(on_cuda._linear_cuda(x, *tensors(q), bias, bits, False), reference) < TOLERANCE[dtype]
    assert on_cuda._linear_cuda(x[:, :0], *tensors(q), bias, bits, False).shape == (2, 0, 70)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("count", [1, 50])
@pytest.mark.parametrize("mixed", [True, False])
def test_experts(mixed, count, dtype, on_cuda):
    """Skipped pairs (ids -1 and 7), an expert without tokens, biases, bits of their own."""
    g = torch.Generator().manual_seed(count)
    up, down, bits = random_weight((7, 96, 64), 2, 32), random_weight((7, 64, 48), 3, 16, seed=1), [2]
    if mixed:
        bits = [3, 8, 2, 5, 4, 7, 6]
        wide = random_weight((7, 96, 64), 8, 32).codes
        up.bits, up.codes = tuple(bits), torch.stack([c & 2**b - 1 for c, b in zip(wide, bits, strict=True)])
    up_bias, down_bias = torch.randn(7, 96, generator=g), torch.randn(7, 64, generator=g)
    ids = torch.stack([torch.randperm(8, generator=g)[:3] for _ in range(count)])
    ids[0, 0] = -1
    ids[ids == 4] = 5
    weights, x = torch.rand(count, 3, generator=g), torch.randn(count, 64, generator=g).to(dtype)
    packed = (*tensors(up), up_bias, bits, *tensors(down), down_bias, [3], True, "silu", False)
    result = on_cuda._experts_cuda(x, ids, weights, *packed)
    decoded = (q.dequantize(torch.float64) for q in (up, down))
    reference = experts_reference(x, ids, weights, *decoded, up_bias, down_bias, True, "silu")
    assert on_cuda._experts_cuda(x[:0], ids[:0], weights[:0], *packed).shape == (0, 64)
    assert result.dtype == dtype and error(result, reference) < 2 * TOLERANCE[dtype]


def test_blocks_of_one_expert_each():
    """By hand: expert 2 has pairs 0, 3, 4 in two blocks of 2, expert 0 pair 5; pair 1 and 2 are skipped."""
    schedule = interpreted.Schedule(torch.tensor([[2, 3], [-1, 2], [2, 0]]), 3, 2)
    assert schedule.num_blocks >= 3 and schedule.expert.tolist()[:3] == [0, 2, 2]
    assert all(expert == 3 for expert in schedule.expert.tolist()[3:])  # no work
    assert schedule.pairs.tolist()[:6] == [5, 6, 0, 3, 4, 6]  # 6 stands for nothing


def test_where_the_codes_of_each_expert_begin():
    """By hand; and copied to the device once, for a copy waits for it."""
    found = interpreted.widths_and_places((3, 8, 2), 96, torch.device("cpu"))
    assert [t.tolist() for t in found] == [[3, 8, 2], [0, 288, 1056]]
    assert interpreted.widths_and_places((3, 8, 2), 96, torch.device("cpu")) is found


def test_groups_that_the_kernel_does_not_take_are_decoded(monkeypatch):
    monkeypatch.setattr(kernels, "cuda_kernels", lambda: [interpreted])
    monkeypatch.setattr(interpreted, "multiply", None)
    q, x = random_weight((8, 48), 3, 24), torch.ones(2, 48)
    torch.testing.assert_close(kernels._linear_cuda(x, *tensors(q), None, 3, False), x @ q.dequantize().T)


COMPILE = """
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from eacmoe_lightning.runtime.triton_kernels import multiply

(capability, bits, block_m), dtype = map(int, sys.argv[1:4]), sys.argv[4]
types = ["*" + dtype, "*u8", "*fp16", "*u8", "*fp32", "*fp32", "*" + dtype, "*i64", "*i64", "*i64", "*i64"]
signature = dict(zip(multiply.arg_names, types + ["i32"] * 3))
constants = dict(O=2816, I=2048, BITS=bits, GROUP=128, HAS_BIAS=True, WEIGHTED=True)
constants |= dict(BLOCK_M=block_m, BLOCK_N=64, BLOCK_K=64)
signature |= dict.fromkeys(constants, "constexpr")
source, target = ASTSource(multiply, signature, constants), GPUTarget("cuda", capability, 32)
compiled = triton.compile(source, target=target, options={"num_warps": 8})
assert len(compiled.asm["cubin"]) > 1000
print(compiled.asm["ptx"])
"""


@pytest.mark.slow
@pytest.mark.parametrize("bits", [0, 3])
@pytest.mark.parametrize(
    "capability, block_m, instruction", [(80, 64, "mma.sync"), (90, 16, "mma.sync"), (90, 64, "wgmma.mma_async")]
)
def test_it_compiles_to_matrix_instructions(capability, block_m, instruction, bits, tmp_path):
    """`bits` 0: those of each expert."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    words = [sys.executable, "-c", COMPILE, *map(str, (capability, bits, block_m)), "bf16"]
    done = subprocess.run(words, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"sm_{capability}" in done.stdout and instruction in done.stdout and "bf16" in done.stdout
