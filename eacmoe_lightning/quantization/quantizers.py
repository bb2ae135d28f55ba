"""The seam for quantizers: what one needs to know of a weight's inputs, how it solves, and what that costs.

    gptq     groups with a scale and a zero point, GPTQ and what follows it (`gptq.py`)
    rtn      the same grid, rounded to nearest: the baseline
    lattice  one step per matrix and codes at their entropy (`lattice.py`)

Another one is a subclass of `Quantizer`, named by its class path: `--model.quantizer my_module.MyQuantizer`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from eacmoe_lightning.configurable import Configurable
from eacmoe_lightning.quantization import gptq, lattice
from eacmoe_lightning.quantization.grid import SCALE_FACTORS, ZERO_OFFSETS, Grid, Quantized, round_to_nearest
from eacmoe_lightning.quantization.lattice import Lattice

QuantizedWeight = Quantized | Lattice
LOOP_RATE = 0.73  # of the column loop's search, as a share of a matrix product's
RANGE_BYTES = 200  # that searching the range of a group moves through caches, for each weight
LATTICE_LOOPS = 3  # column loops until the rate is met, of at most `lattice.RATE_TRIES`


@dataclass(frozen=True)
class Arithmetic:
    """What solving one matrix takes: `flops` in float32, and `loop_bytes` of memory that no matrix product touches."""

    flops: float = 0.0
    loop_bytes: float = 0.0


class Quantizer(Configurable, ABC):
    """Turns stacks of weights into integer codes.

    Attributes:
        needs: what `solve` is given of a weight's inputs: their `hessian`, the `inputs` themselves, or `nothing`.
            Inputs stay in the process that computed them, so a quantizer that needs them runs in one process.
        result: what it makes of a weight.
        any_rate: whether bits may be any number, not whole ones only.
    """

    needs: Literal["hessian", "inputs", "nothing"] = "hessian"
    result: type[QuantizedWeight] = Quantized
    any_rate: bool = False

    @abstractmethod
    def solve(
        self, weight: Tensor, statistics: Tensor | list[Tensor] | None, grid: Grid
    ) -> tuple[QuantizedWeight, Tensor]:
        """Codes of a stack of weights, and their relative squared output error [S] (of the weight, if nothing is known
        of its inputs).

        Args:
            weight: [S, O, I], any float dtype; not to be changed.
            statistics: Hessians [S, I, I] float32 on and below the diagonal too; or S tensors of inputs [n, I]; or
                None, as `needs` says.
            grid: bits, group size and symmetry.
        """

    def arithmetic(self, rows: int, columns: int, grid: Grid) -> Arithmetic:
        """What one matrix [rows, columns] takes, for `plan`."""
        return Arithmetic()

    def working_bytes(self, num: int, rows: int, columns: int, device: torch.device) -> int:
        """Memory that a stack of `num` matrices takes at most, beside weights and statistics."""
        return 4 * num * 3 * rows * columns


class GPTQ(Quantizer):
    """GPTQ on the group-wise grid; arguments as of `gptq.solve`."""

    def __init__(
        self, damping: float = 0.05, act_order: bool = True, scale_search: bool = True, refine: int = 1
    ) -> None:
        self.damping, self.act_order, self.scale_search, self.refine = damping, act_order, scale_search, refine

    def solve(self, weight: Tensor, statistics: Tensor, grid: Grid) -> tuple[Quantized, Tensor]:
        return gptq.solve(weight, statistics, grid, self.damping, self.act_order, self.scale_search, self.refine)

    def arithmetic(self, rows: int, columns: int, grid: Grid) -> Arithmetic:
        """The factor; lazy updates, the weight's own loss, gradients and sweeps; the products and loops within groups.
        Each column spreads its error over half a group, read and written; ranges are searched."""
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
    """The baseline without error compensation; the Hessian only measures the error."""

    def solve(self, weight: Tensor, statistics: Tensor, grid: Grid) -> tuple[Quantized, Tensor]:
        rounded = round_to_nearest(weight, grid)
        return rounded, gptq.output_error(weight, rounded, statistics)

    def arithmetic(self, rows: int, columns: int, grid: Grid) -> Arithmetic:
        """Two products with the Hessian, and the search of ranges."""
        return Arithmetic(4 * rows * columns**2, rows * columns * RANGE_BYTES * grid.clip_search)


class LatticeGPTQ(Quantizer):
    """GPTQ on a lattice; arguments as of `lattice.solve`. Bits are stored bits, all included."""

    result, any_rate = Lattice, True

    def __init__(self, damping: float = 0.05, act_order: bool = True) -> None:
        self.damping, self.act_order = damping, act_order

    def solve(self, weight: Tensor, statistics: Tensor, grid: Grid) -> tuple[Lattice, Tensor]:
        return lattice.solve(weight, statistics, grid.bits, self.damping, self.act_order)

    def arithmetic(self, rows: int, columns: int, grid: Grid) -> Arithmetic:
        """The factor, its products with what is left of each chunk in every loop, and the error."""
        flops = columns**3 / 3 + (LATTICE_LOOPS + 4) * rows * columns**2
        return Arithmetic(flops, LATTICE_LOOPS * rows * columns * 8 * lattice.CHUNK)

    def working_bytes(self, num: int, rows: int, columns: int, device: torch.device) -> int:
        return 4 * num * (3 * columns * columns + 6 * rows * columns)
