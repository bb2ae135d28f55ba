"""Several CPU processes, started by torchrun or `fabric run`, share one run directory and give the result of one.

Also under two agents of torchrun, as on two machines. `test_slurm.py` has those that SLURM starts.
"""

import json
import os
import signal
import socket
from pathlib import Path

import jobs
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer

from eacmoe_lightning.cli import main
from eacmoe_lightning.commands.launchers import STARTED
from eacmoe_lightning.compressed.format import read_config
from eacmoe_lightning.compressed.loading import load
from eacmoe_lightning.job.block_callback import BlockCallback
from eacmoe_lightning.quantization.packing import unpack
from eacmoe_lightning.run.files import read_tensors
from eacmoe_lightning.run.lock import RunLock

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:LightningCLI's args", "ignore:.*deprecated")]
OPTIONS = {  # AdamW divides by the gradient's size: small rates limit the effect of the order of summation
    "model__router_method": "sgd",
    "model__router_warm_start": "true",
    "model__router_lr": 2e-3,
    "model__joint_router_lr": 3e-4,
    "model__joint_code_lr": 1e-6,
    "model__block_epochs": 2,
    "model__joint_epochs": 2,
    "data__num_windows": 15,  # 15 = 7 + 8
    # GPTQ without searches: rounding differences between the processes do not grow, so all blocks can be compared
    "model__bits": 8,
    "model__attention_bits": 8,
    "model__act_order": "false",
    "model__clip_search": "false",
    "model__scale_search": "false",
    "model__refine": 0,
}
LAUNCHERS = {
    "torchrun": ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "PORT", "train.py"],
    # the command that `fabric run` starts
    "fabric": [
        "-m",
        "lightning.fabric.cli",
        "--accelerator",
        "cpu",
        "--devices",
        "2",
        "--main-port",
        "PORT",
        "train.py",
    ],
}


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def launch(launcher: str, *words: str) -> tuple[int, str]:
    """Runs a job of two processes; returns its exit status and output."""
    port = free_port()
    command = [port if word == "PORT" else word for word in LAUNCHERS[launcher]]
    process = jobs.start(*command, *words)
    output = jobs.finish(process)
    return process.returncode, output


@pytest.fixture
def alone(fitted) -> Path:
    """The same job in one process."""
    return fitted("qwen2_moe", **OPTIONS)


def codes(run: Path, block: str = "") -> torch.Tensor:
    """All codes of a run's compressed model, or those of one block."""
    parts, bits = [], read_config(run / "compressed")["quantization"]["bits"]
    for file in sorted((run / "compressed").glob(f"weights-block-{block}*")):
        tensors, _ = read_tensors(file)
        for name in sorted(bits.keys() & {name.removesuffix(".codes") for name in tensors}):
            packed = tensors[f"{name}.codes"]
            parts.append(unpack(packed, bits[name], packed.shape[-1] * 8 // bits[name]))
    return torch.cat([part.flatten() for part in parts])


def assert_same(run: Path, other: Path, chooses: bool = False) -> None:
    """Asserts that two runs agree up to the order of floating-point sums.

    Args:
        run, other: finished runs.
        chooses: whether GPTQ searched scales or orders. Then differences of 1e-7 decide ties, each of which moves
            weights by a step, and random models pass the differences on from block to block. The first block has the
            same inputs in both runs.
    """
    if chooses:
        assert (codes(run, "000") == codes(other, "000")).float().mean() > 0.99
    assert (codes(run) == codes(other)).float().mean() > (0.8 if chooses else 0.999)
    reports = [json.loads((folder / "report.json").read_text()) for folder in (run, other)]
    for text, values in reports[1]["perplexity"].items():
        for stream, tolerance in (("original", 1e-5), ("compressed", 0.04 if chooses else 1e-3)):
            assert reports[0]["perplexity"][text][stream] == pytest.approx(values[stream], rel=tolerance)
    assert reports[0]["experts"] == reports[1]["experts"] and reports[0]["bits"] == reports[1]["bits"]


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_two_processes_give_the_model_of_one(launcher, alone, tiny_model_dir, tmp_path):
    run = tmp_path / "runs" / "two"
    words = jobs.options(tiny_model_dir("qwen2_moe"), run, **OPTIONS)
    status, output = launch(launcher, "fit", *words)
    assert status == 0, output[-4000:]
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["two"]  # one run directory
    assert len(list(run.glob("tensorboard/events*"))) == 1
    assert output.count("starved experts;") == 1  # and one report
    assert "sync_dist" not in output  # Lightning's warning that a value may be one process's alone
    report, other = (json.loads((folder / "report.json").read_text()) for folder in (run, alone))
    assert report["machine"]["processes"] == 2 and other["machine"]["processes"] == 1
    assert_same(run, alone)
    for rate, value in other["expert_shift"]["mean"]["after"].items():
        assert report["expert_shift"]["mean"]["after"][rate] == pytest.approx(value, abs=0.02)
    routers = [dict(load(folder).named_parameters()) for folder in (run, alone)]
    for name, weight in routers[1].items():
        if "mlp.gate." in name:
            torch.testing.assert_close(routers[0][name], weight, rtol=0, atol=1e-3)
    assert not list(run.rglob("*.partial"))
    if launcher == "fabric":
        return

    # the run can be evaluated by two processes, with the same numbers
    status, output = launch(launcher, "test", *words)
    assert status == 0, output[-4000:]
    tested = json.loads((run / "test.json").read_text())
    assert tested["tokens"] == {"prose": 3 * 63, "code": 3 * 63}
    for text, values in report["perplexity"].items():
        assert tested["perplexity"][text]["compressed"] == pytest.approx(values["compressed"], rel=1e-5)


def test_a_signal_ends_all_processes_and_one_command_goes_on(alone, tiny_model_dir, tmp_path):
    run = tmp_path / "run"
    words = [*jobs.options(tiny_model_dir("qwen2_moe"), run, **OPTIONS), "--ckpt_path", "auto"]
    place = {"class_path": "test_launchers.EndAll", "init_args": {"what": "1 experts"}}
    status, output = launch("torchrun", "fit", *words, "--trainer.callbacks", json.dumps([place]))
    assert status != 0 and output.count("stopped by SIGTERM: the same command with --ckpt_path auto") == 1, output[
        -4000:
    ]
    assert output.count("exitcode  : 143") >= 1 and "exitcode  : 0" not in output, output[-4000:]
    assert not (run / "blocks" / "block_001.safetensors").exists()
    status, output = launch("torchrun", "fit", *words)
    assert status == 0, output[-4000:]
    assert_same(run, alone)


class EndAll(BlockCallback):
    """Sends SIGTERM to all processes of the job when a phase begins in the second, as a scheduler does."""

    def __init__(self, what: str) -> None:
        self.what = what

    def on_phase_start(self, trainer: Trainer, module: LightningModule, block: int | None, phase: str) -> None:
        pids = [int(pid) for pid in module.ranks.gather(torch.tensor([os.getpid()]))] if phase == "experts" else []
        if f"{block} {phase}" == self.what and trainer.global_rank == 1:
            for pid in pids:
                os.kill(pid, signal.SIGTERM)


def test_a_second_start_of_several_processes_is_refused(tiny_model_dir, tmp_path):
    run = tmp_path / "run"
    with RunLock(run):
        status, output = launch("torchrun", "fit", *jobs.options(tiny_model_dir("qwen2_moe"), run, **OPTIONS))
    assert status != 0 and output.count(f"error: process {os.getpid()} on ") == 1, output[-4000:]


RENDEZVOUS = {
    "static": ["--master_addr", "127.0.0.1", "--master_port", "PORT"],
    "c10d": ["--rdzv_backend", "c10d", "--rdzv_id", "fit", "--rdzv_endpoint", "127.0.0.1:PORT"],
}
SMALL = {  # with both stages
    "model__block_epochs": 2,
    "model__joint_epochs": 1,
    "data__num_windows": 6,
    "data__num_heldout_windows": 2,
    "data__heldout": "[bundled:prose]",
}


def launch_agents(rendezvous: str, *words: str) -> list[tuple[int, str]]:
    """Runs a job of two processes, each under an agent of torchrun; exit status and output of both agents."""
    port = free_port()
    place = [word.replace("PORT", port) for word in RENDEZVOUS[rendezvous]]
    agents = [
        jobs.start(
            *("-m", "torch.distributed.run", "--nnodes", "2", "--node_rank", str(rank), "--nproc_per_node", "1"),
            *(*place, "train.py", "fit", *words),
        )
        for rank in range(2)
    ]
    outputs = [jobs.finish(agent) for agent in agents]
    return [(agent.returncode, output) for agent, output in zip(agents, outputs, strict=True)]


class KillOneProcess(BlockCallback):
    """Kills the second process when a phase begins; with `agent` its agent too, as when a machine loses power."""

    def __init__(self, what: str, agent: bool = False) -> None:
        self.what, self.agent = what, agent

    def on_phase_start(self, trainer: Trainer, module: LightningModule, block: int | None, phase: str) -> None:
        if trainer.global_rank == 1 and f"{block} {phase}" == self.what:
            if self.agent:
                os.kill(os.getppid(), signal.SIGKILL)
            os.kill(os.getpid(), signal.SIGKILL)


def test_two_agents_go_on_after_one_was_lost(tiny_model_dir, tmp_path):
    """Lost in the block stage and in the joint stage; the end has the bits of one agent with two processes."""
    model, run = tiny_model_dir("qwen2_moe"), tmp_path / "run"
    status, output = launch("torchrun", "fit", *jobs.options(model, tmp_path / "undisturbed", **SMALL))
    assert status == 0, output[-4000:]
    words = [*jobs.options(model, run, **SMALL), "--ckpt_path", "auto"]
    for what, rendezvous in (("1 block", "static"), ("None joint", "c10d")):
        place = {"class_path": "test_launchers.KillOneProcess", "init_args": {"what": what, "agent": True}}
        agents = launch_agents(rendezvous, *words, "--trainer.callbacks", json.dumps([place]))
        assert sorted(status for status, _ in agents) == [-signal.SIGKILL, 1], agents
        assert not (run / "compressed").exists()
        if rendezvous == "static":  # with c10d the lost agent may have held the rendezvous, whose loss ends the other
            message = "error: another process of this job has ended or cannot be reached"
            assert agents[0][1].count(message) == 1 and "--ckpt_path auto goes on" in agents[0][1], agents[0][1]
    agents = launch_agents("static", *words)
    assert [status for status, _ in agents] == [0, 0], agents
    for part in ("blocks", "compressed"):
        assert jobs.contents(run / part) == jobs.contents(tmp_path / "undisturbed" / part)
    assert not list(run.rglob("*.partial"))


class FailOnce(BlockCallback):
    """Kills the second process when a phase begins, unless torchrun has started it again."""

    def on_phase_start(self, trainer: Trainer, module: LightningModule, block: int | None, phase: str) -> None:
        restarts = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
        if trainer.global_rank == 1 and (block, phase) == (1, "block") and not restarts:
            os.kill(os.getpid(), signal.SIGKILL)


def test_a_job_that_torchrun_restarts_goes_on(tiny_model_dir, tmp_path):
    """With `--max_restarts` torchrun starts the very same command again.

    torch 2.13 keeps one store for all attempts unless it is told not to, and with gloo the second attempt may then find
    the addresses of the first.
    """
    words = jobs.options(tiny_model_dir("qwen2_moe"), tmp_path / "run", **SMALL | {"model__joint_epochs": 0})
    words += ["--trainer.callbacks", json.dumps([{"class_path": "test_launchers.FailOnce"}])]
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--max_restarts", "1"]
    process = jobs.start(*command, "train.py", "fit", *words, TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1")
    output = jobs.finish(process)
    assert process.returncode == 0 and "Restored all states from the checkpoint" in output, output[-4000:]
    assert (tmp_path / "run" / "report.md").exists()


@pytest.mark.parametrize(
    "launcher, option, value",
    [("torchrun", "devices", "1"), ("torchrun", "num_nodes", "3"), ("fabric", "devices", "4")],
)
def test_a_conflict_with_the_launcher_is_an_error(launcher, option, value, tmp_path, monkeypatch, capsys):
    """Runs in this process, in the environment that the launchers give the first of two processes."""
    environment = {
        "TORCHELASTIC_RUN_ID": "1",
        "LOCAL_WORLD_SIZE": "2",
        "WORLD_SIZE": "2",
        "RANK": "0",
        "LOCAL_RANK": "0",
    }
    if launcher == "fabric":
        environment |= {"LT_ACCELERATOR": "cpu", "LT_DEVICES": "2", "LT_CLI_USED": "1"}
    for name, text in environment.items():
        monkeypatch.setenv(name, text)
    with pytest.raises(SystemExit) as end:
        main(["fit", "--trainer.default_root_dir", str(tmp_path / "run"), f"--trainer.{option}", value])
    error = capsys.readouterr().err
    assert end.value.code == 1 and not (tmp_path / "run").exists()
    expected = {"devices": "2", "num_nodes": "1"}[option]
    assert f"the launcher sets {option}={expected}, but --trainer.{option} is {value}" in error


def test_several_nodes_without_a_launcher_are_an_error(tmp_path, monkeypatch, capsys):
    for name in STARTED:
        monkeypatch.delenv(name, raising=False)
    words = ["fit", "--trainer.num_nodes", "2", "--trainer.default_root_dir", str(tmp_path / "run")]
    with pytest.raises(SystemExit):
        main(words)
    assert "--trainer.num_nodes 2: nothing has started the processes" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
