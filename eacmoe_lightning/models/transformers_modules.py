"""What this package takes from inside transformers' models: experts, routers, attention, the cache's name.

Together with `transformers_loader.py`, whose table says what differs between versions.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import fields
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, _default_apply_gate
from transformers.modeling_outputs import MoeModelOutputWithPast

SKIPS_PAIRS = "_is_expert_parallel"  # set on experts: ids of E occur, and their pairs are to be skipped
CACHE = next(field.name for field in fields(MoeModelOutputWithPast) if field.name in ("cache", "past_key_values"))
BATCHES = "init_continuous_batching"  # the method of a model by which continuous batching begins
_ROUTES = "route_tokens_to_experts"
_READS_ROUTER_WEIGHT = ("DeepseekV2Moe", "DeepseekOcr2TextMoe")  # until 5.12: they never call their router

# --- experts -------------------------------------------------------------------------------------------------


def has_default_gate(experts: nn.Module) -> bool:
    """Whether the experts compute act(gate) * up, rather than something else of their model's.

    Experts that were brought into the common form say so themselves (`has_standard_gate`).
    """
    apply_gate = getattr(type(experts), "_apply_gate", None)
    return apply_gate is _default_apply_gate or getattr(experts, "has_standard_gate", False)


def experts_implementation(experts: nn.Module) -> str | None:
    """`eager`, `grouped_mm`, `batched_mm` and so on; None for experts that have no choice of it."""
    return getattr(getattr(experts, "config", None), "_experts_implementation", None)


def is_eager(experts: nn.Module) -> bool:
    """Whether experts are run one after another, which makes the host wait for the device in any case."""
    return experts_implementation(experts) == "eager"


def run_experts(implementation: str, experts: nn.Module, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """(x [N, D], ids [N, K], weights [N, K]) -> [N, D] with an implementation other than `eager`; skips ids of E."""
    weights = weights.masked_fill(ids >= experts.num_experts, 0)  # `batched_mm` computes a skipped pair all the same
    setattr(experts, SKIPS_PAIRS, True)
    try:
        return ALL_EXPERTS_FUNCTIONS[implementation](experts, x, ids, weights)
    finally:
        setattr(experts, SKIPS_PAIRS, False)


def eager_experts(experts: nn.Module, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """The same, one expert after another.

    Pairs with an id of E go to an expert that runs anyway, with weight 0: not every version's loop skips them.
    """
    skipped = ids >= experts.num_experts
    if skipped.any():
        if skipped.all():
            return torch.zeros_like(x)
        ids, weights = torch.where(skipped, ids[~skipped][0], ids), weights.masked_fill(skipped, 0)
    return type(experts).forward.__wrapped__(experts, x, ids, weights)


def post_expert_norm(experts: nn.Module) -> nn.Module | None:
    """The norm that each expert's output goes through, in models that have one."""
    return experts.post_expert_norm if getattr(experts, "has_post_expert_norm", False) else None


# --- routers -------------------------------------------------------------------------------------------------


def select_in_router(moe: nn.Module, name: str) -> None:
    """Makes a router return (logits [N, E], weights [N, K], ids [N, K]), as all routers do from 5.13 on. Idempotent.

    Before, a router returned logits, and the module around it chose the experts. Both take part here as they are: the
    router calls that module's choice, and the module takes what the router returns, which a hook may have changed.

    Args:
        moe: the module that holds the router.
        name: of the router in it.
    """
    if not hasattr(moe, _ROUTES) or _ROUTES in vars(moe):
        return
    router = moe.get_submodule(name)
    if type(moe).__name__ in _READS_ROUTER_WEIGHT:
        router.forward = partial(_select_from_weight, router, moe)
        moe.forward = partial(_forward_with_router, moe, router)
    else:
        router.forward = partial(_select, router, moe)
    setattr(moe, _ROUTES, _selected)


def _select(router: nn.Module, moe: nn.Module, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    hidden = hidden.reshape(1, -1, hidden.shape[-1])
    logits = type(router).forward(router, hidden)
    logits = logits.reshape(-1, logits.shape[-1])
    choose = getattr(type(moe), _ROUTES)
    takes_hidden = len(inspect.signature(choose).parameters) == 3  # Jamba's
    ids, weights = choose(moe, *((hidden[0], logits) if takes_hidden else (logits,)))
    return logits, weights, ids


def _select_from_weight(router: nn.Module, moe: nn.Module, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    logits = nn.functional.linear(hidden.reshape(-1, hidden.shape[-1]).float(), router.weight.float())
    ids, weights = getattr(type(moe), _ROUTES)(moe, logits[None])
    return logits, weights, ids


def _selected(*args: Any) -> tuple[Tensor, Tensor]:
    """In the place of a module's own choice: (ids, weights) that the router has returned already."""
    _, weights, ids = args[-1]
    return ids, weights


def _forward_with_router(moe: nn.Module, router: nn.Module, hidden: Tensor) -> Tensor:
    """The forward pass of `_READS_ROUTER_WEIGHT`, by way of the router."""
    _, weights, ids = router(hidden)
    routed = moe.experts(hidden.view(-1, hidden.shape[-1]), ids, weights)
    return routed.view(hidden.shape) + moe.shared_experts(hidden)


# --- attention -----------------------------------------------------------------------------------------------


def attention_children(layer: nn.Module) -> list[nn.Module]:
    """The children of a layer that compute attention weights, and return them where attention is eager.

    Linear attention, convolutions and state-space layers have no weights for pairs of tokens, nor this attribute.
    """
    return [child for child in layer.children() if hasattr(child, "is_causal")]


# --- the cache of keys and values ----------------------------------------------------------------------------


def cache_of(arguments: Mapping[str, Any]) -> Any:
    """The cache among a decoder's arguments, by its present or its former name; None if there is none."""
    return arguments.get(CACHE) if arguments.get(CACHE) is not None else arguments.get("past_key_values")


def is_paged(cache: Any) -> bool:
    """Whether a cache is that of continuous batching: a row then holds tokens of several requests."""
    return cache is not None and not hasattr(cache, "get_seq_length")
