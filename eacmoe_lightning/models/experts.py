"""The routed experts of a block: their weights one by one, and the groups that they may be in.

Letters: N tokens, D hidden, F expert width, E experts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from eacmoe_lightning.models.transformers_modules import post_expert_norm

if TYPE_CHECKING:
    from eacmoe_lightning.models.block import Block


@dataclass
class Experts:
    """The routed experts of one block as 2-D problems: views that write through to the model."""

    module: nn.Module

    @property
    def num_experts(self) -> int:
        return self.module.down_proj.shape[0]

    @property
    def up_name(self) -> str:
        return "gate_up_proj" if self.module.has_gate else "up_proj"

    @property
    def projections(self) -> tuple[str, str]:
        """The two weights in the order in which they are applied."""
        return self.up_name, "down_proj"

    def weight(self, projection: str) -> Tensor:
        """[E, O, I] view of `gate_up_proj`, `up_proj` or `down_proj`."""
        weight = getattr(self.module, projection)
        return weight.transpose(1, 2) if self.module.is_transposed else weight

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """(O, I) of each projection of an expert."""
        return [tuple(self.weight(projection).shape[1:]) for projection in self.projections]

    def bias(self, projection: str, expert: int) -> Tensor | None:
        return getattr(self.module, f"{projection}_bias")[expert] if self.module.has_bias else None

    def intermediate(self, x: Tensor, expert: int, up: Tensor | None = None) -> Tensor:
        """The input of `down_proj`: [n, D] -> [n, F] (gate, up and activation of one expert).

        `up` [O, D] replaces the expert's weight.
        """
        up = self.weight(self.up_name)[expert] if up is None else up
        h = nn.functional.linear(x, up, self.bias(self.up_name, expert))
        return self.module._apply_gate(h) if self.module.has_gate else self.module.act_fn(h)

    def output(self, x: Tensor, expert: int, up: Tensor | None = None, down: Tensor | None = None) -> Tensor:
        """One expert: [n, D] -> [n, D]. `up` [O, D] and `down` [D, F] replace its weights."""
        h = self.intermediate(x, expert, up)
        down = self.weight("down_proj")[expert] if down is None else down
        y = nn.functional.linear(h, down, self.bias("down_proj", expert))
        norm = post_expert_norm(self.module)
        return y if norm is None else norm(y)


def run_by_expert(
    x: Tensor, ids: Tensor, weights: Tensor, num_experts: int, expert: Callable[[int, Tensor], Tensor]
) -> Tensor:
    """[N, D] -> [N, D]: `expert(e, rows)` on the tokens of each expert, summed by weight in float32; to be trained.

    Tokens are gathered once, so that the backward pass of an expert touches its own rows alone. All sums have a fixed
    order, so that two runs give the same bits.

    Args:
        x: [N, D].
        ids: [N, K], the experts of each token; a pair with an id beyond them computes nothing.
        weights: [N, K].
    """
    top_k, pairs = ids.shape[1], ids.flatten()
    order = pairs.argsort(stable=True)
    counts = torch.bincount(pairs.clamp(max=num_experts), minlength=num_experts + 1).tolist()
    rows = x.unsqueeze(1).expand(-1, top_k, -1).flatten(0, 1).index_select(0, order).split(counts)
    outputs = [expert(e, part) for e, part in enumerate(rows[:-1]) if len(part)]
    by_pair = torch.cat([*outputs, torch.zeros_like(rows[-1])]).index_select(0, order.argsort())
    return (by_pair.view(-1, top_k, x.shape[-1]).float() * weights.unsqueeze(-1).float()).sum(1).to(x.dtype)


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
            for module in block.counting_modules()
            for name, value in vars(module).items()
            if "group" in name and type(value) is int
        ]
        number = max((value for name, value in options if "top" not in name), default=1)
        return cls(number, max((value for name, value in options if "top" in name), default=1))

    def least(self, top_k: int) -> int:
        """Experts that each group needs: together, the chosen groups need top_k; each needs 2, which rank the group."""
        return 1 if self.number == 1 else max(2, -(-top_k // self.chosen))


def counts_experts(name: str) -> bool:
    """Whether an attribute or option with this name is a number of routed experts."""
    return "experts" in name and not any(word in name for word in ("shared", "per_tok", "top", "_k"))
