"""What differs between MoE models, in one file: where a causal LM keeps its blocks, routers and experts.

Every MoE of transformers 5 has the same parts under different names: a list of decoder layers; in each
layer a *router* that returns ``(router_logits [N,E], expert_weights [N,K], expert_ids [N,K])``; and an
*experts* module with the stacked weights ``gate_up_proj [E,2F,D]`` and ``down_proj [E,D,F]``. Here the
parts are recognized by structure, never by class name, so that a new model needs no entry in a table.
A model in which a block's router is ambiguous is refused.

Letters: B batch, T sequence, N = B*T tokens, D hidden, F expert width, E experts, K top_k.
"""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

import eacmoe_lightning.models.deepseek  # noqa: F401  (registers model_type "deepseek")
from eacmoe_lightning.models.block import Block, Experts
from eacmoe_lightning.models.transformers_loader import select_in_router


def find_blocks(model: PreTrainedModel) -> tuple[nn.Module, list[Block]]:
    """The decoder that owns the list of `num_hidden_layers` layers, and these layers as `Block`s.

    Raises:
        ValueError: there is no such list, or the router of a block is ambiguous.
    """
    num_layers = model.config.get_text_config().num_hidden_layers
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == num_layers:
            decoder = model.get_submodule(name.rpartition(".")[0])
            blocks = [_find_parts(i, f"{name}.{i}", layer) for i, layer in enumerate(module)]
            break
    else:
        raise ValueError(f"{model.config.model_type}: the model has no list of {num_layers} decoder layers")
    moe_names = {block.experts_name.rpartition(".")[0] for block in blocks if block.is_moe}
    for block in blocks:  # a dense block's feed-forward is where the other blocks have their experts
        for linear in block.linears:
            if any(linear.startswith(f"{moe}.") for moe in moe_names):
                block.linears[linear] = "shared"
    return decoder, blocks


def _find_parts(index: int, name: str, layer: nn.Module) -> Block:
    block = Block(index, name, layer)
    for path, module in layer.named_modules():
        down = getattr(module, "down_proj", None)
        if len(getattr(down, "shape", ())) == 3:  # a stack, be it dense, packed or offloaded
            block.experts, block.experts_name = Experts(module), path
    if block.is_moe:
        moe_name = block.experts_name.rpartition(".")[0]
        moe = layer.get_submodule(moe_name)
        routers = [
            (path, child)
            for path, child in moe.named_children()
            if child is not block.experts.module
            and any(p.ndim == 2 and len(p) == block.num_experts for p in child.parameters())
            and getattr(child, "out_features", block.num_experts) == block.num_experts
            and not any(isinstance(m, nn.Linear) and len(m.weight) != block.num_experts for m in child.modules())
        ]
        if len(routers) != 1:
            raise ValueError(f"{name}: {len(routers)} modules next to the experts look like a router, instead of 1")
        select_in_router(moe, routers[0][0])
        block.router_name, block.router = f"{moe_name}.{routers[0][0]}", routers[0][1]
    for path, module in layer.named_modules():
        if not isinstance(module, nn.Linear) or module.out_features == 1:
            continue  # a linear with one row is a shared expert's gate, which is not quantized
        if block.is_moe and (path == block.router_name or path.startswith(f"{block.router_name}.")):
            continue
        inside_moe = block.is_moe and path.startswith(f"{block.experts_name.rpartition('.')[0]}.")
        block.linears[path] = "shared" if inside_moe else "attention"
    return block
