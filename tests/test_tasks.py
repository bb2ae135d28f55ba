"""Tasks through lm-eval-harness: what changed in a model's answers, what is kept, and packed weights beside dense ones.

Tests that run lm-eval are skipped where it is not installed (`pip install -e ".[test,tasks]"`).
"""

import copy
import inspect
import json
import re
import sys
from importlib.util import find_spec

import jobs
import pytest
import tiny_models
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

import eacmoe_lightning
from eacmoe_lightning.cli import main
from eacmoe_lightning.commands.tasks import Kept, names_of, read_unit, rules_of
from eacmoe_lightning.evaluation import local_tasks
from eacmoe_lightning.evaluation.harness import (
    SHIPPED,
    Asking,
    ask,
    find_tasks,
    language_model,
    load_units,
    require_harness,
)
from eacmoe_lightning.evaluation.streams import token_log_likelihoods
from eacmoe_lightning.evaluation.task_results import answers_of, compare, is_scored, summary, tabulate
from eacmoe_lightning.models.moe import MoEModel
from eacmoe_lightning.skipping import PESF, pesf, set_skipping
from eacmoe_lightning.text.documents import read_documents

needs_lm_eval = pytest.mark.skipif(find_spec("lm_eval") is None, reason="lm-eval is not installed (extra: tasks)")


class Loader(yaml.SafeLoader):
    """Reads lm-eval's YAML, with the names of functions as strings."""


Loader.add_constructor("!function", lambda loader, node: loader.construct_scalar(node))
CONFIGS = {path.stem: yaml.load(path.read_text(), Loader) for path in sorted(SHIPPED.glob("*.yaml"))}


# --- what changed


def record(i, answer, correct):
    return {
        "id": f"t/{i}",
        "hash": str(i),
        "filter": "none",
        "answers": {"": answer},
        "correct": {"acc": correct},
    }


def test_flips_and_recovery_by_hand():
    original = [record(0, 1, 1), record(1, 2, 1), record(2, 0, 0), record(3, 3, 0), record(4, 1, 1)]
    subject = [record(0, 1, 1), record(1, 0, 0), record(2, 1, 0), record(3, 2, 1), record(4, 0, 0)]
    found = compare(subject, original, "acc")
    assert found["flips"] == 4 / 5  # one of them from a wrong answer to another wrong one
    assert (found["correct_to_wrong"], found["wrong_to_correct"]) == (2 / 5, 1 / 5)
    assert found["recovery"] == pytest.approx(100 * 2 / 3) and found["difference"] == pytest.approx(-1 / 5)
    changes = torch.tensor([0.0, -1, 0, 1, -1])
    assert found["difference_stderr"] == pytest.approx(float(changes.std()) / 5**0.5)
    with pytest.raises(ValueError, match="other questions"):
        compare(subject[::-1], original, "acc")


def test_an_original_that_is_always_wrong_recovers_nothing():
    assert compare([record(0, 1, 1)], [record(0, 2, 0)], "acc")["recovery"] is None


def test_answers():
    scores = [(-2.0, False), (-3.0, False), (-9.0, False)]
    assert answers_of("multiple_choice", scores, [1, 2, 9]) == {"": 0, "acc_norm": 2}
    unconditional = [*scores, (-1.0, False), (-1.0, False), (-0.1, False)]  # mutual information asks these too
    assert answers_of("multiple_choice", unconditional, [1, 2, 9])[""] == 0
    assert answers_of("loglikelihood", [(-2.0, True)], []) == {"": True}
    assert answers_of("generate_until", ["seven"], []) == {"": "seven"}
    assert is_scored([1, 0.0, True]) and not is_scored([0.5]) and not is_scored([(1, 2)])


def test_the_table_counts_each_task_once():
    def unit(answers, correct):
        questions = [record(i, a, c) for i, (a, c) in enumerate(zip(answers, correct, strict=True))]
        metrics = {"acc,none": {"value": sum(correct) / len(correct), "stderr": 0.1, "is_scored": True}}
        return {"metrics": metrics, "questions": questions, "seconds": 3.0}

    units = {
        "a": {"original": unit([0, 1], [1, 1]), "small": unit([0, 0], [1, 0])},
        "b": {"original": unit([0] * 4, [0, 0, 1, 1]), "small": unit([0] * 4, [0, 0, 1, 1])},
        "c": {"original": unit([0], [1])},  # not finished
    }
    results = tabulate(units, "original")
    assert results["tasks"]["a"]["num_questions"] == 2
    assert results["mean"]["small"] == {"num_tasks": 2, "value": 0.5, "recovery": pytest.approx(200 / 3), "flips": 0.25}
    assert results["mean"]["original"]["num_tasks"] == 3
    lines = summary(results, "original").splitlines()
    assert len({len(line) for line in lines}) == 1
    assert re.search(r"a +\| small +\| acc +\| 0.5000 ± 0.1000 \| 50.0% +\| 50.0% +\| 0.0% +\| 50.0", lines[3])


# --- local tasks


def test_continuations_are_passages_of_the_text():
    text = "\n\n".join(read_documents("bundled:code"))
    asked = local_tasks.continuation("bundled:code", 30, seed=3)["test"]
    assert len(asked) == 30
    for row in asked:
        assert len(set(row["choices"])) == 4
        assert [row["context"] + choice in text for choice in row["choices"]] == [i == row["answer"] for i in range(4)]
    assert len(set(asked["answer"])) == 4
    assert asked.to_list() == local_tasks.continuation("bundled:code", 30, seed=3)["test"].to_list()
    with pytest.raises(ValueError, match="passages of 50 words, but the task asks 99999"):
        local_tasks.continuation("bundled:code", 99999)


def test_other_local_questions():
    text = "\n\n".join(read_documents("bundled:prose"))
    for row in local_tasks.last_word("bundled:prose")["test"]:
        assert row["context"] + row["word"] in text and row["word"] in f" {row['context']}"
    sums = local_tasks.one_digit_sums()["test"].to_list()
    assert len(sums) == 110
    for row in sums:
        a, sign, b = re.fullmatch(r"Question: What is (\d) ([+-]) (\d)\?\nAnswer:", row["question"]).groups()
        assert row["answer"] == (int(a) + int(b) if sign == "+" else int(a) - int(b))
    questions = local_tasks.answered("bundled:maths", 50)["test"].to_list()
    text = "\n\n".join(read_documents("bundled:maths"))
    assert len(questions) == 50 and all(f"{q['question']} {q['answer']}\n" in text for q in questions)
    with pytest.raises(ValueError, match="lower num_questions"):
        local_tasks.last_word("bundled:prose", 10**6)


@pytest.mark.parametrize("name", [name for name, config in CONFIGS.items() if "custom_dataset" in config])
def test_shipped_tasks_need_no_hub(name):
    config = CONFIGS[name]
    assert config["task"] == name and "dataset_path" not in config and name in CONFIGS["bundled"]["task"]
    module, _, function = config["custom_dataset"].rpartition(".")
    assert module == local_tasks.__name__
    signature = inspect.signature(getattr(local_tasks, function))
    signature.bind(**config.get("dataset_kwargs", {}))
    assert set(config.get("dataset_kwargs", {})) <= set(signature.parameters)


# --- options


def test_without_lm_eval_the_error_names_the_extra(monkeypatch):
    for module in [name for name in sys.modules if name.split(".")[0] == "lm_eval"]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ValueError, match=re.escape("pip install 'eacmoe-lightning[tasks]'")):
        require_harness()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Asking(num_fewshot=-1), "--num_fewshot"),
        (lambda: Asking(limit=0), "--limit"),
        (lambda: names_of("a,,b"), "--tasks"),
        (lambda: names_of([]), "--tasks"),
        (lambda: rules_of([]), "--pesf"),
        (lambda: rules_of(1.5), "alpha=1.5"),
        (lambda: rules_of(0.3, rescue=2.0), "rescue=2.0"),
    ],
)
def test_bad_options(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_options_in_lm_evals_words():
    assert names_of("arc_easy, piqa") == ["arc_easy", "piqa"] == names_of(["arc_easy", "piqa"])
    assert rules_of(None) is None and rules_of([0, 0.3]) == [None, PESF(0.3)]
    assert rules_of(0.7, "reroute", 1.0) == [PESF(0.7, "reroute", 1.0)]


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("pesf", "0.9"),
        ("limit", "5"),
        ("num_fewshot", "2"),
        ("rescue", "1.0"),
        ("survivors", "reroute"),
        ("include_path", "somewhere"),
        ("apply_chat_template", "true"),
        ("overwrite", "true"),
        ("task_batch_size", "2"),
    ],
)
def test_options_of_tasks_need_tasks(option, value, fitted, tmp_path, capsys):
    with pytest.raises(SystemExit):
        evaluated(fitted("mixtral"), tmp_path / "run", f"--{option}", value)
    assert f"--{option} needs --tasks" in capsys.readouterr().err and not (tmp_path / "run" / "test.json").exists()


# --- with lm-eval


@needs_lm_eval
@pytest.mark.slow
def test_names_of_tasks_on_the_hub():
    from lm_eval.tasks import TaskManager

    known = TaskManager().all_tasks
    names = [name for group in ("zero_shot", "generated") for name in CONFIGS[group]["task"]]
    assert len(names) == 10 and set(names) <= set(known)
    assert not set(CONFIGS) & set(known), "a task of lm-eval has the name of one of ours"
    with pytest.raises(ValueError, match="there is no task hellaswagg .*hellaswag"):
        find_tasks(["hellaswagg"])


@needs_lm_eval
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--tasks", "last_word", "--include_path", "nowhere"], "no folder nowhere"),
        (["--tasks", "bundled,last_word"], "last_word is in --tasks twice"),
        (["--tasks", "last_word", "--task_batch_size", "0"], "--task_batch_size"),
        (["--tasks", "last_word", "--trainer.devices", "2"], "--trainer.devices 1"),
        (["--tasks", "last_word", "--apply_chat_template", "true"], "--apply_chat_template true.* no chat template"),
        (["--tasks", "mine", "--include_path", "{tmp}"], "mine .*cannot be loaded: .*questions.jsonl"),
    ],
)
def test_refusals_before_a_model_is_read(words, message, fitted, tmp_path, capsys):
    missing = {
        "task": "mine",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": str(tmp_path / "questions.jsonl")},
    }
    (tmp_path / "mine.yaml").write_text(
        yaml.safe_dump(missing | {"output_type": "generate_until", "test_split": "train"})
    )
    with pytest.raises(SystemExit):
        evaluated(fitted("mixtral"), tmp_path / "run", *(word.format(tmp=tmp_path) for word in words))
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "run" / "tasks").exists()


def evaluated(model, run, *words):
    places = ["--trainer.default_root_dir", str(run), "--model.evaluate", str(model), "--trainer.accelerator", "cpu"]
    main(["test", *places, *words])
    return json.loads((run / "tasks.json").read_text())


@pytest.fixture(scope="module")
def asked(once, fitted):
    """A run directory in which a compressed model, with and without PESF, and its original have answered."""

    def make(folder):
        words = ["--tasks", "continuation_code,one_digit_sums_generated", "--limit", "4"]
        evaluated(fitted("mixtral"), folder, *words, "--pesf", "[0, 0.7]")

    return once("tasks", make)


@needs_lm_eval
def test_results(asked, fitted):
    results = json.loads((asked / "tasks.json").read_text())
    name = fitted("mixtral").name
    assert set(results["models"]) == {"original", name, f"{name}, PESF 0.7"}
    assert results["models"][f"{name}, PESF 0.7"]["rule"]["alpha"] == 0.7
    for task, metrics in (
        ("continuation_code", ["acc,none", "acc_norm,none"]),
        ("one_digit_sums_generated", ["exact_match,first-number"]),
    ):
        assert results["tasks"][task]["num_questions"] == 4
        for model, values in results["tasks"][task]["models"].items():
            unit = read_unit(Kept(asked, {}).file(model, task))
            assert list(values["metrics"]) == metrics and len(unit["questions"]) == 4
            for metric, value in values["metrics"].items():
                scores = torch.tensor([q["correct"][metric.partition(",")[0]] for q in unit["questions"]]).double()
                assert value["value"] == pytest.approx(float(scores.mean()))
                assert value["stderr"] == pytest.approx(float(scores.std()) / 4**0.5)
                assert ("flips" in value) == (model != "original")
    assert "continuation_code" in (asked / "tasks.md").read_text()


@needs_lm_eval
def test_the_same_command_asks_nothing_again_and_others_are_refused(asked, fitted, tmp_path, capsys):
    run = tmp_path / "run"
    jobs_before = jobs.contents(asked / "tasks")
    for path, content in jobs_before.items():
        (run / "tasks" / path).parent.mkdir(parents=True, exist_ok=True)
        (run / "tasks" / path).write_bytes(content)
    words = ["--tasks", "continuation_code", "--pesf", "0"]
    evaluated(fitted("mixtral"), run, *words, "--limit", "4")
    assert capsys.readouterr().out.count("all answers are there") == 2
    assert jobs.contents(run / "tasks") == jobs_before
    with pytest.raises(SystemExit):
        evaluated(fitted("mixtral"), run, *words, "--limit", "3")
    assert "limit=4.0; now limit=3.0" in capsys.readouterr().err and jobs.contents(run / "tasks") == jobs_before
    with pytest.raises(SystemExit):  # the name first, and nothing is removed for it
        evaluated(fitted("mixtral"), run, "--tasks", "nope", "--limit", "3", "--overwrite", "true")
    assert "there is no task nope" in capsys.readouterr().err and jobs.contents(run / "tasks") == jobs_before
    results = evaluated(fitted("mixtral"), run, *words, "--limit", "3", "--overwrite", "true")
    assert (
        list(results["tasks"]) == ["continuation_code"] and results["tasks"]["continuation_code"]["num_questions"] == 3
    )


@needs_lm_eval
@pytest.mark.slow
def test_packed_and_dense_weights_answer_alike(asked, fitted, tmp_path):
    """The dense export is loaded by transformers alone and asked by lm-eval's own class."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    run = fitted("mixtral")
    main(["export", "--source", str(run), "--output", str(tmp_path / "dense"), "--format", "dense"])
    dense = HFLM(
        pretrained=AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype="float32"),
        tokenizer=AutoTokenizer.from_pretrained(tmp_path / "dense"),
        batch_size=3,
    )
    names = ["continuation_code", "one_digit_sums_generated"]
    for unit in load_units(names, find_tasks(names)):
        kept = read_unit(Kept(asked, {}).file(run.name, unit.name))
        found = simple_evaluate(dense, tasks=[unit.spec], limit=4, bootstrap_iters=0)
        for metric, value in kept["metrics"].items():
            assert found["results"][unit.name][metric] == pytest.approx(value["value"])
        for ours, theirs in zip(kept["questions"], found["samples"][unit.name], strict=True):
            assert ours["hash"] == theirs["prompt_hash"] + theirs["target_hash"]
            if "log_likelihoods" in ours:
                scores = [score for score, _ in theirs["filtered_resps"]]
                assert ours["log_likelihoods"] == pytest.approx(scores, abs=1e-3)
            else:
                assert ours["answers"][""] == theirs["filtered_resps"][0]


@needs_lm_eval
def test_scores_under_pesf_are_those_of_one_sequence_at_a_time(fitted, tokenizer):
    """lm-eval's batches are padded without a mask, so padding would count among a sequence's selections."""
    model = eacmoe_lightning.load(fitted("mixtral"))
    pairs = [("def main(", "args):"), ("import os\nimport sys\n\n\nclass", " Reader:\n    pass"), ("a", " b c d e f g")]
    encoded = [(None, tokenizer(context).input_ids, tokenizer(rest).input_ids) for context, rest in pairs]
    moe, expected = MoEModel(model), []
    with pesf(model, 0.7) as report, torch.no_grad():
        for _, context, rest in encoded:
            logits = model(torch.tensor([context + rest])[:, :-1]).logits[0].log_softmax(-1)
            expected.append(float(logits[len(context) - 1 :].gather(1, torch.tensor(rest)[:, None]).sum()))
        assert report.summary()["pairs_dropped"] > 0
    lm = language_model(model, tokenizer, batch_size=3)
    plain = [score for score, _ in lm._loglikelihood_tokens(encoded, disable_tqdm=True)]
    for (_, context, rest), score in zip(encoded, plain, strict=True):
        rows = token_log_likelihoods(moe, torch.tensor([context + rest]))[0, len(context) - 1 :]
        assert score == pytest.approx(float(rows.sum()), abs=1e-3)
    set_skipping(model, PESF(0.7))
    skipped = [score for score, _ in lm._loglikelihood_tokens(encoded, disable_tqdm=True)]
    assert skipped == pytest.approx(expected, abs=1e-3)
    assert max(abs(a - b) for a, b in zip(skipped, plain, strict=True)) > 0.01  # the rule did something
    assert lm.batch_size == 3


@needs_lm_eval
def test_generation_under_pesf_in_a_batch_is_that_of_one_sequence_at_a_time(fitted, tokenizer):
    model = eacmoe_lightning.load(fitted("mixtral"))
    set_skipping(model, PESF(0.7))
    (unit,) = load_units(["maths_answers"], find_tasks(["maths_answers"]))  # questions of different lengths
    asking = Asking(limit=3)
    alone, together = (ask(language_model(model, tokenizer, size), unit, asking) for size in (1, 3))
    assert [q["answers"] for q in alone["questions"]] == [q["answers"] for q in together["questions"]]
    assert len({q["answers"][""] for q in alone["questions"]}) > 1


@needs_lm_eval
def test_prompts_that_tell_the_date_are_the_same_on_every_day(tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = "{{ strftime_now('%Y-%m-%d') }}{% for m in messages %}{{ m.content }}{% endfor %}"
    model = language_model(tiny_models.build("mixtral"), tokenizer)
    assert model.apply_chat_template([{"role": "user", "content": "Hi"}]) == "2026-01-01Hi"
