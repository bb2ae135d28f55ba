"""What compression did to a model's answers: flips, recovery and the table, from the answers to each question.

A question's record has `id`, `hash` (of its text), `answers` and `correct` by metric, and the log-likelihoods of its
choices. All functions are pure, so everything in tasks.json can be computed again from the records that are kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

Record = dict[str, Any]


def answers_of(output_type: str, responses: Sequence[Any], choice_lengths: Sequence[int]) -> dict[str, Any]:
    """What a model answered, by the metric that reads it so; `""` is for all other metrics.

    Args:
        output_type: lm-eval's: `multiple_choice`, `loglikelihood` or `generate_until`.
        responses: lm-eval's filtered responses: (log-likelihood, is greedy) of each choice, or a text.
        choice_lengths: characters of each choice.
    """
    if output_type == "multiple_choice":
        scores = torch.tensor([score for score, _ in responses][: len(choice_lengths)], dtype=torch.float64)
        by_length = scores / torch.tensor(choice_lengths, dtype=torch.float64)
        return {"": int(scores.argmax()), "acc_norm": int(by_length.argmax())}
    if output_type == "loglikelihood":
        return {"": bool(responses[0][1])}
    return {"": responses[0]}


def is_scored(values: Sequence[Any]) -> bool:
    """Whether a metric says of every question whether it is right: 1 or 0."""
    return all(isinstance(value, bool | int | float) and value in (0, 1) for value in values)


def compare(subject: Sequence[Record], original: Sequence[Record], metric: str) -> dict[str, float]:
    """A model's answers beside the original's, question by question.

    Args:
        subject, original: records of the same questions in the same order.
        metric: whose answers and correctness count.

    Returns:
        `flips`, the share of questions with another answer; `correct_to_wrong` and `wrong_to_correct`, shares of all
        questions; `recovery`, percent of the original's accuracy (None if that is zero); `difference` of the accuracies
        and `difference_stderr`, its standard error from the differences of each question (None for one question).

    Raises:
        ValueError: the questions are others.
    """
    if [record["hash"] for record in subject] != [record["hash"] for record in original]:
        raise ValueError("the two models were asked other questions: evaluate the original again")
    differs, change, before = [], [], []
    for new, old in zip(subject, original, strict=True):
        answers = [record["answers"].get(metric, record["answers"][""]) for record in (new, old)]
        differs.append(answers[0] != answers[1])
        change.append(new["correct"][metric] - old["correct"][metric])
        before.append(old["correct"][metric])
    changes, total = torch.tensor(change, dtype=torch.float64), float(sum(before))
    return {
        "flips": sum(differs) / len(differs),
        "correct_to_wrong": float((changes < 0).double().mean()),
        "wrong_to_correct": float((changes > 0).double().mean()),
        "recovery": 100 * (total + float(changes.sum())) / total if total else None,
        "difference": float(changes.mean()),
        "difference_stderr": float(changes.std()) / len(change) ** 0.5 if len(change) > 1 else None,
    }


def tabulate(units: dict[str, dict[str, dict[str, Any]]], original: str) -> dict[str, Any]:
    """Results of all tasks and models, each model beside the original.

    Args:
        units: finished tasks by task and model: `metrics` {metric: {value, stderr, is_scored}}, `questions` (records)
            and `seconds`.
        original: the model that the others are compared with.

    Returns:
        `tasks`: by task and model, each metric with its value, standard error and comparison, and the seconds; `mean`:
        by model, over the tasks that the original and the model have finished, the mean of their first metric, its
        recovery and the mean share of flips.
    """
    tasks: dict[str, Any] = {}
    for task, models in units.items():
        tasks[task] = {"num_questions": len({q["id"] for q in next(iter(models.values()))["questions"]}), "models": {}}
        for model, unit in models.items():
            metrics = {}
            for key, metric in unit["metrics"].items():
                metrics[key] = dict(metric)
                if model != original and original in models and metric["is_scored"]:
                    name, _, kind = key.partition(",")
                    records = [_of_filter(models[m]["questions"], kind, name) for m in (model, original)]
                    metrics[key] |= compare(*records, name)
            tasks[task]["models"][model] = {"metrics": metrics, "seconds": unit["seconds"]}
    return {"tasks": tasks, "mean": _means(tasks, original)}


def _of_filter(records: Sequence[Record], kind: str, metric: str) -> list[Record]:
    return [record for record in records if record["filter"] == kind and metric in record["correct"]]


def main_metric(model: dict[str, Any]) -> dict[str, Any]:
    """The first metric of a task's result for a model."""
    return next(iter(model["metrics"].values()))


def _means(tasks: dict[str, Any], original: str) -> dict[str, Any]:
    means = {}
    for model in dict.fromkeys(model for task in tasks.values() for model in task["models"]):
        both = [t["models"] for t in tasks.values() if model in t["models"] and original in t["models"]]
        both = [models for models in both if main_metric(models[original])["is_scored"]]
        if not both:
            continue
        values = [main_metric(models[model]) for models in both]
        mean, before = (sum(main_metric(models[m])["value"] for models in both) / len(both) for m in (model, original))
        means[model] = {"num_tasks": len(both), "value": mean}
        if model != original:
            means[model] |= {
                "recovery": 100 * mean / before if before else None,
                "flips": sum(value["flips"] for value in values) / len(both),
            }
    return means


def summary(results: dict[str, Any], original: str) -> str:
    """A table for the terminal and for tasks.md."""
    head = ["task", "model", "metric", "value", "flips", "to wrong", "to right", "recovery", "s"]
    rows = [head, ["---"] * len(head)]
    for task, result in results["tasks"].items():
        for model, values in result["models"].items():
            for metric, value in values["metrics"].items():
                name = metric.removesuffix(",none")
                rows.append([task, model, name, _accuracy(value), *_compared(value), f"{values['seconds']:.0f}"])
    for model, mean in results["mean"].items():
        task = f"mean of {mean['num_tasks']}"
        flips, recovery = (f"{mean[k]:{form}}" if mean.get(k) is not None else "" for k, form in FORMS)
        rows.append([task, model, "", f"{mean['value']:.4f}", flips, "", "", recovery, ""])
    widths = [max(3, *(len(row[i]) for row in rows)) for i in range(len(head))]
    rows[1] = ["-" * width for width in widths]
    lines = (" | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(f"| {line} |" for line in lines)


FORMS = (("flips", ".1%"), ("recovery", ".1f"))


def _accuracy(value: dict[str, Any]) -> str:
    stderr = value["stderr"]
    return f"{value['value']:.4f}" + (f" ± {stderr:.4f}" if stderr is not None else "")


def _compared(value: dict[str, Any]) -> list[str]:
    if "flips" not in value:
        return ["", "", "", ""]
    recovery = "" if value["recovery"] is None else f"{value['recovery']:.1f}"
    return [f"{value[name]:.1%}" for name in ("flips", "correct_to_wrong", "wrong_to_correct")] + [recovery]
