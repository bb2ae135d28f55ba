"""Writes the compressed model at the end of a run and checks that it reloads with identical logits."""

from __future__ import annotations

from lightning.pytorch import Callback, Trainer

from eacmoe_lightning.exports.run_result import write_result
from eacmoe_lightning.job.block_callback import phase
from eacmoe_lightning.job.qesc import QESC
from eacmoe_lightning.models.streamed import StreamedModel


class CompressedModel(Callback):
    """Writes `compressed/` into the run directory, and `dense/` for an unquantized model.

    See `exports.run_result.write_result`.

    Raises:
        StoreError: a weight is not quantized, or the reloaded logits are not identical.
    """

    def on_train_end(self, trainer: Trainer, module: QESC) -> None:
        if trainer.current_epoch >= module.num_epochs and trainer.is_global_zero:
            with phase(trainer, None, "write"):
                self.write(trainer, module)
        trainer.strategy.barrier()

    def write(self, trainer: Trainer, module: QESC) -> None:
        finished = module.parts.finished()
        moe = StreamedModel(finished, module.device)
        description = {
            "method": "qesc" if module.router_method != "none" else module.recipe.quantizer_name,
            "router_method": module.router_method,
            **{name: value for name, value in module.recipe.record().items() if name != "bits"},
            **({"unquantized": moe.unquantized} if moe.unquantized else {}),
            **({"pruning": module.pruning.record()} if module.pruning else {}),
        }
        blocks = (finished.quantized(block.index) for block in moe.blocks)
        tokens = trainer.datamodule.calibration_windows[:1, :128]
        write_result(
            module.run, moe, module.name_or_path, blocks, description, tokens, module.fingerprint,
            module.trust_remote_code, finished.head,
        )  # fmt: skip
