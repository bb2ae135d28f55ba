"""`prune`: experts removed from a finished model, against the same model with masked routers, and routers by hand."""

import json
import math
import shutil
from functools import partial
from pathlib import Path

import jobs
import pytest
import torch
from test_packed_loading import compress
from test_pruning import build, mask
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import eacmoe_lightning
from eacmoe_lightning.cli import main
from eacmoe_lightning.commands.prune import prune
from eacmoe_lightning.compressed.format import SHARD
from eacmoe_lightning.compressed.loading import load
from eacmoe_lightning.exports import run_result
from eacmoe_lightning.exports.export import export
from eacmoe_lightning.models.moe import MoEModel
from eacmoe_lightning.pruning.rule import PruningRule
from eacmoe_lightning.run.files import StoreError, read_tensors
from eacmoe_lightning.runtime.packed_modules import packed_weights
from eacmoe_lightning.skipping import PESF, current_rule, set_skipping
from eacmoe_lightning.text.documents import read_documents
from eacmoe_lightning.text.windows import token_windows

pytestmark = pytest.mark.filterwarnings("ignore:LightningCLI's args", "ignore:.*deprecated")
OPTIONS = {"num_windows": 6, "window_length": 64, "num_heldout_windows": 2, "texts": ["bundled:prose", "bundled:code"]}
TOKENS = torch.arange(3, 99).view(2, 48) * 7


def calibration(directory: Path) -> Tensor:
    tokenizer = AutoTokenizer.from_pretrained(directory)
    return token_windows(read_documents("bundled:calibration"), tokenizer, 6, 64, seed=0)


@torch.no_grad()
def loads(model: Path, windows: Tensor) -> list[list[int]]:
    """How often each expert of each block is selected in one pass of the packed model."""
    moe, counts = MoEModel(load(model)), []
    for block in moe.moe_blocks:
        block.router.register_forward_hook(
            lambda m, args, out, e=block.num_experts: counts.append(out[2].flatten().bincount(minlength=e).tolist())
        )
    moe.model(windows)
    return counts


@pytest.mark.parametrize(
    "family, mixed, rule",
    [
        ("qwen2_moe", False, PruningRule(keep=5)),
        ("qwen3_moe", True, PruningRule(alpha=0.6)),
        ("mixtral", True, PruningRule(keep=6)),
    ],
)
@torch.no_grad()
def test_the_experts_that_stay_do_not_change_by_a_bit(family, mixed, rule, tiny_model_dir, tmp_path, capsys):
    given = compress(tiny_model_dir(family), tmp_path / "given", mixed)
    report = prune(str(given), str(tmp_path / "out"), rule, **OPTIONS)
    printed = capsys.readouterr().out
    counts = loads(given, calibration(given))
    kept = []
    for row, count in zip(report["pruning"]["blocks"].values(), counts, strict=True):
        if rule.keep:
            expected = sorted(sorted(range(8), key=lambda e: (-count[e], e))[: rule.keep])
        else:
            expected = [e for e in range(8) if count[e] >= rule.alpha * sum(count) / 8]
        assert row["kept"] == expected and row["scores"] == count
        assert row["removed_selections"] == pytest.approx(1 - sum(count[e] for e in expected) / sum(count))
        kept.append(expected)
        assert f"{len(expected)} of 8 experts stay" in printed
    assert rule.keep or len({len(row) for row in kept}) > 1  # alpha leaves different numbers
    pruned = tmp_path / "out" / "compressed"
    for index, kept_experts in enumerate(kept):
        before, after = (read_tensors(d / SHARD.format(index))[0] for d in (given, pruned))
        assert before.keys() == after.keys()
        for name, tensor in before.items():
            if ".experts." not in name and "mlp.gate.weight" not in name:
                assert torch.equal(after[name], tensor)
            elif not (mixed and name.endswith("codes")):
                assert torch.equal(after[name], tensor[kept_experts])
    full = load(given, packed=False)
    for block, kept_experts in zip(MoEModel(full).moe_blocks, kept, strict=True):
        mask(block, [e for e in range(8) if e not in kept_experts])
    expected = full(TOKENS).logits
    for packed in (True, False):
        pruned_model = load(tmp_path / "out", packed=packed)
        torch.testing.assert_close(pruned_model(TOKENS).logits, expected, rtol=1e-4, atol=1e-4)
    prose = token_windows(read_documents("bundled:prose"), AutoTokenizer.from_pretrained(pruned), 2, 64)
    for model, key in ((load(given), "original"), (pruned_model, "compressed"), (pruned_model, "before")):
        loss = model(prose, labels=prose, output_router_logits=False).loss
        assert report["perplexity"]["prose"][key] == pytest.approx(math.exp(loss), rel=1e-4)
    assert report["size_bytes"]["compressed"] < report["size_bytes"]["original"]
    weights = dict(packed_weights(load(tmp_path / "out")))
    stored = 8 * sum(tensor.nbytes for weight in weights.values() for tensor in weight.tensors)
    assert report["bits"]["true"] == pytest.approx(stored / sum(weight.shape.numel() for weight in weights.values()))
    with pytest.raises(ValueError, match="pruned before"):
        prune(str(tmp_path / "out"), str(tmp_path / "again"), rule, **OPTIONS)


@torch.no_grad()
def test_routers_are_the_closed_form_on_the_inputs_in_the_pruned_model(tiny_model_dir, tmp_path):
    given = compress(tiny_model_dir("mixtral"), tmp_path / "given")
    report = prune(str(given), str(tmp_path / "out"), PruningRule("reap", keep=4), "ridge", 0.01, **OPTIONS)
    windows = calibration(given)
    seen = []
    for model in (load(given, packed=False), load(tmp_path / "out", packed=False)):
        inputs, moe = [], MoEModel(model)
        for block in moe.moe_blocks:
            block.router.register_forward_pre_hook(lambda m, args, x=inputs: x.append(args[0].reshape(-1, 64)))
        model(windows)
        seen.append((moe, inputs))
    (full, teacher), (pruned, student) = seen
    for block, twin, x, x_hat in zip(full.moe_blocks, pruned.moe_blocks, teacher, student, strict=True):
        kept = report["pruning"]["blocks"][block.index]["kept"]
        start, x, x_hat = block.router_weight[kept].double(), x.double(), x_hat.double()
        gram = x_hat.T @ x_hat  # over all tokens: with 4 experts, each is a target of every token
        strength = 0.01 * gram.diagonal().mean() * torch.eye(64)
        residual = x @ start.T - x_hat @ start.T
        expected = start + torch.linalg.solve(gram + strength, x_hat.T @ residual).T
        torch.testing.assert_close(twin.router_weight.double(), expected, rtol=1e-3, atol=1e-4)
        if block.index:
            error = [float((x @ start.T - x_hat @ w.double().T).square().mean()) for w in (start, twin.router_weight)]
            assert error[1] < error[0]


def test_an_interrupted_command_continues_and_a_finished_one_is_not_repeated(tiny_model_dir, tmp_path, capsys):
    given, rule = compress(tiny_model_dir("qwen2_moe"), tmp_path / "given"), PruningRule("reap", keep=5)
    out = [tmp_path / "whole", tmp_path / "cut"]
    reports = [prune(str(given), str(place), rule, "ridge", **OPTIONS) for place in out]
    (out[1] / "report.md").unlink()
    (out[1] / "blocks" / "block_001.safetensors").unlink()
    (out[1] / "blocks" / "block_002.safetensors").unlink()
    (out[1] / "compressed" / "config.json").unlink()
    capsys.readouterr()
    reports[1] = prune(str(given), str(out[1]), rule, "ridge", **OPTIONS)
    assert "block 1" in (printed := capsys.readouterr().out) and "block 0" not in printed
    for part in ("blocks", "compressed"):
        assert jobs.contents(out[0] / part) == jobs.contents(out[1] / part)
    assert all(reports[0][key] == reports[1][key] for key in ("perplexity", "pruning", "bits"))
    before = jobs.contents(out[0])
    assert prune(str(given), str(out[0]), rule, "ridge", **OPTIONS) == json.loads(before["report.json"])
    assert jobs.contents(out[0]) == before and not list(out[0].rglob("*.partial"))


def test_a_text_or_a_model_edited_since_is_refused(tiny_model_dir, tmp_path):
    model = Path(shutil.copytree(tiny_model_dir("qwen2_moe"), tmp_path / "model"))
    texts = {name: tmp_path / f"{name}.txt" for name in ("calibration", "heldout")}
    for path in texts.values():
        path.write_text("\n".join(f"{i} {i * i}" for i in range(600)))
    options = {**OPTIONS, "texts": str(texts["heldout"]), "calibration": str(texts["calibration"])}
    work = partial(prune, str(model), str(tmp_path / "out"), PruningRule(keep=5), **options)
    work()
    shard = model / "model.safetensors"
    for path, message in (
        (texts["calibration"], r"the text of .*calibration.txt \(--calibration\) or its tokens have changed since"),
        (texts["heldout"], r"one of the texts .*heldout.txt.* or its tokens have changed since"),
        (shard, r"the weights or the config.json of .*model \(--model\) have changed since"),
    ):
        before = path.read_bytes()
        path.write_bytes(before[:-1] + bytes([before[-1] ^ 1]) if path is shard else before.replace(b"1", b"2"))
        with pytest.raises(ValueError, match=message):
            work()
        path.write_bytes(before)
    work()


@pytest.mark.parametrize("factor, is_refused", [(1 + 1e-6, False), (1 + 1e-4, True)])
def test_a_result_that_reloads_otherwise_is_refused(factor, is_refused, tiny_model_dir, tmp_path, monkeypatch):
    """The order of sums may differ, which on some CPUs depends on where weights lie in memory; nothing else may."""
    before = run_result._checked_logits
    monkeypatch.setattr(run_result, "_checked_logits", lambda *args: before(*args) * factor)
    (tmp_path / "text.txt").write_text("\n".join(f"{i} {i * i}" for i in range(600)))
    options = {**OPTIONS, "texts": str(tmp_path / "text.txt"), "calibration": str(tmp_path / "text.txt")}
    work = partial(prune, str(tiny_model_dir("qwen2_moe")), str(tmp_path / "out"), PruningRule(keep=5), **options)
    if is_refused:
        with pytest.raises(StoreError, match="reloads with logits that differ"):
            work()
    else:
        work()


def test_experts_that_stay_below_alpha_are_named(tokenizer, tmp_path, capsys, caplog):
    """Every token gives nearly all weight to expert 5; the others are below the mean saliency, and the best stays."""
    model = build("gpt_oss")
    for block in MoEModel(model).moe_blocks:
        block.router_bias.data[5] = 30.0
    model.save_pretrained(tmp_path / "model"), tokenizer.save_pretrained(tmp_path / "model")
    report = prune(str(tmp_path / "model"), str(tmp_path / "out"), PruningRule("reap", alpha=1.0), **OPTIONS)
    starts = []
    for index, row in report["pruning"]["blocks"].items():
        others = row["scores"][:5] + [0] + row["scores"][6:]
        best = others.index(max(others))
        assert 0 < max(others) < sum(row["scores"]) / 8 < row["scores"][5]
        assert row["kept"] == sorted([5, best]) and row["below_alpha"] == [best]
        starts.append(f"block {index}: experts [{best}] are below alpha=1 (--pruning.alpha) and stay")
    assert [line.startswith(start) for line, start in zip(caplog.messages, starts, strict=True)] == [True] * 3
    assert report["pruning"]["below_alpha"] == 3 and "3 experts are below alpha and stay" in capsys.readouterr().out
    assert "below alpha" in (tmp_path / "out" / "report.md").read_text()


@pytest.mark.slow
@torch.no_grad()
def test_an_original_becomes_an_ordinary_smaller_model(tiny_model_dir, tmp_path):
    model = tiny_model_dir("phimoe")
    report = prune(str(model), str(tmp_path / "out"), PruningRule("reap", keep=3), **OPTIONS)
    assert report["bits"].items() >= {"nominal": 32, "true": 32}.items()
    ours = load(tmp_path / "out")
    elsewhere, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "dense", output_loading_info=True)
    assert elsewhere.config.num_local_experts == 3 and not info["missing_keys"]
    torch.testing.assert_close(elsewhere.eval()(TOKENS).logits, ours(TOKENS).logits, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_skipping_rule_is_suspended_and_copied(tiny_model_dir, tmp_path):
    given = compress(tiny_model_dir("qwen3_moe"), tmp_path / "given")
    plain = prune(str(given), str(tmp_path / "plain"), PruningRule(keep=5), **OPTIONS)
    config = json.loads((given / "config.json").read_text())
    model = load(given)
    set_skipping(model, PESF(0.7, rescue=1.0))
    model.save_pretrained(tmp_path / "skipping")
    with pytest.raises(FileNotFoundError, match="tokenizer"):
        prune(str(tmp_path / "skipping"), str(tmp_path / "out"), PruningRule(keep=5), **OPTIONS)
    AutoTokenizer.from_pretrained(given).save_pretrained(tmp_path / "skipping")
    report = prune(str(tmp_path / "skipping"), str(tmp_path / "out"), PruningRule(keep=5), **OPTIONS)
    assert report["pruning"] == plain["pruning"] and report["perplexity"] == plain["perplexity"]
    reloaded = eacmoe_lightning.load(tmp_path / "out")
    assert current_rule(reloaded) == PESF(0.7, rescue=1.0) and current_rule(load(tmp_path / "plain")) is None
    config_out = json.loads((tmp_path / "out" / "compressed" / "config.json").read_text())
    assert config_out["original"]["name_or_path"] == config["original"]["name_or_path"]
    assert config_out["quantization"]["method"] == "rtn" and config_out["quantization"]["pruning"]["keep"] == 5


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--pruning.keep", "1"], "keep=1 (--pruning.keep)"),
        (["--pruning.keep", "9"], "num_experts=8"),
        (["--pruning.alpha", "0"], "alpha=0.0 (--pruning.alpha)"),
        ([], "pass one of them"),
        (["--pruning.keep", "4", "--model", "/no/such/model"], "/no/such/model"),
        (["--pruning.keep", "4", "--model", "LLAMA"], "no routed experts"),
        (["--pruning.keep", "4", "--output", "FULL"], "is not empty"),
        (["--pruning.keep", "4", "--num_windows", "100000"], "(--num_windows)"),
        (["--pruning.keep", "4", "--num_heldout_windows", "100000"], "(--num_heldout_windows)"),
        (["--pruning.keep", "4", "--texts", "/no/such/text.txt"], "/no/such/text.txt"),
        (["--pruning.keep", "4", "--ridge", "0"], "--ridge"),
        (["--pruning.keep", "auto"], "keep=auto (--pruning.keep) serves `fit`"),
        (["--pruning.keep", "4", "--calibration", ""], "--calibration: '' is not a text source"),
        (["--pruning.keep", "4", "--seed", str(2**70)], f"seed={2**70} (--seed) is not from"),
        (["--pruning.keep", "4", "--window_length", "1"], "window_length=1 (--window_length) is below 2"),
        (["--pruning.keep", "4", "--window_length", "99999999"], "(--window_length); pass a longer text"),
        (["--pruning.keep", "4", "--texts", "CHAT"], "--texts: CHAT, line 1: the tokenizer has no chat template"),
        (["--pruning.keep", "4", "--texts", "ROWS"], "name the column as SOURCE#NAME, or two: QUESTION,ANSWER"),
    ],
)
def test_bad_options(arguments, message, tiny_model_dir, tmp_path, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("not a run")
    chat, rows = tmp_path / "chat.jsonl", tmp_path / "rows.jsonl"
    chat.write_text('{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}')
    rows.write_text('{"body": "a"}')
    places = {"LLAMA": str(tiny_model_dir("llama")), "FULL": str(tmp_path / "full")}
    places |= {"CHAT": str(chat), "ROWS": str(rows)}
    options = ["--model", str(tiny_model_dir("mixtral")), "--output", str(tmp_path / "out"), "--window_length", "32"]
    with pytest.raises(SystemExit):
        main(["prune", *options, *(places.get(word, word) for word in arguments)])
    printed = capsys.readouterr().err
    assert message.replace("CHAT", str(chat)) in printed and "--data." not in printed
    assert not (tmp_path / "out").exists() and len(list((tmp_path / "full").iterdir())) == 1


def test_without_texts_the_report_has_no_evaluation(tiny_model_dir, tmp_path, capsys):
    report = prune(str(tiny_model_dir("mixtral")), str(tmp_path), PruningRule(keep=4), **{**OPTIONS, "texts": []})
    assert report["perplexity"] == {} and report["pruning"]["removed"] == 12
    assert "no held-out text was evaluated" in (tmp_path / "report.md").read_text()
    assert "no held-out text was evaluated" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("options", [["--pruning.keep", "5"], ["--pruning.alpha", "0.8"]])
@torch.no_grad()
def test_every_command_takes_the_result(options, fitted, tiny_model_dir, tmp_path, capsys):
    """A finished run of `fit`, pruned, then `test`, `validate` and `report`, `analyze` with all rules, and `export`."""
    model = tiny_model_dir("qwen2_moe")
    run, out = fitted("qwen2_moe"), tmp_path / "out"
    arguments = ["--num_windows", "16", "--window_length", "64", "--num_heldout_windows", "3"]
    arguments += ["--texts", '["bundled:prose", "bundled:code"]', "--routers", "ridge"]
    main(["prune", "--model", str(run), "--output", str(out), *options, *arguments])
    report = json.loads((out / "report.json").read_text())
    first = json.loads((run / "report.json").read_text())
    numbers = [len(row["kept"]) for row in report["pruning"]["blocks"].values()]
    for text, values in first["perplexity"].items():
        assert report["perplexity"][text]["original"] == pytest.approx(values["compressed"], rel=1e-6)

    main(["test", *jobs.options(model, out)])
    tested = json.loads((out / "test.json").read_text())
    for text, values in first["perplexity"].items():
        assert tested["perplexity"][text]["original"] == pytest.approx(values["original"], rel=1e-6)
        pruned = report["perplexity"][text]["compressed"]
        assert tested["perplexity"][text]["compressed"] == pytest.approx(pruned, rel=1e-6)

    words = ["report", str(run), str(out), "--output", str(tmp_path / "pareto.html")]
    with pytest.raises(SystemExit):
        main(words)
    assert f"that of {out} is from {run}" in capsys.readouterr().err
    main(["validate", *jobs.options(model, out)])
    main(words)
    validated = json.loads((out / "validate.json").read_text())["divergence"]["mean"]["compressed"]["kl"]
    assert f"{validated:9.5f}" in capsys.readouterr().out.split("same top")[-1]
    main(["validate", *jobs.options(model, out), "--model.evaluate", str(run)])  # says nothing of `out`
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main(words)
    assert f"that of {out} is from {run}" in capsys.readouterr().err

    analysis_dir = tmp_path / "analysis"
    options = ["--model", str(out), "--output", str(analysis_dir), "--num_windows", "4", "--window_length", "64"]
    options += ["--texts", '["bundled:prose", "bundled:code"]', "--num_questions", "2"]
    main(["analyze", *options, "--alphas", "[0.3, 0.7]", "--baselines", "true"])
    analysis = json.loads((analysis_dir / "analysis.json").read_text())
    assert [row["num_experts"] for row in analysis["blocks"]] == numbers
    assert all(len(row["texts"]["prose"]["load"]) == row["num_experts"] for row in analysis["blocks"])
    names = ["none", "pesf 0.3", "pesf 0.7", "ceil(2K/3)", "ees", "odp"]
    assert [row["name"] for row in analysis["skipping"]["rows"]] == names
    assert all(0 <= row["pairs_dropped"] < 1 for row in analysis["skipping"]["rows"])
    assert {path.name for path in analysis_dir.glob("*.png")} >= {"frequency.png", "skipping.png"}

    if len(set(numbers)) > 1:
        with pytest.raises(ValueError, match="--pruning.keep"):
            export(str(out), str(tmp_path / "dense"), "dense")
        return
    export(str(out), str(tmp_path / "dense"), "dense")
    elsewhere = AutoModelForCausalLM.from_pretrained(tmp_path / "dense").eval()
    ours = load(out, packed=False)
    torch.testing.assert_close(elsewhere(TOKENS).logits, ours(TOKENS).logits, rtol=1e-5, atol=1e-5)
