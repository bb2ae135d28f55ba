"""A rule attached to a model: hooks on the decoder, to know sequences and padding, and on every router.

A router's hook replaces the ids and weights that the router returned: a dropped pair has id E and weight 0. Packed
experts skip such pairs. On CPUs, and where experts run one after another, the experts of transformers get only the
surviving pairs. Elsewhere, selecting these would wait for the device, so the experts are told instead that such ids
occur: `grouped_mm` then skips the products, `batched_mm` still computes them. A rule's state for a sequence belongs to
the cache of the forward pass, so every `generate` starts afresh.
"""

from __future__ import annotations

import logging
import threading
import uuid
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from eacmoe_lightning.models.block import Block
from eacmoe_lightning.models.moe import MoEModel
from eacmoe_lightning.models.routing import Routing
from eacmoe_lightning.models.transformers_modules import (
    BATCHES,
    CACHE,
    SKIPS_PAIRS,
    attention_children,
    cache_of,
    is_eager,
    is_paged,
)
from eacmoe_lightning.runtime.packed_modules import PackedExperts
from eacmoe_lightning.skipping.memory import memory_of, remember
from eacmoe_lightning.skipping.report import SkipReport
from eacmoe_lightning.skipping.rules import Decision, Place, Rule
from eacmoe_lightning.skipping.tokens import Tokens, named_arguments, packed_texts, real_tokens

log = logging.getLogger(__name__)


class Pass(threading.local):
    """The forward pass that runs in a thread.

    Attributes:
        tokens: the tokens of the last one that began.
        is_running: whether the decoder is running: `tokens` are then those of its call.
        attention: attention weights [B, heads, T, keys] by number of the MoE block, until its router has run.
    """

    tokens: Tokens | None = None
    is_running = False

    def __init__(self) -> None:  # in each thread
        self.attention: dict[int, Tensor] = {}


class Session:
    """One rule on one model. `attach` installs the hooks, `detach` restores the model.

    Raises:
        ValueError: the model has no experts, the rule does not fit it, or (`attach`) its experts cannot skip a pair.
    """

    def __init__(self, model: PreTrainedModel, rule: Rule) -> None:
        if not isinstance(rule, Rule):
            raise ValueError(f"{rule!r} is not a rule: pass one such as PESF(alpha=0.3), or None for no skipping")
        self.model, self.rule, self.moe = model, rule, MoEModel(model)
        self.places = [Place(i, block.router) for i, block in enumerate(self.moe.moe_blocks)]
        self.report = SkipReport([block.num_experts for block in self.moe.moe_blocks])
        self.handles: list[Any] = []
        self.now = Pass()
        self.has_warned = False  # of prompts in pieces
        self.memory_key = ""  # under which caches keep the state of their sequences
        self.attention_before: str | None = None
        self.parallel_before = [getattr(experts, SKIPS_PAIRS, False) for experts in self.experts]
        rule.check(len(self.places), self.moe.top_k)
        if rule.needs_attention:
            check_attention(self.moe.moe_blocks, rule.name)

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles of a model keep its rule, but nothing of a forward pass."""
        return {name: value for name, value in self.__dict__.items() if name != "now"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state | {"now": Pass()}

    @property
    def experts(self) -> list[nn.Module]:
        return [block.experts.module for block in self.moe.moe_blocks]

    def attach(self) -> None:
        self.memory_key = uuid.uuid4().hex  # caches that were filled before are unknown
        for block in self.moe.moe_blocks:
            experts = block.experts.module
            if not isinstance(experts, PackedExperts):
                experts.forward = partial(_run_survivors, experts, experts.__dict__.get("forward"))
            _check_can_skip(block, self.model.dtype)
        if self.rule.needs_sequences:
            setattr(self.model, BATCHES, partial(_refuse_batches, self.rule.name))
        decoder = self.moe.decoder
        self.handles += [
            decoder.register_forward_pre_hook(self._begin, with_kwargs=True),
            decoder.register_forward_hook(self._end, with_kwargs=True, always_call=True),
        ]
        for block, place in zip(self.moe.moe_blocks, self.places, strict=True):
            self.handles.append(block.layer.register_forward_pre_hook(self._enter))
            self.handles.append(block.watch_router(partial(self._route, place)))
        if self.rule.needs_attention:
            self.attention_before = self.model.config._attn_implementation
            self.model.set_attn_implementation("eager")
            for place, block in zip(self.places, self.moe.moe_blocks, strict=True):
                for child in attention_children(block.layer):
                    self.handles.append(child.register_forward_hook(partial(self._keep_attention, place)))

    def detach(self) -> None:
        vars(self.model).pop(BATCHES, None)
        for handle in self.handles:
            handle.remove()
        for experts, before in zip(self.experts, self.parallel_before, strict=True):
            setattr(experts, SKIPS_PAIRS, before)
            if (wrapped := experts.__dict__.get("forward")) is not None and wrapped.func is _run_survivors:
                del experts.forward
                if wrapped.args[1] is not None:
                    experts.forward = wrapped.args[1]
        if self.attention_before is not None:
            self.model.set_attn_implementation(self.attention_before)
        self.handles, self.now.tokens, self.attention_before = [], None, None
        self.now.attention.clear()

    # --- hooks, in the order in which they run; torch.compile leaves them out of its graphs -----------------

    @torch.compiler.disable
    def _begin(self, decoder: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        arguments = named_arguments(decoder, args, kwargs)
        cache = cache_of(arguments)
        memory = memory_of(cache, self.memory_key) if self.rule.remembers else None
        last = arguments.get("logits_to_keep")
        last = last if isinstance(last, int) else 0
        tokens = Tokens(real_tokens(arguments), memory or {}, memory is not None, last)
        if self.rule.needs_sequences and is_paged(cache):
            _refuse_batches(self.rule.name)
        waits = self.rule.remembers or (self.rule.needs_sequences and not tokens.is_step)  # for the device
        if waits and cache is not None:
            tokens.past = int(cache.get_seq_length())
        if self.rule.needs_sequences:
            tokens.texts = packed_texts(arguments, bool(getattr(decoder.config, "use_cache", True)))
        self.now.tokens, self.now.is_running = tokens, True
        self.now.attention.clear()
        if self.rule.counts_prompts and tokens.past and not (self.has_warned or tokens.is_continued):
            self._warn_of_pieces(tokens)

    def _warn_of_pieces(self, tokens: Tokens) -> None:
        """Warns, once, of tokens that follow others that are not counted with them."""
        self.has_warned = True
        log.warning(
            "%d tokens follow %d in the cache: %s counts the new ones alone as a prompt. A prompt in pieces, a draft "
            "model or a conversation whose cache is kept gives other text than one pass. %s",
            *(tokens.shape[1], tokens.past, self.rule.name),
            "With `decode`, fill the cache while the rule is attached"
            if self.rule.remembers
            else "With decode=True pieces of a prompt are counted together",
        )

    @torch.compiler.disable
    def _enter(self, layer: nn.Module, args: tuple) -> None:
        """For a block that runs without the decoder, as in `evaluate`: batches there have no padding."""
        now = self.now
        if not now.is_running and args and (now.tokens is None or tuple(args[0].shape[:2]) != now.tokens.shape):
            now.tokens = Tokens(torch.ones(args[0].shape[:2], dtype=torch.bool, device=args[0].device))

    @torch.compiler.disable
    def _keep_attention(self, place: Place, module: nn.Module, args: tuple, output: Any) -> None:
        """Attention returns (hidden, weights [B, heads, T, keys])."""
        if isinstance(output, tuple) and len(output) > 1 and isinstance(output[1], Tensor) and output[1].ndim == 4:
            self.now.attention[place.index] = output[1]

    @torch.compiler.disable
    def _route(self, place: Place, routing: Routing, inputs: Tensor | None) -> Routing:
        ids, tokens = routing.ids, self.now.tokens.of_router(len(routing.ids))
        if tokens is None:
            raise ValueError(
                f"the router of MoE block {place.index} got {len(ids)} tokens, and the model "
                f"{' x '.join(map(str, self.now.tokens.shape))}: the sequence of each token is unknown, so no expert "
                "can be skipped (a model that routes images apart from text skips in text alone): call it without the "
                "rule, set_skipping(model, None)"
            )
        tokens.real = tokens.real.to(ids.device)  # blocks may be on different devices
        if self.rule.needs_attention:
            place = self._with_attention(place, inputs, tokens)
        logits = routing.logits[:, : self.report.num_experts[place.index]]  # ZAYA's router has one for skipping
        decision = self._decide(place, Routing(logits, ids, routing.weights), tokens)
        self.report.add(place.index, tokens, decision)
        return Routing(routing.logits, decision.ids, decision.weights)

    def _with_attention(self, place: Place, inputs: Tensor | None, tokens: Tokens) -> Place:
        """The place with its router's input and the attention weights of this pass."""
        attention = self.now.attention.pop(place.index, None)
        if attention is None or (attention.shape[0], attention.shape[2]) != tokens.shape:
            raise ValueError(
                f"MoE block {place.index} returns no attention weights, which the rule {self.rule.name} needs: use "
                "EES, which needs none"
            )
        return replace(place, inputs=inputs, attention=attention)

    def _decide(self, place: Place, routing: Routing, tokens: Tokens) -> Decision:
        """The rule's decision; on rows of several texts, one text after another."""
        if not tokens.texts:
            return self.rule.decide(place, routing, tokens)
        decisions = [
            self.rule.decide(place.of_text(text, tokens.shape[1]), routing.of(text), tokens.of_text(text))
            for text in tokens.texts
        ]
        kept = [decision.kept for decision in decisions if decision.kept is not None]
        ids, weights = torch.cat([d.ids for d in decisions]), torch.cat([d.weights for d in decisions])
        return Decision(ids, weights, torch.cat(kept) if kept else None)

    @torch.compiler.disable
    def _end(self, decoder: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        self.now.is_running = False
        cache = getattr(output, CACHE, None)
        if self.rule.remembers and cache is not None:
            remember(cache, self.memory_key, self.now.tokens.memory)


def _refuse_batches(rule_name: str, *args: Any, **kwargs: Any) -> None:
    """In the place of the method that starts continuous batching."""
    raise ValueError(
        f"this model skips experts by the tokens of each sequence (the rule {rule_name}), and a batch would mix those "
        "of several requests: call generate, or set_skipping(model, None) before continuous batching"
    )


def _run_survivors(
    experts: nn.Module,
    previous_forward: Callable | None,
    hidden: Tensor,
    ids: Tensor,
    weights: Tensor,
    *args: Any,
    **kwargs: Any,
) -> Tensor:
    """The experts' forward pass; on CPUs, and of eager experts, on the surviving pairs only.

    Args:
        experts: the module.
        previous_forward: a forward that had replaced the class's on this module; None: the class's.
        hidden, ids, weights: [N, D], [N, K], [N, K].
        args, kwargs: further arguments of the forward.
    """
    forward = previous_forward or partial(type(experts).forward, experts)
    gets_survivors = hidden.device.type == "cpu" or is_eager(experts)
    setattr(experts, SKIPS_PAIRS, not gets_survivors)
    if not gets_survivors:
        return forward(hidden, ids, weights, *args, **kwargs)
    token, choice = torch.where(ids < experts.num_experts)
    if len(token) == ids.numel():
        return forward(hidden, ids, weights, *args, **kwargs)
    out = torch.zeros_like(hidden)
    if len(token):  # each pair becomes a token with one expert
        pairs = ids[token, choice].unsqueeze(1), weights[token, choice].unsqueeze(1)
        out.index_add_(0, token, forward(hidden[token], *pairs, *args, **kwargs))
    return out


def check_attention(blocks: list[Block], rule_name: str) -> None:
    """Raises ValueError if the layer of an MoE block computes no attention weights."""
    without = [str(i) for i, block in enumerate(blocks) if not attention_children(block.layer)]
    if without:
        raise ValueError(
            f"the rule {rule_name} needs attention weights, and the layers of MoE blocks {', '.join(without)} compute "
            "none (linear attention, or no attention at all): use EES, which needs none"
        )


def _check_can_skip(block: Block, dtype: torch.dtype) -> None:
    """Runs one token with all its pairs dropped, so that experts that cannot skip a pair fail here and not later."""
    experts = block.experts.module
    router = next(block.router.parameters())
    if router.is_meta:
        return
    ids = torch.full((1, block.top_k), block.num_experts, device=router.device)
    weight = getattr(experts, block.experts.up_name, None)  # offloaded experts have none
    width = block.router_weight.shape[1] if weight is None else weight.shape[1 if experts.is_transposed else 2]
    token = torch.zeros(1, width, dtype=dtype, device=router.device)
    try:
        with torch.no_grad():
            experts(token, ids, token.new_zeros(1, block.top_k))
    except (RuntimeError, IndexError, KeyError) as error:
        raise ValueError(
            f"{type(experts).__name__} cannot skip a (token, expert) pair in its present implementation ({error}): "
            "try model.set_experts_implementation('grouped_mm')"
        ) from error
