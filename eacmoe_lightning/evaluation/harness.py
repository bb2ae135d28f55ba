"""lm-eval-harness: loads its tasks and lets a model answer them. Only this module imports lm_eval, inside functions.

lm-eval scores choices in batches that are padded on the right, without an attention mask. That changes nothing that a
causal model says before the padding, but PESF would count the padding among a sequence's selections. So a model with a
rule scores one sequence at a time. Generation is padded on the left with a mask, and stays in batches.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from eacmoe_lightning.evaluation.task_results import Record, answers_of, is_scored
from eacmoe_lightning.skipping import current_rule
from eacmoe_lightning.text.chat import on_a_fixed_date

SHIPPED = Path(__file__).parent.parent / "configs" / "tasks"
SAMPLES = 1000  # of bootstrapped standard errors, for metrics that have no closed form


@dataclass(frozen=True)
class Asking:
    """How questions are asked, in lm-eval's words.

    Attributes:
        num_fewshot: examples before a question; None: as the task says, otherwise none.
        limit: only so many questions of a task, or this share of them if below 1; None asks all.
        apply_chat_template: whether prompts go through the tokenizer's chat template.
        confirm_run_unsafe_code: whether code that a model writes may run (HumanEval).

    Raises:
        ValueError: an option is out of range.
    """

    num_fewshot: int | None = None
    limit: float | None = None
    apply_chat_template: bool = False
    confirm_run_unsafe_code: bool = False

    def __post_init__(self) -> None:
        if self.num_fewshot is not None and self.num_fewshot < 0:
            raise ValueError(f"num_fewshot={self.num_fewshot} (--num_fewshot) is negative")
        if self.limit is not None and self.limit <= 0:
            raise ValueError(
                f"limit={self.limit} (--limit) is not positive: pass a number of questions, or null for all"
            )


def require_harness() -> str:
    """The version of lm-eval.

    Raises:
        ValueError: it is not installed.
    """
    try:
        import lm_eval.models.huggingface  # noqa: F401
    except ImportError as error:
        raise ValueError(
            f"--tasks runs lm-eval-harness, which is not installed ({error}): pip install 'eacmoe-lightning[tasks]'"
        ) from error
    return version("lm_eval")


@dataclass(frozen=True)
class Unit:
    """A task, or a group whose tasks have a common score, with its data at hand.

    Attributes:
        name: lm-eval's.
        spec: lm-eval's Task or Group.
        tasks: its tasks by name.
    """

    name: str
    spec: Any
    tasks: dict[str, Any]

    def digest(self, asking: Asking) -> str:
        """SHA-256 of what is asked: the configuration and the documents of all tasks, and the options."""
        sha = hashlib.sha256()
        for name, task in self.tasks.items():
            config = {k: v for k, v in task.dump_config().items() if k not in ("dataset_kwargs", "metadata")}
            config["num_fewshot"] = None  # lm-eval sets it when it runs; the option is below
            sha.update(json.dumps([name, config], sort_keys=True, default=_name_of).encode())
            for _, doc in task.doc_iterator(limit=_number(task, asking.limit)):
                sha.update(json.dumps(doc, sort_keys=True, default=str).encode())
        sha.update(json.dumps([asking.num_fewshot, asking.limit, asking.apply_chat_template]).encode())
        return sha.hexdigest()


def _name_of(value: Any) -> str:
    return getattr(value, "__qualname__", type(value).__name__)


def _number(task: Any, limit: float | None) -> int | None:
    from lm_eval.evaluator_utils import get_sample_size

    return get_sample_size(task, limit)


def find_tasks(names: Sequence[str], include_path: str | Path | None = None) -> Any:
    """lm-eval's index of tasks (TaskManager), which has all of these names; loads none of their data.

    Args:
        names: names of lm-eval's tasks, groups and tags, of the package's (configs/tasks) and of those in
            `include_path`.
        include_path: a folder with further tasks as YAML files.

    Raises:
        ValueError: there is no such task.
        FileNotFoundError: there is no such folder.
    """
    from lm_eval.tasks import TaskManager

    if include_path is not None and not Path(include_path).is_dir():
        raise FileNotFoundError(f"there is no folder {include_path} (--include_path)")
    folders = [str(SHIPPED), *([str(include_path)] if include_path is not None else [])]
    manager = TaskManager(include_path=folders, include_defaults=False)
    if not all(_is_known(manager, name) for name in names):
        manager = TaskManager(include_path=folders)  # reading 14,000 files takes seconds
    for name in names:
        if name not in manager.task_index:
            near = difflib.get_close_matches(name, manager.all_tasks, 5, 0.6) or ["none is called similarly"]
            raise ValueError(
                f"there is no task {name} (--tasks): {', '.join(near)}? Tasks of your own are YAML files in the folder "
                "of --include_path"
            )
    return manager


def load_units(names: Sequence[str], manager: Any) -> list[Unit]:
    """Tasks by name, in the given order. Groups without a common score and tags become their tasks.

    Args:
        names, manager: names that lm-eval's index has, see `find_tasks`.

    Raises:
        ValueError: a task is in the list twice.
        FileNotFoundError: the data of a task cannot be loaded.
    """
    units: dict[str, Unit] = {}
    for name in names:
        for unit in _load(manager, name):
            if unit.name in units:
                raise ValueError(f"the task {unit.name} is in --tasks twice")
            units[unit.name] = unit
    return list(units.values())


def _is_known(manager: Any, name: str) -> bool:
    """Whether a task, and all tasks of a group, are in the index."""
    entry = manager.task_index.get(name)
    if entry is None:
        return False
    parts = (entry.cfg or {}).get("task") if "group" in (entry.cfg or {}) else None
    names = [part if isinstance(part, str) else part.get("task", part.get("group")) for part in parts or ()]
    return all(_is_known(manager, name) for name in names)


def _load(manager: Any, name: str) -> list[Unit]:
    try:
        with _quiet():
            loaded = manager.load([name])
    except Exception as error:  # whatever datasets, the hub and a task's own code raise
        raise FileNotFoundError(
            f"the task {name} (--tasks) cannot be loaded: {type(error).__name__}: {error}. Its data comes from the "
            "Hugging Face hub or from the files that its YAML names; `--tasks bundled` needs neither"
        ) from error
    tasks, groups = loaded["tasks"], loaded["groups"]

    def units(name: str) -> list[Unit]:
        if name not in groups:
            return [Unit(name, tasks[name], {name: tasks[name]})]
        group = groups[name]
        if group.aggregate_metric_list:
            return [Unit(name, group, {task.task_name: task for task in group.get_all_tasks()})]
        return [unit for child in group.child_names for unit in units(child)]

    return units(name) if name in groups or name in tasks else [unit for task in tasks for unit in units(task)]


@contextmanager
def _quiet() -> Iterator[None]:
    """Without lm-eval's warnings of what is meant so."""
    log = logging.getLogger("lm_eval")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(before)


def language_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int = 8) -> Any:
    """The model as lm-eval's HFLM.

    Args:
        model: any causal LM of transformers; one with a rule that skips experts scores one sequence at a time. The
            number of tokens in its generation config is removed.
        tokenizer: its tokenizer.
        batch_size: sequences per batch.
    """
    from lm_eval.models.huggingface import HFLM

    class LanguageModel(HFLM):
        """HFLM that scores one sequence at a time if the model skips experts by what a sequence selects.

        Prompts that tell the date tell a fixed one, so that another day's figures are comparable.
        """

        def apply_chat_template(self, *args: Any, **kwargs: Any) -> str:
            with on_a_fixed_date(self.tokenizer):
                return super().apply_chat_template(*args, **kwargs)

        def _loglikelihood_tokens(self, *args: Any, **kwargs: Any) -> list[tuple[float, bool]]:
            before = self.batch_size_per_gpu
            self.batch_size_per_gpu = 1 if current_rule(model) is not None else before
            try:
                return super()._loglikelihood_tokens(*args, **kwargs)
            finally:
                self.batch_size_per_gpu = before

    if model.generation_config is not None:
        model.generation_config.max_new_tokens = None  # would replace the length that a task asks for
    with _quiet():
        return LanguageModel(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)


def ask(lm: Any, unit: Unit, asking: Asking) -> dict[str, Any]:
    """A model's answers to a task.

    Returns:
        `metrics` {"metric,filter": {value, stderr, is_scored}} as lm-eval computes them, `questions` (records, see
        `task_results`) and `seconds`.

    Raises:
        ValueError: lm-eval refuses the task.
    """
    from lm_eval.defaults import DEFAULT_OTHER_SEED
    from lm_eval.evaluator import evaluate
    from lm_eval.tasks import TaskManager

    started = time.perf_counter()
    for task in unit.tasks.values():  # as simple_evaluate does, which then collects the environment for many seconds
        default = task.get_config("num_fewshot")
        if asking.num_fewshot is not None and default != 0:
            task.set_config("num_fewshot", asking.num_fewshot)
        elif default is None:
            task.set_config("num_fewshot", 0)
        task.set_fewshot_seed(DEFAULT_OTHER_SEED)
    found = evaluate(
        lm,
        TaskManager(include_defaults=False).load([unit.spec]),
        limit=asking.limit,
        apply_chat_template=asking.apply_chat_template,
        fewshot_as_multiturn=True,
        confirm_run_unsafe_code=asking.confirm_run_unsafe_code,
        bootstrap_iters=SAMPLES,
    )
    seconds = time.perf_counter() - started
    questions = [_record(task, unit.tasks[task], sample) for task in unit.tasks for sample in found["samples"][task]]
    values, metrics = found["results"][unit.name], {}
    for key, value in values.items():
        name, comma, kind = key.partition(",")
        if not comma or name.endswith("_stderr"):
            continue
        scores = [q["correct"][name] for q in questions if q["filter"] == kind and name in q["correct"]]
        stderr = values.get(f"{name}_stderr,{kind}")
        metrics[key] = {
            "value": float(value),
            "stderr": stderr if isinstance(stderr, float) else None,
            "is_scored": bool(scores) and is_scored(scores),
        }
    return {"metrics": metrics, "questions": questions, "seconds": seconds}


def _record(name: str, task: Any, sample: dict[str, Any]) -> Record:
    responses = sample["filtered_resps"]
    has_scores = task.OUTPUT_TYPE in ("multiple_choice", "loglikelihood")
    choices = task.doc_to_choice(sample["doc"]) if task.OUTPUT_TYPE == "multiple_choice" else []
    correct = {metric: sample[metric] for metric in sample["metrics"] if isinstance(sample[metric], bool | int | float)}
    return {
        "id": f"{name}/{sample['doc_id']}",
        "hash": sample["prompt_hash"] + sample["target_hash"],
        "filter": sample["filter"],
        "answers": answers_of(task.OUTPUT_TYPE, responses, [len(choice) for choice in choices]),
        "correct": correct,
        **({"log_likelihoods": [score for score, _ in responses]} if has_scores else {}),
    }
