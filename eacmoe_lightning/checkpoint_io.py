"""Lightning checkpoints that are either whole or absent, also after kill -9 or on a full disk."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from eacmoe_lightning.store import write_atomically


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the place, flushes, renames: `last.ckpt` always loads."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        if storage_options is not None:
            raise TypeError("storage_options are for remote file systems; a run directory is a local path")
        content = io.BytesIO()  # torch.save hides a full disk behind an error of its own
        torch.save(checkpoint, content)
        write_atomically(Path(path), lambda partial: partial.write_bytes(content.getbuffer()))
