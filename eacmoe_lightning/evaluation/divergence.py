"""How far a model's predictions are from another's, token by token and in figures: functions of tensors.

The figures have the names and formulas of llama.cpp's `llama-perplexity --kl-divergence`, so that rows compare. Bins of
confidence are those of exllamav3's qbench.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

ROWS_AT_ONCE = 1 << 22  # logits that are in float32 at a time, of each model
PERCENTILES = {"median": 0.5, "p90": 0.9, "p99": 0.99, "p99_9": 0.999}
CONFIDENCE = (0.0, 0.25, 0.5, 0.75, 0.95, 1.0)  # edges of the bins


class PerToken(NamedTuple):
    """Predictions of N tokens, of a model beside the base model. All are float32 [N] in host memory.

    Attributes:
        base_nll, nll: negative log-likelihood of the correct token, in nats.
        kl: KL(base || model) over the vocabulary, in nats.
        same_top: 1 where both give the highest probability to the same token, else 0.
        confidence: highest probability that the base model gives to a token.
    """

    base_nll: Tensor
    nll: Tensor
    kl: Tensor
    same_top: Tensor
    confidence: Tensor

    @property
    def dp(self) -> Tensor:
        """Change of the probability of the correct token."""
        return (-self.nll.double()).exp() - (-self.base_nll.double()).exp()


def joined(parts: Sequence[PerToken]) -> PerToken:
    """The tokens of all parts, in order; without parts no tokens."""
    if not parts:
        return PerToken(*(torch.empty(0) for _ in PerToken._fields))
    return PerToken(*(torch.cat([value.flatten() for value in values]) for values in zip(*parts, strict=True)))


def compare(base_logits: Tensor, logits: Tensor, targets: Tensor) -> PerToken:
    """Compares predictions, a part of the rows at a time.

    Args:
        base_logits, logits: [N, V] of the base model and of the other; -inf where a token is impossible to both.
        targets: int64 [N], the correct tokens.
    """
    return joined([_compare(log_probabilities(base), *part) for base, *part in _parts(base_logits, logits, targets)])


def compare_to(base: Tensor, logits: Tensor, targets: Tensor) -> PerToken:
    """`compare` with the base model's `log_probabilities`, for several models beside it."""
    return joined([_compare(*part) for part in _parts(base, logits, targets)])


def log_probabilities(logits: Tensor) -> Tensor:
    """Logits [..., V] -> log-probabilities [..., V] in nats, float32."""
    return logits.float().log_softmax(-1)


def nll_of(log_p: Tensor, targets: Tensor) -> Tensor:
    """Log-probabilities [N, V] and the correct tokens, int64 [N] -> negative log-likelihoods [N] in nats."""
    return -log_p.gather(-1, targets.to(log_p.device).unsqueeze(-1)).squeeze(-1)


def _parts(base: Tensor, logits: Tensor, targets: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """The three, [N, V], [N, V] and [N], in parts of so many rows that `ROWS_AT_ONCE` holds."""
    rows = max(1, ROWS_AT_ONCE // logits.shape[-1])
    return zip(base.split(rows), logits.split(rows), targets.to(logits.device).split(rows), strict=True)


def _compare(base: Tensor, logits: Tensor, targets: Tensor) -> PerToken:
    other = log_probabilities(logits)
    top, base_choice = base.max(-1)
    p = base.exp()
    gap = torch.where(p > 0, base - other, 0.0)  # impossible tokens add nothing
    values = (
        nll_of(base, targets),
        nll_of(other, targets),
        torch.linalg.vecdot(p, gap),
        (other.argmax(-1) == base_choice).float(),
        top.exp(),
    )
    return PerToken(*(value.cpu() for value in values))


def mean_and_error(values: Tensor) -> tuple[float, float]:
    """The mean of [N], and its standard error if tokens were independent; 0 for one token."""
    mean, n = values.double().mean(), len(values)
    return float(mean), math.sqrt(float((values.double() - mean).square().mean()) / (n - 1)) if n > 1 else 0.0


def percentile(ordered: Tensor, fraction: float) -> float:
    """The value below which this fraction of ascending values [N] lies, linear between neighbours."""
    place = fraction * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return float(ordered[low].double().lerp(ordered[high].double(), place - low))


def statistics(tokens: PerToken) -> dict[str, Any]:
    """The figures of a text; {} without tokens.

    Returns:
        `tokens`, their number; `kl` with `mean`, its standard `error`, `median`, `p90`, `p99`, `p99_9` and `max`, in
        nats; `same_top` and its `same_top_error`, shares; `mean_dp` and `rms_dp` with `mean_dp_error` and
        `rms_dp_error`, the change of the probability of the correct token (llama.cpp prints percent); `log_ppl_ratio`
        and `log_ppl_ratio_error`, the mean of ln(PPL(Q)/PPL(base)), nats per token lost; `by_confidence`, for each bin
        of the base model's highest probability `from`, `to`, the `share` of tokens, and `kl`, the mean in it or None.
    """
    if not len(tokens.kl):
        return {}
    kl, error = mean_and_error(tokens.kl)
    ordered = tokens.kl.sort().values
    same, number = float(tokens.same_top.double().mean()), len(tokens.kl)
    mean_dp, mean_dp_error = mean_and_error(tokens.dp)
    squares, squares_error = mean_and_error(tokens.dp.square())
    rms = math.sqrt(squares)
    ratio, ratio_error = mean_and_error(tokens.nll.double() - tokens.base_nll.double())
    return {
        "tokens": number,
        "kl": {
            "mean": kl,
            "error": error,
            **{name: percentile(ordered, fraction) for name, fraction in PERCENTILES.items()},
            "max": float(ordered[-1]),
        },
        "same_top": same,
        "same_top_error": math.sqrt(same * (1 - same) / max(number - 1, 1)),
        "mean_dp": mean_dp,
        "mean_dp_error": mean_dp_error,
        "rms_dp": rms,
        "rms_dp_error": squares_error / (2 * rms) if rms else 0.0,
        "log_ppl_ratio": ratio,
        "log_ppl_ratio_error": ratio_error,
        "by_confidence": by_confidence(tokens),
    }


def by_confidence(tokens: PerToken, edges: Sequence[float] = CONFIDENCE) -> list[dict[str, Any]]:
    """See `statistics`; a bin holds its lower edge, and the last one its upper too."""
    place = torch.bucketize(tokens.confidence, torch.tensor(edges[1:-1]), right=True)
    rows = []
    for number, (low, high) in enumerate(zip(edges[:-1], edges[1:], strict=True)):
        chosen = tokens.kl[place == number]
        mean = float(chosen.double().mean()) if len(chosen) else None
        rows.append({"from": low, "to": high, "share": len(chosen) / len(tokens.kl), "kl": mean})
    return rows


def mean_over_texts(texts: Sequence[dict[str, Any]]) -> dict[str, float]:
    """The plain mean over texts of what a summary shows of `statistics`; {} if no text has tokens."""
    texts = [text for text in texts if text]
    if not texts:
        return {}
    names = ("same_top", "rms_dp", "log_ppl_ratio")
    means = {name: sum(text[name] for text in texts) / len(texts) for name in names}
    errors = sum(text["kl"]["error"] ** 2 for text in texts)
    return {
        "kl": sum(text["kl"]["mean"] for text in texts) / len(texts),
        "kl_error": math.sqrt(errors) / len(texts),
        **means,
    }
