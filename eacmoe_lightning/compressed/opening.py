"""Opens a model from a run directory, a compressed directory or an original. Every command opens models here."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from eacmoe_lightning.compressed.directory import CompressedWeights
from eacmoe_lightning.compressed.format import is_compressed, read_config, size_of, trust_code
from eacmoe_lightning.compressed.loading import load
from eacmoe_lightning.models.checkpoint import Checkpoint
from eacmoe_lightning.models.fingerprint import fingerprint
from eacmoe_lightning.models.moe import MoEModel
from eacmoe_lightning.models.originals import is_bundled, local_directory
from eacmoe_lightning.models.streamed import StreamedModel
from eacmoe_lightning.models.tokenizer import tokenizer_of

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class OpenedModel:
    """A model whose files exist; its weights are not read yet.

    Attributes:
        name: the path, `bundled` or the hub id that it was opened by.
        directory: the directory of its config, tokenizer and weight files.
        is_compressed: whether that is a compressed directory of this package; otherwise it is an original model.
        dtype: `auto` (as stored; for a compressed model, that of the calibration), `float32`, `bfloat16` or `float16`.
        trust_remote_code: whether Python code beside the original may run.
    """

    name: str
    directory: Path
    is_compressed: bool
    dtype: str
    trust_remote_code: bool = False

    @property
    def original(self) -> str:
        """Name of the original that a compressed model was made from, or of the model itself if it is an original."""
        return read_config(self.directory)["original"]["name_or_path"] if self.is_compressed else self.name

    def refuse_other_original(self, original: OpenedModel) -> None:
        """Raises ValueError if this compressed model was made from other weights than those of `original`."""
        made_from = read_config(self.directory)["original"].get("fingerprint")
        if made_from is None:
            log.warning("%s does not say from which weights it was made, so %s may be others", self, original)
        elif fingerprint(str(original.directory)) != made_from:
            raise ValueError(
                f"{original} is not the original that {self} was made from: its weights or its config.json are others. "
                "Pass a directory that holds the original with --model.name_or_path"
            )

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """The tokenizer beside the weights; None if there is none, as in a packed model that was saved alone."""
        try:
            return tokenizer_of(str(self.directory), trust_remote_code=self.trust_remote_code)
        except (OSError, ValueError):
            return None

    def __str__(self) -> str:
        is_short = is_bundled(self.name) or self.name == str(self.directory)
        return self.name if is_short else f"{self.name} ({self.directory})"

    @property
    def size_bytes(self) -> int:
        """Total size of the weight files."""
        return size_of(self.directory) if self.is_compressed else self.weights.files.size_bytes

    @cached_property
    def weights(self) -> CompressedWeights | Checkpoint:
        """The weights on disk; compressed weights are decoded as they are read."""
        if self.is_compressed:
            return CompressedWeights(self.directory, self.dtype)
        return Checkpoint(self.name, self.dtype, self.trust_remote_code)

    def streamed(self, device: torch.device | str = "cpu") -> StreamedModel:
        """The model with one block at a time in memory."""
        return StreamedModel(self.weights, device)

    def in_memory(self) -> MoEModel:
        """The whole model, with compressed or quantized weights decoded."""
        if self.is_compressed:
            return MoEModel(load(self.directory, self.dtype, packed=False))
        moe = self.streamed()
        moe.load_all()
        return MoEModel(moe.model)


def open_model(
    name_or_path: str | Path, dtype: str = "auto", option: str = "--model", trust_remote_code: bool = False
) -> OpenedModel:
    """Locates a model and checks that this version can read it.

    Args:
        name_or_path: a run directory, a compressed directory or an original (`bundled`, a directory or a hub id).
        dtype: dtype to load it in: `auto`, `float32`, `bfloat16` or `float16`.
        option: the command-line option that errors name.
        trust_remote_code: whether Python code beside the original may run (`models.originals.read_config`).

    Raises:
        FileNotFoundError: there is no such model, or the run is not finished.
        ValueError: a newer version of this package wrote the model.
    """
    path = Path(name_or_path)
    if (path / "run.json").exists() and not is_compressed(path / "compressed"):
        raise FileNotFoundError(
            f"the run in {path} ({option}) has no compressed model yet: finish it with `fit --ckpt_path auto`, or pass "
            f"another directory with {option}"
        )
    directory = next((place for place in (path / "compressed", path) if is_compressed(place)), None)
    if directory is not None:
        config = read_config(directory)  # raises if the format is newer than this package
        if trust_remote_code:
            trust_code(directory, config)
        return OpenedModel(str(name_or_path), directory, True, dtype, trust_remote_code)
    return OpenedModel(str(name_or_path), local_directory(str(name_or_path), option), False, dtype, trust_remote_code)


def open_compressed(
    path: str | Path, dtype: str = "auto", option: str = "--source", trust_remote_code: bool = False
) -> OpenedModel:
    """Opens a model that must be compressed; arguments as in `open_model`.

    Raises:
        FileNotFoundError: there is no compressed model, or the run is not finished.
        ValueError: a newer version of this package wrote the model.
    """
    root = Path(path)
    if not any(is_compressed(place) for place in (root / "compressed", root)) and not (root / "run.json").exists():
        raise FileNotFoundError(
            f"{path} ({option}) is neither a run directory nor a compressed directory of eacmoe-lightning"
        )
    return open_model(path, dtype, option, trust_remote_code)
