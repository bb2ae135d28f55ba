"""GPTQ's column loop for GPUs: beside torch's, under Triton's interpreter; and compiled for two architectures.

Needs Triton (`pip install triton`), which reads TRITON_INTERPRET when it is imported, and other libraries import it:
so the interpreted tests run in a process of their own.
"""

import os
import subprocess
import sys

import pytest
import torch
from test_column_loop import group

from eacmoe_lightning.quantization.column_loop import loop_in_torch
from eacmoe_lightning.quantization.grid import Grid

pytest.importorskip("triton", reason="Triton is not installed: the GPU's loop is not tested")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.mark.skipif(INTERPRETED, reason="this is that process")
def test_under_the_interpreter():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    ran = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert ran.returncode == 0 and "4 passed" in ran.stdout, ran.stdout


@pytest.mark.skipif(not INTERPRETED, reason="runs in a process of its own")
@pytest.mark.parametrize("candidates", [1, 3])
@pytest.mark.parametrize("rows, columns, bits", [(40, 8, 2), (5, 24, 3)])
def test_the_triton_loop_is_torch_s(rows, columns, bits, candidates):
    tensors = group(rows, columns, candidates, bits)
    from eacmoe_lightning.quantization import triton_column_loop

    codes, errors, chosen = triton_column_loop.column_loop(*tensors, Grid(bits, columns))
    expected = loop_in_torch(*tensors, Grid(bits, columns))
    assert torch.equal(codes, expected[0]) and torch.equal(chosen, expected[2])
    torch.testing.assert_close(errors, expected[1], rtol=1e-4, atol=1e-5)


COMPILE = """
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from eacmoe_lightning.quantization.triton_column_loop import ROWS, _loop

capability, candidates = map(int, sys.argv[1:])
types = ["*fp32"] * 6 + ["*u8", "*fp32", "*i64"] + ["i32"] * 5 + ["fp32"]
signature = dict(zip(_loop.arg_names, types))
constants = dict(C=candidates, g=128, PADDED=128, ROWS=ROWS)
signature |= dict.fromkeys(constants, "constexpr")
source, target = ASTSource(_loop, signature, constants), GPUTarget("cuda", capability, 32)
compiled = triton.compile(source, target=target, options={"enable_fp_fusion": False})
assert len(compiled.asm["cubin"]) > 1000
print(compiled.asm["ptx"])
"""


@pytest.mark.skipif(INTERPRETED, reason="compiles nothing")
@pytest.mark.slow
@pytest.mark.parametrize("candidates", [1, 21])
@pytest.mark.parametrize("capability", [80, 90])
def test_it_compiles_and_fuses_nothing(capability, candidates, tmp_path):
    """A fused multiply-add would round otherwise than torch does."""
    words = [sys.executable, "-c", COMPILE, str(capability), str(candidates)]
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(words, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"sm_{capability}" in done.stdout and "mul.rn.f32" in done.stdout and "fma.rn.f32" not in done.stdout
