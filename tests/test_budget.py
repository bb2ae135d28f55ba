"""Bits chosen by size: sensitivities against direct computation, allocations, targets, and `fit`."""

import re
from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import architectures
import jobs
import pytest
import torch
from sizes import RECIPE, WINDOWS, measured, streamed
from transformers import AutoModelForCausalLM

from eacmoe_lightning import targets
from eacmoe_lightning.budget import measure as measuring
from eacmoe_lightning.budget.allocation import Allocator
from eacmoe_lightning.budget.probes import Probes, without_experts
from eacmoe_lightning.budget.rest import Rest
from eacmoe_lightning.budget.sensitivity import Sensitivity, interpolated, probe_name, read
from eacmoe_lightning.budget.target import BySize, SizeTarget, allocator_of, loading
from eacmoe_lightning.calibration.recipe import Recipe
from eacmoe_lightning.cli import main
from eacmoe_lightning.models.shrink import keep_experts
from eacmoe_lightning.models.streamed import StreamedModel
from eacmoe_lightning.pruning.rule import PruningRule
from eacmoe_lightning.run.hidden import hidden_of


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


@pytest.mark.parametrize("name, drops", [("gemma4_text", True), ("deepseek_v4", False), ("zaya", False)])
def test_sensitivities_of_routers_of_other_kinds(name, drops, tmp_path, tokenizer):
    """Missing experts are measured where experts can be removed: not where ids of tokens choose them."""
    architectures.build(name).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    options = jobs.options(tmp_path / "model", "none", data__num_windows=4)
    main(["sensitivity", "--output", str(tmp_path / "found"), "--widths", "3", "4", "--device", "cpu", *options])
    found = read(tmp_path / "found")
    assert bool(found.drops) == drops and found.damage


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
