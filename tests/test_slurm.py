"""SLURM: its settings are followed, and a requeued job ends in the bits of an undisturbed one.

The tests with the mark `slow` start real jobs. They need a SLURM with a node that has two free CPUs and runs here.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import jobs
import pytest
from jsonargparse import Namespace
from lightning.pytorch import LightningModule, Trainer
from test_documentation import parse

from eacmoe_lightning.commands.launchers import STRATEGY, follow_launcher
from eacmoe_lightning.job.block_callback import BlockCallback

SCRIPT = jobs.ROOT / "examples" / "slurm.sh"
TASK = {  # what srun gives a task
    "SLURM_JOB_NAME": "fit",
    "SLURM_NTASKS": "8",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
}
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "PREEMPTED", "NODE_FAIL")


@pytest.fixture(autouse=True)
def outside(monkeypatch):
    """Removes what the tests themselves may have been started with."""
    for name in os.environ:
        if name.startswith(("SLURM_", "TORCHELASTIC_")):
            monkeypatch.delenv(name)


def followed(monkeypatch, environment: dict[str, str], **given) -> dict:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("SLURM_NTASKS_PER_NODE", "3")  # of the job; a step may have another number
    trainer = Namespace(**{"devices": "auto", "num_nodes": 1, "strategy": "auto"} | given)
    follow_launcher(trainer)
    return vars(trainer)


def test_tasks_of_srun_are_followed(monkeypatch):
    several = {"devices": 4, "num_nodes": 2, "strategy": STRATEGY}
    assert followed(monkeypatch, TASK) == several
    assert os.environ["SLURM_NTASKS_PER_NODE"] == "4"  # which Lightning compares with devices
    assert followed(monkeypatch, TASK, devices=4, num_nodes=2) == several
    one = {"SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_NUM_NODES": "1", "SLURM_STEP_TASKS_PER_NODE": "1"}
    assert followed(monkeypatch, TASK | one) == {"devices": 1, "num_nodes": 1, "strategy": "auto"}


def test_outside_of_srun_nothing_is_followed(monkeypatch):
    alone = {"devices": "auto", "num_nodes": 1, "strategy": "auto"}
    assert followed(monkeypatch, {}) == alone
    assert followed(monkeypatch, {"SLURM_JOB_NAME": "interactive", "SLURM_NTASKS": "4"}) == alone  # salloc's shell
    shell = {"SLURM_JOB_NAME": "bash", "SLURM_NTASKS": "1"}  # srun --pty bash
    shell |= {"SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_NUM_NODES": "1"}
    assert followed(monkeypatch, shell, devices=2) == {"devices": 2, "num_nodes": 1, "strategy": STRATEGY}


@pytest.mark.parametrize(
    "environment, given, message",
    [
        (TASK, {"devices": 2}, "the launcher sets devices=4, but --trainer.devices is 2: leave one out"),
        ({"SLURM_JOB_NAME": "fit", "SLURM_NTASKS": "2"}, {}, "this SLURM job has 2 tasks, but .* without srun"),
        (TASK | {"SLURM_JOB_NAME": "bash"}, {}, "the name bash .* each of the 8 tasks would run alone: .* --job-name"),
        (
            TASK | {"SLURM_STEP_NUM_TASKS": "3", "SLURM_STEP_TASKS_PER_NODE": "2,1"},
            {},
            r"3 tasks on 2 nodes \(2,1\): .* --ntasks-per-node",
        ),
        (TASK | {"SLURM_STEP_TASKS_PER_NODE": "5,3"}, {}, r"8 tasks on 2 nodes \(5,3\)"),
    ],
)
def test_what_cannot_be_followed_is_an_error(environment, given, message, monkeypatch):
    with pytest.raises(ValueError, match=message):
        followed(monkeypatch, environment, **given)


def test_the_script_runs_a_command_that_parses(monkeypatch):
    last = SCRIPT.read_text().strip().splitlines()[-1]
    words = last[last.index("eacmoe") :].replace('"$@"', "--config mixtral-8x7b").split()
    monkeypatch.chdir(jobs.ROOT)
    parse(words[1:])
    subprocess.run(["bash", "-n", SCRIPT], check=True)
    example = re.search(r"sbatch examples/slurm.sh (--config .*)", SCRIPT.read_text())[1]
    parse(("fit", *example.split()))


# --- real jobs


def has_slurm() -> bool:
    """Whether jobs of two tasks can run here."""
    if shutil.which("sbatch") is None:
        return False
    host = os.uname().nodename.partition(".")[0]
    nodes = subprocess.run(["sinfo", "--noheader", "--Node", "--format", "%n %T %c"], capture_output=True, text=True)
    rows = [line.split() for line in nodes.stdout.splitlines()]
    return any(name == host and state == "idle" and int(cpus) >= 2 for name, state, cpus in rows)


class WaitForRequeue(BlockCallback):
    """Waits to be ended when a phase begins, unless SLURM has requeued the job; leaves a file to say so."""

    def __init__(self, what: str, waiting: str) -> None:
        self.what, self.waiting = what, Path(waiting)

    def setup(self, trainer: Trainer, module: LightningModule, stage: str) -> None:
        self._wait(trainer, "setup")

    def on_phase_start(self, trainer: Trainer, module: LightningModule, block: int | None, phase: str) -> None:
        self._wait(trainer, f"{block} {phase}")

    def _wait(self, trainer: Trainer, what: str) -> None:
        if what == self.what and trainer.is_global_zero and "SLURM_RESTART_COUNT" not in os.environ:
            self.waiting.touch()
            time.sleep(120)


class Cluster:
    """Submits jobs that run `eacmoe` from this checkout.

    Args:
        folder: for their output and a script of the name `eacmoe`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        command = folder / "bin" / "eacmoe"
        command.parent.mkdir()
        command.write_text(f'#!/bin/sh\nexec {sys.executable} {jobs.ROOT}/train.py "$@"\n')
        command.chmod(0o755)
        paths = {"PATH": str(command.parent), "PYTHONPATH": f"{jobs.ROOT}{os.pathsep}{jobs.ROOT / 'tests'}"}
        self.environment = dict(os.environ)
        for name, path in paths.items():
            self.environment[name] = os.pathsep.join(filter(None, (path, os.environ.get(name))))

    def call(self, *command: str) -> str:
        return subprocess.run(
            command, env=self.environment, cwd=self.folder, check=True, capture_output=True, text=True
        ).stdout.strip()

    def submit(self, run: Path, *words: str) -> str:
        """Submits the script of the examples; returns the number of the job."""
        output = f"{run}.out"
        return self.call("sbatch", "--parsable", "--output", output, str(SCRIPT), *words)

    def state(self, job: str) -> str:
        return re.search(r"JobState=(\w+)", self.call("scontrol", "show", "job", job))[1]

    def finish(self, job: str, seconds: float = 400) -> str:
        """Waits for the end of a job and returns its state. A requeued one starts at once."""
        deadline = time.monotonic() + seconds
        while (state := self.state(job)) not in ENDED and time.monotonic() < deadline:
            if state == "PENDING":
                subprocess.run(["scontrol", "update", f"JobId={job}", "StartTime=now"], capture_output=True)
            time.sleep(1)
        self.call("scancel", job)
        return state


@pytest.fixture
def cluster(tmp_path) -> Cluster:
    if not has_slurm():
        pytest.skip("needs a SLURM with an idle node here")
    return Cluster(tmp_path)


OPTIONS = {
    "model__joint_epochs": 1,
    "data__num_windows": 6,
    "data__num_heldout_windows": 2,
    "data__heldout": "[bundled:prose]",
}


@pytest.mark.slow
def test_a_job_that_is_requeued_in_any_stage_ends_like_an_undisturbed_one(cluster, tiny_model_dir, tmp_path):
    """By SIGUSR1, which makes Lightning requeue the job, to the tasks or to the batch script, and by hand."""
    model, undisturbed = tiny_model_dir("qwen2_moe"), tmp_path / "undisturbed"
    assert cluster.finish(cluster.submit(undisturbed, *jobs.options(model, undisturbed, **OPTIONS))) == "COMPLETED"
    assert json.loads((undisturbed / "report.json").read_text())["machine"]["processes"] == 2
    to_batch = ["scancel", "--batch", "--signal", "USR1"]
    places = {
        "setup": ["scancel", "--signal", "USR1"],
        "1 block": to_batch,
        "None joint": ["scontrol", "requeue"],
    }
    for what, end in places.items():
        run, waiting = tmp_path / what.replace(" ", "_"), tmp_path / f"waiting in {what}"
        place = {"class_path": "test_slurm.WaitForRequeue", "init_args": {"what": what, "waiting": str(waiting)}}
        words = [*jobs.options(model, run, **OPTIONS), "--trainer.callbacks", json.dumps([place])]
        job = cluster.submit(run, *words)
        deadline = time.monotonic() + 120
        while not waiting.exists() and time.monotonic() < deadline:
            time.sleep(0.2)
        assert waiting.exists(), Path(f"{run}.out").read_text()
        cluster.call(*end, job)
        state, output = cluster.finish(job), Path(f"{run}.out").read_text()
        assert state == "COMPLETED" and "Restarts=1" in cluster.call("scontrol", "show", "job", job), output
        assert "stopped by SIGTERM: the same command with --ckpt_path auto goes on" in output, output
        assert not list(run.glob("hpc_ckpt*"))  # it would be of the middle of a step
        for part in ("blocks", "compressed"):
            assert jobs.contents(run / part) == jobs.contents(undisturbed / part)
        assert not [path for path in run.rglob("*") if path.name.endswith((".partial", ".lock"))]


@pytest.mark.slow
def test_a_job_that_lost_a_task_has_failed(cluster, tiny_model_dir, tmp_path):
    run = tmp_path / "run"
    place = {"class_path": "test_launchers.KillOneProcess", "init_args": {"what": "1 block"}}
    words = [*jobs.options(tiny_model_dir("qwen2_moe"), run, **OPTIONS), "--trainer.callbacks", json.dumps([place])]
    state = cluster.finish(cluster.submit(run, *words))
    output = Path(f"{run}.out").read_text()
    assert state == "FAILED" and not (run / "compressed").exists(), output
    assert "another process of this job has ended" in output or "stopped by SIGTERM" in output, output
