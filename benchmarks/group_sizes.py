"""Whether smaller groups are a better use of bits than larger widths for some of the weights, at equal true bits.

    python benchmarks/group_sizes.py bundled bundled:fine-moe

GPTQ solves every fourth expert of every second MoE block, on what it reads of the bundled calibration text, with each
width and group size. A group size between two widths at groups of 128 is compared with a mix of these two widths that
takes as many bits: its error, a mean of theirs, is what `--model.target_bits` reaches without smaller groups. Prints,
for each weight and group size, the relative squared output error over that of the mix; below 1 smaller groups are
better.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import torch
from kept_rows import write_rows
from torch import Tensor

from eacmoe_lightning.models.block import Block
from eacmoe_lightning.models.moe import MoEModel
from eacmoe_lightning.models.originals import load_original
from eacmoe_lightning.models.tokenizer import load_tokenizer
from eacmoe_lightning.quantization.gptq import solve
from eacmoe_lightning.quantization.grid import Grid
from eacmoe_lightning.text.documents import read_documents
from eacmoe_lightning.text.windows import token_windows

LARGE, SMALLER = 128, (64, 32)
FEWEST = 256  # tokens of an expert that is solved


def problems(block: Block, x: Tensor, ids: Tensor) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Every fourth expert's weights [O, I] by projection, with the inputs [n, I] that they read."""
    experts = block.experts
    for expert in range(0, experts.num_experts, 4):
        rows = x[(ids == expert).any(-1)]
        if len(rows) >= FEWEST:
            up, down = (experts.weight(projection)[expert] for projection in experts.projections)
            yield experts.up_name, up, rows
            yield "down_proj", down, experts.intermediate(rows, expert)


def errors(weight: Tensor, inputs: Tensor) -> dict[tuple[int, int], float]:
    """Relative squared output errors by bits and group size."""
    hessian = (inputs.T @ inputs).unsqueeze(0) / len(inputs)
    return {
        (bits, size): float(solve(weight.unsqueeze(0), hessian, Grid(bits, size))[1])
        for bits in (2, 3, 4)
        for size in (LARGE, *SMALLER)
        if weight.shape[1] % size == 0
    }


def true_bits(bits: int, size: int) -> float:
    return bits + (16 + bits) / size  # a float16 scale and a zero point in each group


@torch.no_grad()
def measured(name: str, num_windows: int) -> Iterator[dict]:
    """A row for each weight, width and smaller group size, as a mean over experts and blocks."""
    moe = MoEModel(load_original(name))
    windows = token_windows(read_documents("bundled:calibration"), load_tokenizer(name), num_windows, 512, seed=0)
    found: dict[str, list[dict[tuple[int, int], float]]] = defaultdict(list)
    state = None
    for index, block in enumerate(moe.blocks):
        seen: list[tuple[Tensor, Tensor]] = []
        handle = block.watch_experts(lambda x, ids, *_, seen=seen: seen.append((x, ids))) if block.is_moe else None
        state, _ = block.forward(moe.call(index, windows, state))
        if handle is not None:
            handle.remove()
        if block.is_moe and index % 2 == 0:
            for projection, weight, inputs in problems(block, *seen[0]):
                found[projection].append(errors(weight, inputs))
    for projection, results in found.items():
        mean = {key: sum(result[key] for result in results) / len(results) for key in results[0]}
        for bits, size in ((bits, size) for bits in (2, 3) for size in SMALLER):
            low, high = true_bits(bits, LARGE), true_bits(bits + 1, LARGE)
            share = (true_bits(bits, size) - low) / (high - low)
            mix = (1 - share) * mean[bits, LARGE] + share * mean[bits + 1, LARGE]
            yield {
                "model": name,
                "weight": projection,
                "bits": bits,
                "group_size": size,
                "true_bits": round(true_bits(bits, size), 3),
                "error": round(mean[bits, size], 5),
                "over_mix": round(mean[bits, size] / mix, 3),
            }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", help="originals, as --model.name_or_path takes them")
    parser.add_argument("--windows", type=int, default=48, help="of 512 tokens")
    parser.add_argument("--json", type=Path, help="file for the rows")
    arguments = parser.parse_args()
    rows = []
    for model in arguments.models:
        for row in measured(model, arguments.windows):
            rows.append(row)
            print(*(f"{key} {value}" for key, value in row.items()), sep="  ", flush=True)
    write_rows(arguments.json, rows)
