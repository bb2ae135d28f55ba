"""What the parts of one block read in the compressed stream: from it they are quantized, and its router selects."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from eacmoe_lightning.calibration.solver import BlockSolver
from eacmoe_lightning.calibration.streams import Streams, concatenate
from eacmoe_lightning.models.block import Block
from eacmoe_lightning.models.routing import Routing
from eacmoe_lightning.run.hidden import HiddenFile


class BlockInputs:
    """The inputs of one block's parts, computed with the weights that the block has at the time.

    Attributes:
        groups: the block's linears that read the same tensor, in the order in which they run.
        router: [S, T, R], what the router's matrix reads, in a file; None until `keep_router_input`.
    """

    def __init__(self, block: Block, streams: Streams) -> None:
        self.block, self.streams = block, streams
        self.groups = block.input_groups(streams.first_call(block))
        self.router: HiddenFile | None = None
        self._routes_alone = True  # whether the router needs nothing else to select experts

    def keep_router_input(self) -> None:
        """Writes what the router reads to a file, which stays the same while later parts change."""
        self.router = self.streams.keep_router_input(self.block)
        self._routes_alone = self.block.routes_alone(self.streams.first_call(self.block))

    def delete(self) -> None:
        self.streams.forget_attention()
        if self.router is not None:
            self.router.delete()
        self.router = None

    def route(self) -> Routing:
        """The router's output for all tokens of this process, with its weights of now; in host memory."""
        block, streams = self.block, self.streams
        if not self._routes_alone:
            return concatenate([block.routing(call) for call in streams.calls(block)])
        batches = (streams.to_device(self.router[rows].flatten(0, 1)) for rows in streams.slices)
        return concatenate([block.route(x) for x in batches])

    def solve_part(self, solver: BlockSolver, part: str, keep: bool = False) -> None:
        """Quantizes the linears of `attention` or `shared`, one group that shares its input at a time, in order.

        With `keep`, later passes start where attention ends (`Streams.keep_attention`).
        """
        for names in (names for names in self.groups if self.block.linears.get(names[0]) == part):
            inputs = self.streams.inputs_of(self.block, self.block.linear(names[0]), part == "shared")
            if keep and len(names) == 1:
                inputs = self.streams.keep_attention(self.block, names[0], inputs)
            counted = (self.streams.counted(x, r) for r, x in zip(self.streams.slices, inputs, strict=True))
            solver.solve_linears(names, counted)

    @contextmanager
    def of_experts(self) -> Iterator[tuple[HiddenFile, Routing]]:
        """What the experts read, [N, D], and the selections; in most models it is what the router reads.

        Where the experts read a row for each pair of a token and an expert, both are by pair. Tokens that do not count
        select no expert.
        """
        block, streams, inputs = self.block, self.streams, self.router
        call = streams.first_call(block)
        differs = not torch.equal(block.input_of(block.experts.module, call), block.router_input(call))
        if differs:
            inputs = streams.keep_expert_input(block)
        rows, routing = inputs.flatten(0, 1), self._without_others(self.route())
        try:
            yield rows, routing if len(rows) == len(routing.ids) else routing.by_pair()
        finally:
            if differs:
                inputs.delete()

    def rows(self, teacher: Routing, rows: slice | Tensor) -> tuple[Tensor, Tensor]:
        """The router's inputs [n, R], and a routing's logits [n, E] for the experts that the block still has."""
        logits = teacher.logits.view(*self.router.shape[:2], -1)
        return self.router[rows].flatten(0, 1), logits[rows].flatten(0, 1)[:, self.block.kept]

    def _without_others(self, routing: Routing) -> Routing:
        """The routing with tokens that do not count selecting no expert: an id beyond them, and logits of -inf."""
        counts = self.streams.counts
        if counts is None:
            return routing
        others = ~counts.flatten().unsqueeze(1)
        ids = routing.ids.masked_fill(others, self.block.num_experts)
        return Routing(routing.logits.masked_fill(others, -torch.inf), ids, routing.weights)
