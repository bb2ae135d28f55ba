"""What differs between MoE models, in one file: where a causal LM keeps its blocks, routers and experts.

Every MoE of transformers 5 has the same parts under different names: a list of decoder layers; in each
layer a *router* that returns ``(router_logits [N,E], expert_weights [N,K], expert_ids [N,K])``; and an
*experts* module with the stacked weights ``gate_up_proj [E,2F,D]`` and ``down_proj [E,D,F]``. Here the
parts are recognized by structure, so that a new model needs no entry in a table. Models of another form are brought
into this one first (`forms.py`). A model in which a block's router is ambiguous is refused.

Letters: B batch, T sequence, N = B*T tokens, D hidden, F expert width, E experts, K top_k.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NoReturn

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

import eacmoe_lightning.models.deepseek  # noqa: F401  (registers model_type "deepseek")
from eacmoe_lightning.models.block import Block
from eacmoe_lightning.models.experts import Experts, counts_experts
from eacmoe_lightning.models.forms import bring_into_form
from eacmoe_lightning.models.transformers_modules import select_in_router

ROUTER_NAMES = ("gate", "router")  # tell the router apart where its structure does not
TOP_K_NAMES = ("num_experts_per_tok", "moe_topk", "top_k_experts", "moe_top_k")


def find_blocks(model: PreTrainedModel) -> tuple[nn.Module, list[Block]]:
    """The decoder that owns the list of `num_hidden_layers` layers, and these layers as `Block`s.

    Raises:
        ValueError: there is no such list, or a block is not in the common form (`models/forms.py`).
    """
    config = model.config.get_text_config()
    num_layers = config.num_hidden_layers
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == num_layers and not is_of_another_part(name):
            decoder = model.get_submodule(name.rpartition(".")[0])
            blocks = [_find_parts(i, f"{name}.{i}", layer) for i, layer in enumerate(module)]
            break
    else:
        raise ValueError(f"{config.model_type}: the model has no list of {num_layers} decoder layers")
    if not any(block.is_moe for block in blocks):
        _refuse(config, num_layers)
    for block, following in pairwise(blocks):
        block.is_remembered = getattr(following.layer, "is_block_boundary", False)  # Inkling 2
    moe_names = {block.experts_name.rpartition(".")[0] for block in blocks if block.is_moe}
    for block in blocks:
        block.top_k = _top_k(block, config) if block.is_moe else 0
        if block.is_moe and not 1 <= block.top_k <= block.num_experts:
            raise ValueError(
                f"{block.name}: by its config.json (--model.name_or_path) each token selects {block.top_k} of "
                f"{block.num_experts} experts, which is not from 1 to their number: mend the config"
            )
        for linear in block.linears:  # a dense block's feed-forward is where the other blocks have their experts
            moe = next((moe for moe in moe_names if moe and linear.startswith(f"{moe}.")), None)
            if moe is not None and _is_feed_forward(block.layer.get_submodule(moe)):
                block.linears[linear] = "shared"
    return decoder, blocks


def is_of_another_part(name: str) -> bool:
    """Whether a module or a parameter belongs to the vision or audio half of a wrapper."""
    return any(word in name for word in ("vision", "visual", "audio", "encoder"))


def _refuse(config: PreTrainedConfig, num_layers: int) -> NoReturn:
    """Raises the ValueError of a model in which no experts were found."""
    options = config.to_dict()
    nested = [inner for inner in options.values() if isinstance(inner, dict)]
    counts = sorted(
        f"{name}={value}"
        for values in (options, *nested)
        for name, value in values.items()
        if isinstance(name, str) and counts_experts(name) and isinstance(value, int) and value > 1
    )
    if counts:
        raise ValueError(
            f"{config.model_type!r}: its config has experts ({counts[0]}), but none of "
            f"its {num_layers} blocks has them in a form that is recognized: a module with the stacked weights "
            "`gate_up_proj` or `up_proj`, and `down_proj`, next to a router that returns (logits, weights, ids). "
            "CONTRIBUTING.md says how to describe another form from outside the package"
        )
    raise ValueError(
        f"{config.model_type!r} has no routed experts in any of its {num_layers} blocks: it is a dense model, and "
        "there is no router to calibrate. Pass a Mixture-of-Experts model (--model.name_or_path), for example `bundled`"
    )


def _find_parts(index: int, name: str, layer: nn.Module) -> Block:
    bring_into_form(layer)
    block = Block(index, name, layer)
    for path, module in layer.named_modules():
        down = getattr(module, "down_proj", None)  # a stack, be it dense, packed or offloaded
        is_stack = len(getattr(down, "shape", ())) == 3 and hasattr(module, "has_gate")
        if is_stack and not is_of_another_part(path):  # ERNIE-VL has experts for images beside those for text
            block.experts, block.experts_name = Experts(module), path
    moe_name = block.experts_name.rpartition(".")[0]
    if block.is_moe:
        up = getattr(block.experts.module, block.experts.up_name, None)  # offloaded experts have none
        down = block.experts.module.down_proj
        if up is not None and (len(up.shape) != 3 or up.shape[0] != down.shape[0]):
            raise ValueError(
                f"{name}: {block.experts.up_name} has {up.shape[0]} experts, and down_proj {down.shape[0]}"
            )
        moe = layer.get_submodule(moe_name)
        router = _router_among(moe, block)
        select_in_router(moe, router)
        block.router_name = f"{moe_name}.{router}".removeprefix(".")
        block.router = moe.get_submodule(router)
    for path, module in layer.named_modules():
        if not isinstance(module, nn.Linear) or module.out_features == 1:
            continue  # a linear with one row is a shared expert's gate, which is not quantized
        if type(module).forward is not nn.Linear.forward:
            block.unquantized[path] = f"{type(module).__name__} is no plain product with a matrix"
            continue
        if not (module.in_features and module.out_features):
            continue  # of shared experts that there are none of
        if block.is_moe and (path == block.router_name or path.startswith(f"{block.router_name}.")):
            continue
        block.linears[path] = "shared" if block.is_moe and _is_beside_experts(path, moe_name) else "attention"
    return block


def _router_among(moe: nn.Module, block: Block) -> str:
    """The name of the router among the children of the module that holds the experts."""
    children = [(n, child) for n, child in moe.named_children() if child is not block.experts.module]
    strict = [
        name
        for name, child in children
        if any(p.ndim == 2 and len(p) == block.num_experts for p in child.parameters())
        and getattr(child, "out_features", block.num_experts) == block.num_experts
        and not any(isinstance(m, nn.Linear) and len(m.weight) != block.num_experts for m in child.modules())
    ]
    by_name = [name for name, child in children if name in ROUTER_NAMES and any(True for _ in child.parameters())]
    routers = strict if len(strict) == 1 else by_name
    if len(routers) != 1:
        raise ValueError(f"{block.name}: {len(strict)} modules next to the experts look like a router, instead of 1")
    return routers[0]


def _is_beside_experts(path: str, moe_name: str) -> bool:
    """Whether a linear of an MoE block belongs to its feed-forward half."""
    if moe_name:
        return path.startswith(f"{moe_name}.")
    return not any(word in path.partition(".")[0] for word in ("attn", "attention", "mamba", "conv"))


def _is_feed_forward(module: nn.Module) -> bool:
    """Whether a module that holds the experts in other blocks is a feed-forward here, and not attention or Mamba."""
    names = {name.rpartition(".")[2] for name, child in module.named_modules() if isinstance(child, nn.Linear)}
    return not names & {"q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj", "in_proj", "out_proj", "x_proj"}


def _top_k(block: Block, config: PreTrainedConfig) -> int:
    """Experts that a token selects in this block."""
    owners = (block.router, "top_k"), (block.moe, "top_k"), *((config, name) for name in TOP_K_NAMES)
    for owner, name in owners:
        if isinstance(value := getattr(owner, name, None), int):
            return value
    raise ValueError(f"{config.model_type}: neither router nor config says how many experts a token selects")
