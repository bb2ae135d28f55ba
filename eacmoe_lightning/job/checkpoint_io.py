"""Lightning checkpoints that survive a kill, a full disk and a moved run directory.

They are written whole or not at all, and repaired before a run resumes from them.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterable
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.callbacks import Checkpoint

from eacmoe_lightning.run.files import REMEDY, StoreError, write_atomically

OTHER_JOB = "{} (--ckpt_path) is not a checkpoint of this run: pass --ckpt_path auto, which takes the run's own"


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes to a temporary file, flushes it and renames it, so that `last.ckpt` always loads."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        if storage_options is not None:
            raise TypeError("storage_options apply to remote file systems, but a run directory is a local path")
        content = io.BytesIO()  # on a full disk torch.save raises an error that does not say so
        torch.save(checkpoint, content)
        write_atomically(Path(path), lambda partial: partial.write_bytes(content.getbuffer()))

    def load_checkpoint(self, path: str | Path, *args: Any, **kwargs: Any) -> dict[str, Any]:
        try:
            checkpoint = super().load_checkpoint(path, *args, **kwargs)
        except FileNotFoundError:
            raise
        except (RuntimeError, EOFError, UnpicklingError, OSError) as error:  # a cut file makes torch seek before it
            reason = str(error).partition("\n")[0]
            raise StoreError(f"{path} is truncated or corrupt ({reason}); {REMEDY}") from error
        if not isinstance(checkpoint, dict) or not {"pytorch-lightning_version", "loops"} <= checkpoint.keys():
            raise ValueError(OTHER_JOB.format(path))
        return checkpoint


def refuse_other_job(checkpoint: dict[str, Any], shapes: dict[str, tuple[int, ...]], path: str | Path) -> None:
    """Raises ValueError if a checkpoint is not one of a job that trains tensors of these shapes."""
    stored = {name: tuple(tensor.shape) for name, tensor in checkpoint.get("state_dict", {}).items()}
    if "block_routers" not in checkpoint or stored != shapes:
        raise ValueError(OTHER_JOB.format(path))


def mend_progress(fit_loop: dict[str, Any]) -> None:
    """Sets a checkpoint's loop counters to the values of a run that was never resumed.

    When Lightning 2.6 resumes after an epoch's last batch, it counts one completed batch and one started epoch too few.
    It would not recognise the next such resume, and would train that epoch twice.
    """
    batches, epochs = fit_loop["epoch_loop.batch_progress"], fit_loop["epoch_progress"]
    lag = batches["current"]["processed"] - batches["current"]["completed"]  # 1 in on_train_batch_end, 0 at epoch ends
    batches["total"]["completed"] = batches["total"]["processed"] - lag
    for progress in (epochs["total"], epochs["current"]):
        progress["ready"] = progress["started"] = progress["processed"] + lag


def follow_moved(states: dict[str, dict[str, Any]], callbacks: Iterable[Checkpoint], path: str | Path) -> None:
    """Rewrites the checkpoint paths in the callbacks' states after the run directory was moved.

    Lightning would warn about the old directory and lose track of the checkpoints in it.

    Args:
        states: the checkpoint's state of each callback; changed in place.
        callbacks: the run's `ModelCheckpoint`s.
        path: path of the checkpoint.
    """
    new = os.path.realpath(Path(path).parent)
    for callback in callbacks:
        state = states.get(callback.state_key, {})
        old = state.get("dirpath")
        if old and getattr(callback, "dirpath", None) == new:
            states[callback.state_key] = {name: _moved(value, old, new) for name, value in state.items()}


def _moved(value: Any, old: str, new: str) -> Any:
    if isinstance(value, dict):
        return {_moved(path, old, new): score for path, score in value.items()}
    is_below = isinstance(value, str) and Path(value).is_relative_to(old)
    return str(Path(new, Path(value).relative_to(old))) if is_below else value
