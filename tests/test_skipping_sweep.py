"""Choosing alpha: the sweep against each candidate run by hand, its recommendation, uniform routing, the command."""

import json
import math

import pytest
import tiny_models
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_packed_loading import compress
from test_pesf import random_ids, skewed_model

import eacmoe_lightning
from eacmoe_lightning.analysis.skipping_sweep import effective_experts, recommend, summary, sweep
from eacmoe_lightning.cli import main
from eacmoe_lightning.evaluation.choice_task import make_questions
from eacmoe_lightning.models.moe import MoEModel
from eacmoe_lightning.skipping import PESF, current_rule, set_skipping


@torch.no_grad()
def test_rows_match_each_candidate_run_by_hand():
    model = skewed_model()
    texts = {"a": random_ids(3, 64), "b": random_ids(2, 48, seed=1)}
    set_skipping(model, PESF(1.0))  # suspended during the sweep
    questions = {"a": make_questions(random_ids(6, 32), 4, 24)}
    result = sweep(model, texts, [0.7, 0.3], batch_size=2, calibration=random_ids(2, 32), questions=questions)
    assert current_rule(model) == PESF(1.0)
    set_skipping(model, None)
    names = [row["name"] for row in result["rows"]]
    assert names == ["none", "pesf 0.3", "pesf 0.7", "ceil(2K/3)", "ees", "odp"]
    rows = dict(zip(names, result["rows"], strict=True))
    for text, windows in texts.items():
        loss = model(windows, labels=windows, output_router_logits=False).loss
        assert rows["none"]["perplexity"][text] == pytest.approx(math.exp(loss), rel=1e-5)
        with eacmoe_lightning.pesf(model, alpha=0.7):
            loss = model(windows, labels=windows, output_router_logits=False).loss
        assert rows["pesf 0.7"]["perplexity"][text] == pytest.approx(math.exp(loss), rel=1e-5)
    assert rows["none"]["increase"] == rows["none"]["pairs_dropped"] == 0 and rows["none"]["latency"] == 1
    dropped = [rows[name]["pairs_dropped"] for name in ("pesf 0.3", "pesf 0.7")]
    assert 0 < dropped[0] < dropped[1] < 0.5
    assert rows["ceil(2K/3)"]["pairs_dropped"] == pytest.approx(1 / 4)  # keeps 3 of 4
    assert 0 < rows["odp"]["pairs_dropped"] <= rows["ees"]["pairs_dropped"] < 0.25
    assert all(0 <= row["accuracy"]["a"] <= 1 and row["latency"] > 0 for row in rows.values())
    assert "recommended" in summary(result)


def test_the_recommendation_is_the_largest_alpha_up_to_which_all_are_within_tolerance():
    rows = [{"alpha": a, "increase": i} for a, i in [(0.0, 0), (0.5, 0.02), (0.1, 0.0), (0.3, 0.01), (0.7, 0.005)]]
    rows.append({"alpha": None, "increase": 0})
    assert recommend(rows, 0.01) == 0.3  # 0.7 is within tolerance, but 0.5 is not
    assert recommend(rows, 0.02) == 0.7
    assert recommend(rows, 0) == 0.1
    assert recommend([{"alpha": 0.1, "increase": 0.5}], 0.01) is None


@torch.no_grad()
def test_nearly_uniform_routing_is_detected():
    model, texts = tiny_models.build("mixtral"), {"a": random_ids(2, 400)}

    def route(share: list[float]) -> None:
        """Makes every token select experts drawn with these probabilities."""
        generator = torch.Generator().manual_seed(0)

        def draw(module, args, output):
            logits = torch.tensor(share).log() - torch.empty(len(output[0]), 8).exponential_(generator=generator).log()
            return logits, output[1], logits.topk(2).indices

        for block in MoEModel(model).moe_blocks:
            block.router._forward_hooks.clear()
            block.router.register_forward_hook(draw)

    route([1 / 8] * 8)
    uniform = sweep(model, texts, [0.7])
    assert uniform["is_nearly_uniform"] and uniform["effective_experts"] > 0.98
    assert "selection is nearly uniform" in summary(uniform)
    route([0.9, 0.02, 0.02, 0.02, 0.01, 0.01, 0.01, 0.01])
    assert 0.2 < effective_experts(model, texts, 2) < 0.7
    route([0.5, 0.5] + [1e-30] * 6)  # two of eight, always
    assert effective_experts(model, texts, 2) == pytest.approx(2 / 8, rel=0.01)


def test_the_command_sweeps_draws_and_recommends(tiny_model_dir, tmp_path, capsys):
    compressed = compress(tiny_model_dir("qwen3_moe"), tmp_path / "compressed")
    output = tmp_path / "analysis"
    options = ["--model", str(compressed), "--output", str(output), "--num_windows", "6", "--window_length", "48"]
    options += ["--texts", '["bundled:prose"]', "--alphas", "[0.3, 0.7]", "--tolerance", "10", "--baselines", "true"]
    main(["analyze", *options, "--num_questions", "4"])
    result = json.loads((output / "analysis.json").read_text())["skipping"]
    assert result["recommended"] == 0.7 and [row["alpha"] for row in result["rows"]] == [0, 0.3, 0.7, None, None, None]
    assert set(result["rows"][0]["accuracy"]) == {"prose"}
    assert (output / "skipping.png").read_bytes().startswith(b"\x89PNG")
    assert EventAccumulator(str(output / "tensorboard")).Reload().Images("analysis/skipping")[0].width > 100
    assert "recommended: alpha 0.7" in capsys.readouterr().out


@pytest.mark.parametrize(
    "more, message",
    [
        (["--alphas", "[0.3, 1.5]"], "alpha=1.5 is not in (0, 1]"),
        (["--alphas", "[0.3]", "--tolerance", "-1"], "tolerance=-1.0 is negative"),
        (["--alphas", "[0.3]", "--rescue", "2"], "rescue=2.0 is not in [0, 1]"),
    ],
)
def test_bad_options_are_refused_by_name(more, message, tiny_model_dir, tmp_path, capsys):
    options = ["--model", str(tiny_model_dir("mixtral")), "--output", str(tmp_path / "out"), "--window_length", "32"]
    with pytest.raises(SystemExit):
        main(["analyze", *options, "--num_windows", "2", "--texts", '["bundled:prose"]', *more])
    assert message in capsys.readouterr().err
