"""A model by its place: a run directory, a compressed directory or an original. Every command opens models here."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from eacmoe_lightning.compressed.directory import CompressedWeights
from eacmoe_lightning.compressed.format import is_compressed, read_config, size_of
from eacmoe_lightning.compressed.loading import load
from eacmoe_lightning.models.checkpoint import Checkpoint
from eacmoe_lightning.models.moe import MoEModel
from eacmoe_lightning.models.originals import load_original, local_directory
from eacmoe_lightning.models.streamed import StreamedModel


@dataclass(frozen=True)
class OpenedModel:
    """A model that was found; nothing of its weights is read yet.

    Attributes:
        name: what was asked for: a path, `bundled` or a hub id.
        directory: where its config, tokenizer and weight files lie.
        is_compressed: whether that is a compressed directory of this package; otherwise it is an original.
        dtype: `auto` (as stored, or as it was calibrated), `float32`, `bfloat16` or `float16`.
    """

    name: str
    directory: Path
    is_compressed: bool
    dtype: str

    @property
    def original(self) -> str:
        """The original that it was made of, as its config names it; an original is its own."""
        return read_config(self.directory)["original"]["name_or_path"] if self.is_compressed else self.name

    @property
    def size_bytes(self) -> int:
        """Of its weight files."""
        return size_of(self.directory)

    @cached_property
    def weights(self) -> CompressedWeights | Checkpoint:
        """Its weights on disk, compressed ones decoded as they are read."""
        return (
            CompressedWeights(self.directory, self.dtype) if self.is_compressed else Checkpoint(self.name, self.dtype)
        )

    def streamed(self, device: torch.device | str = "cpu") -> StreamedModel:
        """The model with one block at a time in memory."""
        return StreamedModel(self.weights, device)

    def in_memory(self) -> MoEModel:
        """The whole model, compressed weights decoded."""
        if self.is_compressed:
            return MoEModel(load(self.directory, self.dtype, packed=False))
        return MoEModel(load_original(self.name, self.dtype))


def open_model(name_or_path: str | Path, dtype: str = "auto", option: str = "--model") -> OpenedModel:
    """Finds a model.

    Args:
        name_or_path: a run directory, a compressed directory or an original (`bundled`, a directory or a hub id).
        dtype: in which it is loaded: `auto`, `float32`, `bfloat16` or `float16`.
        option: of the command line, for errors.

    Raises:
        FileNotFoundError: there is no such model, or the run is not finished.
        ValueError: a newer version of this package wrote it.
    """
    path = Path(name_or_path)
    if (path / "run.json").exists() and not is_compressed(path / "compressed"):
        raise FileNotFoundError(
            f"the run in {path} ({option}) has no compressed model yet: finish it with `fit --ckpt_path last`, or pass "
            f"another directory with {option}"
        )
    directory = next((place for place in (path / "compressed", path) if is_compressed(place)), None)
    if directory is not None:
        read_config(directory)  # of a version that this package reads
        return OpenedModel(str(name_or_path), directory, True, dtype)
    return OpenedModel(str(name_or_path), local_directory(str(name_or_path)), False, dtype)


def open_compressed(path: str | Path, dtype: str = "auto", option: str = "--source") -> OpenedModel:
    """As `open_model`, where only a compressed model will do.

    Raises:
        FileNotFoundError: there is none.
    """
    found = Path(path)
    if not any(is_compressed(place) for place in (found / "compressed", found)) and not (found / "run.json").exists():
        raise FileNotFoundError(
            f"{path} ({option}) is neither a run directory nor a compressed directory of eacmoe-lightning"
        )
    return open_model(path, dtype, option)
