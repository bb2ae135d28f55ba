"""Every kernel for GPUs against float64: products with packed weights, and the column loop.

The error is that of the worst row, its norm over the norm of the row it should be: a single wrong number among
thousands shows. Rows of which every pair is skipped must be zero. Kernels compile when they are first called, so the
cases are dealt to several processes; a process in which CUDA has failed runs no further case.
"""

from __future__ import annotations

import argparse
import multiprocessing
import time
import traceback
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from importlib import import_module

import torch
from torch import Tensor

from eacmoe_lightning.quantization.column_loop import loop_in_torch
from eacmoe_lightning.quantization.grid import Bits, Grid, Quantized
from eacmoe_lightning.quantization.packing import expert_codes, pack, unpack
from eacmoe_lightning.runtime.kernels import activate
from gpu_parts.device import Device

BOUND = {"float32": 5e-6, "float16": 1e-3, "bfloat16": 3.5e-3}  # of a product; rounding of the result
EXPERTS = 2  # times as much: the hidden states between two products are rounded too
HUMMING = 2  # in bfloat16 Humming rounds scales too
CHANGED = 0.01  # rows of the column loop whose codes may differ from float64's: a tie decides them
ALL = tuple(range(2, 9))  # bits
FEW = tuple(range(1, 34))  # tokens
MODULES = {
    "triton": "runtime.triton_kernels",
    "humming": "runtime.humming_kernels",
    "columns": "quantization.triton_column_loop",
}


@dataclass(frozen=True)
class Case:
    """One kernel at one setting.

    Attributes:
        kernel: triton, humming or columns.
        shape: (O, I) of a linear, (F, D) of experts, (O, group) of the column loop.
        tokens: numbers of them that are tried one after another; of the column loop numbers of candidates.
        bits: of a linear or of `gate_up_proj`; several where experts have their own.
        down_bits: of `down_proj`.
        first: experts before this one are never selected, so that codes begin far into their tensor.
    """

    kernel: str
    shape: tuple[int, int]
    tokens: tuple[int, ...]
    bits: Bits
    dtype: str = "bfloat16"
    group: int = 128
    num_experts: int = 0
    top_k: int = 0
    down_bits: int = 3
    bias: bool = False
    gated: bool = True
    activation: str = "silu"
    first: int = 0

    @property
    def name(self) -> str:
        bits = "mixed" if isinstance(self.bits, tuple) else f"{self.bits} bit"
        tokens = f"{self.tokens[0]}..{self.tokens[-1]}" if len(self.tokens) > 4 else ",".join(map(str, self.tokens))
        if self.kernel == "columns":
            return f"{self.shape[0]} x {self.shape[1]} {bits}, {tokens} candidates"
        what = f"{self.num_experts} experts top-{self.top_k}" if self.num_experts else "linear"
        what += f" {'gated ' if self.gated else ''}{self.activation}" if self.num_experts else ""
        far = f" from {self.first}" if self.first else ""
        bias = " bias" if self.bias else ""
        return f"{what} {self.shape[0]} x {self.shape[1]} g{self.group} {bits}{far}{bias} {self.dtype}, {tokens} tokens"


def cases(device: Device) -> list[Case]:
    found = _miniature_cases() if device.is_miniature and not device.is_cuda else _cases()
    if device.is_miniature and device.is_cuda:
        found = [case for case in found if max(case.shape) < 300 and not case.first]
    return found + (_humming_cases() if device.is_cuda else [])


def _cases() -> list[Case]:
    experts = Case("triton", (48, 64), (5, 400), 3, group=16, num_experts=7, top_k=3, bias=True)
    found = [Case("triton", (70, 96), (1, 17), bits, dtype, 48, bias=True) for bits in ALL for dtype in reversed(BOUND)]
    found += [Case("triton", (64, 512), (1, 17, 100), 3, dtype, g) for g in (16, 32, 256) for dtype in BOUND]
    found += [replace(experts, bits=bits, down_bits=bits, dtype=dtype) for bits in ALL for dtype in reversed(BOUND)]
    found += [replace(experts, bits=(3, 8, 2, 5, 4, 7, 6), tokens=(1, 33, 400), dtype=dtype) for dtype in BOUND]
    found += [replace(experts, tokens=FEW)]
    found += [replace(experts, activation=a, gated=g) for a in ("silu", "gelu", "gelu_tanh", "relu") for g in (0, 1)]
    found += [Case("columns", shape, (1, 7, 21), bits) for shape, bits in (((40, 8), 2), ((5, 24), 3), ((100, 64), 8))]
    found += [Case("columns", (1536, 128), (1, 21), bits) for bits in (2, 3, 4)]
    found += [Case("triton", (2816, 2048), (1, 33, 700), bits) for bits in ALL]
    qwen3 = Case("triton", (768, 2048), (1, 16, 512, 4096), 3, num_experts=128, top_k=8)
    mixtral = Case("triton", (14336, 4096), (1, 16, 4096), 3, num_experts=8, top_k=2)
    found += [replace(qwen3, bits=bits, down_bits=bits) for bits in (2, 3, 4)] + [mixtral]
    far = Case("triton", (14336, 2048), (3, 200), 8, num_experts=40, top_k=2, down_bits=2, first=38)  # 2.3e9 bytes
    return [*found, far]


def _humming_cases() -> list[Case]:
    try:
        import_module("eacmoe_lightning.runtime.humming_kernels")
    except ImportError:
        return []
    experts = Case("humming", (128, 256), (1, 33, 700), 3, group=64, num_experts=5, top_k=2, bias=True)
    found = [Case("humming", (256, 192), (1, 17, 300), bits, group=64, bias=True) for bits in (3, 4, 2, 5, 6, 7, 8)]
    return [
        *found,
        experts,
        *(replace(experts, bits=b, down_bits=b) for b in (2, 4)),
        replace(experts, dtype="float16"),
    ]


def _miniature_cases() -> list[Case]:
    experts = Case("triton", (48, 32), (1, 50), 3, "float32", 16, 7, 3, bias=True)
    return [
        *(Case("triton", (70, 96), (2,), bits, "float32", 48, bias=True) for bits in ALL),
        Case("triton", (64, 128), (3,), 3, "float16", 32),
        replace(experts, dtype="float16"),
        replace(experts, bits=(3, 8, 2, 5, 4, 7, 6)),
        replace(experts, tokens=(2, 33), activation="gelu_tanh"),
        replace(experts, tokens=(3,), activation="relu", gated=False),
        replace(experts, tokens=(3,), first=5),
        Case("columns", (20, 8), (1, 3), 2),
    ]


# --- a case -----------------------------------------------------------------------------------------------------------

_broken = ""  # what CUDA failed with in this process


def check(case: Case, device: Device) -> dict | None:
    """A row; None where this process can run nothing any more."""
    global _broken
    if _broken:
        return None
    row = {"kernel": case.kernel, "case": case.name}
    start = time.perf_counter()
    try:
        row |= (_check_columns if case.kernel == "columns" else _check_products)(case, device)
        row["passed"] = row["error"] <= row["bound"] and not row.get("differs", 0)
    except Exception as error:
        if "CUDA error" in str(error) or type(error).__name__ == "AcceleratorError":
            _broken = str(error)
        row |= {"failure": "".join(traceback.format_exception(error, limit=-4)), "passed": False}
    return row | {"seconds": time.perf_counter() - start}


def _check_products(case: Case, device: Device) -> dict:
    with torch.device(device.device):
        generator = torch.Generator(device.device).manual_seed(sum(case.shape))
        measure = _experts if case.num_experts else _linear
        worst = max((_worst(*pair), n) for n, pair in measure(case, generator))
    bound = BOUND[case.dtype] * (EXPERTS if case.num_experts else 1) * (HUMMING if case.kernel == "humming" else 1)
    return {"error": worst[0], "bound": bound, "worst_tokens": worst[1]}


def _worst(result: Tensor, expected: Tensor) -> float:
    """The largest relative error of a row; infinite where something is not finite."""
    away, size = ((t if t.numel() else t.new_zeros(1, 1)).norm(dim=-1) for t in (result.double() - expected, expected))
    ratio = torch.where(away == 0, 0.0, away / size)
    return float(ratio.nan_to_num(nan=torch.inf, posinf=torch.inf).max())


def _weight(shape: tuple[int, ...], bits: Bits, group: int, generator: torch.Generator) -> tuple[Tensor, ...]:
    """Random codes, packed, with scales and zero points, on the default device."""
    groups = (*shape[:-1], shape[-1] // group)
    widths = [bits] if isinstance(bits, int) else bits
    most = [2**b for b in widths]
    scale = (torch.rand(groups, generator=generator) * 0.02 + 1e-4).half()
    if len(widths) == 1:  # any bytes are codes
        packed = torch.randint(256, (*shape[:-1], shape[-1] // 8 * widths[0]), generator=generator, dtype=torch.uint8)
        return packed, scale, torch.randint(most[0], groups, generator=generator, dtype=torch.uint8)
    codes, zeros = (
        torch.stack([torch.randint(m, s, generator=generator, dtype=torch.uint8) for m in most])
        for s in (shape[1:], groups[1:])
    )
    return pack(codes, bits), scale, zeros


def _decoded(weight: tuple[Tensor, ...], bits: Bits, columns: int, expert: int | None = None) -> Tensor:
    """[O, I] float64, of one of a stack."""
    codes, scale, zero = weight
    if expert is not None:
        codes, scale, zero = expert_codes(codes, bits, expert, columns), scale[expert], zero[expert]
        bits = bits if isinstance(bits, int) else bits[expert]
    return Quantized(unpack(codes, bits, columns), scale, zero, bits).dequantize(torch.float64)


def _linear(case: Case, generator: torch.Generator) -> Iterator[tuple[int, tuple[Tensor, Tensor]]]:
    kernel, (rows, columns) = _module(case), case.shape
    weight = _weight((rows, columns), case.bits, case.group, generator)
    decoded = _decoded(weight, case.bits, columns)
    bias = torch.randn(rows, generator=generator) if case.bias else None
    for n in case.tokens:
        x = torch.randn(2, n, columns, generator=generator).to(getattr(torch, case.dtype))
        _demand(kernel, x, (weight[0], weight[1], columns, case.bits))
        expected = x.double() @ decoded.T
        yield n, (kernel.linear(x, *weight, bias, case.bits), expected if bias is None else expected + bias.double())


def _experts(case: Case, generator: torch.Generator) -> Iterator[tuple[int, tuple[Tensor, Tensor]]]:
    kernel, (width, hidden), num = _module(case), case.shape, case.num_experts
    shapes = (num, width * (2 if case.gated else 1), hidden), (num, hidden, width)
    each = case.bits, case.down_bits
    weights = [_weight(shape, bits, case.group, generator) for shape, bits in zip(shapes, each, strict=True)]
    biases = [torch.randn(shape[:2], generator=generator) if case.bias else None for shape in shapes]
    up, down = ((*w, bias, bits) for w, bias, bits in zip(weights, biases, each, strict=True))
    for n in case.tokens:
        x = torch.randn(n, hidden, generator=generator).to(getattr(torch, case.dtype))
        choices = torch.rand(n, num - case.first + 1, generator=generator).argsort(-1)[:, : case.top_k]
        ids = choices + case.first  # num_experts among them: a skipped pair
        ids[0, 0] = -1
        shares = torch.rand(n, case.top_k, generator=generator)
        _demand(kernel, x, *((w[0], w[1], s[-1], bits) for w, s, bits in zip(weights, shapes, each, strict=True)))
        result = kernel.experts(x, ids, shares, up, down, lambda h: activate(h, case.gated, case.activation))
        expected = torch.zeros(n, hidden, dtype=torch.float64)
        for e in range(num):
            token, choice = torch.where(ids == e)
            if not len(token):
                continue
            y = x[token].double()
            for i, (weight, shape, bits, bias) in enumerate(zip(weights, shapes, each, biases, strict=True)):
                y = y @ _decoded(weight, bits, shape[-1], e).T + (0 if bias is None else bias[e].double())
                y = activate(y, case.gated, case.activation) if i == 0 else y
            expected.index_add_(0, token, y * shares[token, choice, None].double())
        yield n, (result, expected)


def _module(case: Case):
    return import_module(f"eacmoe_lightning.{MODULES[case.kernel]}")


def _demand(kernel, x: Tensor, *weights: tuple) -> None:
    if not kernel.takes(x, *weights):
        raise ValueError(f"{kernel.__name__} does not take {tuple(x.shape)} {x.dtype}")


def _check_columns(case: Case, device: Device) -> dict:
    """Codes beside torch's loop on the same device, which they must equal, and beside torch's in float64."""
    (rows, columns), grid = case.shape, Grid(case.bits, case.shape[1])
    changed, differs = 0.0, 0
    for candidates in case.tokens:
        value, old, factor, weight, scale, zero = _group(rows, columns, candidates, case.bits, device.device)
        codes, errors, chosen = _module(case).column_loop(value, old, factor, weight, scale, zero, grid)
        same = loop_in_torch(value, old, factor, weight, scale, zero, grid)
        differs += int((codes != same[0]).sum() + (chosen != same[2]).sum() + (errors != same[1]).sum())
        exact = loop_in_torch(*(t.double() for t in (value, old, factor, weight, scale, zero)), grid)
        changed = max(changed, float((codes != exact[0]).any(-1).double().mean()))
    return {"error": changed, "bound": CHANGED, "differs": differs}


def _group(rows: int, columns: int, candidates: int, bits: int, device: torch.device) -> tuple[Tensor, ...]:
    """What GPTQ hands to the column loop: values as views of wider ones, a unit upper factor, candidates."""
    g = torch.Generator().manual_seed(rows + columns + candidates)
    value = torch.randn(3, rows, 2 * columns, generator=g)[:, :, columns:]
    old = value + 0.1 * torch.randn(3, rows, columns, generator=g)
    x = torch.randn(3, 2 * columns, columns, generator=g)
    factor = torch.linalg.cholesky((x.mT @ x / columns).flip(-2, -1)).flip(-2, -1)
    root = factor.diagonal(dim1=-2, dim2=-1)
    scale = (torch.rand(3, rows, candidates, generator=g) + 0.5) * 4 / 2**bits
    zero = torch.randint(0, 2**bits, scale.shape, generator=g).float()
    return tuple(t.to(device) for t in (value, old, factor / root.unsqueeze(-2), root.square(), scale, zero))


# --- all of them ------------------------------------------------------------------------------------------------------


def rows(options: argparse.Namespace, device: Device) -> Iterator[dict]:
    pending = cases(device)
    if options.processes == 1:
        yield from (check(case, device) for case in pending)
        return
    context = multiprocessing.get_context("spawn")
    while pending:
        with ProcessPoolExecutor(min(options.processes, len(pending)), context) as pool:
            running = {pool.submit(check, case, device): case for case in pending}
            pending = []
            for future in as_completed(running):
                row = future.result()
                if row is None:
                    pending.append(running[future])
                else:
                    yield row


def line(row: dict) -> str:
    head = f"{row['kernel']:8s} {row['case']:78s} {row['seconds']:5.1f} s"
    if "failure" in row:
        return f"{head}\n{row['failure']}"
    if row["kernel"] == "columns":
        found = (
            f"{row['error']:.2%} of rows changed by float64 (bound {row['bound']:.0%}), {row['differs']} from torch's"
        )
    else:
        found = f"error {row['error']:.1e} of {row['bound']:.1e}, at {row['worst_tokens']} tokens"
    return f"{head}  {found}"
