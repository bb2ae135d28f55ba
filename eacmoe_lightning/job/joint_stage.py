"""The joint stage: all blocks are trained together towards the original's output distribution.

The student is the compressed model on the calibration text; its target is what the original's head makes of the
original's own stream (`tuning.losses.distillation`), beside the router loss of every block. The student runs block by
block, forward and backward (`tuning/chain.py`), so that one block at a time needs to be in memory. Where the whole
model fits, its blocks and activations stay there. Both give the same bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from eacmoe_lightning.job.stage import WeightStage
from eacmoe_lightning.models.block import Block
from eacmoe_lightning.models.streamed import StreamedModel
from eacmoe_lightning.run.hidden import State, moved, rows_of
from eacmoe_lightning.tuning.chain import Chain
from eacmoe_lightning.tuning.losses import distillation, selection


class JointStage(WeightStage):
    """The joint stage of a run."""

    curve, rate_options = "joint_stage/loss", "joint_*_lr"
    compressed: StreamedModel | None = None  # the compressed model before training

    def open(self) -> None:
        """Brings the compressed model's head into memory; its blocks follow when they run."""
        if self.compressed is None:
            self.compressed = StreamedModel(self.parts.untrained(), self.parts.moe.device)

    def close(self) -> None:
        """Frees the model's memory."""
        self.compressed = None
        self.parts.codes.clear()

    def losses(self, batch: dict[str, Tensor]) -> Tensor | None:
        window_ids, input_ids, position_ids = batch["index"], batch["input_ids"], batch.get("position_ids")
        if not len(window_ids):
            return None
        streams = self.calibration.streams
        steps: list[BlockStep | HeadStep] = []
        for block in self.compressed.blocks:
            teacher = streams.teacher_rows(block, window_ids) if block.is_moe else None
            steps.append(BlockStep(self, block, input_ids, position_ids, teacher, self.at_once))
        steps.append(HeadStep(self, input_ids, streams.last_rows(window_ids)))
        device, resident = self.parts.moe.device, self.parts.resident
        return Chain(steps, len(input_ids), device, self.precision, resident).losses()

    @contextmanager
    def loaded(self, block: Block) -> Iterator[None]:
        """A block of the compressed model with its weights in memory; those in training only as their codes."""
        trained = self.parts.trained_weights(block)
        self.compressed.load(block.index, without=trained)
        with self.parts.holding(block) if trained else nullcontext():
            yield
        if not self.parts.resident:
            self.compressed.release(block.index)


@dataclass
class BlockStep:
    """A block in training, as a step of a chain (`tuning.chain.Step`).

    Attributes:
        stage: the stage that it belongs to.
        block: of the compressed model.
        input_ids, position_ids: the batch.
        teacher: the original router's logits [b*T, E]; None for a dense block.
    """

    stage: JointStage
    block: Block
    input_ids: Tensor
    position_ids: Tensor | None
    teacher: Tensor | None
    at_once: int | None

    def __post_init__(self) -> None:
        parts = self.stage.parts
        self.trained = [*parts.of(self.block).values(), *parts.outside.values()]

    def loaded(self) -> AbstractContextManager[None]:
        return self.stage.loaded(self.block)

    def run(self, state: State | None, rows: slice) -> tuple[State, Tensor | None]:
        block, parts, model = self.block, self.stage.parts, self.stage.compressed
        positions = None if self.position_ids is None else self.position_ids[rows]
        state = None if state is None else moved(state, model.device)
        call = model.with_weights(
            parts.as_stored(parts.outside),
            lambda: model.call(block.index, self.input_ids[rows], state, positions),
        )
        output, routing = parts.forward(block, call)
        if self.teacher is None or not self.stage.weight:
            return output, None
        teacher = self.teacher.view(len(self.input_ids), -1, self.teacher.shape[-1])[rows].flatten(0, 1)
        teacher = block.choice(teacher.to(model.device))
        chosen = selection(block.choice(routing.logits), teacher, self.stage.router_loss, block.top_k)
        return output, self.stage.weight / len(model.moe_blocks) * chosen


@dataclass
class HeadStep:
    """The model after its last block: the divergence from the original; a window at a time, as logits are large.

    Attributes:
        stage: the stage that it belongs to.
        input_ids: the batch [b, T].
        last_state: what the original's last block hands over, in host memory.
    """

    stage: JointStage
    input_ids: Tensor
    last_state: State
    at_once: int | None = 1

    def __post_init__(self) -> None:
        self.trained = list(self.stage.parts.outside.values())

    def loaded(self) -> AbstractContextManager[None]:
        return nullcontext()

    def run(self, state: State, rows: slice) -> tuple[None, Tensor]:
        parts, model, input_ids = self.stage.parts, self.stage.compressed, self.input_ids[rows]
        with torch.no_grad():
            last_state = moved(rows_of(self.last_state, rows), model.device)
            target = parts.moe.head(last_state, input_ids).float().log_softmax(-1)
        state = moved(state, model.device)
        logits = model.with_weights(parts.as_stored(parts.outside), lambda: model.head(state, input_ids))
        return None, distillation(logits, target).flatten()
