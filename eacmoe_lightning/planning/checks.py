"""What `fit` checks before its first block: memory for the joint stage, room on the disk, the original's weights."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from torch import Tensor

from eacmoe_lightning.calibration.recipe import Recipe
from eacmoe_lightning.models.moe import MoEModel
from eacmoe_lightning.planning.sizes import Job, disk_use, joint_bytes
from eacmoe_lightning.run.memory import available_memory

GB = 1e9


def check_memory(moe: MoEModel, job: Job) -> None:
    """Raises ValueError where the joint stage, unlike all others, needs more memory than there is."""
    if not job.joint_epochs:
        return
    needed, available = joint_bytes(moe, job), available_memory(moe.device)
    if needed > available:
        trained = [kind for kind, trains in (("code", job.trains_codes), ("scale", job.trains_scales)) if trains]
        smaller = "".join(f", --model.joint_{kind}_lr 0 makes it smaller" for kind in trained)
        raise ValueError(
            f"the joint stage (--model.joint_epochs {job.joint_epochs}) holds the whole compressed model in memory: "
            f"{needed / GB:.1f} GB, {available / GB:.1f} GB are available. --model.joint_epochs 0 leaves it out (one "
            f"block is in memory then){smaller}"
        )


def check_disk(moe: MoEModel, recipe: Recipe, job: Job, folder: Path) -> str:
    """What the run will take of the disk, as a sentence.

    Raises:
        ValueError: that is more than is free.
    """
    use = disk_use(moe, recipe, job)
    needed = sum(use.values())
    free = shutil.disk_usage(next(place for place in (folder, *folder.parents) if place.exists())).free
    parts = ", ".join(f"{what} {size / GB:.2f}" for what, size in use.items() if size)
    said = f"{folder} will take up to {needed / GB:.2f} GB ({parts}); {free / GB:.2f} GB are free"
    if needed > free:
        raise ValueError(
            f"{said}: fewer or shorter windows (--data.num_windows, --data.window_length), --model.stream_dtype "
            "bfloat16, or another --trainer.default_root_dir"
        )
    return said


def check_finite(moe: MoEModel) -> None:
    """Raises ValueError that names the first tensor with NaN or infinite values. Reads every weight once."""
    for block in moe.blocks:
        with moe.loaded(block.index):
            for name, parameter in block.layer.named_parameters(prefix=block.name):
                _check_finite(name, parameter)
    for name, parameter in moe.model.named_parameters():
        if not parameter.is_meta:
            _check_finite(name, parameter)


def _check_finite(name: str, parameter: Tensor) -> None:
    if not torch.isfinite(parameter).all():
        raise ValueError(
            f"{name} of the original model holds NaN or infinite values: the checkpoint is damaged, or "
            "overflowed in --model.dtype; repair it or load it in float32"
        )
