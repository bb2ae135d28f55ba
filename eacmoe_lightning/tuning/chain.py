"""The losses of a chain of steps, differentiated with one step's weights in memory.

Forward, the steps run one after another without gradients, and the input of each is kept in host memory. Backward, they
run once more, from the last to the first, each from its input to its output, whose gradient the step after it has
handed back. This is gradient checkpointing (Chen et al., arXiv 1604.06174) with weights that come and go. Where there
is room, a chain keeps its activations instead and runs once; the results are the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from eacmoe_lightning.run.hidden import State, moved, rows_of


class Step(Protocol):
    """One step of a chain.

    Attributes:
        trained: the parameters that it reads and that get gradients.
        at_once: windows that it runs at a time; None: the whole batch.
    """

    trained: Sequence[Tensor]
    at_once: int | None

    def loaded(self) -> AbstractContextManager[Any]:
        """Has the step's weights in memory inside the `with` block."""

    def run(self, state: State, rows: slice) -> tuple[State, Tensor | None]:
        """Runs some windows of the batch: what the step before has returned for them -> its own state and losses.

        A state is a tensor or a tree of tensors, all with the windows [b, ...] in their first dimension; None for the
        first step. The losses [b*T] are None if the step has none. Nothing may be written into the state's tensors.
        """


@dataclass(frozen=True)
class Chain:
    """Steps that run one after another.

    Attributes:
        steps: the steps.
        windows: size of the batch.
        device: the device that they run on.
        precision: the context of mixed precision in which they run.
        keeps_activations: whether all weights and activations stay in memory until the backward pass.
    """

    steps: Sequence[Step]
    windows: int
    device: torch.device
    precision: Callable[[], AbstractContextManager[Any]]
    keeps_activations: bool = False

    def losses(self) -> Tensor:
        """The sum of all steps' losses by token [B*T], differentiable with respect to what the steps train."""
        if self.keeps_activations:
            return self.forward(lambda state: tree_map_only(Tensor, torch.clone, state))
        trained = {id(parameter): parameter for step in self.steps for parameter in step.trained}
        return _StepByStep.apply(self, *trained.values())

    def forward(self, take: Callable[[State], State]) -> Tensor:
        """The losses of a forward pass; `take` gets every step's input, and returns what the step is given."""
        state, total = None, torch.zeros((), device=self.device)
        for step in self.steps:
            state, parts = take(state), self.parts(step)
            with step.loaded():
                outputs = [step.run(rows_of(state, rows), rows) for rows in parts]
            state = _joined([output for output, _ in outputs])
            if outputs[0][1] is not None:
                total = total + torch.cat([losses for _, losses in outputs])
        return total

    def parts(self, step: Step) -> list[slice]:
        """The windows that a step runs at a time."""
        size = step.at_once or self.windows
        return [slice(start, min(start + size, self.windows)) for start in range(0, self.windows, size)]


class _StepByStep(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, chain: Chain, *trained: Tensor) -> Tensor:
        ctx.chain, ctx.trained, ctx.inputs = chain, trained, []

        def keep(state: State) -> State:
            ctx.inputs.append(tree_map_only(Tensor, lambda tensor: tensor.to("cpu", copy=True), state))
            return state

        return chain.forward(keep)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        chain, sums = ctx.chain, {id(parameter): torch.zeros_like(parameter) for parameter in ctx.trained}
        handed: list[Tensor | None] = []  # gradients of the tensors in the step's output
        for step in reversed(chain.steps):
            state, of_inputs = ctx.inputs.pop(), []
            with step.loaded():
                for rows in reversed(chain.parts(step)):  # as autograd would, so that sums have the same order
                    tokens = slice(*(index * len(gradient) // chain.windows for index in (rows.start, rows.stop)))
                    behind = [None if one is None else one[rows] for one in handed]
                    before, of_trained = _backward(chain, step, rows_of(state, rows), rows, behind, gradient[tokens])
                    of_inputs.append(before)
                    for parameter, one in zip(step.trained, of_trained, strict=True):
                        if one is not None:
                            sums[id(parameter)] += one
            parts = zip(*reversed(of_inputs), strict=True)
            handed = [None if part[0] is None else torch.cat(part) for part in parts]
        return None, *sums.values()


def _backward(
    chain: Chain, step: Step, state: State, rows: slice, behind: Sequence[Tensor | None], gradient: Tensor
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """Gradients of the tensors in a step's input, and of what it trains.

    Args:
        behind: gradients of the tensors in its output; none behind the last step.
        gradient: of its losses.
    """
    leaves, spec = tree_flatten(moved(state, chain.device))
    leaves = [leaf.detach() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    inputs = [leaf.requires_grad_() for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    with torch.enable_grad(), chain.precision():
        output, losses = step.run(tree_map_only(Tensor, torch.clone, tree_unflatten(leaves, spec)), rows)
    ends = [*(zip(tree_flatten(output)[0], behind, strict=True) if behind else ()), (losses, gradient)]
    ends = [(end, one) for end, one in ends if one is not None and end is not None and end.requires_grad]
    wanted, gradients = [*inputs, *step.trained], []
    if ends and wanted:
        gradients = torch.autograd.grad([end for end, _ in ends], wanted, [one for _, one in ends], allow_unused=True)
    gradients = [*gradients] or [None] * len(wanted)
    of_inputs, of_trained = iter(gradients[: len(inputs)]), list(gradients[len(inputs) :])
    return [next(of_inputs) if isinstance(leaf, Tensor) and leaf.requires_grad else None for leaf in leaves], of_trained


def _joined(states: Sequence[State]) -> State:
    """The states of several parts of a batch as one."""
    if len(states) == 1:
        return states[0]
    leaves, spec = zip(*(tree_flatten(state) for state in states), strict=True)
    joined = [torch.cat(one) if isinstance(one[0], Tensor) else one[0] for one in zip(*leaves, strict=True)]
    return tree_unflatten(joined, spec[0])
