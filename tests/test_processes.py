"""Several processes give the result of one, even with uneven shares, and a run survives a killed process."""

import json
import socket
from pathlib import Path

import jobs
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from safetensors.torch import load_file
from test_launchers import assert_same

from eacmoe_lightning.compressed.format import read_config
from eacmoe_lightning.planning.joint import JointMemory
from eacmoe_lightning.run.block_file import read_stats
from eacmoe_lightning.run.directory import RunDirectory

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:LightningCLI's args", "ignore:.*deprecated")]
OPTIONS = {
    "model__joint_epochs": 0,
    "data__num_windows": 7,  # 2 + 2 + 3 in three processes; 8 experts are 2 + 3 + 3
    "data__num_heldout_windows": 2,  # fewer than the processes
    "data__heldout": "[bundled:prose]",
}


class Streamed(Callback):
    """Makes the joint stage stream the blocks, as that of a model which does not fit into memory."""

    def setup(self, trainer: Trainer, module: LightningModule, stage: str) -> None:
        JointMemory.fits = lambda self, job, memory, host: host < float("inf")


def launch(processes: int, *words: str) -> tuple[int, str]:
    """Exit status and output of `fit` in several processes, started by torchrun."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = ["-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--master_port", port]
    process = jobs.start(*command, "train.py", "fit", *words)
    output = jobs.finish(process, timeout=400)
    return process.returncode, output


def in_one_and_two(model: Path, folder: Path, options: dict) -> tuple[Path, Path]:
    """The same run in one process and in two."""
    alone, run = folder / "alone", folder / "run"
    jobs.fit(model, alone, **options)
    status, output = launch(2, *jobs.options(model, run, **options))
    assert status == 0, output[-3000:]
    return alone, run


@pytest.fixture
def alone(fitted) -> Path:
    return fitted("qwen2_moe", **OPTIONS)


def test_two_processes_continue_a_run_of_three_after_one_was_killed(alone, tiny_model_dir, tmp_path):
    """One of three is killed in block 1 and the job fails. Two processes continue it and get the result of one."""
    run, model = tmp_path / "run", tiny_model_dir("qwen2_moe")
    killer = {"class_path": "test_launchers.KillOneProcess", "init_args": {"what": "1 experts"}}
    words = jobs.options(model, run, **OPTIONS)
    status, output = launch(3, *words, "--trainer.callbacks", json.dumps([killer]))
    assert status != 0 and "Signal 9 (SIGKILL)" in output, output[-3000:]
    assert (run / "blocks" / "block_000.safetensors").exists() and not (run / "compressed").exists()
    status, output = launch(2, *words, "--ckpt_path", "last")
    assert status == 0, output[-3000:]
    assert_same(run, alone, chooses=True)
    assert not list(run.rglob("*.partial"))


def test_two_processes_remove_the_same_experts_as_one(tiny_model_dir, tmp_path):
    """Scores are summed over processes; the number of kept experts varies by block, and a joint stage follows."""
    options = OPTIONS | {"pruning__criterion": "reap", "pruning__alpha": 0.9}
    options |= {"model__joint_epochs": 1, "model__joint_router_lr": 3e-4}
    alone, run = in_one_and_two(tiny_model_dir("qwen2_moe"), tmp_path, options)
    two, one = (json.loads((folder / "report.json").read_text())["pruning"]["blocks"] for folder in (run, alone))
    assert len({len(row["kept"]) for row in two.values()}) > 1
    for block, row in one.items():
        assert two[block]["kept"] == row["kept"]
        assert two[block]["scores"] == pytest.approx(row["scores"], rel=1e-4)
        assert two[block]["removed_selections"] == pytest.approx(row["removed_selections"])
    assert_same(run, alone, chooses=True)
    config = read_config(run / "compressed")["original"]["config"]
    assert config["kept_experts"] == {block: row["kept"] for block, row in one.items()}


def test_two_processes_calibrate_on_one_quantized_head(tiny_model_dir, tmp_path):
    """It is tied to the embedding, by which both embed their windows."""
    options = OPTIONS | {"model__head_bits": 6, "model__joint_epochs": 1, "model__joint_router_lr": 3e-4}
    alone, run = in_one_and_two(tiny_model_dir("qwen3_moe"), tmp_path, options)
    assert_same(run, alone, chooses=True)
    assert (run / "head.safetensors").read_bytes() == (alone / "head.safetensors").read_bytes()
    codes = [load_file(folder / "compressed" / "weights-rest.safetensors") for folder in (run, alone)]
    name = "model.embed_tokens.weight.codes"
    assert torch.equal(codes[0][name], codes[1][name])


def test_two_processes_count_the_same_answers_as_one(tiny_model_dir, tmp_path):
    """Only the answers of chats of two texts count; sgd and the joint stage take means over them."""
    talk = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{{ 'assistant: ' if add_generation_prompt }}"
    )
    (tmp_path / "talk.jinja").write_text(talk)
    for name in ("sums", "products"):
        rows = [
            {"prompt": f"What are the {name} of {i}?", "response": f"They are {i + i}, {i * i}."} for i in range(99)
        ]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    options = OPTIONS | {
        "data__calibration": f"[{tmp_path}/sums.jsonl, {tmp_path}/products.jsonl]",
        "data__chat_template": tmp_path / "talk.jinja",
        "data__answers_only": "true",
        "model__router_method": "sgd",
        "model__joint_epochs": 1,
        "model__joint_router_lr": 3e-4,
    }
    alone, run = in_one_and_two(tiny_model_dir("qwen2_moe"), tmp_path, options)
    assert_same(run, alone, chooses=True)
    two, one = (json.loads((folder / "report.json").read_text())["coverage"] for folder in (run, alone))
    assert two["sums"]["blocks"]["0"] == one["sums"]["blocks"]["0"]
    assert {name: (text["windows"], text["selections"]) for name, text in one.items()} == {
        name: (text["windows"], text["selections"]) for name, text in two.items()
    }
    assert one["sums"]["selections"] < 3 * 4 * 64 * 2  # fewer than all tokens of four windows in three blocks


def test_two_processes_that_stream_the_blocks_train_what_one_does_with_all_in_memory(tiny_model_dir, tmp_path):
    options = OPTIONS | {
        "model__quantizer": "rtn",  # has no ties to decide
        "model__block_epochs": 0,
        "model__joint_epochs": 1,
        "model__joint_router_lr": 3e-4,
    }
    alone, run, model = tmp_path / "alone", tmp_path / "run", tiny_model_dir("qwen2_moe")
    jobs.fit(model, alone, **options)
    words = ["--trainer.callbacks", '[{"class_path": "test_processes.Streamed"}]']
    status, output = launch(2, *jobs.options(model, run, **options), *words)
    assert status == 0, output[-3000:]
    assert "the joint stage streams the blocks" in output
    assert_same(run, alone)


def test_two_processes_keep_the_same_documents_apart_as_one(tiny_model_dir, tmp_path):
    """Documents are packed, so each process needs the positions of its own windows."""
    options = OPTIONS | {
        "data__calibration": jobs.short_texts(tmp_path),
        "data__documents": "packed",
        "model__quantizer": "rtn",  # has no ties to decide
        "model__block_epochs": 0,
        "model__router_method": "sgd",
        "model__joint_epochs": 1,
        "model__joint_router_lr": 3e-4,
    }
    alone, run = in_one_and_two(tiny_model_dir("qwen2_moe"), tmp_path, options)
    assert_same(run, alone)
    for index in range(3):
        two, one = (read_stats(RunDirectory(folder), index) for folder in (run, alone))
        assert two.expert_load["original"] == one.expert_load["original"]
        files = (folder / "blocks" / f"block_{index:03d}.safetensors" for folder in (run, alone))
        gates = [load_file(file)[f"model.layers.{index}.mlp.gate.weight"] for file in files]
        torch.testing.assert_close(*gates, rtol=1e-3, atol=1e-4)
