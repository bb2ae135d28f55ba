"""A causal LM of which embedding, head and one block are in memory: the blocks come from disk when they are needed."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from eacmoe_lightning.adapter import MoEModel
from eacmoe_lightning.memory import return_free_memory
from eacmoe_lightning.models.transformers_loader import tie
from eacmoe_lightning.store import StoreError
from eacmoe_lightning.streaming.checkpoint import put


class Weights(Protocol):
    """Where a model's weights come from: an original (`Checkpoint`), a run's blocks, a compressed directory.

    `str` of it says which, for error messages.
    """

    def skeleton(self) -> PreTrainedModel:
        """The model in eval mode, its buffers in host memory and its parameters on the meta device."""

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Parameters and persistent buffers by their names in the model; those that it does not hold are left out."""

    def prefetch(self, names: Iterable[str]) -> None:
        """Says what will be read next, so that it may be brought closer in the background."""


class StreamedModel(MoEModel):
    """An MoE whose blocks are in memory between `load` and `release` only.

    Args:
        weights: where they come from.
        device: on which the model runs.

    Raises:
        StoreError: weights are missing.
        ValueError: the model is none that `MoEModel` takes.
    """

    def __init__(self, weights: Weights, device: torch.device | str = "cpu") -> None:
        super().__init__(weights.skeleton())
        self.weights, self._device = weights, torch.device(device)
        self._loaded: set[int] = set()
        for name, buffer in list(self.model.named_buffers()):
            put(self.model, name, buffer.to(self._device))
        in_blocks = {name for block in self.blocks for name in self._names(block.index)}
        rest = [name for name in self.model.state_dict() if name not in in_blocks]
        missing = set(rest) - self._fill(rest)
        tie(self.model, missing)
        state = self.model.state_dict()
        self._check([name for name in missing if state[name].is_meta])

    @property
    def device(self) -> torch.device:
        return self._device

    def load(self, index: int) -> None:
        if index in self._loaded:
            return
        names = self._names(index)
        self._check(set(names) - self._fill(names))
        self._loaded.add(index)
        if index + 1 < len(self.blocks):
            self.weights.prefetch(self._names(index + 1))

    def load_all(self) -> None:
        """Brings the whole model into memory, for what cannot be done block by block."""
        for block in self.blocks:
            self.load(block.index)

    def release(self, index: int) -> None:
        self._loaded.discard(index)
        block = self.blocks[index]
        for name, parameter in list(block.layer.named_parameters()):
            put(block.layer, name, parameter.detach().to("meta"))
        return_free_memory()

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        return {name: tensor.to(self._device) for name, tensor in self.weights.read(list(names)).items()}

    def _names(self, index: int) -> list[str]:
        block = self.blocks[index]
        return [f"{block.name}.{name}" for name in block.layer.state_dict()]

    def _fill(self, names: list[str]) -> set[str]:
        """Puts what there is of these weights in place; which it was."""
        tensors = self.read(names)
        for name, tensor in tensors.items():
            put(self.model, name, tensor)
        return set(tensors)

    def _check(self, missing: Iterable[str]) -> None:
        if missing := sorted(missing):
            raise StoreError(
                f"{missing[0]} and {len(missing) - 1} other weights are missing from the files of {self.weights}: they "
                "do not fit its config.json, or a file is missing"
            )
