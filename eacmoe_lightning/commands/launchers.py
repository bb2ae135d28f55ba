"""What torchrun and `fabric run` say of devices and processes, which LightningCLI ignores."""

from __future__ import annotations

import os
from typing import Any

import torch.distributed
from jsonargparse import Namespace


def follow_launcher(trainer: Namespace) -> None:
    """Takes over devices, nodes, accelerator, strategy and precision from torchrun or `fabric run`.

    LightningCLI ignores what these launchers set, and every process would silently run the whole job by itself.

    Raises:
        ValueError: the config or command line says something else.
    """
    if not torch.distributed.is_torchelastic_launched():
        return
    local, world = int(os.environ["LOCAL_WORLD_SIZE"]), int(os.environ["WORLD_SIZE"])
    if (
        world > 1
        and trainer.get("strategy") in (None, "auto")
        and os.environ.get("LT_STRATEGY") in (None, "auto", "ddp")
    ):
        _settle(trainer, "strategy", "ddp_find_unused_parameters_true", "auto")  # each block trains one router only
    _settle(trainer, "devices", local, "auto")
    _settle(trainer, "num_nodes", world // local, 1)
    for option, default in (("accelerator", "auto"), ("strategy", "auto"), ("precision", None)):
        value = os.environ.get(f"LT_{option.upper()}")
        if value is not None and not (option == "strategy" and value in ("auto", "ddp")):
            _settle(trainer, option, value, default)


def _settle(trainer: Namespace, option: str, value: Any, default: Any) -> None:
    said = trainer.get(option)
    if said not in (None, default) and str(said) != str(value):
        raise ValueError(f"the launcher says {option}={value}, --trainer.{option} says {said}: leave one of them out")
    trainer[option] = value
