"""Applies the settings of torchrun and `fabric run` (devices, processes), which LightningCLI ignores."""

from __future__ import annotations

import os
from typing import Any

import torch.distributed
from jsonargparse import Namespace

STRATEGY = "ddp_find_unused_parameters_true"  # of several processes: each block trains one router only


def follow_launcher(trainer: Namespace) -> None:
    """Sets devices, nodes, accelerator, strategy and precision as torchrun or `fabric run` sets them.

    LightningCLI ignores these launchers, so every process would silently run the whole job alone. Without a launcher,
    sets the strategy that several processes need.

    Raises:
        ValueError: the config or the command line sets another value.
    """
    if not torch.distributed.is_torchelastic_launched():
        processes = (trainer.get("devices") not in (None, "auto", 1, "1"), trainer.get("num_nodes") not in (None, 1))
        if any(processes) and trainer.get("strategy") in (None, "auto"):
            trainer["strategy"] = STRATEGY
        return
    local, world = int(os.environ["LOCAL_WORLD_SIZE"]), int(os.environ["WORLD_SIZE"])
    if (
        world > 1
        and trainer.get("strategy") in (None, "auto")
        and os.environ.get("LT_STRATEGY") in (None, "auto", "ddp")
    ):
        _settle(trainer, "strategy", STRATEGY, "auto")
    _settle(trainer, "devices", local, "auto")
    _settle(trainer, "num_nodes", world // local, 1)
    for option, default in (("accelerator", "auto"), ("strategy", "auto"), ("precision", None)):
        value = os.environ.get(f"LT_{option.upper()}")
        if value is not None and not (option == "strategy" and value in ("auto", "ddp")):
            _settle(trainer, option, value, default)


def _settle(trainer: Namespace, option: str, value: Any, default: Any) -> None:
    given = trainer.get(option)
    if given not in (None, default) and str(given) != str(value):
        raise ValueError(f"the launcher sets {option}={value}, but --trainer.{option} is {given}: leave one out")
    trainer[option] = value
