"""The device that a command was told to run on."""

from __future__ import annotations

import torch


def device_of(name: str, option: str = "--device") -> torch.device:
    """The device with a name such as `cpu`, `cuda` or `cuda:1`.

    Args:
        name: as torch writes it.
        option: that the error names.

    Raises:
        ValueError: torch has no such device here.
    """
    try:
        device = torch.device(name)
        torch.empty(1, device=device).cpu()
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"{option} {name} is no device of this machine: pass cpu, or leave it out ({reason})"
        ) from error
    return device
