"""One block of Qwen3-30B-A3B's shapes calibrated on the device, and GPTQ with its column loop in Triton and in torch.

The block goes through what `fit` does with it (`benchmarks/block_cost.py`), in bfloat16 with random weights and tokens.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from unittest.mock import patch

import torch
from block_cost import measure, write_checkpoint

from eacmoe_lightning.quantization import column_loop
from eacmoe_lightning.quantization.gptq import solve
from eacmoe_lightning.quantization.grid import Grid
from gpu_parts import shapes
from gpu_parts.device import Call, Device, interleaved

SHAPE = "qwen3"
STACK = (16, 1536, 2048, 128)  # experts, outputs, inputs and group size of the comparison
SMALL = (1, 16, 32, 16)  # the same in miniature


def rows(options: argparse.Namespace, device: Device) -> Iterator[dict]:
    yield from _loops(device)
    yield from _solves(device)
    windows, length = (2, 16) if device.is_miniature else (options.windows, options.length)
    grid = {"group_size": shapes.group_size(device), "min_expert_tokens": 16 if device.is_miniature else 256}
    with tempfile.TemporaryDirectory(dir=options.scratch) as folder:
        write_checkpoint(shapes.config(device, SHAPE), Path(folder))
        dtype = str(device.dtype).rpartition(".")[2]
        for gib in options.solver_gib:
            place = Path(folder), device.device
            row = measure(SHAPE, 1, windows, length, dtype, False, *place, solver_gib=gib, **grid)
            for name, phase in row.pop("phases").items():
                yield {"what": "phase", "phase": name, "solver_gib": gib, "tokens": row["tokens"]} | phase
            yield {"what": "block", "solver_gib": gib} | row


@torch.no_grad()
def _loops(device: Device) -> Iterator[dict]:
    """The loop alone, over one group of a stack: the same codes, and how long."""
    num, outputs, _, group = SMALL if device.is_miniature else STACK
    candidates = 3 if device.is_miniature else 21
    generator = torch.Generator(device.device).manual_seed(0)
    with torch.device(device.device):
        value = torch.randn(num, outputs, group, generator=generator)
        factor = torch.eye(group) + 0.02 * torch.randn(num, group, group, generator=generator).triu(1)
        weight = torch.rand(num, group, generator=generator) + 0.5
        scale = 0.5 + torch.rand(num, outputs, candidates, generator=generator)
        zero = torch.randint(8, scale.shape, generator=generator).float()
    args = value, value, factor, weight, scale, zero, Grid(3, group)
    loops = {
        "triton": import_module("eacmoe_lightning.quantization.triton_column_loop").column_loop,
        "torch": column_loop.loop_in_torch,
    }
    results = {name: loop(*args) for name, loop in loops.items()}
    differ = sum(int((a != b).sum()) for a, b in zip(*results.values(), strict=True))
    medians = interleaved(device, {name: Call(lambda loop=loop: loop(*args)) for name, loop in loops.items()}, 5)
    for name, seconds in medians.items():
        yield {
            "what": "column loop",
            "loop": name,
            "shape": [num, outputs, group],
            "candidates": candidates,
            "ms": 1e3 * seconds,
            "ratio": medians["torch"] / seconds,
            "differ": differ,
            "passed": differ == 0,
        }


@torch.no_grad()
def _solves(device: Device) -> Iterator[dict]:
    """All of GPTQ on a stack, as `fit` calls it."""
    num, outputs, inputs, group = SMALL if device.is_miniature else STACK
    generator = torch.Generator(device.device).manual_seed(0)
    weight = 0.02 * torch.randn(num, outputs, inputs, device=device.device, generator=generator)
    x = torch.randn(num, 2 * inputs, inputs, device=device.device, generator=generator)
    hessian, errors = x.mT @ x, {}
    for name in ("triton", "torch", "triton", "torch"):
        with patch.object(column_loop, "triton_loop", lambda: None) if name == "torch" else patch.dict({}):
            start = time.perf_counter()
            errors[name] = solve(weight, hessian, Grid(3, group), 0.05, True, True, 1)[1].mean().item()
            seconds = time.perf_counter() - start
        yield {"what": "GPTQ", "loop": name, "shape": [num, outputs, inputs], "seconds": seconds, "error": errors[name]}


def line(row: dict) -> str:
    match row["what"]:
        case "column loop":
            return (
                f"column loop in {row['loop']:6s} {row['shape']}, {row['candidates']} candidates: {row['ms']:9.2f} ms, "
                f"{row['ratio']:.1f} x torch; {row['differ']} numbers differ"
            )
        case "GPTQ":
            return f"GPTQ of {row['shape']}, loop in {row['loop']:6s} {row['seconds']:7.2f} s, error {row['error']:.5f}"
        case "phase":
            planned = f", planned {row['planned_seconds']:.1f}" if "planned_seconds" in row else ""
            return f"  {row['phase']:10s} {row['seconds']:7.2f} s{planned}, peak {row['peak_bytes'] / 2**30:.2f} GiB"
    return (
        f"one block of {row['shape']}, {row['tokens']} tokens, solver_gib {row['solver_gib']:g}: "
        f"{row['seconds']:.1f} s, peak {row['peak_bytes'] / 2**30:.2f} GiB, error {row['error']:.4f}"
    )
