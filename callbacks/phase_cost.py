"""Seconds and peak memory of every phase: `costs.jsonl` in the run directory, TensorBoard, and the report."""

from __future__ import annotations

import time

from lightning.pytorch import Trainer

from eacmoe_lightning.callbacks.block_callback import BlockCallback
from eacmoe_lightning.memory import peak_memory, reset_peak_memory
from eacmoe_lightning.qesc import QESC


class PhaseCost(BlockCallback):
    """Times the phases of blocks, the joint stage, the writing and the evaluation, on the first process.

    What is computed again after an interruption counts again; a phase that was cut off does not count.
    """

    def __init__(self) -> None:
        self.started: dict[str, float] = {}

    def on_phase_start(self, trainer: Trainer, module: QESC, block: int | None, phase: str) -> None:
        reset_peak_memory()
        self.started[phase] = time.perf_counter()

    def on_phase_end(self, trainer: Trainer, module: QESC, block: int | None, phase: str) -> None:
        started = self.started.pop(phase, None)
        if started is None or not trainer.is_global_zero:
            return
        seconds, peak = time.perf_counter() - started, peak_memory()
        module.run.add_cost(block, phase, seconds, peak)
        if block is not None:
            for logger in trainer.loggers:
                logger.log_metrics({f"seconds/{phase}": seconds, f"peak_megabytes/{phase}": peak / 2**20}, step=block)
