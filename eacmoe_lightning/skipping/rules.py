"""The interface of a skipping rule, and PESF. The baselines are in `baselines.py`.

A rule gets one router's output in one forward pass and returns the pairs that run: ids [N, K], with E for a pair that
is skipped, and their weights. It is a frozen dataclass of plain values, so that it can be stored with a model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar, get_args

from torch import Tensor, nn

from eacmoe_lightning.models.routing import Routing
from eacmoe_lightning.routers.router_weights import weight_rule
from eacmoe_lightning.skipping.decode import Demand, check_rescue, frequent, rescued
from eacmoe_lightning.skipping.selection import Survivors, drop, dropped_pairs, kept_experts, reroute, skip_counts
from eacmoe_lightning.skipping.tokens import Tokens


@dataclass
class Place:
    """One router, with what a rule may need in addition to its output. `inputs` and `attention` are of one pass."""

    index: int  # of its block among the MoE blocks
    router: nn.Module
    inputs: Tensor | None = None  # [N, D] or [B, T, D], the router's input, with `attention`
    attention: Tensor | None = None  # [B, heads, T, keys] of this block, for rules that need it
    weigh: Callable[[Tensor, Tensor], Tensor] | None = None  # how the router computes weights; set on first use

    def of_text(self, text: slice, length: int) -> Place:
        """The same for one text, a slice of the tokens of rows of this length."""
        if self.attention is None:
            return self
        row, start = divmod(text.start, length)
        part = slice(start, start + text.stop - text.start)
        inputs = self.inputs.reshape(-1, self.inputs.shape[-1])[text]
        return replace(self, inputs=inputs, attention=self.attention[row : row + 1, :, part, part])

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles of a model have nothing of its forward passes, and find `weigh` themselves."""
        return {"index": self.index, "router": self.router}


@dataclass
class Decision:
    """What runs: ids [N, K] with E for a dropped pair, weights [N, K], and each sequence's kept experts [B, E]."""

    ids: Tensor
    weights: Tensor
    kept: Tensor | None = None


@dataclass(frozen=True)
class Rule:
    """Base class of all rules; it skips nothing."""

    name: ClassVar[str] = "none"
    remembers: ClassVar[bool] = False  # whether it keeps state for each sequence between forward passes
    needs_attention: ClassVar[bool] = False  # whether it needs attention weights
    counts_prompts: ClassVar[bool] = False  # whether it judges a prompt by all tokens of its forward pass

    @property
    def needs_sequences(self) -> bool:
        """Whether it must see each sequence by itself, which continuous batching does not allow."""
        return self.counts_prompts or self.needs_attention

    def decide(self, place: Place, routing: Routing, tokens: Tokens) -> Decision:
        return Decision(routing.ids, routing.weights)

    def check(self, num_blocks: int, top_k: int) -> None:
        """Raises ValueError if the rule does not fit a model."""

    def to_dict(self) -> dict[str, Any]:
        return {"rule": self.name} | asdict(self)


@dataclass(frozen=True)
class PESF(Rule):
    """Pruning by expert-selection frequency (EAC-MoE, section 3.3), in prefill and, with `decode`, after it.

    A forward pass with more than one token per sequence is a prefill of these tokens. Their selections are counted for
    each block and sequence, and pairs of rarely selected experts do not run (`selection.kept_experts`).

    The defaults are the paper's rule, but we recommend `rescue=1.0`. On held-out text, the bundled model's perplexity
    then grows by 0.2 % instead of 0.8 % at alpha 0.3 (4.4 instead of 4.8 % of the pairs skipped), and by 1.8 instead of
    8.7 % at 0.7 (12.6 instead of 14.8 %). For `survivors`, `keep` was the best, then `reroute`, then `renormalize`
    (`benchmarks/pesf.py`; docs/findings/pesf.md).

    Args:
        alpha: in (0, 1]; an expert with less than this share of the mean load is skipped. 0.3 is the paper's mild
            setting, 0.7 its aggressive one.
        survivors: what happens to a token that loses an expert. `keep`: the other weights stay unchanged, as we read
            the paper; `renormalize`: they are scaled to the same sum; `reroute`: the next-best kept expert replaces the
            lost one, which saves hardly any pairs but touches fewer experts.
        rescue: None: a rare expert runs for no token, as in the paper. A number in [0, 1]: a rare expert still runs for
            a token whose weight for it is at least this share of the token's largest (ours); 1 protects only the first
            choice.
        decode: how single tokens after the prompt are treated; None: they run all their experts, as in the paper.

    Raises:
        ValueError: an argument is out of its range.
    """

    name: ClassVar[str] = "pesf"
    counts_prompts: ClassVar[bool] = True
    alpha: float = 0.3
    survivors: Survivors = "keep"
    rescue: float | None = None
    decode: Demand | None = None

    def __post_init__(self) -> None:
        if isinstance(self.alpha, bool) or not isinstance(self.alpha, int | float) or not 0 < self.alpha <= 1:
            raise ValueError(
                f"alpha={self.alpha!r} is not in (0, 1]: an expert with less than this share of the mean load is "
                "skipped; 0.3 is mild, 0.7 aggressive"
            )
        if self.survivors not in get_args(Survivors):
            raise ValueError(f"survivors={self.survivors!r} is not one of {', '.join(get_args(Survivors))}")
        if self.rescue is not None:
            check_rescue(self.rescue)
        if self.decode is not None and not isinstance(self.decode, Demand):
            raise ValueError(f"decode={self.decode!r} is neither None nor a Demand(...)")

    @property
    def remembers(self) -> bool:
        return self.decode is not None

    def decide(self, place: Place, routing: Routing, tokens: Tokens) -> Decision:
        if tokens.is_step and not (self.decode and tokens.is_continued):
            if self.decode:
                self._count(place, routing, tokens)
            return Decision(routing.ids, routing.weights)  # with one token, no selected expert is below alpha * K / E
        batch, length = tokens.shape
        top_k = routing.ids.shape[1]
        ids = routing.ids.view(batch, length, top_k)
        if tokens.is_step:
            name = f"demand.{place.index}"
            tokens.memory[name] = self.decode.step(tokens.memory[name], ids[:, 0], tokens.real[:, 0])
            kept, rescue = frequent(tokens.memory[name], self.alpha), self.decode.rescue
        else:
            counts = self._count(place, routing, tokens)
            kept, rescue = kept_experts(counts, counts.sum(1) // top_k, top_k, self.alpha), self.rescue
        dropped = dropped_pairs(ids, kept).view(-1, top_k)
        if rescue is not None:
            dropped &= ~rescued(routing.weights, rescue)
        if self.survivors != "reroute":
            renormalize = self.survivors == "renormalize"
            return Decision(*drop(routing.ids, routing.weights, dropped, kept.shape[1], renormalize), kept)
        if place.weigh is None:
            place.weigh = weight_rule(place.router, routing.logits, routing.weights, routing.ids)
        usable = kept.repeat_interleave(length, 0)
        chosen = reroute(routing.logits, routing.ids, routing.weights, dropped, usable, place.weigh)
        return Decision(*chosen, kept)

    def _count(self, place: Place, routing: Routing, tokens: Tokens) -> Tensor:
        """[B, E] selection counts of this pass and, with `decode`, of earlier pieces of the same prompt."""
        top_k = routing.ids.shape[1]
        counts = skip_counts(routing.ids.view(*tokens.shape, top_k), tokens.real, routing.logits.shape[1])
        if self.decode:
            name = f"counts.{place.index}"
            counts = counts + tokens.memory[name] if name in tokens.memory else counts
            tokens.memory |= {name: counts, f"demand.{place.index}": self.decode.start(counts, top_k)}
        return counts
