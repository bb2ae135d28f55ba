"""The losses of the two stages that train quantized weights.

reconstruction  block stage: the block's output beside the original block's (BRECQ, arXiv 2102.05426)
distillation    joint stage: KL(original || compressed) of the next-token distributions
selection       both: the router loss, beside the other
"""

from __future__ import annotations

from torch import Tensor, nn

from eacmoe_lightning.routers.losses import RouterLoss


def reconstruction(output: Tensor, target: Tensor, unit: float) -> Tensor:
    """Mean squared difference of hidden states [B, T, ...] in units of `unit` -> [B, T], float32.

    Args:
        output: the compressed block's output.
        target: the original block's output in the original's own stream.
        unit: the mean square of what the original block adds to its input.
    """
    return (output.float() - target.float()).square().flatten(2).mean(-1) / unit


def distillation(logits: Tensor, target: Tensor) -> Tensor:
    """KL(original || compressed) in nats: logits [..., V], the original's log-probabilities [..., V] -> [...]."""
    log_probabilities = logits.float().log_softmax(-1)
    return nn.functional.kl_div(log_probabilities, target, reduction="none", log_target=True).sum(-1)


def selection(student: Tensor, teacher: Tensor, loss: RouterLoss, top_k: int) -> Tensor:
    """The router loss of a block: logits [N, E] of both routers and experts per token -> [N].

    The logits are divided by the standard deviation of the original's, because their size differs between models and
    blocks.
    """
    spread = teacher.std(unbiased=False).clamp(min=1e-6)
    return loss(student / spread, teacher / spread, top_k)
