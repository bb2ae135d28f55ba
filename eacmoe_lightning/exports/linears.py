"""Where the linears of a checkpoint lie in the weights in memory.

In memory, transformers 5 stacks a block's experts (`model.layers.0.mlp.experts.gate_up_proj` [E, 2F, D]). In most
checkpoints on the hub, each expert has its own linears (`model.layers.0.block_sparse_moe.experts.3.w1.weight`).
`save_pretrained` converts the first into the second; here the same conversion says which rows go where.

Engines that build transformers' modules and then split the stacks (GPTQModel) look for a third kind of name,
`model.layers.0.mlp.experts.3.gate_proj.weight`. These names are called unstacked, and need no conversion: each expert
is a slice of the stack, `gate_proj` is the first half of its rows and `up_proj` the second. In gpt-oss, where the rows
of gate and up alternate, both halves hold rows of both.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from eacmoe_lightning.models.moe import MoEModel
from eacmoe_lightning.models.transformers_loader import made_together, original_names
from eacmoe_lightning.weight_grids import Original, split_projection

WEIGHT = ".weight"
NO_ROW = -1  # in the place of rows of other weights


@dataclass(frozen=True)
class Rows:
    """A linear of a checkpoint as rows of a weight in memory [..., O, I].

    Attributes:
        name: module name in the checkpoint.
        expert: index in the stack; None: the weight is no stack.
        rows: of the weight, or of the expert's.
    """

    name: str
    expert: int | None
    rows: slice

    def of(self, tensor: Tensor) -> Tensor:
        """These rows of one of the weight's tensors [..., O, n], or of the bias of a stack [E, O]."""
        return (tensor if self.expert is None else tensor[self.expert])[self.rows]


def original_of(moe: MoEModel) -> Original:
    """What the rules of formats ask about the original."""
    stacked, model = None, moe.model
    for block in moe.moe_blocks[:1]:
        for name, (part, weight) in block.weights().items():
            if part == "experts":
                stacked = stacked or _not_a_linear(_converted(model, name, weight.shape[:-1]), weight.shape[-2])
    return Original(model.config.model_type, stacked)


def original_linears(model: PreTrainedModel, name: str, shape: Sequence[int]) -> list[Rows]:
    """The linears of the original's checkpoint that a weight in memory is made of.

    Args:
        model: the original; it may be on the meta device.
        name: of the weight in memory.
        shape: [O], or [E, O] of a stack of experts.

    Raises:
        ValueError: the original has no linears for it.
    """
    converted, height = _converted(model, name, shape), shape[-1]
    if other := _not_a_linear(converted, height):
        raise ValueError(f"{other}: the original has this tensor instead of a linear: export with --format dense")
    linears = []
    for original, taken in converted.items():
        expert, first = divmod(int(taken[0]), height)
        rows = slice(first, first + len(taken))
        linears.append(Rows(original.removesuffix(WEIGHT), expert if len(shape) == 2 else None, rows))
    return linears


def unstacked_linears(stack: str, shape: Sequence[int]) -> list[Rows]:
    """The linears of a stack of experts that engines split themselves; shape: [E, O]."""
    (num_experts, out_features), projections = shape, split_projection(stack)
    module, height = stack.rpartition(".")[0], out_features // len(projections)
    return [
        Rows(f"{module}.{expert}.{projection}", expert, slice(i * height, (i + 1) * height))
        for expert in range(num_experts)
        for i, projection in enumerate(projections)
    ]


def _converted(model: PreTrainedModel, name: str, shape: Sequence[int]) -> dict[str, Tensor]:
    """Tensors of the original's checkpoint whose values number the rows of a weight in memory."""
    rows = {name: torch.arange(math.prod(shape)).view(*shape, 1)}
    others = made_together(model, name).items()
    rows |= {other: torch.full((*tensor.shape[:-1], 1), NO_ROW) for other, tensor in others}
    return {key: taken for key, taken in original_names(model, rows).items() if (taken != NO_ROW).all()}


def _not_a_linear(converted: dict[str, Tensor], height: int) -> str | None:
    """The first of these tensors that is not made of successive rows of one weight or expert with `height` rows."""
    for original, taken in converted.items():
        is_linear = taken.ndim == 2 and original.endswith(WEIGHT) and (taken.diff(dim=0) == 1).all()
        if not is_linear or int(taken[0]) // height != int(taken[-1]) // height:
            return original
    return None
