"""Records how often each expert is selected on the calibration text (EAC-MoE, section 4.3 and figure 2)."""

from __future__ import annotations

import torch
from lightning.pytorch import Trainer

from eacmoe_lightning.analysis.selection import load_balance, selection_frequency
from eacmoe_lightning.callbacks.board_layout import board_writers
from eacmoe_lightning.job.block_callback import BlockCallback
from eacmoe_lightning.job.qesc import QESC
from eacmoe_lightning.run.block_file import BlockStats
from eacmoe_lightning.run.files import write_json


class ExpertFrequency(BlockCallback):
    """Writes each block's expert loads, original and compressed, to `expert_frequency.json`, and images of them.

    After each block it logs how often the busiest expert is selected, relative to the mean.
    """

    def on_block_end(self, trainer: Trainer, module: QESC, stats: BlockStats) -> None:
        loads = {name: torch.tensor(load) for name, load in stats.expert_load.items()}
        busiest = {f"experts/busiest_over_mean/{n}": load_balance(load)["max_over_mean"] for n, load in loads.items()}
        for logger in trainer.loggers:
            logger.log_metrics(busiest, step=stats.block)

    def on_train_end(self, trainer: Trainer, module: QESC) -> None:
        if trainer.current_epoch < module.num_epochs or not trainer.is_global_zero:
            return
        loads = {stats.block: stats.expert_load for stats in module.block_stats() if stats.is_moe}
        write_json(module.run.path / "expert_frequency.json", loads)
        for writer in board_writers(trainer):
            for name in ("original", "compressed"):
                frequency = [selection_frequency(load[name]) for load in loads.values()]
                if len({len(row) for row in frequency}) == 1:
                    image = torch.stack(frequency)  # [blocks, E]
                    image = (image / image.max()).float().repeat_interleave(12, 0).repeat_interleave(12, 1)
                    writer.add_image(f"selection_frequency/{name}", image, dataformats="HW")
