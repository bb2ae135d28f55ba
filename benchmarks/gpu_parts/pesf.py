"""Prefill with PESF beside none, of one-layer models of real shapes, by `benchmarks/pesf.py`.

Tokens come in topics and experts are wanted like Zipf's law, with the exponents that skip about as much as in the
bundled model. The paper's speed-ups are of whole models on other cards: something to be near, not a bound.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import pesf
import torch

from gpu_parts import shapes
from gpu_parts.device import Device, choose_kernels

ZIPF = {"qwen1.5": pesf.ZIPF["qwen1.5-moe"], "mixtral": pesf.ZIPF["mixtral"]}
BITS, ROUNDS = 3, 20
PAPER = {0.3: "1.08 to 1.14", 0.7: "1.13 to 1.47"}  # over the same model without
PAPER_WITH_QESC = "1.55 to 1.75"  # QESC at 3 bit and PESF at 0.3 over bf16, 4x512 tokens
MINIATURE = {"1x8": (1, 8), "4x8": (4, 8)}


@torch.inference_mode()
def rows(options: argparse.Namespace, device: Device) -> Iterator[dict]:
    work = MINIATURE if device.is_miniature else pesf.WORK
    pesf.WORK |= work
    args = argparse.Namespace(work=list(work), rounds=ROUNDS if device.is_cuda else 1, clock="wall")
    for shape, zipf in list(ZIPF.items())[: 1 if device.is_miniature else None]:
        dense = shapes.dense(device, shapes.config(device, shape))
        packed = shapes.packed(device, dense, BITS)
        draw = pesf.give_topics(dense, zipf)
        pesf.give_topics(packed, zipf)
        for kernel in choose_kernels("humming" if device.is_cuda else "triton"):
            choose_kernels(kernel)
            backends = {"bf16": dense, f"{kernel} {BITS} bit": packed}
            for row in pesf.prefill(shape, backends, draw, args):
                yield row | {"speedup": 1 / row["time"]}
        del dense, packed


def line(row: dict) -> str:
    said = f", the paper {PAPER[row['alpha']]}" if row["alpha"] else ""
    over = row["speedup_over_full_precision"]
    whole = f", the paper {PAPER_WITH_QESC}" if row["alpha"] == 0.3 and row["work"][0] == "4" else ""
    return (
        f"{row['model']:8s} {row['work']:6s} {row['backend']:14s} alpha {row['alpha']:.1f} "
        f"{1e3 * row['median_s']:8.3f} ms  {row['speedup']:5.2f} x none (arithmetic {1 / row['limit']:.2f}{said})  "
        f"{over:5.2f} x bf16{'' if row['backend'] == 'bf16' else whole}  dropped {row['pairs_dropped']:.1%}"
    )
