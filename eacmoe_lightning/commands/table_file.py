"""The file of a table: what it may hold, and which options `eacmoe table` keeps for itself."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from eacmoe_lightning.commands.configs import SHIPPED

TABLES = SHIPPED / "tables"
KEYS = {"title", "source", "split", "options", "rows", "published"}
SYMBOL = re.compile(r"(?:(\d+) )?([KE])")  # a multiple of the model's top_k or of its number of experts


def read_table(name: str) -> dict[str, Any]:
    """The contents of a table's file; names of rows are strings, and `options` and every row are dictionaries.

    Raises:
        FileNotFoundError: it is neither a file nor a table of the package.
        ValueError: it is no table.
    """
    shipped = TABLES / f"{name}.yaml"
    path = Path(name) if Path(name).is_file() else shipped
    if not path.is_file():
        names = ", ".join(sorted(path.stem for path in TABLES.glob("*.yaml")))
        raise FileNotFoundError(f"there is no table {name}: pass a YAML file, or one of {names}")
    try:
        plan = yaml.safe_load(path.read_text("utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no table, as it cannot be read as YAML: {' '.join(str(error).split())}") from error
    if not isinstance(plan, dict) or not isinstance(plan.get("rows"), dict) or not plan["rows"] or "title" not in plan:
        raise ValueError(f"{path} is no table: it needs a title, and rows of options of fit by name")
    if unknown := sorted(map(str, plan.keys() - KEYS)):
        raise ValueError(f"{path}: {unknown[0]} is not a key of a table: {', '.join(sorted(KEYS))}")
    plan["options"] = _options(plan.get("options"), f"{path}: options")
    plan["rows"] = {str(row): _options(options, f"{path}: row {str(row)!r}") for row, options in plan["rows"].items()}
    published = plan.get("published") or {}
    plan["published"] = {model: {str(row): of for row, of in rows.items()} for model, rows in published.items()}
    return plan


def _options(given: Any, where: str) -> dict[str, Any]:
    """Options of `fit` by name; None is no option."""
    given = {} if given is None else given
    if not isinstance(given, dict) or not all(isinstance(key, str) for key in given):
        raise ValueError(f"{where} must be options of fit by name, such as {{model.bits: 2}}, and is {given!r}")
    return given


def refuse_overridden(words: Sequence[str], plan: dict[str, Any], table: str) -> None:
    """Raises ValueError if a word is an option that the table sets too, as a whole or in part, and so overrides."""
    for option in _named(words):
        for where, key in _set_by(plan):
            if _overlap(option, key):
                elsewhere = "" if where == "options" else ". For rows that do not set it, put it into a --config"
                raise ValueError(
                    f"--{option} would be overridden by {key} of the table {table} ({where}): leave it out, or change "
                    f"it there{elsewhere}"
                )


def refuse_own(words: Sequence[str], plan: dict[str, Any], seeds: Sequence[int] | None) -> None:
    """Raises ValueError for an option, of the words or of the table, that the command itself gives to every row."""
    own = {"trainer.default_root_dir": "--output, below which each row has a directory"}
    if seeds:
        own["data.seed"] = "--seeds"
    for where, key in [*(("the command", option) for option in _named(words)), *_set_by(plan)]:
        if instead := own.get(key):
            raise ValueError(f"--{key} ({where}) has no effect beside {instead}: leave one of them out")


def _named(words: Sequence[str]) -> Iterator[str]:
    """The options among words, without values, --config and --model FILE."""
    for word in words:
        option = word.partition("=")[0].removesuffix("+")
        if option.startswith("--") and "." in option:
            yield option.removeprefix("--")


def _set_by(plan: dict[str, Any]) -> list[tuple[str, str]]:
    """Where a table sets which option."""
    places = {"options": plan.get("options", {})} | {f"row {name!r}": row for name, row in plan["rows"].items()}
    return [(where, key) for where, row in places.items() for key in row]


def _overlap(one: str, other: str) -> bool:
    """Whether two options are the same or one holds the other; arguments of classes go with and without `init_args`."""
    one, other = (f"{name.replace('.init_args.', '.')}." for name in (one, other))
    return one.startswith(other) or other.startswith(one)


def numbers(row: dict[str, Any], top_k: int, experts: int) -> dict[str, Any]:
    """The row with the numbers that symbols such as `2 K` and `E` stand for; no more than all experts."""

    def number(value: Any) -> Any:
        match = SYMBOL.fullmatch(value) if isinstance(value, str) else None
        return min(int(match[1] or 1) * {"K": top_k, "E": experts}[match[2]], experts) if match else value

    return {key: number(value) for key, value in row.items()}


def without_repeats(rows: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The rows without those whose options another row has too, on a model of few experts."""
    kept: dict[str, dict[str, Any]] = {}
    for name, row in rows.items():
        if row not in kept.values():
            kept[name] = row
    return kept


def folders_of(rows: Iterable[str]) -> dict[str, str]:
    """The name of each row's directory.

    Raises:
        ValueError: two rows would share one, or the name of a row has neither letters nor digits.
    """
    folders: dict[str, str] = {}
    for name in rows:
        folder = re.sub(r"[^\w.]+", "-", name).strip("-")
        if not folder.strip("."):
            raise ValueError(f"row {name!r} needs a name with letters or digits, after which its directory is called")
        if other := next((row for row, taken in folders.items() if taken == folder), None):
            raise ValueError(f"rows {other!r} and {name!r} would share the directory {folder}: rename one of them")
        folders[name] = folder
    return folders
