"""Which alpha? Every candidate on the same batches, in turns: perplexity, answers, what is skipped, time (figure 7).

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
from eacmoe_lightning.skipping.apply import resting, skipping
from eacmoe_lightning.skipping.baselines import EES, ODP, Truncation, median_ratios
from eacmoe_lightning.skipping.rules import PESF, Rule
from eacmoe_lightning.skipping.selection import Survivors, skip_counts

SUMMED = ("pairs", "dropped", "sequence_experts", "sequence_skipped", "batch_experts", "batch_untouched")
NEARLY_UNIFORM = 0.9  # of the experts; Mixtral lies above it


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
    """PESF at each alpha beside no skipping and, with calibration windows, the baselines.

    Args:
        model: a causal LM with experts, compressed or not; a rule that is at work on it rests meanwhile.
        texts: windows [S, T] by name; each window is a sequence with its own kept experts.
        alphas: candidates in (0, 1].
        tolerance: how much of its perplexity any text may lose, as a share.
        survivors, rescue: of `PESF`.
        batch_size: windows per forward pass.
        calibration: [S, T] windows for EES and ODP; None leaves the baselines out.
        questions: per text, answered under every candidate.

    Returns:
        `rows`: of each candidate its `name`, `alpha` (0: no skipping; None: a baseline), `perplexity.<text>`,
        `increase` (relative, of the text that loses most), `accuracy.<text>`, `experts_skipped`, `experts_untouched`,
        `pairs_dropped` (shares, as in `SkipReport.summary`) and `latency` (median over the batches of the time relative
        to no skipping, candidates taking turns); `recommended`: an alpha or None; `effective_experts` and
        `is_nearly_uniform`.

    Raises:
        ValueError: an alpha is out of range, there is none, or the tolerance is negative.
    """
    if not alphas:
        raise ValueError("alphas is empty: pass candidates in (0, 1], such as 0.1 0.3 0.5 0.7")
    if not tolerance >= 0:
        raise ValueError(f"tolerance={tolerance} is negative: it is the share of perplexity that a text may lose")
    rules: dict[str, Rule | None] = {"none": None}
    rules |= {f"pesf {alpha:g}": PESF(alpha, survivors, rescue) for alpha in sorted(set(alphas))}
    with resting(model):
        if calibration is not None:
            ratios = median_ratios(model, calibration, batch_size)
            rules |= {"ceil(2K/3)": Truncation(), "ees": EES(ratios), "odp": ODP(ratios)}
        rows = measure(model, texts, rules, batch_size, questions or {})
        spread = effective_experts(model, texts, batch_size)
    return {
        "rows": rows,
        "tolerance": tolerance,
        "recommended": recommend(rows, tolerance),
        "effective_experts": spread,
        "is_nearly_uniform": spread > NEARLY_UNIFORM,
    }


@torch.no_grad()
def measure(
    model: PreTrainedModel,
    texts: dict[str, Tensor],
    rules: dict[str, Rule | None],
    batch_size: int,
    questions: dict[str, Questions],
) -> list[dict[str, Any]]:
    """A row for each rule, as `sweep` describes it; the first one is what the others are compared with."""
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
        name: {text: _accuracy(model, rule, asked, batch_size) for text, asked in questions.items()}
        for name, rule in rules.items()
    }
    scored = {text: windows.numel() - len(windows) for text, windows in texts.items()}
    first = next(iter(rules))
    rows = []
    for name, rule in rules.items():
        alpha = 0.0 if rule is None else getattr(rule, "alpha", None)
        loss = {text: nll[name][text] / scored[text] for text in texts}
        base = {text: nll[first][text] / scored[text] for text in texts}
        ratios = [own / base for own, base in zip(seconds[name], seconds[first], strict=True)]
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
    """The largest alpha up to which no candidate makes any text lose more than the tolerance; None: not even the least.

    Args:
        rows: of `measure`; those without an alpha do not count.
        tolerance: compared with `increase`.
    """
    best = None
    for row in sorted((row for row in rows if row["alpha"]), key=lambda row: row["alpha"]):
        if row["increase"] > tolerance:
            break
        best = row["alpha"]
    return best


@torch.no_grad()
def effective_experts(model: PreTrainedModel, texts: dict[str, Tensor], batch_size: int) -> float:
    """Over how many of its experts a block spreads a sequence's selections, as a share of E; a mean over everything.

    exp(entropy) / E of the counts, with Miller's correction for short sequences; 1 is uniform. Where it is close to 1
    there are no rare experts, and skipping the less frequent ones takes away nearly a full share of the work that
    tokens asked for: EAC-MoE's Mixtral, which falls from 72.6 to 58.2 points at 0.7.
    """
    blocks = MoEModel(model).moe_blocks
    shares: list[Tensor] = []
    for windows in texts.values():
        for batch in windows.split(batch_size):
            shape = batch.shape

            def note(module, args, output, shape=shape):
                ids, num_experts = output[2].view(*shape, -1), output[0].shape[1]
                counts = skip_counts(ids, ids.new_ones(shape, dtype=torch.bool), num_experts).double()
                total = counts.sum(1, keepdim=True)
                share = counts / total
                entropy = -torch.special.xlogy(share, share).sum(1) + ((counts > 0).sum(1) - 1) / (2 * total[:, 0])
                shares.append((entropy.exp() / num_experts).clamp(max=1))

            handles = [block.router.register_forward_hook(note) for block in blocks]
            try:
                model(input_ids=batch.to(model.device), use_cache=False)
            finally:
                for handle in handles:
                    handle.remove()
    return float(torch.cat(shares).mean())


def summary(result: dict[str, Any]) -> str:
    """The sweep as a table for the terminal, and what follows from it."""
    rows = result["rows"]
    texts, asked = list(rows[0]["perplexity"]), list(rows[0]["accuracy"])
    head = f"{'':12s}{'skipped':>9s}{'dropped':>9s}{'time':>7s}" + "".join(f" {t[:9]:>9s}" for t in texts)
    lines = [head + "".join(f" {'? ' + t[:7]:>9s}" for t in asked)]
    for row in rows:
        line = f"{row['name']:12s}{row['experts_skipped']:9.1%}{row['pairs_dropped']:9.1%}{row['latency']:7.3f}"
        line += "".join(f" {row['perplexity'][t]:9.3f}" for t in texts)
        lines.append(line + "".join(f" {row['accuracy'][t]:9.1%}" for t in asked))
    legend = "skipped: (sequence, expert) pairs; dropped: (token, expert) pairs; time: against none; then perplexities"
    lines.append(legend + ("; ?: questions answered rightly" if asked else ""))
    spread = result["effective_experts"]
    if result["is_nearly_uniform"]:
        lines.append(
            f"selection is nearly uniform: a sequence spreads over the equivalent of {spread:.0%} of the experts. "
            "There are no rare experts to skip: a large alpha takes away what tokens need, as from the paper's Mixtral"
        )
    else:
        lines.append(f"a sequence's selections spread over the equivalent of {spread:.0%} of the experts")
    best = result["recommended"]
    lines.append(
        f"recommended: alpha {best:g}, the largest up to which no text loses more than {result['tolerance']:.1%}"
        if best
        else f"recommended: no skipping; the least alpha already costs a text more than {result['tolerance']:.1%}"
    )
    return "\n".join(lines)


def _under(model: PreTrainedModel, rule: Rule | None):
    return nullcontext() if rule is None else skipping(model, rule)


def _now(model: PreTrainedModel) -> float:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return time.perf_counter()


def _accuracy(model: PreTrainedModel, rule: Rule | None, asked: Questions, batch_size: int) -> float:
    def score(batch: Tensor) -> Tensor:
        batch = batch.to(model.device)
        return -next_token_nll(model(input_ids=batch, use_cache=False).logits, batch)

    with _under(model, rule):
        return accuracy(answer(score, asked, batch_size).cpu(), asked.answers)
