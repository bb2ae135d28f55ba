"""Divergence from the original: the figures against a direct computation, streamed, and over several processes."""

import json
import math
import shutil

import architectures
import jobs
import pytest
import tiny_models
import torch
from test_processes import launch

from eacmoe_lightning.cli import main
from eacmoe_lightning.evaluation import divergence, pareto, report_html, report_text
from eacmoe_lightning.evaluation.divergence import PerToken, compare, joined, statistics
from eacmoe_lightning.evaluation.evaluate import evaluate
from eacmoe_lightning.evaluation.streams import AfterBlock, effect_of_selection, rounded, run_batches
from eacmoe_lightning.models.checkpoint import Checkpoint
from eacmoe_lightning.models.moe import MoEModel
from eacmoe_lightning.models.originals import load_original
from eacmoe_lightning.models.streamed import StreamedModel


def random_tokens(number: int = 2000) -> tuple[PerToken, dict]:
    """Tokens of two random models, and their figures computed in another way."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(number, 50, generator=generator) * 3
    other = base + 0.3 * torch.randn(number, 50, generator=generator)
    targets = torch.randint(0, 50, (number,), generator=generator)
    p, q = base.double().softmax(-1), other.double().softmax(-1)
    rows = torch.arange(number)
    change = q[rows, targets] - p[rows, targets]
    kl = (p * (p / q).log()).sum(-1)
    ratio = (p[rows, targets] / q[rows, targets]).log()
    expected = {
        "kl": kl,
        "same_top": (p.argmax(-1) == q.argmax(-1)).double().mean(),
        "mean_dp": change.mean(),
        "rms_dp": change.square().mean().sqrt(),
        "log_ppl_ratio": ratio.mean(),
        "log_ppl_ratio_error": ratio.std() / math.sqrt(number),
        "confidence": p.max(-1).values,
    }
    return compare(base, other, targets), expected


def test_the_figures_are_those_of_a_direct_computation(monkeypatch):
    tokens, expected = random_tokens()
    found = statistics(tokens)
    for name in ("same_top", "mean_dp", "rms_dp", "log_ppl_ratio", "log_ppl_ratio_error"):
        assert found[name] == pytest.approx(float(expected[name]), rel=1e-4)
    kl = expected["kl"]
    assert found["kl"]["mean"] == pytest.approx(float(kl.mean()), rel=1e-5)
    assert found["kl"]["error"] == pytest.approx(float(kl.std()) / math.sqrt(len(kl)), rel=1e-4)
    for name, fraction in {"median": 0.5, "p90": 0.9, "p99": 0.99, "p99_9": 0.999, "max": 1.0}.items():
        assert found["kl"][name] == pytest.approx(float(kl.quantile(fraction)), rel=1e-4)
    for row in found["by_confidence"]:
        inside = (expected["confidence"] >= row["from"]) & (expected["confidence"] < row["to"])
        assert row["share"] == pytest.approx(float(inside.double().mean()))
        assert row["kl"] == pytest.approx(float(kl[inside].mean()), rel=1e-4)
    assert sum(row["share"] for row in found["by_confidence"]) == pytest.approx(1)
    monkeypatch.setattr(divergence, "ROWS_AT_ONCE", 50 * 7)  # in parts, and the order of tokens does not matter
    again, _ = random_tokens()
    assert all(torch.equal(a, b) for a, b in zip(again, tokens, strict=True))
    assert json.loads(json.dumps(found)) == found and statistics(joined([])) == {}


def test_impossible_and_equal_predictions():
    base = torch.tensor([[0.0, 1.0, -torch.inf], [2.0, 2.0, 2.0]])
    other = torch.tensor([[0.0, 0.0, -torch.inf], [2.0, 2.0, 2.0]])
    tokens = compare(base, other, torch.tensor([0, 1]))
    p = torch.tensor([0.0, 1.0]).softmax(-1)
    assert tokens.kl.tolist() == [pytest.approx(float((p * (2 * p).log()).sum())), 0.0]
    assert compare(base, base, torch.tensor([0, 1])).kl.tolist() == [0, 0]


@pytest.fixture(scope="module")
def pair(tiny_model_dir):
    """An original, streamed, and the same in bfloat16 as the other model; token ids; both whole."""
    folder = str(tiny_model_dir("qwen2_moe"))
    original, subject = (StreamedModel(Checkpoint(folder, dtype)) for dtype in ("float32", "bfloat16"))
    ids = torch.randint(0, tiny_models.VOCABULARY, (5, 32), generator=torch.Generator().manual_seed(0))
    return original, subject, ids, (load_original(folder), load_original(folder, "bfloat16"))


@torch.no_grad()
def test_the_evaluation_gives_the_figures_of_whole_models(pair):
    original, subject, ids, whole = pair
    result = evaluate(original, subject, {"a": ids, "b": ids[:2]}, 2, split=True, noise_floor=3)["divergence"]
    logits = [model(ids, use_cache=False).logits[:, :-1].flatten(0, 1) for model in whole]
    expected = statistics(compare(*logits, ids[:, 1:].flatten()))
    found = result["texts"]["a"]["compressed"]
    assert found["tokens"] == expected["tokens"] == 5 * 31
    for name in ("same_top", "mean_dp", "rms_dp", "log_ppl_ratio"):
        assert found[name] == pytest.approx(expected[name], rel=1e-2, abs=1e-5)
    for name, value in expected["kl"].items():
        assert found["kl"][name] == pytest.approx(value, rel=2e-2, abs=1e-6)
    assert found["kl"]["mean"] > 0
    assert result["texts"]["a"]["noise_floor"]["tokens"] == 3 * 31  # of the first windows
    assert result["texts"]["b"]["noise_floor"]["tokens"] == 2 * 31
    means = [result["texts"][text]["compressed"]["kl"]["mean"] for text in ("a", "b")]
    assert result["mean"]["compressed"]["kl"] == pytest.approx(sum(means) / 2)
    assert [row["block"] for row in result["blocks"]] == [0, 1, 2]
    assert all(0 < row[name] < 1 for row in result["blocks"] for name in ("compressed", "noise_floor", "weight_damage"))


@torch.no_grad()
def test_likelihoods_are_the_same_whether_tokens_are_compared_or_not(pair):
    """To the last bit, though the same softmax then serves both."""
    original, subject, ids, _ = pair
    seen = {}
    compared = run_batches(original, subject, [ids], True, on_tokens=lambda j, name, t: seen.update({name: t}))[0]
    alone = run_batches(original, subject, [ids], True)[0]
    assert compared.keys() == alone.keys() and compared.keys() == {"original", *seen}
    assert all(torch.equal(compared[name], alone[name]) for name in alone)
    for name, tokens in seen.items():
        assert torch.equal(tokens.base_nll, alone["original"].flatten())
        assert torch.equal(tokens.nll, alone[name].flatten())


@torch.no_grad()
def test_the_noise_floor_is_the_original_with_rounded_hidden_states(pair):
    original, _, ids, (whole, _) = pair
    handles = [
        block.layer.register_forward_hook(lambda layer, args, output, i=i: rounded(output, i))
        for i, block in enumerate(MoEModel(whole).blocks)
    ]
    found = {}
    run_batches(original, original, [ids], on_tokens=lambda j, name, t: found.update({name: t}), noise_floor=[0])
    logits = whole(ids, use_cache=False).logits[:, :-1]
    for handle in handles:
        handle.remove()
    base = whole(ids, use_cache=False).logits[:, :-1]
    expected = compare(base.flatten(0, 1), logits.flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(found["noise_floor"].kl, expected.kl, rtol=5e-2, atol=1e-7)
    assert float(found["noise_floor"].kl.mean()) > 0 and not found["compressed"].kl.any()


def test_rounding_moves_by_at_most_a_rounding_error_in_every_dtype():
    x = torch.randn(2, 9, 64, generator=torch.Generator().manual_seed(0))
    for dtype in (torch.float32, torch.bfloat16):
        before = x.to(dtype)
        after, _ = rounded((before, torch.arange(3)), seed=1)
        moved = (after.float() - before.float()).abs() / before.float().abs()
        assert after.dtype == dtype and 0 < float(moved.mean()) and float(moved.max()) <= 2**-7
        assert torch.equal(after, rounded((before, None), seed=1)[0])


@torch.no_grad()
def test_the_effect_of_a_selection_is_that_of_forcing_it(pair):
    """`weighted`: the block with the other selection forced on it moves its output by what the experts moved."""
    original, subject, ids, _ = pair
    seen: list[AfterBlock] = []
    run_batches(original, subject, [ids], on_block=lambda j, after: seen.append(after))
    other = seen[1].compressed_ids.clone()  # the second block, with other experts for every third token
    other[::3] = (seen[1].ids[::3] + 1) % original.blocks[1].num_experts
    with original.loaded(0) as first:
        state, _ = first.forward(original.call(0, ids))
    with original.loaded(1) as block:
        moe = block.experts.module
        outputs = []
        handle = moe.register_forward_hook(lambda module, args, output: outputs.append((args, output)))
        call = original.call(1, ids, state)
        _, routing = block.forward(call)
        block.forward(call, force_ids=other)
        handle.remove()
        (args, output), (_, forced) = outputs[:2]
        found = effect_of_selection(block, routing.logits, *args, output, other)
        skipping = effect_of_selection(block, routing.logits, *args, output, other + block.num_experts)
    expected = (forced - output).norm(dim=-1) / output.norm(dim=-1)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    assert int((found > 1e-6).sum()) >= len(other) // 3 and skipping is None


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama4_text", "inkling_text"])
def test_where_the_effect_cannot_be_had_everything_else_is_there(family):
    """Llama 4's experts read a row for each pair; no known rule gives Inkling's weights."""
    if family not in architectures.ARCHITECTURES:
        pytest.skip(f"this transformers has no {family}")
    models = [MoEModel(architectures.build(family, seed).eval()) for seed in (0, 1)]
    ids = torch.randint(5, 60, (2, 16), generator=torch.Generator().manual_seed(0))
    result = evaluate(*models, {"a": ids}, 2)
    assert "weighted" not in result["expert_shift"]["mean"] and result["expert_shift"]["mean"]["any"] > 0
    assert result["divergence"]["mean"]["compressed"]["kl"] > 0


@pytest.mark.slow
def test_two_processes_give_the_figures_of_one(tiny_model_dir, tmp_path):
    """3 windows of each text, in shares of 1 and 2."""
    options = {"model__block_epochs": 0, "model__joint_epochs": 0, "data__noise_floor": 2}
    model = tiny_model_dir("qwen2_moe")
    jobs.fit(model, tmp_path / "alone", **options)
    status, output = launch(2, *jobs.options(model, tmp_path / "two", **options))
    assert status == 0, output[-3000:]
    one, two = (json.loads((tmp_path / name / "report.json").read_text()) for name in ("alone", "two"))
    for text, streams in one["divergence"]["texts"].items():
        for stream, figures in streams.items():
            other = two["divergence"]["texts"][text][stream]
            assert other["tokens"] == figures["tokens"]
            assert other["kl"] == pytest.approx(figures["kl"], rel=2e-2, abs=1e-7)
            assert other["same_top"] == pytest.approx(figures["same_top"], abs=0.01)
    assert two["divergence"]["mean"]["compressed"] == pytest.approx(one["divergence"]["mean"]["compressed"], rel=2e-2)
    weighted = [report["expert_shift"]["mean"]["after"]["weighted"] for report in (one, two)]
    assert weighted[0] == pytest.approx(weighted[1], rel=1e-2)
    main(["validate", *jobs.options(model, tmp_path / "alone", **options)])
    again = json.loads((tmp_path / "alone" / "validate.json").read_text())["divergence"]
    assert again["mean"]["compressed"] == pytest.approx(one["divergence"]["mean"]["compressed"], rel=1e-4)


# --- the report


def test_the_report_has_the_divergence_and_a_page_without_network(fitted, tmp_path, capsys):
    run = fitted("qwen3_moe")
    report = json.loads((run / "report.json").read_text())
    for text, streams in report["divergence"]["texts"].items():
        assert streams.keys() == {"compressed", "noise_floor"}
        values, floor = streams["compressed"], streams["noise_floor"]
        ratio = math.log(report["perplexity"][text]["compressed"] / report["perplexity"][text]["original"])
        assert values["log_ppl_ratio"] == pytest.approx(ratio, abs=1e-5)
        assert values["kl"]["mean"] > 10 * floor["kl"]["mean"] > 0 and values["same_top"] < floor["same_top"]
    shift = report["expert_shift"]["mean"]["after"]
    assert 0 < shift["weighted"] < 2 * shift["any"]
    stored = sum(path.stat().st_size for path in (run / "compressed").glob("*.safetensors"))
    assert report["bits"]["all"] == pytest.approx(8 * stored / report["model"]["weights"])
    page = (run / "report.html").read_text()
    assert page.startswith("<!doctype html>") and "http" not in page.replace("http-equiv", "")
    for value in (report["divergence"]["mean"]["compressed"]["same_top"], shift["weighted"]):
        assert f"{100 * value:.1f}\N{NO-BREAK SPACE}%" in page
    text = (run / "report.md").read_text()
    assert "## Divergence from the original" in text and "| prose, noise floor |" in text and "## Size" in text
    assert "same top token" in report_text.summary(report)


def test_the_page_escapes_all_text_and_needs_no_evaluation(fitted):
    report = json.loads((fitted("qwen3_moe") / "report.json").read_text())
    bad = "<script>alert('&')</script>"
    report["model"]["name_or_path"] = report["command"] = report["machine"]["processor"] = bad
    for part in ("perplexity", "tokens"):
        if part in report:
            report[part] = {bad: next(iter(report[part].values()))}
    report["divergence"]["texts"] = {bad: next(iter(report["divergence"]["texts"].values()))}
    page = report_html.html(report)
    assert "<script" not in page and page.count("&lt;script&gt;") >= 4
    del report["divergence"]
    report["perplexity"] = {}
    assert "KL divergence" not in report_html.html(report)
    assert "Divergence" not in report_text.markdown(report)


def copied(run, folder, change):
    """A run directory with only a report, changed."""
    report = json.loads((run / "report.json").read_text())
    change(report)
    folder.mkdir()
    (folder / "report.json").write_text(json.dumps(report))
    return str(folder)


def test_runs_are_compared_by_size_and_divergence(fitted, tmp_path, capsys):
    run = fitted("qwen3_moe")

    def variant(name, size, kl):
        def change(report):
            report["size_bytes"]["compressed"] = size
            report["divergence"]["mean"]["compressed"]["kl"] = kl

        return copied(run, tmp_path / name, change)

    runs = [variant("large", 3_000_000, 0.01), variant("small", 1_000_000, 0.2), variant("bad", 2_000_000, 0.5)]
    capsys.readouterr()  # of a run that was made for this test
    main(["report", *runs, "--output", str(tmp_path / "pareto.html")])
    lines = capsys.readouterr().out.splitlines()[1:4]
    assert [line.split()[0] for line in lines] == ["small", "bad", "large"]
    assert ["another is smaller" in line for line in lines] == [False, True, False]
    page = (tmp_path / "pareto.html").read_text()
    assert page.count("<circle") == 3 and "http" not in page


def test_a_later_evaluation_on_another_text_of_the_same_name_is_not_compared(fitted, tiny_model_dir, tmp_path, capsys):
    run, model = fitted("qwen3_moe"), tiny_model_dir("qwen3_moe")
    again = shutil.copytree(run, tmp_path / "again")
    written = json.loads((run / "report.json").read_text())["heldout_digest"]
    texts = {"prose": "bundled:prose[:10%]", "code": "bundled:maths[:10%]"}
    main(["validate", *jobs.options(model, again, data__heldout=json.dumps(texts))])
    validated = json.loads((again / "validate.json").read_text())["heldout_digest"]
    assert validated["prose"] == written["prose"] and validated["code"] != written["code"]
    with pytest.raises(SystemExit):
        main(["report", str(run), str(again), "--output", str(tmp_path / "pareto.html")])
    assert "the windows of the text code are others" in capsys.readouterr().err


def test_of_many_points_those_on_the_line_are_named():
    figures = {"bits": 3.0, "kl_error": 0.001, "same_top": 0.9, "rms_dp": 0.01, "log_ppl_ratio": 0.02}
    points = [{"name": f"run{i}", "size": 1000 + i, "kl": 0.1 if i else 0.2, **figures} for i in range(14)]
    written = pareto.page("model", ["prose"], points, "a model of this test")
    assert "Each point is a model of this test." in written and written.count("<title>run") == 14
    assert [f">run{i}</text>" in written for i in range(14)] == [True, True, *[False] * 12]
    assert ">run2</text>" in pareto.page("model", ["prose"], points[:3])


def test_a_model_without_any_loss_has_its_place():
    figures = {"bits": 8.0, "kl_error": 0.0, "same_top": 1.0, "rms_dp": 0.0, "log_ppl_ratio": 0.0}
    for kl in (0.0, -1e-9):  # a mean over rounded logarithms can be a little below 0
        point = {"name": "run", "size": 1000, "kl": kl, **figures}
        assert pareto.page("model", ["prose"], [point]).count("<circle") == 1


OF_PRUNE = {"model": "a run", "fingerprint": "of the run", "pruning": {"keep": 3}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda report: report.pop("divergence"), "has no divergence"),
        (lambda report: report["config"].update({"model.fingerprint": "other"}), "Pass runs of one model"),
        (lambda report: report.update(config=OF_PRUNE), "--trainer.default_root_dir {} measures from the original"),
        (lambda report: report["divergence"]["texts"].pop("code"), "cannot be compared: texts and tokens"),
        (lambda report: report["heldout_digest"].update(code="other"), "the windows of the text code are others"),
        (None, "has no report.json"),
    ],
)
def test_runs_that_cannot_be_compared_are_refused(change, message, fitted, tmp_path, capsys):
    run = fitted("qwen3_moe")
    other = str(tmp_path / "none") if change is None else copied(run, tmp_path / "other", change)
    with pytest.raises(SystemExit):
        main(["report", str(run), other, "--output", str(tmp_path / "pareto.html")])
    assert message.format(other) in capsys.readouterr().err and not (tmp_path / "pareto.html").exists()


def test_a_directory_is_no_place_for_a_page(fitted, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["report", str(fitted("qwen3_moe")), "--output", str(tmp_path)])
    assert f"{tmp_path} (--output) is a directory" in capsys.readouterr().err
