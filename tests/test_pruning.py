"""Static pruning: rules and scores by hand, and pruned models against full models with masked routers."""

import json
import re
from pathlib import Path

import jobs
import pytest
import tiny_models
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DeepseekV3Config, GptOssConfig

from eacmoe_lightning.cli import main
from eacmoe_lightning.compressed.directory import save_compressed
from eacmoe_lightning.compressed.loading import load
from eacmoe_lightning.evaluation.evaluate import evaluate
from eacmoe_lightning.exports.export import export
from eacmoe_lightning.models.experts import Groups
from eacmoe_lightning.models.moe import MoEModel
from eacmoe_lightning.models.pruned_config import pruned_config
from eacmoe_lightning.models.shrink import keep_experts
from eacmoe_lightning.pruning.rule import PruningRule
from eacmoe_lightning.pruning.scores import ExpertScores, measured
from eacmoe_lightning.run.ranks import Ranks
from eacmoe_lightning.text.documents import read_documents
from eacmoe_lightning.text.windows import token_windows

families = pytest.mark.parametrize("family", tiny_models.MOE_FAMILIES)


# --- which experts stay


def test_the_best_stay():
    scores = torch.tensor([3.0, 1, 4, 1, 5, 9, 2, 6])
    assert PruningRule(keep=3).choose(scores, top_k=2) == [4, 5, 7]
    assert PruningRule(keep=7).choose(scores, top_k=2) == [0, 1, 2, 4, 5, 6, 7]  # of equal scores the first
    assert PruningRule(keep=8).choose(scores, top_k=2) == list(range(8))
    assert PruningRule(keep=4).choose(scores, top_k=2, num_groups=2) == [0, 2, 5, 7]


def test_the_papers_rule():
    """100 tokens, top-2, 4 experts: those below alpha * 100 * 2 / 4 = 50 alpha are removed."""
    load = torch.tensor([120.0, 15, 50, 15], dtype=torch.float64)
    assert PruningRule(alpha=0.3).choose(load, top_k=2) == [0, 1, 2, 3]  # 15 is not below 15
    assert PruningRule(alpha=0.31).choose(load, top_k=2) == [0, 2]
    assert PruningRule(alpha=1.0).choose(load, top_k=2) == [0, 2]
    starved = torch.tensor([199.0, 0, 0, 1])
    assert PruningRule(alpha=1.0).choose(starved, top_k=2) == [0, 3]  # never fewer than top_k
    assert PruningRule(alpha=1.0).below_alpha(starved, [0, 3]) == [3]
    assert PruningRule(alpha=0.3).below_alpha(load, [0, 1, 2, 3]) == PruningRule(keep=2).below_alpha(load, [1, 3]) == []


@pytest.mark.parametrize(
    "options, message",
    [
        ({"criterion": "magic", "keep": 3}, "--pruning.criterion"),
        ({"alpha": 0.0}, "alpha=0.0 (--pruning.alpha)"),
        ({"alpha": 1.5}, "alpha=1.5 (--pruning.alpha)"),
        ({"alpha": -0.1}, "--pruning.alpha"),
        ({"alpha": 0.5, "keep": 3}, "pass one"),
        ({}, "pass one"),
        ({"keep": 3, "kept": {0: [0, 0, 1]}}, "kept[0]=[0, 0, 1] (--pruning.kept) does not name keep=3"),
        ({"keep": 3, "kept": {0: [0, 1]}}, "does not name keep=3 (--pruning.keep) different experts"),
    ],
)
def test_bad_rules(options, message):
    with pytest.raises(ValueError) as error:
        PruningRule(**options)
    assert message in str(error.value)


@pytest.mark.parametrize("keep, numbers", [(1, ("keep=1", "top_k=2")), (9, ("keep=9", "num_experts=8"))])
def test_a_number_that_does_not_fit_the_model(keep, numbers):
    with pytest.raises(ValueError) as error:
        PruningRule(keep=keep).check(MoEModel(tiny_models.build("mixtral")))
    assert all(number in str(error.value) for number in numbers)


@pytest.mark.parametrize(
    "family, kept, message",
    [
        ("mixtral", {0: [0, 1]}, "of the blocks [0]: name those of [0, 1, 2], the blocks with experts"),
        ("mixtral", {0: [0, 1], 1: [2, 8], 2: [0, 3]}, "kept[1] (--pruning.kept): there is no expert 8, only 0 to 7"),
        ("deepseek_v3", {1: [0, 1, 2, 4], 2: [0, 1, 4, 5]}, "equally many experts of each of the 2 groups"),
    ],
)
def test_known_experts_that_do_not_fit_the_model(family, kept, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        PruningRule(keep=len(kept[max(kept)]), kept=kept).check(MoEModel(build(family)))


# --- scores


@torch.no_grad()
def test_scores_by_hand():
    """Experts are multiples of the identity, so that the norms of their outputs are known."""
    model = tiny_models.build("mixtral")
    block = MoEModel(model).blocks[0]
    module = block.experts.module
    gate_up, down = torch.zeros_like(module.gate_up_proj), torch.zeros_like(module.down_proj)
    gate_up[:, :64] = 40 * torch.eye(64)  # silu(40 x) is 40 x for x = 1 and 0 for x = -1
    gate_up[:, 64:] = torch.eye(64)
    for e in range(8):
        down[e] = (e + 1) / 40 * torch.eye(64)
    module.gate_up_proj.copy_(gate_up), module.down_proj.copy_(down)
    x = -torch.ones(3, 64)
    x[0, :4], x[1, :9], x[2, :16] = 1, 1, 1  # expert e returns e + 1 where x is 1: norms 2, 3, 4 times e + 1
    ids, weights = torch.tensor([[0, 1], [1, 5], [5, 1]]), torch.tensor([[0.75, 0.25], [0.5, 0.5], [0.9, 0.1]])
    scores = ExpertScores(block, "reap")
    scores.add(x[:2], ids[:2], weights[:2])
    scores.add(x[2:], ids[2:], weights[2:])
    expected = torch.zeros(8, dtype=torch.float64)
    expected[0] = 0.75 * 2
    expected[1] = (0.25 * 2 * 2 + 0.5 * 2 * 3 + 0.1 * 2 * 4) / 3
    expected[5] = (0.5 * 6 * 3 + 0.9 * 6 * 4) / 2
    torch.testing.assert_close(scores.finish(Ranks()), expected)
    assert scores.load.tolist() == [1, 3, 0, 0, 0, 2, 0, 0]
    by_load = ExpertScores(block, "frequency")
    by_load.add(x, ids, weights)
    assert by_load.finish(Ranks()).tolist() == [1, 3, 0, 0, 0, 2, 0, 0]


@families
@torch.no_grad()
def test_scores_of_a_running_model(family):
    """Compared with the experts' module, run with one expert at a time."""
    moe = MoEModel(tiny_models.build(family))
    block = moe.moe_blocks[1]
    ids = torch.arange(40).view(2, 20)
    call = moe.call(block.index, ids, moe.embed(ids))
    seen = []
    handle = block.experts.module.register_forward_pre_hook(lambda module, args: seen.append(args))
    with measured(block, "reap") as scores:
        _, routing = block.forward(call)
    handle.remove()
    x, ids, weights = seen[0]
    values = scores.finish(Ranks())
    assert scores.load.tolist() == [int((routing.ids == e).sum()) for e in range(8)]
    for e in range(8):
        norms = [
            block.experts.module(x[n : n + 1], torch.tensor([[e]]), weights[n : n + 1, k : k + 1]).norm()
            for n, k in (ids == e).nonzero().tolist()
        ]
        assert float(values[e]) == pytest.approx(float(sum(norms)) / max(len(norms), 1), rel=1e-4)


# --- a pruned model is the full one with the removed experts' logits at minus infinity

CORRECTED = {
    "deepseek_v3": DeepseekV3Config(
        **{**tiny_models.COMMON, "num_key_value_heads": 4}, intermediate_size=96, moe_intermediate_size=32,
        n_routed_experts=8, num_experts_per_tok=2, n_group=2, topk_group=1, n_shared_experts=1, first_k_dense_replace=1,
        q_lora_rank=32, kv_lora_rank=32, qk_rope_head_dim=8, qk_nope_head_dim=16, v_head_dim=16,
    ),
    "gpt_oss": GptOssConfig(
        **tiny_models.COMMON, head_dim=16, intermediate_size=64, num_local_experts=8, num_experts_per_tok=2,
    ),
}  # fmt: skip


def build(family: str):
    if family in tiny_models.MOE_FAMILIES:
        return tiny_models.build(family)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = AutoModelForCausalLM.from_config(CORRECTED[family], dtype=torch.float32, attn_implementation="eager")
        with torch.no_grad():
            for name, tensor in model.state_dict().items():
                if name.endswith(("bias", "gate.weight", "router.weight")):
                    tensor.normal_(std=0.3)
    return model.eval()


def mask(block, removed: list[int]) -> None:
    """Makes the router of a full model never choose the removed experts."""
    bias = getattr(block.router, "e_score_correction_bias", None)
    if bias is not None:
        bias[removed] = -torch.inf
    elif block.router_bias is not None:
        block.router_bias[removed] = -torch.inf
    else:  # the product with the router's weight gives minus infinity for the removed experts
        forward = block.router.forward
        weight, linear = block.router_weight, torch.nn.functional.linear

        def masked(x, w, b=None):
            out = linear(x, w, b)
            return out.index_fill(-1, torch.tensor(removed, dtype=torch.int64), -torch.inf) if w is weight else out

        def with_mask(hidden, *args, **kwargs):
            torch.nn.functional.linear = masked
            try:
                return forward(hidden, *args, **kwargs)
            finally:
                torch.nn.functional.linear = linear

        block.router.forward = with_mask


@pytest.mark.parametrize("family", [*tiny_models.MOE_FAMILIES, *CORRECTED])
@torch.no_grad()
def test_a_pruned_model_is_the_masked_full_one(family, tmp_path):
    full, pruned = MoEModel(build(family)), MoEModel(build(family))
    rules = {0: [0, 2, 3, 5, 6, 7], 1: [1, 2, 3, 4, 5, 6], 2: [0, 1, 3, 4, 5, 7]}  # as many of 0-3 as of 4-7
    for block, twin in zip(full.moe_blocks, pruned.moe_blocks, strict=True):
        kept = rules[block.index]
        mask(block, [e for e in range(8) if e not in kept])
        keep_experts(twin, kept)
        keep_experts(twin, kept)  # changes nothing the second time
        assert twin.num_experts == 6 and twin.router_weight.shape[0] == 6
        assert twin.original_ids(torch.tensor([[0, 5]])).tolist() == [[kept[0], kept[5]]]
    tokens = torch.arange(3, 99).view(2, 48) * 7
    expected = full.model(tokens).logits
    assert expected.isfinite().all()
    torch.testing.assert_close(pruned.model(tokens).logits, expected, rtol=1e-5, atol=1e-5)
    # the config is an ordinary one, from which any program builds the pruned model
    config = pruned_config(pruned.model.config, pruned)
    pruned.model.config = config
    pruned.model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["kept_experts"].keys() <= {"0", "1", "2"}
    reloaded, info = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, output_loading_info=True, attn_implementation="eager"
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    torch.testing.assert_close(reloaded.eval()(tokens).logits, expected, rtol=1e-5, atol=1e-5)


def test_groups_of_a_router():
    moe = MoEModel(build("deepseek_v3"))
    assert Groups.of(moe.moe_blocks[0]) == Groups(2, 1) and Groups(2, 1).least(3) == 3 and Groups(4, 2).least(2) == 2
    assert Groups.of(MoEModel(build("mixtral")).blocks[0]) == Groups(1, 1)
    PruningRule(keep=4).check(moe)
    for rule, message in ((PruningRule(alpha=0.3), "--pruning.keep"), (PruningRule(keep=5), "2 groups")):
        with pytest.raises(ValueError, match=message):
            rule.check(moe)
    with pytest.raises(ValueError, match="2 are needed"):
        PruningRule(keep=2).check(moe)


# --- our format


@families
@pytest.mark.parametrize("uniform", [True, False])
@torch.no_grad()
def test_a_pruned_model_in_our_format(family, uniform, tiny_model_dir, tmp_path):
    """The original, pruned in memory, saved without quantization and loaded packed and decoded."""
    model = tiny_model_dir(family)
    moe = MoEModel(AutoModelForCausalLM.from_pretrained(model).eval())
    for i, block in enumerate(moe.moe_blocks):
        keep_experts(block, [0, 2, 3, 7] if uniform else [1, 3, 4, 6, 7][: 5 - i])
    save_compressed(tmp_path / "saved", moe, str(model), [{} for _ in moe.blocks], {"quantizer": "none"})
    config = json.loads((tmp_path / "saved" / "config.json").read_text())["original"]["config"]
    numbers = {value for name, value in config.items() if name in ("num_experts", "num_local_experts")}
    numbers |= {config["n_routed_experts"]} if "n_routed_experts" in config else set()
    assert numbers == {4 if uniform else 8}
    tokens = torch.arange(3, 99).view(2, 48) * 7
    for packed in (True, False):
        reloaded = load(tmp_path / "saved", packed=packed)
        assert torch.equal(reloaded(tokens).logits, moe.model(tokens).logits)
    assert [block.kept.tolist() for block in MoEModel(reloaded).moe_blocks] == [b.kept.tolist() for b in moe.moe_blocks]


# --- whole runs


def kept_by_hand(model: Path, criterion: str, keep: int) -> list[list[int]]:
    """The best experts of every block over the calibration windows, from one pass of the original."""
    moe = MoEModel(AutoModelForCausalLM.from_pretrained(model).eval())
    tokenizer = AutoTokenizer.from_pretrained(model)
    windows = token_windows(read_documents("bundled:calibration[:10%]"), tokenizer, 8, 64, seed=0)
    seen = []
    for block in moe.moe_blocks:
        block.experts.module.register_forward_pre_hook(lambda module, args: seen.append(args))
    with torch.no_grad():
        moe.model(windows)
        best = []
        for block, (x, ids, weights) in zip(moe.moe_blocks, list(seen), strict=True):
            values = []
            for e in range(8):
                tokens, slots = (ids == e).nonzero(as_tuple=True)
                alone = torch.full((len(tokens), 1), e)
                output = block.experts.module(x[tokens], alone, weights[tokens, slots][:, None])
                values.append(len(tokens) if criterion == "frequency" else float(output.norm(dim=-1).mean()))
            best.append(sorted(sorted(range(8), key=lambda e: -values[e])[:keep]))
    return best


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:LightningCLI's args", "ignore:.*deprecated")
@pytest.mark.parametrize(
    "family, criterion, options",
    [
        ("qwen2_moe", "reap", {"model__joint_epochs": 1}),
        ("deepseek", "frequency", {"model__router_method": "sgd", "model__joint_epochs": 1}),
        ("phimoe", "reap", {"model__router_method": "none"}),
    ],
)
def test_a_run_that_prunes_and_quantizes(family, criterion, options, tiny_model_dir, tmp_path):
    model = tiny_model_dir(family)
    run = jobs.fit(model, tmp_path / "run", pruning__criterion=criterion, pruning__keep=5, **options)
    report = json.loads((run / "report.json").read_text())
    pruning = report["pruning"]
    assert pruning["rule"] == {"criterion": criterion, "keep": 5, "alpha": None}
    assert [row["kept"] for row in pruning["blocks"].values()] == kept_by_hand(model, criterion, 5)
    assert pruning["removed"] == 3 * len(pruning["blocks"]) and pruning["experts"] == 8 * len(pruning["blocks"])
    loads = json.loads((run / "expert_frequency.json").read_text())
    for block, row in pruning["blocks"].items():
        original, after = loads[block]["original"], loads[block]["compressed"]
        assert sorted(row["kept"] + row["removed"]) == list(range(8))
        assert row["removed_selections"] == pytest.approx(sum(original[e] for e in row["removed"]) / sum(original))
        assert all(after[e] == 0 for e in row["removed"]) and sum(after) == sum(original)
    assert report["model"]["experts"] == 8 and 3 < report["bits"]["nominal"] < 3.6
    packed, decoded = load(run), load(run, packed=False)
    tokens = torch.arange(3, 67).view(1, 64)
    torch.testing.assert_close(packed(tokens).logits, decoded(tokens).logits, rtol=1e-4, atol=1e-4)
    subject, original = MoEModel(decoded), MoEModel(AutoModelForCausalLM.from_pretrained(model).eval())
    assert all(block.num_experts == 5 for block in subject.moe_blocks)
    prose = token_windows(read_documents("bundled:prose"), AutoTokenizer.from_pretrained(model), 3, 64)
    evaluated = evaluate(original, subject, {"prose": prose}, batch_size=2)
    assert evaluated["perplexity"]["prose"]["compressed"] == pytest.approx(report["perplexity"]["prose"]["compressed"])
    # every selection of a removed expert has changed
    assert evaluated["expert_shift"]["mean"]["selections"] > min(
        r["removed_selections"] for r in pruning["blocks"].values()
    )
    difference = export(str(run), str(tmp_path / "dense"), "dense")
    assert "kept_experts" not in (tmp_path / "dense" / "config.json").read_text(), difference
    elsewhere = AutoModelForCausalLM.from_pretrained(tmp_path / "dense").eval()
    torch.testing.assert_close(elsewhere(tokens).logits, decoded(tokens).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:LightningCLI's args", "ignore:.*deprecated")
def test_a_run_that_only_prunes(tiny_model_dir, tmp_path, capsys):
    """Without quantization and calibration, the result is the original less the removed experts, and loads anywhere."""
    model = tiny_model_dir("mixtral")
    options = {"model__quantizer": "none", "model__router_method": "none", "model__group_size": 128}
    run = jobs.fit(model, tmp_path / "keep", pruning__keep=6, **options)
    expected = MoEModel(AutoModelForCausalLM.from_pretrained(model).eval())
    for block, kept in zip(expected.moe_blocks, kept_by_hand(model, "frequency", 6), strict=True):
        keep_experts(block, kept)
    tokens = torch.arange(3, 67).view(1, 64)
    for reloaded in (AutoModelForCausalLM.from_pretrained(run / "dense").eval(), load(run)):
        assert torch.equal(reloaded(tokens).logits, expected.model(tokens).logits)
    report = json.loads((run / "report.json").read_text())
    assert report["bits"].items() >= {"nominal": 32, "true": 32}.items() and not report["quantization_error"]
    # a model with different numbers of experts stays in our format
    run = jobs.fit(model, tmp_path / "alpha", pruning__alpha=0.9, **options)
    blocks = json.loads((run / "report.json").read_text())["pruning"]["blocks"]
    numbers = [len(row["kept"]) for row in blocks.values()]
    assert len(set(numbers)) > 1 and not (run / "dense").exists()
    assert [block.num_experts for block in MoEModel(load(run, packed=False)).moe_blocks] == numbers
    with pytest.raises(ValueError, match="--pruning.keep"):
        export(str(run), str(tmp_path / "dense"), "dense")
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main(["test", *jobs.options(model, run, model__split_damage="true", **options)])
    assert "--model.split_damage" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:LightningCLI's args", "ignore:.*deprecated")
@pytest.mark.parametrize(
    "family, options, message",
    [
        ("mixtral", {"pruning__keep": 1}, "keep=1 (--pruning.keep)"),
        ("mixtral", {"pruning__keep": 9}, "keep=9 (--pruning.keep)"),
        ("mixtral", {"pruning__alpha": 0}, "(--pruning.alpha)"),
        ("mixtral", {"pruning__alpha": 1.5}, "(--pruning.alpha)"),
        ("mixtral", {"pruning__criterion": "magic"}, "pruning.criterion"),
        ("mixtral", {"pruning__keep": 4, "pruning__alpha": 0.5}, "pass one"),
        ("llama", {"pruning__keep": 4}, "no routed experts"),
    ],
)
def test_bad_options(family, options, message, tiny_model_dir, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["fit", *jobs.options(tiny_model_dir(family), tmp_path / "run", **options)])
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run" / "run.json").exists()
