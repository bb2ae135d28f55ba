"""Perplexity and expert-shift over named texts, over any number of batches and processes."""

from __future__ import annotations

import math
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchmetrics.aggregation import SumMetric

from eacmoe_lightning.evaluation.streams import run_batches
from eacmoe_lightning.models.moe import MoEModel
from eacmoe_lightning.routers.expert_shift import ExpertShift, mean_rates
from eacmoe_lightning.run.hidden import Shelf
from eacmoe_lightning.run.ranks import Ranks
from eacmoe_lightning.text.batches import shard


class Evaluation:
    """Gathers batches of texts, runs them all block by block, and sums the results over batches and processes.

    Args:
        original: the reference model; None if the subject is itself an original.
        subject: the model that is evaluated.
        split: whether to split the damage into that of weights and that of selections (see `run_batches`).
        scratch: directory for the hidden states that are not in use; None keeps them in memory.
    """

    def __init__(
        self, original: MoEModel | None, subject: MoEModel, split: bool = False, scratch: Path | None = None
    ) -> None:
        self.original, self.subject, self.split, self.scratch = original, subject, split, scratch
        self.names = ["original"] + (["compressed"] if original else [])
        self.names += ["selection_damage", "weight_damage"] if original and split else []
        self.batches: list[tuple[str, Tensor]] = []  # text, token ids [B, T]
        self.nll: dict[str, dict[str, SumMetric]] = {}  # text -> stream or `tokens` -> sum
        self.shift: dict[str, ExpertShift] = {}  # by text

    def _open(self, text: str) -> None:
        if text in self.nll:
            return
        device = self.subject.device
        self.nll[text] = {name: SumMetric().set_dtype(torch.float64).to(device) for name in [*self.names, "tokens"]}
        if self.original is not None:
            self.shift[text] = ExpertShift([block.top_k for block in self.subject.moe_blocks]).to(device)

    def add(self, text: str, input_ids: Tensor) -> None:
        """Adds a batch of windows [B, T] for `compute` to run."""
        self._open(text)
        self.batches.append((text, input_ids))

    def _run(self) -> None:
        def count(batch: int, block: int, original: Tensor, ids: Tensor | None) -> None:
            if ids is not None:
                self.shift[self.batches[batch][0]].update([original], [ids], first=block)

        batches = [ids for _, ids in self.batches]
        with Shelf.opened(self.scratch) if self.scratch is not None else nullcontext({}) as hidden:
            all_nll = run_batches(self.original, self.subject, batches, self.split, count, hidden)
        for (text, _), nll in zip(self.batches, all_nll, strict=True):
            for name in self.names:
                self.nll[text][name].update(nll[name].double().sum())
            self.nll[text]["tokens"].update(nll["original"].numel())
        self.batches.clear()

    def compute(self, texts: list[str]) -> dict[str, Any]:
        """Returns `perplexity.<text>.<stream>`, `tokens.<text>`, and `expert_shift` with `mean`, `texts` and `blocks`.

        Every process must call it with the same texts, even with texts of which it has no batch.
        """
        for text in texts:
            self._open(text)
        if self.batches:
            self._run()
        tokens = {text: float(self.nll[text]["tokens"].compute()) for text in texts}
        perplexity = {
            text: {name: math.exp(float(self.nll[text][name].compute()) / max(tokens[text], 1)) for name in self.names}
            for text in texts
        }
        result: dict[str, Any] = {
            "perplexity": perplexity,
            "tokens": {k: int(v) for k, v in tokens.items()},
            "expert_shift": {},
        }
        if self.original is not None:
            by_text = {text: self.shift[text].compute() for text in texts}
            blocks = [mean_rates([by_text[text][i] for text in texts]) for i in range(len(self.subject.moe_blocks))]
            result["expert_shift"] = {
                "mean": mean_rates(blocks),
                "texts": {text: mean_rates(rates) for text, rates in by_text.items()},
                "blocks": [
                    {"block": b.index, **rates} for b, rates in zip(self.subject.moe_blocks, blocks, strict=True)
                ],
            }
        return result


@torch.no_grad()
def evaluate(
    original: MoEModel | None,
    subject: MoEModel,
    texts: dict[str, Tensor],
    batch_size: int,
    split: bool = False,
    ranks: Ranks | None = None,
    scratch: Path | None = None,
) -> dict[str, Any]:
    """`Evaluation.compute` over named windows [S, T], divided among the processes."""
    ranks = ranks or Ranks()
    evaluation = Evaluation(original, subject, split, scratch)
    for text, windows in texts.items():
        rows = shard(len(windows), ranks.rank, ranks.world)
        for start in range(rows.start, rows.stop, batch_size):
            evaluation.add(text, windows[start : min(start + batch_size, rows.stop)])
    return evaluation.compute(list(texts))
