"""Everything runs on a device that is not the CPU: no operation mixes devices, and the host rarely waits.

On `other_device`, which changes torch for its process, so the tests run in a process of their own.
"""

import os
import shutil
import subprocess
import sys

import jobs
import pytest
import tiny_models
import torch

from eacmoe_lightning import load, load_offloaded, pesf
from eacmoe_lightning.cli import main
from eacmoe_lightning.compressed.opening import open_model
from eacmoe_lightning.job.block_stage import BlockStage
from eacmoe_lightning.job.joint_stage import JointStage
from eacmoe_lightning.job.router_stage import RouterStage

IS_ITS_PROCESS = os.environ.get("EACMOE_OTHER_DEVICE") == "1"
inside = pytest.mark.skipif(not IS_ITS_PROCESS, reason="runs in a process of its own")
PROMPT = torch.arange(5, 29).view(2, 12)
THERE = {"trainer__accelerator": "other", "trainer__strategy": "other", "data__num_windows": 4}

if IS_ITS_PROCESS:
    import other_device


@pytest.mark.skipif(IS_ITS_PROCESS, reason="this is that process")
@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
@pytest.mark.timeout(900)
def test_on_another_device():
    command = [sys.executable, "-m", "pytest", "-q", "-n0", "-p", "no:cacheprovider", __file__]
    ran = subprocess.run(command, env=os.environ | {"EACMOE_OTHER_DEVICE": "1"}, capture_output=True, text=True)
    assert ran.returncode == 0 and " passed" in ran.stdout and "failed" not in ran.stdout, ran.stdout[-8000:]


@inside
def test_the_device_refuses_what_cuda_refuses():
    there = torch.ones(3, 4, device=other_device.DEVICE)
    weight = torch.ones(2, 4)
    for mixes in (
        lambda: there + torch.ones(3, 4),
        lambda: there @ weight.T,
        lambda: torch.cat([there, torch.ones(3, 4)]),
    ):
        with pytest.raises(RuntimeError, match="two devices|same device"):
            mixes()
    before = other_device.reads()
    assert there.sum().item() == 12 and other_device.reads() == before + 1


@inside
@pytest.mark.parametrize(
    "family, options",
    [
        ("mixtral", {"model__joint_code_lr": 5e-5, "model__block_epochs": 2}),
        ("qwen2_moe", {"model__head_bits": 8, "model__router_method": "sgd"}),
        ("deepseek", {"data__documents": "packed", "data__micro_batch_size": 1, "data__batch_size": 2}),
        ("qwen3_moe", {"data__calibration": "self:4", "model__target_bits": 4.5}),
        ("phimoe", {"model__quantizer": "lattice", "model__stream_dtype": "bfloat16", "model__split_damage": True}),
        ("qwen2_moe", {"model__target": "llama.cpp"}),
    ],
)
def test_a_job_mixes_no_devices(family, options, tiny_model_dir, tmp_path):
    run = jobs.fit(tiny_model_dir(family), tmp_path / "run", **THERE | options)
    assert open_model(run).is_compressed


@inside
def test_the_model_is_that_of_the_cpu(tiny_model_dir, tmp_path):
    options = {"model__quantizer": "rtn", "model__block_epochs": 0, "model__joint_epochs": 0}
    here = jobs.fit(
        tiny_model_dir("mixtral"),
        tmp_path / "here",
        **THERE | options | {"trainer__accelerator": "cpu", "trainer__strategy": None},
    )
    there = jobs.fit(tiny_model_dir("mixtral"), tmp_path / "there", **THERE | options)
    one, other = (load(run)(PROMPT).logits for run in (here, there))
    torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)


@inside
@pytest.mark.parametrize("family", tiny_models.MOE_FAMILIES)
def test_a_packed_model_gives_the_tokens_of_the_cpu(family, tiny_model_dir, tmp_path):
    run = jobs.fit(tiny_model_dir(family), tmp_path / "run", model__router_method="none", data__num_windows=4)
    device = other_device.DEVICE
    here, there, offloaded = load(run), load(run).to(device), load_offloaded(run, 0.5, device=device)
    for model in (there, offloaded):
        torch.testing.assert_close(model(PROMPT.to(device)).logits.cpu(), here(PROMPT).logits, rtol=1e-4, atol=1e-4)
    pesf(here, alpha=0.7)
    pesf(there, alpha=0.7)
    tokens = [
        model.generate(PROMPT.to(model.device), max_new_tokens=6, do_sample=False).cpu() for model in (here, there)
    ]
    assert torch.equal(*tokens)


@inside
def test_the_commands_take_the_device(tiny_model_dir, tmp_path):
    run = jobs.fit(tiny_model_dir("mixtral"), tmp_path / "run", model__router_method="none", data__num_windows=4)
    windows = ["--num_windows", "2", "--window_length", "32", "--device", "other:0"]
    main(["analyze", "--model", str(run), "--output", str(tmp_path / "analysis"), *windows])
    main(["prune", "--model", str(run), "--output", str(tmp_path / "pruned"), "--pruning.keep", "6", *windows])
    assert open_model(tmp_path / "pruned").is_compressed


@inside
def test_the_host_rarely_waits_for_a_step(tiny_model_dir, tmp_path, monkeypatch):
    waits = {}

    def counted(stage, name):
        losses = stage.losses

        def run(self, batch):
            before = other_device.reads()
            result = losses(self, batch)
            waits.setdefault(name, []).append(other_device.reads() - before)
            return result

        monkeypatch.setattr(stage, "losses", run)

    for stage, name in ((RouterStage, "router"), (BlockStage, "block"), (JointStage, "joint")):
        counted(stage, name)
    jobs.fit(tiny_model_dir("mixtral"), tmp_path / "run", **THERE | {"model__router_method": "sgd"})
    mask, experts = 1, 2  # transformers looks for documents in the positions; each expert's number of tokens
    assert set(waits["router"]) == {0} and set(waits["block"]) == {mask + experts}
    heads = 2 * 4 * mask  # of the original and the compressed model, a window at a time
    assert set(waits["joint"]) == {3 * (mask + experts) + heads}
