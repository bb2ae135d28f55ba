"""Whole jobs through the command line, on every family: the files of `fit` and the results of the other commands."""

import json
import math
import re
from collections.abc import Callable
from pathlib import Path

import jobs
import numpy as np
import pytest
import tiny_models
import torch
import yaml
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.metadata import (
    EXPERIMENT_TAG,
    SESSION_START_INFO_TAG,
    parse_experiment_plugin_data,
    parse_session_start_info_plugin_data,
)
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from eacmoe_lightning.calibration.blocks import PHASES
from eacmoe_lightning.cli import main
from eacmoe_lightning.compressed.format import read_config
from eacmoe_lightning.compressed.loading import load
from eacmoe_lightning.job.trained import TrainedParts
from eacmoe_lightning.text.documents import read_documents
from eacmoe_lightning.text.windows import token_windows

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:LightningCLI's args", "ignore:.*deprecated")]
families = pytest.mark.parametrize("family", tiny_models.MOE_FAMILIES)
PROSE = 3  # held-out windows of 64 tokens


SMALL = {"model__block_epochs": 2, "data__batch_size": 2}  # so many steps that codes move
DEFAULTS = {"model__block_epochs": None, "model__joint_epochs": None, "data__num_windows": 16}
OPTIONS = {family: SMALL for family in tiny_models.MOE_FAMILIES} | {"qwen3_moe": DEFAULTS}  # the bundled model's family


@pytest.fixture
def run_of(fitted) -> Callable[[str], Path]:
    """`run_of(family)`: the run directory of `fit`."""
    return lambda family: fitted(family, **OPTIONS[family])


@pytest.fixture(scope="module")
def prose(tokenizer: PreTrainedTokenizerBase) -> Tensor:
    return token_windows(read_documents("bundled:prose"), tokenizer, PROSE, 64)


def decoded(folder: Path) -> dict[str, Tensor]:
    """All tensors of a compressed directory, unpacked with NumPy alone, independently of the package."""
    stored = {}
    for file in sorted(folder.glob("*.safetensors")):
        stored |= load_file(file)
    bits = json.loads((folder / "config.json").read_text())["quantization"]["bits"]
    for name, width in bits.items():
        packed = stored.pop(f"{name}.codes").numpy()
        stream = np.unpackbits(packed, axis=-1, bitorder="little")
        codes = stream.reshape(*stream.shape[:-1], -1, width) @ (1 << np.arange(width))
        scale, zero = stored.pop(f"{name}.scale").float().numpy(), stored.pop(f"{name}.zero_point").numpy().astype(int)
        size = codes.shape[-1] // scale.shape[-1]
        values = (codes - zero.repeat(size, -1)).astype(np.float32) * scale.repeat(size, -1)
        stored[name] = torch.from_numpy(values)
    return stored


@torch.no_grad()
def perplexity(model, windows: Tensor) -> float:
    logits = torch.cat([model(window[None]).logits for window in windows])[:, :-1].log_softmax(-1)
    return math.exp(-logits.gather(-1, windows[:, 1:, None]).mean())


# --- the files of fit


@families
@torch.no_grad()
def test_the_compressed_directory_holds_the_dequantized_model(family, run_of, tiny_model_dir, prose):
    folder = run_of(family) / "compressed"
    original = AutoModelForCausalLM.from_pretrained(tiny_model_dir(family)).eval()
    before, weights = {name: p.clone() for name, p in original.named_parameters()}, decoded(folder)
    bits = json.loads((folder / "config.json").read_text())["quantization"]["bits"]
    assert set(bits.values()) == {3, 4}
    for name in bits:  # close to the original, and on a grid of at most 2^bits values
        assert torch.corrcoef(torch.stack([weights[name].flatten(), before[name].flatten()]))[0, 1] > 0.9
        assert all(
            len(row.unique()) <= 2 ** bits[name] for row in weights[name].unflatten(-1, (-1, 32)).flatten(0, -2)[:50]
        )
    missing, unexpected = original.load_state_dict(weights, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}
    reloaded = load(folder, packed=False)
    assert torch.equal(reloaded(prose).logits, original(prose).logits) and not reloaded.training
    kept = {name for name, p in before.items() if torch.equal(p, weights.get(name, before[name]))}
    assert {"model.embed_tokens.weight"} <= kept and not kept & bits.keys()


@torch.no_grad()
def test_experts_may_differ_in_bits(tiny_model_dir, tmp_path):
    """From the command line to the packed model: codes, scales that the joint stage trained, true bits."""
    overrides = "{0: {experts: 2, experts.3: 4, experts.7: 4}, 2: {experts.down_proj: 5, experts.1.gate_up_proj: 8}}"
    run = jobs.fit(tiny_model_dir("qwen3_moe"), tmp_path / "run", model__overrides=overrides, model__joint_epochs=1)
    name = "model.layers.{}.mlp.experts.{}"
    bits = read_config(run / "compressed")["quantization"]["bits"]
    assert bits[name.format(0, "gate_up_proj")] == bits[name.format(0, "down_proj")] == [2, 2, 2, 4, 2, 2, 2, 4]
    assert bits[name.format(1, "down_proj")] == 3 and bits[name.format(2, "down_proj")] == 5
    assert bits[name.format(2, "gate_up_proj")] == [3, 8, 3, 3, 3, 3, 3, 3]
    decoded, packed = load(run, packed=False), load(run)
    for index, widths in ((0, [2, 2, 2, 4, 2, 2, 2, 4]), (2, [3, 8, 3, 3, 3, 3, 3, 3])):
        weight = decoded.get_parameter(name.format(index, "gate_up_proj"))
        groups = weight.unflatten(-1, (-1, 32)).flatten(1, 2)  # [E, groups of all rows, 32]
        most = [max(len(group.unique()) for group in expert) for expert in groups]
        assert all(2 ** (b - 1) < count <= 2**b for b, count in zip(widths, most, strict=True) if b < 8)
    windows = torch.randint(0, tiny_models.VOCABULARY, (2, 32), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(packed(windows).logits, decoded(windows).logits, rtol=1e-4, atol=1e-4)
    report = json.loads((run / "report.json").read_text())
    assert report["bits"]["true"] == pytest.approx(report["bits"]["nominal"] + 24 / 32)


@families
def test_the_report_is_complete_and_correct(family, run_of, tiny_model_dir, prose):
    run = run_of(family)
    report = json.loads((run / "report.json").read_text())
    top_k, moe_blocks = (3, 2) if family == "deepseek" else (2, 3)
    assert (report["model"]["blocks"], report["model"]["experts"], report["model"]["top_k"]) == (3, 8, top_k)
    assert 3 < report["bits"]["nominal"] < 3.5
    assert report["bits"]["true"] == pytest.approx(
        report["bits"]["nominal"] + 24 / 32
    )  # 16-bit scale, 8-bit zero point
    assert report["size_bytes"]["compressed"] == sum(
        p.stat().st_size for p in (run / "compressed").glob("*.safetensors")
    )
    assert report["size_bytes"]["original"] == sum(
        p.stat().st_size for p in tiny_model_dir(family).glob("*.safetensors")
    )
    assert report["perplexity"].keys() == {"prose", "code"}
    original = AutoModelForCausalLM.from_pretrained(tiny_model_dir(family)).eval()
    assert report["perplexity"]["prose"]["original"] == pytest.approx(perplexity(original, prose), rel=1e-4)
    reloaded = load(run, packed=False)
    assert report["perplexity"]["prose"]["compressed"] == pytest.approx(perplexity(reloaded, prose), rel=1e-4)
    assert report["perplexity"]["prose"].keys() == {"original", "compressed"}  # before: there is no such model
    shift = report["expert_shift"]
    for rates in (shift["mean"]["after"], shift["calibration"]["before"], shift["calibration"]["after"]):
        assert 0 <= rates["all"] <= rates["half"] <= rates["any"] <= 1 and rates["any"] > 0
        assert rates["selections"] <= rates["any"]
    for trained in report["reconstruction"].values():
        assert len(trained["held_back"]) == 3 and trained["held_back"][trained["taken"]] == min(trained["held_back"])
        assert (trained["moved"] > 0) == (trained["taken"] > 0)
    assert len(report["expert_shift"]["blocks"]) == moe_blocks
    assert report["router"]["method"] == "ridge" and report["experts"]["starved"] >= 0
    assert report["machine"]["processes"] == 1 and report["seed"] == 0
    cost = report["cost"]
    assert {"check", "read", "observe", "attention", "router", "experts", "replay", "write"} <= cost.keys()
    total = sum(phase["seconds"] for phase in cost.values() if isinstance(phase, dict))
    assert total == pytest.approx(cost["total_seconds"])
    calibration = sum(cost[phase]["seconds"] for phase in (*PHASES, "joint") if phase in cost)
    assert f"router per block {cost['router']['seconds'] / calibration:.1%}" in (run / "report.md").read_text()
    assert set(report["versions"]) >= {"torch", "lightning", "transformers", "python"}
    text = (run / "report.md").read_text()
    assert "| prose |" in text and "## Expert-shift per block" in text
    assert not list(run.rglob("*.partial"))


def test_tensorboard_has_a_curve_over_the_blocks_for_each_of_their_values(run_of):
    events = EventAccumulator(str(run_of("deepseek") / "tensorboard")).Reload()
    report = json.loads((run_of("deepseek") / "report.json").read_text())
    for tag in (
        "expert_shift/any/before",
        "expert_shift/all/after",
        "experts/starved",
        "experts/busiest_over_mean/original",
        "quantization_error/mlp.experts.down_proj",
    ):
        assert [event.step for event in events.Scalars(tag)] == [1, 2], tag  # block 0 is dense
    for tag in (
        "quantization_error/self_attn.q_proj",
        "cost/seconds/attention",
        "cost/peak_megabytes",
        "blocks/output_error/after_training",
    ):
        assert [event.step for event in events.Scalars(tag)] == [0, 1, 2], tag
    rates = {row["block"]: row["calibration"]["before"]["any"] for row in report["expert_shift"]["blocks"]}
    assert {e.step: e.value for e in events.Scalars("expert_shift/any/before")} == pytest.approx(rates, rel=1e-5)
    seconds = sum(
        e.value for tag in events.Tags()["scalars"] if tag.startswith("cost/seconds/") for e in events.Scalars(tag)
    )
    of_blocks = sum(report["cost"][phase]["seconds"] for phase in PHASES)
    assert seconds == pytest.approx(of_blocks, rel=1e-4)
    for stage in ("router", "block_stage", "joint_stage"):
        assert len({e.step for e in events.Scalars(f"{stage}/loss")}) == len(events.Scalars(f"{stage}/loss")) > 1
    assert not [tag for kind in ("scalars", "images") for tag in events.Tags()[kind] if re.search(r"block_?\d", tag)]
    assert set(events.Tags()["images"]) == {"selection_frequency/original", "selection_frequency/compressed"}


def test_tensorboard_compares_finished_runs_by_their_results(run_of):
    """With hyperparameters, and metrics that are scalars with the report's values."""
    run = run_of("deepseek")
    events, report = EventAccumulator(str(run / "tensorboard")).Reload(), json.loads((run / "report.json").read_text())
    value = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    for text, streams in report["perplexity"].items():
        assert value[f"quality/perplexity/{text}"] == [(0, pytest.approx(streams["compressed"], rel=1e-5))]
        assert value[f"quality_details/perplexity/original/{text}"] == [
            (0, pytest.approx(streams["original"], rel=1e-5))
        ]
        lost = math.log(streams["compressed"] / streams["original"])
        assert value[f"quality/loss_increase/{text}"] == [(0, pytest.approx(lost, rel=1e-4))]
        kl = report["divergence"]["texts"][text]["compressed"]["kl"]
        assert value[f"quality/kl/{text}"] == [(0, pytest.approx(kl["mean"], rel=1e-5))]
        assert value[f"quality_details/kl/p99/{text}"] == [(0, pytest.approx(kl["p99"], rel=1e-5))]
    content = events.PluginTagToContent("hparams")
    experiment = parse_experiment_plugin_data(content[EXPERIMENT_TAG])
    metrics = [metric.name.tag for metric in experiment.metric_infos]
    assert metrics[0] == "quality/kl/mean_of_texts" and set(metrics) <= set(value)
    assert {"quality/loss_increase/prose", "size/bits_per_weight", "cost/total_seconds"} <= set(metrics)
    chosen = dict(parse_session_start_info_plugin_data(content[SESSION_START_INFO_TAG]).hparams)
    assert chosen["bits"].number_value == 3 and chosen["router_method"].string_value == "ridge"
    assert chosen["block_epochs"].number_value == 2 and chosen["seed"].number_value == 0


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek"])
def test_two_runs_are_byte_identical(family, run_of, tiny_model_dir, tmp_path):
    again = jobs.fit(tiny_model_dir(family), tmp_path / "again", **OPTIONS[family])
    for part in ("compressed", "blocks"):
        assert jobs.contents(again / part) == jobs.contents(run_of(family) / part)


def test_without_a_joint_stage_no_codes_of_other_blocks_come_into_memory(tiny_model_dir, tmp_path, monkeypatch):
    taken = []
    take = TrainedParts.take_codes
    monkeypatch.setattr(TrainedParts, "take_codes", lambda self, codes: taken.append(set(codes)) or take(self, codes))
    jobs.fit(tiny_model_dir("qwen3_moe"), tmp_path / "run", model__joint_epochs=0, data__heldout="[]")
    blocks = [{".".join(name.split(".")[:3]) for name in names} for names in taken]
    assert blocks == [{f"model.layers.{index}"} for index in range(3)]


def test_micro_batches_train_like_whole_ones(tiny_model_dir, tmp_path):
    options = {"model__joint_epochs": 0, "model__quantizer": "rtn", "model__router_method": "joint"}  # without ties
    losses = []
    for size in (None, 1, 3):
        run = jobs.fit(tiny_model_dir("qwen2_moe"), tmp_path / str(size), data__micro_batch_size=size, **options)
        blocks = json.loads((run / "report.json").read_text())["reconstruction"].values()
        losses.append(torch.tensor([block["held_back"] for block in blocks]))
    first = losses[0][0]
    for other in losses[1:]:
        torch.testing.assert_close(other[0, 0], first[0], rtol=1e-6, atol=0)  # before training
        torch.testing.assert_close(other, losses[0], rtol=5e-3, atol=0)  # AdamW enlarges differences of rounding
    assert abs(first[1] / first[0] - 1) > 0.02


def test_blocks_stay_as_they_are_if_nothing_is_quantized(tiny_model_dir, tmp_path):
    logger = {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": f"{tmp_path}/logs"}}
    run = jobs.fit(
        tiny_model_dir("qwen3_moe"), tmp_path / "run", model__quantizer="none", model__joint_epochs=0,
        trainer__logger=json.dumps(logger),
    )  # fmt: skip
    report = json.loads((run / "report.json").read_text())
    assert report["expert_shift"]["mean"]["after"]["any"] == 0
    (metrics,) = (tmp_path / "logs").rglob("metrics.csv")  # TensorBoard is not the only logger
    assert "quality/loss_increase/prose" in metrics.read_text().splitlines()[0].split(",")
    for perplexity in report["perplexity"].values():
        assert perplexity["compressed"] == pytest.approx(perplexity["original"], rel=1e-4)


# --- router methods


@pytest.mark.parametrize(
    "method, changes", [("none", set()), ("ridge", {"router"}), ("sgd", {"router"}), ("joint", {"router", "norm"})]
)
def test_each_router_method_changes_only_its_parameters(method, changes, tiny_model_dir, tmp_path, prose):
    joint = 2 if method == "joint" else 0
    options = {"model__router_method": method, "model__block_epochs": 0, "model__joint_epochs": joint}
    run = jobs.fit(tiny_model_dir("qwen3_moe"), tmp_path / "run", **options)
    original = dict(AutoModelForCausalLM.from_pretrained(tiny_model_dir("qwen3_moe")).named_parameters())
    written = load(run, packed=False)
    moved = {name for name, p in written.named_parameters() if not torch.equal(p, original[name])}
    kinds = {"router": {n for n in original if "mlp.gate." in n}, "norm": {n for n in original if "norm" in n}}
    for kind, names in kinds.items():
        assert moved & names == (names if kind in changes else set())
    report = json.loads((run / "report.json").read_text())
    assert report["router"] == {"method": method, "block_epochs": 0, "joint_epochs": joint}
    assert all(texts["before"] > 1 for texts in report["perplexity"].values())
    if method == "none":
        assert all(texts["before"] == texts["compressed"] for texts in report["perplexity"].values())
    if method in ("ridge", "sgd"):  # at least on the calibration text
        rates = report["expert_shift"]["calibration"]
        assert rates["after"]["selections"] < rates["before"]["selections"]


def test_other_options_run(tiny_model_dir, tmp_path, capsys):
    """All options that are off by default, together, with a loss from the command line."""
    run = jobs.fit(
        tiny_model_dir("qwen2_moe"), tmp_path / "run", model__bits="[3, 2]", model__act_order="false", model__refine=2,
        model__symmetric="true", model__affinity="true", model__shared_expert_bits=6,
        model__overrides="{1: {attention: 8, group_size: 16}}",
        model__router_method="sgd", model__router_warm_start="true", model__min_expert_tokens=100000,
        model__router_loss="eacmoe_lightning.router_loss.SelectionHinge",
        model__router_loss__margin=0.2,
    )  # fmt: skip
    report = json.loads((run / "report.json").read_text())
    attention, experts, shared = 64 * 64 * 2 + 64 * 32 * 2, 8 * 3 * 64 * 64, 3 * 64 * 128
    expected = sum(attention * a + experts * e + shared * 6 for a, e in ((4, 3), (8, 3), (4, 2)))
    assert report["bits"]["nominal"] == pytest.approx(expected / 3 / (attention + experts + shared))
    assert report["experts"]["starved"] == 24 and report["experts"]["starved_by_block"]["0"] == list(range(8))
    loss = report["config"]["model.router_loss"]
    assert loss["class_path"].endswith(".SelectionHinge") and loss["init_args"] == {"margin": 0.2}
    with pytest.raises(SystemExit):  # the saved config is that of this run
        main(["fit", "--config", str(run / "tensorboard" / "config.yaml")])
    assert "already holds this run: add --ckpt_path auto" in capsys.readouterr().err


@pytest.mark.parametrize(("family", "method"), [("mixtral", "ridge"), ("deepseek", "sgd")])
def test_hidden_states_may_be_stored_in_fewer_bits_than_the_model_has(family, method, tiny_model_dir, tmp_path):
    """The model runs in float32 all the same, and its result is near that of streams that lose nothing."""
    options = dict(data__num_windows=4, model__router_method=method, model__joint_epochs=0)
    lost = {}
    for dtype in ("auto", "bfloat16"):
        run = jobs.fit(tiny_model_dir(family), tmp_path / dtype, model__stream_dtype=dtype, **options)
        lost[dtype] = json.loads((run / "report.json").read_text())["divergence"]["mean"]["compressed"]["kl"]
    assert lost["bfloat16"] != lost["auto"] and lost["bfloat16"] == pytest.approx(lost["auto"], rel=0.2)


# --- validate, test, predict


def evaluated(stage: str, folder: Path, evaluate: Path | None, model: Path, **more) -> dict:
    if evaluate is not None:
        more["model__evaluate"] = evaluate
    main([stage, *jobs.options(model, folder, **more)])
    return json.loads((folder / f"{stage}.json").read_text())


@pytest.mark.parametrize("stage", ["validate", "test"])
def test_evaluations_of_a_run_a_compressed_directory_and_an_original_agree(
    stage, run_of, tiny_model_dir, tmp_path, prose
):
    run, model = run_of("qwen2_moe"), tiny_model_dir("qwen2_moe")
    report = json.loads((run / "report.json").read_text())
    split = {"model__split_damage": "true"} if stage == "test" else {}
    default = evaluated(stage, run, None, model, **split)
    elsewhere = evaluated(stage, tmp_path / "a", run / "compressed", model)
    for text, values in report["perplexity"].items():
        for stream in ("original", "compressed"):
            assert default["perplexity"][text][stream] == pytest.approx(values[stream], rel=1e-5)
            assert elsewhere["perplexity"][text][stream] == pytest.approx(values[stream], rel=1e-5)
    assert default["expert_shift"]["mean"]["any"] == pytest.approx(
        report["expert_shift"]["mean"]["after"]["any"], rel=1e-5
    )
    assert default["tokens"] == {"prose": PROSE * 63, "code": PROSE * 63}
    streams = {"original", "compressed"} | ({"selection_damage", "weight_damage"} if split else set())
    assert default["perplexity"]["prose"].keys() == streams and len(
        set(default["perplexity"]["prose"].values())
    ) == len(streams)
    events = EventAccumulator(str(tmp_path / "a" / "tensorboard")).Reload()
    points = [(point.step, point.value) for point in events.Scalars(f"{stage}/perplexity/prose")]
    assert points == [(0, pytest.approx(elsewhere["perplexity"]["prose"]["compressed"], rel=1e-5))]
    assert {tag.partition("/")[0] for tag in events.Tags()["scalars"]} == {stage, f"{stage}_details"}
    original_only = evaluated(stage, tmp_path / "b", model, model)
    original = AutoModelForCausalLM.from_pretrained(model).eval()
    assert original_only["perplexity"]["prose"] == {"original": pytest.approx(perplexity(original, prose), rel=1e-4)}
    assert not original_only["expert_shift"]


def test_predict_writes_the_log_likelihood_of_every_token(run_of, tiny_model_dir, tmp_path, prose):
    run, model = run_of("phimoe"), tiny_model_dir("phimoe")
    main(["predict", *jobs.options(model, run)])
    main(["predict", *jobs.options(model, tmp_path / "original", model__evaluate=model)])
    subjects = {
        run: load(run, packed=False),
        tmp_path / "original": AutoModelForCausalLM.from_pretrained(model).eval(),
    }
    for folder, subject in subjects.items():
        scores = load_file(folder / "scores_prose.safetensors")
        with torch.no_grad():
            expected = subject(prose).logits[:, :-1].log_softmax(-1).gather(-1, prose[:, 1:, None]).squeeze(-1)
        assert scores["index"].tolist() == list(range(PROSE))
        torch.testing.assert_close(scores["log_likelihood"], expected, rtol=1e-4, atol=1e-4)


# --- configs


FIT_CONFIGS = [c for c in sorted((jobs.ROOT / "configs").glob("*.yaml")) if not c.stem.startswith("study-")]


@pytest.mark.parametrize("config", FIT_CONFIGS, ids=lambda path: path.stem)
def test_shipped_configs_are_accepted(config, capsys):
    with pytest.raises(SystemExit) as end:
        main(["fit", "--config", str(config), "--print_config"])
    assert end.value.code in (0, None)
    printed = yaml.safe_load(capsys.readouterr().out)
    for section, values in yaml.safe_load(config.read_text()).items():
        for option, value in values.items():
            if option != "router_loss":  # printed with its defaults; JSON makes all keys strings
                assert json.dumps(printed[section][option]) == json.dumps(value)
