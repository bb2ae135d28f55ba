"""Records how often each expert is selected on the calibration text (EAC-MoE, section 4.3 and figure 2)."""

from __future__ import annotations

import torch
from lightning.pytorch import Trainer

from eacmoe_lightning.analysis.selection import selection_frequency
from eacmoe_lightning.job.block_callback import BlockCallback
from eacmoe_lightning.job.qesc import QESC
from eacmoe_lightning.run.block_file import BlockStats
from eacmoe_lightning.run.files import write_json


class ExpertFrequency(BlockCallback):
    """Writes each block's expert loads, original and compressed, to `expert_frequency.json` and TensorBoard."""

    def on_block_end(self, trainer: Trainer, module: QESC, stats: BlockStats) -> None:
        for logger in trainer.loggers:
            for name, load in stats.expert_load.items():
                experts = torch.arange(len(load)).repeat_interleave(torch.tensor(load))
                logger.experiment.add_histogram(f"expert_load/{name}", experts, stats.block, bins=len(load))

    def on_train_end(self, trainer: Trainer, module: QESC) -> None:
        if trainer.current_epoch < module.num_epochs or not trainer.is_global_zero:
            return
        loads = {stats.block: stats.expert_load for stats in module.block_stats() if stats.is_moe}
        write_json(module.run.path / "expert_frequency.json", loads)
        for logger in trainer.loggers:
            for name in ("original", "compressed"):
                frequency = [selection_frequency(load[name]) for load in loads.values()]
                if len({len(row) for row in frequency}) == 1:
                    image = torch.stack(frequency)  # [blocks, E]
                    image = (image / image.max()).float().repeat_interleave(12, 0).repeat_interleave(12, 1)
                    logger.experiment.add_image(f"selection_frequency/{name}", image, dataformats="HW")
