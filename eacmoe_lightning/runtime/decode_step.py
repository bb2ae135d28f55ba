"""What a decode step on a CPU does beside its packed products: norms, routers, gated MLPs, small linears.

For a few tokens torch needs longer to begin each of their operations than to compute it, and streaming the weights has
emptied the caches of it: together a third of a step. `shorten_decode_step` gives these modules another forward pass,
one call of a C++ kernel (`csrc/decode_step.h`), that is used for a few tokens without gradients and otherwise leaves
the module to itself. Modules are recognized by what they compute: a kernel takes a module's place only if it gives the
module's own output for random inputs.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_modules

from eacmoe_lightning.models.block import Block
from eacmoe_lightning.models.growing_cache import grow_in_place
from eacmoe_lightning.runtime import kernels
from eacmoe_lightning.runtime.attention import share_keys
from eacmoe_lightning.runtime.packed_modules import PackedLinear, activation_name

FEW = 8  # tokens, up to which the kernels are faster than torch
FEW_NORMED = 1 << 16  # numbers, up to which a norm is
SMALL = 256  # outputs, up to which a linear in bfloat16 is one
DTYPES = (torch.float32, torch.bfloat16)
NORMS = ("rounded", "in float", "plus one")  # `Norm` of csrc/decode_step.h
EPSILONS = ("variance_epsilon", "eps", "epsilon")
SCALES = ("routed_scaling_factor", "router_scaling_factor", "scaling")  # names that transformers' routers use
PROBES = 64  # random tokens
LARGE, LARGE_ROUTED = 100.0, 8.0  # how much larger some of them are; softmax makes zeros of larger differences


def speed_up_generation(model: nn.Module, blocks: list[Block]) -> None:
    """Gives a packed model all that shortens its decode steps beside packed products.

    Args:
        model: with its weights.
        blocks: its blocks (`models.find.find_blocks`).
    """
    shorten_decode_step(model, blocks)
    grow_in_place(model)
    share_keys(model)


def shorten_decode_step(model: nn.Module, blocks: list[Block]) -> dict[str, int]:
    """Gives the modules of a packed model their short forward passes. Returns how many of each kind.

    Args:
        model: with its weights. One of which a part is elsewhere than on the CPU is left as it is.
        blocks: its blocks (`models.find.find_blocks`).
    """
    shortened = {"norms": 0, "routers": 0, "MLPs": 0, "linears": 0}
    elsewhere = any(tensor.device.type != "cpu" for tensor in (*model.parameters(), *model.buffers()))
    if kernels.level() is None or elsewhere:
        return shortened
    activations: dict[tuple, str | None] = {}  # by all that tells MLPs apart: running each would read all its weights
    routers = {id(block.router): block for block in blocks if block.is_moe}
    for module in list(model.modules()):
        children = tuple(module.children())
        if (block := routers.get(id(module))) is not None:
            if (choice := find_choice(block)) is not None:
                _replace(module, _route, block.router_matrix, choice, _options(module), children)
                shortened["routers"] += 1
        elif _may_be_norm(module):
            if (form := find_norm(module)) is not None:
                _replace(module, _norm, form)
                shortened["norms"] += 1
        elif is_gated_mlp(module):
            settings = {name: value for name, value in vars(module).items() if isinstance(value, int | float | str)}
            key = type(module), repr(module.act_fn), tuple(sorted(settings.items()))
            if key not in activations:
                activations[key] = find_mlp(module)
            if (activation := activations[key]) is not None:
                _replace(module, _mlp, activation, children)
                shortened["MLPs"] += 1
        elif type(module) is nn.Linear and module.out_features <= SMALL and module.weight.dtype == torch.bfloat16:
            _replace(module, _linear)
            shortened["linears"] += 1
    return shortened


def _replace(module: nn.Module, short: Callable[..., object], *settings: object) -> None:
    """`short(module, *settings, x)` becomes its forward pass, except where that returns None."""
    before = vars(module).get("forward") or partial(type(module).forward, module)
    module.forward = partial(_forward, module, before, short, settings)


def _forward(module: nn.Module, before: Callable, short: Callable, settings: tuple, *args, **kwargs) -> object:
    """The short forward pass for a lone input that it takes, else the pass `before`."""
    x = args[0] if len(args) == 1 and not kwargs else None
    if isinstance(x, Tensor) and x.numel() and x.dtype in DTYPES and kernels.goes_direct(x):
        if (out := short(module, *settings, x)) is not None:
            return out
    return before(*args, **kwargs)


def _is_few(x: Tensor) -> bool:
    return x.numel() <= FEW * x.shape[-1]


def _are_bare(module: nn.Module, children: tuple[nn.Module, ...]) -> bool:
    """Whether a module still has these children, and nobody watches them or gave them another forward pass."""
    watched = torch_modules._global_forward_hooks or torch_modules._global_forward_pre_hooks
    same = not watched and tuple(module._modules.values()) == children
    return same and not any(c._forward_hooks or c._forward_pre_hooks or "forward" in vars(c) for c in children)


def _fits(x: Tensor, weight: Tensor) -> bool:
    """Whether a dense weight [..., I] can be read as it lies, for x [..., I]."""
    same = x.dtype == weight.dtype and x.shape[-1] == weight.shape[-1]
    return same and weight.device.type == "cpu" and weight.is_contiguous()


def _dense(weight: Tensor, bias: Tensor | None) -> kernels.Dense:
    """`bias` is float32 and lives as long as the result is used."""
    pointer = None if bias is None else bias.data_ptr()
    return kernels.Dense(weight.data_ptr(), pointer, *weight.shape, kernels.DTYPES[weight.dtype])


# --- norms ----------------------------------------------------------------------------------------------------------


def _may_be_norm(module: nn.Module) -> bool:
    """Whether this has a vector of weights, no bias, and an epsilon."""
    weight = vars(module)["_parameters"].get("weight")
    return weight is not None and weight.ndim == 1 and len([*module.parameters()]) == 1 and _epsilon(module) is not None


def _epsilon(module: nn.Module) -> float | None:
    return next((eps for name in EPSILONS if isinstance(eps := getattr(module, name, None), float)), None)


@torch.no_grad()
def find_norm(module: nn.Module) -> int | None:
    """The number in NORMS of what this module computes; None if it is no such norm."""
    x = _probe(4, len(module.weight), module.weight.dtype)
    try:
        expected = module(x)
    except (TypeError, AttributeError, ValueError, RuntimeError):  # it reads more than hidden states (a gate)
        return None
    if x.dtype not in DTYPES or not isinstance(expected, Tensor):
        return None
    return next((form for form in range(len(NORMS)) if _agree(_normed(module, form, x), expected)), None)


def _normed(module: nn.Module, form: int, x: Tensor) -> Tensor:
    weight, x = module.weight, x.contiguous()
    out = torch.empty_like(x)
    kernels.library().eacmoe_norm(
        kernels.level_number(),
        form,
        weight.data_ptr(),
        kernels.DTYPES[weight.dtype],
        _epsilon(module),
        x.data_ptr(),
        kernels.DTYPES[x.dtype],
        x.numel() // x.shape[-1],
        x.shape[-1],
        out.data_ptr(),
    )
    return out


def _norm(module: nn.Module, form: int, x: Tensor) -> Tensor | None:
    return _normed(module, form, x) if x.numel() <= FEW_NORMED and _fits(x, module.weight) else None


# --- routers --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ChoiceRule:
    """How a router goes from logits to a selection and weights (`struct Choice` of csrc/decode_step.h)."""

    chosen: int  # experts a token gets
    scale: float
    sigmoid: bool
    normalised: bool
    rounded: bool
    dtype: torch.dtype  # of the router's weight, for which the others hold
    logits_dtype: torch.dtype
    weights_dtype: torch.dtype
    correction: str | None  # name of the tensor in the router


@torch.no_grad()
def find_choice(block: Block) -> ChoiceRule | None:
    """The rule by which the kernel gives what this block's router gives; None if no rule does (groups of experts)."""
    if not block.calibrates or block.router_weight.dtype not in DTYPES:
        return None
    router, weight = block.router, block.router_weight
    named = (*router.named_buffers(), *router.named_parameters())
    correction = next((name for name, tensor in named if block.is_correction(name, tensor)), None)
    x = _probe(PROBES, weight.shape[1], weight.dtype, LARGE_ROUTED)
    try:
        logits, weights, ids, *more = router(x)
    except (TypeError, AttributeError, ValueError, RuntimeError, IndexError):  # it reads more than hidden states
        return None
    if more or logits.shape != (PROBES, len(weight)) or ids.shape != weights.shape or ids.dtype != torch.int64:
        return None
    if logits.dtype not in DTYPES or weights.dtype not in DTYPES:
        return None
    rounded = torch.equal(logits.float(), logits.bfloat16().float())
    scales = {1.0} | {float(s) for name in SCALES if isinstance(s := getattr(router, name, None), int | float)}
    for sigmoid, normalised, scale in itertools.product((False, True), (False, True), sorted(scales)):
        dtypes = weight.dtype, logits.dtype, weights.dtype
        rule = ChoiceRule(block.top_k, scale, sigmoid, normalised, rounded, *dtypes, correction)
        if _chooses_alike(_routed(router, block.router_matrix, rule, x), (logits, weights, ids), rule):
            return rule
    return None


def _chooses_alike(found: tuple, expected: tuple, rule: ChoiceRule) -> bool:
    """Whether a routing is the expected one, but for experts that are equal up to rounding."""
    (logits, weights, ids), (own_logits, own_weights, own_ids) = expected, found
    if not _agree(own_logits, logits):
        return False
    (ids, order), (own_ids, own_order) = ids.sort(-1), own_ids.sort(-1)
    same = (ids == own_ids).all(-1)
    if same.float().mean() < 0.8:
        return False
    weights, own_weights = weights.gather(1, order)[same], own_weights.gather(1, own_order)[same]
    tolerance = 2e-2 if rule.rounded or weights.dtype == torch.bfloat16 else 1e-4
    return torch.allclose(weights.float(), own_weights.float(), rtol=tolerance, atol=1e-6)


def _routed(router: nn.Module, owner: nn.Module, rule: ChoiceRule, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    weight, x = owner.weight, x.reshape(-1, x.shape[-1]).contiguous()
    bias = getattr(owner, "bias", None)
    bias = None if bias is None else bias.float().contiguous()
    correction = _correction(router, rule)
    tokens = len(x)
    logits = torch.empty(tokens, len(weight), dtype=rule.logits_dtype)
    weights = torch.empty(tokens, rule.chosen, dtype=rule.weights_dtype)
    ids = torch.empty(tokens, rule.chosen, dtype=torch.int64)
    choice = kernels.Choice(
        None if correction is None else correction.data_ptr(),
        rule.chosen,
        rule.scale,
        rule.sigmoid,
        rule.normalised,
        rule.rounded,
    )
    kernels.library().eacmoe_route(
        kernels.level_number(),
        _dense(weight, bias),
        choice,
        x.data_ptr(),
        kernels.DTYPES[x.dtype],
        tokens,
        logits.data_ptr(),
        kernels.DTYPES[rule.logits_dtype],
        ids.data_ptr(),
        weights.data_ptr(),
        kernels.DTYPES[rule.weights_dtype],
        torch.get_num_threads(),
    )
    return logits, weights, ids


def _correction(router: nn.Module, rule: ChoiceRule) -> Tensor | None:
    if rule.correction is None:
        return None
    owner, _, name = rule.correction.rpartition(".")
    return getattr(router.get_submodule(owner), name).float().flatten().contiguous()


def _options(router: nn.Module) -> dict[str, float | str | None]:
    """The numbers and words that a router computes with: the rule holds as long as nobody changes one."""
    return {name: value for name, value in vars(router).items() if isinstance(value, int | float | str)}


def _route(
    router: nn.Module,
    owner: nn.Module,
    rule: ChoiceRule,
    options: dict[str, float | str | None],
    children: tuple[nn.Module, ...],
    hidden: Tensor,
) -> tuple | None:
    weight = owner.weight
    if not _is_few(hidden) or not _fits(hidden, weight) or rule.chosen > len(weight) or weight.dtype != rule.dtype:
        return None
    if children and not _are_bare(router, children):
        return None
    now = vars(router)
    if any(now.get(name) != value for name, value in options.items()):
        return None
    return _routed(router, owner, rule, hidden)


# --- gated MLPs -----------------------------------------------------------------------------------------------------


def is_gated_mlp(module: nn.Module) -> bool:
    """Whether this may be down(activation(gate(x)) * up(x)) with packed weights."""
    names = {name for name, child in module.named_children() if isinstance(child, PackedLinear)}
    if names != {"gate_proj", "up_proj", "down_proj"} or not hasattr(module, "act_fn"):
        return False
    gate, up = module.gate_proj, module.up_proj
    return gate.weight.shape == up.weight.shape and gate.weight.group_size == up.weight.group_size


@torch.no_grad()
def find_mlp(module: nn.Module) -> str | None:
    """The kernels' name of the activation of a module for which `is_gated_mlp` holds; None if it computes otherwise."""
    activation = activation_name(module.act_fn)
    if activation is None:
        return None
    x = _probe(4, module.gate_proj.in_features, torch.float32)  # the roundings of bfloat16 differ
    return activation if _agree(_multiplied(module, activation, x), module(x)) else None


def _multiplied(module: nn.Module, activation: str, x: Tensor) -> Tensor:
    *leading, width = x.shape
    x, out = x.contiguous(), x.new_empty(*leading, module.down_proj.out_features)
    parts, biases = [], []  # biases live until the call
    for linear in (module.gate_proj, module.up_proj, module.down_proj):
        biases.append(None if linear.bias is None else linear.bias.float())
        parts.append(kernels.describe(*linear.weight.tensors, biases[-1], linear.weight.shape[1], linear.weight.bits))
    kernels.library().eacmoe_mlp(
        kernels.level_number(),
        module.gate_proj.int8,
        *parts,
        kernels.ACTIVATIONS[activation],
        x.data_ptr(),
        kernels.DTYPES[x.dtype],
        x.numel() // width,
        out.data_ptr(),
        torch.get_num_threads(),
    )
    return out


def _mlp(module: nn.Module, activation: str, children: tuple[nn.Module, ...], x: Tensor) -> Tensor | None:
    is_here = module.gate_proj.weight.device.type == "cpu"
    return _multiplied(module, activation, x) if _is_few(x) and is_here and _are_bare(module, children) else None


# --- small linears --------------------------------------------------------------------------------------------------


def _linear(module: nn.Linear, x: Tensor) -> Tensor | None:
    weight = module.weight
    if not _is_few(x) or not _fits(x, weight):
        return None
    x, bias = x.contiguous(), None if module.bias is None else module.bias.float()
    out = x.new_empty(*x.shape[:-1], len(weight))
    kernels.library().eacmoe_dense(
        kernels.level_number(),
        _dense(weight, bias),
        x.data_ptr(),
        kernels.DTYPES[x.dtype],
        x.numel() // x.shape[-1],
        out.data_ptr(),
        torch.get_num_threads(),
    )
    return out


# --- comparing ------------------------------------------------------------------------------------------------------


def _probe(tokens: int, width: int, dtype: torch.dtype, large: float = LARGE) -> Tensor:
    """Random inputs [tokens, width]; every fourth is large, so that a limit on what a module computes is reached."""
    x = torch.randn(tokens, width, generator=torch.Generator().manual_seed(0))
    x[3::4] *= large
    return x.to(dtype)


def _agree(found: Tensor, expected: Tensor) -> bool:
    """Whether two results differ by the order of sums and the last rounding alone."""
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return False
    step = 2**-7 if expected.dtype == torch.bfloat16 else 1e-4
    found, expected = found.float(), expected.float()
    scale = expected.square().mean(-1, keepdim=True).sqrt()  # of each token
    return bool(((found - expected).abs() <= step * (expected.abs() + scale / 8)).all())
