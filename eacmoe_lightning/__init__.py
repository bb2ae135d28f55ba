"""Calibrate, quantize and ship Mixture-of-Experts language models as a Lightning job (EAC-MoE, arXiv 2508.01625)."""

# ruff: noqa: E402  (how threads wait is settled before torch is loaded)

from typing import Any

from eacmoe_lightning.waiting import wait_briefly

wait_briefly()

from eacmoe_lightning.compressed.loading import load
from eacmoe_lightning.moved import keep_old_names
from eacmoe_lightning.offload import load_offloaded, offload_experts
from eacmoe_lightning.version import __version__

keep_old_names()

__all__ = ["__version__", "load", "load_offloaded", "offload_experts", "pesf"]


def __getattr__(name: str) -> Any:
    if name == "pesf":
        from eacmoe_lightning.skipping import pesf

        return pesf
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
