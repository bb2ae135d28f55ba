"""What the blocks of a model hand over and read, in numbers and bytes: seen by running it without memory.

Some blocks hand over more than hidden states (shared keys and values, top-k indices, earlier outputs), and some experts
read something else than their router. So the model runs one window on fake tensors, which have shapes but no content.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves

from eacmoe_lightning.models.block import Block, Call
from eacmoe_lightning.models.checkpoint import put
from eacmoe_lightning.models.moe import MoEModel
from eacmoe_lightning.models.transformers_loader import empty_model

log = logging.getLogger(__name__)
LAST = ("o_proj", "out_proj", "down_proj", "dense", "w2")  # linears that end a module, the output projection first
PROBE = 32  # tokens of the first try: models that loop over tokens take long


@dataclass(frozen=True)
class Passed:
    """What goes through files at one block, for one window.

    Attributes:
        output: numbers of the hidden states that the block hands over.
        more: bytes of everything else that it hands over.
        attention_input: numbers that the attention's output projection reads.
        router_input, expert_input: numbers that the router and the experts read; 0 without experts.
    """

    output: int
    more: int = 0
    attention_input: int = 0
    router_input: int = 0
    expert_input: int = 0


def passed_on(moe: MoEModel, window_length: int) -> list[Passed]:
    """What goes through files at each block of a model, which may be on any device and without weights.

    Of a model that does not run on fake tensors only hidden states are counted, with a warning.
    """
    try:
        short = min(PROBE, window_length)
        result = _run(moe, short)
        if not any(one.more for one in result):
            scale = window_length / short
            return [Passed(*(round(number * scale) for number in vars(one).values())) for one in result]
        return _run(moe, window_length)  # what else it hands over may not be in proportion to the tokens
    except Exception as error:  # of the model's own code, which knows nothing of fake tensors
        log.warning("the disk estimate counts hidden states only, because the model cannot be tried: %s", error)
        hidden = window_length * moe.config.hidden_size
        return [Passed(hidden, 0, hidden, *((hidden, hidden) if block.is_moe else ())) for block in moe.blocks]


@torch.no_grad()
def _run(moe: MoEModel, window_length: int) -> list[Passed]:
    model, states, result = empty_model(moe.model.config, moe.model.dtype), [], []

    def own_forward(index: int) -> Callable:
        layer = fake.blocks[index].layer
        return partial(type(layer).forward, layer)

    def run(block: Block, *args: Any, **kwargs: Any) -> Any:
        before = states[-1] if states and isinstance(states[-1], dict) else {"shared": {}, "history": {}}
        read: dict[str, int] = {}
        attention = [name for name, part in block.linears.items() if part == "attention"]
        for name in [name for name in attention if name.rpartition(".")[2] in LAST] or attention:
            _note_input(block.linear(name), read, "attention_input")
        if block.is_moe:
            _note_input(block.router, read, "router_input")
            _note_input(block.experts.module, read, "expert_input")
        with fake.blocks_replaced(own_forward), block.without_experts() if block.is_moe else nullcontext():
            states[:] = [block.forward(Call(args, kwargs, before["shared"], before["history"]))[0]]
        hidden, *others = [leaf for leaf in tree_leaves(states[0]) if isinstance(leaf, Tensor)]
        result.append(Passed(hidden.numel(), sum(other.nbytes for other in others), **read))
        return states[0]["output"] if isinstance(states[0], dict) else states[0]

    with FakeTensorMode():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            put(model, name, torch.empty(tensor.shape, dtype=tensor.dtype))
        fake = MoEModel(model)
        for block in fake.blocks:
            block.knows_scoring = True  # which is found by comparing values
        with fake.blocks_replaced(lambda index: partial(run, fake.blocks[index])):
            fake.decoder_of_text(input_ids=torch.zeros(1, window_length, dtype=torch.int64), use_cache=False)
    return result


def _note_input(module: nn.Module, read: dict[str, int], name: str) -> None:
    def note(_, args: tuple, kwargs: dict) -> None:
        read[name] = read.get(name) or (args[0] if args else kwargs["hidden_states"]).numel()

    module.register_forward_pre_hook(note, with_kwargs=True)
