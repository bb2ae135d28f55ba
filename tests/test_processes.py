"""Processes that divide neither windows nor experts do the work of one, and a run survives the death of one of them."""

import json
import os
import signal
import socket
from pathlib import Path

import jobs
import pytest
from lightning.pytorch import LightningModule, Trainer
from test_launchers import assert_same

from eacmoe_lightning.compressed.format import read_config
from eacmoe_lightning.job.block_callback import BlockCallback

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:LightningCLI's args", "ignore:.*deprecated")]
OPTIONS = {
    "model__joint_epochs": 0,
    "data__num_windows": 7,  # 2 + 2 + 3; and 8 experts are 2 + 3 + 3
    "data__num_heldout_windows": 2,  # fewer than processes
    "data__heldout": "[bundled:prose]",
}


class KillOneProcess(BlockCallback):
    """Kills the second process when a phase begins."""

    def __init__(self, what: str) -> None:
        self.what = what

    def on_phase_start(self, trainer: Trainer, module: LightningModule, block: int | None, phase: str) -> None:
        if trainer.global_rank == 1 and f"{block} {phase}" == self.what:
            os.kill(os.getpid(), signal.SIGKILL)


def launch(processes: int, *words: str) -> tuple[int, str]:
    """Exit status and output of `fit` in several processes, started by torchrun."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = ["-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--master_port", port]
    process = jobs.start(*command, "train.py", "fit", *words)
    output = jobs.finish(process, timeout=400)
    return process.returncode, output


@pytest.fixture(scope="module")
def alone(tmp_path_factory, tiny_model_dir) -> Path:
    return jobs.fit(tiny_model_dir("qwen2_moe"), tmp_path_factory.mktemp("alone") / "run", **OPTIONS)


def test_three_processes_a_death_and_two_that_go_on(alone, tiny_model_dir, tmp_path):
    """One of three dies in block 1: the job ends with an error. Two processes take it up and end like one."""
    run, model = tmp_path / "run", tiny_model_dir("qwen2_moe")
    killer = {"class_path": "test_processes.KillOneProcess", "init_args": {"what": "1 experts"}}
    words = jobs.options(model, run, **OPTIONS)
    status, output = launch(3, *words, "--trainer.callbacks", json.dumps([killer]))
    assert status != 0 and "Signal 9 (SIGKILL)" in output, output[-3000:]
    assert (run / "blocks" / "block_000.safetensors").exists() and not (run / "compressed").exists()
    status, output = launch(2, *words, "--ckpt_path", "last")
    assert status == 0, output[-3000:]
    assert_same(run, alone, chooses=True)
    assert not list(run.rglob("*.partial"))


def test_two_processes_remove_the_experts_of_one(tiny_model_dir, tmp_path):
    """By scores that are summed over processes; the number that stays varies, and a joint stage follows."""
    options = OPTIONS | {"pruning__criterion": "reap", "pruning__alpha": 0.9}
    options |= {"model__joint_epochs": 1, "model__joint_router_lr": 3e-4}
    alone, run, model = tmp_path / "alone", tmp_path / "run", tiny_model_dir("qwen2_moe")
    jobs.fit(model, alone, **options)
    status, output = launch(2, *jobs.options(model, run, **options))
    assert status == 0, output[-3000:]
    own, other = (json.loads((folder / "report.json").read_text())["pruning"] for folder in (run, alone))
    assert len({len(row["kept"]) for row in own["blocks"].values()}) > 1
    for block, row in other["blocks"].items():
        assert own["blocks"][block]["kept"] == row["kept"]
        assert own["blocks"][block]["scores"] == pytest.approx(row["scores"], rel=1e-4)
        assert own["blocks"][block]["removed_selections"] == pytest.approx(row["removed_selections"])
    assert_same(run, alone, chooses=True)
    config = read_config(run / "compressed")["original"]["config"]
    assert config["kept_experts"] == {block: row["kept"] for block, row in other["blocks"].items()}
