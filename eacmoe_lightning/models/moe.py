"""Runs a causal LM part by part, whatever its architecture: embedding, blocks, head.

The parts are the model's own: to get at one, the model's forward pass runs with its blocks replaced.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from eacmoe_lightning.models.block import Block, Call
from eacmoe_lightning.models.find import find_blocks
from eacmoe_lightning.models.routing import Reached, forward_replaced
from eacmoe_lightning.models.shrink import shrink_as_pruned
from eacmoe_lightning.run.hidden import State

PLAIN_OUTPUTS = {  # options of a config by which a forward pass returns what it must here
    "output_router_logits": False,
    "output_hidden_states": False,
    "output_attentions": False,
    "return_dict": True,
}


class MoEModel:
    """A causal LM as embedding, blocks and head, so that it can be run one block at a time.

    The blocks of a pruned model are shrunk to the experts that its config lists.

    Raises:
        ValueError: the model has no routed experts, or its parts are not recognized.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.config = model.config.get_text_config()
        self.decoder, self.blocks = find_blocks(model)
        shrink_as_pruned(self.config, self.blocks)
        for block in self.moe_blocks:
            _keep_float32(block)

    def leave(self, unquantized: dict[str, str]) -> None:
        """Excludes linears from quantization: parameter name -> the reason."""
        for block in self.blocks:
            for linear in list(block.linears):
                if (reason := unquantized.get(f"{block.name}.{linear}.weight")) is not None:
                    block.leave(linear, reason)

    @property
    def unquantized(self) -> dict[str, str]:
        """The linears that stay as they are, by parameter name, with the reason."""
        return {f"{b.name}.{linear}.weight": reason for b in self.blocks for linear, reason in b.unquantized.items()}

    # --- where the weights are: here always in memory; `streamed.StreamedModel` reads them from disk --------

    def load(self, index: int) -> None:
        """Brings a block's weights into memory, unless they are already there."""

    def release(self, index: int) -> None:
        """Frees the memory of a block's weights; changes to them are lost."""

    @contextmanager
    def loaded(self, index: int) -> Iterator[Block]:
        """The block, with its weights in memory inside the `with` block."""
        self.load(index)
        try:
            yield self.blocks[index]
        finally:
            self.release(index)

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Weights by name in the model, whether or not their block is in memory."""
        state = self.model.state_dict()
        return {name: state[name] for name in names if name in state}

    # --- parts --------------------------------------------------------------------------------------

    @property
    def moe_blocks(self) -> list[Block]:
        return [block for block in self.blocks if block.is_moe]

    @property
    def calibrated_blocks(self) -> list[Block]:
        """The blocks whose routers can be calibrated (`Block.calibrates`)."""
        return [block for block in self.blocks if block.calibrates]

    @property
    def top_k(self) -> int:
        """Experts that a token selects: the most of any block."""
        return max(block.top_k for block in self.moe_blocks)

    @property
    def num_experts(self) -> int:
        return self.moe_blocks[0].num_experts

    @property
    def is_pruned(self) -> bool:
        return any(not isinstance(block.kept, slice) for block in self.moe_blocks)

    @property
    def device(self) -> torch.device:
        return self.model.device

    def call(
        self, index: int, input_ids: Tensor, state: State | None = None, position_ids: Tensor | None = None
    ) -> Call:
        """The arguments with which the model's own loop calls block `index` for a batch.

        The model's forward pass computes them. Its earlier blocks do not run: each returns `state`. So masks, position
        embeddings and whatever else a model gives to its blocks come from its own code.

        Args:
            index: number of the block.
            input_ids: [B, T], the batch.
            state: what the block before hands over. For block 0, hidden states to use instead of the embedded
                tokens, if they are given.
            position_ids: [B, T], beginning with 0 at each document of a window (`documents.py`); None: the model's
                default, a window as one document.
        """
        calls: list[Call] = []

        shared, history = (state["shared"], state["history"]) if isinstance(state, dict) else ({}, {})

        def record(*args, **kwargs) -> NoReturn:
            call = Call(args, kwargs, shared, history)
            for name, values in shared.items():
                call.kwargs[name].update(values)
            calls.append(call)
            raise Reached

        with self.blocks_replaced(lambda i: record if i == index else partial(_handed_over, state, i)):
            try:
                self.decoder_of_text(**inputs(input_ids, position_ids))
            except Reached:
                pass
        return calls[0].with_hidden(state) if index == 0 and state is not None else calls[0]

    def embed(self, input_ids: Tensor, position_ids: Tensor | None = None) -> Tensor:
        """[B, T] -> hidden states [B, T, D] as block 0 receives them."""
        return self.call(0, input_ids, position_ids=position_ids).hidden

    def head(self, state: State, input_ids: Tensor) -> Tensor:
        """What the last block hands over, and its batch [B, T] -> logits [B, T, V], by the model's own code."""
        with self.blocks_replaced(lambda i: partial(_handed_over, state, i)):
            return self.model(input_ids=input_ids, use_cache=False).logits

    @contextmanager
    def blocks_replaced(self, forward: Callable[[int], Callable]) -> Iterator[None]:
        """Gives each block another forward pass, by index, inside the `with` block."""
        with ExitStack() as replaced:
            replaced.enter_context(_plain_outputs(self.model.config, self.config))
            for block in self.blocks:
                replaced.enter_context(forward_replaced(block.layer, forward(block.index)))
            yield

    @property
    def decoder_of_text(self) -> nn.Module:
        """The model without its head: what turns token ids into the blocks' inputs."""
        base = self.model.base_model
        return self.decoder if base is self.model else base

    @torch.no_grad()
    def logits(self, input_ids: Tensor) -> Tensor:
        """[B, T] -> [B, T, V], one block after another."""
        state = None
        for index in range(len(self.blocks)):
            with self.loaded(index) as block:
                state, _ = block.forward(self.call(index, input_ids, state))
        return self.head(state, input_ids)

    def norms(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Every one-dimensional weight of a normalization of the decoder, by name in the model."""
        of_decoder = {id(parameter) for parameter in self.decoder.parameters()}
        for name, parameter in self.model.named_parameters():
            if (
                id(parameter) in of_decoder
                and parameter.ndim == 1
                and "norm" in name.rpartition(".")[0].rpartition(".")[2]
            ):
                yield name, parameter

    @torch.no_grad()
    def norm_offset(self, name: str) -> float:
        """The number that a norm adds to its weight before it multiplies: 1 in Qwen3-Next and Qwen3.5, 0 in most.

        Args:
            name: of a parameter from `norms`. Of a bias, or of a norm that reads more than hidden states, it is 0.
        """
        owner, _, leaf = name.rpartition(".")
        module = self.model.get_submodule(owner)
        parameters = dict(module.named_parameters())
        x = torch.ones(1, parameters[leaf].numel())
        x[:, ::2] = -1  # a norm gives such an input back

        def gain(weight: float) -> float:
            values = {key: torch.zeros(parameter.shape) for key, parameter in parameters.items()}
            values[leaf] += weight
            return float(torch.func.functional_call(module, values, (x,)).float().mul(x).mean())

        try:
            at_zero = gain(0.0)
            slope = gain(1.0) - at_zero
        except (TypeError, AttributeError, ValueError, RuntimeError):
            return 0.0
        return at_zero / slope if slope else 0.0

    def with_weights(self, weights: Mapping[str, Tensor], run: Callable[[], Any]) -> Any:
        """What `run` returns while these tensors stand in for the model's parameters, by name; differentiable."""
        if not weights:
            return run()
        weights = {f"model.{name}": weight for name, weight in weights.items()}
        return torch.func.functional_call(_Running(self.model), weights, (run,))

    @torch.no_grad()
    def put(self, tensors: dict[str, Tensor]) -> None:
        """Copies tensors into the model's parameters with these names."""
        parameters = dict(self.model.named_parameters())
        for name, tensor in tensors.items():
            parameters[name].copy_(tensor)


class _Running(nn.Module):
    """Runs a function of the model, as `torch.func.functional_call` can only call modules."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, run: Callable[[], Any]) -> Any:
        return run()


def inputs(input_ids: Tensor, position_ids: Tensor | None) -> dict[str, Any]:
    """The arguments of a model's forward pass over a batch [B, T], as they are in `MoEModel.call`."""
    positions = {} if position_ids is None else {"position_ids": position_ids}
    return {"input_ids": input_ids, "use_cache": False, **positions}


@contextmanager
def _plain_outputs(*configs: PreTrainedConfig) -> Iterator[None]:
    """Inside the `with` block, a forward pass returns no more than its options ask for, and not as a tuple.

    A config may ask for the logits of routers (fine-tuned models' often do) or for hidden states, which blocks that do
    not run cannot give.
    """
    changed = [
        (config, name, {key: value for key, value in vars(config).items() if key.lstrip("_") == name})
        for config in {id(config): config for config in configs}.values()
        for name, plain in PLAIN_OUTPUTS.items()
        if getattr(config, name, plain) != plain
    ]
    for config, name, _ in changed:
        setattr(config, name, PLAIN_OUTPUTS[name])
    try:
        yield
    finally:
        for config, _, kept in changed:  # not by `setattr`, which refuses attentions where they cannot be computed
            vars(config).update(kept)


def _handed_over(state: State, index: int, *args, **kwargs) -> Any:
    """In the place of a block's forward pass: its output."""
    return state["history"].get(str(index), state["output"]) if isinstance(state, dict) else state


def _keep_float32(block: Block) -> None:
    """Excludes the router from mixed precision, because rounding its logits to bfloat16 would change selections."""
    router, previous_forward = block.router, block.router.__dict__.get("forward")
    if not (isinstance(previous_forward, partial) and previous_forward.func is _without_autocast):
        router.forward = partial(_without_autocast, router, previous_forward)


def _without_autocast(router: nn.Module, previous_forward: Callable | None, hidden: Tensor, *args, **kwargs):
    """A router's forward pass outside autocast; `previous_forward` had replaced the class's, or is None."""
    forward = previous_forward or partial(type(router).forward, router)
    if not torch.is_autocast_enabled(hidden.device.type):
        return forward(hidden, *args, **kwargs)
    with torch.autocast(hidden.device.type, enabled=False):
        return forward(hidden.to(next(router.parameters()).dtype), *args, **kwargs)
