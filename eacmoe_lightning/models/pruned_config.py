"""The config of a model with removed experts."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedConfig

from eacmoe_lightning.models.experts import counts_experts
from eacmoe_lightning.models.shrink import KEPT
from eacmoe_lightning.models.transformers_loader import auto_class

if TYPE_CHECKING:
    from eacmoe_lightning.models.moe import MoEModel


def pruned_config(config: PreTrainedConfig, moe: MoEModel) -> PreTrainedConfig:
    """The original's config for a model with removed experts.

    `kept_experts` lists the experts of each block. If all blocks have the same number of experts, that number replaces
    the original's in every option that counts experts, and any program builds the right shapes from the config. If the
    numbers differ, or if the replaced options do not give the shapes of `moe`, the original's numbers stay and a loader
    must shrink the blocks to `kept_experts`, as `MoEModel` does.
    """
    if not moe.is_pruned:
        return config
    config = copy.deepcopy(config)
    text = config.get_text_config()
    setattr(text, KEPT, {str(block.index): block.kept.tolist() for block in moe.moe_blocks})
    numbers = {block.num_experts for block in moe.moe_blocks}
    if len(numbers) > 1:
        return config
    uniform = copy.deepcopy(config)
    for name, value in _numbers_of_experts(text):
        if value != moe.num_experts:
            setattr(uniform.get_text_config(), name, moe.num_experts)
    return uniform if has_shapes_of(uniform, moe) else config


def _numbers_of_experts(config: PreTrainedConfig) -> Iterator[tuple[str, Any]]:
    for name, value in config.to_dict().items():
        if type(value) is int and counts_experts(name):
            yield name, value


def has_shapes_of(config: PreTrainedConfig, moe: MoEModel) -> bool:
    """Whether a model built from this config alone has the parameters of `moe`."""
    with torch.device("meta"):
        skeleton = auto_class(config).from_config(config)
    shapes = {name: tensor.shape for name, tensor in moe.model.state_dict().items()}
    return shapes == {name: tensor.shape for name, tensor in skeleton.state_dict().items()}
