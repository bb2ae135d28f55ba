"""`plan` from a config.json alone, against the models' cards, counts by hand and torch's operation counter."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import architectures
import jobs
import published
import pytest
import tiny_models
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import MixtralConfig, Qwen2MoeConfig, Qwen3MoeConfig

from eacmoe_lightning.calibration.recipe import Recipe
from eacmoe_lightning.cli import main
from eacmoe_lightning.commands.fit import parse_fit
from eacmoe_lightning.exports.linears import original_of
from eacmoe_lightning.models.moe import MoEModel
from eacmoe_lightning.models.transformers_loader import empty_model
from eacmoe_lightning.planning.checks import check_disk
from eacmoe_lightning.planning.machine import Rates
from eacmoe_lightning.planning.phases import plan
from eacmoe_lightning.planning.report import warnings
from eacmoe_lightning.planning.shapes import load_shapes
from eacmoe_lightning.planning.sizes import Cost, Job, disk_use, packed_bytes
from eacmoe_lightning.planning.states import passed_on
from eacmoe_lightning.quantization.grid import Grid
from eacmoe_lightning.quantization.quantizers import GPTQ
from eacmoe_lightning.targets import choose

REAL = {
    "mixtral": MixtralConfig(),
    "qwen1.5": Qwen2MoeConfig(
        vocab_size=151936, hidden_size=2048, num_hidden_layers=24, num_attention_heads=16, num_key_value_heads=16,
        intermediate_size=5632, moe_intermediate_size=1408, shared_expert_intermediate_size=5632, num_experts=60,
        num_experts_per_tok=4,
    ),
    "qwen3": Qwen3MoeConfig(
        vocab_size=151936, hidden_size=2048, num_hidden_layers=48, num_attention_heads=32, num_key_value_heads=4,
        head_dim=128, intermediate_size=6144, moe_intermediate_size=768, num_experts=128, num_experts_per_tok=8,
    ),
}  # fmt: skip
BILLIONS = {"mixtral": 46.7, "qwen1.5": 14.3, "qwen3": 30.5}  # parameters, from the models' cards
JOB = Job(128, 2048, 4, 0, "ridge", 1, 4, 0, 2)


def shapes(name: str) -> MoEModel:
    return MoEModel(empty_model(REAL[name], torch.bfloat16))


def config_only(folder: Path, name: str) -> Path:
    """A directory that holds a config.json and nothing else."""
    REAL[name].save_pretrained(folder)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"dtype": "bfloat16"}))
    assert [file.name for file in folder.iterdir()] == ["config.json"]
    return folder


@pytest.mark.parametrize("name", REAL)
def test_sizes_are_those_of_the_model_cards(name):
    moe = shapes(name)
    parameters = sum(parameter.numel() for parameter in moe.model.parameters())
    assert parameters / 1e9 == pytest.approx(BILLIONS[name], abs=0.06)
    result = plan(moe, Recipe(), JOB)
    for phase in ("check", "read"):
        assert 2 * parameters * 0.9 < result.phases[phase].read_bytes < 2 * parameters
    block = sum(p.numel() for p in moe.blocks[0].layer.parameters()) * 2
    whole = parameters * 2
    assert block < result.peak_bytes < whole  # one block and its products, never the whole model


def test_peak_memory_does_not_depend_on_the_number_of_blocks():
    peaks = []
    for num_blocks in (2, 16):
        config = tiny_models.config_of("mixtral")
        config.num_hidden_layers = num_blocks
        peaks.append(plan(MoEModel(empty_model(config, torch.float32)), Recipe(group_size=32), JOB).peak_bytes)
    assert peaks[0] == peaks[1]


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "qwen3_moe"])
@torch.no_grad()
def test_arithmetic_of_a_forward_pass_is_what_torch_counts(family):
    """Attention scores are left out: on the CPU the counter does not see them."""
    moe = MoEModel(tiny_models.build(family))
    tokens = torch.zeros(1, 32, dtype=torch.int64)
    call = moe.call(0, tokens)
    moe.model.set_experts_implementation("eager")
    with FlopCounterMode(display=False) as counter:
        moe.blocks[0].forward(call)
    job = Job(1, 32, 1, 0, "none", 1, 2, 0, 4)
    planned = plan(moe, Recipe(group_size=32), job).phases["observe"].flops / len(moe.blocks)
    scores = 32 * 2 * 32 * 64  # tokens x (2 products, causal) x tokens x width of all heads
    assert planned - scores == pytest.approx(counter.get_total_flops(), rel=0.005)


def test_cost_grows_with_tokens_and_width():
    moe = shapes("qwen1.5")
    one, two = (plan(moe, Recipe(), Job(n, 2048, 4, 0, "none", 1, 4, 0, 2)).phases for n in (64, 128))
    assert two["observe"].flops == 2 * one["observe"].flops
    assert one["experts"].flops32 < two["experts"].flops32 < 2 * one["experts"].flops32  # the solver's part is constant
    plain, grid = GPTQ(scale_search=False, refine=0), Grid(3, 128)
    wide, narrow = (plain.arithmetic(100, columns, grid).flops for columns in (200, 100))
    assert wide / narrow == pytest.approx((8 / 3 + 2 * 4) / (1 / 3 + 2))
    shared = plan(moe, Recipe(), Job(128, 2048, 4, 0, "none", 1, 4, 0, 2, processes=2)).phases
    assert shared["observe"].flops == two["observe"].flops / 2


def test_packed_size_matches_a_count_by_hand():
    moe = MoEModel(empty_model(tiny_models.config_of("mixtral"), torch.float32))
    attention, experts = 64 * 64 * 2 + 64 * 32 * 2, 8 * 3 * 64 * 64
    bits = 3 * (attention * (4 + 24 / 32) + experts * (2 + 24 / 32))
    assert packed_bytes(Recipe(bits=(2,), group_size=32).grids(moe)) == bits / 8
    mixed = Recipe(bits=(2,), group_size=32, overrides={0: {"experts.3": 4}})
    grids = mixed.grids(moe)
    assert packed_bytes(grids) == (bits + 2 * 3 * 64 * 64) / 8
    assert [grid.experts for grid in grids if grid.block == 0 and grid.bits == 4 and grid.part == "experts"] == [
        (3,)
    ] * 2


@pytest.mark.parametrize("name", ["qwen1.5", "qwen3"])
def test_solver_gib_limits_the_memory_of_experts_and_router(name):
    moe = shapes(name)
    small, large = (plan(moe, Recipe(solver_gib=gib), replace(JOB, device="cuda")).phases for gib in (1.0, 4.0))
    for phase in ("router", "experts"):
        assert 0.5 * 2**30 < large[phase].peak_bytes - small[phase].peak_bytes < 3.5 * 2**30
    assert small["router"].read_bytes > large["router"].read_bytes  # more passes over the router's inputs


def test_a_pruned_model_is_smaller_and_cheaper():
    moe, job = shapes("qwen1.5"), replace(JOB, kept_experts=30)
    whole, pruned = plan(moe, Recipe(), JOB), plan(moe, Recipe(), job)
    experts = 24 * 60 * 3 * 2048 * 1408 * (3 + 24 / 128) / 8
    assert whole.disk["finished blocks"] - pruned.disk["finished blocks"] == pytest.approx(experts / 2, rel=1e-6)
    assert pruned.phases["experts"].loop_bytes < 0.6 * whole.phases["experts"].loop_bytes
    assert pruned.phases["read"].read_bytes == whole.phases["read"].read_bytes


def test_files_in_the_page_cache_do_not_wait_for_the_disk():
    cost, rates = Cost(read_bytes=10, written_bytes=10, again_bytes=15), Rates(flops=1, flops32=1, memory=10, disk=1)
    assert rates.seconds(cost) == 20 and rates.seconds(cost, cached=True) == 5 + 3


def test_the_command_counts_pruned_experts(tmp_path, capsys):
    folder = config_only(tmp_path / "model", "qwen1.5")
    words = ["plan", "--model.name_or_path", str(folder), "--pruning.keep", "30", "--data.num_heldout_windows", "1"]
    main([*words, "--json", str(tmp_path / "plan.json")])
    assert json.loads((tmp_path / "plan.json").read_text())["job"]["kept_experts"] == 30


def test_time_is_work_over_rates():
    cost = Cost(flops=100, flops32=30, loop_bytes=8, read_bytes=5, written_bytes=5)
    assert Rates(flops=50, flops32=10, memory=4, disk=2).seconds(cost) == 2 + 3 + 2 + 5


def test_warnings_name_what_will_fail():
    moe, recipe = shapes("qwen1.5"), Recipe(bits=(4,), symmetric=True)
    grids, costs = recipe.grids(moe), plan(moe, recipe, JOB)
    messages = warnings(costs, grids, original_of(moe), memory=10**12, free=10**12)
    split = [line for line in messages if line.startswith("tensor parallelism over 2")]
    assert len(split) == 1 and "2048 x 1408 in groups of 128" in split[0]  # 11 groups do not halve
    assert not any(server in line and "refused" in line for line in messages for server in ("vllm", "sglang"))
    messages = warnings(costs, Recipe(bits=(3,)).grids(moe), original_of(moe), memory=10**9, free=10**6)
    assert any("compressed-tensors --target sglang will be refused" in line and "3 bits" in line for line in messages)
    assert not any("compressed-tensors --target vllm" in line for line in messages)
    assert any("GB of memory, but 1.0 GB are available" in line for line in messages)
    assert any("GB of disk, but 0.0 GB are free" in line for line in messages)


def test_a_run_for_one_engine_is_warned_of_that_engine_only(tmp_path, capsys):
    tiny_models.config_of("mixtral").save_pretrained(tmp_path)
    rates = ["--rate.flops", "1e12", "--rate.flops32", "1e12", "--rate.memory", "1e11", "--rate.disk", "1e9"]
    words = ["plan", "--config", "tiny", "--model.name_or_path", str(tmp_path), "--model.bits", "3", *rates]
    main([*words, "--model.quantizer", "kquant"])
    assert "--target vllm will be refused" in capsys.readouterr().out
    main([*words, "--model.target", "llama.cpp"])
    assert "will be refused" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "name",
    [
        name if name in ("gpt-oss-20b", "olmoe-1b-7b") else pytest.param(name, marks=pytest.mark.slow)
        for name in published.CONFIGS
        if name != "mixtral-8x7b"  # below
    ],
)
def test_configs_of_published_models_are_planned(name, tmp_path, capsys):
    """Groups divide every width, the engine loads the settings, and a card of 24 GB in a host of 64 GB is enough."""
    folder = published.save_config(name, tmp_path / "model")
    options = ["--config", name, "--model.name_or_path", str(folder), "--trainer.default_root_dir", str(tmp_path)]
    rates = ["--rate.flops", "4e14", "--rate.flops32", "4e13", "--rate.memory", "2e12", "--rate.disk", "2e9"]
    free = ["--available.memory", "2.4e10", "--available.host_memory", "6.4e10", "--available.disk", "1e13"]
    main(["plan", *options, *rates, *free, "--device", "cuda", "--json", str(tmp_path / "plan.json")])
    printed, result = capsys.readouterr().out, json.loads((tmp_path / "plan.json").read_text())
    assert f"{published.BILLIONS[name]} billion parameters" in printed and "memory, but" not in printed
    module, _, _ = parse_fit(options)
    if module.targets:
        moe = load_shapes(str(folder), module.dtype_name)
        choose(module.targets, module.recipe.grids(moe), original_of(moe))
    header = " ".join(line[2:] for line in (jobs.ROOT / "configs" / f"{name}.yaml").read_text().splitlines())
    memory, disk = result["peak_bytes"] / 1e9, sum(result["disk"].values()) / 1e9
    assert float(re.search(r"about (\d+) GB of memory", header)[1]) == pytest.approx(memory, abs=1)
    assert float(re.search(r"(\d+) GB of host memory", header)[1]) == pytest.approx(result["host_bytes"] / 1e9, abs=1)
    assert float(re.search(r"at most (\d+) GB beside", header)[1]) == pytest.approx(disk, abs=1)


@pytest.mark.parametrize("name, config", [("mixtral", "mixtral-8x7b"), ("qwen1.5", "qwen1.5-moe")])
def test_the_command_needs_a_config_json_only(name, config, tmp_path, capsys):
    folder = config_only(tmp_path / "model", name)
    words = ["plan", "--config", str(jobs.ROOT / "configs" / f"{config}.yaml"), "--model.name_or_path", str(folder)]
    words += ["--data.num_heldout_windows", "8", "--json", str(tmp_path / "plan.json")]
    words += ["--trainer.default_root_dir", str(tmp_path / "run"), "--rate.flops", "4e14", "--rate.flops32", "4e13"]
    main([*words, "--rate.memory", "2e12", "--rate.disk", "2e9", "--available.memory", "8e10"])
    printed, result = capsys.readouterr().out, json.loads((tmp_path / "plan.json").read_text())
    assert f"{BILLIONS[name]} billion parameters" in printed and "can be off by a factor of two" in printed
    assert result["rates"] == {"flops": 4e14, "flops32": 4e13, "memory": 2e12, "disk": 2e9}
    assert result["seconds"] == pytest.approx(sum(phase["seconds"] for phase in result["phases"].values()))
    assert {"observe", "attention", "router", "experts", "replay"} <= result["phases"].keys()
    assert not (tmp_path / "run").exists()  # nothing is created


def test_a_model_without_a_config_is_named(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["plan", "--model.name_or_path", str(tmp_path)])
    assert "weights are not needed" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words, message",
    [
        (["--processes", "0"], "--processes 0 is below 1"),
        (["--available.memory", "-5"], "--available.memory -5 is not a positive number"),
        (["--rate.flops", "-1"], "--rate.flops -1 is not a positive number"),
        (["--json", "/no/such/plan.json"], "/no/such/plan.json (--json) cannot be written"),
        (["--json", "."], ". (--json) cannot be written"),
    ],
)
def test_options_out_of_range_are_refused_before_any_work(words, message, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["plan", "--model.name_or_path", str(config_only(tmp_path / "model", "qwen1.5")), *words])
    printed = capsys.readouterr()
    assert message in printed.err and not printed.out


def test_fit_is_refused_if_the_disk_is_too_small(tmp_path, monkeypatch):
    moe, recipe = shapes("mixtral"), Recipe()
    use = disk_use(moe, recipe, JOB)
    assert use["hidden streams"] == 8 * 128 * 2048 * 4096 * 2
    usage = type("Usage", (), {"free": sum(use.values()) - 1})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    with pytest.raises(ValueError, match="--model.stream_dtype bfloat16"):
        check_disk(moe, recipe, JOB, tmp_path / "run")
    usage.free += 1
    assert "will take up to" in check_disk(moe, recipe, JOB, tmp_path / "run")


def test_sampled_windows_cost_a_forward_pass_each_and_the_whole_model_in_memory():
    moe = shapes("qwen3")
    without, sampled = (plan(moe, Recipe(), replace(JOB, sampled_windows=n)).phases["sample"] for n in (0, 64))
    assert without.flops == without.peak_bytes == 0
    weights = sum(parameter.numel() for parameter in moe.model.parameters())
    assert sampled.peak_bytes > 2 * weights
    # 3.3 billion of its parameters are active, and the embedding computes nothing
    assert sampled.flops / (64 * 2048) == pytest.approx(2 * 3.3e9, rel=0.15)
    cache = 48 * 2 * 4 * 128 * 2  # bytes a token
    batches = -(-64 // ((2 << 30) // (2048 * cache)))
    assert sampled.loop_bytes < batches * 2048 * 1.2 * 2 * weights
    two = plan(moe, Recipe(), replace(JOB, sampled_windows=64, processes=2)).phases["sample"]
    assert two.flops < 0.7 * sampled.flops
    costs = plan(moe, Recipe(), replace(JOB, sampled_windows=64))
    few = [line for line in warnings(costs, [], original_of(moe), 10**10, 10**12) if "sample" in line]
    assert len(few) == 1 and "self:URL" in few[0]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "name",
    [
        "mixtral",
        "gemma4_text",  # shared keys and values
        "glm_moe_dsa",  # shared top-k indices
        "llama4_text",  # the experts get a row for each of a token's experts
        "nemotron_h-latent",  # the experts read a projection
    ],
)
def test_the_streams_of_a_run_take_what_was_planned(name, tokenizer, tmp_path, monkeypatch):
    """Files only grow between two deletions, so their size before each of these holds the peak."""
    if name not in architectures.ARCHITECTURES:
        pytest.skip(f"this version of transformers has no {name}")
    architectures.build(name).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    run, peak = tmp_path / "run", [0]

    def measured(delete):
        def first(path, *args, **options):
            streams = [file for file in run.glob("streams/**/*") if file.is_file() and file.suffix != ".json"]
            peak[0] = max(peak[0], sum(file.stat().st_size for file in streams))
            return delete(path, *args, **options)

        return first

    monkeypatch.setattr(Path, "unlink", measured(Path.unlink))
    monkeypatch.setattr("shutil.rmtree", measured(shutil.rmtree))
    options = {"model__joint_epochs": 0, "data__num_windows": 6, "data__heldout": "[]"}
    jobs.fit(tmp_path / "model", run, **options)
    moe = load_shapes(str(tmp_path / "model"), "auto")
    planned = disk_use(moe, Recipe(group_size=32), Job(6, 64, 4, 0, "ridge", 1, 4, 0, 4, block_epochs=1))
    assert 0 < peak[0] <= planned["hidden streams"] <= 1.2 * peak[0]


def test_a_model_that_cannot_be_tried_is_counted_by_its_width(monkeypatch, caplog):
    moe = shapes("mixtral")
    monkeypatch.setattr(type(moe), "decoder_of_text", None)
    assert {(one.output, one.more, one.router_input) for one in passed_on(moe, 64)} == {(64 * 4096, 0, 64 * 4096)}
    assert "counts hidden states only" in caplog.text
