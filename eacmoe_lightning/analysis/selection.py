"""What expert loads show: how similar two texts are to the router, which experts idle, how evenly work is spread.

A text's *selection frequency* in a block is the share of selections that each expert gets (EAC-MoE, section 4.3). Two
texts are compared by their frequencies, concatenated over all blocks (figure 2 of the paper).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from eacmoe_lightning.evaluation.streams import run_streams
from eacmoe_lightning.models.moe import MoEModel
from eacmoe_lightning.routers.expert_shift import expert_load

SIMILAR = 0.8  # in the paper, texts of the same task category are above it, texts of different categories below


def selection_frequency(load: Tensor | Sequence[int]) -> Tensor:
    """[E] loads -> [E] float64, the share of selections that each expert gets (all 0 if there are no selections)."""
    load = torch.as_tensor(load).double()
    return load / load.sum().clamp(min=1)


def cosine_similarity(frequencies: Sequence[Tensor]) -> Tensor:
    """[S, S] float64: cosines between S texts' frequencies, each flattened over blocks."""
    rows = torch.nn.functional.normalize(torch.stack([f.double().flatten() for f in frequencies]), dim=-1)
    return rows @ rows.T


def coverage(load: Tensor, floor: float = 0.0) -> float:
    """The share of experts that are selected at all, or with a floor, at least `floor` times as often as the mean."""
    load = load.double()
    return float(((load > 0) & (load >= floor * load.mean())).double().mean())


def load_balance(load: Tensor) -> dict[str, float]:
    """How evenly loads [E] are spread.

    Returns:
        `entropy`: entropy of the selection frequency over log E: 1 is uniform, 0 a single expert.
        `max_over_mean`: the busiest expert's load over the mean: 1 is uniform, E a single expert.
    """
    frequency = selection_frequency(load)
    entropy = float(-torch.special.xlogy(frequency, frequency).sum())
    return {
        "entropy": entropy / math.log(len(load)) if len(load) > 1 else 1.0,
        "max_over_mean": float(frequency.max() * len(load)),
    }


@dataclass
class Selections:
    """The experts that a model selected for one text.

    Attributes:
        loads: per MoE block, tokens routed to each expert, [E] int64. E may differ between blocks.
        halves: the same, for the even and the odd windows alone.
        nll: sum of the negative log-likelihoods in nats.
        num_tokens: tokens that were routed.
        num_scored: tokens with a likelihood: all but the first of each window.
    """

    loads: list[Tensor]
    halves: tuple[list[Tensor], list[Tensor]]
    nll: float = 0.0
    num_tokens: int = 0
    num_scored: int = 0
    frequencies: list[Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self.frequencies = [selection_frequency(load) for load in self.loads]

    @property
    def perplexity(self) -> float:
        return math.exp(self.nll / self.num_scored) if self.num_scored else math.nan

    @property
    def within(self) -> float | None:
        """Cosine between the even and the odd windows: tells how much of a difference between texts is chance."""
        if any(not load.sum() for half in self.halves for load in half):
            return None  # there is only one window
        even, odd = (torch.cat([selection_frequency(load) for load in half]) for half in self.halves)
        return float(cosine_similarity([even, odd])[0, 1])


@torch.no_grad()
def select(model: MoEModel, windows: Tensor, batch_size: int) -> Selections:
    """Runs windows [S, T] through a model and counts the experts that its routers select."""
    sizes = [block.num_experts for block in model.moe_blocks]
    halves = tuple([torch.zeros(e, dtype=torch.int64, device=model.device) for e in sizes] for _ in range(2))
    nll = torch.zeros((), dtype=torch.float64, device=model.device)
    for start in range(0, len(windows), batch_size):
        batch = windows[start : start + batch_size].to(model.device)
        streams = run_streams(None, model, batch)
        nll += streams.nll["original"].double().sum()
        for block, ids in enumerate(streams.original_ids):
            by_window = ids.view(len(batch), -1)  # [b, T*K]
            for parity, half in enumerate(halves):
                half[block] += expert_load(by_window[(start + parity) % 2 :: 2], sizes[block])
    loads = [(even + odd).cpu() for even, odd in zip(*halves, strict=True)]
    halves = tuple([load.cpu() for load in half] for half in halves)
    return Selections(loads, halves, float(nll), windows.numel(), windows.numel() - len(windows))


def describe(texts: dict[str, Selections], blocks: Sequence[int], floor: float) -> dict:
    """All the measures above as plain numbers.

    Args:
        texts: selections by the text's name.
        blocks: indices of the MoE blocks.
        floor: for `coverage_above_floor`.

    Returns:
        `similarity.texts`, `.matrix` [S][S], `.within.<text>`, `.threshold`, `.similar` (pairs above it);
        `texts.<text>.perplexity`, `.tokens`, `.coverage`, `.coverage_above_floor`, `.entropy`, `.max_over_mean` (means
        over blocks); `blocks[]` with `block`, `num_experts` and per text `load`, `frequency` and the same four.
    """
    names = list(texts)
    matrix = cosine_similarity([torch.cat(s.frequencies) for s in texts.values()]).tolist()
    rows = [
        {
            "block": block,
            "num_experts": len(next(iter(texts.values())).loads[i]),
            "texts": {name: _of_block(s.loads[i], floor) for name, s in texts.items()},
        }
        for i, block in enumerate(blocks)
    ]
    means = {
        name: {
            key: sum(row["texts"][name][key] for row in rows) / len(rows)
            for key in ("coverage", "coverage_above_floor", "entropy", "max_over_mean")
        }
        for name in names
    }
    return {
        "similarity": {
            "texts": names,
            "matrix": matrix,
            "within": {name: s.within for name, s in texts.items()},
            "threshold": SIMILAR,
            "similar": [
                [a, b] for i, a in enumerate(names) for j, b in enumerate(names) if i < j and matrix[i][j] > SIMILAR
            ],
        },
        "texts": {
            name: {"perplexity": s.perplexity, "tokens": s.num_tokens, **means[name]} for name, s in texts.items()
        },
        "blocks": rows,
    }


def _of_block(load: Tensor, floor: float) -> dict:
    return {
        "load": load.tolist(),
        "frequency": selection_frequency(load).tolist(),
        "coverage": coverage(load),
        "coverage_above_floor": coverage(load, floor),
        **load_balance(load),
    }
