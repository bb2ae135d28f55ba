"""Reports routing and quality: per block to the logger, and at the end to it, `report.json` and `report.md`."""

from __future__ import annotations

import math

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger

from eacmoe_lightning.budget.picture import pixels
from eacmoe_lightning.calibration.overflow import overflow
from eacmoe_lightning.callbacks.board_layout import add_hyperparameters, board_writers
from eacmoe_lightning.compressed.directory import CompressedWeights
from eacmoe_lightning.evaluation import board
from eacmoe_lightning.evaluation.coverage import coverage
from eacmoe_lightning.evaluation.evaluate import evaluate
from eacmoe_lightning.evaluation.report import build, write
from eacmoe_lightning.evaluation.report_text import markdown, summary
from eacmoe_lightning.job.block_callback import BlockCallback, phase
from eacmoe_lightning.job.qesc import QESC
from eacmoe_lightning.models.streamed import StreamedModel, Weights
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
        for logger in trainer.loggers:
            logger.log_metrics(board.block_scalars(stats), step=stats.block)

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
            if module.chosen_bits.size:
                report["allocation"] = module.chosen_bits.result(module.run)
            write(module.run, report)
            self._log_result(trainer, module, report, result)
            module.run.drop_streams()
            print(summary(report))
        trainer.strategy.barrier()

    def _log_result(self, trainer: Trainer, module: QESC, report: dict, result: dict[str, dict] | None) -> None:
        """Logs the finished model's scalars, the run's hyperparameters, and the report as text."""
        quality = board.heldout_scalars(result["after"], "quality") if result else {}
        finished = board.report_scalars(report)
        scalars = quality | finished
        if result and result.get("before", result["after"]) is not result["after"]:
            before = board.heldout_scalars(result["before"], "before_calibration")
            scalars |= {tag: value for tag, value in before.items() if tag.startswith("before_calibration/")}
        options = board.hyperparameters(module.settings(), trainer.datamodule.seed)
        for logger in trainer.loggers:
            logger.log_metrics(scalars, step=0)
            if not isinstance(logger, TensorBoardLogger):
                logger.log_hyperparams(options)
        for writer in board_writers(trainer):
            add_hyperparameters(writer, options, board.compared(quality, finished))
            writer.add_text("report", markdown(report))
            if module.chosen_bits.size:
                figures = module.chosen_bits.figures(module.run, module.recipe, module.moe, report)
                for name, figure in figures.items():
                    writer.add_image(name, pixels(figure), dataformats="HWC")

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
