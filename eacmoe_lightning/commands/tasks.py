"""`test --tasks`: the original and the compressed model answer tasks of lm-eval-harness, one model in memory at a time.

Every finished task of a model is a file of its own, whole or absent, so the same command goes on where it was ended and
takes what is there. `tasks.json` and `tasks.md` are made from these files.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from eacmoe_lightning.compressed.format import read_config
from eacmoe_lightning.compressed.loading import load
from eacmoe_lightning.compressed.opening import OpenedModel
from eacmoe_lightning.evaluation import harness
from eacmoe_lightning.evaluation.harness import Asking, Unit
from eacmoe_lightning.evaluation.task_results import summary, tabulate
from eacmoe_lightning.models.fingerprint import fingerprint
from eacmoe_lightning.models.originals import stored_name
from eacmoe_lightning.models.tokenizer import tokenizer_of
from eacmoe_lightning.run.files import StoreError, write_atomically, write_json
from eacmoe_lightning.skipping import PESF, Rule, set_skipping
from eacmoe_lightning.skipping.selection import Survivors
from eacmoe_lightning.skipping.stored import KEY, read_rule

ORIGINAL = "original"
FORMAT = 1


@dataclass(frozen=True)
class Subject:
    """A model that answers.

    Attributes:
        opened: its files.
        rule: by which it skips experts; None: by none.
        is_original: whether the others are compared with it.
    """

    opened: OpenedModel
    rule: Rule | None = None
    is_original: bool = False

    @property
    def path(self) -> str:
        return stored_name(self.opened.name)

    def name(self) -> str:
        """In tables: the run's folder and the rule."""
        path = Path(self.path)
        folder = path.parent.name if path.name == "compressed" else path.name
        name = ORIGINAL if self.is_original else folder
        return name if self.rule is None else f"{name}, {described(self.rule)}"

    def identity(self) -> dict[str, Any]:
        """What its answers depend on."""
        return {
            "weights": fingerprint(str(self.opened.directory)),
            "dtype": str(self.opened.weights.dtype).rpartition(".")[2],
            "rule": self.rule.to_dict() if self.rule is not None else None,
        }

    def model(self, device: torch.device | str) -> torch.nn.Module:
        """In memory; a compressed one packed, as it is served."""
        opened = self.opened
        if opened.is_compressed:
            model = load(opened.directory, opened.dtype, trust_remote_code=opened.trust_remote_code)
        else:
            model = opened.in_memory().model
        model.to(device)
        set_skipping(model, self.rule)
        return model.eval()


def described(rule: Rule) -> str:
    """A rule in a table: `PESF 0.3`, with the options that are not the paper's."""
    values = rule.to_dict()
    name, alpha = values.pop("rule"), values.pop("alpha", "")
    extras = [f"{k} {v}" for k, v in values.items() if v not in (None, "keep")]
    return " ".join([f"{name.upper()} {alpha}".strip(), *extras])


def rules_of(
    pesf: Sequence[float] | float | None, survivors: Survivors = "keep", rescue: float | None = None
) -> list[Rule | None] | None:
    """The rules of `--pesf`: 0 is none; null, the rule that the model is stored with, gives None.

    Raises:
        ValueError: an alpha, `survivors` or `rescue` is out of range.
    """
    if pesf is None:
        return None
    alphas = pesf if isinstance(pesf, (list, tuple)) else [pesf]
    if not alphas:
        raise ValueError("--pesf is empty: pass one or more alphas (0: skip nothing), or null")
    return [PESF(alpha, survivors, rescue) if alpha else None for alpha in alphas]


def stored_rule(model: OpenedModel) -> Rule | None:
    """The rule that a compressed model is stored with."""
    stored = read_config(model.directory).get(KEY) if model.is_compressed else None
    return read_rule(stored) if stored else None


def names_of(tasks: Sequence[str] | str) -> list[str]:
    """`a,b` or a list.

    Raises:
        ValueError: it is empty.
    """
    names = [name.strip() for name in (tasks.split(",") if isinstance(tasks, str) else tasks)]
    if not names or not all(names):
        raise ValueError(f"--tasks {tasks!r} is empty or has an empty name: pass names such as arc_easy,piqa")
    return names


def run_tasks(
    folder: Path,
    subject: OpenedModel,
    original: OpenedModel | None,
    tasks: Sequence[str] | str,
    asking: Asking,
    include_path: str | None = None,
    rules: Sequence[Rule | None] | None = None,
    batch_size: int = 8,
    overwrite: bool = False,
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """Lets the original and a model, once for each rule, answer tasks, and writes `tasks.json` and `tasks.md`.

    Args:
        folder: the run directory; finished tasks are kept in its `tasks/`.
        subject: the model; an original is then what its own variants with a rule are compared with.
        original: what it was made from.
        tasks: names, as a list or with commas.
        asking: how questions are asked.
        include_path: a folder with further tasks.
        rules: by which the subject skips experts, one after another; None takes the rule that it is stored with.
        batch_size: sequences per batch.
        overwrite: whether results of other options, or of other weights of the same name, are replaced.
        device: that the models run on.

    Returns:
        What `tasks.json` holds.

    Raises:
        ValueError: lm-eval is missing, a task is unknown, an option is out of range, or the folder holds results of
            other options.
        FileNotFoundError: the data of a task cannot be loaded.
    """
    if batch_size < 1:
        raise ValueError(f"task_batch_size={batch_size} (--task_batch_size) is below 1")
    names = names_of(tasks)
    version = harness.require_harness()
    manager = harness.find_tasks(names, include_path)
    tokenizer = tokenizer_of(str(subject.directory), "--model.evaluate", subject.trust_remote_code)
    options = {"format": FORMAT, "lm_eval": version, **asdict(asking)}
    options.pop("confirm_run_unsafe_code")
    if asking.apply_chat_template:
        if not tokenizer.chat_template:
            raise ValueError(
                f"--apply_chat_template true: the tokenizer of {subject} has no chat template; leave the option "
                "out for a base model, or put the chat_template.jinja of its family into that directory"
            )
        options["chat_template"] = hashlib.sha256(json.dumps(tokenizer.chat_template).encode()).hexdigest()
    kept = Kept(folder, options)
    kept.check(overwrite)
    rules = [stored_rule(subject)] if rules is None else rules
    subjects = [Subject(original or subject, is_original=True)]
    subjects += [Subject(subject, rule) for rule in rules if original is not None or rule is not None]
    identities = {each.name(): each.identity() for each in subjects}
    for each in subjects:
        kept.check_subject(each, identities[each.name()], overwrite)
    units = harness.load_units(names, manager)
    digests = {unit.name: unit.digest(asking) for unit in units}
    for each in subjects:
        keys = {unit.name: {**identities[each.name()], "task": digests[unit.name]} for unit in units}
        left = [unit for unit in units if not kept.has(each, unit, keys[unit.name], overwrite)]
        if not left:
            print(f"{each.name()}: all answers are there")
            continue
        lm = harness.language_model(each.model(device), tokenizer, batch_size)
        for unit in left:
            print(f"{each.name()}: {unit.name}", flush=True)
            kept.write(each, unit, keys[unit.name], harness.ask(lm, unit, asking))
            kept.summarize()
        del lm
    return kept.summarize(show=True)


class Kept:
    """The answers in a run directory: `tasks/MODEL/TASK.json`, and the tables made from them.

    Args:
        folder: the run directory.
        options: of all results in it.
    """

    def __init__(self, folder: Path, options: dict[str, Any]) -> None:
        self.folder, self.options = Path(folder), options

    def file(self, subject: str, task: str) -> Path:
        return self.folder / "tasks" / _file_name(subject) / f"{_file_name(task)}.json"

    def read(self) -> dict[tuple[str, str], dict[str, Any]]:
        """All finished tasks by model and task, the original's first, in the order in which they were finished.

        Raises:
            StoreError: a file is damaged.
        """
        units = [read_unit(path) for path in (self.folder / "tasks").glob("*/*.json")]
        units.sort(key=lambda unit: (unit["model"] != ORIGINAL, unit["number"]))
        return {(unit["model"], unit["name"]): unit for unit in units}

    def check(self, overwrite: bool) -> None:
        """Refuses other options; with `overwrite`, removes what they gave.

        Raises:
            ValueError: the folder holds results of other options.
        """
        for (model, task), unit in self.read().items():
            if unit["options"] == self.options:
                continue
            if not overwrite:
                names = unit["options"] | self.options
                other = [name for name in names if unit["options"].get(name) != self.options.get(name)]
                raise ValueError(
                    f"{self.folder / 'tasks'} holds results of other options ({_listed(unit['options'], other)}; now "
                    f"{_listed(self.options, other)}): pass --overwrite true to replace them, or "
                    "another --trainer.default_root_dir to keep both"
                )
            self.file(model, task).unlink()

    def check_subject(self, subject: Subject, identity: dict[str, Any], overwrite: bool) -> None:
        """Refuses results under the same name of other weights; with `overwrite`, removes them.

        Raises:
            ValueError: there are such results.
        """
        for (model, task), unit in self.read().items():
            if model != subject.name() or all(unit["key"][name] == value for name, value in identity.items()):
                continue
            if not overwrite:
                changed = "weights" if unit["key"]["weights"] != identity["weights"] else "dtype"
                raise ValueError(
                    f"{self.folder / 'tasks'} holds results of {model} ({unit['path']}) with another {changed}: pass "
                    "--overwrite true to replace them, or another --trainer.default_root_dir to keep both"
                )
            self.file(model, task).unlink()

    def has(self, subject: Subject, unit: Unit, key: dict[str, Any], overwrite: bool) -> bool:
        """Whether this task of this model is finished.

        Raises:
            ValueError: it is, but the task was another.
        """
        path = self.file(subject.name(), unit.name)
        if not path.exists():
            return False
        if read_unit(path)["key"] == key:
            return True
        if not overwrite:
            raise ValueError(
                f"{path} holds results of another version of the task {unit.name}: its questions or its YAML have "
                "changed. Pass --overwrite true to replace them, or another --trainer.default_root_dir to keep both"
            )
        return False

    def write(self, subject: Subject, unit: Unit, key: dict[str, Any], result: dict[str, Any]) -> None:
        number = max((kept["number"] for kept in self.read().values()), default=-1) + 1
        head = {
            "model": subject.name(), "path": subject.path, "name": unit.name, "number": number,
            "options": self.options, "key": key,
        }  # fmt: skip
        text = json.dumps(head | result)
        write_atomically(self.file(subject.name(), unit.name), lambda partial: partial.write_text(text))

    def summarize(self, show: bool = False) -> dict[str, Any]:
        """Writes `tasks.json` and `tasks.md` from all finished tasks."""
        kept, units = self.read(), {}
        for (model, task), unit in kept.items():
            units.setdefault(task, {})[model] = unit
        results = tabulate(units, ORIGINAL)
        models = {model: {"path": unit["path"], **unit["key"]} for (model, _), unit in kept.items()}
        for model in models.values():
            model.pop("task")
        table = summary(results, ORIGINAL)
        write_json(self.folder / "tasks.json", {"options": self.options, "models": models, **results})
        write_atomically(self.folder / "tasks.md", lambda partial: partial.write_text(EXPLAINED + table + "\n"))
        if show:
            print(f"{table}\n{self.folder}: tasks.json, tasks.md, answers in tasks/")
        return results


EXPLAINED = (
    "Answers to tasks of lm-eval-harness. Flips: the share of questions that the original answers otherwise. To wrong "
    "(to right): the share of all questions that only the original (only the model) answers correctly. Recovery: "
    "percent of the original's value. Mean: of each task's first metric. s: seconds.\n\n"
)


def read_unit(path: Path) -> dict[str, Any]:
    """A finished task of a model.

    Raises:
        StoreError: the file is damaged.
    """
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise StoreError(f"{path} is damaged ({error}): delete it, and the same command asks again") from error


def _listed(options: dict[str, Any], names: list[str]) -> str:
    return ", ".join(f"{name}={options.get(name)}" for name in names)


def _file_name(name: str) -> str:
    return "".join(letter if letter.isalnum() or letter in "-_." else "_" for letter in name)
