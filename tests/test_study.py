"""The sensitivity study: its errors, its measurements against full runs of the model, resuming, and its report."""

import csv
import json
import time
from functools import partial

import jobs
import pytest
import tiny_models
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.nn.functional import cross_entropy, kl_div

from eacmoe_lightning.cli import main
from eacmoe_lightning.commands.study import read_texts
from eacmoe_lightning.evaluation.choice_task import accuracy, answer, make_questions
from eacmoe_lightning.evaluation.streams import token_log_likelihoods
from eacmoe_lightning.models.moe import MoEModel
from eacmoe_lightning.models.originals import load_original
from eacmoe_lightning.offload.codecs import Bound, codec
from eacmoe_lightning.study.cells import block_groups, choose_experts, plan, stable_seed
from eacmoe_lightning.study.disturb import disturb, disturbed
from eacmoe_lightning.study.measure import Measurement, Text
from eacmoe_lightning.study.report import depth_summary
from eacmoe_lightning.study.results import Results
from eacmoe_lightning.text.documents import read_documents

HALF = Bound("mean", 0.5)


# --- cells ------------------------------------------------------------------------------------------------------


def test_depths_are_those_of_the_paper():
    of_26 = block_groups(["depth"], list(range(1, 27)))  # counted from 1, as the paper does
    assert of_26 == {"shallow": [*range(1, 11)], "middle": [*range(9, 19)], "deep": [*range(17, 27)]}
    assert block_groups(["depth"], list(range(6))) == {"shallow": [0, 1], "middle": [2, 3], "deep": [4, 5]}


def test_blocks_by_name():
    groups = block_groups(["each", "0,3-4", "all"], [0, 1, 3, 4])
    assert groups == {"0": [0], "1": [1], "3": [3], "4": [4], "0,3-4": [0, 3, 4], "all": [0, 1, 3, 4]}
    for wrong in ("2", "0-3", "deepest", ""):
        with pytest.raises(ValueError, match="--blocks"):
            block_groups([wrong], [0, 1, 3, 4])


def test_experts_by_load():
    load = torch.tensor([5, 0, 9, 5, 1])
    assert choose_experts("all", load, 0, 0) == [0, 1, 2, 3, 4]
    assert choose_experts("most-2", load, 0, 0) == [0, 2]
    assert choose_experts("least-2", load, 0, 0) == [1, 4]
    draws = {tuple(choose_experts("random-2", load, seed, 0)) for seed in range(50)}
    assert len(draws) == 10 and all(len(set(draw)) == 2 for draw in draws)  # all pairs of 5 are drawn
    assert choose_experts("random-2", load, 7, 1) == choose_experts("random-2", load, 7, 1)
    for wrong in ("most", "most-0", "some-2", "random-x", "least-6"):
        with pytest.raises(ValueError, match="--experts"):
            choose_experts(wrong, load, 0, 0)


def test_cells_are_unique_and_ordered_by_their_first_block():
    groups = block_groups(["depth", "each"], [0, 1, 2])
    cells = plan(groups, ["all", "random-1"], ["sz3", "gaussian-noise"], [HALF, Bound("mean", 0.1)], [0, 1])
    assert len({cell.key for cell in cells}) == len(cells) == 6 * 2 * (1 + 2 + 2 + 2)  # sz3 of all experts: one seed
    firsts = [groups[cell.blocks][0] for cell in cells]
    assert firsts == sorted(firsts)
    with pytest.raises(ValueError, match="'gauss'.*--kinds"):
        plan(groups, ["all"], ["gauss"], [HALF], [0])


# --- errors -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "rms", "largest"), [("gaussian-noise", 1, 6), ("uniform-noise", 3**-0.5, 1), ("sz3", 3**-0.5, 1)]
)
def test_errors_have_the_size_they_should(kind, rms, largest):
    """The root mean square is e (the nominal size) for normal noise, e / sqrt(3) for uniform noise and a quantizer."""
    weight = torch.randn(300, 200, generator=torch.Generator().manual_seed(0)) * 0.02
    size = 0.3 * weight.abs().mean().item()
    changed, stored = disturb(weight, kind, Bound("mean", 0.3), torch.Generator().manual_seed(1))
    error = (changed - weight).double()
    assert error.square().mean().sqrt().item() == pytest.approx(rms * size, rel=0.03)
    assert error.abs().max() <= largest * size * (1 + 1e-6) and abs(error.mean()) < 0.02 * size
    assert (stored > 0) == (kind == "sz3")


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek"])
def test_only_the_chosen_experts_change_and_all_are_restored(family):
    moe = MoEModel(tiny_models.build(family))
    before = {name: parameter.clone() for name, parameter in moe.model.named_parameters()}
    block = moe.moe_blocks[1]
    chosen = {block.index: [2, 5]}
    with pytest.raises(KeyboardInterrupt):
        with disturbed(moe.blocks, chosen, "gaussian-noise", lambda b, e: HALF, partial(stable_seed, 0)) as totals:
            for name, parameter in moe.model.named_parameters():
                experts = name.startswith(f"{block.name}.{block.experts_name}.") and parameter.ndim == 3
                same = [torch.equal(a, b) for a, b in zip(parameter, before[name], strict=True)]
                assert same == [not experts or i not in (2, 5) for i in range(len(same))]
            assert totals.num_weights == 2 * (128 * 64 + 64 * 64)
            assert 0.3 < totals.summary()["relative_error"] < 0.5  # 0.5 mean|w| is 0.4 of a normal weight's std
            raise KeyboardInterrupt
    assert all(torch.equal(parameter, before[name]) for name, parameter in moe.model.named_parameters())


def test_an_experts_noise_is_the_same_at_every_size():
    moe = MoEModel(tiny_models.build("qwen3_moe"))
    weight = moe.blocks[0].experts.weight("down_proj")
    original, errors = weight.clone(), []
    for experts, alpha in (([3], 0.2), ([1, 3, 4], 0.4)):
        bound = Bound("mean", alpha)
        with disturbed(moe.blocks, {0: experts}, "uniform-noise", lambda b, e, c=bound: c, partial(stable_seed, 9)):
            errors.append(weight[3] - original[3])
    torch.testing.assert_close(2 * errors[0], errors[1], rtol=1e-4, atol=1e-7)


# --- measurements -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def texts() -> dict[str, Text]:
    generator = torch.Generator().manual_seed(4)
    draw = partial(torch.randint, 0, tiny_models.VOCABULARY, generator=generator)
    return {name: Text(draw((3, 40)), make_questions(draw((9, 12)), 5, 8, seed=2)) for name in ("one", "two")}


@pytest.mark.parametrize("family", ["mixtral", "deepseek"])  # the latter's first block is dense
def test_a_cell_is_a_full_run_of_the_disturbed_model(family, texts):
    """From whichever block it starts, a measurement equals what transformers computes for the disturbed model."""
    moe = MoEModel(tiny_models.build(family))
    measurement = Measurement(moe, texts, batch_tokens=80)
    _check(measurement, measurement.baseline, moe, texts)
    untouched = _selections(moe, texts)
    assert measurement.load.keys() == untouched.keys()
    for block, ids in untouched.items():
        assert measurement.load[block].tolist() == torch.bincount(ids.flatten(), minlength=8).tolist()
    for index in (2, 1):  # forward, then back
        with disturbed(moe.blocks, {index: [0, 3, 6]}, "sz3", lambda b, e: HALF, partial(stable_seed, 0)):
            expected = _selections(moe, texts)
        measurement.seek(index)
        with disturbed(moe.blocks, {index: [0, 3, 6]}, "sz3", lambda b, e: HALF, partial(stable_seed, 0)):
            measured = measurement.measure()
            _check(measurement, measured, moe, texts)
        assert measured["nats"] != measurement.baseline["nats"]
        gone = [measured["nats"][name] - nats for name, nats in measurement.baseline["nats"].items()]
        assert measured["divergence"]["log_ppl_ratio"] == pytest.approx(sum(gone) / len(gone), abs=1e-6)
        assert measured["divergence"]["kl"] == pytest.approx(_divergence(moe, texts, index), rel=1e-4)
        any_changed = [
            (a.sort(-1).values != b.sort(-1).values).any(-1).float().mean().item()
            for a, b in zip(untouched.values(), expected.values(), strict=True)
        ]
        assert measured["expert_shift"]["any"] == pytest.approx(sum(any_changed) / len(any_changed), abs=1e-6)
        assert sorted(measured["expert_shift_blocks"]) == [str(b) for b in untouched if b >= index]
    measurement.seek(0)
    again = measurement.measure()
    assert again["nats"] == measurement.baseline["nats"] and again["expert_shift"]["any"] == 0
    assert again["divergence"]["kl"] == 0 and again["divergence"]["same_top"] == 1


@torch.no_grad()
def _divergence(moe, texts, index):
    """Mean over the texts of the KL divergence of full runs, with the errors of the cell from without."""
    windows = [text.windows for text in texts.values()]
    base = [moe.model(ids).logits[:, :-1].log_softmax(-1) for ids in windows]
    with disturbed(moe.blocks, {index: [0, 3, 6]}, "sz3", lambda b, e: HALF, partial(stable_seed, 0)):
        other = [moe.model(ids).logits[:, :-1].log_softmax(-1) for ids in windows]
    means = [
        kl_div(q, p, log_target=True, reduction="sum") / p[..., 0].numel() for p, q in zip(base, other, strict=True)
    ]
    return float(sum(means) / len(means))


@torch.no_grad()
def _check(measurement, measured, moe, texts):
    for name, text in texts.items():
        logits = moe.model(text.windows).logits
        expected = cross_entropy(logits[:, :-1].flatten(0, 1), text.windows[:, 1:].flatten()).item()
        assert measured["nats"][name] == pytest.approx(expected, rel=1e-5)
        chosen = answer(partial(token_log_likelihoods, moe), text.questions)
        assert measured["accuracy"][name] == accuracy(chosen, text.questions.answers)


@torch.no_grad()
def _selections(moe, texts):
    """By MoE block: the experts [N, K] that full runs over all windows select."""
    seen = {block.index: [] for block in moe.moe_blocks}
    handles = [
        block.router.register_forward_hook(lambda m, args, out, i=block.index: seen[i].append(out[2]))
        for block in moe.moe_blocks
    ]
    for text in texts.values():
        moe.model(text.windows)
    for handle in handles:
        handle.remove()
    return {block: torch.cat(ids) for block, ids in seen.items()}


# --- the command ------------------------------------------------------------------------------------------------


CELLS = 3 * 2 * 2 * 2
BUDGETS = {"blocks": "[each]", "kinds": "[uniform]", "budgets": "[0.5]"}


def options(model, output, **more) -> list[str]:
    values = {
        "model": model,
        "output": output,
        "blocks": "[depth]",
        "experts": "[all, random-2]",
        "kinds": "[sz3, gaussian-noise]",
        "bounds": "[0.3, 3.0]",
        "heldout": "[bundled:prose, bundled:code]",
        "num_windows": 2,
        "window_length": 64,
        "num_questions": 4,
    }
    return [word for name, value in (values | more).items() for word in (f"--{name}", str(value))]


def test_an_interrupted_study_resumes_to_the_same_report(tiny_model_dir, tmp_path, monkeypatch):
    model = tiny_model_dir("qwen3_moe")
    main(["study", *options(model, tmp_path / "whole")])
    add, added = Results.add, []

    def interrupted(self, key, row):
        if len(added) == 5:
            raise KeyboardInterrupt
        added.append(key)
        add(self, key, row)

    monkeypatch.setattr(Results, "add", interrupted)
    with pytest.raises(KeyboardInterrupt):
        main(["study", *options(model, tmp_path / "cut")])
    assert sorted(json.loads((tmp_path / "cut/cells.json").read_text())["rows"]) == sorted(added)
    monkeypatch.setattr(Results, "add", lambda self, key, row: (added.append(key), add(self, key, row)))
    main(["study", *options(model, tmp_path / "cut")])
    whole, cut = ((tmp_path / name / "cells.json").read_bytes() for name in ("whole", "cut"))
    assert whole == cut and len(added) == len(set(added))  # nothing was measured twice
    assert (tmp_path / "whole/study.csv").read_bytes() == (tmp_path / "cut/study.csv").read_bytes()

    main(["study", *options(model, tmp_path / "cut", bounds="[0.3, 1.0, 3.0]")])
    rows = list(csv.DictReader((tmp_path / "cut/study.csv").open()))
    assert len(rows) == len(added) == 3 * 2 * 2 * 3  # only the new bound was measured
    with pytest.raises(SystemExit):
        main(["study", *options(model, tmp_path / "cut", num_windows=3)])
    (tmp_path / "cut/cells.json").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(SystemExit):
        main(["study", *options(model, tmp_path / "cut")])
    _check_report(tmp_path / "whole")


def _check_report(output):
    study = json.loads((output / "study.json").read_text())
    assert len(study["rows"]) == CELLS and len(study["depths"]) == 4
    for small, large in zip(study["rows"][::2], study["rows"][1::2], strict=True):  # the bounds 0.3 and 3
        assert small["relative_error"] < large["relative_error"]
    assert len({row["changed selections"] for row in study["rows"]}) > CELLS / 2
    text = (output / "study.md").read_text()
    assert "shallow" in text and "paper, Gaussian 0.5" in text and "random-2" in text
    assert (output / "heatmap.png").read_bytes().startswith(b"\x89PNG")
    page, sz3 = (output / "pareto.html").read_text(), [row for row in study["rows"] if row["kind"] == "sz3"]
    assert page.count("<circle") == len(sz3) == CELLS / 2 and 0 < page.count("on the line</td>") < len(sz3)
    assert all(row["kl"] > 0 for row in study["rows"])
    events = EventAccumulator(str(output / "tensorboard")).Reload()
    assert events.Tags()["images"] == ["heat map"]
    assert len(events.Tags()["scalars"]) == 3 * CELLS / 2  # two bounds on each curve


@pytest.mark.slow
def test_a_killed_study_resumes_to_the_same_bytes(tiny_model_dir, tmp_path):
    model = tiny_model_dir("qwen3_moe")
    main(["study", *options(model, tmp_path / "whole")])
    process = jobs.start("train.py", "study", *options(model, tmp_path / "killed"))
    cells, deadline = tmp_path / "killed/cells.json", time.monotonic() + 200
    while not cells.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.kill()
    jobs.finish(process)
    done = len(json.loads(cells.read_text())["rows"])
    assert 0 < done < CELLS
    main(["study", *options(model, tmp_path / "killed")])
    assert cells.read_bytes() == (tmp_path / "whole/cells.json").read_bytes()


def test_unknown_options_are_refused_before_anything_is_measured(tiny_model_dir, tmp_path, capsys):
    model, chat = tiny_model_dir("qwen3_moe"), tmp_path / "chat.jsonl"
    chat.write_text('{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}')
    for more, message in (
        ({"experts": "[most-9]"}, "9 of 8 experts"),
        ({"blocks": "[9]"}, "--blocks"),
        ({"kinds": "[zip]"}, "--kinds"),
        ({"blocks": "[]"}, "--blocks is empty"),
        ({"kinds": "[]"}, "--kinds is empty"),
        ({"bounds": "[]"}, "--bounds is empty"),
        ({"bounds": "[0.0]"}, "--bounds: bound 0.0 is not a positive number"),
        ({"budgets": "[-1]"}, "--budgets: bound -1"),
        (
            BUDGETS | {"kinds": "[sz3]", "budgets": "[50]"},
            "--budgets 50: experts get bounds from 0.05 to 4.03 times mean",
        ),
        ({"num_windows": 10_000}, "(--num_windows)"),
        ({"window_length": 1}, "window_length=1 (--window_length) is below 2"),
        ({"continuation_length": 0}, "continuation_length=0 (--continuation_length) is below 1"),
        ({"context_length": 10**6}, "(--context_length + --continuation_length); pass a longer text"),
        ({"batch_tokens": 0}, "batch_tokens=0 (--batch_tokens) is below 1"),
        ({"heldout": chat}, "pass one as chat_template.jinja beside the tokenizer"),
        (BUDGETS | {"budget_windows": 0}, "budget_windows=0 (--budget_windows) is below 1"),
        (BUDGETS | {"budget_windows": 10_000}, "10002 (--num_windows + --budget_windows)"),
    ):
        with pytest.raises(SystemExit):
            main(["study", *options(model, tmp_path / "out", **more)])
        printed = capsys.readouterr().err
        assert message in printed and "--data." not in printed
    assert not (tmp_path / "out").exists()


def test_bounds_by_budget_take_no_more_bytes(tiny_model_dir, tmp_path, capsys):
    model = tiny_model_dir("deepseek")  # the first block is dense
    small = {"blocks": "[each]", "experts": "[all, most-1]", "kinds": "[sz3]", "budgets": "[0.7]", "budget_windows": 3}
    main(["study", *options(model, tmp_path / "out", **small)])
    bounds = json.loads((tmp_path / "out/bounds-0.7.json").read_text())
    moe, taken, codecs = MoEModel(load_original(str(model))), 0, set()
    for block in moe.moe_blocks:
        for expert, name in enumerate(bounds["codecs"][str(block.index)]):
            codecs.add(name)
            for projection in block.experts.projections:
                taken += len(codec(name).encode(block.experts.weight(projection)[expert]))
    text = (tmp_path / "out/study.md").read_text()
    assert 0.95 * bounds["budget_bytes"] < taken <= bounds["budget_bytes"] and len(codecs) > 1
    assert f"| 0.7 | one bound | {bounds['budget_bytes']} |" in text
    assert f"| 0.7 | by block and expert | {taken} |" in text

    before = (tmp_path / "out/cells.json").read_bytes()
    main(["study", *options(model, tmp_path / "out", **small)])  # nothing is measured again
    assert (tmp_path / "out/cells.json").read_bytes() == before
    for more, message in (
        ({"kinds": "[gaussian-noise, sz3]"}, "--kinds"),
        ({"blocks": "[all]"}, "--blocks"),
        ({"heldout": "[]"}, "--heldout is empty"),
    ):
        with pytest.raises(SystemExit):
            main(["study", *options(model, tmp_path / "other", **small | more)])
        assert message in capsys.readouterr().err


def test_the_report_is_there_even_if_no_bounds_can_be_chosen(tiny_model_dir, tmp_path, capsys):
    """Errors of nearly nothing lose nothing, or even gain."""
    small = BUDGETS | {"experts": "[all]", "bounds": "[1e-9]", "num_questions": 0, "dtype": "bfloat16"}
    with pytest.raises(SystemExit):
        main(["study", *options(tiny_model_dir("qwen3_moe"), tmp_path / "out", **small)])
    assert "no block of the study lost anything" in capsys.readouterr().err
    assert "## " in (tmp_path / "out" / "study.md").read_text() and (tmp_path / "out" / "study.csv").exists()


def test_only_the_rows_that_are_needed_are_read(tiny_model_dir, tmp_path, capsys):
    """The last row is no row at all."""
    rows = [json.dumps({"text": f"{7919 * i} of {104729 * i} and {1299709 * i} are numbers"}) for i in range(5000)]
    (tmp_path / "rows.jsonl").write_text("\n".join([*rows, "{"]))
    texts = read_texts({"rows": str(tmp_path / "rows.jsonl")}, tiny_model_dir("qwen3_moe"), 2, 32, 2, 8, 4)
    assert texts["rows"].windows.shape == (2, 32) and len(texts["rows"].questions) == 2


def test_files_of_something_else_stay(tiny_model_dir, tmp_path, capsys):
    (tmp_path / "study.md").write_text("my notes")
    with pytest.raises(SystemExit):
        main(["study", *options(tiny_model_dir("qwen3_moe"), tmp_path)])
    assert "is not empty and holds no cells.json: ['study.md']" in capsys.readouterr().err
    assert (tmp_path / "study.md").read_text() == "my notes"


def test_budgets_are_measured_again_on_other_windows(tiny_model_dir, tmp_path):
    """The text changes behind the study's own windows."""
    prose, maths = (read_documents(f"bundled:{name}")[0] for name in ("prose", "maths"))
    small = {"blocks": "[each]", "experts": "[all]", "kinds": "[uniform]", "bounds": "[0.5]", "num_questions": 0}
    small |= {"heldout": tmp_path / "text.txt", "budgets": "[0.5]", "budget_windows": 2}
    for output, text in (("first", prose), ("first", prose[:700] + maths), ("second", prose[:700] + maths)):
        (tmp_path / "text.txt").write_text(text[:20_000])
        main(["study", *options(tiny_model_dir("qwen3_moe"), tmp_path / output, **small)])
    first, second = ((tmp_path / name / "study.md").read_text().splitlines() for name in ("first", "second"))
    assert [line for line in first if "| by" in line or "one bound |" in line] == [
        line for line in second if "| by" in line or "one bound |" in line
    ]


@pytest.mark.parametrize("value", [0, "[0]", '["0"]', "0,2", "[0,2]", "[0, 1-2]", "each", "config: [0]", "config: 0"])
def test_blocks_may_be_one_or_a_list_as_numbers_or_words(value, tiny_model_dir, tmp_path):
    words = options(tiny_model_dir("qwen3_moe"), tmp_path / "out", experts="all", kinds="sz3", bounds=0.3, seeds=0)
    word = words[words.index("--blocks") + 1] = str(value)
    if word.startswith("config: "):
        (tmp_path / "blocks.yaml").write_text(word.replace("config", "blocks"))
        place = words.index("--blocks")
        words[place : place + 2] = ["--config", str(tmp_path / "blocks.yaml")]
    main(["study", *words])
    study = json.loads((tmp_path / "out/study.json").read_text())
    groups = {"0,2": ["0,2"], "[0,2]": ["0", "2"], "[0, 1-2]": ["0", "1-2"], "each": ["0", "1", "2"]}
    assert [row["blocks"] for row in study["rows"]] == groups.get(word, ["0"])


@pytest.mark.parametrize("config", sorted((jobs.ROOT / "configs").glob("study-*.yaml")), ids=lambda path: path.stem)
def test_shipped_study_configs_are_accepted(config, capsys):
    with pytest.raises(SystemExit) as end:
        main(["study", "--config", str(config), "--print_config"])
    assert end.value.code in (0, None)
    printed = yaml.safe_load(capsys.readouterr().out)
    for option, value in yaml.safe_load(config.read_text()).items():
        assert printed[option] == value


# --- shallow, middle, deep --------------------------------------------------------------------------------------


def test_depths_are_ordered_by_loss():
    def row(blocks, lost, bound=0.5, experts="all", seed=None):
        return {"blocks": blocks, "experts": experts, "kind": "k", "mode": "mean", "bound": bound, "seed": seed,
                "lost": lost, "accuracy": 0.5}  # fmt: skip

    rows = [row("shallow", 0.2), row("middle", 0.1, seed=0), row("middle", 0.5, seed=1), row("deep", -0.1)]
    rows += [row("shallow", 9.0, experts="most-1"), row("shallow", 0.1, bound=0.3), row("middle", 0.1, bound=0.3)]
    (summary,) = depth_summary(rows)  # at 0.3 the deep blocks were not measured
    assert summary["lost"] == {"shallow": 0.2, "middle": pytest.approx(0.3), "deep": -0.1}
    assert summary["order"] == ["middle", "shallow", "deep"] and summary["agrees"]
    (summary,) = depth_summary(rows[:2] + [row("deep", 0.15)])
    assert summary["order"] == ["shallow", "deep", "middle"] and not summary["agrees"]
