"""The joint stage: the losses that routers, norms, scales and codes are trained on together, and how to train codes.

The stage is this project's addition; the paper's QESC ends with the last block. The loss is KL(original || compressed)
of the next-token distributions plus the router loss of every block.

Codes are integers. So each code is trained through its `position` on the axis of codes, a number within half a step of
the code at the start: the code is the rounded position, and gradients ignore the rounding (straight-through estimator,
Bengio et al., arXiv 1308.3432). A position starts at the original weight, or as near to it as the code allows. So the
codes closest to a rounding boundary change first, and a code that GPTQ moved away from its weight starts at the
boundary on the weight's side.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from eacmoe_lightning.quantization.quantizers import QuantizedWeight
from eacmoe_lightning.routers.losses import RouterLoss

MARGIN = 0.499  # largest distance in steps between a code and its position at the start


class StraightThrough(torch.autograd.Function):
    """Returns `rounded` and passes its gradient to `value` unchanged."""

    @staticmethod
    def forward(ctx, value: Tensor, rounded: Tensor) -> Tensor:
        return rounded

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def start_positions(weight: Tensor, quantized: QuantizedWeight) -> Tensor:
    """Positions [..., O, I] of the original weights, clamped to within `MARGIN` of their codes; float32."""
    position, codes = quantized.positions(weight), quantized.codes.float()
    return torch.minimum(torch.maximum(position, codes - MARGIN), codes + MARGIN)


def decode(quantized: QuantizedWeight, scale: Tensor | None, position: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The weights [..., O, I] decoded from trained scales [..., O, G] and positions [..., O, I], differentiable.

    None means the stored scales or codes.
    """
    if scale is not None:
        scale = StraightThrough.apply(scale, scale.detach().half().float())  # float16, as stored
    codes = None if position is None else StraightThrough.apply(position, quantized.nearest(position.detach()))
    return quantized.dequantize(dtype, scale, codes)


def distillation(logits: Tensor, target: Tensor) -> Tensor:
    """KL(original || compressed) in nats: logits [..., V], the original's log-probabilities [..., V] -> [...]."""
    log_probabilities = logits.float().log_softmax(-1)
    return nn.functional.kl_div(log_probabilities, target, reduction="none", log_target=True).sum(-1)


def selection(
    students: Mapping[int, Tensor], teachers: Mapping[int, Tensor], loss: RouterLoss, top_k: Mapping[int, int]
) -> Tensor:
    """The mean router loss over blocks: logits [N, E] and experts per token by block -> [N].

    Each block's logits are divided by the standard deviation of the original's, because their size differs between
    models and blocks.
    """
    losses = []
    for i, teacher in teachers.items():
        spread = teacher.std(unbiased=False).clamp(min=1e-6)
        losses.append(loss(students[i] / spread, teacher / spread, top_k[i]))
    return torch.stack(losses).mean(0)
