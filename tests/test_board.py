"""What a run shows in TensorBoard: tags and values of results, hyperparameters, blocks; and the event files of runs."""

import math

import pytest

from eacmoe_lightning.evaluation.board import (
    block_scalars,
    compared,
    heldout_scalars,
    hyperparameters,
    report_scalars,
)
from eacmoe_lightning.run.block_file import BlockStats, Reconstruction, RemovedExperts

RATES = {"any": 0.4, "half": 0.2, "all": 0.1, "selections": 0.25}
RESULT = {
    "perplexity": {
        "prose": {"original": 10.0, "compressed": 11.0, "weight_damage": 10.5},
        "code": {"original": 4.0, "compressed": 5.0, "weight_damage": 4.5},
    },
    "tokens": {"prose": 100, "code": 200},
    "expert_shift": {"mean": RATES, "texts": {"prose": RATES, "code": RATES}, "blocks": []},
}


def test_quality_is_one_scalar_a_text_and_its_mean():
    scalars = heldout_scalars(RESULT, "quality")
    lost = {"prose": math.log(1.1), "code": math.log(1.25)}
    assert scalars == pytest.approx(
        {
            "quality/perplexity/prose": 11.0,
            "quality/perplexity/code": 5.0,
            "quality/loss_increase/prose": lost["prose"],
            "quality/loss_increase/code": lost["code"],
            "quality/loss_increase/mean_of_texts": (lost["prose"] + lost["code"]) / 2,
            **{f"quality/expert_shift/{rate}": value for rate, value in RATES.items()},
            **{f"quality_details/perplexity/{t}/original": v["original"] for t, v in RESULT["perplexity"].items()},
            "quality_details/perplexity/prose/weight_damage": 10.5,
            "quality_details/perplexity/code/weight_damage": 4.5,
        }
    )


def test_any_figure_of_a_text_becomes_a_scalar():
    """Also what the evaluation measures some day; curves and lists do not."""
    divergence = {"mean": 0.1, "percentiles": {"99": 2.0}, "by_confidence": [0.1, 0.2]}
    result = RESULT | {"kl": {"prose": divergence, "code": divergence | {"mean": 0.3}}, "other": {"german": {"a": 1}}}
    scalars = heldout_scalars(result, "test")
    new = {tag: value for tag, value in scalars.items() if tag not in heldout_scalars(RESULT, "test")}
    assert new == pytest.approx(
        {
            **{"test/kl/prose": 0.1, "test/kl/code": 0.3, "test/kl/mean_of_texts": 0.2},
            **{f"test_details/kl/{text}/percentiles/99": 2.0 for text in ("prose", "code")},
        }
    )


def test_an_original_alone_has_a_perplexity():
    result = {"perplexity": {"prose": {"original": 10.0}}, "tokens": {"prose": 100}, "expert_shift": {}}
    assert heldout_scalars(result, "validate") == {"validate/perplexity/prose": 10.0}


def test_runs_are_compared_by_quality_size_and_time():
    report = {
        "bits": {"nominal": 3.0, "true": 3.2},
        "size_bytes": {"original": 8e6, "compressed": 2e6},
        "cost": {"total_seconds": 60.0},
    }
    assert report_scalars(report) == {"size/bits_per_weight": 3.2, "size/megabytes": 2.0, "cost/total_seconds": 60.0}
    tags = compared(heldout_scalars(RESULT, "quality"))
    assert tags == [f"quality/loss_increase/{text}" for text in ("mean_of_texts", "prose", "code")]


def test_hyperparameters_are_numbers_and_words():
    settings = {
        "model.name_or_path": "/models/Mixtral-8x7B/",
        "model.bits": [3],
        "model.block_lr": {"router": 0.003, "norm": 0.0, "scale": 0.003, "code": 0.0004},
        "model.router_method": "ridge",
        "model.overrides": {0: {"experts": 4}},
        "data.calibration": {"text": "bundled:calibration", "self": "self:125"},
        "pruning.keep": 15,
        "pruning.alpha": None,
    }
    chosen = hyperparameters(settings, seed=7)
    assert chosen == {
        "model": "Mixtral-8x7B",
        "bits": 3,
        "router_method": "ridge",
        **{"block_router_lr": 0.003, "block_norm_lr": 0.0, "block_scale_lr": 0.003, "block_code_lr": 0.0004},
        "calibration": "{'text': 'bundled:calibration', 'self': 'self:125'}",
        "keep": 15,
        "seed": 7,
    }
    assert hyperparameters(settings | {"model.bits": [3, 2]}, 0)["bits"] == "[3, 2]"


def test_a_value_of_a_block_has_the_same_tag_in_every_block():
    """So that it is one curve over the blocks, wherever the blocks lie in the model."""
    by_block = []
    for index in (2, 11):
        name = f"model.language_model.layers.{index}"
        stats = BlockStats(
            index,
            name,
            {f"{name}.self_attn.q_proj.weight": 0.01, f"{name}.mlp.experts.down_proj": 0.2},
            {when: RATES for when in ("before", "after")},
            starved=[4],
            pruning=RemovedExperts([0, 1, 4], [2, 3], 0.125, [], []),
            reconstruction=Reconstruction([0.5, 0.3, 0.4], 1, 0.05),
        )
        by_block.append(block_scalars(stats))
    assert by_block[0] == by_block[1] == {
        "quantization_error/self_attn.q_proj": 0.01,
        "quantization_error/mlp.experts.down_proj": 0.2,
        **{f"expert_shift/{rate}/{when}": value for rate, value in RATES.items() for when in ("before", "after")},
        "experts/starved": 1,
        "pruning/experts": 3,
        "pruning/removed_selections": 0.125,
        "blocks/codes_moved": 0.05,
        "blocks/pass_taken": 1,
        "blocks/output_error/before_training": 0.5,
        "blocks/output_error/after_training": 0.3,
    }  # fmt: skip
    assert block_scalars(BlockStats(0, "model.layers.0")) == {}  # a dense block of which nothing is quantized
