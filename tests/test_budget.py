"""Bits chosen by size: sensitivities against direct computation, allocations, targets, and `fit`."""

import json
import re
import shutil
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import architectures
import jobs
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM

from eacmoe_lightning import targets
from eacmoe_lightning.budget import measure as measuring
from eacmoe_lightning.budget.allocation import Allocator
from eacmoe_lightning.budget.measure import Text, measure
from eacmoe_lightning.budget.probes import Probes, without_experts
from eacmoe_lightning.budget.rest import Rest
from eacmoe_lightning.budget.sensitivity import Sensitivity, interpolated, probe_name, read
from eacmoe_lightning.budget.target import BySize, SizeTarget, allocator_of, loading
from eacmoe_lightning.calibration.recipe import Recipe
from eacmoe_lightning.cli import main
from eacmoe_lightning.compressed.format import read_config
from eacmoe_lightning.compressed.loading import load
from eacmoe_lightning.compressed.sizes import stored_parts
from eacmoe_lightning.job.chosen_bits import ChosenBits
from eacmoe_lightning.models.checkpoint import Checkpoint
from eacmoe_lightning.models.moe import MoEModel
from eacmoe_lightning.models.shrink import keep_experts
from eacmoe_lightning.models.streamed import StreamedModel
from eacmoe_lightning.pruning.rule import PruningRule
from eacmoe_lightning.run.hidden import hidden_of

RECIPE = Recipe(group_size=32, min_expert_tokens=32, symmetric=False)
WINDOWS = torch.randint(0, 256, (10, 32), generator=torch.Generator().manual_seed(1))
OPTIONS = {"model__block_epochs": 0, "model__joint_epochs": 0, "data__heldout": "[bundled:prose]"}


def streamed(folder: Path) -> StreamedModel:
    return StreamedModel(Checkpoint(str(folder), "float32"))


def measured(folder: Path, output: Path, **more) -> Sensitivity:
    return measure(streamed(folder), RECIPE, Text(WINDOWS), output, {}, num_probes=2, batch_size=3, **more)


@pytest.fixture
def sensitivity(once, tiny_model_dir):
    """`sensitivity(family)`: the sensitivities of a tiny model, measured once."""

    def of(family: str) -> tuple[StreamedModel, Sensitivity]:
        folder = once(f"sensitivity-{family}", lambda path: measured(tiny_model_dir(family), path))
        moe = streamed(tiny_model_dir(family))
        RECIPE.check(moe)
        return moe, read(folder)

    return of


# --- what is measured


@torch.no_grad()
def test_a_probe_is_the_whole_model_with_one_part_changed(tiny_model_dir, tmp_path):
    folder = tiny_model_dir("deepseek")  # its first block is dense
    moe, generator = streamed(folder), torch.Generator().manual_seed(0)
    probes = Probes(moe, WINDOWS, 4, tmp_path)
    changes = {}
    for index in range(len(moe.blocks)):
        with moe.loaded(index) as block:
            for part in ("attention", "shared", "experts"):
                weights = {n: w for n, (of, w) in block.weights().items() if of == part}
                original = {n: w.clone() for n, w in weights.items()}
                for name, weight in weights.items():
                    weight += 0.1 * weight.std() * torch.randn(weight.shape, generator=generator)
                    changes[f"{index}.{part}", name] = block.as_parameter(name, weight.clone())
                if weights:
                    probes.add(block, f"{index}.{part}")
                for name, weight in weights.items():
                    weight.copy_(original[name])
            probes.advance(block)
    found = probes.divergences()
    assert len(found) == 8
    for probe in found:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        base = model(WINDOWS, use_cache=False).logits[:, :-1].log_softmax(-1)
        for (name, parameter), value in changes.items():
            if name == probe:
                model.get_parameter(parameter).copy_(value)
        other = model(WINDOWS, use_cache=False).logits[:, :-1].log_softmax(-1)
        kl = (base.exp() * (base - other)).sum(-1).mean()
        assert found[probe] == pytest.approx(float(kl), rel=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
def test_errors_of_experts_are_those_of_the_experts_outputs(family, tiny_model_dir, tmp_path, monkeypatch):
    """Recomputed with the experts' own forward pass and one weight of one expert replaced."""
    kept = {}
    errors_of = measuring._expert_errors

    def keep(block, original, rows, routing):
        errors = errors_of(block, original, rows, routing)
        quantized = {n: w.clone() for n, (part, w) in block.weights().items() if part == "experts"}
        kept[block.index] = (original, quantized, rows[:], routing, errors)
        return errors

    monkeypatch.setattr(measuring, "_expert_errors", keep)
    found = measured(tiny_model_dir(family), tmp_path, widths=(2,))
    moe = streamed(tiny_model_dir(family))
    original, quantized, x, routing, errors = kept[1]
    with moe.loaded(1) as block:
        before = block.experts.module(x, routing.ids, routing.weights)
        load = torch.bincount(routing.ids.flatten(), minlength=block.num_experts)
        weights = {n: w for n, (part, w) in block.weights().items() if part == "experts"}
        for name, weight in weights.items():
            projection = name.rpartition(".")[2]
            for e in range(block.num_experts):
                weight[e] = quantized[name][e]
                change = block.experts.module(x, routing.ids, routing.weights) - before
                weight[e] = original[name][e]
                if load[e] >= measuring.FEWEST:
                    expected = float(change.square().sum() / load[e])
                    assert errors[projection][e] == pytest.approx(expected, rel=1e-3)
                    assert found.blocks[1]["error"][projection]["2"][e] == errors[projection][e]
        assert found.blocks[1]["load"] == load.tolist() and int(load.max()) <= measuring.TOKENS


def test_a_killed_measurement_goes_on_to_the_same_bits(tiny_model_dir, tmp_path):
    class Killed(Exception): ...

    def kill(at: int, block: int) -> None:
        if block == at:
            raise Killed

    for at in (0, 1):
        with pytest.raises(Killed):
            measured(tiny_model_dir("deepseek"), tmp_path / "killed", on_block=partial(kill, at))
    measured(tiny_model_dir("deepseek"), tmp_path / "killed")
    measured(tiny_model_dir("deepseek"), tmp_path / "whole")
    assert jobs.contents(tmp_path / "killed") == jobs.contents(tmp_path / "whole")
    assert not (tmp_path / "killed" / "streams").exists()
    again = read(tmp_path / "whole")
    (tmp_path / "whole" / "streams" / "rank_0_of_1").mkdir(parents=True)  # as if killed before it was removed
    assert measured(tiny_model_dir("deepseek"), tmp_path / "whole") == again
    assert not (tmp_path / "whole" / "streams").exists()
    with pytest.raises(ValueError, match="--output.*widths was .2, 3, 4. and is now .2, 4.*another --output"):
        measured(tiny_model_dir("deepseek"), tmp_path / "whole", widths=(2, 4))


# --- from sensitivities to widths


def test_between_and_beyond_measured_widths():
    at = {2: 16.0, 3: 4.0, 4: 2.0}
    assert [interpolated(at, w) for w in (2, 3, 4)] == pytest.approx([16, 4, 2])
    assert interpolated(at, 2.5) == pytest.approx(8) and interpolated(at, 1) == pytest.approx(64)
    assert interpolated(at, 5) == pytest.approx(1) and interpolated(at, 6) == pytest.approx(0.5)
    assert interpolated({2: 64.0, 3: 1.0}, 4) == pytest.approx(1 / 4)  # no faster than rounding errors fall
    assert interpolated({2: 1.0, 3: 2.0}, 4) == pytest.approx(0.5)  # a loss that grows with the bits is noise
    assert interpolated({3: 4.0}, 5) == pytest.approx(1 / 4)


def test_experts_share_their_blocks_damage(sensitivity):
    moe, found = sensitivity("qwen3_moe")
    for block in moe.moe_blocks:
        for width in (2, 2.5, 4, 6):
            experts = found.experts(block.index, width)
            assert sum(map(sum, experts.values())) == pytest.approx(found.part(block.index, "experts", width))
            assert min(map(min, experts.values())) > 0  # also of an expert that no calibration token selects


def test_experts_count_by_the_square_root_of_their_tokens():
    """So that experts which other texts select are not given up for the calibration text."""
    block = {"load": [100, 4, 0], "error": {"down_proj": {"2": [1.0, 4.0, 1.0], "3": [0.25, 1.0, 0.25]}}}
    found = Sensitivity({}, (2, 3), [block], {probe_name(0, "experts", w): d for w, d in ((2, 0.72), (3, 0.18))})
    assert replace(found, unknown=0).experts(0, 2)["down_proj"] == pytest.approx([0.4, 0.32, 0])  # 10 : 2 * 4
    busy, rare, unseen = found.experts(0, 3)["down_proj"]
    assert busy > rare > unseen > 0 and busy + rare + unseen == pytest.approx(0.18)


def test_the_size_is_met_and_more_bytes_lose_less(sensitivity):
    moe, found = sensitivity("deepseek")
    for granularity in ("expert", "projection", "block", "model"):
        allocator = Allocator(RECIPE, moe, found, granularity)
        last = float("inf")
        for bits in (2.9, 3.2, 4, 5):
            allocation = allocator.allocate(bits * allocator.num_weights / 8)
            recipe = replace(RECIPE, overrides=allocation.overrides)
            grids = recipe.grids(moe)
            sizes = sum(torch.Size(g.shape).numel() * (g.bits + 24 / 32) / 8 for g in grids)
            assert sizes == pytest.approx(allocation.nbytes) and allocation.bits <= bits
            assert allocation.damage < last
            last = allocation.damage
            widths = {(g.block, g.name.rpartition(".")[2]): set() for g in grids if g.part == "experts"}
            for g in grids:
                if g.part == "experts":
                    widths[g.block, g.name.rpartition(".")[2]].add(g.bits)
            if granularity != "expert":
                assert all(len(w) == 1 for w in widths.values())
            if granularity in ("block", "model"):
                assert all(len({*w}) == 1 for w in widths.values())
                by_block = {b: {w for (c, _), ws in widths.items() if c == b for w in ws} for b, _ in widths}
                assert all(len(w) == 1 for w in by_block.values())
            if granularity == "model":
                assert len({w for ws in widths.values() for w in ws}) == 1


def test_overrides_stay_and_count(sensitivity):
    moe, found = sensitivity("qwen3_moe")
    fixed = {0: {"attention": 8, "experts.1": 7, "experts.2.down_proj": 6}, 1: {"experts.down_proj": 5}}
    recipe = replace(RECIPE, overrides=fixed)
    allocator = Allocator(recipe, moe, found)
    allocation = allocator.allocate(4.0 * allocator.num_weights / 8)
    chosen = replace(RECIPE, overrides=allocation.overrides)
    assert chosen.grid(0, 2, "attention").bits == 8
    assert chosen.expert_bits(0, 2, "gate_up_proj", [1]) == chosen.expert_bits(0, 2, "down_proj", [1]) == (7,)
    assert chosen.expert_bits(0, 2, "down_proj", [2]) == (6,)
    assert set(chosen.expert_bits(1, 2, "down_proj", range(4))) == {5}
    assert allocation.bits <= 4 and allocation.bits > 3.9


@pytest.mark.parametrize("engine", targets.ENGINES)
def test_what_comes_out_is_what_the_target_loads(engine, sensitivity):
    """At a low, a middle and a high size; refused sizes name one that can be had."""
    moe, found = sensitivity("qwen3_moe")
    rows = targets.for_calibration(engine)
    recipe, rest = replace(RECIPE, symmetric=rows[0].symmetric), Rest(0, torch.float32)
    allocator = allocator_of(recipe, moe, rows)
    for share in (0, 0.4, 1):
        bits = 8 * (allocator.smallest + share * (allocator.largest - allocator.smallest)) / allocator.num_weights
        try:
            allocation = BySize(SizeTarget(bits=bits * 1.0001), recipe, moe, rows, rest, found).allocate()
        except ValueError as error:
            assert "comes within 1 %" in str(error) and 0 < share < 1
            nearest = float(re.search(r"--model.target_bits ([\d.]+)", str(error))[1])
            allocation = BySize(SizeTarget(bits=nearest), recipe, moe, rows, rest, found).allocate()
        chosen = replace(recipe, overrides=allocation.overrides)
        assert targets.choose(rows, chosen.grids(moe)).engine == engine


def test_a_format_is_chosen_by_what_overrides_fix(sensitivity):
    """Asymmetric experts of 8 bits are loaded from gptq_v2 alone, and that takes no attention of 5 bits."""
    moe, found = sensitivity("qwen3_moe")
    rows = targets.for_calibration("vllm")
    assert [row.format for row in loading(RECIPE, moe, rows)] == ["compressed-tensors", "gptq_v2"]
    recipe = replace(RECIPE, overrides={1: {"experts": 8}})
    assert [row.format for row in loading(recipe, moe, rows)] == ["gptq_v2"]
    for bits in (5.2, 5.4, 5.7, 6.2):
        choice = BySize(SizeTarget(bits=bits), recipe, moe, loading(recipe, moe, rows), Rest(0, torch.float32), found)
        choice.check()
        assert 5 not in [keys["attention"] for keys in choice.allocate().overrides.values()]


def test_sizes_between_the_choices(sensitivity):
    """What is refused by bytes alone is what no choice has, counted one by one."""
    moe, _ = sensitivity("qwen3_moe")
    allocator = allocator_of(replace(RECIPE, symmetric=True), moe, targets.for_calibration("transformers"))
    sums = {0.0}
    for unit in allocator.units.values():
        sums = {round(total + point.nbytes, 3) for total in sums for point in unit.points}
    for share in torch.linspace(0.01, 1, 40).tolist():
        wanted = allocator.smallest + share * (allocator.largest - allocator.smallest)
        most = max(total for total in sums if total <= wanted)
        assert most <= allocator.most_within(wanted) <= most * 1.001


def test_missing_experts_between_measured_shares():
    found = Sensitivity({"drops": [0.5, 0.25]}, (2,), [], {"all.drop.0.25": 1.0, "all.drop.0.5": 4.0})
    assert [found.dropped(share) for share in (0, 0.125, 0.25, 0.375, 0.5, 0.75)] == [0, 0.5, 1, 2.5, 4, 7]


def test_the_share_that_is_missing_is_stored(tiny_model_dir, tmp_path):
    """Of 8 experts, 2 of which a token selects: a twentieth is none, 0.3 are 2, and 0.9 leave the needed two."""
    found = measured(tiny_model_dir("mixtral"), tmp_path, widths=(2, 4), drops=(0.05, 0.25, 0.3, 0.9))
    assert found.drops == [0.25, 0.75] and {n for n in found.damage if "drop" in n} == {
        "all.drop.0.25",
        "all.drop.0.75",
    }
    assert measured(tiny_model_dir("mixtral"), tmp_path, widths=(2, 4), drops=(0.25, 0.75)) == found


@pytest.mark.parametrize(
    "words, message",
    [
        (["--widths", "3"], "--widths 3 is one width: pass two or more"),
        (["--widths", "3", "3.0"], "--widths 3 is one width"),
        (["--drops", "25"], "--drops 25 is no share of the experts between 0 and 1"),
        (["--drops", "0.5", "1"], "--drops 1 is no share"),
        (["--drops", "0"], "--drops 0 is no share"),
        (["--drops", "-0.5"], "--drops -0.5 is no share"),
        (["--probe_windows", "0"], "--probe_windows 0 of 8 calibration windows"),
        (["--probe_windows", "8"], "pass 1 to 7"),
        (["--model.quantizer", "none"], "--model.quantizer none quantizes nothing"),
        (["--data.num_windows", "1"], "--data.num_windows 1: measuring takes 2 calibration windows or more"),
    ],
)
def test_bad_options_of_a_measurement(words, message, tiny_model_dir, tmp_path, capsys):
    options = jobs.options(tiny_model_dir("mixtral"), "none")
    with pytest.raises(SystemExit):
        main(["sensitivity", "--output", str(tmp_path / "out"), *options, *words])
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_lattice_has_rates_between_the_measured_widths(sensitivity):
    moe, found = sensitivity("qwen3_moe")
    recipe = Recipe(quantizer="lattice", symmetric=False)
    allocator = Allocator(recipe, moe, found)
    allocation = allocator.allocate(1.8 * allocator.num_weights / 8)
    assert 1.78 < allocation.bits <= 1.8


# --- fit


@pytest.mark.parametrize("size", ["target_bits", "target_gb"])
def test_a_run_has_the_size_that_was_asked_for(size, tiny_model_dir, sensitivity, tmp_path):
    folder = tiny_model_dir("deepseek")
    moe, _ = sensitivity("deepseek")
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


@pytest.mark.parametrize("name, drops", [("gemma4_text", True), ("deepseek_v4", False), ("zaya", False)])
def test_sensitivities_of_routers_of_other_kinds(name, drops, tmp_path, tokenizer):
    """Missing experts are measured where experts can be removed: not where ids of tokens choose them."""
    architectures.build(name).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    options = jobs.options(tmp_path / "model", "none", data__num_windows=4)
    main(["sensitivity", "--output", str(tmp_path / "found"), "--widths", "3", "4", "--device", "cpu", *options])
    found = read(tmp_path / "found")
    assert bool(found.drops) == drops and found.damage


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


@torch.no_grad()
@pytest.mark.parametrize("family", ["qwen3_moe", "qwen2_moe", "deepseek"])
def test_a_block_without_experts_selects_like_one_that_has_lost_them(family, tiny_model_dir):
    moe, dropped = streamed(tiny_model_dir(family)), [0, 2]
    index = moe.moe_blocks[-1].index
    state = torch.randn(2, 16, moe.config.hidden_size, generator=torch.Generator().manual_seed(0))
    with moe.loaded(index) as block:
        call = moe.call(index, WINDOWS[:2, :16], state)
        with without_experts(block, dropped):
            output, routing = block.forward(call)
        keep_experts(block, [e for e in range(block.num_experts) if e not in dropped])
        expected, shrunk = block.forward(call)
        assert torch.equal(routing.ids.sort().values, block.original_ids(shrunk.ids).sort().values)
        torch.testing.assert_close(hidden_of(output), hidden_of(expected))


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


def test_overrides_of_experts_that_may_go_bound_no_size(sensitivity, tiny_model_dir):
    moe, found = sensitivity("mixtral")
    rest, pruning = Rest.of(moe, str(tiny_model_dir("mixtral"))), PruningRule(keep=4, criterion="reap")
    found = replace(found, blocks=[block | {"score": [float(e) for e in range(8)]} for block in found.blocks])
    going = {0, 1, 2, 3}
    kept = {block.index: list(range(4)) for block in moe.moe_blocks}
    least = allocator_of(RECIPE, moe, [], kept=kept).smallest
    target = SizeTarget(bits=1.001 * 8 * least / allocator_of(RECIPE, moe, []).num_weights)
    for numbers, sensitivities, is_refused in (
        (going, None, False),
        (going, found, False),
        ({4, 5, 6, 7}, found, True),
        ({4, 5, 6, 7}, None, False),
        ({3, 4, 5, 6, 7}, None, True),  # one of them stays
    ):
        recipe = replace(RECIPE, overrides={0: {f"experts.{e}": 8 for e in numbers}})
        choice = BySize(target, recipe, moe, [], rest, sensitivities, pruning=pruning)
        with pytest.raises(ValueError, match="below") if is_refused else nullcontext():
            choice.check()
    most = 8 * allocator_of(RECIPE, moe, [], kept=kept).largest / allocator_of(RECIPE, moe, []).num_weights
    for low, is_refused in ((4, False), (8, True)):
        recipe = replace(RECIPE, overrides={0: {f"experts.{e}": 2 for e in range(low)}})
        choice = BySize(SizeTarget(bits=most), recipe, moe, [], rest, pruning=pruning)
        with pytest.raises(ValueError, match="above") if is_refused else nullcontext():
            choice.check()


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
