"""What the result of `fit` depends on: a run directory holds it, and goes on only with the same.

The options of the trainer, of the model, of the rule that prunes and of the calibration text, by their names on the
command line.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from eacmoe_lightning.run.provenance import TRAINER_OPTIONS
from eacmoe_lightning.text.sources import stored_sources
from eacmoe_lightning.version import __version__

if TYPE_CHECKING:
    from eacmoe_lightning.job.data import TextWindows
    from eacmoe_lightning.job.qesc import QESC

OF_TRAINING = (
    *("router_lr", "router_epochs", "router_warm_start", "ridge"),
    *("block_epochs", "block_selection", "block_lr"),
    *("joint_epochs", "joint_selection", "joint_lr", "lr_schedule", "weight_decay", "stream_dtype"),
)
OF_WINDOWS = ("num_windows", "window_length", "batch_size", "micro_batch_size", "seed", "held_back", "documents")
OF_SAMPLING = ("temperature", "sample_start")


def settings_of(module: QESC) -> dict[str, Any]:
    """Every option that the result of `fit` depends on, by name; local paths are absolute."""
    trainer = module.trainer
    clips = trainer.gradient_clip_algorithm if trainer.gradient_clip_val else None
    return {
        "version": __version__,
        **{f"trainer.{name}": getattr(trainer, name) for name in TRAINER_OPTIONS},
        "trainer.limit_train_batches": _limit(trainer.limit_train_batches),
        **({"trainer.gradient_clip_algorithm": "value"} if clips == "value" else {}),
        **options_of(module, trainer.datamodule),
    }


def options_of(module: QESC, data: TextWindows) -> dict[str, Any]:
    """Those of the model, of pruning and of the calibration text, which are known without a trainer."""
    asked = module.chosen_bits
    return {
        "model.name_or_path": module.name_or_path,
        "model.dtype": module.dtype_name,
        **{f"model.{name}": value for name, value in asked.recipe.record().items()},
        **asked.settings(),
        **{f"pruning.{name}": value for name, value in (asked.pruning.record() if asked.pruning else {}).items()},
        "model.router_method": module.router_method,
        "model.router_loss": module.router_loss.settings(),
        **{f"model.{name}": getattr(module, name) for name in OF_TRAINING},
        "data.calibration": stored_sources(data.calibration),
        **{f"data.{name}": getattr(data, name) for name in OF_WINDOWS},
        **{f"data.{name}": getattr(data, name) for name in OF_SAMPLING if data.sampled_texts},
    }


def _limit(batches: int | float) -> float | str:
    """A share of the batches as it is, a number in words: to Lightning 1.0 is all batches, and 1 is one."""
    return f"{batches} of an epoch's batches" if isinstance(batches, int) else batches
