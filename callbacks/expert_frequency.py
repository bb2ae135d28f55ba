"""Collects how often each expert is selected (EAC-MoE, section 4.3 and figure 2) over the calibration text."""

from __future__ import annotations

import torch
from lightning.pytorch import LightningModule, Trainer

from eacmoe_lightning.callbacks.block_callback import BlockCallback
from eacmoe_lightning.store import RunDirectory, write_json


class ExpertFrequency(BlockCallback):
    """Expert loads per block, original and compressed: `expert_frequency.json` and TensorBoard.

    The loads of blocks that were finished before an interruption travel in the checkpoint.
    """

    def __init__(self) -> None:
        self.loads: dict[int, dict[str, list[int]]] = {}  # block -> original | compressed -> [E] tokens

    def state_dict(self) -> dict:
        return {"loads": self.loads}

    def load_state_dict(self, state_dict: dict) -> None:
        self.loads = state_dict["loads"]

    def on_block_end(self, trainer: Trainer, module: LightningModule, stats: dict) -> None:
        if "expert_load" not in stats:
            return
        self.loads[stats["block"]] = stats["expert_load"]
        for logger in trainer.loggers:
            for name, load in stats["expert_load"].items():
                experts = torch.arange(len(load)).repeat_interleave(torch.tensor(load))
                logger.experiment.add_histogram(f"expert_load/{name}", experts, stats["block"], bins=len(load))

    def selection_frequency(self, name: str = "original") -> dict[int, torch.Tensor]:
        """Block -> [E], the share of selections that each expert gets."""
        return {block: torch.tensor(load[name]).double() / sum(load[name]) for block, load in self.loads.items()}

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        if not self.loads or not trainer.is_global_zero:
            return
        write_json(RunDirectory(trainer.default_root_dir).path / "expert_frequency.json", self.loads)
        for logger in trainer.loggers:
            for name in ("original", "compressed"):
                frequency = self.selection_frequency(name)
                if len({len(row) for row in frequency.values()}) == 1:
                    image = torch.stack([frequency[block] for block in sorted(frequency)])  # [blocks, E]
                    image = (image / image.max()).float().repeat_interleave(12, 0).repeat_interleave(12, 1)
                    logger.experiment.add_image(f"selection_frequency/{name}", image, dataformats="HW")
