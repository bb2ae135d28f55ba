"""The table of what other programs load: refusals of hand-set weights, the papers' models, `fit --model.target`."""

from dataclasses import replace

import pytest
from test_recipe import paper_model  # noqa: F401  (a fixture)

from eacmoe_lightning import targets
from eacmoe_lightning.calibration.recipe import Recipe
from eacmoe_lightning.cli import main
from eacmoe_lightning.job.qesc import QESC
from eacmoe_lightning.weight_grids import WeightGrid

VLLM, SGLANG = (targets.find("compressed-tensors", engine) for engine in ("vllm", "sglang"))
ROUTED = "model.layers.{}.mlp.experts.{}"


def expert(block: int = 0, projection: str = "down_proj", **fields) -> WeightGrid:
    """A 4-bit symmetric stack of experts that vLLM loads, with some fields replaced."""
    shape = (8, 256, 512) if projection == "down_proj" else (8, 1024, 256)
    fields = {"shape": shape, "bits": 4, "group_size": 128, "symmetric": True} | fields
    return WeightGrid(ROUTED.format(block, projection), block, "experts", **fields)


BOTH = [expert(), expert(projection="gate_up_proj")]


def linear(name: str, block: int = 0, **fields) -> WeightGrid:
    """A 4-bit symmetric linear of attention that vLLM loads, with some fields replaced."""
    fields = {"shape": (256, 256), "bits": 4, "group_size": 128, "symmetric": True} | fields
    return WeightGrid(f"model.layers.{block}.self_attn.{name}.weight", block, "attention", **fields)


@pytest.mark.parametrize(
    ("rows", "weights", "message"),
    [
        (SGLANG, [expert(bits=3)], "has 3 bits.*loads 4 or 8.*--model.bits"),
        (SGLANG, [expert(symmetric=False)], "asymmetric.*--model.symmetric true.*--format gptq_v2"),
        (VLLM, [expert(group_size=256)], "groups of 256.*32, 64 or 128.*--model.group_size"),
        (
            targets.find("gptq", "sglang"),
            [expert(), expert(1, bits=8)],
            "experts of the model have 4 bits.*and 8 bits.*would decode the others wrongly",
        ),
        (VLLM, [expert(), expert(projection="gate_up_proj", bits=8)], "experts of block 0 have 4 bits.*and 8 bits"),
        (
            VLLM,
            [expert(experts=(0, 1)), expert(experts=(2, 3), bits=8)],
            "experts of block 0 have 4 bits.*and 8 bits",
        ),
        (
            VLLM,
            [*BOTH, linear("q_proj", bits=8), linear("k_proj"), linear("v_proj")],
            "0.self_attn.q_proj, model.layers.0.self_attn.k_proj and .* have 4 bits.*8 bits.*loads them as one linear",
        ),
        (VLLM, [expert(symmetric=False, bits=8)], "is asymmetric.*loads experts of 8 bits only if symmetric"),
        (
            targets.find("gptq_v2", "vllm"),
            [expert(symmetric=False), linear("o_proj", bits=5)],
            "o_proj.weight is asymmetric.*loads attention of 5 bits only if symmetric",
        ),
        (VLLM, [expert(symmetric=False, shape=(8, 240, 512))], "240 x 512, but both must be multiples of 32"),
    ],
)
def test_what_servers_do_not_load_is_refused(rows, weights, message):
    assert targets.choose(rows, BOTH) == rows[0]
    with pytest.raises(ValueError, match=message) as refused:
        targets.choose(rows, weights)
    assert rows[0].name in str(refused.value) or "multiples" in message


def test_what_vllm_loads_since_0_32():
    """Any width, zero points, blocks that differ, and linears that differ from others but not within a whole."""
    experts = [
        expert(block, projection, bits=bits, symmetric=False)
        for block, bits in enumerate(range(2, 8))
        for projection in ("gate_up_proj", "down_proj")
    ]
    attention = [linear(name, bits=8 if name == "o_proj" else 6) for name in ("q_proj", "k_proj", "v_proj", "o_proj")]
    for form in ("compressed-tensors", "gptq_v2"):
        (row,) = targets.find(form, "vllm")
        assert row.problems([*experts, *attention]) == []
    (sglang,) = targets.find("gptq_v2", "sglang")
    assert sglang.problems([*experts, *attention]) == [] and sglang.launch == "--quantization humming"


def test_zero_points_need_rows_that_fill_words():
    """48 rows are no multiple of 32: symmetric weights store no zero points in compressed-tensors."""
    narrow = expert(shape=(8, 48, 512))
    assert VLLM[0].problems([narrow]) == []
    assert "multiples of 32" in VLLM[0].problems([replace(narrow, symmetric=False)])[0]
    halves = replace(narrow, name=ROUTED.format(0, "gate_up_proj"), shape=(8, 192, 512), bits=3)  # 96 rows each
    assert VLLM[0].problems([replace(halves, symmetric=False)], tensor_parallel=2)  # 48 rows of 3 bits: 4.5 words
    assert VLLM[0].problems([halves], tensor_parallel=2) == []


def test_a_part_that_is_left_decoded_leaves_its_whole_decoded():
    (row,) = targets.find("gptq", "vllm")
    narrow = linear("in_proj_b", shape=(4, 256))
    whole = [narrow, linear("in_proj_a", shape=(32, 256))]
    assert row.left_decoded([*BOTH, *whole, linear("o_proj")]) == whole


def test_what_no_trial_covered_is_reported():
    (row,) = targets.find("gguf", "llama.cpp")
    assert row.trial.untried([*BOTH, expert(bits=3, symmetric=False)]) == []
    odd = [expert(bits=3), expert(bits=6, symmetric=False), expert()]
    assert row.trial.untried(odd) == ["3 bit symmetric", "6 bit asymmetric"]
    single = replace(row.trial, mixed=False)
    assert single.untried([expert(bits=8), expert()]) == ["several bits in one model"] and not single.untried(BOTH)
    assert VLLM[0].trial.untried([*BOTH, expert(group_size=32)]) == ["groups of 32"]
    for target in targets.TARGETS:
        if target.trial is not None:
            assert target.trial.version in target.version and target.trial.how
            assert {*target.trial.symmetric, *target.trial.asymmetric} <= {*target.bits}
            assert not (target.symmetric and target.trial.asymmetric)


def test_gate_and_up_are_packed_one_by_one():
    """96 rows are a multiple of 32, but gate and up have 48 each."""
    (row,) = targets.find("gptq_v2", "gptqmodel")
    narrow = [replace(expert(projection="gate_up_proj"), shape=(8, 96, 256))]
    with pytest.raises(ValueError, match="has linears of 48 x 256, but both must be multiples of 32"):
        targets.choose([row], narrow)
    assert targets.choose([row], [replace(narrow[0], shape=(8, 128, 256))]) == row


def test_tensor_parallelism_splits_no_group():
    assert targets.choose(VLLM, BOTH, tensor_parallel=4) == VLLM[0]  # 512 inputs are 4 x 128
    with pytest.raises(ValueError, match="256 x 512 in groups of 128.*--tensor_parallel 8"):
        targets.choose(VLLM, BOTH, tensor_parallel=8)
    with pytest.raises(ValueError, match="tensor_parallel=0"):
        targets.choose(VLLM, BOTH, tensor_parallel=0)


def test_qwens_experts_of_1408_cannot_be_halved_in_groups_of_128(paper_model):  # noqa: F811
    """A case known from users of other tools: 704 is a multiple of 64, but not of 128."""
    moe = paper_model("qwen1.5-moe")
    recipe = Recipe(bits=(4,), symmetric=True, overrides={})
    assert targets.choose(VLLM, recipe.grids(moe)) == VLLM[0]
    with pytest.raises(ValueError, match=r"experts.down_proj is 2048 x 1408 in groups of 128.*23 of experts"):
        targets.choose(VLLM, recipe.grids(moe), tensor_parallel=2)
    assert targets.choose(VLLM, replace(recipe, group_size=64).grids(moe), tensor_parallel=2) == VLLM[0]


def test_a_recipes_grids_name_every_weight_and_the_experts_of_each_width(paper_model):  # noqa: F811
    moe = paper_model("mixtral-8x7b")
    grids = Recipe(bits=(3,), overrides={1: {"experts.2": 4, "experts.5.down_proj": 2}}).grids(moe)
    assert {grid.name for grid in grids} == {name for block in moe.blocks for name in block.weights()}
    experts_of_bits = {grid.bits: grid.experts for grid in grids if grid.name == ROUTED.format(1, "down_proj")}
    assert experts_of_bits == {2: (5,), 3: (0, 1, 3, 4, 6, 7), 4: (2,)}
    assert [g.experts for g in grids if g.name == ROUTED.format(0, "down_proj")] == [None]


def test_a_format_is_chosen_by_what_it_loads():
    rows = targets.find(engine="gptqmodel")
    assert targets.choose(rows, [replace(weight, symmetric=False) for weight in BOTH]).format == "gptq_v2"
    assert targets.choose(targets.find("gptq"), BOTH).engine == "gptqmodel"
    with pytest.raises(ValueError, match="--format gguf --target llama.cpp"):
        targets.find("gguf", "vllm")
    with pytest.raises(ValueError, match="--format, --target or both"):
        targets.find()


# --- calibrating for a target


def test_a_target_changes_nothing_but_what_it_needs():
    """A target is part of a run's identity only through the options that it changes."""
    plain = QESC(bits=4).recipe.record()
    assert not plain["symmetric"]
    assert QESC(bits=4, target="sglang").recipe == QESC(bits=4, symmetric=True).recipe
    for engine in ("gptqmodel", "vllm"):
        assert QESC(bits=4, target=engine).recipe.record() == plain
    assert QESC(bits=4, target="llama.cpp").recipe.record() == plain | {"quantizer": "kquant"}
    assert QESC(bits=4, target="llama.cpp", quantizer="gptq").recipe.record() == plain


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": "4", "overrides": "{1: {experts.3: 8}}"}, "would decode the others wrongly"),
        ({"bits": "4", "group_size": "16"}, "loads 32, 64 or 128"),
        ({"bits": "4", "tensor_parallel": "4"}, "--tensor_parallel 4"),
    ],
)
def test_fit_refuses_options_that_contradict_the_target(options, message, tiny_model_dir, tmp_path, capsys):
    arguments = [f"--model.{name}={value}" for name, value in options.items()]
    with pytest.raises(SystemExit):
        main(
            ["fit", f"--model.name_or_path={tiny_model_dir('mixtral')}", "--model.target=vllm", "--model.group_size=32"]
            + [f"--trainer.default_root_dir={tmp_path / 'run'}", "--trainer.accelerator=cpu", "--data.num_windows=2"]
            + ["--data.window_length=32", "--trainer.enable_progress_bar=false", *arguments]
        )
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run" / "run.json").exists()
