"""Quantizes the weights of one block from their inputs, and replaces each weight with what its codes decode to.

Linears that read the same tensor share a Hessian. The experts of a block are solved as a stack. Each expert's Hessian
is the sum over the tokens that the calibrated router sends it; the Hessian of the down projection is computed from the
output of the already quantized up projection. With several processes, Hessians are summed over all of them and the
experts are divided evenly: all experts of a block cost the same to solve, whatever their bits and tokens.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from eacmoe_lightning.calibration.recipe import Recipe
from eacmoe_lightning.models.block import Block
from eacmoe_lightning.models.routing import Routing
from eacmoe_lightning.quantization.gptq import CACHED
from eacmoe_lightning.quantization.gram import add_gram, mirror, tokens_by_expert
from eacmoe_lightning.quantization.grid import Bits, Grid, Quantized, one_or_each
from eacmoe_lightning.quantization.quantizers import QuantizedWeight, Quantizer
from eacmoe_lightning.routers.expert_shift import expert_load
from eacmoe_lightning.run.ranks import Ranks

log = logging.getLogger(__name__)
ROWS_BYTES = 1 << 28  # of the widest activation of an expert's tokens that are in memory at a time


class BlockSolver:
    """Solves one block, part by part.

    Attributes:
        solved: quantized weights by parameter name.
        error: relative squared output error by parameter name (experts: the mean).
        starved: experts that fewer than `min_expert_tokens` tokens reached.
    """

    def __init__(self, block: Block, num_blocks: int, recipe: Recipe, ranks: Ranks) -> None:
        self.block, self.num_blocks, self.recipe, self.ranks = block, num_blocks, recipe, ranks
        self.quantizer = recipe.solver
        self.solved: dict[str, QuantizedWeight] = {}
        self.error: dict[str, float] = {}
        self.starved: list[int] = []

    def _grid(self, part: str) -> Grid:
        return self.recipe.grid(self.block.index, self.num_blocks, part)

    # --- linears: attention, shared experts, dense feed-forwards --------------------------------------

    def solve_linears(self, names: list[str], inputs: Iterable[Tensor]) -> None:
        """Quantizes linears of the block that share their input.

        Args:
            names: the linears' names within the block.
            inputs: their input in pieces [n, I], this process's tokens.
        """
        statistics = self._statistics_of(inputs)
        for name in names:
            parameter = f"{self.block.name}.{name}.weight"
            part, weight = self.block.weights()[parameter]
            stack, error = self.quantizer.solve(weight[None], statistics, self._grid(part))
            quantized = replace(stack, **{f: getattr(stack, f)[0] for f in stack.FIELDS})
            self.error[parameter], self.solved[parameter] = float(error), quantized
            weight.copy_(quantized.dequantize(weight.dtype))

    def _statistics_of(self, inputs: Iterable[Tensor]) -> Tensor | list[Tensor] | None:
        """The statistics of one linear's inputs that the quantizer needs (`Quantizer.needs`), as a stack of one."""
        match self.quantizer.needs:
            case "hessian":
                return self._hessian(inputs)[None]
            case "inputs":
                return [torch.cat([x.float() for x in inputs])]
        return None

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
        """Quantizes both projections of every expert, as many experts at a time as memory allows.

        Args:
            x: [N, D] the inputs of router and experts, this process's tokens, in host memory.
            routing: the calibrated router's output on x, in host memory.
        """
        experts, num_experts = self.block.experts, self.block.num_experts
        index, num_blocks = self.block.index, self.num_blocks
        numbers = self.block.expert_numbers
        bits = {p: self.recipe.expert_bits(index, num_blocks, p, numbers) for p in experts.projections}
        tokens, weights = self._tokens(routing)
        parts: dict[str, list[QuantizedWeight]] = {p: [] for p in experts.projections}
        errors: dict[str, list[float]] = {p: [] for p in experts.projections}
        chunk, at_once = self._experts_together(), tokens_at_once(experts.shapes)
        for start in range(0, num_experts, chunk):
            chosen = slice(start, min(start + chunk, num_experts))
            for projection in experts.projections:
                weight = experts.weight(projection)[chosen]

                def rows_of(
                    e: int, projection: str = projection, device: torch.device = weight.device
                ) -> Iterator[tuple[Tensor, Tensor | None]]:
                    parts = tokens[e].split(at_once)
                    of_parts = [None] * len(parts) if weights is None else weights[e].to(device).split(at_once)
                    for part, own in zip(parts, of_parts, strict=True):
                        rows = x[part].to(device)
                        yield (rows if projection == experts.up_name else experts.intermediate(rows, e)).float(), own

                statistics = self._statistics_of_experts(weight, range(chosen.start, chosen.stop), rows_of)
                quantized, error = self._solve_stack(weight, statistics, bits[projection][chosen])
                parts[projection].append(quantized)
                errors[projection] += error.tolist()
                weight.copy_(quantized.dequantize(weight.dtype))
        for projection, stack in parts.items():
            name = f"{self.block.name}.{self.block.experts_name}.{projection}"
            whole = {field: torch.cat([getattr(q, field) for q in stack]) for field in stack[0].FIELDS}
            self.solved[name] = replace(stack[0], **whole, **_widths(stack[0], bits[projection]))
            self.error[name] = sum(errors[projection]) / len(errors[projection])

    def _statistics_of_experts(
        self, weight: Tensor, experts: range, rows_of: Callable[[int], Iterator[tuple[Tensor, Tensor | None]]]
    ) -> Tensor | list[Tensor] | None:
        """The statistics of some experts' inputs that the quantizer needs (`Quantizer.needs`).

        Args:
            weight: [S, O, I] one projection of these experts.
            experts: the numbers of the S experts.
            rows_of: expert -> in parts, the inputs [n, I] of this projection, and the weight [n] of each token; None
                weights all equally.
        """
        match self.quantizer.needs:
            case "hessian":
                hessian = weight.new_zeros(len(weight), weight.shape[-1], weight.shape[-1], dtype=torch.float32)
                for total, e in zip(hessian, experts, strict=True):
                    for rows, weights in rows_of(e):
                        add_gram(total, rows, weights)
                    mirror(total)
                return self.ranks.sum(hessian)
            case "inputs":
                return [torch.cat([rows for rows, _ in rows_of(e)]) for e in experts]
        return None

    def _experts_together(self) -> int:
        """How many experts are solved at a time, and logs it (see the function `experts_together`)."""
        experts, world = self.block.experts, self.ranks.world
        weight, shapes = experts.weight(experts.up_name), experts.shapes
        num_experts, gib = self.block.num_experts, self.recipe.solver_gib
        together = experts_together(self.quantizer, shapes, num_experts, gib, world, weight.device)
        log.info(
            "%s: %d experts, %d at a time in %.2f GiB (--model.solver_gib %g)",
            *(self.block.name, self.block.num_experts, together),
            *(stack_bytes(self.quantizer, shapes, together, world, weight.device) / 2**30, self.recipe.solver_gib),
        )
        return together

    def _solve_stack(
        self, weight: Tensor, statistics: Tensor | list[Tensor] | None, bits: tuple[int | float, ...]
    ) -> tuple[QuantizedWeight, Tensor]:
        """Solves experts [S, O, I], each with its number of bits: this process solves its share, then all exchange.

        Experts of one bit width are solved together.

        Returns:
            The quantized stack and the relative squared output errors [S], the same in all processes.
        """
        grid, num, world = self._grid("experts"), len(weight), self.ranks.world
        stack = self.quantizer.result.empty(weight.shape, replace(grid, bits=bits[0]), weight.device)
        error = torch.empty(num, device=weight.device)
        by_width = sorted(range(num), key=lambda i: bits[i])
        shares = [by_width[num * r // world : num * (r + 1) // world] for r in range(world)]
        for width in sorted({bits[i] for i in shares[self.ranks.rank]}):
            chosen = [i for i in shares[self.ranks.rank] if bits[i] == width]
            index = slice(None) if len(chosen) == num else chosen  # a slice copies nothing
            inputs = [statistics[i] for i in chosen] if isinstance(statistics, list) else statistics
            inputs = inputs[index] if isinstance(inputs, Tensor) else inputs
            solved, error[index] = self.quantizer.solve(weight[index], inputs, replace(grid, bits=width))
            for field in solved.FIELDS:
                getattr(stack, field)[index] = getattr(solved, field)
        for rank, share in enumerate(shares if world > 1 else ()):
            for tensor in (*(getattr(stack, field) for field in stack.FIELDS), error) if share else ():
                tensor[share] = self.ranks.broadcast(tensor[share], rank)
        return replace(stack, **_widths(stack, bits)), error

    def _tokens(self, routing: Routing) -> tuple[list[Tensor], list[Tensor] | None]:
        """By expert, the tokens [n] that its Hessians sum over and, with `affinity`, the tokens' weights [n].

        An expert gets the tokens that the router sends it. An expert with fewer than `min_expert_tokens` over all
        processes is starved: it borrows the other tokens with the highest router logits for it.
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
        """[N] mask of the `num` highest scores over all processes, or of all finite scores if there are fewer."""
        best = score.new_full((num,), -torch.inf)
        top = score.topk(min(num, len(score))).values
        best[: len(top)] = top
        threshold = torch.cat(self.ranks.gather(best)).topk(num).values[-1]
        return (score >= threshold) & score.isfinite()


def _widths(quantized: QuantizedWeight, bits: Sequence[int | float]) -> dict[str, Bits]:
    """The field `bits` of a stack on the grid; a lattice computes its bits from its codes."""
    return {"bits": one_or_each(bits)} if isinstance(quantized, Quantized) else {}


def tokens_at_once(shapes: list[tuple[int, int]]) -> int:
    """How many of an expert's tokens run through its projections at a time: what `ROWS_BYTES` hold in float32.

    Args:
        shapes: (O, I) of each projection.
    """
    return max(1, ROWS_BYTES // (4 * max(max(shape) for shape in shapes)))


def stack_bytes(
    quantizer: Quantizer, shapes: list[tuple[int, int]], together: int, world: int, device: torch.device
) -> int:
    """Memory of one process while `world` processes solve `together` experts: all Hessians, and the work on its share.

    Args:
        shapes: (O, I) of each projection of an expert.
    """
    share = -(-together // world)
    return max(
        together * 4 * columns**2 + quantizer.working_bytes(share, rows, columns, device) for rows, columns in shapes
    )


def experts_together(
    quantizer: Quantizer,
    shapes: list[tuple[int, int]],
    num_experts: int,
    gib: float,
    world: int,
    device: torch.device,
) -> int:
    """How many experts `world` processes solve at a time.

    Each takes as many as fit in `gib` (on a CPU also in its caches), and at least one.
    """
    most = -(-num_experts // world)
    if device.type == "cpu":
        most = min(most, CACHED // max(4 * rows * columns for rows, columns in shapes))
    fitting = (n for n in range(most, 1, -1) if stack_bytes(quantizer, shapes, n * world, world, device) <= gib * 2**30)
    return min(num_experts, next(fitting, 1) * world)
