"""What errors do to a model: perplexity, KL divergence, accuracy and changed selections.

Held-out sequences run through the untouched model block by block. If the first disturbed block of a cell is b, the
hidden states before b are those of the untouched model, and only the blocks from b on run again. Cells are measured in
the order of their first block, so one set of hidden states is enough. Another set, after the last block, gives the
untouched model's predictions, from which the divergence is measured.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from eacmoe_lightning.evaluation.choice_task import Questions, accuracy, choose
from eacmoe_lightning.evaluation.divergence import (
    PerToken,
    compare,
    joined,
    log_probabilities,
    mean_over_texts,
    nll_of,
    statistics,
)
from eacmoe_lightning.models.block import Block
from eacmoe_lightning.models.moe import MoEModel
from eacmoe_lightning.models.routing import Routing
from eacmoe_lightning.routers.expert_shift import change_counts, change_rates, expert_load, mean_rates
from eacmoe_lightning.run.hidden import State, rows_of


@dataclass
class Text:
    """One held-out text: windows for the perplexity, questions for the accuracy (`choice_task`)."""

    windows: Tensor  # int64 [S, T]
    questions: Questions | None = None


@dataclass
class _Batch:
    """Sequences of one text that run together: windows, or the choices of questions."""

    text: str
    input_ids: Tensor  # [B, T]
    first: int  # position of the first scored token
    is_window: bool
    state: State | None = None  # before block `Measurement.at`; None before block 0
    last: State | None = None  # after the untouched model's last block; of windows
    ids: list[Tensor] = field(default_factory=list)  # the untouched model's selections, per MoE block [N, K]


class Measurement:
    """Measures a model repeatedly on the same texts.

    Args:
        moe: the model, still untouched.
        texts: held-out texts by name.
        batch_tokens: tokens per forward pass.

    Attributes:
        baseline: the result of `measure` for the untouched model, without changed selections.
        load: by block index, int64 [E]: tokens that the untouched model routes to each expert, over all windows.
    """

    def __init__(self, moe: MoEModel, texts: dict[str, Text], batch_tokens: int = 4096) -> None:
        self.moe, self.texts = moe, texts
        self.batches = [batch for name, text in texts.items() for batch in _batches(name, text, batch_tokens)]
        self.at = 0
        self.load = {
            block.index: torch.zeros(block.num_experts, dtype=torch.int64, device=moe.device)
            for block in moe.moe_blocks
        }
        self.baseline = self._run(remember=True)

    @torch.no_grad()
    def seek(self, index: int) -> None:
        """Moves the untouched hidden states to the block of this index; no expert may be disturbed at this time."""
        if index < self.at:
            self.at = 0
            for batch in self.batches:
                batch.state = None
        for block in self.moe.blocks[self.at : index]:
            for batch in self.batches:
                batch.state, _ = self._through(block, batch, batch.state)
        self.at = index

    def _through(self, block: Block, batch: _Batch, state: State | None) -> tuple[State, Routing | None]:
        return block.forward(self.moe.call(block.index, batch.input_ids.to(self.moe.device), state))

    def measure(self) -> dict[str, Any]:
        """Measures the model as it is now, from the block of `seek` on.

        Returns:
            `nats.<text>`, mean nats per token; `divergence`, from the untouched model (`divergence.mean_over_texts`);
            `accuracy.<text>`; `expert_shift.<rate>`, over all windows and MoE blocks; `expert_shift_blocks.<index>`,
            the share of changed selections in each block from `seek` on.
        """
        return self._run(remember=False)

    @torch.no_grad()
    def _run(self, remember: bool) -> dict[str, Any]:
        """Runs all batches from the block of `seek` on. The untouched model's selections and states are remembered."""
        nats = {name: 0.0 for name in self.texts}
        scores: dict[str, list[Tensor]] = {name: [] for name in self.texts}
        tokens_of: dict[str, list[PerToken]] = {name: [] for name in self.texts}
        moe_index = {block.index: i for i, block in enumerate(self.moe.moe_blocks)}
        counts = torch.zeros(len(moe_index), 4, dtype=torch.int64, device=self.moe.device)
        for batch in self.batches:
            state = batch.state
            for block in self.moe.blocks[self.at :]:
                state, routing = self._through(block, batch, state)
                if routing is None or not batch.is_window:
                    continue
                if remember:
                    batch.ids.append(routing.ids)
                    self.load[block.index] += expert_load(routing.ids, block.num_experts)
                else:
                    position = moe_index[block.index]
                    counts[position] += change_counts(batch.ids[position], routing.ids)
            targets = batch.input_ids[:, batch.first :].to(self.moe.device)
            logits = self._logits(batch, state)
            if batch.is_window and not remember:
                base = self._logits(batch, batch.last)
                tokens = compare(base.flatten(0, 1), logits.flatten(0, 1), targets.flatten())
                tokens_of[batch.text].append(tokens)
                nll = tokens.nll
            else:
                nll = nll_of(log_probabilities(logits.flatten(0, 1)), targets.flatten())
            if batch.is_window:
                nats[batch.text] += nll.double().sum().item()
                batch.last = state if remember else batch.last
            else:
                scores[batch.text].append(-nll.view_as(targets))
        result: dict[str, Any] = {
            "nats": {name: nats[name] / text.windows[:, 1:].numel() for name, text in self.texts.items()},
            "accuracy": {
                name: accuracy(
                    choose(torch.cat(scores[name]).cpu(), text.questions.input_ids.shape[1]), text.questions.answers
                )
                for name, text in self.texts.items()
                if text.questions is not None
            },
        }
        if not remember:
            result["divergence"] = mean_over_texts([statistics(joined(parts)) for parts in tokens_of.values()])
            result |= self._expert_shift(counts)
        return result

    def _expert_shift(self, counts: Tensor) -> dict[str, Any]:
        """Counts of changed selections (`change_counts`) [MoE blocks, 4] as rates, over all blocks and by block."""
        tokens, blocks = sum(text.windows.numel() for text in self.texts.values()), self.moe.moe_blocks
        rates = [change_rates(row, tokens, block.top_k) for row, block in zip(counts, blocks, strict=True)]
        by_block = {str(b.index): of["selections"] for b, of in zip(blocks, rates, strict=True) if b.index >= self.at}
        return {"expert_shift": mean_rates(rates), "expert_shift_blocks": by_block}

    def _logits(self, batch: _Batch, state: State) -> Tensor:
        """Logits [B, n, V] from which the scored tokens are predicted; the head runs for these alone."""
        scored, ids = slice(batch.first - 1, -1), batch.input_ids.to(self.moe.device)
        if isinstance(state, dict):
            state = state | {"shared": {}}  # which the head does not read
        return self.moe.head(rows_of(state, (slice(None), scored)), ids[:, scored])


def _batches(name: str, text: Text, batch_tokens: int) -> list[_Batch]:
    parts = [(text.windows, 1, True)]
    if text.questions is not None:
        parts.append((text.questions.input_ids.flatten(0, 1), text.questions.context_length, False))
    return [
        _Batch(name, rows, first, is_window)
        for sequences, first, is_window in parts
        for rows in sequences.split(max(1, batch_tokens // sequences.shape[1]))
    ]
