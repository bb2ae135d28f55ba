"""Lightning checkpoints: whole or absent, also after kill -9 or on a full disk; and mended before a run goes on."""

from __future__ import annotations

import io
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.callbacks import Checkpoint

from eacmoe_lightning.run.files import write_atomically


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the place, flushes, renames: `last.ckpt` always loads."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        if storage_options is not None:
            raise TypeError("storage_options are for remote file systems; a run directory is a local path")
        content = io.BytesIO()  # torch.save hides a full disk behind an error of its own
        torch.save(checkpoint, content)
        write_atomically(Path(path), lambda partial: partial.write_bytes(content.getbuffer()))


def mend_progress(fit_loop: dict[str, Any]) -> None:
    """Makes the counters of a checkpoint's loops what they are in a run that was never resumed.

    A resume behind an epoch's last batch leaves Lightning 2.6 short of one completed batch and one started epoch. The
    next such resume would not be recognised as one, and its epoch trained twice.
    """
    batches, epochs = fit_loop["epoch_loop.batch_progress"], fit_loop["epoch_progress"]
    lag = batches["current"]["processed"] - batches["current"]["completed"]  # 1 in on_train_batch_end, 0 at epoch ends
    batches["total"]["completed"] = batches["total"]["processed"] - lag
    for progress in (epochs["total"], epochs["current"]):
        progress["ready"] = progress["started"] = progress["processed"] + lag


def follow_moved(states: dict[str, dict[str, Any]], callbacks: Iterable[Checkpoint], path: str | Path) -> None:
    """Where a run was moved: makes the paths that its checkpoint knows of others lie beside it.

    Lightning would warn of them, and forget what it has left there.

    Args:
        states: what the checkpoint holds of each callback; changed.
        callbacks: the run's `ModelCheckpoint`s.
        path: of the checkpoint.
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
