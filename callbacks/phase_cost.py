"""Records seconds and bytes of every phase in `costs.jsonl` for the report, and logs them block by block."""

from __future__ import annotations

from lightning.pytorch import Trainer

from eacmoe_lightning.job.block_callback import BlockCallback
from eacmoe_lightning.job.qesc import QESC
from eacmoe_lightning.run.block_file import BlockStats
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
        module.run.add_cost(block, phase, watch.cost())

    def on_block_end(self, trainer: Trainer, module: QESC, stats: BlockStats) -> None:
        if not trainer.is_global_zero:
            return
        rows = [row for row in module.run.read_costs() if row["block"] == stats.block]
        metrics = {"cost/peak_megabytes": max((row["peak_bytes"] for row in rows), default=0) / 2**20}
        for row in rows:
            for tag, value in (
                (f"cost/seconds/{row['phase']}", row["seconds"]),
                ("cost/read_megabytes", row["read_bytes"] / 2**20),
                ("cost/written_megabytes", row["written_bytes"] / 2**20),
            ):
                metrics[tag] = metrics.get(tag, 0.0) + value
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=stats.block)
