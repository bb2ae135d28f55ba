"""The weights that a router would give to experts it did not choose: for the split of the damage."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


def forced_weights(router: nn.Module, logits: Tensor, weights: Tensor, ids: Tensor, forced: Tensor) -> Tensor:
    """The weights [N, K] this router would give to `forced` [N, K], from its own logits [N, E].

    How a router turns scores into weights is recognised by what it does: the rule that reproduces the
    weights of its own choice is applied to the forced one.

    Raises:
        ValueError: no known rule reproduces the router's weights.
    """
    return weight_rule(router, logits, weights, ids)(logits, forced)


def weight_rule(router: nn.Module, logits: Tensor, weights: Tensor, ids: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """The rule itself: (logits [N, E], ids [N, K]) -> weights [N, K].

    Raises:
        ValueError: no known rule reproduces the router's weights.
    """
    for rule in _WEIGHT_RULES:
        own = rule(router, logits.float(), ids)
        scale = (weights.float().sum() / own.sum()).item()
        if torch.allclose(
            own * scale, weights.float(), rtol=2e-2 if weights.dtype != torch.float32 else 1e-4, atol=1e-5
        ):
            return lambda logits, ids: (rule(router, logits.float(), ids) * scale).to(weights.dtype)
    raise ValueError(f"{type(router).__name__}: how it weighs the selected experts is unknown, so none can be forced")


def _softmax(router, logits: Tensor, ids: Tensor) -> Tensor:
    return logits.softmax(-1).gather(1, ids)


def _softmax_of_selected(router, logits: Tensor, ids: Tensor) -> Tensor:
    return logits.gather(1, ids).softmax(-1)


def _sigmoid(router, logits: Tensor, ids: Tensor) -> Tensor:
    return logits.sigmoid().gather(1, ids)


def _sigmoid_normalised(router, logits: Tensor, ids: Tensor) -> Tensor:
    scores = _sigmoid(router, logits, ids)
    return scores / scores.sum(-1, keepdim=True)


def _sparsemixer(router, logits: Tensor, ids: Tensor) -> Tensor:
    """Phi-3.5-MoE at inference: each expert's softmax over the scores near the maximum of what is left."""
    jitter = getattr(router, "router_jitter_noise", 0.01)
    columns, left = [], logits
    for k in range(ids.shape[1]):
        chosen = ids[:, k : k + 1]
        top = left.max(-1, keepdim=True).values
        far = (top - left) / logits.abs().clamp(min=top) > 2 * jitter
        far = far.scatter(1, chosen, False)  # a forced expert always counts
        columns.append(left.masked_fill(far, -torch.inf).softmax(-1).gather(1, chosen))
        left = left.scatter(1, chosen, -torch.inf)
    return torch.cat(columns, 1)


_WEIGHT_RULES = (_softmax_of_selected, _softmax, _sigmoid_normalised, _sigmoid, _sparsemixer)
