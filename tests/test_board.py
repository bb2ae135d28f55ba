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
            **{f"quality_details/perplexity/original/{t}": v["original"] for t, v in RESULT["perplexity"].items()},
            "quality_details/perplexity/weight_damage/prose": 10.5,
            "quality_details/perplexity/weight_damage/code": 4.5,
            **{f"quality_details/expert_shift/{r}/{t}": v for r, v in RATES.items() for t in ("prose", "code")},
        }
    )


def test_the_divergence_is_among_what_models_are_judged_by():
    figures = {"kl": {"mean": 0.1, "error": 0.01, "p99": 2.0}, "same_top": 0.9, "same_top_error": 0.1, "tokens": 63}
    figures |= {"rms_dp": 0.05, "by_confidence": [{"from": 0.0, "to": 1.0, "kl": 0.1}]}
    streams = {"compressed": figures, "noise_floor": {"kl": {"mean": 0.001}, "same_top": 0.99}}
    result = RESULT | {"divergence": {"mean": {}, "texts": {"prose": streams, "code": streams}, "blocks": []}}
    scalars = heldout_scalars(result, "test")
    texts, means = ("prose", "code"), ("prose", "code", "mean_of_texts")
    assert {
        tag: value for tag, value in scalars.items() if tag not in heldout_scalars(RESULT, "test")
    } == pytest.approx(
        {
            **{f"test/{figure}/{text}": value for figure, value in (("kl", 0.1), ("same_top", 0.9)) for text in means},
            **{
                f"test_details/{figure}/{text}": value
                for figure, value in (("kl/p99", 2.0), ("rms_dp", 0.05), ("noise_floor/kl", 0.001))
                for text in texts
            },
            **{f"test_details/noise_floor/same_top/{text}": 0.99 for text in texts},
        }
    )


def test_any_number_of_a_text_becomes_a_scalar():
    """Also what the evaluation measures some day."""
    answers = {"mean": 0.5, "flips": 3}
    result = RESULT | {"answers": {"prose": answers, "code": answers}, "elsewhere": {"german": answers}}
    scalars = heldout_scalars(result, "quality")
    assert {tag: value for tag, value in scalars.items() if tag not in heldout_scalars(RESULT, "quality")} == {
        **{f"quality/answers/{text}": 0.5 for text in ("prose", "code", "mean_of_texts")},
        **{f"quality_details/answers/flips/{text}": 3 for text in ("prose", "code")},
    }


def test_an_original_alone_has_a_perplexity():
    result = {"perplexity": {"prose": {"original": 10.0}}, "tokens": {"prose": 100}, "expert_shift": {}}
    assert heldout_scalars(result, "validate") == {"validate/perplexity/prose": 10.0}


def test_runs_are_compared_by_quality_size_and_time():
    report = {
        "bits": {"nominal": 3.0, "true": 3.2},
        "size_bytes": {"original": 8e6, "compressed": 2e6},
        "cost": {"total_seconds": 60.0},
    }
    finished = report_scalars(report)
    assert finished == {"size/bits_per_weight": 3.2, "size/megabytes": 2.0, "cost/total_seconds": 60.0}
    tags = compared(heldout_scalars(RESULT, "quality"), finished)
    assert tags == [
        "quality/loss_increase/mean_of_texts",
        *finished,
        *("quality/loss_increase/prose", "quality/loss_increase/code"),
    ]


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
