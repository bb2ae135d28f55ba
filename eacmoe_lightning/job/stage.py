"""What all stages of the training have in common: router, block and joint stage."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Protocol

from torch import Tensor

from eacmoe_lightning.calibration.blocks import Calibration
from eacmoe_lightning.job.trained import TrainedParts
from eacmoe_lightning.routers.losses import RouterLoss


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


class WeightStage:
    """A stage that trains quantized weights with a router loss beside its own.

    Args:
        parts: the trained parameters.
        rates: learning rates by kind of parameter.
        router_loss, weight: the router loss, and its weight.
        precision: the context of mixed precision in which training steps run.
        at_once: windows that run through a block at a time; None: a batch of this process.
    """

    takes_steps = True

    def __init__(
        self,
        parts: TrainedParts,
        rates: dict[str, float],
        router_loss: RouterLoss,
        weight: float,
        precision: Callable[[], AbstractContextManager],
        at_once: int | None = None,
    ) -> None:
        self.parts, self.rates, self.router_loss, self.weight = parts, rates, router_loss, weight
        self.precision, self.at_once = precision, at_once
        self.calibration: Calibration
