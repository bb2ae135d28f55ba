"""The trainer of `fit`: what Lightning must be told to run a job of blocks, for the command line and for Python."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.trainer.call import _call_callback_hooks, _call_lightning_module_hook

from eacmoe_lightning import callbacks
from eacmoe_lightning.job.checkpoint_io import AtomicCheckpointIO

NEVER = 10**9  # epochs between validations inside fit: nothing can be validated before the last block
DEFAULTS = {
    "max_epochs": -1,  # the module knows how many epochs its blocks take
    "num_sanity_val_steps": 0,
    "check_val_every_n_epoch": NEVER,
    "log_every_n_steps": 1,
    "enable_model_summary": False,
}


class CalibrationTrainer(Trainer):
    """Lightning's Trainer, which also knows whether `fit` continues a run."""

    resumes = False

    def fit(self, *args: Any, ckpt_path: Any = None, **kwargs: Any) -> None:
        self.resumes = ckpt_path is not None
        super().fit(*args, ckpt_path=ckpt_path, **kwargs)

    def _run_stage(self) -> Any:
        """Lightning leaves its loop at once if a resumed run has no epoch left; the hooks that end a run still run."""
        progress = self.fit_loop.epoch_progress.current
        is_after_last_epoch = self.training and progress.processed >= self.fit_loop.max_epochs
        results = super()._run_stage()
        if is_after_last_epoch:
            progress.completed = progress.processed
            for hook in ("on_train_start", "on_train_end"):
                _call_callback_hooks(self, hook)
                _call_lightning_module_hook(self, hook)
        return results


def default_callbacks(progress_bar: bool = True) -> list[Callback]:
    """The callbacks of `fit`, in the order in which they act at its end."""
    chosen = [
        callbacks.LayerwiseQuantization(),
        callbacks.ExpertFrequency(),
        callbacks.CompressedModel(),
        callbacks.RoutingReport(),
        callbacks.PhaseCost(),
        callbacks.TokenScores(),
    ]
    return [*chosen, callbacks.BlockProgress()] if progress_bar else chosen


def calibration_trainer(
    run: str | Path, extra_callbacks: Sequence[Callback] = (), progress_bar: bool = True, **options: Any
) -> CalibrationTrainer:
    """A trainer for `QESC` as the command line builds it: logs, checkpoints and results go to the run directory.

    Args:
        run: the run directory.
        extra_callbacks: after those of `fit`.
        progress_bar: whether the terminal shows one.
        **options: of Lightning's Trainer (accelerator, devices, precision, ...).
    """
    run = Path(run)
    checkpoint = ModelCheckpoint(
        run / "checkpoints", "last", save_on_train_epoch_end=True, enable_version_counter=False
    )
    defaults = {
        "logger": TensorBoardLogger(run, name="", version="tensorboard"),
        "plugins": [AtomicCheckpointIO()],
        "enable_progress_bar": progress_bar,
    }
    return CalibrationTrainer(
        default_root_dir=run,
        callbacks=[*default_callbacks(progress_bar), *extra_callbacks, checkpoint],
        **DEFAULTS | defaults | options,
    )


def last_checkpoint(run: str | Path) -> Path | None:
    """What `fit` continues from (`ckpt_path`); None where no run has begun."""
    path = Path(run) / "checkpoints" / "last.ckpt"
    return path if path.exists() else None
