"""Data sets of the `datasets` library: on the Hugging Face hub, in a directory of the hub's layout, or saved to disk.

Rows are read one after another, so that of a large data set only the first files are downloaded. Two cases are
prepared as a whole instead: a data set that is already in the library's cache, and a split with a slice.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from eacmoe_lightning.text.files import (
    READ_FILES,
    ROW_FILES,
    Rows,
    Table,
    card_head,
    check_fetched,
    files_below,
    is_dataset_card,
    is_hidden,
    kind_of,
)

OWNERLESS = {"wikitext": "Salesforce/wikitext", "c4": "allenai/c4", "gsm8k": "openai/gsm8k"}
INSTEAD = "pass a local file or directory, or bundled:NAME"
SPLITS_DECLARED = re.compile(rb"^(configs|dataset_info):", re.M)
PLAIN_SPLIT = re.compile(r"[\w.-]+")
DATA_FILES = (*READ_FILES, ".arrow")


def hub_name(name: str, source: str) -> tuple[str, str | None]:
    """OWNER/NAME and CONFIG of a hub name (see the docstring of `text.sources`).

    Raises:
        ValueError: this is no such name.
    """
    first, *rest = name.split("/")
    parts = [*OWNERLESS.get(first, first).split("/"), *rest]
    if not all(re.fullmatch(r"[\w.-]+", part) for part in parts) or len(parts) > 3:
        raise ValueError(f"{source!r} is not a text source: {INSTEAD}, or OWNER/NAME[/CONFIG][:SPLIT]")
    return "/".join(parts[:2]), (parts[2] if len(parts) == 3 else None)


def is_saved_dataset(folder: Path) -> bool:
    """Whether `Dataset.save_to_disk` or `DatasetDict.save_to_disk` wrote the folder."""
    return (folder / "dataset_dict.json").is_file() or (
        (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file()
    )


def is_dataset_directory(folder: Path) -> bool:
    """Whether a folder holds a data set, with splits to choose from, and not just files of text."""
    card = folder / "README.md"
    if is_saved_dataset(folder) or is_dataset_card(card, SPLITS_DECLARED):
        return True
    return is_dataset_card(card) and any(kind_of(path) in ROW_FILES for path in files_below(folder))


def is_declared_config(folder: Path) -> bool:
    """Whether the README.md beside a folder declares a config of its name: that says which files belong to it."""
    import yaml

    try:
        declared = yaml.safe_load(card_head(folder.parent / "README.md"))
        return any(str(config["config_name"]) == folder.name for config in declared["configs"])
    except (yaml.YAMLError, TypeError, KeyError):  # no such README.md, or none that declares configs
        return False


def refuse_folder_of_saved(folder: Path, source: str) -> None:
    """Raises ValueError if folders of `save_to_disk` lie below a folder: it is no text itself."""
    files = [path for name in ("dataset_dict.json", "state.json") for path in sorted(folder.rglob(name))]
    visible = [path.parent for path in files if not is_hidden(path.relative_to(folder))]
    if found := next(filter(is_saved_dataset, visible), None):
        raise ValueError(f"{source} is a folder of data sets that `save_to_disk` wrote: pass one, such as {found}")


def read_dataset(name: str, config: str | None, split: str | None, source: str) -> Table:
    """The rows of a split.

    Args:
        name: a directory, or OWNER/NAME.
        config: one of the data set's configs; None: the only one.
        split: its name, with a slice or without one; None: the only split of a directory, `train` of the hub.
        source: what the user wrote, for error messages.

    Raises:
        FileNotFoundError: there is no such data set, or it cannot be reached.
        ValueError: there is no such config or split, or the user has to choose one.
    """
    folder = Path(name)
    if not folder.is_dir():
        return _streamed(name, config, split or "train", source)
    for path in sorted(folder.rglob("*")):
        if kind_of(path) in DATA_FILES and path.is_file():
            check_fetched(path)
    if is_saved_dataset(folder / config if config else folder):
        return _saved(folder / config if config else folder, split, source)
    if config is None:
        refuse_folder_of_saved(folder, source)
    return _streamed(name, config, split or _only_split(folder, config, source), source)


def _only_split(folder: Path, config: str | None, source: str) -> str:
    """The split of a directory that has no other.

    Raises:
        ValueError: there are several configs or splits.
    """
    import datasets  # takes a second, so only when needed

    with _errors_of(str(folder), source):
        configs = datasets.get_dataset_config_names(str(folder))
        if config is None and len(configs) > 1:
            raise ValueError(f"it has the configs {', '.join(configs)}: pass {source}/{configs[0]}:SPLIT")
        return _choose(datasets.get_dataset_split_names(str(folder), config), source)


def _choose(splits: list[str], source: str) -> str:
    if len(splits) > 1:
        raise ValueError(f"it has the splits {', '.join(splits)}: pass {source}:{splits[0]}")
    return splits[0]


def _saved(folder: Path, split: str | None, source: str) -> Table:
    """A folder of `save_to_disk`; its files are mapped into memory."""
    import datasets

    with _errors_of(str(folder), source):
        names = folder / "dataset_dict.json"
        if names.is_file():
            held = {name: _loaded(folder / name) for name in json.loads(names.read_text())["splits"]}
        else:
            dataset = _loaded(folder)
            named = PLAIN_SPLIT.match(str(dataset.split or ""))  # "train[:50%]" and "train+test" are no names
            held = {named[0] if named else "train": dataset}
        lengths = {name: len(dataset) for name, dataset in held.items()}
        parts = datasets.ReadInstruction.from_spec(split or _choose(list(held), source)).to_absolute(lengths)
        chosen = [held[part.splitname].select(range(*_bounds(part, lengths))) for part in parts]
        if not sum(map(len, chosen)):
            raise ValueError("it has no rows")
        dataset = datasets.concatenate_datasets(chosen)
    return _table(dataset, str(folder), source)


def _loaded(folder: Path) -> Any:
    """The rows of a folder of `Dataset.save_to_disk`."""
    import datasets

    try:
        return datasets.Dataset.load_from_disk(str(folder))
    except IndexError:  # of files without rows
        return datasets.Dataset.from_dict({})


def _bounds(part: Any, lengths: dict[str, int]) -> tuple[int, int]:
    """The first and the last row, exclusive, of a part of a split."""
    return part.from_ or 0, lengths[part.splitname] if part.to is None else part.to


def _streamed(name: str, config: str | None, split: str, source: str) -> Table:
    """A split in the hub's layout, read by rows unless it must be prepared as a whole."""
    import datasets

    is_local, is_cached = Path(name).is_dir(), _is_cached(name)
    if not is_local and not is_cached and not _hub_is_reachable():
        raise FileNotFoundError(
            f"{source}: no such file or directory, and no data set {name!r} in the cache; the "
            f"Hugging Face hub cannot be reached from this machine: {INSTEAD}"
        )
    is_plain = PLAIN_SPLIT.fullmatch(split) is not None and split != "all"  # one whole split
    streams = is_plain and (is_local or not is_cached)
    with _errors_of(name, source):
        dataset = datasets.load_dataset(name, config, split=split, streaming=streams)
    return _table(dataset, name, source)


def _table(dataset: Any, name: str, source: str) -> Table:
    import datasets

    is_streamed = isinstance(dataset, datasets.IterableDataset)

    def rows(columns: list[str] | None) -> Rows:
        chosen = dataset if is_streamed or columns is None else dataset.select_columns(columns)
        with _errors_of(name, source):
            for number, row in enumerate(chosen, 1):
                yield number, dict.fromkeys(names) | row  # a streamed row may lack the columns that are null in it

    with _errors_of(name, source):
        names = dataset.column_names or list(next(iter(dataset), {}))  # streamed files may say it with their first row
    return Table(source, rows, columns=names)


@contextmanager
def _errors_of(name: str, source: str) -> Iterator[None]:
    """Errors of the `datasets` library as ValueError or FileNotFoundError that name the source."""
    from datasets.exceptions import DatasetsError

    try:
        yield
    except (FileNotFoundError, ConnectionError) as error:
        raise FileNotFoundError(f"{source}: no data set {name!r} can be read ({error}); {INSTEAD}") from error
    except (ValueError, DatasetsError) as error:  # the message lists the configs or splits that exist
        raise ValueError(f"{source} (data set {name!r}): {_reason(error)}") from error
    except Exception as error:  # gzip, zstd, YAML, Arrow and others raise their own
        raise ValueError(
            f"{source}: the data set {name!r} cannot be read ({type(error).__name__}: {_reason(error)}): a file "
            "of it may be damaged, or not what its README.md says"
        ) from error


def _reason(error: BaseException) -> str:
    """What an error says, and what the first one behind it says, in one line."""
    first = error
    while first.__cause__ is not None:
        first = first.__cause__
    behind = "a file has no rows" if isinstance(first, StopIteration) else str(first)
    said = str(error) or behind
    return " ".join((said if behind in said else f"{said} ({behind})").split())


def _is_cached(name: str) -> bool:
    """Whether `datasets` has a prepared copy, which it reads without a network."""
    from datasets import config
    from datasets.naming import camelcase_to_snakecase

    *owner, last = name.split("/")
    folder = "___".join([*owner, camelcase_to_snakecase(last)])
    return (Path(config.HF_DATASETS_CACHE) / folder).is_dir()


def _hub_is_reachable(timeout: float = 5.0) -> bool:
    """Whether the hub answers within `timeout` seconds; `datasets` itself would retry for 23 seconds."""
    from huggingface_hub import constants, get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=timeout)
    except Exception:  # whatever the transport raises, the hub did not answer
        return False
    return True
