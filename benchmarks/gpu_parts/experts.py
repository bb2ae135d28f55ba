"""Packed experts of real shapes beside transformers' `grouped_mm` in bfloat16.

A row has `ms`, the device's median with weights in no cache; `wall_ms`, the host's time per call of many in a row,
which is longer where launches are slower than the device; and what of the call waits for the GPU (none should). The
share is of the nearer limit: bytes of the selected experts and the activations by the bandwidth of a large copy, or
operations by the rate of a large product, both measured at the start.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from functools import partial

import torch
from inference_models import bytes_of
from torch import nn

from gpu_parts import shapes
from gpu_parts.device import Call, Device, choose_kernels, interleaved

SHAPES, BITS, TOKENS = ("qwen3", "mixtral"), (2, 3, 4), (1, 16, 512, 4096)
DENSE = "grouped_mm"


@torch.inference_mode()
def rows(options: argparse.Namespace, device: Device) -> Iterator[dict]:
    bandwidth, rate = device.bandwidth(), device.matmul_rate()
    yield {"limits": {"bytes_per_second": bandwidth, "operations_per_second": rate}}
    kernels = choose_kernels("humming" if device.is_cuda else "triton")  # Humming has no miniature
    for shape in SHAPES[:1] if device.is_miniature else SHAPES:
        dense = shapes.dense(device, shapes.config(device, shape))
        modules = {16: dense.model.layers[0].mlp.experts}
        modules |= {bits: shapes.packed(device, dense, bits).model.layers[0].mlp.experts for bits in BITS}
        top_k = dense.config.num_experts_per_tok
        for tokens in (1, 3) if device.is_miniature else TOKENS:
            for row in _compare(device, modules, kernels, tokens, top_k, bandwidth, rate):
                yield {"shape": shape} | row
        del dense, modules


def _compare(
    device: Device,
    modules: dict[int, nn.Module],
    kernels: list[str],
    tokens: int,
    top_k: int,
    bandwidth: float,
    rate: float,
) -> Iterator[dict]:
    """Rows of one shape at one number of tokens; experts are chosen at random, which no model does: all are needed
    sooner."""
    num, (hidden, width) = modules[16].num_experts, modules[16].down_proj.shape[1:]
    generator = torch.Generator(device.device).manual_seed(0)
    x = torch.randn(tokens, hidden, device=device.device, dtype=device.dtype, generator=generator)
    ids = torch.rand(tokens, num, device=device.device, generator=generator).topk(top_k).indices
    weights = torch.full((tokens, top_k), 1 / top_k, device=device.device, dtype=device.dtype)
    backends = {(DENSE, 16): Call(partial(modules[16], x, ids, weights))}
    for bits in BITS:
        for name in kernels:
            backends[name, bits] = Call(partial(modules[bits], x, ids, weights), partial(choose_kernels, name))
    selected = len(ids.unique())
    operations = 2 * tokens * top_k * 3 * hidden * width
    medians = interleaved(device, backends)
    for (name, bits), seconds in medians.items():
        backends[name, bits].prepare()
        reading = (bytes_of(modules[bits]) * selected / num + 2 * x.nbytes) / bandwidth
        yield {
            "tokens": tokens,
            "selected_experts": selected,
            "bits": bits,
            "backend": name,
            "ms": 1e3 * seconds,
            "wall_ms": 1e3 * device.wall_seconds(backends[name, bits].run),
            "ratio_to_bf16": medians[DENSE, 16] / seconds,
            "limit": "bandwidth" if reading > operations / rate else "arithmetic",
            "limit_share": max(reading, operations / rate) / seconds,
            "waits": (waits := device.waits(backends[name, bits].run)),
            "passed": name == DENSE or not waits,
        }


def line(row: dict) -> str:
    if "limits" in row:
        copy, product = row["limits"].values()
        return f"a copy {copy / 1e9:.0f} GB/s, a product {product / 1e12:.1f} TFLOP/s"
    waits = f"  waits: {row['waits']}" if row["waits"] else ""
    return (
        f"{row['shape']:8s} {row['tokens']:5d} tokens ({row['selected_experts']} experts) {row['bits']:2d} bit "
        f"{row['backend']:10s} {row['ms']:8.3f} ms (wall {row['wall_ms']:.3f})  {row['ratio_to_bf16']:5.2f} x bf16  "
        f"{row['limit_share']:4.0%} of {row['limit']}{waits}"
    )
