"""A loss that is NaN or infinite ends the job, without the host waiting for the device at every step."""

from __future__ import annotations

from typing import NoReturn

import torch
from torch import Tensor

from eacmoe_lightning.calibration.overflow import overflow

EVERY = 64  # steps between two readings


class LossWatch:
    """Keeps the first loss of an epoch that is not finite, on the device, and reads it now and then."""

    def __init__(self) -> None:
        self._first: Tensor | None = None  # the first loss that is not finite, or else the last one

    def see(self, loss: Tensor, step: int) -> Tensor | None:
        """Takes the loss of a step of an epoch, counted from 0. Every `EVERY` steps, returns what `bad` does."""
        loss = loss.detach()
        before = loss if step == 0 or self._first is None else self._first
        self._first = torch.where(torch.isfinite(before), loss, before)
        return self.bad() if step % EVERY == 0 else None

    def bad(self) -> Tensor | None:
        """The first loss of the epoch that is not finite, or None. The host waits for the device."""
        return None if self._first is None or torch.isfinite(self._first) else self._first


def refuse(loss: Tensor, where: str, dtype: torch.dtype, rate_options: str) -> NoReturn:
    """Raises ValueError for a loss that is NaN or infinite.

    Args:
        where: the stage or the block that it is of.
        dtype: of the model.
        rate_options: the options that set its learning rates.
    """
    if dtype == torch.float16:
        raise overflow(f"the loss of {where} is {loss.item()}: a logit (final norm, head or router)", torch.float16)
    raise ValueError(
        f"the loss of {where} is {loss.item()}: the steps have diverged. Another run (--trainer.default_root_dir) "
        f"with smaller learning rates (--model.{rate_options}) may not"
    )
