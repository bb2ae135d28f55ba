"""Reports routing and quality: per block to TensorBoard, and at the end in `report.json` and `report.md`."""

from __future__ import annotations

import math

import torch
from lightning.pytorch import Trainer

from eacmoe_lightning.calibration.overflow import overflow
from eacmoe_lightning.compressed.directory import CompressedWeights
from eacmoe_lightning.evaluation.coverage import coverage
from eacmoe_lightning.evaluation.evaluate import evaluate
from eacmoe_lightning.evaluation.report import build, write
from eacmoe_lightning.evaluation.report_text import summary
from eacmoe_lightning.job.block_callback import BlockCallback, phase
from eacmoe_lightning.job.qesc import QESC
from eacmoe_lightning.models.streamed import StreamedModel, Weights
from eacmoe_lightning.routers.expert_shift import RATES
from eacmoe_lightning.run.block_file import BlockStats
from eacmoe_lightning.run.provenance import origin


class RoutingReport(BlockCallback):
    """Evaluates the written model on the held-out texts and writes the report.

    Args:
        evaluate: False skips the held-out evaluation, as does an empty `--data.heldout`; the report then has no
            perplexities and no held-out change rates.
    """

    def __init__(self, evaluate: bool = True) -> None:
        self.evaluate = evaluate

    def on_block_end(self, trainer: Trainer, module: QESC, stats: BlockStats) -> None:
        index = stats.block
        scalars = {f"quantization_error/{name.split('.', 3)[-1]}": value for name, value in stats.error.items()}
        for when, rates in stats.expert_shift.items():
            scalars |= {f"expert_shift_{rate}/{when}": rates[rate] for rate in (*RATES, "selections")}
        if stats.starved is not None:
            scalars["experts/starved"] = len(stats.starved)
        for logger in trainer.loggers:
            logger.log_metrics(scalars, step=index)

    def on_train_end(self, trainer: Trainer, module: QESC) -> None:
        if trainer.current_epoch < module.num_epochs:
            if trainer.is_global_zero:
                print(f"{module.block_index} of {len(module.moe.blocks)} blocks are done; resume with --ckpt_path auto")
            return
        result = None
        if self.evaluate and trainer.datamodule.heldout:
            with phase(trainer, None, "evaluate"):
                result = self._evaluate(trainer, module)
        if trainer.is_global_zero:
            router = {
                "method": module.router_method,
                "block_epochs": module.block_epochs,
                "joint_epochs": module.joint_epochs,
            }
            report = origin(module.identity(), trainer.datamodule.seed, trainer.world_size) | build(
                module.run, module.moe, module.name_or_path, module.recipe, router, module.pruning,
                module.block_stats(), result,
            )  # fmt: skip
            moe_stats = [stats for stats in module.block_stats() if stats.is_moe]
            data = trainer.datamodule
            report["coverage"] = coverage(moe_stats, data.windows_by_text, data.fullness)
            if sampled := module.fit_state.sampled.described():
                report["sampled"] = sampled
            write(module.run, report)
            module.run.drop_streams()
            print(summary(report))
        trainer.strategy.barrier()

    @torch.no_grad()
    def _evaluate(self, trainer: Trainer, module: QESC) -> dict[str, dict]:
        """Results `after` calibration (the written model) and, unless blocks were trained, `before` it.

        Before: the codes that the solver has left, with the original's routers (`TrainedParts.untrained`).
        """
        data = trainer.datamodule
        data.setup("validate")
        original = StreamedModel(module.original, module.device)

        def evaluated(weights: Weights, noise_floor: int = 0) -> dict:
            return evaluate(
                original,
                StreamedModel(weights, module.device),
                data.heldout_windows,
                data.heldout_batch_size,
                ranks=module.ranks,
                scratch=module.run.scratch(module.global_rank),
                noise_floor=noise_floor,
            )

        after = evaluated(CompressedWeights(module.run.compressed), data.noise_floor)
        for text, values in after["perplexity"].items():
            for stream, value in values.items():
                if not math.isfinite(value):
                    raise overflow(
                        f"{module.run.compressed} is written, but the perplexity of the {stream} model on {text}",
                        original.model.dtype,
                    )
        if module.block_epochs:
            return {"after": after}
        before = after if module.router_method == "none" else evaluated(module.parts.untrained())
        return {"before": before, "after": after}
