"""A job that is killed again and again leaves the same bytes as one that runs undisturbed."""

import collections
import json
import os
import re
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import jobs
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from eacmoe_lightning.job.block_callback import BlockCallback

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:LightningCLI's args", "ignore:.*deprecated")]
OPTIONS = {
    "model__router_method": "sgd",
    "model__router_warm_start": "true",
    "model__router_epochs": 2,
    "model__block_epochs": 2,
    "model__joint_epochs": 1,
    "model__joint_code_lr": 5e-5,
    "data__batch_size": 2,  # four batches
}
EVERY_STEP = {"checkpoint__every_n_train_steps": 1}
# a checkpoint after every step, so also in the middle of an epoch
STEPS = [
    ["call", "eacmoe_lightning.quantization.gptq.fit_range", 5],  # inside GPTQ, before there is any checkpoint
    ["replace", "last.ckpt", 3],  # while a checkpoint is written, in the middle of an epoch
    ["phase", "0 experts", 1],
    ["call", "eacmoe_lightning.job.block_stage.BlockStage.window_losses", 3],  # in the first pass of the block stage
    ["call", "eacmoe_lightning.job.block_stage.BlockStage.window_losses", 5],  # in the second
    ["replace", "blocks/block_001.solved", 1],  # while a solved block is written
    ["phase", "1 block", 1],
    ["replace", "blocks/block_001.safetensors", 1],  # while a block is written
    ["phase", "2 router", 1],
    ["call", "eacmoe_lightning.job.joint_stage.JointStage.losses", 3],  # in the joint stage
    ["replace", ".compressed.partial/weights-block-001", 1],  # while the compressed model is written
]
# a checkpoint after every epoch, the default
EPOCHS = [
    ["phase", "0 observe", 1],
    ["phase", "1 attention", 1],
    ["phase", "1 block", 2],  # between the passes of the block stage
    ["call", "eacmoe_lightning.job.block_stage.BlockStage.finish", 1],
    ["replace", "last.ckpt", 1],  # that of the last pass, when the block is written
    ["replace", "streams/", 2],  # while streams are written
    ["call", "eacmoe_lightning.quantization.gptq.fit_range", 3],
    ["phase", "2 replay", 1],
    ["call", "eacmoe_lightning.job.joint_stage.JointStage.losses", 2],
    ["replace", "last.ckpt", 1],  # the checkpoint of the last epoch
    ["replace", ".compressed.partial/weights-rest", 1],
    ["call", "eacmoe_lightning.callbacks.routing_report.evaluate", 1],  # while the result is evaluated
    ["replace", "report.json", 1],
]

# a checkpoint after every third epoch: the first leads back into the training of block 0
EVERY_THIRD = {"checkpoint__every_n_epochs": 3}
THIRDS = [["phase", "1 attention", 1], ["phase", "2 replay", 1]]

# signals that a process may answer, and a disk that is full for whoever writes next
ANSWERED = [
    ["call", "eacmoe_lightning.job.start.check_original", 1, "SIGTERM"],  # the run directory does not exist
    ["phase", "0 attention", 1, "SIGTERM"],  # the run has begun and has no checkpoint
    ["phase", "1 router", 1, "full"],  # TensorBoard writes next
    ["call", "eacmoe_lightning.quantization.gptq.fit_range", 4, "SIGINT"],
    ["replace", "blocks/block_001", 1, "SIGTERM"],
    ["phase", "None joint", 1, "full"],
    ["call", "eacmoe_lightning.job.joint_stage.JointStage.losses", 3, "SIGTERM"],
    ["phase", "None write", 1, "full"],
    ["replace", ".compressed.partial/weights-rest", 1, "SIGINT"],
    ["phase", "None evaluate", 1, "full"],
    ["replace", "report.json", 1, "SIGHUP"],
]

# with pruning by the outputs of the original's experts, which removes different numbers of experts from blocks
PRUNING = {"pruning__criterion": "reap", "pruning__alpha": 0.9}
PRUNED = [
    ["phase", "1 attention", 1],  # the block is pruned and not yet written
    ["call", "eacmoe_lightning.job.block_stage.BlockStage.window_losses", 3],
    ["phase", "2 replay", 1],
    ["call", "eacmoe_lightning.job.joint_stage.JointStage.losses", 2],
]

# with documents that share windows
PACKED = {"data__documents": "packed", "data__num_windows": 12, "data__batch_size": 4}
WHILE_PACKED = [
    ["call", "eacmoe_lightning.job.start.check_original", 1],
    ["phase", "1 attention", 1],
    ["call", "eacmoe_lightning.job.router_stage.RouterStage.losses", 8],
    ["call", "eacmoe_lightning.job.block_stage.BlockStage.window_losses", 5],
    ["phase", "2 replay", 1],
    ["call", "eacmoe_lightning.job.joint_stage.JointStage.losses", 2],
]

# with weights on a lattice
LATTICE = {"model__quantizer": "lattice", "model__bits": 2.75}
ON_LATTICE = [
    ["call", "eacmoe_lightning.quantization.lattice.gptq_on_lattice", 4],
    ["phase", "2 experts", 1],
    ["call", "eacmoe_lightning.job.block_stage.BlockStage.window_losses", 4],
    ["call", "eacmoe_lightning.job.joint_stage.JointStage.losses", 2],
]


@pytest.fixture(scope="module")
def undisturbed(once, tiny_model_dir) -> Callable[[str, dict], Path]:
    """`undisturbed(family, options)`: the same job without an end before its end; each family has one set of them."""

    def run(family: str, more: dict) -> Path:
        return once(
            f"undisturbed-{family}", lambda path: jobs.attempts(tiny_model_dir(family), path, [], OPTIONS | more)
        )

    return run


@pytest.fixture(scope="module")
def short_texts(tmp_path_factory) -> Path:
    return jobs.short_texts(tmp_path_factory.mktemp("short"))


def test_a_job_that_a_signal_or_a_full_disk_ends_says_how_to_go_on(undisturbed, tiny_model_dir, tmp_path):
    """With exit codes that a scheduler takes for failures, one message each, and the same end."""
    output = jobs.attempts(tiny_model_dir("qwen3_moe"), tmp_path / "run", ANSWERED, OPTIONS | EVERY_STEP)
    for how, number in collections.Counter(place[3] for place in ANSWERED).items():
        message = "error: " if how == "full" else f"stopped by {how}: the same command with --ckpt_path auto goes on"
        assert output.count(message) == number, output
    assert output.count("disk or quota") == 4 and "Traceback" not in output and "Exception in thread" not in output
    reference = undisturbed("qwen3_moe", {})
    for part in ("blocks", "compressed"):
        assert jobs.contents(tmp_path / "run" / part) == jobs.contents(reference / part)


@pytest.fixture
def small(fitted) -> Path:
    """A finished run with SMALL options."""
    return fitted("deepseek", **SMALL)


SMALL = {"data__num_windows": 4, "data__num_heldout_windows": 2}


def curves(run: Path) -> dict[str, dict[int, float]]:
    """The points of every curve of blocks and losses in TensorBoard by step, none of them out of order.

    A kill after the last step of a pass costs its point of the windows held back.
    """
    events = EventAccumulator(str(run / "tensorboard"), {"scalars": 0}).Reload()
    points = {tag: events.Scalars(tag) for tag in events.Tags()["scalars"]}
    assert all([p.step for p in row] == sorted(p.step for p in row) for row in points.values())
    left_out = ("cost/", "epoch", "block_stage/held_back")
    return {tag: {p.step: p.value for p in row} for tag, row in points.items() if not tag.startswith(left_out)}


STATES = {  # what a killed job has left behind: parts of a finished run that are there, or are not
    "nothing": [],
    "an empty directory": [""],
    "logs only": ["tensorboard"],
    "a lock": ["run.lock"],
    "a run without a checkpoint": ["run.json", "unquantized.json", "tensorboard"],
    "blocks without a checkpoint": ["run.json", "unquantized.json", "blocks"],
    "no model after the last epoch": ["run.json", "unquantized.json", "blocks", "checkpoints"],
    "no report": ["run.json", "unquantized.json", "blocks", "checkpoints", "compressed"],
    "all": ["run.json", "unquantized.json", "blocks", "checkpoints", "compressed", "report.json", "report.md"],
}


@pytest.mark.parametrize("state", STATES)
def test_one_command_starts_or_goes_on(state, small, tiny_model_dir, tmp_path):
    run = tmp_path / "run"
    for name in STATES[state]:
        if name == "run.lock":
            run.mkdir()
            (run / name).write_text('{"process": 1, "machine": "gone"}')
        elif name and (small / name).is_file():
            run.mkdir(exist_ok=True)
            shutil.copy(small / name, run / name)
        else:
            shutil.copytree(small / name, run / name) if name else run.mkdir()
    jobs.fit(tiny_model_dir("deepseek"), run, "--ckpt_path", "auto", **SMALL)
    for part in ("blocks", "compressed"):
        assert jobs.contents(run / part) == jobs.contents(small / part)
    assert (run / "report.md").exists() and not (run / "run.lock").exists()


def test_a_job_that_slurm_requeues_goes_on(small, tiny_model_dir, tmp_path):
    """SIGUSR1 announces the end, Lightning's handler requeues the job, SIGTERM ends it, and SLURM starts it again."""
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text(f"#!/bin/sh\necho $@ > {tmp_path}/requeued\n")
    scontrol.chmod(0o755)
    slurm = {"JOB_ID": "7", "JOB_NAME": "fit", "NTASKS": "1", "PROCID": "0", "LOCALID": "0", "NODEID": "0"}
    environment = {f"SLURM_{name}": value for name, value in slurm.items()} | {
        "PATH": f"{scontrol.parent}{os.pathsep}{os.environ['PATH']}",
        "OMP_NUM_THREADS": str(torch.get_num_threads()),  # as in this process, which has made `small`
    }
    run = tmp_path / "run"
    words = ["train.py", "fit", *jobs.options(tiny_model_dir("deepseek"), run, **SMALL)]
    waiting = {"class_path": "test_resume.WaitForSignals", "init_args": {"requeued": str(tmp_path / "requeued")}}
    process = jobs.start(*words, "--trainer.callbacks", json.dumps([waiting]), **environment)
    output = jobs.finish(process)
    assert process.returncode == 143 and "stopped by SIGTERM" in output, output[-3000:]
    assert (tmp_path / "requeued").read_text().split() == ["requeue", "7"]
    assert not list(run.glob("hpc_ckpt*"))  # it would be of the middle of a step
    process = jobs.start(*words, **environment, SLURM_RESTART_COUNT="1")  # the very same command
    output = jobs.finish(process)
    assert process.returncode == 0, output[-3000:]
    for part in ("blocks", "compressed"):
        assert jobs.contents(run / part) == jobs.contents(small / part)


class WaitForSignals(BlockCallback):
    """Sends this process SIGUSR1, and SIGTERM after the handler of the first has run."""

    def __init__(self, requeued: str) -> None:
        self.requeued = Path(requeued)

    def on_phase_start(self, trainer: Trainer, module: LightningModule, block: int | None, phase: str) -> None:
        if (block, phase) == (2, "router"):
            os.kill(os.getpid(), signal.SIGUSR1)
            while not self.requeued.exists():
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGTERM)


def test_random_kills():
    """A few of those that `scripts/random_kills.py` makes by the hundred."""
    process = jobs.start("scripts/random_kills.py", "--kills", "5", "--families", "mixtral", "deepseek")
    output = jobs.finish(process, timeout=900)
    assert process.returncode == 0 and re.search(r"^5 kills in \d+ runs, 0 faults", output, re.MULTILINE), output


@pytest.mark.parametrize(
    "family, places, more, options",
    [
        ("qwen3_moe", STEPS, EVERY_STEP, {}),
        ("deepseek", EPOCHS, {}, {}),
        ("qwen3_moe", THIRDS, EVERY_THIRD, {}),
        ("mixtral", PRUNED, EVERY_STEP, PRUNING),
        ("qwen2_moe", ON_LATTICE, EVERY_STEP, LATTICE),
        ("phimoe", WHILE_PACKED, EVERY_STEP, PACKED),
    ],
    ids=["checkpoints of steps", "checkpoints of epochs", "rare checkpoints", "pruning", "lattice", "packed documents"],
)
def test_a_killed_job_ends_like_an_undisturbed_one(
    family, places, more, options, undisturbed, short_texts, tiny_model_dir, tmp_path
):
    if options is PACKED:
        options = options | {"data__calibration": short_texts}
    jobs.attempts(tiny_model_dir(family), tmp_path / "run", places, {**OPTIONS, **more, **options})
    reference = undisturbed(family, options)
    for part in ("blocks", "compressed"):
        assert jobs.contents(tmp_path / "run" / part) == jobs.contents(reference / part)
    reports = [json.loads((run / "report.json").read_text()) for run in (tmp_path / "run", reference)]
    for key in ("perplexity", "expert_shift", "bits", "experts", "quantization_error", "pruning"):
        assert reports[0].get(key) == reports[1].get(key)
    if places is EPOCHS:  # a block finished before the last checkpoint is not computed again
        costs = [json.loads(line) for line in (tmp_path / "run" / "costs.jsonl").read_text().splitlines()]
        assert [cost["phase"] for cost in costs if cost["block"] == 0].count("experts") == 1
    if options is PRUNING:
        assert len({len(row["kept"]) for row in reports[0]["pruning"]["blocks"].values()}) > 1
    frequencies = [(run / "expert_frequency.json").read_text() for run in (tmp_path / "run", reference)]
    assert frequencies[0] == frequencies[1]
    assert curves(tmp_path / "run") == curves(reference)
    # `RunDirectory.start` removes the `.NAME.PID.partial` files of killed processes.
    partial = [path for path in (tmp_path / "run").rglob("*") if path.name.startswith(".") or "partial" in path.name]
    assert not partial
