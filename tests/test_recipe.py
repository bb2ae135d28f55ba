"""Recipes: the bits of each block and part, the paper's averages, and the options that are refused."""

import pytest
import tiny_models
import torch
from transformers import AutoModelForCausalLM, MixtralConfig, PhimoeConfig, Qwen2MoeConfig

from eacmoe_lightning.calibration.recipe import Recipe, nominal_bits, num_quantized
from eacmoe_lightning.models.moe import MoEModel

# the fields of the published config.json that determine the sizes
PAPER_MODELS = {
    "phi-3.5-moe": PhimoeConfig(
        vocab_size=32064, hidden_size=4096, intermediate_size=6400, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, num_local_experts=16, num_experts_per_tok=2, attention_bias=True, lm_head_bias=True,
    ),
    "qwen1.5-moe": Qwen2MoeConfig(
        vocab_size=151936, hidden_size=2048, intermediate_size=5632, moe_intermediate_size=1408,
        shared_expert_intermediate_size=5632, num_hidden_layers=24, num_attention_heads=16, num_key_value_heads=16,
        num_experts=60, num_experts_per_tok=4,
    ),
    "mixtral-8x7b": MixtralConfig(
        vocab_size=32000, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, num_local_experts=8, num_experts_per_tok=2,
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def paper_model():
    models: dict[str, MoEModel] = {}

    def build(name: str) -> MoEModel:
        if name not in models:
            with torch.device("meta"):
                models[name] = MoEModel(AutoModelForCausalLM.from_config(PAPER_MODELS[name]))
        return models[name]

    return build


def bits_of(recipe: Recipe, num_blocks: int, part: str = "experts") -> list[int]:
    return [recipe.grid(block, num_blocks, part).bits for block in range(num_blocks)]


# --- bits of each block and part


def test_a_list_of_bits_splits_the_blocks_into_equal_parts():
    assert bits_of(Recipe(bits=(3, 2)), 8) == [3] * 4 + [2] * 4
    assert bits_of(Recipe(bits=(3, 2)), 7) == [3] * 4 + [2] * 3
    assert bits_of(Recipe(bits=(4, 3, 2)), 6) == [4, 4, 3, 3, 2, 2]
    assert bits_of(Recipe(bits=(2,)), 3) == [2] * 3
    assert bits_of(Recipe(bits=(5, 4, 3)), 3) == [5, 4, 3]


def test_shared_experts_follow_the_routed_ones_and_attention_does_not():
    recipe = Recipe(bits=(3, 2), attention_bits=5)
    assert bits_of(recipe, 4, "shared") == [3, 3, 2, 2] and bits_of(recipe, 4, "attention") == [5] * 4
    assert bits_of(Recipe(bits=(3, 2), shared_expert_bits=8), 4, "shared") == [8] * 4


def test_overrides_change_one_part_of_one_block():
    recipe = Recipe(
        bits=(2,), group_size=64, overrides={1: {"experts": 4, "group_size": 32}, 2: {"attention": 8, "shared": 6}}
    )
    assert bits_of(recipe, 4) == [2, 4, 2, 2]
    assert bits_of(recipe, 4, "shared") == [2, 2, 6, 2]  # an override of the routed experts leaves shared ones alone
    assert bits_of(recipe, 4, "attention") == [4, 4, 8, 4]
    assert [recipe.grid(block, 4, "attention").group_size for block in range(4)] == [64, 32, 64, 64]


def test_the_most_specific_override_of_experts_and_projections_wins():
    recipe = Recipe(
        bits=(2,),
        overrides={
            1: {"experts": 3, "experts.2": 5, "experts.down_proj": 4, "experts.0.down_proj": 8},
            2: {"experts.3": 6},
        },
    )
    assert recipe.expert_bits(0, 3, "down_proj", range(4)) == (2, 2, 2, 2)
    assert recipe.expert_bits(1, 3, "gate_up_proj", range(4)) == (3, 3, 5, 3)
    assert recipe.expert_bits(1, 3, "down_proj", range(4)) == (8, 4, 5, 4)
    assert recipe.expert_bits(1, 3, "down_proj", [0, 2]) == (8, 5)  # a pruned block: the original's numbers
    assert recipe.expert_bits(2, 3, "up_proj", range(4)) == (2, 2, 2, 6)


def test_nominal_bits_count_every_expert():
    """Mixtral of 3 blocks, 8 experts of 3 x 64 x 64, attention 64 x (64 + 32 + 32 + 64)."""
    moe = MoEModel(tiny_models.build("mixtral"))
    experts, attention = 8 * 3 * 64 * 64, 64 * (64 + 32 + 32 + 64)
    recipe = Recipe(bits=(2,), overrides={0: {"experts.7": 4}, 1: {"experts.down_proj": 5}})
    total = 3 * (2 * experts + 4 * attention) + 2 * experts / 8 + 3 * experts / 3
    assert nominal_bits(moe, recipe) == pytest.approx(total / (3 * (experts + attention)))


def test_symmetric_and_clip_search_reach_the_grid():
    for flag in (True, False):
        grid = Recipe(symmetric=flag, clip_search=not flag).grid(0, 1, "experts")
        assert (grid.symmetric, grid.clip_search) == (flag, not flag)


# --- the paper's averages


@pytest.mark.parametrize(
    "model, bits, expected",
    [
        ("phi-3.5-moe", (3,), 3.03),
        ("phi-3.5-moe", (3, 2), 2.55),
        ("phi-3.5-moe", (2,), 2.06),
        ("qwen1.5-moe", (3,), 3.03),
        ("qwen1.5-moe", (3, 2), 2.54),
        ("qwen1.5-moe", (2,), 2.06),
        ("mixtral-8x7b", (3,), 3.03),
        ("mixtral-8x7b", (2,), 2.06),
    ],
)
def test_nominal_bits_match_the_paper(paper_model, model, bits, expected):
    assert nominal_bits(paper_model(model), Recipe(bits=bits)) == pytest.approx(expected, abs=0.01)


def test_quantized_weights_of_qwen_counted_by_hand(paper_model):
    attention, experts, shared = 4 * 2048**2, 60 * 3 * 2048 * 1408, 3 * 2048 * 5632
    assert num_quantized(paper_model("qwen1.5-moe")) == 24 * (attention + experts + shared)
    three = (4 * attention + 3 * (experts + shared)) / (attention + experts + shared)
    assert nominal_bits(paper_model("qwen1.5-moe"), Recipe(bits=(3,))) == pytest.approx(three)


@pytest.mark.parametrize("family", tiny_models.MOE_FAMILIES)
def test_nominal_bits_of_one_width_is_that_width(family):
    moe = MoEModel(tiny_models.build(family))
    assert nominal_bits(moe, Recipe(bits=(5,), attention_bits=5)) == 5


# --- what is refused


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"bits": (1,)}, "bits=1 (--model.bits)"),
        ({"bits": (9,)}, "bits=9 (--model.bits)"),
        ({"bits": (3, 1)}, "bits=1 (--model.bits)"),
        ({"bits": (2.5,)}, "bits=2.5 (--model.bits)"),
        ({"bits": ()}, "--model.bits"),
        ({"attention_bits": 16}, "attention_bits=16 (--model.attention_bits)"),
        ({"shared_expert_bits": 1}, "(--model.shared_expert_bits)"),
        ({"group_size": 0}, "group_size=0 (--model.group_size)"),
        ({"group_size": -128}, "group_size=-128 (--model.group_size)"),
        ({"group_size": 12}, "group_size=12 (--model.group_size)"),
        ({"quantizer": "awq"}, "quantizer='awq' (--model.quantizer)"),
        ({"damping": 0.0}, "damping=0.0 (--model.damping)"),
        ({"damping": float("nan")}, "damping=nan (--model.damping)"),
        ({"min_expert_tokens": 0}, "min_expert_tokens=0 (--model.min_expert_tokens)"),
        ({"overrides": {1: {"experts": 1}}}, "overrides.1.experts=1"),
        ({"overrides": {1: {"group_size": 4}}}, "overrides.1.group_size=4"),
        ({"overrides": {1: {"router": 4}}}, "overrides.1.router (--model.overrides)"),
        ({"overrides": {1: {"experts.03": 4}}}, "overrides.1.experts.03 (--model.overrides)"),
        ({"overrides": {1: {"experts.gate_proj": 4}}}, "overrides.1.experts.gate_proj (--model.overrides)"),
        ({"overrides": {1: {"experts.3": 9}}}, "overrides.1.experts.3=9"),
    ],
)
def test_bad_fields_are_named(fields, message):
    with pytest.raises(ValueError) as error:
        Recipe(**fields)
    assert message in str(error.value)


@pytest.mark.parametrize(
    "fields, message",
    [
        (
            {"group_size": 128},
            "in_features=64 is not a multiple of group_size=128 (--model.group_size). Pass 64 for all blocks",
        ),
        (
            {"group_size": 64, "overrides": {2: {"group_size": 128}}},
            "model.layers.2.self_attn.q_proj.weight: in_features=64",
        ),
        (
            {"group_size": 64, "overrides": {3: {"experts": 2}}},
            "overrides (--model.overrides) name block 3, but the model has blocks 0 to 2",
        ),
        ({"group_size": 64, "overrides": {-1: {"experts": 2}}}, "(--model.overrides) name block -1"),
        (
            {"group_size": 64, "overrides": {2: {"experts.8": 4}}},
            "overrides.2.experts.8 (--model.overrides): block 2 has experts 0 to 7",
        ),
        (
            {"group_size": 64, "overrides": {2: {"experts.1.up_proj": 4}}},
            "the experts' projections are gate_up_proj and down_proj",
        ),
        ({"group_size": 64, "bits": (2, 2, 3, 3)}, "bits (--model.bits) lists 4 parts, more than the model's 3 blocks"),
    ],
)
def test_a_recipe_that_does_not_fit_the_model_is_refused(fields, message):
    moe = MoEModel(tiny_models.build("mixtral"))
    with pytest.raises(ValueError) as error:
        Recipe(**fields).check(moe)
    assert message in str(error.value)
    Recipe(group_size=64).check(moe)


def test_a_dense_block_has_no_experts_to_override():
    moe = MoEModel(tiny_models.build("deepseek"))
    with pytest.raises(ValueError, match="overrides.0.experts .*block 0 has no routed experts"):
        Recipe(group_size=64, overrides={0: {"experts": 4}}).check(moe)


def test_the_group_size_that_an_error_proposes_fits():
    """DeepSeek's dense first block: 192 inputs in the tiny model, 10944 in the real one."""
    moe = MoEModel(tiny_models.build("deepseek"))
    with pytest.raises(ValueError, match="in_features=64 .*group_size=192"):
        Recipe(group_size=192).check(moe)
    Recipe(group_size=192, overrides={i: {"group_size": 64} for i in range(3)}).check(moe)
