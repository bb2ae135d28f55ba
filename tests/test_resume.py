"""A job that is killed again and again leaves the same bytes as one that runs undisturbed."""

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
# a checkpoint after every step, so also in the middle of an epoch
STEPS = [
    ["call", "eacmoe_lightning.quantization.gptq.fit_range", 5],  # inside GPTQ, before there is any checkpoint
    ["replace", "last.ckpt", 3],  # while a checkpoint is written, in the middle of an epoch
    ["phase", "0 experts", 1],
    ["replace", "blocks/block_001", 1],  # while a block is written
    ["phase", "2 router", 1],
    ["call", "eacmoe_lightning.job.qesc.QESC._joint_loss", 3],  # in the joint stage
    ["replace", ".compressed.partial/weights-block-001", 1],  # while the compressed model is written
]
# a checkpoint after every epoch, the default
EPOCHS = [
    ["phase", "0 observe", 1],
    ["phase", "1 attention", 1],
    ["replace", "streams/", 2],  # while streams are written
    ["phase", "2 replay", 1],
    ["call", "eacmoe_lightning.quantization.gptq.fit_range", 3],
    ["call", "eacmoe_lightning.job.qesc.QESC._joint_loss", 2],
    ["replace", "last.ckpt", 1],  # the checkpoint of the last epoch
    ["replace", ".compressed.partial/weights-rest", 1],
    ["call", "eacmoe_lightning.callbacks.routing_report.evaluate", 1],  # while the result is evaluated
    ["replace", "report.json", 1],
]


# with pruning by the outputs of the original's experts, which removes different numbers of experts from blocks
PRUNING = {"pruning__criterion": "reap", "pruning__alpha": 0.9}
PRUNED = [
    ["phase", "1 attention", 1],  # the block is pruned and not yet written
    ["phase", "2 replay", 1],
    ["call", "eacmoe_lightning.job.qesc.QESC._joint_loss", 2],
]

# with weights on a lattice
LATTICE = {"model__quantizer": "lattice", "model__bits": 2.75}
ON_LATTICE = [
    ["call", "eacmoe_lightning.quantization.lattice.gptq_on_lattice", 4],
    ["phase", "2 experts", 1],
    ["call", "eacmoe_lightning.job.qesc.QESC._joint_loss", 2],
]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, tiny_model_dir) -> Callable[[str, dict], Path]:
    done: dict[str, Path] = {}

    def run(family: str, more: dict) -> Path:
        if family not in done:
            done[family] = tmp_path_factory.mktemp("undisturbed") / family
            attempts(tiny_model_dir(family), done[family], [], more)
        return done[family]

    return run


def attempts(model: Path, run: Path, places: list, more: dict) -> str:
    """Runs the job, killing it at every place; returns the output of all attempts. Every kill must have happened."""
    words = jobs.options(model, run, **OPTIONS, **more)
    output = jobs.finish(jobs.start("tests/kill_driver.py", json.dumps(places), "--", *words))
    status = [json.loads(line) for line in re.findall(r"^STATUS (.*)$", output, re.MULTILINE)]
    assert status == [[place, -9] for place in places] + [[None, 0]], output[-4000:]
    return output


@pytest.mark.parametrize(
    "family, places, more, options",
    [
        ("qwen3_moe", STEPS, EVERY_STEP, {}),
        ("deepseek", EPOCHS, {}, {}),
        ("mixtral", PRUNED, EVERY_STEP, PRUNING),
        ("qwen2_moe", ON_LATTICE, EVERY_STEP, LATTICE),
    ],
    ids=["checkpoints of steps", "checkpoints of epochs", "pruning", "lattice"],
)
def test_a_killed_job_ends_like_an_undisturbed_one(
    family, places, more, options, undisturbed, tiny_model_dir, tmp_path
):
    attempts(tiny_model_dir(family), tmp_path / "run", places, {**more, **options})
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
    # `RunDirectory.start` removes the `.NAME.PID.partial` files of killed processes.
    partial = [path for path in (tmp_path / "run").rglob("*") if path.name.startswith(".") or "partial" in path.name]
    assert not partial
