"""Runs a causal LM part by part, whatever its architecture: embedding, blocks, head."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from eacmoe_lightning.models.block import Block
from eacmoe_lightning.models.find import find_blocks
from eacmoe_lightning.models.shrink import shrink_as_pruned


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
        if not any(block.is_moe for block in self.blocks):
            raise ValueError(
                f"{model.config.model_type!r} has no routed experts in any of its {len(self.blocks)} blocks: it is a "
                "dense model, and there is no router to calibrate. Pass a Mixture-of-Experts model "
                "(--model.name_or_path), for example `bundled`"
            )

    # --- where the weights are: here always in memory; `streamed.StreamedModel` reads them from disk --------

    def load(self, index: int) -> None:
        """Brings a block's original weights into memory, unless they are already there."""

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
    def top_k(self) -> int:
        router = self.moe_blocks[0].router
        for owner, name in ((router, "top_k"), (self.config, "num_experts_per_tok"), (self.config, "moe_topk")):
            if isinstance(getattr(owner, name, None), int):
                return getattr(owner, name)
        raise ValueError(f"{self.config.model_type}: neither router nor config says how many experts a token selects")

    @property
    def num_experts(self) -> int:
        return self.moe_blocks[0].num_experts

    @property
    def is_pruned(self) -> bool:
        return any(not isinstance(block.kept, slice) for block in self.moe_blocks)

    @property
    def device(self) -> torch.device:
        return self.model.device

    def embed(self, input_ids: Tensor) -> tuple[Tensor, list[dict]]:
        """[B, T] -> hidden states [B, T, D] as block 0 receives them, and the keyword arguments of each block.

        The masks and position embeddings come from the model's forward pass with its blocks replaced
        by recorders, so none of that code is repeated here.
        """
        block_kwargs: list[dict] = []
        block_inputs: list[Tensor] = []

        def recorder(hidden, *args, **kwargs):
            block_inputs.append(hidden)
            block_kwargs.append(kwargs)
            return hidden

        for block in self.blocks:
            block.layer.forward = recorder  # an instance attribute shadows the method
        try:
            self.decoder(input_ids=input_ids, use_cache=False)
        finally:
            for block in self.blocks:
                del block.layer.forward
        return block_inputs[0], block_kwargs

    def head(self, hidden: Tensor) -> Tensor:
        """[B, T, D] after the last block -> logits [B, T, V]."""
        return self.model.get_output_embeddings()(self.final_norm(hidden))

    @torch.no_grad()
    def logits(self, input_ids: Tensor) -> Tensor:
        """[B, T] -> [B, T, V], one block after another."""
        hidden, kwargs = self.embed(input_ids)
        for index in range(len(self.blocks)):
            with self.loaded(index) as block:
                hidden, _ = block.forward(hidden, kwargs[index])
        return self.head(hidden)

    @property
    def final_norm(self) -> nn.Module:
        norms = [m for n, m in self.decoder.named_children() if "norm" in n and "embed" not in n]
        if len(norms) != 1:
            raise ValueError(f"{self.config.model_type}: the decoder has {len(norms)} final norms, not 1")
        return norms[0]

    def norms(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Every one-dimensional weight of a normalization, by name in the model."""
        for name, parameter in self.model.named_parameters():
            if parameter.ndim == 1 and "norm" in name.rpartition(".")[0].rpartition(".")[2]:
                yield name, parameter

    @contextmanager
    def recorded_logits(self) -> Iterator[dict[int, Tensor]]:
        """Records each MoE block's router logits [N, E] by block index, with gradients, while the model runs inside."""
        logits: dict[int, Tensor] = {}
        handles = [
            block.watch_router(lambda routing, _, i=block.index: logits.__setitem__(i, routing.logits))
            for block in self.moe_blocks
        ]
        try:
            yield logits
        finally:
            for handle in handles:
                handle.remove()

    @torch.no_grad()
    def put(self, tensors: dict[str, Tensor]) -> None:
        """Copies tensors into the model's parameters with these names."""
        parameters = dict(self.model.named_parameters())
        for name, tensor in tensors.items():
            parameters[name].copy_(tensor)


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
