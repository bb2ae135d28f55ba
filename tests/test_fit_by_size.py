"""`fit` for a size, and what `sensitivity` and `plan` refuse: bits and experts by budget on the command line."""

import json
import re
import shutil

import architectures
import jobs
import pytest
from sizes import RECIPE, streamed
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from eacmoe_lightning.budget.rest import Rest
from eacmoe_lightning.budget.target import allocator_of
from eacmoe_lightning.cli import main
from eacmoe_lightning.compressed.format import read_config
from eacmoe_lightning.compressed.loading import load
from eacmoe_lightning.compressed.sizes import stored_parts
from eacmoe_lightning.job.chosen_bits import ChosenBits
from eacmoe_lightning.models.moe import MoEModel

OPTIONS = {"model__block_epochs": 0, "model__joint_epochs": 0, "data__heldout": "[bundled:prose]"}


@pytest.mark.parametrize("size", ["target_bits", "target_gb"])
def test_a_run_has_the_size_that_was_asked_for(size, tiny_model_dir, tmp_path):
    folder = tiny_model_dir("deepseek")
    moe = streamed(folder)
    RECIPE.check(moe)
    wanted = 3.3
    if size == "target_gb":
        allocator = allocator_of(RECIPE, moe, [])
        wanted = (3.3 * allocator.num_weights / 8 + Rest.of(moe, str(folder)).nbytes(moe)) / 1e9
    run = jobs.fit(folder, tmp_path / "run", **OPTIONS, **{f"model__{size}": wanted})
    report = json.loads((run / "report.json").read_text())
    got = report["bits"]["true"]
    if size == "target_gb":
        got = sum(file.stat().st_size for file in (run / "compressed").iterdir()) / 1e9
    assert 0.99 * wanted <= got <= wanted
    chosen = json.loads((run / "allocation.json").read_text())
    assert chosen["bits"] == pytest.approx(report["bits"]["true"], rel=1e-6)
    assert report["allocation"]["predicted"] == pytest.approx(chosen["damage"])
    assert "sensitivity" in report["cost"] and (run / "sensitivity" / "sensitivity.json").exists()
    assert "## Bits chosen by size" in (run / "report.md").read_text() and len(report["allocation"]["curve"]) > 5
    assert "bits chosen for" in (run / "report.html").read_text()
    board = EventAccumulator(str(run / "tensorboard"), size_guidance={"images": 0}).Reload()
    assert {"loss of each weight", "bits chosen by size", "size and divergence"} <= {*board.Tags()["images"]}
    widths = read_config(run / "compressed")["quantization"]["bits"]
    assert len({w for bits in widths.values() for w in (bits if isinstance(bits, list) else [bits])}) > 1


def test_a_job_that_goes_on_keeps_its_widths(tiny_model_dir, tmp_path):
    """Killed while it measures and in the first block; sensitivities of a command give the same as those of the run."""
    model, options = tiny_model_dir("qwen3_moe"), OPTIONS | {"model__target_bits": 3.2}
    places = [["call", "eacmoe_lightning.budget.probes.Probes.advance", 2], ["phase", "0 experts", 1]]
    jobs.attempts(model, tmp_path / "killed", places, options)
    jobs.fit(model, tmp_path / "whole", **options)
    for part in ("blocks", "compressed", "sensitivity"):
        assert jobs.contents(tmp_path / "killed" / part) == jobs.contents(tmp_path / "whole" / part)
    words = jobs.options(model, tmp_path / "given", **options)
    main(["sensitivity", "--output", str(tmp_path / "found"), "--device", "cpu", *jobs.options(model, "none")])
    main(["fit", *words, "--model.sensitivity", str(tmp_path / "found")])
    given, whole = (jobs.contents(tmp_path / name / "compressed") for name in ("given", "whole"))
    assert {n for n in whole if given[n] != whole[n]} == {"README.md"}  # which names the command
    for name in ("heatmap.png", "curve.png", "sensitivity.md", "curve.json"):
        assert (tmp_path / "found" / name).stat().st_size
    stored = (tmp_path / "given" / "sensitivity" / "sensitivity.json").read_bytes()
    assert stored == (tmp_path / "found" / "sensitivity.json").read_bytes()


def test_sensitivities_may_go_while_a_run_needs_them_no_more(tiny_model_dir, tmp_path, capsys, monkeypatch):
    model, found = tiny_model_dir("qwen3_moe"), tmp_path / "found"
    main(["sensitivity", "--output", str(found), "--widths", "2", "4", *jobs.options(model, "none")])
    options = OPTIONS | {"model__target_bits": 3.5, "model__sensitivity": found}
    take = ChosenBits.take

    def take_and_remove(*args) -> bool:
        was_missing = take(*args)
        shutil.rmtree(found)
        return was_missing

    monkeypatch.setattr(ChosenBits, "take", take_and_remove)
    run = jobs.fit(model, tmp_path / "run", **options)
    board = EventAccumulator(str(run / "tensorboard"), size_guidance={"images": 0}).Reload()
    assert "loss of each weight" in board.Tags()["images"]
    with pytest.raises(SystemExit):
        jobs.fit(model, run, **options)
    assert f"{found} (--model.sensitivity) holds no sensitivity.json" in capsys.readouterr().err


def test_experts_and_bits_share_one_size(tiny_model_dir, tmp_path):
    """Below what 2 bits for all experts take; the run keeps the experts that were counted, on the widths chosen."""
    model = tiny_model_dir("qwen3_moe")
    options = OPTIONS | {"model__target_bits": 2.3, "pruning__keep": "auto", "pruning__criterion": "reap"}
    run = jobs.fit(model, tmp_path / "run", **options)
    chosen, report = (json.loads((run / name).read_text()) for name in ("allocation.json", "report.json"))
    assert chosen["kept"] == {number: block["kept"] for number, block in report["pruning"]["blocks"].items()}
    weights = sum(w.numel() for block in streamed(model).blocks for _, w in block.weights().values())
    stored = sum(parts[2] for parts in stored_parts(run / "compressed", MoEModel(load(run, packed=False))).values())
    assert 0.99 * 2.3 <= 8 * stored / weights <= 2.3
    assert report["allocation"]["predicted_by_part"]["pruning"] > 0 and report["pruning"]["removed"] > 0
    given = options | {"pruning__keep": 5, "model__target_bits": 3, "model__sensitivity": run / "sensitivity"}
    fewer = json.loads((jobs.fit(model, tmp_path / "fewer", **given) / "allocation.json").read_text())
    assert {len(numbers) for numbers in fewer["kept"].values()} == {5} and 2.97 < fewer["bits"] <= 3
    plenty = jobs.fit(model, tmp_path / "plenty", **options | {"model__target_bits": 6})
    assert json.loads((plenty / "allocation.json").read_text())["kept"] is None
    assert "pruning" not in json.loads((plenty / "report.json").read_text())


@pytest.mark.parametrize(
    "options, message",
    [
        ({"target_bits": 2}, "target_bits=2.0 .*below.*--model.target_bits 2.75.* or more"),
        ({"target_bits": 9}, "above what the largest widths take: pass --model.target_bits 8.75 or less"),
        ({"target_gb": 1e-6}, "target_gb=1e-06 .*--model.target_gb 0.0"),
        ({"target_bits": 3, "target_gb": 1}, "pass one of them"),
        ({"target_bits": -1}, "target_bits=-1.0 .*not positive"),
        ({"sensitivity": "somewhere"}, "serves a size: pass --model.target_bits or --model.target_gb too"),
        ({"target_bits": 3, "sensitivity": "somewhere"}, "somewhere .--model.sensitivity. holds no sensitivity.json"),
        ({"target_bits": 3, "quantizer": "none"}, "no bits to choose"),
        ({"target_bits": 3, "pruning__alpha": 0.3}, "pass --pruning.keep, a number or auto"),
        ({"target_bits": 3, "pruning__keep": 99}, "keep=99"),
        ({"pruning__keep": "auto"}, "needs a size"),
        ({"target_bits": 3.5, "target": "transformers"}, "comes within 1 %.* below it is --model.target_bits 3.*"),
        (
            {"target_bits": 2.2, "target": "transformers", "pruning__keep": 5},
            "comes within 1 %.* below it is --model.target_bits 2.*",
        ),
        ({"target_bits": 4.6, "target": "vllm", "tensor_parallel": 4}, "--tensor_parallel 4"),
        ({"target_bits": 4.6, "target": "vllm", "group_size": 16}, "groups of 16"),
        ({"target_bits": 4.6, "target": "sglang", "quantizer": "lattice"}, "lattice"),
        (
            {"target_bits": 4.6, "target": "vllm", "overrides": "{1: {experts.3: 7}}"},
            "--model.overrides: experts.3.*of block 1 has 7 bits of its own, but the experts of a block get one width",
        ),
        (
            {"target_bits": 4.6, "target": "vllm", "overrides": "{1: {experts.3: 7, experts.4: 5}}"},
            "of block 1 has 7 bits",
        ),
    ],
)
def test_bad_sizes(options, message, tiny_model_dir, tmp_path, capsys):
    words = {name if "__" in name else f"model__{name}": value for name, value in options.items()}
    if options.get("quantizer") == "none":
        words["pruning__keep"] = 3
    with pytest.raises(SystemExit):
        jobs.fit(tiny_model_dir("qwen3_moe"), tmp_path / "run", **OPTIONS | words)
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "run" / "run.json").exists()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"target": "vllm", "group_size": 16}, "groups of 16, but vllm .*loads 32, 64 or 128"),
        ({"target": "vllm", "tensor_parallel": 4}, "cannot be split for --tensor_parallel 4"),
        ({"target": "vllm", "quantizer": "kquant"}, "is in llama.cpp's blocks"),
        ({"target": "vllm", "overrides": "{1: {experts.0: 7, experts.1: 5}}"}, "of block 1 has 7 bits of its own"),
        ({"target": "transformers", "overrides": "{1: {experts: 4}}"}, "block 1 .* the experts of all blocks get one"),
    ],
)
def test_plan_and_sensitivity_refuse_what_a_target_never_loads(options, message, tiny_model_dir, tmp_path, capsys):
    words = {f"model__{name}": value for name, value in options.items()}
    for command, size in ((["sensitivity", "--output", str(tmp_path / "found")], None), (["plan"], 4.6)):
        given = jobs.options(tiny_model_dir("qwen3_moe"), "none", **words, model__target_bits=size)
        with pytest.raises(SystemExit):
            main([*command, *given])
        assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "found").exists()


def test_no_size_makes_a_target_load_an_architecture(tmp_path, tokenizer, capsys):
    architectures.build("gpt_oss").save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    with pytest.raises(SystemExit):
        jobs.fit(tmp_path / "model", tmp_path / "run", **OPTIONS, model__target="vllm", model__target_bits=3.3)
    assert "keeps the experts of a block in one tensor" in capsys.readouterr().err
    assert not (tmp_path / "run" / "run.json").exists()


def test_sensitivities_of_something_else_are_refused(tiny_model_dir, tmp_path, capsys):
    model = tiny_model_dir("qwen3_moe")
    found = tmp_path / "found"
    main(["sensitivity", "--output", str(found), "--widths", "2", "4", *jobs.options(model, "none")])
    given = {**OPTIONS, "model__target_bits": 4, "model__sensitivity": found}
    for other, more, message in (
        ("qwen2_moe", {}, "sensitivities of another model"),
        ("qwen3_moe", {"model__group_size": 16}, "measured with model.group_size=32.*this run has 16"),
        ("qwen3_moe", {"pruning__keep": "auto"}, "by reap, and.*by frequency: pass --pruning.criterion reap, or"),
    ):
        with pytest.raises(SystemExit):
            jobs.fit(tiny_model_dir(other), tmp_path / "run", **given | more)
        assert re.search(message, capsys.readouterr().err)
    with pytest.raises(SystemExit):
        main(["sensitivity", "--output", "unused", *jobs.options(model, "none"), "--pruning.criterion", "frequency"])
    assert "chooses no experts by itself: pass --pruning.keep as well" in capsys.readouterr().err
    for other, more, message in (
        ("qwen3_moe", {"model__dtype": "bfloat16"}, "model.dtype was 'float32' and is now 'bfloat16'"),
        (
            "qwen3_moe",
            {"data__calibration": "bundled:german"},
            "data.calibration was 'bundled.* and is now 'bundled:german'",
        ),
        ("qwen2_moe", {}, "model.name_or_path was '.*qwen3_moe' and is now '.*qwen2_moe', which holds something else"),
    ):
        words = jobs.options(tiny_model_dir(other), "none", **more)
        with pytest.raises(SystemExit):
            main(["sensitivity", "--output", str(found), "--widths", "2", "4", *words])
        assert re.search(message, capsys.readouterr().err)
    unfinished = tmp_path / "unfinished"
    shutil.copytree(found, unfinished)
    (unfinished / "sensitivity.json").unlink()
    with pytest.raises(SystemExit):
        jobs.fit(model, tmp_path / "run", **given | {"model__sensitivity": unfinished})
    assert "the measurement is not finished" in capsys.readouterr().err
    main(["plan", *jobs.options(model, tmp_path / "run", **given), "--available.memory", "1e12"])
    out = capsys.readouterr().out
    assert "predicted KL divergence" in out and "experts: " in out and "attention: " in out


@pytest.mark.parametrize(
    "options", [{"target": "llama.cpp", "target_bits": 4.947}, {"quantizer": "lattice", "target_bits": 2.3}]
)
def test_other_grids_have_the_size_too(options, tiny_model_dir, tmp_path):
    """llama.cpp's blocks, whose types have sizes of their own, and a lattice, which has any rate."""
    words = {f"model__{name}": value for name, value in options.items()}
    run = jobs.fit(tiny_model_dir("qwen3_moe"), tmp_path / "run", **OPTIONS, **words)
    report = json.loads((run / "report.json").read_text())
    assert 0.99 * options["target_bits"] <= report["bits"]["true"] <= options["target_bits"] * 1.0001
