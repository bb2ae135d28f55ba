"""The interface of quantizers: which statistics of a weight's inputs they need, how they solve, and what that costs.

    gptq     the group-wise grid, solved by GPTQ with refinement (`gptq.py`)
    rtn      the same grid, rounded to nearest: the baseline
    lattice  one step per matrix, codes stored at their entropy (`lattice.py`)
    kquant   llama.cpp's blocks (`kquant.py`), solved by GPTQ with refinement (`kquant_gptq.py`)

To add one, subclass `Quantizer` and pass its class path: `--model.quantizer my_module.MyQuantizer`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from eacmoe_lightning.configurable import Configurable
from eacmoe_lightning.quantization import gptq, kquant_gptq, lattice
from eacmoe_lightning.quantization.grid import SCALE_FACTORS, ZERO_OFFSETS, Grid, Quantized, round_to_nearest
from eacmoe_lightning.quantization.kquant import BITS, SUPER, KQuant, type_of
from eacmoe_lightning.quantization.lattice import Lattice

QuantizedWeight = Quantized | Lattice | KQuant
LOOP_RATE = 0.73  # flop rate of the column loop, as a share of a matrix product's
RANGE_BYTES = 200  # cache traffic of the range search per weight
LATTICE_LOOPS = 3  # typical number of column loops until the rate is met, at most `lattice.RATE_TRIES`


@dataclass(frozen=True)
class Arithmetic:
    """The arithmetic of solving one matrix: `flops` in float32, and `loop_bytes` of memory traffic outside of matrix
    products."""

    flops: float = 0.0
    loop_bytes: float = 0.0


class Quantizer(Configurable, ABC):
    """Turns stacks of weights into integer codes.

    Attributes:
        needs: the statistics of a weight's inputs that `solve` gets: their `hessian`, the `inputs` themselves, or
            `nothing`. Inputs stay in the process that computed them, so a quantizer that needs them requires a run
            with one process.
        result: the type of the quantized weight.
        widths: the bits that it can be asked for.
        any_rate: whether bits may be fractional, from 1 to 8, instead.
    """

    needs: Literal["hessian", "inputs", "nothing"] = "hessian"
    result: type[QuantizedWeight] = Quantized
    widths: tuple[int, ...] = (2, 3, 4, 5, 6, 7, 8)
    any_rate: bool = False

    @abstractmethod
    def solve(
        self, weight: Tensor, statistics: Tensor | list[Tensor] | None, grid: Grid
    ) -> tuple[QuantizedWeight, Tensor]:
        """Quantizes a stack of weights.

        Args:
            weight: [S, O, I], any float dtype; must not be changed.
            statistics: as `needs` says: full symmetric Hessians [S, I, I] float32, S tensors of inputs [n, I], or None.
            grid: bits, group size and symmetry.

        Returns:
            The quantized stack, and its relative squared output errors [S]; a quantizer that needs nothing returns the
            relative squared errors of the weights.
        """

    def arithmetic(self, rows: int, columns: int, grid: Grid) -> Arithmetic:
        """The arithmetic of solving one matrix [rows, columns], from which `plan` predicts times."""
        return Arithmetic()

    def working_bytes(self, num: int, rows: int, columns: int, device: torch.device) -> int:
        """Peak memory of solving a stack of `num` matrices, in addition to weights and statistics."""
        return 4 * num * 3 * rows * columns


class GPTQ(Quantizer):
    """GPTQ on the group-wise grid; for the arguments see `gptq.solve`."""

    def __init__(
        self, damping: float = gptq.DAMPING, act_order: bool = True, scale_search: bool = True, refine: int = 1
    ) -> None:
        self.damping, self.act_order, self.scale_search, self.refine = damping, act_order, scale_search, refine

    def solve(self, weight: Tensor, statistics: Tensor, grid: Grid) -> tuple[Quantized, Tensor]:
        return gptq.solve(weight, statistics, grid, self.damping, self.act_order, self.scale_search, self.refine)

    def arithmetic(self, rows: int, columns: int, grid: Grid) -> Arithmetic:
        """Flops of the factoring, of lazy updates, loss, gradients and sweeps, and of products and loops within
        groups. Bytes of the column loop, where each column updates half a group on average, and of the range search.
        """
        inner = rows * columns * grid.group_size
        flops = columns**3 / 3 + (1 + self.refine) * 2 * rows * columns**2
        flops += self.refine * ((gptq.TURNS + 1) * 2 + gptq.TURNS / LOOP_RATE) * inner
        if self.scale_search:
            candidates = len(SCALE_FACTORS) * (1 if grid.symmetric else len(ZERO_OFFSETS))
            flops += candidates * inner / LOOP_RATE
        return Arithmetic(flops, rows * columns * (4 * grid.group_size + RANGE_BYTES * grid.clip_search))

    def working_bytes(self, num: int, rows: int, columns: int, device: torch.device) -> int:
        return gptq.working_bytes(num, rows, columns, device)


class RoundToNearest(Quantizer):
    """The baseline without error compensation; the Hessian serves only to measure the error."""

    def solve(self, weight: Tensor, statistics: Tensor, grid: Grid) -> tuple[Quantized, Tensor]:
        rounded = round_to_nearest(weight, grid)
        return rounded, gptq.output_error(weight, rounded, statistics)

    def arithmetic(self, rows: int, columns: int, grid: Grid) -> Arithmetic:
        """Two products with the Hessian, and the range search."""
        return Arithmetic(4 * rows * columns**2, rows * columns * RANGE_BYTES * grid.clip_search)


class LatticeGPTQ(Quantizer):
    """GPTQ on a lattice; for the arguments see `lattice.solve`. Bits are stored bits, including steps and tables."""

    result, any_rate = Lattice, True

    def __init__(self, damping: float = gptq.DAMPING, act_order: bool = True) -> None:
        self.damping, self.act_order = damping, act_order

    def solve(self, weight: Tensor, statistics: Tensor, grid: Grid) -> tuple[Lattice, Tensor]:
        return lattice.solve(weight, statistics, grid.bits, self.damping, self.act_order)

    def arithmetic(self, rows: int, columns: int, grid: Grid) -> Arithmetic:
        """The factoring, the lazy updates of every column loop, the loops themselves, and the output error."""
        flops = columns**3 / 3 + (LATTICE_LOOPS + 4) * rows * columns**2
        return Arithmetic(flops, LATTICE_LOOPS * rows * columns * 8 * lattice.CHUNK)

    def working_bytes(self, num: int, rows: int, columns: int, device: torch.device) -> int:
        return 4 * num * (3 * columns * columns + 6 * rows * columns)


class KQuantGPTQ(GPTQ):
    """GPTQ on llama.cpp's blocks; for the arguments see `kquant_gptq.solve`. The group size follows from the bits."""

    result, widths = KQuant, BITS

    def solve(self, weight: Tensor, statistics: Tensor, grid: Grid) -> tuple[KQuant, Tensor]:
        kind = type_of(grid.bits, weight.shape[-1])
        options = self.damping, self.act_order, self.scale_search, self.refine
        return kquant_gptq.solve(weight, statistics, kind, *options)

    def arithmetic(self, rows: int, columns: int, grid: Grid) -> Arithmetic:
        """As GPTQ on groups, with the products within blocks besides."""
        kind = type_of(grid.bits, columns)
        own = super().arithmetic(rows, columns, kind.grid)
        within = (1 + 3 * self.refine) * 2 * rows * columns * kind.block if kind.is_super else 0
        return Arithmetic(own.flops + within, own.loop_bytes)

    def working_bytes(self, num: int, rows: int, columns: int, device: torch.device) -> int:
        blocks = 4 * num * min(rows, gptq.rows_together(num, columns, device)) * 6 * SUPER
        return super().working_bytes(num, rows, columns, device) + blocks
