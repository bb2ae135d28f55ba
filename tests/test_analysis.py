"""Selection analysis: its measures by hand, and the command on a tiny model against counts from a hook."""

import json
import math
import shutil
from pathlib import Path

import pytest
import tiny_models
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from eacmoe_lightning.analysis.selection import (
    cosine_similarity,
    coverage,
    load_balance,
    select,
    selection_frequency,
)
from eacmoe_lightning.cli import main
from eacmoe_lightning.models.moe import MoEModel
from eacmoe_lightning.text.documents import read_documents
from eacmoe_lightning.text.sources import BUNDLED_TEXT
from eacmoe_lightning.text.windows import token_windows


def test_frequency_coverage_and_balance_by_hand():
    load = torch.tensor([6, 0, 1, 1])
    assert selection_frequency(load).tolist() == [0.75, 0, 0.125, 0.125]
    assert selection_frequency([0, 0]).tolist() == [0, 0]
    assert coverage(load) == 0.75
    assert coverage(load, 0.5) == 0.75  # the mean is 2; a load of 1 is half of it and counts
    assert coverage(load, 0.6) == 0.25
    balance = load_balance(load)
    assert balance["entropy"] == pytest.approx((0.75 * math.log2(4 / 3) + 2 * 0.125 * 3) / 2)
    assert balance["max_over_mean"] == 3
    assert load_balance(torch.tensor([5, 5, 5])) == {"entropy": pytest.approx(1), "max_over_mean": pytest.approx(1)}
    assert load_balance(torch.tensor([0, 9])) == {"entropy": 0, "max_over_mean": 2}


def test_cosine_by_hand():
    a, b, c = torch.tensor([1.0, 0, 0]), torch.tensor([0.5, 0.5, 0]), torch.tensor([[0, 0, 1.0]])
    similarity = cosine_similarity([a, b, c])
    expected = torch.tensor([[1, 2**-0.5, 0], [2**-0.5, 1, 0], [0, 0, 1]], dtype=torch.float64)
    torch.testing.assert_close(similarity, expected)


@pytest.mark.parametrize("family", tiny_models.MOE_FAMILIES)
@torch.no_grad()
def test_loads_and_likelihoods_are_those_of_the_model(family, tokenizer):
    model = tiny_models.build(family)
    moe = MoEModel(model)
    windows = token_windows(read_documents("bundled:code"), tokenizer, 5, 32)
    selections = select(moe, windows, batch_size=3)  # an odd size: the halves alternate across batches
    for half, of_half in ((0, windows[0::2]), (1, windows[1::2])):
        ids = []
        handles = [
            block.experts.module.register_forward_pre_hook(lambda m, args, ids=ids: ids.append(args[1]))
            for block in moe.moe_blocks
        ]
        model(of_half)
        for handle in handles:
            handle.remove()
        for i, block in enumerate(moe.moe_blocks):
            assert selections.halves[half][i].tolist() == [int((ids[i] == e).sum()) for e in range(block.num_experts)]
    assert all(int(load.sum()) == windows.numel() * moe.top_k for load in selections.loads)
    loss = model(windows, labels=windows, output_router_logits=False).loss
    assert selections.perplexity == pytest.approx(math.exp(loss), rel=1e-5)
    assert 0 < selections.within < 1
    assert select(moe, windows[:1], batch_size=1).within is None


def test_the_command_writes_its_files(tiny_model_dir, tmp_path, capsys):
    model, output = tiny_model_dir("qwen3_moe"), tmp_path / "analysis"
    options = ["--model", str(model), "--output", str(output), "--num_windows", "3", "--window_length", "32"]
    main(["analyze", *options, "--texts", '{a: "bundled:prose", b: "bundled:maths", c: "bundled:prose"}'])
    analysis = json.loads((output / "analysis.json").read_text())
    similarity = analysis["similarity"]
    assert similarity["texts"] == ["a", "b", "c"] and ["a", "c"] in similarity["similar"]
    assert similarity["matrix"][0][2] == pytest.approx(1) and similarity["matrix"][0][1] < 0.9999
    assert [row["block"] for row in analysis["blocks"]] == [0, 1, 2]
    assert sum(analysis["blocks"][1]["texts"]["b"]["load"]) == 3 * 32 * 2 and analysis["texts"]["b"]["tokens"] == 96
    events = EventAccumulator(str(output / "tensorboard")).Reload()
    for name in ("similarity", "frequency", "balance"):
        assert (output / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert events.Images(f"analysis/{name}")[0].width > 100
    assert "alike (above 0.8): " in capsys.readouterr().out


@pytest.mark.parametrize(
    "more, messages",
    [
        (["--cross", "/no/such.yaml"], ["/no/such.yaml", "--cross"]),
        (["--texts", "/no/such/text.txt"], ["/no/such/text.txt"]),
        (["--texts", '["bundled:prose", "./prose.txt"]'], ["--texts", "'prose'"]),
        (["--num_windows", "100000"], ["100000", "--num_windows"]),
        (["--num_windows", "0"], ["--num_windows=0"]),
        (["--batch_size", "0"], ["--batch_size"]),
        (["--floor", "1.5"], ["--floor"]),
        (["--model", "/no/such/model"], ["/no/such/model"]),
        (["--model", "LLAMA"], ["no routed experts"]),
        (["--texts", "[]"], ["--texts is empty"]),
        (["--cross_calibration", "[]"], ["--cross_calibration is empty"]),
        (["--cross_calibration", "self"], ["--cross_calibration needs --cross"]),
        (["--alphas", "[]"], ["--alphas is empty"]),
        (["--num_questions", "4"], ["--num_questions needs --alphas"]),
        (["--baselines", "true"], ["--baselines needs --alphas"]),
        (["--alphas", "[0.3]", "--num_questions", "99"], ["num_questions=99 (--num_questions)"]),
        (["--alphas", "[0.3]", "--tolerance", "-1"], ["tolerance=-1.0 is negative (--tolerance)"]),
        (["--window_length", "1"], ["window_length=1 (--window_length) is below 2"]),
        (["--window_length", "1000000"], ["--texts: bundled:", "(--window_length); pass a longer text"]),
        (["--cross", "tiny-2.06", "--cross_calibration", "./none.txt"], ["--cross: --cross_calibration: ./none.txt"]),
        (["--cross", "tiny-2.06", "--cross_windows", "90000"], ["90000 (--cross_windows)", "--window_length"]),
    ],
)
def test_bad_input(more, messages, tiny_model_dir, tmp_path, capsys):
    more = [str(tiny_model_dir("llama")) if word == "LLAMA" else word for word in more]
    options = ["--model", str(tiny_model_dir("mixtral")), "--output", str(tmp_path / "out"), "--window_length", "32"]
    with pytest.raises(SystemExit) as end:
        main(["analyze", *options, *more])
    printed = capsys.readouterr().err
    assert end.value.code == 1 and all(message in printed for message in messages), printed
    assert "--data." not in printed
    assert not Path(tmp_path / "out").exists()


def test_results_of_something_else_stay(tiny_model_dir, tmp_path, capsys):
    for name, held in (("analysis.json", '{"model": "another"}'), ("frequency.png", "a picture of mine")):
        folder = tmp_path / name.partition(".")[0]
        folder.mkdir()
        (folder / name).write_text(held)
        with pytest.raises(SystemExit):
            main(["analyze", "--model", str(tiny_model_dir("mixtral")), "--output", str(folder)])
        message = "holds an analysis of another" if "another" in held else "is not empty and holds no analysis.json"
        assert f"{folder} (--output) {message}" in capsys.readouterr().err
        assert (folder / name).read_text() == held and len(list(folder.iterdir())) == 1


@pytest.mark.filterwarnings("ignore:LightningCLI's args", "ignore:.*deprecated")
def test_rows_across_texts_run_as_the_analysis_does(tiny_model_dir, tmp_path, capsys):
    config, output, text = tmp_path / "fit.yaml", tmp_path / "out", tmp_path / "text.txt"
    config.write_text("model: {group_size: 32, router_method: none}\n")
    text.write_text((BUNDLED_TEXT / "calibration.txt").read_text()[:20_000])
    words = ["analyze", "--model", str(tiny_model_dir("mixtral")), "--output", str(output), "--num_windows", "2"]
    words += ["--window_length", "32", "--cross", str(config), "--cross_windows", "4", "--texts", "bundled:prose"]
    words += ["--cross_calibration", str(text)]
    main([*words, "--dtype", "bfloat16"])
    run = yaml.safe_load((output / "cross" / "text" / "tensorboard" / "config.yaml").read_text())
    assert run["model"]["dtype"] == "bfloat16" and run["trainer"]["accelerator"] == "cpu"
    before = (output / "analysis.json").read_bytes()
    with pytest.raises(SystemExit):
        main([*words, "--dtype", "float32"])
    assert "other settings (model.dtype was 'bfloat16' and is now 'float32')" in capsys.readouterr().err
    text.write_text((BUNDLED_TEXT / "calibration.txt").read_text()[-20_000:])
    with pytest.raises(SystemExit):
        main([*words, "--dtype", "bfloat16"])
    assert "or its tokens (the model's tokenizer) have changed" in capsys.readouterr().err
    assert (output / "analysis.json").read_bytes() == before


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:LightningCLI's args", "ignore:.*deprecated")
def test_cross_distribution_table(tiny_model_dir, tmp_path, capsys):
    config, output = tmp_path / "fit.yaml", tmp_path / "analysis"
    config.write_text("model: {group_size: 32, bits: 2, joint_epochs: 0}\ntrainer: {accelerator: cpu}\n")
    words = ["analyze", "--model", str(tiny_model_dir("mixtral")), "--output", str(output), "--num_windows", "3"]
    words += ["--window_length", "64", "--cross", str(config), "--cross_windows", "8", "--texts"]
    texts = '["bundled:prose", "bundled:maths"]'
    main([*words, texts])
    table = json.loads((output / "cross.json").read_text())
    assert table["calibrated_on"] == table["evaluated_on"] == ["prose", "maths"]
    for i, calibrated in enumerate(("prose", "maths")):
        report = json.loads((output / "cross" / calibrated / "report.json").read_text())
        assert report["config"]["data.calibration"] == f"bundled:{calibrated}[50%:]"
        for j, text in enumerate(("prose", "maths")):
            perplexity = report["perplexity"][text]
            assert table["perplexity"][i][j] == perplexity["compressed"]
            assert table["lost"][i][j] == pytest.approx(math.log(perplexity["compressed"] / perplexity["original"]))
            assert table["changed"]["any"][i][j] == report["expert_shift"]["texts"][text]["after"]["any"]
    assert table["own"]["lost"] == pytest.approx((table["lost"][0][0] + table["lost"][1][1]) / 2)
    assert (output / "cross.png").exists() and "calibrated on (rows)" in capsys.readouterr().out
    # finished rows are read again, interrupted ones resume
    (output / "cross" / "maths.json").unlink()
    shutil.rmtree(output / "cross" / "prose")
    main([*words, texts])
    assert json.loads((output / "cross.json").read_text()) == table
    with pytest.raises(SystemExit):
        main([*words, '{prose: "bundled:code"}'])
    assert "other settings (data.calibration was 'bundled:prose[50%:]'" in capsys.readouterr().err
