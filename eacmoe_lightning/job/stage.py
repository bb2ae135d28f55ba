"""What all stages of the training have in common: router, block and joint stage."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from eacmoe_lightning.calibration.blocks import Calibration


class Stage(Protocol):
    """A stage of the training.

    Attributes:
        rates: learning rate by kind of parameter (`TrainedParts.optimizer_groups`); others are not trained.
        curve: name of its loss in the logs.
        rate_options: the options of `fit` that set the rates.
        takes_steps: whether the present block is trained in steps.
        calibration: the block loop, once it exists.
    """

    rates: dict[str, float]
    curve: str
    rate_options: str
    takes_steps: bool
    calibration: Calibration

    def losses(self, batch: dict[str, Tensor]) -> Tensor | None:
        """The loss of every token of this process's windows of a batch [n], differentiable.

        None if there is nothing to train, or if this process has none of the batch's windows.
        """
