"""The losses of a chain of steps, differentiated with one step's weights in memory.

Forward, the steps run one after another without gradients, and the input of each is kept in host memory. Backward, they
run once more, from the last to the first, each from its input to its output, whose gradient the step after it has
handed back. This is gradient checkpointing (Chen et al., arXiv 1604.06174) with weights that come and go. Where there
is room, a chain keeps its activations instead and runs once; the results are the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten


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

    def run(self, state: Any, rows: slice) -> tuple[Any, Tensor | None]:
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

    @torch.no_grad()
    def forward_kept(self) -> tuple[list[Any], Tensor]:
        """A forward pass without gradients: each step's input, in host memory, and the losses [B*T]."""
        inputs: list[Any] = []

        def keep(state: Any) -> Any:
            inputs.append(tree_map_only(Tensor, lambda tensor: tensor.to("cpu", copy=True), state))
            return state

        losses = self.forward(keep)
        return inputs, losses

    def forward(self, take: Callable[[Any], Any]) -> Tensor:
        """The losses of a forward pass; `take` gets every step's input, and returns what the step is given."""
        state, total = None, torch.zeros((), device=self.device)
        for step in self.steps:
            state, parts = take(state), self.parts(step)
            with step.loaded():
                outputs = [step.run(_rows(state, rows), rows) for rows in parts]
            state = _joined([output for output, _ in outputs])
            if outputs[0][1] is not None:
                total = total + torch.cat([losses for _, losses in outputs])
        return total

    def backward(self, inputs: list[Any], gradient: Tensor) -> Iterator[tuple[Step, list[Tensor | None]]]:
        """A backward pass: each step, from the last to the first, with the gradients of what it trains.

        Args:
            inputs: of `forward_kept`; emptied on the way.
            gradient: of the losses [B*T].
        """
        handed: list[Tensor | None] = []  # gradients of the tensors in the step's output
        for step in reversed(self.steps):
            state, of_inputs, of_trained = inputs.pop(), [], []
            with step.loaded():
                for rows in reversed(self.parts(step)):  # as autograd would, so that sums have the same order
                    token = slice(*(index * len(gradient) // self.windows for index in (rows.start, rows.stop)))
                    behind = [None if one is None else one[rows] for one in handed]
                    one, other = _backward(self, step, _rows(state, rows), rows, behind, gradient[token])
                    of_inputs.append(one)
                    of_trained.append(other)
            parts = zip(*reversed(of_inputs), strict=True)
            handed = [None if part[0] is None else torch.cat(part) for part in parts]
            yield step, [_sum(one) for one in zip(*of_trained, strict=True)]

    def parts(self, step: Step) -> list[slice]:
        """The windows that a step runs at a time."""
        size = step.at_once or self.windows
        return [slice(start, min(start + size, self.windows)) for start in range(0, self.windows, size)]


class _StepByStep(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, chain: Chain, *trained: Tensor) -> Tensor:
        ctx.chain, ctx.trained = chain, trained
        ctx.inputs, losses = chain.forward_kept()
        return losses

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        sums = {id(parameter): torch.zeros_like(parameter) for parameter in ctx.trained}
        for step, of_trained in ctx.chain.backward(ctx.inputs, gradient):
            for parameter, one in zip(step.trained, of_trained, strict=True):
                if one is not None:
                    sums[id(parameter)] += one
        return None, *sums.values()


def _backward(
    chain: Chain, step: Step, state: Any, rows: slice, behind: Sequence[Tensor | None], gradient: Tensor
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """Gradients of the tensors in a step's input, and of what it trains.

    Args:
        behind: gradients of the tensors in its output; none behind the last step.
        gradient: of its losses.
    """
    leaves, spec = tree_flatten(state)
    leaves = [leaf.detach().to(chain.device) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    inputs = [leaf.requires_grad_() for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    with torch.enable_grad(), chain.precision():
        copies = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        output, losses = step.run(tree_unflatten(copies, spec), rows)
    ends = list(zip(tree_flatten(output)[0], behind, strict=True)) if behind else []
    ends = [(end, one) for end, one in (*ends, (losses, gradient)) if one is not None and _differs(end)]
    wanted = [*inputs, *step.trained]
    if not ends or not wanted:
        found = [None] * len(wanted)
    else:
        found = torch.autograd.grad([end for end, _ in ends], wanted, [one for _, one in ends], allow_unused=True)
    of_inputs, of_trained = iter(found[: len(inputs)]), list(found[len(inputs) :])
    return [next(of_inputs) if isinstance(leaf, Tensor) and leaf.requires_grad else None for leaf in leaves], of_trained


def _differs(end: Any) -> bool:
    return isinstance(end, Tensor) and end.requires_grad


def _sum(parts: Sequence[Tensor | None]) -> Tensor | None:
    found = [part for part in parts if part is not None]
    return sum(found[1:], found[0]) if found else None


def _rows(state: Any, rows: slice) -> Any:
    return tree_map_only(Tensor, lambda tensor: tensor[rows], state)


def _joined(states: Sequence[Any]) -> Any:
    """The states of several parts of a batch as one."""
    if len(states) == 1:
        return states[0]
    leaves, spec = zip(*(tree_flatten(state) for state in states), strict=True)
    joined = [torch.cat(one) if isinstance(one[0], Tensor) else one[0] for one in zip(*leaves, strict=True)]
    return tree_unflatten(joined, spec[0])
