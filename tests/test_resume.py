"""A job that is killed again and again leaves the very bytes of one that never was."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import jobs
import pytest

pytestmark = pytest.mark.slow
OPTIONS = {
    "model__router_method": "sgd",
    "model__router_warm_start": "true",
    "model__router_epochs": 2,
    "model__joint_epochs": 1,
}
EVERY_STEP = {"checkpoint__every_n_train_steps": 1}

# a checkpoint after every step: also in the middle of an epoch, and of the last batch of one
STEPS = [
    ["call", "eacmoe_lightning.gptq.fit_scale", 5],  # inside GPTQ, before there is any checkpoint
    ["replace", "last.ckpt", 3],  # while a checkpoint is written, in the middle of an epoch
    ["phase", "0 experts", 1],
    ["replace", "blocks/block_001", 1],  # while a block is written
    ["phase", "2 router", 1],
    ["call", "eacmoe_lightning.qesc.QESC._joint_loss", 3],  # in the joint stage
    ["replace", ".compressed.partial/weights-block-001", 1],  # while the compressed model is written
]
# a checkpoint after every epoch, the default
EPOCHS = [
    ["phase", "0 observe", 1],
    ["phase", "1 attention", 1],
    ["replace", "streams/", 2],  # while streams are written
    ["phase", "2 replay", 1],
    ["call", "eacmoe_lightning.gptq.fit_scale", 3],
    ["call", "eacmoe_lightning.qesc.QESC._joint_loss", 2],
    ["replace", "last.ckpt", 1],  # the checkpoint of the last epoch
    ["replace", ".compressed.partial/weights-rest", 1],
    ["call", "eacmoe_lightning.callbacks.routing_report.evaluate", 1],  # while the result is evaluated
    ["replace", "report.json", 1],
]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, tiny_model_dir) -> Callable[[str], Path]:
    done: dict[str, Path] = {}

    def run(family: str) -> Path:
        if family not in done:
            done[family] = tmp_path_factory.mktemp("undisturbed") / family
            attempts(tiny_model_dir(family), done[family], [], {})
        return done[family]

    return run


def attempts(model: Path, run: Path, places: list, more: dict) -> str:
    """Runs the job, killed at every place; the output of all attempts. Every kill must have happened."""
    words = jobs.options(model, run, **OPTIONS, **more)
    output = jobs.finish(jobs.start("tests/kill_driver.py", json.dumps(places), "--", *words))
    status = [json.loads(line) for line in re.findall(r"^STATUS (.*)$", output, re.MULTILINE)]
    assert status == [[place, -9] for place in places] + [[None, 0]], output[-4000:]
    return output


@pytest.mark.parametrize(
    "family, places, more",
    [
        ("qwen3_moe", STEPS, EVERY_STEP),
        ("deepseek", EPOCHS, {}),
    ],
    ids=["checkpoints of steps", "checkpoints of epochs"],
)
def test_a_killed_job_ends_like_an_undisturbed_one(family, places, more, undisturbed, tiny_model_dir, tmp_path):
    attempts(tiny_model_dir(family), tmp_path / "run", places, more)
    reference = undisturbed(family)
    for part in ("blocks", "compressed"):
        assert jobs.contents(tmp_path / "run" / part) == jobs.contents(reference / part)
    reports = [json.loads((run / "report.json").read_text()) for run in (tmp_path / "run", reference)]
    for key in ("perplexity", "expert_shift", "bits", "experts", "quantization_error"):
        assert reports[0][key] == reports[1][key]
    frequencies = [(run / "expert_frequency.json").read_text() for run in (tmp_path / "run", reference)]
    assert frequencies[0] == frequencies[1]
    # Fails while `.NAME.PID.partial` files of killed processes stay for good (store.py).
    litter = [path for path in (tmp_path / "run").rglob("*") if path.name.startswith(".") or "partial" in path.name]
    assert not litter
