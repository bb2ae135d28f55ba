"""Checks, before a job starts, that a model taken apart computes what the model itself computes.

Calibration and evaluation run a model block by block, and see routers and experts as matrices. All of that is rebuilt
from parts. So the model's own forward pass runs on one batch, with one block in memory at a time; each block is run
from the same state as a part, and must give the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from eacmoe_lightning.models.block import Block, Call
from eacmoe_lightning.models.moe import MoEModel, inputs
from eacmoe_lightning.models.routing import Routing
from eacmoe_lightning.run.hidden import State

REMEDY = (
    "CONTRIBUTING.md says how to describe a model from outside the package (a form); please report the model type too"
)
REPLACED = ("forward", "route_tokens_to_experts")  # attributes by which modules are brought into the common form
NUM_TOKENS = 8  # for which experts are run one by one


class Differs(ValueError):
    """A part of a model does not compute what the model itself computes."""


@torch.no_grad()
def check_parts(
    moe: MoEModel,
    input_ids: Tensor,
    before: Callable[[Block], None] = lambda block: None,
    after: Callable[[Block, Call], None] = lambda block, call: None,
    position_ids: Tensor | None = None,
) -> State:
    """Compares every block, router and expert as a part with the model's own forward pass; reads each block once.

    Linears that do not run are moved to `Block.unquantized`.

    Args:
        moe: the original model.
        input_ids: [B, T].
        before, after: called with each block while its weights are in memory, before it is checked, and with its call
            afterwards.
        position_ids: [B, T], as in `MoEModel.call`.

    Returns:
        What the last block hands over.

    Raises:
        Differs: a part differs from the model; names the first block and what differs.
        ValueError: the model does not run its blocks as a calibration needs it.
    """
    states: list[State] = []

    def of_class(index: int) -> Callable:
        layer = moe.blocks[index].layer
        return partial(type(layer).forward, layer)

    visited: set[int] = set()

    def run(block: Block, *args, **kwargs) -> Any:
        if block.index in visited:
            raise ValueError(
                f"{moe.config.model_type} runs {block.name} more than once in a forward pass. A block is compressed "
                "with the inputs of one run, so such a model (--model.name_or_path) cannot be compressed"
            )
        visited.add(block.index)
        with moe.loaded(block.index), moe.blocks_replaced(of_class):
            before(block)

            with _in_its_own_form(block.layer):
                expected = of_class(block.index)(*args, **kwargs)
            call = moe.call(block.index, input_ids, states[-1] if states else None, position_ids)
            _compare(f"{block.name}: its input", call.hidden, Call(args, kwargs).hidden)
            states[:] = [_check_block(block, call, expected)]
            after(block, call)
        return expected

    with moe.blocks_replaced(lambda index: partial(run, moe.blocks[index])):
        try:
            logits = moe.model(**inputs(input_ids, position_ids)).logits
        except (AttributeError, TypeError) as error:
            raise ValueError(
                f"{type(moe.model).__name__} of transformers {transformers.__version__} does not run on text alone "
                f"({error}): try another version of transformers"
            ) from error
    if not states:
        raise ValueError(f"{moe.config.model_type}: its forward pass does not run its blocks. {REMEDY}")
    _compare(f"{moe.config.model_type}: its head", moe.head(states[-1], input_ids), logits)
    return states[-1]


def _check_block(block: Block, call: Call, expected: Any) -> State:
    seen: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
    handle = None
    if block.is_moe:
        module = block.experts.module
        handle = module.register_forward_hook(lambda _, args, output: seen.append((*args[:3], output)))
    try:
        state, routing = block.forward(call)
    finally:
        if handle is not None:
            handle.remove()
    output = state["output"] if isinstance(state, dict) else state
    parts = output if isinstance(output, tuple) else (output,)
    wanted = expected if isinstance(expected, tuple) else (expected,)
    for part, own in zip(parts, wanted, strict=True):
        if own is not None:
            _compare(f"{block.name}: its output", part, own)
    block.input_groups(call)
    if block.is_moe and (routing is None or not seen):
        raise ValueError(f"{block.name}: the block does not call its {'experts' if routing else 'router'}. {REMEDY}")
    if block.is_moe:
        _check_router(block, call, routing)
        _check_experts(block, *seen[0])
    return state


def _check_router(block: Block, call: Call, routing: Routing) -> None:
    num_tokens = call.hidden.shape[0] * call.hidden.shape[1]
    if routing.ids.shape != (num_tokens, block.top_k):
        raise ValueError(
            f"{block.name}: the router selects {tuple(routing.ids.shape)} experts for {num_tokens} tokens, not "
            f"{block.top_k} each. {REMEDY}"
        )
    if block.calibrates:
        logits = block.router_logits(block.router_input(call))
        what = f"{block.name}: the router's logits as a product of its input and its matrix"
        _compare(what, logits, routing.logits, call.hidden.dtype)


def _check_experts(block: Block, x: Tensor, ids: Tensor, weights: Tensor, output: Tensor) -> None:
    x, output = x.reshape(-1, x.shape[-1])[:NUM_TOKENS], output.reshape(-1, output.shape[-1])[:NUM_TOKENS]
    total = torch.zeros_like(output, dtype=torch.float32)
    for token, (chosen, shares) in enumerate(zip(ids[:NUM_TOKENS].tolist(), weights, strict=False)):
        for expert, share in zip(chosen, shares, strict=True):
            if expert < block.num_experts:
                total[token] += share.float() * block.experts.output(x[token : token + 1], expert)[0].float()
    _compare(f"{block.name}: its experts, one by one", total, output, x.dtype)


def _compare(what: str, part: Tensor, own: Tensor, dtype: torch.dtype | None = None) -> None:
    """Raises Differs if a part's tensor is not the model's own, but for the rounding of `dtype` (or of its own)."""
    if part.shape != own.shape:
        raise Differs(f"{what} has the shape {tuple(part.shape)}, in the model itself {tuple(own.shape)}. {REMEDY}")
    if not own.is_floating_point():
        equal, difference = torch.equal(part, own), 1.0
    else:
        difference = float((part.double() - own.double()).norm() / own.double().norm().clamp(min=1e-30))
        equal = difference <= max(8 * torch.finfo(dtype or own.dtype).eps, 1e-5) or not own.isfinite().all()
    if not equal:
        raise Differs(
            f"{what} differs from the model's own forward pass by {difference:.2g} of its norm, so what is calibrated "
            f"would not be this model. {REMEDY}"
        )


@contextmanager
def _in_its_own_form(layer: nn.Module) -> Iterator[None]:
    """Takes replaced methods off a layer's modules inside the `with` block, so that its own classes run."""
    removed = [
        (module, name, vars(module).pop(name))
        for module in layer.modules()
        if module is not layer
        for name in REPLACED
        if name in vars(module)
    ]
    try:
        yield
    finally:
        for module, name, method in removed:
            setattr(module, name, method)
