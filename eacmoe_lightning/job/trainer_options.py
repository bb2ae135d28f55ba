"""Options of Lightning's Trainer that do not suit a job that goes through a model block by block."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.accelerators import AcceleratorRegistry
from lightning.pytorch.callbacks import (
    EarlyStopping,
    GradientAccumulationScheduler,
    ModelCheckpoint,
    OnExceptionCheckpoint,
    StochasticWeightAveraging,
    Timer,
)
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy

NEVER = 10**9  # epochs between validations inside fit: nothing can be validated before the last block
PRECISIONS = ("32-true", "16-mixed", "bf16-mixed")
STOPS = (
    "a block needs all its epochs. To stop early, send SIGTERM (`timeout 8h ...` does) or set --trainer.max_epochs; "
    "--ckpt_path auto goes on"
)


def refuse_unsuitable(trainer: Trainer, stage: str) -> None:
    """Raises ValueError for an option of the trainer with which the job would fail or compute something else.

    Args:
        trainer: the trainer that runs the job.
        stage: `fit`, `validate`, `test` or `predict`.
    """
    stage = str(getattr(stage, "value", stage))  # Lightning passes an enum
    if not hasattr(type(trainer.datamodule), "calibration_digest"):  # of the class: its value may not be known yet
        raise ValueError(
            "calibration and evaluation read their text from a TextWindows data module: pass it, as in "
            f"trainer.{stage}(module, datamodule=TextWindows(...))"
        )
    refuse_directory(str(trainer.default_root_dir))
    refusals = _of_fit(trainer) if stage == "fit" else _of_evaluation(trainer, stage)
    common = {
        "fast_dev_run": (
            trainer.fast_dev_run,
            "it runs single batches, which neither calibrate nor evaluate a model. For a quick try, take few windows: "
            "--data.num_windows 8 --data.num_heldout_windows 2 --model.joint_epochs 0",
        ),
        "overfit_batches": (trainer.overfit_batches, "take fewer windows instead: --data.num_windows"),
    }
    for option, (value, reason) in (common | refusals).items():
        if value:
            raise ValueError(f"--trainer.{option} {value} does not suit {stage}: {reason}")
    if stage == "fit":
        _check_callbacks(trainer)


def refuse_missing_accelerator(name: Any) -> None:
    """Raises ValueError for the name of an accelerator (`--trainer.accelerator`) that this machine does not have."""
    classes = {
        known: AcceleratorRegistry[known]["accelerator"] for known in AcceleratorRegistry.available_accelerators()
    }
    there = [known for known, accelerator in classes.items() if accelerator.is_available()]
    wanted = {"gpu": ("cuda", "mps")}.get(name, (name,))
    if name == "auto" or not isinstance(name, str) or any(one in there for one in wanted):
        return
    if not any(one in classes for one in wanted):
        reason = f"there is no such accelerator, only {', '.join(['auto', 'gpu', *sorted(classes)])}"
    elif "cuda" in wanted and torch.version.cuda is None and torch.version.hip is None:
        reason = f"torch {torch.__version__} is built without CUDA: install a build of torch with it"
    else:
        reason = "torch finds none on this machine"
    raise ValueError(f"--trainer.accelerator {name}: {reason}. Here it can be {', '.join(['auto', *sorted(there)])}")


def refuse_directory(directory: str) -> None:
    """Raises ValueError if the run directory is a URL, a file lies in its place, or it cannot be written to."""
    if "://" in directory:
        raise ValueError(
            f"--trainer.default_root_dir {directory} is no directory of this machine: pass one, and copy it afterwards"
        )
    path = Path(directory).absolute()
    place = next(folder for folder in (path, *path.parents) if folder.exists())
    problem = "this user may not write there" if place.is_dir() else "a file is in its place"
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        raise ValueError(f"--trainer.default_root_dir {directory} cannot be a run directory: {problem} ({place})")


def _of_fit(trainer: Trainer) -> dict[str, tuple[Any, str]]:
    """By option: its value if it is unsuitable, and why."""
    validates = "there is no model to validate before the last block is done; `fit` evaluates at its end"
    every, summed, clip = trainer.check_val_every_n_epoch, trainer.accumulate_grad_batches, trainer.gradient_clip_val
    is_known = isinstance(trainer.strategy, (SingleDeviceStrategy, DDPStrategy))
    if isinstance(trainer.strategy, DDPStrategy):
        is_known = bool(trainer.strategy._ddp_kwargs.get("find_unused_parameters"))  # a block trains one router only
    return {
        "max_epochs": (trainer.max_epochs == 0 and "0", "nothing would be computed: leave it out, or pass 1 or more"),
        "max_steps": (
            trainer.max_steps not in (-1, None) and trainer.max_steps,
            "the number of steps follows from windows and blocks. --trainer.max_epochs stops between blocks",
        ),
        "limit_train_batches": (trainer.limit_train_batches == 0 and "0", "nothing would be computed: leave it out"),
        "accumulate_grad_batches": (summed < 1 and str(summed), "it is a number of batches for a step: pass 1 or more"),
        "gradient_clip_val": (
            clip is not None and not 0 <= clip < math.inf and str(clip),
            "it is the largest norm or value of a gradient: pass 0 or more, or leave it out",
        ),
        "precision": (
            trainer.precision not in PRECISIONS and trainer.precision,
            f"--model.dtype is the dtype of the model and its calibration; training steps take {', '.join(PRECISIONS)}",
        ),
        "num_sanity_val_steps": (trainer.num_sanity_val_steps, f"{validates} (0 is the default of this package)"),
        "check_val_every_n_epoch": (every is not None and every < NEVER and every, validates),
        "val_check_interval": (trainer.val_check_interval != 1.0 and trainer.val_check_interval, validates),
        "strategy": (
            not is_known and type(trainer.strategy).__name__,
            "blocks are not divided, and each trains one router only: leave it out, or pass "
            "ddp_find_unused_parameters_true for several processes",
        ),
    }


def _of_evaluation(trainer: Trainer, stage: str) -> dict[str, tuple[Any, str]]:
    limit = {"validate": "limit_val_batches", "test": "limit_test_batches", "predict": "limit_predict_batches"}[stage]
    return {limit: (getattr(trainer, limit) == 0 and "0", "nothing would be evaluated: leave it out")}


def _check_callbacks(trainer: Trainer) -> None:
    for callback in trainer.callbacks:
        if isinstance(callback, Timer):
            raise ValueError(f"--trainer.max_time (the callback Timer) does not suit fit: {STOPS}")
        if isinstance(callback, GradientAccumulationScheduler):
            raise ValueError(
                "the callback GradientAccumulationScheduler does not suit fit: a run that is continued could not tell "
                "whether it had it. Pass --trainer.accumulate_grad_batches, which holds for the whole run"
            )
        if isinstance(callback, StochasticWeightAveraging):
            raise ValueError(
                "the callback StochasticWeightAveraging does not suit fit: each block trains weights of its own, "
                "so leave it out"
            )
        if isinstance(callback, EarlyStopping):
            raise ValueError(f"the callback {type(callback).__name__} does not suit fit: {STOPS}")
        if isinstance(callback, OnExceptionCheckpoint) or (
            isinstance(callback, ModelCheckpoint) and getattr(callback, "save_on_exception", False)  # Lightning 2.6
        ):
            raise ValueError(
                f"{type(callback).__name__} saves when an exception is raised (--checkpoint.save_on_exception), in the "
                "middle of a step. A job that continues from there ends with another result: leave it out"
            )
    checkpoints = [callback for callback in trainer.callbacks if isinstance(callback, ModelCheckpoint)]
    if not any(_writes_last(callback) for callback in checkpoints):
        raise ValueError(
            "no ModelCheckpoint of the trainer writes a last.ckpt that a killed job could continue from: leave out "
            "--trainer.enable_checkpointing, --checkpoint.filename, --checkpoint.save_top_k and "
            "--checkpoint.save_weights_only, or build the trainer with `commands.trainer.calibration_trainer`"
        )


def _writes_last(callback: ModelCheckpoint) -> bool:
    if callback.save_top_k == 0 or callback.save_weights_only:  # with 0, Lightning saves at the end of the run only
        return False
    return bool(callback.save_last) or str(callback.filename or "").startswith("last")
