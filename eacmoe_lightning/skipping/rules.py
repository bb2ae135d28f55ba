"""What a rule of skipping is, and PESF as one; the baselines are in `baselines.py`.

A rule sees what one router said of one forward pass and answers with the pairs that run: ids [N, K], E for a pair that
does not, and their weights. It is a frozen dataclass of numbers, so that it can be stored with a model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, get_args

from torch import Tensor, nn

from eacmoe_lightning.models.block import Routing
from eacmoe_lightning.routers.router_weights import weight_rule
from eacmoe_lightning.skipping.decode import Demand, check_rescue, frequent, rescued
from eacmoe_lightning.skipping.selection import Survivors, drop, dropped_pairs, kept_experts, reroute, skip_counts
from eacmoe_lightning.skipping.tokens import Tokens


@dataclass
class Place:
    """The router that is asked: what a rule may need beside the routing itself."""

    index: int  # among the MoE blocks
    router: nn.Module
    inputs: Tensor | None = None  # [N, D] or [B, T, D], what the router is given
    attention: Tensor | None = None  # [B, heads, T, past + T] of this block, for rules that ask for it
    weigh: Callable[[Tensor, Tensor], Tensor] | None = None  # the router's rule for weights, once it is known


@dataclass
class Decision:
    """What runs: ids [N, K] with E for a dropped pair, weights [N, K], and per sequence the kept experts [B, E]."""

    ids: Tensor
    weights: Tensor
    kept: Tensor | None = None


@dataclass(frozen=True)
class Rule:
    """Base of all rules; by itself it skips nothing."""

    name: ClassVar[str] = "none"
    remembers: ClassVar[bool] = False  # whether it keeps something of each sequence between passes
    needs_attention: ClassVar[bool] = False  # whether it asks for attention weights

    def decide(self, place: Place, routing: Routing, tokens: Tokens) -> Decision:
        return Decision(routing.ids, routing.weights)

    def check(self, num_blocks: int, top_k: int) -> None:
        """Raises ValueError where the rule does not fit a model."""

    def to_dict(self) -> dict[str, Any]:
        return {"rule": self.name} | asdict(self)


@dataclass(frozen=True)
class PESF(Rule):
    """Pruning by expert-selection frequency (EAC-MoE, section 3.3), in the prefill and, with `decode`, behind it.

    Every forward pass of more than one token a sequence is a prefill of these tokens. Their selections are counted per
    block and sequence, and the pairs of rarely selected experts do not run (`selection.kept_experts`).

    The defaults are the paper's rule. Recommended is `rescue=1.0`: on held-out text of the bundled model it loses 0.2 %
    of perplexity instead of 0.8 % at alpha 0.3, and 1.8 instead of 8.7 % at 0.7, for 4.4 instead of 4.8 % and 12.6
    instead of 14.8 % of the pairs. Of the ways to treat survivors `keep` was the best, then `reroute`, then
    `renormalize` (`benchmarks/pesf.py`; LOG.md).

    Args:
        alpha: in (0, 1]; an expert with less than this share of the mean load is skipped. The paper's mild setting is
            0.3, its aggressive one 0.7.
        survivors: of a token that loses an expert. `keep`: the others' weights stay as they are (the paper's reading);
            `renormalize`: they are scaled to the same sum; `reroute`: the next-best kept expert takes the lost one's
            place, so that hardly a pair is saved, but fewer experts are touched.
        rescue: None: a rare expert runs for no token (the paper). Otherwise it runs where its weight is at least this
            share, in [0, 1], of the token's largest; 1 protects the first choice alone (ours).
        decode: how single tokens behind the prompt are treated; None: they run in full, as in the paper.

    Raises:
        ValueError: an argument is out of its range.
    """

    name: ClassVar[str] = "pesf"
    alpha: float = 0.3
    survivors: Survivors = "keep"
    rescue: float | None = None
    decode: Demand | None = None

    def __post_init__(self) -> None:
        if isinstance(self.alpha, bool) or not isinstance(self.alpha, int | float) or not 0 < self.alpha <= 1:
            raise ValueError(
                f"alpha={self.alpha} is not in (0, 1]: it is the share of the mean load under which an expert is "
                "skipped; 0.3 is mild, 0.7 aggressive"
            )
        if self.survivors not in get_args(Survivors):
            raise ValueError(f"survivors={self.survivors!r} is none of {', '.join(get_args(Survivors))}")
        if self.rescue is not None:
            check_rescue(self.rescue)

    @property
    def remembers(self) -> bool:
        return self.decode is not None

    def decide(self, place: Place, routing: Routing, tokens: Tokens) -> Decision:
        if tokens.is_step and not (self.decode and tokens.is_continued):
            if self.decode:
                self._count(place, routing, tokens)
            return Decision(routing.ids, routing.weights)  # of one token no count is below alpha * K / E
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
        """[B, E] counts of this pass and, with `decode`, of earlier pieces of the same prompt."""
        top_k = routing.ids.shape[1]
        counts = skip_counts(routing.ids.view(*tokens.shape, top_k), tokens.real, routing.logits.shape[1])
        if self.decode:
            name = f"counts.{place.index}"
            counts = counts + tokens.memory[name] if name in tokens.memory else counts
            tokens.memory |= {name: counts, f"demand.{place.index}": self.decode.start(counts, top_k)}
        return counts
