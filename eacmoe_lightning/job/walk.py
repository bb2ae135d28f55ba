"""The way of `fit` through the blocks: what happens to a block before, between and after its gradient steps.

An epoch enters its block, starts a stage, trains, and leaves the block after its last stage:

    enter_block    streams reach the block; the block stage and the joint stage find what they train in memory
    start_stage    the router is solved in closed form, or a stage's parameters go to the optimizer
    (steps)        `QESC.training_step`
    end_pass       windows held back say whether the pass of the block stage was an improvement
    leave_block    experts are solved, or trained codes become the block's; the block is written

`callbacks.LayerwiseQuantization` calls them in this order.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from eacmoe_lightning.calibration.blocks import Calibration
from eacmoe_lightning.job.block_callback import tell
from eacmoe_lightning.job.block_stage import BlockStage
from eacmoe_lightning.job.trained import TrainedParts, router_key
from eacmoe_lightning.run.block_file import BlockStats, read_stats
from eacmoe_lightning.tuning.codes import trains_weights

if TYPE_CHECKING:
    from eacmoe_lightning.job.qesc import QESC


class BlockWalk:
    """Takes the module's streams, stages and trained parts from block to block."""

    def __init__(self, module: QESC) -> None:
        self.module = module

    @property
    def parts(self) -> TrainedParts:
        return self.module.parts

    @property
    def calibration(self) -> Calibration:
        return self.module.calibration

    @property
    def block_stage(self) -> BlockStage:
        return self.module.block_stage

    def enter_block(self) -> None:
        """Advances the streams to the current epoch's block, and brings what its stage trains into memory.

        A second call changes nothing.
        """
        module, stage = self.module, self.module.epoch.stage
        if self.parts.block not in (None, module.block_index):
            self._end_interrupted(self.parts.block)
        self._advance(module.block_index, take_solved=self.parts.block is not None)
        if stage == "block":
            self._solve(keep=True)
            if not self.parts.codes:
                self.parts.take_codes(self.calibration.solver.solved)
                if trains_weights(module.kinds("block")):
                    self.calibration.drop_weights()  # they are decoded from what is trained
        if stage == "joint":
            module.joint_stage.open()

    def start_stage(self) -> None:
        """Before an epoch's first batch: solves the block's router in closed form, or starts another stage."""
        module = self.module
        if not module.epoch.is_first:
            self._measure_held_back(module.epoch.number)
            return
        optimizer = module.optimizers(use_pl_optimizer=False)
        match module.epoch.stage:
            case "router":
                module.fit_state.router_stage.start()
            case "block":
                self.parts.start(optimizer, self.calibration.block, module.kinds("block"), self._reach)
                with module.autocast():
                    self.block_stage.start(module.fit_state.held_back)
            case "joint":
                module.block_routers = {key: weight.detach().clone() for key, weight in module.routers.items()}
                self.parts.start(optimizer, None, module.kinds("joint"), self._reach)

    def end_pass(self) -> None:
        """After an epoch of the block stage: measures the windows held back, and keeps the best pass."""
        if self.module.epoch.stage == "block":
            self.enter_block()
            self._measure_held_back(self.module.epoch.number + 1)
            if not math.isnan(loss := self.block_stage.progress.held_back[-1]):
                # every process has the sum over all: `rank_zero_only` keeps `sync_dist` from summing again
                self.module.log("block_stage/held_back", loss, sync_dist=True, rank_zero_only=True)

    def leave_block(self) -> BlockStats:
        """Solves the experts of the current epoch's block unless the block stage has trained them, and writes it."""
        self.enter_block()
        if self.module.epoch.stage == "block":
            self.block_stage.finish()
            self.parts.stop(self.module.optimizers(use_pl_optimizer=False))
        else:
            self._solve()
        return self.calibration.leave()

    def enter_end(self) -> None:
        """Writes missing blocks, shrinks all blocks to the experts kept, and frees the joint stage's model."""
        if self.parts.block is not None:
            self._end_interrupted(self.parts.block)
        blocks = self.module.moe.blocks
        if not all(self.module.run.block(block.index).exists() for block in blocks):
            self._advance(len(blocks))
        for block in blocks:
            self.calibration.shrink(block.index)
        self.calibration.remove_solved(len(blocks))
        self.module.joint_stage.close()

    def _advance(self, index: int, take_solved: bool = False) -> None:
        module = self.module
        routers = module.block_routers or module.routers
        routers = {b.index: routers[router_key(b)].detach() for b in module.moe.calibrated_blocks}
        self.calibration.enter(index, None if module.block_epochs else routers, take_solved)

    def _solve(self, keep: bool = False) -> None:
        block = self.module.moe.blocks[self.module.block_index]
        self.calibration.solve(self.module.routers[router_key(block)].detach() if block.calibrates else None, keep)

    def _measure_held_back(self, passes: int) -> None:
        """Measures the windows held back after this many passes, unless that is done."""
        progress, module = self.block_stage.progress, self.module
        if progress is not None and len(progress.held_back) <= passes:
            with module.autocast():
                self.block_stage.end_pass(module.fit_state.held_back, passes == module.block_epochs)

    def _end_interrupted(self, index: int) -> None:
        """Ends the block stage of a block after a checkpoint of its last step: Lightning does not repeat the hooks."""
        module = self.module
        if module.run.block(index).exists():
            self.calibration.shrink(index)
            self.parts.put_finished(module.moe.blocks[index])
            self.block_stage.progress = None
            stats = read_stats(module.run, index)
        else:
            self._advance(index, take_solved=True)
            self.parts.take_codes(self.calibration.solver.solved)
            self._measure_held_back(module.block_epochs)
            self.block_stage.finish()
            stats = self.calibration.leave()
        self.parts.stop(module.optimizers(use_pl_optimizer=False))
        tell(module.trainer, "on_block_end", stats)

    @property
    def _reach(self) -> float:
        """How far the current stage can move a code: the sum of its learning rates."""
        module, trainer = self.module, self.module.trainer
        steps = module.epoch.passes * trainer.num_training_batches / trainer.accumulate_grad_batches
        return module.stage.rates["code"] * steps * (1.0 if module.lr_schedule == "constant" else 0.5)
