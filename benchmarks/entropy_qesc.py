"""Group-wise GPTQ against GPTQ on a lattice with entropy coding, at equal stored size: held-out perplexity.

    python benchmarks/entropy_qesc.py --bits 2 3 --json FILE

Only experts are quantized (attention and routers stay in full precision), block by block, on the outputs of the
compressed blocks before. The group-wise grid (groups of 128, range search) sets the size: its codes, scales and zero
points are entropy-coded like those in the store of offloaded experts. The other methods get as many bits per weight,
including their steps:

    one step        one step for each matrix
    column steps    one step for each column, proportional to p_j^-1/2 (`eacmoe_lightning/quantization/lattice.py`)
    shared budget   column steps with one factor for all experts of a block, so that bits go where tokens go
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoTokenizer

from eacmoe_lightning.calibration.recipe import Recipe
from eacmoe_lightning.calibration.solver import BlockSolver
from eacmoe_lightning.models.moe import MoEModel
from eacmoe_lightning.models.originals import load_original, local_directory
from eacmoe_lightning.quantization.gptq import output_error
from eacmoe_lightning.quantization.grid import Quantized
from eacmoe_lightning.quantization.lattice import (
    Lattice,
    column_steps,
    entropy,
    factored,
    gptq_on_lattice,
    step_for_bits,
)
from eacmoe_lightning.run.ranks import Ranks
from eacmoe_lightning.study.measure import Measurement, Text
from eacmoe_lightning.text.sources import heldout_names, read_documents
from eacmoe_lightning.text.windows import token_windows

GROUP = 128
METHODS = ("group-wise", "one step", "column steps", "shared budget")


@dataclass
class Solved:
    """The lattice codes of a stack of experts, with the attributes that `BlockSolver` needs."""

    lattice: Lattice
    codes: Tensor
    scale: Tensor
    zero_point: Tensor

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.lattice.dequantize(dtype)


class LatticeSolver(BlockSolver):
    """Solves experts on a lattice with given bits per weight.

    Attributes:
        method: one of METHODS except the first.
        target: wanted bits per weight of each projection in this block, including everything that is stored.
        stored: bits per weight that were reached.
    """

    def __init__(self, block, num_blocks: int, recipe: Recipe, method: str, target: list[float]) -> None:
        super().__init__(block, num_blocks, recipe, Ranks())
        self.method, self.target, self.stored = method, target, []

    def _experts_together(self) -> int:
        return self.block.num_experts  # all experts share the bits

    def _solve_stack(self, weight: Tensor, hessian: Tensor, bits: tuple[int, ...]) -> tuple[Solved, Tensor]:
        target_bits = self.target[len(self.stored)]
        factor, pivot = factored(hessian, self.recipe.damping)
        is_shared = self.method == "shared budget"
        shape = pivot.rsqrt() if is_shared else column_steps(pivot)
        if self.method == "one step":
            shape = torch.ones_like(shape)
        overhead = 16 / weight.shape[-2] if self.method != "one step" else 16 / weight[0].numel()
        step, correction = step_for_bits(weight, shape, target_bits - overhead, is_shared), 0.0
        for _ in range(3):  # error compensation makes codes a little larger than those rounded to nearest
            lattice = gptq_on_lattice(weight, factor, shape * step * 2**correction)
            stored_bits = entropy(lattice.codes).mean().item() + overhead
            if stored_bits <= target_bits:
                break
            correction += (stored_bits - target_bits) * 1.05 + 1e-3
        self.stored.append(stored_bits)
        no_zero_point = torch.zeros(len(weight), dtype=torch.uint8)
        solved = Solved(lattice, lattice.codes, lattice.step, no_zero_point)
        return solved, output_error(weight, solved, hessian)


class GroupwiseSolver(BlockSolver):
    """The ordinary solver; it also records the bits per weight of its entropy-coded codes."""

    def __init__(self, block, num_blocks: int, recipe: Recipe) -> None:
        super().__init__(block, num_blocks, recipe, Ranks())
        self.stored: list[float] = []

    def _experts_together(self) -> int:
        return self.block.num_experts

    def _solve_stack(self, weight: Tensor, hessian: Tensor, bits: tuple[int, ...]) -> tuple[Quantized, Tensor]:
        solved, error = super()._solve_stack(weight, hessian, bits)
        self.stored.append(sum(entropy_coded_bits(solved)))
        return solved, error


def entropy_coded_bits(solved: Quantized) -> tuple[float, float, float]:
    """Bits per weight of codes (given their zero points), scales (16 bits each) and zero points; means over experts."""
    zero = solved.zero_point[..., None].expand(*solved.zero_point.shape, solved.group_size).reshape(solved.codes.shape)
    conditional = 0.0
    for codes, zeros in zip(solved.codes, zero, strict=True):
        for value in zeros.unique():
            selected = codes[zeros == value]
            conditional += entropy(selected[None]).item() * selected.numel() / codes.numel() / len(solved.codes)
    zeros = entropy(solved.zero_point).mean().item() / solved.group_size
    return conditional, 16 / solved.group_size, zeros


@torch.no_grad()
def quantize(moe: MoEModel, windows: Tensor, batch_size: int, solver_of) -> list[BlockSolver]:
    """Quantizes the experts of all blocks in place. `solver_of` returns the solver of a block."""
    batches, hidden, kwargs = windows.split(batch_size), [], []
    for batch in batches:
        h, k = moe.embed(batch)
        hidden.append(h)
        kwargs.append(k)
    solvers = []
    for block in moe.blocks:
        i = block.index
        if block.is_moe:
            x = torch.cat([block.input_of(block.router, h, k[i]) for h, k in zip(hidden, kwargs, strict=True)])
            solver = solver_of(block)
            solver.solve_experts(x, block.route(x))
            solvers.append(solver)
        hidden = [block.forward(h, k[i])[0] for h, k in zip(hidden, kwargs, strict=True)]
    return solvers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="bundled")
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 3])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--num_windows", type=int, default=128, help="windows of the bundled calibration text")
    parser.add_argument("--window_length", type=int, default=512)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--num_heldout_windows", type=int, default=16, help="windows of each held-out text")
    parser.add_argument("--seed", type=int, default=0, help="seed of the choice of calibration windows")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(local_directory(options.model))
    length = options.window_length
    calibration = token_windows(
        read_documents("bundled:calibration"), tokenizer, options.num_windows, length, options.seed
    )
    texts = {
        name: Text(token_windows(read_documents(f"bundled:{name}"), tokenizer, options.num_heldout_windows, length))
        for name in heldout_names()
    }
    moe = MoEModel(load_original(options.model, "float32"))
    original = {name: parameter.clone() for name, parameter in moe.model.named_parameters()}
    measurement = Measurement(moe, texts)
    baseline, rows = measurement.baseline["nats"], []
    for bits in options.bits:
        recipe, target = Recipe(bits=(bits,), group_size=GROUP), {}
        for method in dict.fromkeys(["group-wise", *options.methods]):  # group-wise sets the size
            moe.put(original)

            def solver_of(block, method=method, recipe=recipe, target=target):
                if method == "group-wise":
                    return GroupwiseSolver(block, len(moe.blocks), recipe)
                return LatticeSolver(block, len(moe.blocks), recipe, method, target[block.index])

            solvers = quantize(moe, calibration, options.batch_size, solver_of)
            if method == "group-wise":
                target.update({solver.block.index: solver.stored for solver in solvers})
            nats = measurement.measure()["nats"]
            stored = [
                (sum(b * w for b, w in zip(s.stored, sizes, strict=True)) / sum(sizes))
                for s in solvers
                for sizes in [[s.block.experts.weight(p)[0].numel() for p in s.block.experts.projections]]
            ]
            row = {"bits": bits, "method": method, "stored_bits": sum(stored) / len(stored)}
            if method == "group-wise":
                row["plain_bits"] = bits + 24 / GROUP
            row["lost"] = {name: nats[name] - baseline[name] for name in nats}
            row["mean_lost"] = sum(row["lost"].values()) / len(nats)
            row["error"] = sum(sum(s.error.values()) / len(s.error) for s in solvers) / len(solvers)
            rows.append(row)
            print(
                f"{bits} bit {method:14s} {row['stored_bits']:.4f} bits stored, {row['mean_lost']:+.4f} nats lost, "
                f"relative output error {row['error']:.4f}",
                flush=True,
            )
    if options.json:
        options.json.write_text(json.dumps({"options": vars(options) | {"json": None}, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
