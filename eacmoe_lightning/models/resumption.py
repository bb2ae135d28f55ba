"""A layer's pass that goes on after its attention, from what an earlier pass has kept there.

Attention is quantized before everything that follows it in a block. So what its output projection reads is kept while
that is quantized, and later passes through the block, as it changes part by part, need not compute attention again.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from eacmoe_lightning.models.block import Block, Call
from eacmoe_lightning.models.routing import Handles, forward_replaced


@dataclass(frozen=True)
class Resumption:
    """A module of a layer whose output is that of its last linear, as attention's is that of the output projection.

    Attributes:
        module, linear: both.
        rest: what the module returns after the linear's output, without tensors (attention weights, which layers pass
            by); None where it returns that output alone.
    """

    module: nn.Module
    linear: nn.Module
    rest: tuple | None

    def start(self, x: Tensor) -> AbstractContextManager[None]:
        """Makes the module return what its linear makes of x [B, T, I], whatever it is given."""

        def forward(*args, **kwargs) -> Tensor | tuple:
            output = self.linear(x)
            return output if self.rest is None else (output, *self.rest)

        return forward_replaced(self.module, forward)


def find_resumption(block: Block, name: str, call: Call) -> Resumption | None:
    """The outermost module of the block that ends in the linear `name`; None unless a pass from there gives the same.

    "The same" is tried with this call, to the bit, with all that the block hands over. So a layer whose attention also
    leaves keys and values for later layers has none.
    """
    linear, path = block.linear(name), name.split(".")
    modules = [block.layer.get_submodule(".".join(path[:length])) for length in range(1, len(path))]
    read: list[Tensor] = []
    made: dict[nn.Module, list] = {module: [] for module in (*modules, linear)}

    def note(module: nn.Module, args: tuple, output: Tensor | tuple) -> None:
        made[module].append(output)
        if module is linear:
            read.append(args[0])

    handles = Handles(module.register_forward_hook(note) for module in made)
    try:
        expected, _ = block.forward(call)
    finally:
        handles.remove()
    if [x.ndim for x in read] != [3]:
        return None
    for module in modules:
        first, rest = made[module][-1], None
        if isinstance(first, tuple):
            first, *others = first
            rest = tuple(None if isinstance(other, Tensor) else other for other in others)
        if first is made[linear][0]:
            found = Resumption(module, linear, rest)
            try:
                output, _ = block.forward(replace(call, within=partial(found.start, read[0].contiguous())))
            except (TypeError, ValueError, RuntimeError, IndexError, AttributeError):  # a layer that reads the rest
                return None
            return found if _equal(expected, output) else None
    return None


def _equal(one: object, other: object) -> bool:
    leaves = [[leaf for leaf in tree_leaves(state) if isinstance(leaf, Tensor)] for state in (one, other)]
    return len(leaves[0]) == len(leaves[1]) and all(map(torch.equal, *leaves))
