"""Calibrate and quantize a model from Python, without the command line; within a minute on two idle CPU cores.

    python examples/calibrate.py

It compresses the bundled model to 3 bit with few windows, so the figures are worse than those of `configs/tiny.yaml`.
Killed at any moment, the same command goes on. `python examples/chat.py runs/example` talks to the result.
"""

from pathlib import Path

from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger

from eacmoe_lightning import callbacks
from eacmoe_lightning.commands.fit import CalibrationTrainer
from eacmoe_lightning.job.checkpoint_io import AtomicCheckpointIO
from eacmoe_lightning.job.data import TextWindows
from eacmoe_lightning.job.qesc import QESC

RUN = Path("runs/example")

module = QESC(
    "bundled",  # or a local Hugging Face directory, or a hub id
    dtype="float32",
    bits=3,
    attention_bits=4,
    joint_epochs=1,  # the default is 4
)
data = TextWindows(
    calibration="bundled:calibration",  # or your files, or a data set
    heldout=["bundled:prose", "bundled:code", "bundled:german"],
    num_windows=24,
    window_length=256,
    num_heldout_windows=4,
    tokenizer="bundled",  # the model's own
)
trainer = CalibrationTrainer(
    default_root_dir=RUN,
    accelerator="cpu",
    max_epochs=-1,  # the module knows how many epochs its blocks take
    limit_val_batches=0,  # nothing can be validated before the last block
    log_every_n_steps=1,
    enable_model_summary=False,
    logger=TensorBoardLogger(RUN, name="", version="tensorboard"),
    plugins=[AtomicCheckpointIO()],
    callbacks=[
        callbacks.LayerwiseQuantization(),  # drives the phases of each block
        callbacks.ExpertFrequency(),
        callbacks.CompressedModel(),  # writes compressed/ and reads it back
        callbacks.RoutingReport(),  # evaluates it and writes report.md
        callbacks.PhaseCost(),
        callbacks.BlockProgress(),
        ModelCheckpoint(RUN / "checkpoints", "last", save_on_train_epoch_end=True, enable_version_counter=False),
    ],
)
last = RUN / "checkpoints" / "last.ckpt"
trainer.fit(module, data, ckpt_path=last if last.exists() else None)
print(f"the model is in {RUN / 'compressed'}, the report in {RUN / 'report.md'}")
