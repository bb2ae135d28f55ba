"""Perplexity, divergence and expert-shift over named texts, over any number of batches and processes."""

from __future__ import annotations

import math
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchmetrics.aggregation import SumMetric

from eacmoe_lightning.evaluation.divergence import PerToken, joined, mean_over_texts, statistics
from eacmoe_lightning.evaluation.streams import NOISE_FLOOR, AfterBlock, run_batches
from eacmoe_lightning.models.moe import MoEModel
from eacmoe_lightning.routers.expert_shift import ExpertShift, mean_rates
from eacmoe_lightning.run.hidden import Shelf
from eacmoe_lightning.run.ranks import Ranks
from eacmoe_lightning.text.batches import shard
from eacmoe_lightning.text.windows import digest


class Evaluation:
    """Gathers batches of texts, runs them all block by block, and sums the results over batches and processes.

    Args:
        original: the reference model; None if the subject is itself an original.
        subject: the model that is evaluated.
        split: whether to split the damage into that of weights and that of selections (see `run_batches`).
        scratch: directory for the hidden states that are not in use; None keeps them in memory.
        ranks: this process among those of the evaluation.
        noise_floor: windows of each text, from its start, for which the original with its activations rounded runs
            beside itself; ignored without an original.
    """

    def __init__(
        self,
        original: MoEModel | None,
        subject: MoEModel,
        split: bool = False,
        scratch: Path | None = None,
        ranks: Ranks | None = None,
        noise_floor: int = 0,
    ) -> None:
        self.original, self.subject, self.split, self.scratch = original, subject, split, scratch
        self.ranks, self.noise_floor = ranks or Ranks(), noise_floor if original is not None else 0
        self.names = ["original"] + (["compressed"] if original else [])
        self.names += ["selection_damage", "weight_damage"] if original and split else []
        self.compared = self.names[1:] + ([NOISE_FLOOR] if self.noise_floor else [])
        self.batches: list[tuple[str, Tensor]] = []  # text, token ids [B, T]
        self.on_floor: set[int] = set()  # numbers of the batches that run the noise floor
        self.nll: dict[str, dict[str, SumMetric]] = {}  # text -> stream or `tokens` -> sum
        self.shift: dict[str, ExpertShift] = {}  # by text
        self.tokens: dict[str, dict[str, list[PerToken]]] = {}  # text -> stream -> batches
        self.positions: dict[str, dict[str, int]] = {}  # text -> stream -> tokens that went through the blocks
        self.distance: dict[str, Tensor] = {}  # by text float64 [streams, blocks]: sums over tokens
        self.effect: dict[str, Tensor] = {}  # by text float64 [MoE blocks]: sums over tokens; NaN if it cannot be had

    def _open(self, text: str) -> None:
        if text in self.nll:
            return
        device = self.subject.device
        self.nll[text] = {name: SumMetric().set_dtype(torch.float64).to(device) for name in [*self.names, "tokens"]}
        if self.original is not None:
            self.shift[text] = ExpertShift([block.top_k for block in self.subject.moe_blocks]).to(device)
            self.tokens[text] = {name: [] for name in self.compared}
            self.positions[text] = dict.fromkeys(self.compared, 0)
            self.distance[text] = torch.zeros(len(self.compared), len(self.subject.blocks), dtype=torch.float64)
            self.effect[text] = torch.zeros(len(self.subject.moe_blocks), dtype=torch.float64)

    def add(self, text: str, input_ids: Tensor, first: int = 0) -> None:
        """Adds a batch of windows [B, T] for `compute` to run; `first` is its first window's number in the text."""
        self._open(text)
        floor = min(max(self.noise_floor - first, 0), len(input_ids))
        for rows, on_floor in ((input_ids[:floor], True), (input_ids[floor:], False)):
            if len(rows):
                if on_floor:
                    self.on_floor.add(len(self.batches))
                self.batches.append((text, rows))

    def _note_block(self, batch: int, after: AfterBlock) -> None:
        text = self.batches[batch][0]
        for name, distance in after.distance.items():
            self.distance[text][self.compared.index(name), after.block] += float(distance.double().sum())
            if after.block == 0:
                self.positions[text][name] += len(distance)
        if after.compressed_ids is not None:
            self.shift[text].update([after.ids], [after.compressed_ids], first=after.moe_block)
            effect = math.nan if after.effect is None else float(after.effect.double().sum())
            self.effect[text][after.moe_block] += effect

    def _note_tokens(self, batch: int, name: str, tokens: PerToken) -> None:
        self.tokens[self.batches[batch][0]][name].append(tokens)

    def _run(self) -> None:
        batches = [ids for _, ids in self.batches]
        with Shelf.opened(self.scratch) if self.scratch is not None else nullcontext({}) as hidden:
            all_nll = run_batches(
                self.original, self.subject, batches, self.split, self._note_block, hidden, self._note_tokens,
                self.on_floor,
            )  # fmt: skip
        for (text, _), nll in zip(self.batches, all_nll, strict=True):
            for name in self.names:
                self.nll[text][name].update(nll[name].double().sum())
            self.nll[text]["tokens"].update(nll["original"].numel())
        self.batches.clear()
        self.on_floor.clear()

    def compute(self, texts: list[str]) -> dict[str, Any]:
        """Runs what was added. Every process must call it with the same texts, even with texts that it has no batch of.

        Returns:
            `perplexity.<text>.<stream>`; `tokens.<text>`; with an original also `divergence`, with `mean.<stream>`,
            `texts.<text>.<stream>` (`divergence.statistics`) and `blocks[]`, and `expert_shift`, with `mean`,
            `texts.<text>` and `blocks[]`. `divergence.blocks[].<stream>` is the mean relative distance of the hidden
            states after the block from the original's; `weighted` among the change rates is the mean over tokens of
            `streams.effect_of_selection`, left out where it cannot be had.
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
            "divergence": {},
        }
        if self.original is not None:
            result["expert_shift"] = self._expert_shift(texts)
            result["divergence"] = self._divergence(texts)
        return result

    def _expert_shift(self, texts: list[str]) -> dict[str, Any]:
        by_text = {text: self.shift[text].compute() for text in texts}
        effects = {
            text: self.ranks.sum(self.effect[text].clone()) / self._positions(text)[0].clamp(min=1) for text in texts
        }
        if all(bool(effect.isfinite().all()) for effect in effects.values()):
            for text, rows in by_text.items():
                for row, effect in zip(rows, effects[text].tolist(), strict=True):
                    row["weighted"] = effect
        blocks = [mean_rates([by_text[text][i] for text in texts]) for i in range(len(self.subject.moe_blocks))]
        return {
            "mean": mean_rates(blocks),
            "texts": {text: mean_rates(rates) for text, rates in by_text.items()},
            "blocks": [{"block": b.index, **rates} for b, rates in zip(self.subject.moe_blocks, blocks, strict=True)],
        }

    def _divergence(self, texts: list[str]) -> dict[str, Any]:
        by_text: dict[str, dict[str, Any]] = {text: {} for text in texts}
        distance = torch.zeros(len(self.compared), len(self.subject.blocks), dtype=torch.float64)
        for text in texts:
            for name in self.compared:
                mine = torch.stack(joined(self.tokens[text][name]), 1)  # [n, fields]
                by_text[text][name] = statistics(PerToken(*self.ranks.join(mine).T.contiguous()))
            positions = self._positions(text).clamp(min=1).unsqueeze(1)
            distance += self.ranks.sum(self.distance[text].clone()) / positions / len(texts)
        return {
            "mean": {name: mean_over_texts([by_text[text][name] for text in texts]) for name in self.compared},
            "texts": by_text,
            "blocks": [
                {"block": i, **dict(zip(self.compared, row, strict=True))} for i, row in enumerate(distance.T.tolist())
            ],
        }

    def _positions(self, text: str) -> Tensor:
        """[streams], the tokens of a text that went through the blocks in all processes; `compressed` comes first."""
        return self.ranks.sum(torch.tensor(list(self.positions[text].values()), dtype=torch.float64))


@torch.no_grad()
def evaluate(
    original: MoEModel | None,
    subject: MoEModel,
    texts: dict[str, Tensor],
    batch_size: int,
    split: bool = False,
    ranks: Ranks | None = None,
    scratch: Path | None = None,
    noise_floor: int = 0,
) -> dict[str, Any]:
    """`Evaluation.compute` over named windows [S, T], divided among the processes; with their `heldout_digest`."""
    ranks = ranks or Ranks()
    evaluation = Evaluation(original, subject, split, scratch, ranks, noise_floor)
    for text, windows in texts.items():
        rows = shard(len(windows), ranks.rank, ranks.world)
        for start in range(rows.start, rows.stop, batch_size):
            evaluation.add(text, windows[start : min(start + batch_size, rows.stop)], first=start)
    return evaluation.compute(list(texts)) | {"heldout_digest": digests(texts)}


def digests(texts: dict[str, Tensor]) -> dict[str, str]:
    """What tells the windows [S, T] of each text from others of the same name."""
    return {text: digest(windows) for text, windows in texts.items()}
