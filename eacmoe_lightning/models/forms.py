"""Brings MoE blocks of another build into transformers' common form, and lets other packages do so for their models.

The common form: next to each other in one module lie a *router*, which returns (logits [N, E], weights [N, K],
ids [N, K]), and *experts*, which are called with (hidden [N, D], ids [N, K], weights [N, K]) and have the stacked
weights `gate_up_proj` or `up_proj`, and `down_proj`, with `has_gate`, `has_bias` and `is_transposed` saying how these
are laid out (transformers' `use_experts_implementation` sets them).

A *form* is a function that gives a module of another build this interface, by replacing `forward` of that module and
its children; parameters keep their names. It is registered under the module's class name:

    from eacmoe_lightning.models.forms import register_form

    @register_form("MyMoE")
    def bring_into_form(moe): ...

A package that names the module with this code under the entry point group `eacmoe_lightning.models` is imported before
a model is taken apart. Whatever a form does is checked when a job starts: block by block, the model must still compute
what its own classes compute (`models/self_check.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from importlib.metadata import entry_points

import torch
from torch import Tensor, nn

Form = Callable[[nn.Module], None]
FORMS: dict[str, Form] = {}
GROUP = "eacmoe_lightning.models"


def register_form(class_name: str) -> Callable[[Form], Form]:
    """A decorator: modules of the class with this name are brought into the common form by the decorated function."""

    def register(form: Form) -> Form:
        FORMS[class_name] = form
        return form

    return register


@cache
def load_plugins() -> None:
    """Imports the modules that installed packages list under the entry point group, once."""
    for entry in entry_points(group=GROUP):
        entry.load()


def bring_into_form(layer: nn.Module) -> None:
    """Applies the registered forms to a decoder layer's modules. Idempotent."""
    load_plugins()
    for module in list(layer.modules()):
        if (form := FORMS.get(type(module).__name__)) is not None and "forward" not in vars(module):
            form(module)


@register_form("Llama4TextMoe")
def _llama4(moe: nn.Module) -> None:
    """Llama 4 multiplies the experts' input by the router's score and runs every expert on every token.

    Here only the selected experts run, on the scaled input and with weight 1; the others add exact zeros. Each expert
    of a token has an input of its own, so the experts get a row for each pair of a token and one of its experts.
    """
    experts, router = moe.experts, moe.router
    experts.has_gate, experts.has_bias, experts.is_transposed, experts.has_standard_gate = True, False, True, True
    experts._apply_gate = partial(_llama4_gate, experts)
    experts.forward = partial(_llama4_experts, experts)
    router.forward = partial(_llama4_router, router)
    moe.forward = partial(_llama4_moe, moe)


def _llama4_gate(experts: nn.Module, gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return up * experts.act_fn(gate)


def _llama4_experts(experts: nn.Module, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    out = torch.zeros_like(hidden)
    for expert in range(experts.num_experts):
        token, choice = torch.where(ids == expert)
        if len(token):
            inner = experts._apply_gate(hidden[token] @ experts.gate_up_proj[expert])
            out.index_add_(0, token, (inner @ experts.down_proj[expert]) * weights[token, choice, None])
    return out


def _llama4_router(router: nn.Linear, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    logits = nn.Linear.forward(router, hidden)
    values, ids = torch.topk(logits, router.top_k, dim=1)
    return logits, torch.sigmoid(values.float()).to(values.dtype), ids


def _llama4_moe(moe: nn.Module, hidden: Tensor) -> tuple[Tensor, Tensor]:
    hidden = hidden.reshape(-1, moe.hidden_dim)
    logits, scores, ids = moe.router(hidden)
    scaled = (hidden[:, None] * scores[..., None]).flatten(0, 1)  # [N * K, D]
    routed = moe.experts(scaled, ids.view(-1, 1), scaled.new_ones(len(scaled), 1))
    return moe.shared_expert(hidden) + routed.view(len(hidden), -1, routed.shape[-1]).sum(1), logits


@register_form("Step3p7Experts")
def _step3(experts: nn.Module) -> None:
    """Step 3.7 has the common form but for the marks that say how the weights are laid out."""
    experts.has_gate, experts.has_bias, experts.is_transposed = True, False, False
