"""A causal LM with only its embedding, its head and one block in memory: each block is read when it is needed."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from eacmoe_lightning.models.checkpoint import put
from eacmoe_lightning.models.moe import MoEModel
from eacmoe_lightning.models.transformers_loader import tie
from eacmoe_lightning.run.files import StoreError, first_of
from eacmoe_lightning.run.memory import return_free_memory


class Weights(Protocol):
    """A source of a model's weights: an original (`Checkpoint`), a run's blocks or a compressed directory.

    Its `str` names it in error messages. Compressed weights have `unquantized`, as `MoEModel.leave` takes it.
    """

    def skeleton(self) -> PreTrainedModel:
        """The model in eval mode, with buffers in host memory and parameters on the meta device."""

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Parameters and persistent buffers by name in the model; those that it does not have are left out."""

    def prefetch(self, names: Iterable[str]) -> None:
        """Announces the next read, so that it may start in the background."""


class StreamedModel(MoEModel):
    """An MoE whose blocks are in memory only between `load` and `release`.

    Args:
        weights: the source of the weights.
        device: the device that the model runs on.

    Raises:
        StoreError: weights are missing.
        ValueError: `MoEModel` does not accept the model.
    """

    def __init__(self, weights: Weights, device: torch.device | str = "cpu") -> None:
        super().__init__(weights.skeleton())
        self.leave(getattr(weights, "unquantized", {}))
        self.weights, self._device = weights, torch.device(device)
        self._loaded: set[int] = set()
        self._stored_as: dict[str, str] = {}  # tied parameters that the source has by their other name alone
        for name, buffer in list(self.model.named_buffers()):
            put(self.model, name, buffer.to(self._device))
        in_blocks = {name for block in self.blocks for name in self._names(block.index)}
        outside_blocks = [name for name in self.model.state_dict() if name not in in_blocks]
        missing = set(outside_blocks) - self._fill(outside_blocks)
        tie(self.model, missing)
        state = self.model.state_dict(keep_vars=True)
        stored = {id(state[name]): name for name in outside_blocks if name not in missing}
        self._stored_as = {name: stored[id(state[name])] for name in missing if id(state[name]) in stored}
        self._check([name for name in missing if state[name].is_meta])

    @property
    def device(self) -> torch.device:
        return self._device

    def load(self, index: int, without: Collection[str] = ()) -> None:
        """Reads a block's weights but for `without`, by name in the model."""
        if index in self._loaded:
            return
        names = [name for name in self._names(index) if name not in without]
        self._check(set(names) - self._fill(names))
        self._loaded.add(index)
        if index + 1 < len(self.blocks):
            self.weights.prefetch(self._names(index + 1))

    def load_all(self) -> None:
        """Brings the whole model into memory, for work that cannot be done block by block."""
        for block in self.blocks:
            self.load(block.index)

    def release(self, index: int) -> None:
        self._loaded.discard(index)
        block = self.blocks[index]
        for name, parameter in list(block.layer.named_parameters()):
            put(block.layer, name, parameter.detach().to("meta"))
        return_free_memory()

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        stored_as = {name: self._stored_as.get(name, name) for name in names}
        tensors = self.weights.read(list(dict.fromkeys(stored_as.values())))
        return {name: tensors[key].to(self._device) for name, key in stored_as.items() if key in tensors}

    def _names(self, index: int) -> list[str]:
        block = self.blocks[index]
        return [f"{block.name}.{name}" for name in block.layer.state_dict()]

    def _fill(self, names: list[str]) -> set[str]:
        """Reads these weights into the model, and returns the names of those that the source has."""
        tensors = self.read(names)
        for name, tensor in tensors.items():
            put(self.model, name, tensor)
        return set(tensors)

    def _check(self, missing: Iterable[str]) -> None:
        if missing := sorted(missing):
            head, parameters = self.model.get_output_embeddings(), self.model.named_parameters()
            is_head = [name for name, parameter in parameters if head and parameter is head.weight] == missing
            tied = '; if its embedding is also its head, write "tie_word_embeddings": true there' if is_head else ""
            raise StoreError(
                f"the files of {self.weights} lack {first_of(missing, 'weight')}: they do not fit its config.json, or "
                f"a file is missing{tied}"
            )
