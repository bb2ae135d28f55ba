"""The joint stage: what routers, norms, scales and codes are trained for together, and how codes are trained at all.

It is this project's own; the paper's QESC ends with the last block. The loss is KL(original || compressed) of the
next-token distributions, with the router loss of every block beside it.

Codes are integers, so each of them is trained through its `position` on the axis of codes, a number within half a step
of it: the code is the rounded position, and gradients pass the rounding as if it were not there (straight-through
estimator, Bengio et al., arXiv 1308.3432). A position starts where the original weight lies, as far as its code allows.
So the codes that GPTQ decided by a hair move first, and one that it moved away from its weight leans back towards it.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from eacmoe_lightning.quantization.quantizers import QuantizedWeight
from eacmoe_lightning.routers.losses import RouterLoss

MARGIN = 0.499  # steps; how far from its code a position may start


class StraightThrough(torch.autograd.Function):
    """The second argument, with the gradient that it has given to the first."""

    @staticmethod
    def forward(ctx, value: Tensor, rounded: Tensor) -> Tensor:
        return rounded

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def start_positions(weight: Tensor, quantized: QuantizedWeight) -> Tensor:
    """Where the original weights [..., O, I] lie on the axis of codes, at most `MARGIN` from their codes; float32."""
    position, codes = quantized.positions(weight), quantized.codes.float()
    return torch.minimum(torch.maximum(position, codes - MARGIN), codes + MARGIN)


def decode(quantized: QuantizedWeight, scale: Tensor | None, position: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The weights [..., O, I] that trained scales [..., O, G] and positions [..., O, I] make, differentiable.

    None: the scales or codes as they are stored.
    """
    if scale is not None:
        scale = StraightThrough.apply(scale, scale.detach().half().float())  # as it will be stored
    codes = None if position is None else StraightThrough.apply(position, quantized.nearest(position.detach()))
    return quantized.dequantize(dtype, scale, codes)


def distillation(logits: Tensor, target: Tensor) -> Tensor:
    """KL(original || compressed) in nats: logits [..., V], the original's log-probabilities [..., V] -> [...]."""
    log_probabilities = logits.float().log_softmax(-1)
    return nn.functional.kl_div(log_probabilities, target, reduction="none", log_target=True).sum(-1)


def selection(students: Mapping[int, Tensor], teachers: Mapping[int, Tensor], loss: RouterLoss, top_k: int) -> Tensor:
    """The router loss, mean over the blocks, of logits [N, E] by block -> [N]; in units of the original's spread.

    Logits differ in size between models and blocks.
    """
    losses = []
    for i, teacher in teachers.items():
        spread = teacher.std(unbiased=False).clamp(min=1e-6)
        losses.append(loss(students[i] / spread, teacher / spread, top_k))
    return torch.stack(losses).mean(0)
