"""Bad input ends with exit code 1 or 2 and one message that names the option, and existing files stay as they are."""

import shutil
from collections.abc import Callable
from pathlib import Path

import jobs
import pytest
from safetensors.torch import load_file, save_file

from eacmoe_lightning.cli import main

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:LightningCLI's args", "ignore:.*deprecated")]
DEEPSEEK = {"model__router_method": "ridge", "model__joint_epochs": 1}


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


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_model_dir) -> Path:
    """A finished run of the deepseek model (one dense block, two MoE blocks), for tests to copy."""
    return jobs.fit(tiny_model_dir("deepseek"), tmp_path_factory.mktemp("finished") / "run", **DEEPSEEK)


@pytest.fixture
def copied(finished, tmp_path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


# --- refused before anything is computed or written


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
    ],
)
def test_bad_options(option, value, messages, refused, tiny_model_dir, tmp_path):
    words = jobs.options(tiny_model_dir("mixtral"), tmp_path / "run", **{option.replace(".", "__"): value})
    error = refused(*words)
    assert all(message in error for message in messages), error
    assert not (tmp_path / "run" / "run.json").exists() and not (tmp_path / "run" / "blocks").exists()
    # the corrected command may use the same directory
    assert {p.name for p in (tmp_path / "run").glob("*")} <= {"tensorboard", "checkpoints"}


def test_a_router_loss_with_too_large_a_k(refused, tiny_model_dir, tmp_path):
    loss = {"model__router_loss": "TopKMSE", "model__router_loss__k": 9}
    error = refused(*jobs.options(tiny_model_dir("mixtral"), tmp_path / "run", **loss))
    assert "k=9 (--model.router_loss.init_args.k)" in error and "num_experts=8" in error


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


@pytest.fixture(scope="module")
def stopped(tmp_path_factory, tiny_model_dir) -> Path:
    """The same run, stopped after two of its three blocks, for tests to copy."""
    run = tmp_path_factory.mktemp("stopped") / "run"
    return jobs.fit(tiny_model_dir("deepseek"), run, **DEEPSEEK, trainer__max_epochs=2)


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


def test_a_damaged_compressed_file(refused, tiny_model_dir, copied):
    path = copied / "compressed" / "weights-block-001.safetensors"
    damage(path, "flipped")
    assert str(path) in refused(*jobs.options(tiny_model_dir("deepseek"), copied), stage="test")
