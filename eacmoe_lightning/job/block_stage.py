"""The block stage: one block's weights are trained towards the original block's output.

The block gets x_hat, the output of the compressed prefix; its target is what the original block makes of x, the
original's own stream (`tuning.losses.reconstruction`). Some calibration windows are held back: after every pass they
judge whether it was an improvement, and the best pass is taken, or the solver's result if none was better.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from eacmoe_lightning.job.stage import WeightStage
from eacmoe_lightning.models.block import Block
from eacmoe_lightning.run.block_file import Reconstruction
from eacmoe_lightning.run.hidden import State, hidden_of
from eacmoe_lightning.tuning.chain import Chain
from eacmoe_lightning.tuning.losses import reconstruction, selection


@dataclass
class Progress:
    """How far the training of a block has come; part of checkpoints.

    Attributes:
        unit: mean square of what the original block adds to its input, the unit of the squared error.
        held_back: loss on the windows held back, before the first and after every pass.
        taken: the pass with the least of these; 0 is the solver's result.
        best: the trained tensors after that pass (`TrainedParts.values`); None if they are the present ones.
    """

    unit: float
    held_back: list[float] = field(default_factory=list)
    taken: int = 0
    best: dict[str, Tensor] | None = None


class BlockStage(WeightStage):
    """The block stage of the current block."""

    curve, rate_options = "block_stage/loss", "block_*_lr"
    progress: Progress | None = None

    @property
    def block(self) -> Block:
        return self.calibration.block

    def state(self) -> dict[str, Any] | None:
        """For a checkpoint."""
        return self.progress and vars(self.progress)

    def load_state(self, state: dict[str, Any] | None) -> None:
        self.progress = state and Progress(**state)

    def start(self, held_back: Iterable[Tensor]) -> None:
        """Begins a block; its weights are in `parts`.

        Args:
            held_back: this process's windows that are held back, in batches of global indices [b].
        """
        self.progress = Progress(self.calibration.streams.added_square())
        self.end_pass(held_back)

    def losses(self, batch: dict[str, Tensor]) -> Tensor | None:
        """As of every stage; windows that are held back have a loss of 0."""
        taken = batch["counts"]
        if not taken.any() or not any(self.rates.values()):
            return None
        losses = self.window_losses(batch["index"][taken])
        return losses.new_zeros(batch["weights"].shape).index_put((taken,), losses).flatten()

    def window_losses(self, window_ids: Tensor) -> Tensor:
        """The loss of every token of windows with these global indices [b] -> [b, T], differentiable."""
        in_one = self.at_once is None or self.at_once >= len(window_ids)
        step = WindowStep(self, window_ids, None if in_one else self.at_once)
        chain = Chain([step], len(window_ids), self.parts.moe.device, self.precision, keeps_activations=in_one)
        return chain.losses().view(len(window_ids), -1)

    @torch.no_grad()
    def end_pass(self, held_back: Iterable[Tensor], is_last: bool = False) -> None:
        """Measures the windows held back (as in `start`), and keeps the trained tensors if they are the best so far."""
        progress, streams = self.progress, self.calibration.streams
        total = torch.zeros(2, dtype=torch.float64)
        for index in held_back:
            losses = streams.counted(self.window_losses(index).flatten(), streams.local(index)).double()
            total += torch.tensor([losses.sum().item(), losses.numel()], dtype=torch.float64)
        loss, tokens = self.calibration.ranks.sum(total).tolist()
        progress.held_back.append(loss / tokens if tokens else math.nan)
        if tokens and loss / tokens > min(progress.held_back):
            return
        progress.taken = len(progress.held_back) - 1
        progress.best = None if is_last else self.parts.values(self.block)

    @torch.no_grad()
    def finish(self) -> None:
        """Takes the best pass into the block."""
        progress, parts, block = self.progress, self.parts, self.block
        if progress.best is not None:
            parts.put_values(block, progress.best)
        trained = {name: parts.trained(name, weight) for name, weight in parts.codes.items()}
        changed = sum(int((trained[name].codes != weight.codes).sum()) for name, weight in parts.codes.items())
        number = sum(weight.codes.numel() for weight in parts.codes.values())
        held_back = [value for value in progress.held_back if not math.isnan(value)]
        stats = Reconstruction(held_back, progress.taken, changed / max(number, 1))
        others = parts.routers_and_norms([block])
        parts.put(block, others)  # as they are stored, so that a resumed run goes on from the same values
        self.calibration.take_trained(trained, others, stats)
        self.progress = None


@dataclass
class WindowStep:
    """The block in training on a batch's windows, as the only step of a chain (`tuning.chain.Step`).

    Attributes:
        stage: the stage that it belongs to.
        window_ids: the windows' global indices [b].
    """

    stage: BlockStage
    window_ids: Tensor
    at_once: int | None

    def __post_init__(self) -> None:
        self.trained = list(self.stage.parts.of(self.stage.block).values())

    def loaded(self) -> AbstractContextManager[None]:
        return nullcontext()

    def run(self, state: State, rows: slice) -> tuple[None, Tensor]:
        stage, block = self.stage, self.stage.block
        call, target, teacher = stage.calibration.block_rows(self.window_ids[rows])
        output, routing = stage.parts.forward(block, call)
        losses = reconstruction(hidden_of(output), target, stage.progress.unit).flatten()
        if block.calibrates and stage.weight:
            chosen = selection(block.choice(routing.logits), block.choice(teacher), stage.router_loss, block.top_k)
            losses = losses + stage.weight * chosen
        return None, losses
