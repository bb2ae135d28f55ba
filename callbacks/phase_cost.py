"""Records seconds and bytes of every phase in `costs.jsonl`, from which the report takes them, and in TensorBoard."""

from __future__ import annotations

from lightning.pytorch import Trainer

from eacmoe_lightning.job.block_callback import BlockCallback
from eacmoe_lightning.job.qesc import QESC
from eacmoe_lightning.run.memory import Watch


class PhaseCost(BlockCallback):
    """Measures the phases of blocks, the joint stage, the writing and the evaluation on the first process.

    An interrupted phase does not count. Work that a resumed run repeats counts again.
    """

    def __init__(self) -> None:
        self.started: dict[str, Watch] = {}

    def on_phase_start(self, trainer: Trainer, module: QESC, block: int | None, phase: str) -> None:
        self.started[phase] = Watch()

    def on_phase_end(self, trainer: Trainer, module: QESC, block: int | None, phase: str) -> None:
        watch = self.started.pop(phase, None)
        if watch is None or not trainer.is_global_zero:
            return
        cost = watch.cost()
        module.run.add_cost(block, phase, cost)
        if block is not None:
            metrics = {f"seconds/{phase}": cost["seconds"]}
            metrics |= {f"{n[:-6]}_megabytes/{phase}": size / 2**20 for n, size in cost.items() if n.endswith("_bytes")}
            for logger in trainer.loggers:
                logger.log_metrics(metrics, step=block)
