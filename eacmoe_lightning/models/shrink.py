"""Removes experts from a block: everything with one entry per expert shrinks together.

These are recognized by shape: the experts' weights and biases, the router's rows and biases, and a correction bias in
any module. The attributes in which the modules store their number of experts change, too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedConfig

from eacmoe_lightning.models.block import Block

KEPT = "kept_experts"  # option of a pruned model's config: by block, the original numbers of its experts


def keep_experts(block: Block, kept: Sequence[int]) -> None:
    """Removes all experts of a block except `kept`, their original numbers in the original's order. Idempotent.

    A block that already has this many experts is assumed to have these.
    """
    num_experts, kept = block.num_experts, list(kept)
    block.kept = torch.tensor(kept)
    if len(kept) == num_experts:
        return
    for module in _modules(block):
        for name, parameter in list(module.named_parameters(recurse=False)):
            if len(parameter) == num_experts:
                rows = parameter.detach()[block.kept.to(parameter.device)]
                setattr(module, name, nn.Parameter(rows, parameter.requires_grad))
        for name, buffer in list(module.named_buffers(recurse=False)):
            if buffer.ndim and len(buffer) == num_experts:
                setattr(module, name, buffer[block.kept.to(buffer.device)])
        for name, value in list(vars(module).items()):
            if value == num_experts and type(value) is int and (_counts_experts(name) or name == "out_features"):
                setattr(module, name, len(kept))


def _modules(block: Block) -> Iterator[nn.Module]:
    """All modules that may store the number of experts, without shared experts."""
    yield block.layer.get_submodule(block.experts_name.rpartition(".")[0])
    yield from block.router.modules()
    yield block.experts.module


def _counts_experts(name: str) -> bool:
    """Whether an attribute or option with this name is a number of routed experts."""
    return "experts" in name and not any(word in name for word in ("shared", "per_tok", "top", "_k"))


@dataclass(frozen=True)
class Groups:
    """Groups of experts; a token may use only some of them (DeepSeek-V2 and V3).

    Attributes:
        number: number of groups; 1 if the router has no groups.
        chosen: number of groups that a token may use.
    """

    number: int = 1
    chosen: int = 1

    @classmethod
    def of(cls, block: Block) -> Groups:
        options = [
            (name, value)
            for module in _modules(block)
            for name, value in vars(module).items()
            if "group" in name and type(value) is int
        ]
        number = max((value for name, value in options if "top" not in name), default=1)
        return cls(number, max((value for name, value in options if "top" in name), default=1))

    def least(self, top_k: int) -> int:
        """Experts that each group needs: together, the chosen groups need top_k; each needs 2, which rank the group."""
        return 1 if self.number == 1 else max(2, -(-top_k // self.chosen))


def shrink_as_pruned(config: PreTrainedConfig, blocks: list[Block]) -> None:
    """Removes the experts that the config of a pruned model does not list in `kept_experts`."""
    for index, kept in getattr(config, KEPT, {}).items():
        keep_experts(blocks[int(index)], kept)
