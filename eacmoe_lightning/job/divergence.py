"""A loss that is NaN or infinite ends the job, without the host waiting for the device at every step."""

from __future__ import annotations

import torch
from torch import Tensor

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
