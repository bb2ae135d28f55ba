"""Bad input ends with exit code 1 or 2 and one message that names the option, and existing files stay as they are."""

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import jobs
import pytest
import torch
from lightning.pytorch import Callback
from safetensors.torch import load_file, save_file
from transformers.models.mixtral.modeling_mixtral import MixtralAttention

from eacmoe_lightning import load
from eacmoe_lightning.cli import main
from eacmoe_lightning.run.files import StoreError
from eacmoe_lightning.run.lock import RunLock

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:LightningCLI's args", "ignore:.*deprecated")]
DEEPSEEK = {"model__router_method": "ridge", "model__block_epochs": 0, "model__joint_epochs": 1}


@pytest.fixture
def refused(capsys) -> Callable[..., str]:
    """Runs a command that must fail and returns its error message."""

    def run(*words: str, stage: str = "fit") -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main([stage, *words])
        error = capsys.readouterr().err
        assert end.value.code in (1, 2) and "error: " in error and "Traceback" not in error
        return error

    return run


@pytest.fixture
def finished(fitted) -> Path:
    """A finished run of the deepseek model (one dense block, two MoE blocks), for tests to copy."""
    return fitted("deepseek", **DEEPSEEK)


@pytest.fixture
def copied(finished, tmp_path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


# --- refused before anything is computed or written


@pytest.mark.parametrize(
    "words, option",
    [
        (["--model.name_or_path", "elsewhere", "--config", "tiny"], "--model.name_or_path"),
        (["--data.calibration.text", "mine.txt", "--config", "tiny"], "--data.calibration"),
        (["--config", "tiny", "--model.bits", "4", "--config", "tiny-2.06"], "--model.bits"),
    ],
)
def test_options_before_a_config_that_sets_them_again(refused, words, option):
    error = refused(*words, "--print_config")
    assert (
        f"{option} stands before --config {words[-1]}, which sets it again" in error and "put --config before" in error
    )


def test_options_around_configs(capsys):
    words = ["--trainer.max_steps", "4", "--config", "tiny", "--model.bits", "2", "--config", "tiny-2.06"]
    with pytest.raises(SystemExit) as end:
        main(["fit", *words, "--print_config"])
    assert end.value.code == 0 and "max_steps: 4" in capsys.readouterr().out


@pytest.mark.parametrize(
    "option, value, messages",
    [
        ("model.bits", "1", ["bits=1 (--model.bits)"]),
        ("model.bits", "9", ["bits=9 (--model.bits)"]),
        ("model.bits", "[3,1]", ["bits=1 (--model.bits)"]),
        ("model.bits", "[]", ["--model.bits"]),
        ("model.bits", "three", ["model.bits"]),
        ("model.shared_expert_bits", "1", ["--model.shared_expert_bits"]),
        ("model.bit", "3", ["model.bit"]),  # no abbreviations
        ("model.bitz", "3", ["model.bitz"]),
        ("trainer.max_epoch", "3", ["trainer.max_epoch"]),
        ("model.group_size", "48", ["in_features=64", "group_size=48 (--model.group_size)"]),
        ("model.overrides", "{9: {experts: 4}}", ["block 9", "--model.overrides"]),
        ("model.router_loss", "eacmoe_lightning.router_loss.Nothing", ["router_loss"]),
        ("model.router_epochs", "0", ["router_epochs=0 (--model.router_epochs)"]),
        ("model.router_method", "magic", ["model.router_method"]),
        ("model.name_or_path", "/no/such/model", ["'/no/such/model'", "--model.name_or_path"]),
        ("data.calibration", "bundled:nothing", ["'nothing'", "--data.calibration", "bundled:prose"]),
        ("data.calibration", "/no/such/text.txt", ["/no/such/text.txt", "--data.calibration"]),
        ("data.heldout", "[/no/such/text.txt]", ["/no/such/text.txt", "--data.heldout"]),
        ("data.num_windows", "1000000", ["1000000", "--data.num_windows"]),
        ("data.batch_size", "0", ["--data.batch_size"]),
        ("data.window_length", "1", ["--data.window_length=1 must be at least 2"]),  # the first token has no prediction
        ("model.joint_selection", "-1", ["joint_selection=-1.0 (--model.joint_selection) is negative"]),
        ("model.weight_decay", "-1", ["weight_decay=-1.0 (--model.weight_decay) is negative"]),
        ("model.evaluate", "/no/such/run", ["--model.evaluate /no/such/run does not suit fit", "validate"]),
        ("data.column", "story", ["--data.column=story is a column of tables", "--data.calibration"]),
        ("pruning.criterion", "reap", ["(--pruning.criterion) removes nothing by itself", "--pruning.keep"]),
        ("model.tensor_parallel", "0", ["tensor_parallel=0 (--model.tensor_parallel) is below 1"]),
        ("model.tensor_parallel", "2", ["tensor_parallel=2 (--model.tensor_parallel)", "pass --model.target"]),
        ("trainer.default_root_dir", __file__, ["--trainer.default_root_dir", "a file is in its place"]),
        ("trainer.default_root_dir", f"{__file__}/run", ["--trainer.default_root_dir", "a file is in its place"]),
        ("trainer.fast_dev_run", "true", ["--trainer.fast_dev_run", "--data.num_windows 8"]),
        ("trainer.overfit_batches", "1", ["--trainer.overfit_batches", "--data.num_windows"]),
        ("trainer.max_epochs", "0", ["--trainer.max_epochs 0", "leave it out"]),
        ("trainer.max_steps", "10", ["--trainer.max_steps 10", "--trainer.max_epochs"]),
        ("trainer.max_time", "00:00:10:00", ["--trainer.max_time", "SIGTERM", "--ckpt_path auto"]),
        ("trainer.limit_train_batches", "0", ["--trainer.limit_train_batches 0"]),
        ("trainer.devices", "[0,1]", ["(--trainer.*)", "`devices` selected with `CPUAccelerator`"]),
        ("trainer.devices", "0", ["(--trainer.*)", "devices='0'"]),
        ("trainer.accumulate_grad_batches", "0", ["--trainer.accumulate_grad_batches 0", "1 or more"]),
        ("trainer.accumulate_grad_batches", "-2", ["--trainer.accumulate_grad_batches -2", "1 or more"]),
        ("trainer.gradient_clip_val", "-1", ["--trainer.gradient_clip_val -1", "0 or more"]),
        ("trainer.gradient_clip_val", ".nan", ["--trainer.gradient_clip_val nan"]),
        ("seed_everything", "-1", ["--seed_everything -1", "from 0 to 4294967295"]),
        ("seed_everything", "99999999999", ["--seed_everything 99999999999", "from 0 to 4294967295"]),
        ("data.seed", "99999999999999999999", ["--data.seed=99999999999999999999 must be from -2^63 to 2^63 - 1"]),
        ("trainer.precision", "transformer-engine", ["(--trainer.*)", "transformer_engine"]),
        ("trainer.precision", "16-true", ["--trainer.precision 16-true", "--model.dtype"]),
        ("trainer.num_sanity_val_steps", "2", ["--trainer.num_sanity_val_steps 2", "validate"]),
        ("trainer.check_val_every_n_epoch", "1", ["--trainer.check_val_every_n_epoch 1", "validate"]),
        ("trainer.val_check_interval", "0.5", ["--trainer.val_check_interval 0.5", "validate"]),
        ("trainer.accelerator", "tpu", ["--trainer.accelerator tpu: torch finds none", "it can be auto, "]),
        ("trainer.accelerator", "npu", ["--trainer.accelerator npu: there is no such accelerator", "cuda"]),
        ("trainer.strategy", "ddp", ["DDPStrategy", "ddp_find_unused_parameters_true"]),
        ("ckpt_path", __file__, ["is not a checkpoint", "--ckpt_path", "auto"]),
        ("trainer.enable_checkpointing", "false", ["enable_checkpointing=False"]),
        ("trainer.barebones", "true", ["barebones=True"]),
        ("trainer.default_root_dir", "s3://bucket/run", ["--trainer.default_root_dir s3://bucket/run"]),
        ("checkpoint.save_weights_only", "true", ["--checkpoint.save_weights_only", "last.ckpt"]),
        ("checkpoint.save_top_k", "0", ["--checkpoint.save_top_k", "last.ckpt"]),
        ("checkpoint.filename", "best", ["--checkpoint.filename", "last.ckpt"]),
        ("checkpoint.save_on_exception", "true", ["--checkpoint.save_on_exception"]),
        (
            "trainer.callbacks",
            '[{"class_path": "EarlyStopping", "init_args": {"monitor": "loss/joint"}}]',
            ["EarlyStopping", "--trainer.max_epochs"],
        ),
    ],
)
def test_bad_options(option, value, messages, refused, tiny_model_dir, tmp_path):
    words = jobs.options(tiny_model_dir("mixtral"), tmp_path / "run", **{option.replace(".", "__"): value})
    error = refused(*words)
    assert all(message in error for message in messages), error
    assert not (tmp_path / "run" / "run.json").exists() and not (tmp_path / "run" / "blocks").exists()
    # the corrected command may use the same directory
    assert {p.name for p in (tmp_path / "run").glob("*")} <= {"tensorboard", "checkpoints"}


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_an_evaluation_takes_no_checkpoint_and_no_partial_batches(stage, refused, tiny_model_dir, copied):
    words = jobs.options(tiny_model_dir("deepseek"), copied)
    for checkpoint in ("last", "best", str(copied / "checkpoints" / "last.ckpt")):
        error = refused(*words, "--ckpt_path", checkpoint, stage=stage)
        assert f"{stage} has no use for --ckpt_path {checkpoint}" in error and "--model.evaluate" in error
    assert "--trainer.fast_dev_run" in refused(*words, "--trainer.fast_dev_run", "true", stage=stage)
    limit = {"validate": "val"}.get(stage, stage)
    assert "nothing would be evaluated" in refused(*words, f"--trainer.limit_{limit}_batches", "0", stage=stage)


@pytest.mark.parametrize("command", ["plan", "sensitivity", "analyze", "prune", "study"])
def test_a_device_that_is_not_there(command, refused, tiny_model_dir, tmp_path):
    folder = tiny_model_dir("mixtral")
    words = {
        "plan": jobs.options(folder, tmp_path / "run"),
        "sensitivity": [*jobs.options(folder, tmp_path / "run"), "--output", str(tmp_path / "out")],
        "prune": ["--model", str(folder), "--output", str(tmp_path / "out"), "--pruning.keep", "4"],
    }.get(command, ["--model", str(folder), "--output", str(tmp_path / "out")])
    error = refused(*words, "--device", "cuda:77", stage=command)
    assert "--device cuda:77 is no device of this machine: pass cpu" in error
    assert not list(tmp_path.iterdir())


class StopInEpoch(Callback):
    """A user's callback that ends the training in the middle of an epoch."""

    def on_train_batch_end(self, trainer, *_) -> None:
        trainer.should_stop = True


def test_half_an_epoch_is_not_taken_for_a_whole_one(refused, tiny_model_dir, finished, tmp_path):
    words = jobs.options(tiny_model_dir("deepseek"), tmp_path / "run", **DEEPSEEK)
    callback = ["--trainer.callbacks", '[{"class_path": "test_bad_input.StopInEpoch"}]']
    assert "after 1 of 2 batches" in refused(*words, *callback)
    main(["fit", *words, "--ckpt_path", "auto", "--trainer.max_epochs", "1000"])  # more than there are
    assert jobs.contents(tmp_path / "run" / "compressed") == jobs.contents(finished / "compressed")


def test_a_router_loss_with_too_large_a_k(refused, tiny_model_dir, tmp_path):
    loss = {"model__router_loss": "TopKMSE", "model__router_loss__k": 9}
    error = refused(*jobs.options(tiny_model_dir("mixtral"), tmp_path / "run", **loss))
    assert "k=9 (--model.router_loss.init_args.k)" in error and "num_experts=8" in error


@pytest.mark.parametrize(
    "loss, option, value",
    [("SelectionHinge", "margin", "-1"), ("SelectionHinge", "margin", ".nan"), ("SelectionKL", "temperature", "0")],
)
def test_a_router_loss_with_a_senseless_number(loss, option, value, refused, tiny_model_dir, tmp_path):
    more = {"model__router_loss": loss, f"model__router_loss__{option}": value}
    error = refused(*jobs.options(tiny_model_dir("mixtral"), tmp_path / "run", **more))
    assert f"--model.router_loss.{option}" in error and "is not a finite number" in error


def test_routers_that_no_stage_would_calibrate(refused, tiny_model_dir, tmp_path):
    more = {"model__router_method": "joint", "model__joint_epochs": 0, "model__block_epochs": 0}
    error = refused(*jobs.options(tiny_model_dir("mixtral"), tmp_path / "run", **more))
    assert all(option in error for option in ("--model.router_method", "--model.joint_epochs", "--model.block_epochs"))
    assert not (tmp_path / "run").exists()


def test_a_text_shorter_than_a_window(refused, tiny_model_dir, tmp_path):
    (tmp_path / "short.txt").write_text("A few words only.")
    error = refused(
        *jobs.options(tiny_model_dir("mixtral"), tmp_path / "run", data__calibration=tmp_path / "short.txt")
    )
    assert "--data.calibration" in error and "one window needs 64 (--data.window_length)" in error


def test_a_dense_model(refused, tiny_model_dir, tmp_path):
    error = refused(*jobs.options(tiny_model_dir("llama"), tmp_path / "run"))
    assert "'llama' has no routed experts in any of its 3 blocks" in error and "--model.name_or_path" in error


@pytest.mark.parametrize("name", ["model.layers.1.mlp.experts.5.down_proj.weight", "model.embed_tokens.weight"])
def test_a_model_with_nan_weights(name, refused, tiny_model_dir, tmp_path):
    folder = Path(shutil.copytree(tiny_model_dir("deepseek"), tmp_path / "model"))
    weights = load_file(folder / "model.safetensors")
    weights[name].view(-1)[3] = float("nan")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    error = refused(*jobs.options(folder, tmp_path / "run"))
    assert "holds NaN or infinite values" in error and ".".join(name.split(".")[:3]) in error


def scaled(model: Path, copy: Path, block: int, factors: dict[str, float]) -> Path:
    """A copy of a model, stored in bfloat16, with tensors of one block multiplied by factors, by the ends of names."""
    shutil.copytree(model, copy)
    weights = load_file(copy / "model.safetensors")
    for name, tensor in weights.items():
        factor = next((f for end, f in factors.items() if f"layers.{block}." in name and name.endswith(end)), 1)
        weights[name] = (tensor * factor).bfloat16()
    save_file(weights, copy / "model.safetensors", {"format": "pt"})
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    return copy


@pytest.mark.parametrize("block", [0, 1, 2])
def test_activations_beyond_float16_are_named_with_the_block_and_the_option(block, refused, tiny_model_dir, tmp_path):
    factors = {"w1.weight": 12, "w2.weight": 10000, "w3.weight": 12}
    model = scaled(tiny_model_dir("mixtral"), tmp_path / "model", block, factors)
    error = refused(*jobs.options(model, tmp_path / "run", model__dtype="float16", model__joint_epochs=0))
    assert f"model.layers.{block} (block {block}): its output with the original's weights is beyond float16" in error
    assert "--model.dtype bfloat16" in error


def test_an_overflow_before_a_solver_and_one_after_the_last_block_are_named(refused, tiny_model_dir, tmp_path):
    """The head of a model, and a linear that reads what only borrowed tokens bring."""
    options = {"model__dtype": "float16", "model__joint_epochs": 0, "data__num_windows": 4}
    for name, factor in (("lm_head.weight", 3e4), ("model.norm.weight", 3e4)):
        model = Path(shutil.copytree(tiny_model_dir("mixtral"), tmp_path / name))
        weights = load_file(model / "model.safetensors")
        weights[name] = weights[name] * factor
        save_file(weights, model / "model.safetensors", {"format": "pt"})
        error = refused(*jobs.options(model, tmp_path / f"{name}-run", **options))
        assert "final norm" in error and "head" in error and "--model.dtype bfloat16" in error and "bug" not in error
        error = refused(*jobs.options(model, tmp_path / f"{name}-joint", **options | {"model__joint_epochs": 1}))
        assert "--model.dtype bfloat16" in error and "bug" not in error


def test_a_weight_beyond_float16_is_not_taken_for_a_damaged_checkpoint(refused, tiny_model_dir, tmp_path):
    model = scaled(tiny_model_dir("mixtral"), tmp_path / "model", 1, {"experts.3.w2.weight": 1e7})
    error = refused(*jobs.options(model, tmp_path / "run", model__dtype="float16"))
    assert (
        "model.layers.1." in error and "but float16 ends at 65504 (--model.dtype)" in error and "damaged" not in error
    )


# --- the run directory


def test_a_directory_of_other_files(refused, tiny_model_dir, tmp_path):
    (tmp_path / "thesis.tex").write_text("all there is")
    assert "thesis.tex" in refused(*jobs.options(tiny_model_dir("mixtral"), tmp_path))
    assert (tmp_path / "thesis.tex").read_text() == "all there is"


def test_resuming_without_a_run(refused, tiny_model_dir, tmp_path):
    error = refused(*jobs.options(tiny_model_dir("mixtral"), tmp_path / "run"), "--ckpt_path", "last")
    assert "there is no run to continue" in error and "--trainer.default_root_dir" in error


def test_a_run_that_exists_already(refused, tiny_model_dir, copied):
    before = jobs.contents(copied)
    assert "already holds this run: add --ckpt_path auto" in refused(
        *jobs.options(tiny_model_dir("deepseek"), copied, **DEEPSEEK)
    )
    assert before.items() <= jobs.contents(copied).items()


@pytest.mark.parametrize("resume", [[], ["--ckpt_path", "last"]])
def test_a_run_of_other_settings(resume, refused, tiny_model_dir, copied):
    before = jobs.contents(copied)
    error = refused(*jobs.options(tiny_model_dir("deepseek"), copied, **DEEPSEEK, model__bits=2), *resume)
    assert "model.bits was [3] and is now [2]" in error and "--trainer.default_root_dir" in error
    assert before.items() <= jobs.contents(copied).items()  # "Nothing was changed"


@pytest.mark.parametrize("resume", [[], ["--ckpt_path", "last"], ["--ckpt_path", "auto"]])
def test_a_second_start_beside_a_job_at_work(resume, refused, tiny_model_dir, copied):
    before = jobs.contents(copied)
    with RunLock(copied):
        error = refused(*jobs.options(tiny_model_dir("deepseek"), copied, **DEEPSEEK), *resume)
    assert f"process {os.getpid()} on " in error and "is at work in" in error and "default_root_dir" in error
    assert before.items() <= jobs.contents(copied).items()


@pytest.mark.parametrize("resume", ["last", "auto"])
def test_a_text_that_was_edited_since(resume, refused, tiny_model_dir, tmp_path):
    text = tmp_path / "text.txt"
    words = "\n".join(f"{i} {i * i}" for i in range(3000))
    text.write_text(words)
    options = {**DEEPSEEK, "data__calibration": text}
    run = jobs.fit(tiny_model_dir("deepseek"), tmp_path / "run", **options, trainer__max_epochs=1)
    before = jobs.contents(run / "blocks")
    text.write_text(words.replace("1", "2"))
    resumed = [*jobs.options(tiny_model_dir("deepseek"), run, **options), "--ckpt_path", resume]
    error = refused(*resumed)
    assert f"the text of {text} (--data.calibration) or its tokens (the model's tokenizer) have changed" in error
    assert jobs.contents(run / "blocks") == before
    moved = text.rename(tmp_path / "moved.txt")
    moved.write_text(words)  # the same text elsewhere
    main(["fit", *resumed, "--data.calibration", str(moved)])
    assert (run / "report.md").exists()


def test_one_batch_is_not_taken_for_all_of_them(refused, tiny_model_dir, tmp_path):
    run = jobs.fit(tiny_model_dir("deepseek"), tmp_path / "run", **DEEPSEEK, trainer__max_epochs=1)
    words = [*jobs.options(tiny_model_dir("deepseek"), run, **DEEPSEEK), "--ckpt_path", "auto"]
    error = refused(*words, "--trainer.limit_train_batches", "1")
    assert 'trainer.limit_train_batches was 1.0 and is now "1 of an epoch\'s batches"' in error
    main(["fit", *words, "--trainer.limit_train_batches", "1.0"])


def test_a_tokenizer_that_was_changed_since(refused, tiny_model_dir, tmp_path):
    model = Path(shutil.copytree(tiny_model_dir("deepseek"), tmp_path / "model"))
    run = jobs.fit(model, tmp_path / "run", **DEEPSEEK, trainer__max_epochs=1)
    stored = json.loads((model / "tokenizer.json").read_text())
    stored["model"]["merges"] = stored["model"]["merges"][:-1500]
    (model / "tokenizer.json").write_text(json.dumps(stored))
    error = refused(*jobs.options(model, run, **DEEPSEEK), "--ckpt_path", "auto")
    assert "its tokens (the model's tokenizer) have changed" in error


@pytest.mark.parametrize("change", ["ids", "merges", "words"])
def test_a_finished_run_is_not_evaluated_with_another_tokenizer(change, refused, fitted, tiny_model_dir, tmp_path):
    run = fitted("deepseek", **DEEPSEEK)
    model = Path(shutil.copytree(tiny_model_dir("deepseek"), tmp_path / "model"))
    stored = json.loads((model / "tokenizer.json").read_text())
    words, message = stored["model"]["vocab"], "it cuts text into other tokens"
    if change == "ids":
        words["e"], words["t"], message = words["t"], words["e"], f"has the id {words['t']} there"
    elif change == "merges":
        stored["model"]["merges"] = stored["model"]["merges"][:-1500]
    else:
        stored["added_tokens"].append({**stored["added_tokens"][0], "id": len(words) - 1, "content": "the"})
    (model / "tokenizer.json").write_text(json.dumps(stored))
    for stage in ("validate", "test"):
        error = refused(*jobs.options(model, run), stage=stage)
        assert "the original's tokenizer (--model.name_or_path) is not the one that" in error and message in error
    main(["validate", *jobs.options(None, run)])


def rounded(model: Path, name: str) -> None:
    """Changes one tensor of a model a little, under the same path."""
    weights = load_file(model / "model.safetensors")
    weights[name] = weights[name].bfloat16().float()
    save_file(weights, model / "model.safetensors", {"format": "pt"})


def test_an_original_whose_weights_were_replaced(refused, tiny_model_dir, tmp_path, monkeypatch):
    """Named by each command that would use it; the right one elsewhere is accepted, also by a relative path."""
    model = Path(shutil.copytree(tiny_model_dir("deepseek"), tmp_path / "model"))
    monkeypatch.chdir(tmp_path)
    run = tmp_path / jobs.fit("model", "run", **DEEPSEEK, trainer__max_epochs=2)
    rounded(model, "model.layers.1.mlp.experts.4.up_proj.weight")
    error = refused(*jobs.options("model", "run", **DEEPSEEK), "--ckpt_path", "auto")
    assert f"the weights or the config.json in {model} (--model.name_or_path) have changed" in error
    shutil.rmtree(model)
    shutil.copytree(tiny_model_dir("deepseek"), model)
    monkeypatch.chdir(tmp_path / "run")  # as resumed from another working directory
    config = ["--config", "tensorboard/config.yaml", "--trainer.max_epochs", "-1"]
    main(["fit", *config, "--ckpt_path", "auto"])
    main(["validate", "--config", "tensorboard/config.yaml"])
    main(["validate", *jobs.options(None, run)])  # the original that the run names
    rounded(model, "model.embed_tokens.weight")
    for words in (jobs.options(None, run), jobs.options(model, run)):
        for stage in ("validate", "test"):
            error = refused(*words, stage=stage)
            assert f"{model} is not the original that {run} " in error, error
            assert "--model.name_or_path" in error
    other = tiny_model_dir("deepseek")
    main(["validate", *jobs.options(other, run)])


@pytest.mark.filterwarnings("error:The dirpath has changed")  # a moved run must not cause this warning
def test_a_finished_run_continues_to_the_same_result(tiny_model_dir, copied):
    before = jobs.contents(copied / "compressed")
    shutil.rmtree(copied / "compressed")
    jobs.fit(tiny_model_dir("deepseek"), copied, "--ckpt_path", "last", **DEEPSEEK)
    assert jobs.contents(copied / "compressed") == before


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_evaluating_a_run_that_is_missing_or_unfinished(stage, refused, tiny_model_dir, copied, tmp_path):
    words = jobs.options(tiny_model_dir("deepseek"), tmp_path / "none")
    assert "there is no run in" in refused(*words, stage=stage)
    shutil.rmtree(copied / "compressed")
    words = jobs.options(tiny_model_dir("deepseek"), copied)
    assert "no compressed model yet: finish it with `fit --ckpt_path auto`" in refused(*words, stage=stage)


# --- damaged files


def damage(path: Path, kind: str) -> None:
    content = bytearray(path.read_bytes())
    if kind == "truncated":
        del content[len(content) // 2 :]
    else:
        content[len(content) // 2] ^= 4
    path.write_bytes(content)


@pytest.fixture
def stopped(fitted) -> Path:
    """The same run, stopped after two of its three blocks, for tests to copy."""
    return fitted("deepseek", **DEEPSEEK, trainer__max_epochs=2)


DAMAGED = [
    ("truncated", "blocks/block_000.safetensors"),
    ("flipped", "blocks/block_001.safetensors"),
    ("flipped", "streams/**/block_002.x_hat"),
]


@pytest.mark.parametrize("kind, pattern", DAMAGED)
def test_damage_is_named_and_computed_again_once_deleted(
    kind, pattern, refused, tiny_model_dir, stopped, finished, tmp_path
):
    run = Path(shutil.copytree(stopped, tmp_path / "run"))
    (path,) = run.glob(pattern)
    damage(path, kind)
    words = [*jobs.options(tiny_model_dir("deepseek"), run, **DEEPSEEK), "--ckpt_path", "last"]
    error = refused(*words)
    assert str(path) in error and "delete this file and continue with --ckpt_path auto" in error
    path.unlink()
    main(["fit", *words])
    for part in ("blocks", "compressed"):
        assert jobs.contents(run / part) == jobs.contents(finished / part)


def test_what_the_check_of_the_model_found_is_found_again(tiny_model_dir, tmp_path, caplog, monkeypatch):
    """It is the layers that stay unquantized: here one whose weight the model's code reads."""
    forward = MixtralAttention.forward

    def reads(self, *args, **kwargs):
        out, *others = forward(self, *args, **kwargs)
        return out + 0 * self.q_proj.weight.sum(), *others

    monkeypatch.setattr(MixtralAttention, "forward", reads)
    model, options = tiny_model_dir("mixtral"), {"model__block_epochs": 0, "model__joint_epochs": 0}
    whole = jobs.fit(model, tmp_path / "whole", **options)
    stopped = jobs.fit(model, tmp_path / "stopped", **options, trainer__max_epochs=2)
    found = json.loads((stopped / "unquantized.json").read_text())
    assert list(found) == [f"model.layers.{index}.self_attn.q_proj.weight" for index in range(3)]
    for content in ("{", "", None):
        run = Path(shutil.copytree(stopped, tmp_path / "run"))
        (run / "unquantized.json").unlink()
        if content is not None:
            (run / "unquantized.json").write_text(content)
        caplog.clear()
        jobs.fit(model, run, "--ckpt_path", "auto", **options)
        assert re.search(
            "unquantized.json is missing, truncated or corrupt .*: the model is checked again", caplog.text
        )
        assert json.loads((run / "unquantized.json").read_text()) == found
        for part in ("blocks", "compressed"):
            assert jobs.contents(run / part) == jobs.contents(whole / part)
        shutil.rmtree(run)


def test_a_trained_block_that_is_gone_is_named(refused, tiny_model_dir, tmp_path):
    run, options = tmp_path / "run", DEEPSEEK | {"model__block_epochs": 1}
    jobs.fit(tiny_model_dir("deepseek"), run, **options, trainer__max_epochs=4)  # two of three blocks
    (run / "blocks" / "block_000.safetensors").unlink()
    words = [*jobs.options(tiny_model_dir("deepseek"), run, **options), "--ckpt_path", "auto"]
    error = refused(*words)
    assert "block_000.safetensors is missing" in error and f"delete {run / 'checkpoints'} and continue" in error
    shutil.rmtree(run / "checkpoints")
    main(["fit", *words])
    assert (run / "report.json").exists()


@pytest.mark.parametrize("kind", ["truncated", "flipped"])
def test_a_damaged_checkpoint(kind, refused, tiny_model_dir, stopped, finished, tmp_path):
    run = Path(shutil.copytree(stopped, tmp_path / "run"))
    path = run / "checkpoints" / "last.ckpt"
    words = [*jobs.options(tiny_model_dir("deepseek"), run, **DEEPSEEK), "--ckpt_path", "auto"]
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2] if kind == "truncated" else b"\0" * 64 + content[64:])
    error = refused(*words)
    assert f"{path} is truncated or corrupt" in error and "delete this file and continue with --ckpt_path auto" in error
    path.unlink()
    main(["fit", *words])
    assert jobs.contents(run / "compressed") == jobs.contents(finished / "compressed")


def test_a_checkpoint_of_another_job(refused, tiny_model_dir, stopped, tmp_path):
    run = Path(shutil.copytree(stopped, tmp_path / "run"))
    words = jobs.options(tiny_model_dir("deepseek"), run, **DEEPSEEK)
    torch.save({"state_dict": {"layer.weight": torch.zeros(3)}}, tmp_path / "other.ckpt")
    other = {**torch.load(run / "checkpoints" / "last.ckpt", weights_only=False)}
    other["state_dict"] = {name: torch.zeros(2) for name in other["state_dict"]}
    torch.save(other, tmp_path / "shapes.ckpt")
    for path in (tmp_path / "other.ckpt", tmp_path / "shapes.ckpt"):
        assert f"{path} (--ckpt_path) is not a checkpoint of this run" in refused(*words, "--ckpt_path", str(path))
    assert "none.ckpt" in refused(*words, "--ckpt_path", str(tmp_path / "none.ckpt"))


def test_a_damaged_block_of_a_finished_run(refused, tiny_model_dir, copied):
    before = jobs.contents(copied / "compressed")
    path = copied / "blocks" / "block_001.safetensors"
    damage(path, "truncated")
    words = [*jobs.options(tiny_model_dir("deepseek"), copied, **DEEPSEEK), "--ckpt_path", "last"]
    assert str(path) in refused(*words)
    assert jobs.contents(copied / "compressed") == before
    path.unlink()
    main(["fit", *words])
    assert jobs.contents(copied / "compressed") == before


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "weights.safetensors.index.json"])
def test_damaged_options_of_a_compressed_directory_are_named(name, refused, tiny_model_dir, copied):
    path = copied / "compressed" / name
    path.write_text("{")
    with pytest.raises(StoreError, match=re.escape(f"{path} is missing, truncated or corrupt")):
        for packed in (True, False):
            load(copied, packed=packed)
    if name == "config.json":
        options = jobs.options(tiny_model_dir("deepseek"), copied)
        assert str(path) in refused(*options, stage="validate")
        assert str(path) in refused(
            "--source", str(copied), "--output", str(copied / "out"), "--format", "dense", stage="export"
        )


@pytest.mark.parametrize("content", ["{", "[]"])
def test_damaged_files_of_options_of_a_run_are_named(content, refused, tiny_model_dir, copied):
    words = [*jobs.options(tiny_model_dir("deepseek"), copied, **DEEPSEEK), "--ckpt_path", "auto"]
    (copied / "run.json").write_text(content)
    assert str(copied / "run.json") in refused(*words)
    (copied / "report.json").write_text(content)
    assert str(copied / "report.json") in refused(str(copied), stage="report")


def test_a_result_is_no_original(refused, tiny_model_dir, copied, tmp_path):
    for folder, message in (
        (copied, "is a run directory: pass the original"),
        (copied / "compressed", f"compressed model of this package: pass its original, '{tiny_model_dir('deepseek')}'"),
    ):
        assert message in refused(*jobs.options(folder, tmp_path / "new"))


def test_a_damaged_compressed_file(refused, tiny_model_dir, copied):
    path = copied / "compressed" / "weights-block-001.safetensors"
    damage(path, "flipped")
    assert str(path) in refused(*jobs.options(tiny_model_dir("deepseek"), copied), stage="test")
