"""Every causal MoE type of transformers, tiny: fitted, loaded, run, skipped, exported and resumed.

`docs/models.py` makes the table in `docs/models.md` of the same steps.
"""

import importlib.util
import re
import sys
from collections.abc import Callable

import architectures
import jobs
import pytest
import tiny_models
import torch
import transformers
from architecture_trial import STEPS, Trial, assert_perplexity, fit, text
from joint_trial import assert_equals_the_whole
from torch.nn import functional as F
from torch.utils._pytree import tree_map_only
from transformers import AutoModelForCausalLM, PreTrainedModel

from eacmoe_lightning import gptqmodel, load
from eacmoe_lightning.models.moe import MoEModel
from eacmoe_lightning.models.pruned_config import pruned_config
from eacmoe_lightning.models.shrink import keep_experts
from eacmoe_lightning.pruning.rule import PruningRule
from eacmoe_lightning.run.hidden import hidden_of

QUICK = (
    "deepseek_v3", "gemma4_text", "glm_moe_dsa", "gpt_oss", "granitemoehybrid", "jamba", "lfm2_moe", "llama4_text",
    "minimax_m2", "qwen3_5_moe_text",
)  # fmt: skip

# What transformers itself does not do: a model that is generated from without a cache gives other tokens.
UNEQUAL_WITHOUT_CACHE = {
    "deepseek_v32": "scores of its indexer tie",
    "doge": "its routing mixes the tokens of a sequence",
}

# Architectures that are refused before anything is computed, and a part of the message.
REFUSED = {
    "dbrx": "its config has experts (moe_num_experts=8)",
    "doge": "its config has experts (num_experts=64)",
    "inkling2_loop_text": "runs model.layers.2 more than once in a forward pass",
    "jetmoe": "its config has experts (num_local_experts=8)",
    "longcat_flash": "the model has no list of 4 decoder layers",
}

SUPPORTED = [name for name in architectures.ARCHITECTURES if name not in REFUSED]


def each(*steps: str, quick: bool = True) -> pytest.MarkDecorator:
    """Parametrises by supported architecture and step; all but the quick ones are slow."""
    rows = []
    for name in SUPPORTED:
        for step in steps:
            marks = [] if quick and name in QUICK else [pytest.mark.slow]
            rows.append(pytest.param(name, step, marks=marks, id=f"{name}-{step}"))
    return pytest.mark.parametrize("name, step", rows)


def slow_unless_quick(names) -> pytest.MarkDecorator:
    rows = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in names]
    return pytest.mark.parametrize("name", rows)


@pytest.fixture(scope="module")
def trial(tmp_path_factory, tokenizer) -> Callable[[str], Trial]:
    trials: dict[str, Trial] = {}

    def of(name: str) -> Trial:
        if name not in trials:
            trials[name] = Trial(name, tmp_path_factory.mktemp(name), tokenizer)
        return trials[name]

    return of


# --- the models themselves, in plain transformers


@slow_unless_quick(architectures.ARCHITECTURES)
@torch.no_grad()
def test_transformers_saves_loads_and_runs_it(name, tmp_path):
    model = architectures.build(name)
    ids = torch.randint(1, tiny_models.VOCABULARY, (2, 64), generator=torch.Generator().manual_seed(0))
    logits = model(ids, use_cache=False).logits
    assert logits.isfinite().all()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    # on some CPUs the order of sums depends on where weights lie in memory
    torch.testing.assert_close(loaded(ids, use_cache=False).logits, logits, rtol=1e-5, atol=1e-5)
    options = {"attention_mask": torch.ones(2, 24, dtype=torch.long), "max_new_tokens": 8, "do_sample": False}
    words, same = (model.generate(ids[:, :24], use_cache=c, pad_token_id=0, **options) for c in (True, False))
    assert words.shape == (2, 32)
    assert torch.equal(words, same) == (name not in UNEQUAL_WITHOUT_CACHE)


@slow_unless_quick(SUPPORTED)
@torch.no_grad()
def test_tokens_differ_in_their_experts(name):
    """In every block at least four experts are selected, and none has three quarters of the selections."""
    model, loads = architectures.build(name), []
    ids = torch.randint(1, tiny_models.VOCABULARY, (2, 64), generator=torch.Generator().manual_seed(0))
    moe = MoEModel(model)
    for block in moe.moe_blocks:
        block.watch_router(lambda routing, _: loads.append(torch.bincount(routing.ids.flatten(), minlength=8)))
    model(ids)
    assert len(loads) == len(moe.moe_blocks)
    assert all((load > 0).sum() >= 4 and load.max() < 0.75 * load.sum() for load in loads), loads


@slow_unless_quick(architectures.ARCHITECTURES)
@torch.no_grad()
def test_routing_is_neither_uniform_nor_that_of_the_scores_alone(name):
    """Scaled router weights and correction biases both change what the model computes."""
    ids = torch.randint(1, tiny_models.VOCABULARY, (2, 64), generator=torch.Generator().manual_seed(0))
    model = architectures.build(name)
    logits = model(ids, use_cache=False).logits
    changed = [
        (tiny_models.CORRECTION, architectures.build(name)),
        (tiny_models.ROUTER, architectures.build(name)),
    ]
    for pattern, other in changed:
        tensors = [t for key, t in other.state_dict().items() if pattern.search(key)]
        for tensor in tensors:
            tensor.zero_()
        assert not tensors or not torch.allclose(other(ids, use_cache=False).logits, logits, atol=1e-3)


@slow_unless_quick(SUPPORTED)
def test_a_block_whose_experts_run_one_by_one_is_the_block(name):
    """So the block stage trains what the model computes."""
    ids = torch.randint(1, tiny_models.VOCABULARY, (2, 64), generator=torch.Generator().manual_seed(0))
    moe, state = MoEModel(architectures.build(name).float()), None
    for block in moe.blocks:
        experts = block.experts
        expert = (lambda e, x, experts=experts: experts.output(x, e)) if block.is_moe else None
        expected, _ = block.forward(moe.call(block.index, ids, state))
        output, _ = block.forward(moe.call(block.index, ids, state), expert=expert)
        torch.testing.assert_close(hidden_of(output), hidden_of(expected), rtol=1e-4, atol=1e-5)
        state = tree_map_only(torch.Tensor, torch.Tensor.detach, expected)


@slow_unless_quick(SUPPORTED)
@torch.no_grad()
def test_without_some_experts_it_is_what_its_config_says(name, tmp_path):
    moe = MoEModel(architectures.build(name).float())
    kept = [e for e in range(moe.moe_blocks[0].num_experts) if e % 4 != 1]  # as many of each group
    try:
        PruningRule(keep=len(kept)).check(moe)
    except ValueError as error:
        assert "no expert can be removed" in str(error)
        return
    for block in moe.moe_blocks:
        keep_experts(block, kept)
    moe.model.config = pruned_config(moe.model.config, moe)
    moe.model.save_pretrained(tmp_path)
    ids = torch.randint(1, tiny_models.VOCABULARY, (2, 32), generator=torch.Generator().manual_seed(0))
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    expected = moe.model(ids, use_cache=False).logits
    torch.testing.assert_close(reloaded(ids, use_cache=False).logits, expected, rtol=1e-4, atol=1e-5)


# --- fit, load, use, export


@slow_unless_quick(SUPPORTED)
def test_the_joint_stage_block_by_block_is_the_pass_of_the_whole_model(name, trial):
    if (error := trial(name).passes("fit")) is not None:
        raise error
    assert_equals_the_whole(trial(name).original, trial(name).run)


@each(*STEPS)
def test_step(name, step, trial):
    error = trial(name).passes(step)
    if step == "gptq_v2" and architectures.model_type(name) not in gptqmodel.PACKED:
        assert isinstance(error, ValueError) and "GPTQModel 7.7.0 does not load packed experts" in str(error)
        assert "--format dense" in str(error) and not (trial(name).folder / "gptq").exists()
    elif error is not None:
        raise error


@pytest.mark.parametrize("name", [name for name in REFUSED if name in architectures.ARCHITECTURES])
def test_what_is_refused_is_refused_before_anything_is_computed(name, trial):
    message = str(trial(name).passes("fit"))
    assert trial(name).is_refused and name in message and REFUSED[name] in message


@each("bfloat16", quick=False)
def test_perplexity_in_bfloat16(name, step, trial, tmp_path):
    """With the parts in float32 that transformers keeps so."""
    if not trial(name).has_float32_parts:
        pytest.skip("transformers keeps nothing of it in float32")
    original = trial(name).stored_in(torch.bfloat16)
    report = fit(original, tmp_path / "run", "bfloat16", bits=4)
    assert_perplexity(report["perplexity"]["prose"]["original"], original, torch.bfloat16)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["deepseek_v3", "gpt_oss", "granitemoe", "jamba", "qwen3_next"])
def test_the_joint_stage_does_not_worsen_what_the_model_itself_computes(name, trial, tmp_path):
    """Trained on 256 tokens of a random model it may lose a few percent; another target would cost a multiple."""
    original = AutoModelForCausalLM.from_pretrained(trial(name).original, dtype=torch.float32).eval()
    runs = {epochs: tmp_path / str(epochs) for epochs in (0, 2)}
    for epochs, run in runs.items():
        fit(trial(name).original, run, bits=3, joint_epochs=epochs)
    heldout = text().heldout_windows["prose"]
    without, joint = (divergence(original, load(run, packed=False), heldout) for run in runs.values())
    assert joint < 1.1 * without


@torch.no_grad()
def divergence(original: PreTrainedModel, other: PreTrainedModel, ids: torch.Tensor) -> float:
    """Mean KL divergence of a model's predictions from the original's, in nats per token."""
    expected, got = (model(ids, use_cache=False).logits.log_softmax(-1).flatten(0, 1) for model in (original, other))
    return float(F.kl_div(got, expected, log_target=True, reduction="batchmean"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gemma4_text", "glm4_moe", "jamba", "minimax_m2"])
def test_a_killed_job_ends_like_an_undisturbed_one(name, trial, tmp_path):
    places = [["phase", "1 attention", 1], ["phase", "1 replay", 1], ["phase", "2 router", 1]]
    jobs.attempts(trial(name).original, tmp_path / "killed", places, {})
    jobs.attempts(trial(name).original, tmp_path / "undisturbed", [], {})
    for part in ("blocks", "compressed"):
        assert jobs.contents(tmp_path / "killed" / part) == jobs.contents(tmp_path / "undisturbed" / part)


# --- the page


PAGE = (jobs.ROOT / "docs" / "models.md").read_text()
VERSION = re.search(r"transformers (5\.\d+\.\d+)", PAGE)[1]
of_this_version = pytest.mark.skipif(
    transformers.__version__ != VERSION,
    reason=f"docs/models.md is of transformers {VERSION}, this is {transformers.__version__}",
)


def models_page():
    spec = importlib.util.spec_from_file_location("models_page", jobs.ROOT / "docs" / "models.py")
    script = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = script  # for its dataclasses
    spec.loader.exec_module(script)
    return script


def lines_of(name: str, page: str) -> list[str]:
    """The row of an architecture, and what does not work with it."""
    return [line for line in page.splitlines() if line.startswith((f"| {name} |", f"- `{name}`, "))]


@of_this_version
@slow_unless_quick(architectures.ARCHITECTURES)
def test_the_page_has_these_results(name, trial):
    script = models_page()
    made = script.page([script.row(trial(name))], VERSION)
    assert lines_of(name, made) == lines_of(name, PAGE), "run `python docs/models.py`: docs/models.md is older"


@of_this_version
def test_the_page_has_nothing_else():
    frame, failures = models_page().page([], VERSION).splitlines(), ["", "## What does not work", ""]
    found = [line for name in architectures.ARCHITECTURES for line in lines_of(name, PAGE)]
    expected = frame + failures * any(line.startswith("- ") for line in found)
    assert [line for line in PAGE.splitlines() if line not in found] == expected


def test_the_page_has_every_architecture():
    rows = re.findall(r"^\| (\w\S*) \| (?:yes|no|refused) ", PAGE, re.MULTILINE)
    assert rows == list(architectures.SETTINGS)


def test_a_row_of_the_page():
    script = models_page()
    passed = script.Row("good", dict.fromkeys(script.COLUMNS, ""), False, ("gguf",), {"conv.weight": "convolution"})
    refused = script.Row("odd", {"fit": "ValueError: odd"}, True, (), {})
    failed = script.Row("bad", {"fit": "TypeError: a|b in /some/where/file.py"}, False, (), {})
    lines = script.page([passed, refused, failed], "5.0.0").splitlines()
    assert "| good | yes | yes | yes | yes | yes |  | yes | `conv` (convolution) |" in lines
    assert "| odd | refused |  |  |  |  |  |  |  |" in lines
    assert "| bad | no |  |  |  |  |  |  |  |" in lines
    assert lines[-1] == r"- `bad`, fit: TypeError: a\|b in file.py"
