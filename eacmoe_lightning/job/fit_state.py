"""What `fit` works on: the original, what is trained, the three stages of the training, and the block loop.

The module holds one `FitState`, outside of its module tree and of checkpoints.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from eacmoe_lightning.calibration.blocks import Calibration
from eacmoe_lightning.calibration.head import embedding_of
from eacmoe_lightning.calibration.streams import Streams
from eacmoe_lightning.job.block_callback import phase
from eacmoe_lightning.job.block_stage import BlockStage
from eacmoe_lightning.job.joint_stage import JointStage
from eacmoe_lightning.job.router_stage import RouterStage
from eacmoe_lightning.job.sampling import SampledTexts
from eacmoe_lightning.job.start import BegunRun
from eacmoe_lightning.job.trained import TrainedParts
from eacmoe_lightning.models.streamed import StreamedModel
from eacmoe_lightning.run.block_file import read_head
from eacmoe_lightning.text.batches import shard

if TYPE_CHECKING:
    from eacmoe_lightning.job.qesc import QESC


@dataclass
class FitState:
    """What `fit` works on.

    Attributes:
        moe: the original model; its blocks are loaded and compressed one after another.
        parts: the trained parameters, which are parameters of the module too.
        sampled: the calibration texts that a model wrote.
        router_stage, block_stage: train a block's router, and then the block.
        joint_stage: trains all blocks together.
        calibration: the block loop; set by `start`.
        held_back: this process's calibration windows that are held back, in batches of their numbers [b]; set by
            `start`.
    """

    moe: StreamedModel
    parts: TrainedParts
    sampled: SampledTexts
    router_stage: RouterStage
    block_stage: BlockStage
    joint_stage: JointStage
    calibration: Calibration | None = None
    held_back: list[Tensor] = field(default_factory=list)

    @classmethod
    def of(cls, module: QESC, begun: BegunRun) -> FitState:
        """The state before the first epoch, from the module's options."""
        trains_norms = any("norm" in module.kinds(stage) for stage in ("block", "joint"))
        parts = TrainedParts(begun.moe, module.run, trains_norms, begun.is_resident)
        loss, precision, at_once = module.router_loss, module.autocast, module.trainer.datamodule.micro_batch_size
        return cls(
            begun.moe, parts, begun.texts,
            RouterStage(parts, loss, module.router_method, module.ridge, module.router_warm_start, module.router_lr),
            BlockStage(parts, module.block_lr, loss, module.block_selection, precision, at_once),
            JointStage(parts, module.joint_lr, loss, module.joint_selection, precision, at_once),
        )  # fmt: skip

    def start(self, module: QESC) -> None:
        """Makes the block loop on this process's calibration windows, and gives it to the stages."""
        data = module.trainer.datamodule
        owned = shard(len(data.calibration_windows), module.global_rank, module.trainer.world_size)
        rows = slice(owned.start, owned.stop)
        dtype = None if module.stream_dtype == "auto" else getattr(torch, module.stream_dtype)
        counts, positions = data.calibration_weights, data.calibration_positions
        streams = Streams(
            self.moe, data.calibration_windows[rows], owned.start, data.batch_size, module.run, module.ranks, dtype,
            module.joint_epochs > 0, None if counts is None else counts[rows], data.calibration_sources[:, rows],
            None if positions is None else positions[rows], embedding=embedding_of(self.moe, read_head(module.run)),
        )  # fmt: skip
        self.calibration = Calibration(
            self.moe, module.recipe, streams, module.run, module.ranks, partial(phase, module.trainer), module.pruning,
            [name for name, _ in self.moe.norms()] if "norm" in module.kinds("block") else [],
        )  # fmt: skip
        for stage in (self.router_stage, self.block_stage, self.joint_stage):
            stage.calibration = self.calibration
        numbers = data.held_back_windows.nonzero().squeeze(1)
        numbers = numbers[(numbers >= owned.start) & (numbers < owned.stop)]
        self.held_back = list(numbers.split(data.batch_size)) if len(numbers) else []
