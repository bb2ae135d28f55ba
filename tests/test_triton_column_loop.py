"""GPTQ's column loop for GPUs beside torch's, under Triton's interpreter. Needs Triton (`pip install triton`).

Triton decides when it is imported, which other libraries do: so these tests run in a process of their own.
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
