"""Averaged weights: a stage may end with the mean of what it trains over its last steps.

Stochastic weight averaging (Izmailov et al., arXiv 1803.05407), here of routers, norms, scales and positions of codes.
A position is rounded to a code after averaging, so a code that only a few steps have carried away stays where it was.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class Averaging:
    """The mean over the present stage's last steps.

    Attributes:
        means: of the tensors in training, in their order; empty before the first step that counts and after the last.
        number: how many steps they are the means of.
    """

    def __init__(self) -> None:
        self.means: list[Tensor] = []
        self.number = 0

    def start(self) -> None:
        """Begins a stage."""
        self.means, self.number = [], 0

    @torch.no_grad()
    def step(self, trained: Sequence[Tensor], done: float, share: float, is_last: bool) -> None:
        """Takes in the tensors after a step; after the stage's last step sets them to the means.

        Args:
            trained: the tensors in training, the same at each step.
            done: share of the stage's steps that are done, this one included.
            share: share of the stage's steps, its last ones, that are averaged; 0 averages none.
        """
        if share and done > 1 - share:
            self.number += 1
            if not self.means:
                self.means = [tensor.detach().clone() for tensor in trained]
            self.means = [mean.to(tensor.device) for mean, tensor in zip(self.means, trained, strict=True)]  # resumed
            for mean, tensor in zip(self.means, trained, strict=True):
                mean.lerp_(tensor.detach(), 1 / self.number)
        if is_last and self.means:
            for mean, tensor in zip(self.means, trained, strict=True):
                tensor.copy_(mean)
            self.start()

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return dict(vars(self))

    def load_state(self, state: dict[str, Any]) -> None:
        self.means, self.number = list(state["means"]), state["number"]
