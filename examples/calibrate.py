"""Calibrate and quantize a model from Python, without the command line; within a minute on two idle CPU cores.

    python examples/calibrate.py

It compresses the bundled model to 3 bit with few windows, so the figures are worse than those of `configs/tiny.yaml`.
Killed at any moment, the same command goes on. `python examples/chat.py runs/example` talks to the result.
"""

from eacmoe_lightning.commands.trainer import calibration_trainer
from eacmoe_lightning.job.data import TextWindows
from eacmoe_lightning.job.qesc import QESC

RUN = "runs/example"

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
trainer = calibration_trainer(RUN, accelerator="cpu")  # further options of Lightning's Trainer go here
trainer.fit(module, data, ckpt_path="auto")  # starts, or goes on after a kill
print(f"the model is in {RUN}/compressed, the report in {RUN}/report.md")
