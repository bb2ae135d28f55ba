"""Choosing alpha: perplexity, accuracy, share skipped and time of every candidate on the same batches (figure 7).

Pure functions over a model and token windows; `analyze --alphas` prints and draws what they return.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from eacmoe_lightning.evaluation.choice_task import Questions, accuracy, answer
from eacmoe_lightning.evaluation.streams import next_token_nll
from eacmoe_lightning.models.moe import MoEModel
from eacmoe_lightning.models.routing import Routing
from eacmoe_lightning.skipping.apply import resting, skipping
from eacmoe_lightning.skipping.baselines import EES, ODP, Truncation, median_ratios
from eacmoe_lightning.skipping.rules import PESF, Rule
from eacmoe_lightning.skipping.selection import Survivors, skip_counts

SUMMED = ("pairs", "dropped", "sequence_experts", "sequence_skipped", "batch_experts", "batch_untouched")
NEARLY_UNIFORM = 0.9  # share of the experts (`effective_experts`); Mixtral is above it


@torch.no_grad()
def sweep(
    model: PreTrainedModel,
    texts: dict[str, Tensor],
    alphas: Sequence[float],
    tolerance: float = 0.01,
    survivors: Survivors = "keep",
    rescue: float | None = None,
    batch_size: int = 4,
    calibration: Tensor | None = None,
    questions: dict[str, Questions] | None = None,
) -> dict[str, Any]:
    """Measures PESF at each alpha against no skipping and, given calibration windows, against the baselines.

    Args:
        model: a causal LM with experts, compressed or not; a rule set on it is suspended for the sweep.
        texts: windows [S, T] by name; experts are kept or skipped for each window separately.
        alphas: candidates in (0, 1].
        tolerance: the largest relative increase in perplexity that any text may have.
        survivors, rescue: see `PESF`.
        batch_size: windows per forward pass.
        calibration: windows [S, T] for EES and ODP; None leaves the baselines out.
        questions: questions by text, answered under every candidate.

    Returns:
        `rows`: for each candidate its `name`, `alpha` (0: no skipping; None: a baseline), `perplexity.<text>`,
        `increase` (relative, of the text that loses most), `accuracy.<text>`, `experts_skipped`, `experts_untouched`,
        `pairs_dropped` (shares, as in `SkipReport.summary`) and `latency` (time relative to no skipping, the median
        over batches, on each of which the candidates take turns); `recommended`: an alpha or None;
        `effective_experts` and `is_nearly_uniform`.

    Raises:
        ValueError: an alpha is out of range, there are no alphas, or the tolerance is negative.
    """
    if not alphas:
        raise ValueError("alphas is empty: pass candidates in (0, 1], such as 0.1 0.3 0.5 0.7")
    if not tolerance >= 0:
        raise ValueError(f"tolerance={tolerance} is negative: it is the relative increase in perplexity to accept")
    rules: dict[str, Rule | None] = {"none": None}
    rules |= {f"pesf {alpha:g}": PESF(alpha, survivors, rescue) for alpha in sorted(set(alphas))}
    with resting(model):
        if calibration is not None:
            ratios = median_ratios(model, calibration, batch_size)
            rules |= {"ceil(2K/3)": Truncation(), "ees": EES(ratios), "odp": ODP(ratios)}
        rows = measure(model, texts, rules, batch_size, questions or {})
        effective_share = effective_experts(model, texts, batch_size)
    return {
        "rows": rows,
        "tolerance": tolerance,
        "recommended": recommend(rows, tolerance),
        "effective_experts": effective_share,
        "is_nearly_uniform": effective_share > NEARLY_UNIFORM,
    }


@torch.no_grad()
def measure(
    model: PreTrainedModel,
    texts: dict[str, Tensor],
    rules: dict[str, Rule | None],
    batch_size: int,
    questions: dict[str, Questions],
) -> list[dict[str, Any]]:
    """A row for each rule, as `sweep` describes it; the others are compared with the first one."""
    nll = {name: dict.fromkeys(texts, 0.0) for name in rules}
    seconds: dict[str, list[float]] = {name: [] for name in rules}
    sums = {name: dict.fromkeys(SUMMED, 0.0) for name in rules}
    model(input_ids=next(iter(texts.values()))[:batch_size].to(model.device), use_cache=False)  # warms up
    for text, windows in texts.items():
        for batch in windows.split(batch_size):
            batch = batch.to(model.device)
            for name, rule in rules.items():
                with _under(model, rule) as report:
                    start = _now(model)
                    logits = model(input_ids=batch, use_cache=False).logits
                    seconds[name].append(_now(model) - start)
                    for key in SUMMED if report else ():
                        sums[name][key] += report.summary()[key]
                nll[name][text] += float(next_token_nll(logits, batch).double().sum())
    answers = {
        name: {text: _accuracy(model, rule, of_text, batch_size) for text, of_text in questions.items()}
        for name, rule in rules.items()
    }
    scored = {text: windows.numel() - len(windows) for text, windows in texts.items()}
    first = next(iter(rules))
    rows = []
    for name, rule in rules.items():
        alpha = 0.0 if rule is None else getattr(rule, "alpha", None)
        loss = {text: nll[name][text] / scored[text] for text in texts}
        base = {text: nll[first][text] / scored[text] for text in texts}
        ratios = [elapsed / reference for elapsed, reference in zip(seconds[name], seconds[first], strict=True)]
        rows.append(
            {
                "name": name,
                "alpha": alpha,
                "perplexity": {text: math.exp(value) for text, value in loss.items()},
                "increase": max(math.exp(loss[text] - base[text]) - 1 for text in texts),
                "accuracy": answers[name],
                "pairs_dropped": sums[name]["dropped"] / max(sums[name]["pairs"], 1),
                "experts_skipped": sums[name]["sequence_skipped"] / max(sums[name]["sequence_experts"], 1),
                "experts_untouched": sums[name]["batch_untouched"] / max(sums[name]["batch_experts"], 1),
                "latency": statistics.median(ratios),
            }
        )
    return rows


def recommend(rows: list[dict[str, Any]], tolerance: float) -> float | None:
    """The largest alpha such that no candidate up to it exceeds the tolerance on any text; None if the smallest does.

    Args:
        rows: result of `measure`; rows without an alpha are ignored.
        tolerance: largest `increase` to accept.
    """
    best = None
    for row in sorted((row for row in rows if row["alpha"]), key=lambda row: row["alpha"]):
        if row["increase"] > tolerance:
            break
        best = row["alpha"]
    return best


@torch.no_grad()
def effective_experts(model: PreTrainedModel, texts: dict[str, Tensor], batch_size: int) -> float:
    """The share of its experts over which a block spreads a sequence's selections; the mean over blocks and sequences.

    It is exp(entropy) / E of the counts, with Miller's correction for short sequences; 1 is uniform. If it is close to
    1, there are no rare experts: skipping the less frequent ones drops almost their full share of the selections. That
    is why EAC-MoE's Mixtral falls from 72.6 to 58.2 points at alpha 0.7.
    """
    blocks = MoEModel(model).moe_blocks
    shares: list[Tensor] = []
    for windows in texts.values():
        for batch in windows.split(batch_size):
            shape = batch.shape

            def record(routing: Routing, _: Tensor | None, shape: torch.Size = shape) -> None:
                ids, num_experts = routing.ids.view(*shape, -1), routing.logits.shape[1]
                counts = skip_counts(ids, ids.new_ones(shape, dtype=torch.bool), num_experts).double()
                total = counts.sum(1, keepdim=True)
                share = counts / total
                entropy = -torch.special.xlogy(share, share).sum(1) + ((counts > 0).sum(1) - 1) / (2 * total[:, 0])
                shares.append((entropy.exp() / num_experts).clamp(max=1))

            handles = [block.watch_router(record) for block in blocks]
            try:
                model(input_ids=batch.to(model.device), use_cache=False)
            finally:
                for handle in handles:
                    handle.remove()
    return float(torch.cat(shares).mean())


def summary(result: dict[str, Any]) -> str:
    """The sweep as a table for the terminal, with the recommendation."""
    rows = result["rows"]
    texts, with_questions = list(rows[0]["perplexity"]), list(rows[0]["accuracy"])
    head = f"{'':12s}{'skipped':>9s}{'dropped':>9s}{'time':>7s}" + "".join(f" {t[:9]:>9s}" for t in texts)
    lines = [head + "".join(f" {'? ' + t[:7]:>9s}" for t in with_questions)]
    for row in rows:
        line = f"{row['name']:12s}{row['experts_skipped']:9.1%}{row['pairs_dropped']:9.1%}{row['latency']:7.3f}"
        line += "".join(f" {row['perplexity'][t]:9.3f}" for t in texts)
        lines.append(line + "".join(f" {row['accuracy'][t]:9.1%}" for t in with_questions))
    legend = (
        "skipped: (sequence, expert) pairs; dropped: (token, expert) pairs; time: relative to none; then perplexity"
    )
    lines.append(legend + ("; ?: questions answered correctly" if with_questions else ""))
    effective_share = result["effective_experts"]
    if result["is_nearly_uniform"]:
        lines.append(
            f"selection is nearly uniform: a sequence effectively uses {effective_share:.0%} of the experts. There are "
            "no rare experts to skip: a large alpha drops experts that tokens need, as in the paper's Mixtral"
        )
    else:
        lines.append(f"a sequence effectively uses {effective_share:.0%} of the experts")
    best, tolerance = result["recommended"], result["tolerance"]
    lines.append(
        f"recommended: alpha {best:g}, the largest up to which perplexity rises by at most {tolerance:.1%} on any text"
        if best
        else f"recommended: no skipping; the smallest alpha raises perplexity by over {tolerance:.1%} on some text"
    )
    return "\n".join(lines)


def _under(model: PreTrainedModel, rule: Rule | None):
    return nullcontext() if rule is None else skipping(model, rule)


def _now(model: PreTrainedModel) -> float:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return time.perf_counter()


def _accuracy(model: PreTrainedModel, rule: Rule | None, questions: Questions, batch_size: int) -> float:
    def score(batch: Tensor) -> Tensor:
        batch = batch.to(model.device)
        return -next_token_nll(model(input_ids=batch, use_cache=False).logits, batch)

    with _under(model, rule):
        return accuracy(answer(score, questions, batch_size).cpu(), questions.answers)
