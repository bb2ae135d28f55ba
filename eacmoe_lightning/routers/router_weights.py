"""The weights that a router would give to experts that it did not select.

`--model.split_damage` needs them to run the original's selections on the compressed model, and the skipping rules to
weight rerouted experts.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


def forced_weights(router: nn.Module, logits: Tensor, weights: Tensor, ids: Tensor, forced: Tensor) -> Tensor:
    """The weights [N, K] that this router would give to the experts `forced` [N, K].

    Routers differ in how they turn logits into weights. The rule that reproduces the `weights` of the selected `ids` is
    applied to the forced experts.

    Args:
        router: the module whose rule is looked for.
        logits: [N, E] of the router.
        weights, ids: [N, K], the router's selection.
        forced: [N, K], the experts to weight.

    Raises:
        ValueError: no known rule reproduces the router's weights.
    """
    return weight_rule(router, logits, weights, ids)(logits, forced)


def weight_rule(router: nn.Module, logits: Tensor, weights: Tensor, ids: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """The rule that turns a router's logits into weights: (logits [N, E], ids [N, K]) -> weights [N, K].

    Raises:
        ValueError: no known rule reproduces the router's weights.
    """
    for rule in _WEIGHT_RULES:
        candidate = rule(router, logits.float(), ids)
        scale = (weights.float().sum() / candidate.sum()).item()
        rtol = 2e-2 if weights.dtype != torch.float32 else 1e-4
        if torch.allclose(candidate * scale, weights.float(), rtol=rtol, atol=1e-5):
            return lambda logits, ids: (rule(router, logits.float(), ids) * scale).to(weights.dtype)
    raise ValueError(
        f"{type(router).__name__}: no known rule reproduces the weights of its selected experts, so experts cannot be "
        "forced on it"
    )


def _softmax(router, logits: Tensor, ids: Tensor) -> Tensor:
    return logits.softmax(-1).gather(1, ids)


def _softmax_of_selected(router, logits: Tensor, ids: Tensor) -> Tensor:
    weights, factors = logits.gather(1, ids).softmax(-1), getattr(router, "per_expert_scale", None)  # Gemma 4's
    return weights if factors is None else weights * factors.detach().float()[ids]


def _sigmoid(router, logits: Tensor, ids: Tensor) -> Tensor:
    return logits.sigmoid().gather(1, ids)


def _sigmoid_normalised(router, logits: Tensor, ids: Tensor) -> Tensor:
    scores = _sigmoid(router, logits, ids)
    return scores / scores.sum(-1, keepdim=True)


def _sqrt_softplus_normalised(router, logits: Tensor, ids: Tensor) -> Tensor:
    """DeepSeek-V4."""
    scores = nn.functional.softplus(logits).sqrt().gather(1, ids)
    return scores / scores.sum(-1, keepdim=True)


def _sparsemixer(router, logits: Tensor, ids: Tensor) -> Tensor:
    """Phi-3.5-MoE at inference: each expert's softmax over the scores near the maximum of the remaining ones."""
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


_WEIGHT_RULES = (
    _softmax_of_selected,
    _softmax,
    _sigmoid_normalised,
    _sigmoid,
    _sqrt_softplus_normalised,
    _sparsemixer,
)
