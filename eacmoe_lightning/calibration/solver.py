"""Quantizes the weights of one block from the inputs that they see: Hessians, GPTQ, and codes in the weights' place.

Linears that read the same tensor share a Hessian. The experts of a block are solved as one stack: each expert's
Hessian is made of the tokens that the calibrated router sends it; the down projection sees what the already quantized
up projection produces. With several processes, Hessians are summed and the experts divided: evenly, for solving costs
the same for all experts of a block, whatever their bits and tokens.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor

from eacmoe_lightning.calibration.recipe import Recipe
from eacmoe_lightning.models.block import Block, Routing
from eacmoe_lightning.quantization.gptq import CACHED, output_error, solve, working_bytes
from eacmoe_lightning.quantization.gram import add_gram, gram, mirror, tokens_by_expert
from eacmoe_lightning.quantization.grid import Grid, Quantized, one_or_each, round_to_nearest
from eacmoe_lightning.routers.expert_shift import expert_load
from eacmoe_lightning.run.ranks import Ranks

log = logging.getLogger(__name__)


class BlockSolver:
    """Solves one block, part by part.

    Attributes:
        solved: codes by parameter name.
        error: relative squared output error by parameter name (experts: the mean).
        starved: experts that fewer than `min_expert_tokens` tokens reached.
    """

    def __init__(self, block: Block, num_blocks: int, recipe: Recipe, ranks: Ranks) -> None:
        self.block, self.num_blocks, self.recipe, self.ranks = block, num_blocks, recipe, ranks
        self.solved: dict[str, Quantized] = {}
        self.error: dict[str, float] = {}
        self.starved: list[int] = []

    def _grid(self, part: str) -> Grid:
        return self.recipe.grid(self.block.index, self.num_blocks, part)

    def _solve(self, weight: Tensor, hessian: Tensor, grid: Grid) -> tuple[Quantized, Tensor]:
        """Codes, and their relative squared output error [...]."""
        recipe = self.recipe
        if recipe.quantizer == "rtn":
            rounded = round_to_nearest(weight, grid)
            return rounded, output_error(weight, rounded, hessian)
        return solve(weight, hessian, grid, recipe.damping, recipe.act_order, recipe.scale_search, recipe.refine)

    # --- linears: attention, shared experts, dense feed-forwards --------------------------------------

    def solve_linears(self, names: list[str], inputs: Iterable[Tensor]) -> None:
        """Quantizes linears of the block that share their input.

        Args:
            names: of the linears, in the layer.
            inputs: [n, I] pieces of what they read, this process's tokens.
        """
        hessian = self._hessian(inputs)
        for name in names:
            parameter = f"{self.block.name}.{name}.weight"
            part, weight = self.block.weights()[parameter]
            quantized, error = self._solve(weight, hessian, self._grid(part))
            self.error[parameter], self.solved[parameter] = float(error), quantized
            weight.copy_(quantized.dequantize(weight.dtype))

    def _hessian(self, inputs: Iterable[Tensor]) -> Tensor:
        """2/n sum x x^T over all processes, [I, I] float32."""
        total, tokens = None, torch.zeros((), dtype=torch.int64)
        for x in inputs:
            x = x.float()
            total = add_gram(x.new_zeros(x.shape[1], x.shape[1]) if total is None else total, x)
            tokens += len(x)
        return mirror(self.ranks.sum(total)).mul_(2 / int(self.ranks.sum(tokens)))

    # --- routed experts ----------------------------------------------------------------------------------

    def solve_experts(self, x: Tensor, routing: Routing) -> None:
        """Quantizes both projections of every expert, as many experts at a time as their Hessians allow.

        Args:
            x: [N, D] the inputs of router and experts, this process's tokens, in host memory.
            routing: what the calibrated router says of them, in host memory.
        """
        experts, num_experts = self.block.experts, self.block.num_experts
        index, num_blocks = self.block.index, self.num_blocks
        numbers = self.block.expert_numbers
        bits = {p: self.recipe.expert_bits(index, num_blocks, p, numbers) for p in experts.projections}
        tokens, weights = self._tokens(routing)
        parts: dict[str, list[Quantized]] = {p: [] for p in experts.projections}
        errors: dict[str, list[float]] = {p: [] for p in experts.projections}
        chunk = self._experts_together()
        for start in range(0, num_experts, chunk):
            chosen = slice(start, min(start + chunk, num_experts))
            for projection in experts.projections:
                weight = experts.weight(projection)[chosen]
                hessian = weight.new_empty(len(weight), weight.shape[-1], weight.shape[-1], dtype=torch.float32)
                for i, e in enumerate(range(chosen.start, chosen.stop)):
                    rows = x[tokens[e]].to(weight.device)
                    rows = (rows if projection == experts.up_name else experts.intermediate(rows, e)).float()
                    hessian[i] = gram(rows, None if weights is None else weights[e].to(weight.device))
                self.ranks.sum(hessian)
                quantized, error = self._solve_stack(weight, hessian, bits[projection][chosen])
                parts[projection].append(quantized)
                errors[projection] += error.tolist()
                weight.copy_(quantized.dequantize(weight.dtype))
        for projection, stack in parts.items():
            name = f"{self.block.name}.{self.block.experts_name}.{projection}"
            fields = (torch.cat([getattr(q, f) for q in stack]) for f in ("codes", "scale", "zero_point"))
            self.solved[name] = Quantized(*fields, bits=one_or_each(bits[projection]))
            self.error[name] = sum(errors[projection]) / len(errors[projection])

    def _experts_together(self) -> int:
        """How many experts are solved at a time: a stack in each process, of as many as `solver_gib` and a CPU's caches
        hold, and of at least one."""
        projections, world = self.block.experts.projections, self.ranks.world
        weight = self.block.experts.weight(projections[0])
        shapes = [self.block.experts.weight(p).shape[-2:] for p in projections]
        together = experts_together(shapes, self.block.num_experts, self.recipe.solver_gib, world, weight.device)
        log.info(
            "%s: %d experts, %d at a time in %.2f GiB (--model.solver_gib %g)",
            *(self.block.name, self.block.num_experts, together),
            *(stack_bytes(shapes, together, world, weight.device) / 2**30, self.recipe.solver_gib),
        )
        return together

    def _solve_stack(self, weight: Tensor, hessian: Tensor, bits: tuple[int, ...]) -> tuple[Quantized, Tensor]:
        """Experts [S, O, I] with bits of their own, those of one width as one problem, divided among the processes and
        shared; and their errors [S]."""
        grid, num, world = self._grid("experts"), len(weight), self.ranks.world
        groups = weight.shape[-1] // grid.group_size
        codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
        scale = torch.empty((*weight.shape[:-1], groups), dtype=torch.float16, device=weight.device)
        zero = torch.empty((*weight.shape[:-1], groups), dtype=torch.uint8, device=weight.device)
        error = torch.empty(num, device=weight.device)
        by_width = sorted(range(num), key=lambda i: bits[i])
        shares = [by_width[num * r // world : num * (r + 1) // world] for r in range(world)]
        for width in sorted({bits[i] for i in shares[self.ranks.rank]}):
            own = [i for i in shares[self.ranks.rank] if bits[i] == width]
            own = slice(None) if len(own) == num else own  # no copies of what may be large
            solved, error[own] = self._solve(weight[own], hessian[own], replace(grid, bits=width))
            codes[own], scale[own], zero[own] = solved.codes, solved.scale, solved.zero_point
        for rank, share in enumerate(shares if world > 1 else ()):
            for tensor in (codes, scale, zero, error) if share else ():
                tensor[share] = self.ranks.broadcast(tensor[share], rank)
        return Quantized(codes, scale, zero, one_or_each(bits)), error

    def _tokens(self, routing: Routing) -> tuple[list[Tensor], list[Tensor] | None]:
        """For each expert the tokens [n] that its Hessians are made of, and with `affinity` their weights [n].

        They are those that the router sends it. An expert with fewer than `min_expert_tokens` (over all
        processes) is starved: it borrows the other tokens that the router scores highest for it.
        """
        num_experts, wanted = self.block.num_experts, self.recipe.min_expert_tokens
        load = self.ranks.sum(expert_load(routing.ids, num_experts)).tolist()
        self.starved = [e for e in range(num_experts) if load[e] < wanted]
        tokens = tokens_by_expert(routing.ids, num_experts)
        for e in self.starved:
            score = routing.logits[:, e].index_fill(0, tokens[e], -torch.inf)
            borrowed = self._borrowed(score, wanted - load[e]).nonzero().squeeze(1)
            tokens[e] = torch.cat([tokens[e], borrowed]).sort().values
        if not self.recipe.affinity:
            return tokens, None
        probabilities = routing.logits.softmax(-1)
        return tokens, [probabilities[index, e].square() for e, index in enumerate(tokens)]

    def _borrowed(self, score: Tensor, num: int) -> Tensor:
        """[N] mask of the `num` highest scores over all processes (all finite ones where there are fewer)."""
        best = score.new_full((num,), -torch.inf)
        top = score.topk(min(num, len(score))).values
        best[: len(top)] = top
        threshold = torch.cat(self.ranks.gather(best)).topk(num).values[-1]
        return (score >= threshold) & score.isfinite()


def stack_bytes(shapes: list[tuple[int, int]], together: int, world: int, device: torch.device) -> int:
    """Memory of one process while `together` experts, whose projections have these shapes (O, I), are solved by `world`
    processes: the Hessians of all, and the work on its share."""
    share = -(-together // world)
    return max(together * 4 * columns**2 + working_bytes(share, rows, columns, device) for rows, columns in shapes)


def experts_together(
    shapes: list[tuple[int, int]], num_experts: int, gib: float, world: int, device: torch.device
) -> int:
    """How many experts are solved at a time by `world` processes: as many in each as `gib` (and on a CPU its caches)
    hold, and at least one."""
    most = -(-num_experts // world)
    if device.type == "cpu":
        most = min(most, CACHED // max(4 * rows * columns for rows, columns in shapes))
    held = (n for n in range(most, 1, -1) if stack_bytes(shapes, n * world, world, device) <= gib * 2**30)
    return min(num_experts, next(held, 1) * world)
