"""Removes experts from a block: everything with one entry per expert shrinks together.

These are recognized by shape: the experts' weights and biases, the router's rows and biases, and a correction bias in
any module, [E] or [1, E]. The attributes in which the modules store their number of experts change, too.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from transformers import PreTrainedConfig

from eacmoe_lightning.models.block import Block
from eacmoe_lightning.models.experts import counts_experts

KEPT = "kept_experts"  # option of a pruned model's config: by block, the original numbers of its experts


def keep_experts(block: Block, kept: Sequence[int]) -> None:
    """Removes all experts of a block except `kept`, their original numbers in the original's order. Idempotent.

    A block that already has this many experts is assumed to have these.
    """
    num_experts, kept = block.num_experts, list(kept)
    block.kept = torch.tensor(kept)
    if len(kept) == num_experts:
        return
    for module in block.counting_modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if (dim := _counts(parameter, num_experts)) is not None:
                rows = parameter.detach().index_select(dim, block.kept.to(parameter.device))
                setattr(module, name, nn.Parameter(rows, parameter.requires_grad))
        for name, buffer in list(module.named_buffers(recurse=False)):
            if (dim := _counts(buffer, num_experts)) is not None:
                setattr(module, name, buffer.index_select(dim, block.kept.to(buffer.device)))
        for name, value in list(vars(module).items()):
            if value == num_experts and type(value) is int and (counts_experts(name) or name == "out_features"):
                setattr(module, name, len(kept))


def kept_part(blocks: Sequence[Block], name: str, tensor: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """A tensor of the original; if it has an entry per expert, the entries of the experts that a block has kept.

    Args:
        blocks: with experts.
        name: the tensor's.
        tensor: as the original has it.
        shape: that of the pruned model's.
    """
    differs = [dim for dim, size in enumerate(shape) if tensor.shape[dim] != size]
    if not differs:
        return tensor
    block = next(block for block in blocks if name.startswith(f"{block.name}."))
    return tensor.index_select(differs[0], block.kept)


def has_table(block: Block) -> bool:
    """Whether the router looks experts up in a table [V, K] of token ids, as in DeepSeek-V4's first blocks.

    Without some of the experts, such a table has no answer for the tokens that it sends to them.
    """
    return any(
        buffer.ndim == 2 and buffer.shape[1] == block.top_k and not buffer.is_floating_point()
        for buffer in block.router.buffers()
    )


def _counts(tensor: torch.Tensor, num_experts: int) -> int | None:
    """The dimension that counts experts, the first one or that of a single row; None if there is none."""
    if tensor.ndim and len(tensor) == num_experts:
        return 0
    return 1 if tensor.shape == (1, num_experts) else None


def shrink_as_pruned(config: PreTrainedConfig, blocks: list[Block]) -> None:
    """Removes the experts that the config of a pruned model does not list in `kept_experts`."""
    for index, kept in getattr(config, KEPT, {}).items():
        keep_experts(blocks[int(index)], kept)
