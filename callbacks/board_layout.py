"""Arranges a run's TensorBoard, and lets a resumed run replace what it wrote before it was killed."""

from __future__ import annotations

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from eacmoe_lightning.evaluation.board import FIRST_OPTIONS, GUIDE, layout
from eacmoe_lightning.job.block_callback import BlockCallback
from eacmoe_lightning.job.qesc import QESC
from eacmoe_lightning.run.block_file import BlockStats


def board_writers(trainer: Trainer) -> list[SummaryWriter]:
    """The writers of the trainer's TensorBoard loggers; none on any but the first process."""
    loggers = [logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
    return [logger.experiment for logger in loggers] if trainer.is_global_zero else []


class BoardLayout(BlockCallback):
    """Writes the charts of CUSTOM SCALARS and, in TEXT, what each group of cards shows."""

    def on_train_start(self, trainer: Trainer, module: QESC) -> None:
        for writer in board_writers(trainer):
            _purge(writer, trainer.global_step)
            writer.add_custom_scalars(layout(module.block_epochs > 0, module.joint_epochs > 0))
            writer.add_text("what_the_cards_show", GUIDE)

    def on_block_end(self, trainer: Trainer, module: QESC, stats: BlockStats) -> None:
        for writer in board_writers(trainer):
            writer.flush()  # a kill would take the block's points along


def add_hyperparameters(writer: SummaryWriter, options: dict[str, str | float], metrics: list[str]) -> None:
    """Adds the run to HPARAMS: its hyperparameters, and the tags of the scalars that are its metrics.

    The first run that TensorBoard finds says which columns there are. It shows five hyperparameters until more are
    ticked, those first that are marked as different between runs.
    """
    experiment, start, end = hparams(options, dict.fromkeys(metrics))
    stored = experiment.value[0].metadata.plugin_data
    data = HParamsPluginData.FromString(stored.content)
    for info in data.experiment.hparam_infos:
        info.differs = info.name in FIRST_OPTIONS
    stored.content = data.SerializeToString()
    for summary in (experiment, start, end):
        writer.file_writer.add_summary(summary, 0)


def _purge(writer: SummaryWriter, step: int) -> None:
    """Tells TensorBoard to drop what was written at this step and after it, as `SummaryWriter(purge_step=...)` does.

    The writer exists before Lightning has read the step from the checkpoint. Points of blocks stay: every block took at
    least one step.
    """
    writer.file_writer.add_event(Event(session_log=SessionLog(status=SessionLog.START)), step)
