"""From a text source to documents: the only place that reads text.

Text for calibration and evaluation comes from the package, from the user's files or from a data set.
A *source* is a string:

- `bundled:NAME`: a text shipped with the package (`bundled:calibration`, `bundled:prose`, ...);
- `PATH`: a file (.txt and .md: one document; .jsonl, .json and .parquet: one per row, from the
  field `text`), or a directory: all such files below it, sorted by path;
- `DIRECTORY[/CONFIG]:SPLIT`: a split of a data set stored on this machine in the hub's layout;
- `[OWNER/]NAME[/CONFIG][:SPLIT]`: a data set of the Hugging Face hub; SPLIT defaults to `train`
  and may be a slice (`train[:1%]`).

`SOURCE[FROM%:TO%]` is a part of any of them, counted in characters and cut at line ends:
`bundled:prose[:50%]` and `bundled:prose[50%:]` do not overlap. (After a data set's split, the
brackets are that library's slice, counted in rows.)

The forms are tried in this order. A source is a path if it exists on disk, if it begins with `/`,
`./`, `../` or `~`, or if it ends like a text file. In a hub name, two parts are `OWNER/NAME` and
three are `OWNER/NAME/CONFIG`. Some names that papers use without an owner (`OWNERLESS`, such as
wikitext) stand for owner and name: `wikitext/wikitext-2-raw-v1:train` is `Salesforce/wikitext`,
config `wikitext-2-raw-v1`.

This module uses neither Lightning nor global random state.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

BUNDLED_TEXT = Path(__file__).parent.parent / "assets" / "text"
TEXT_FILES = (".txt", ".md")  # one document each
ROW_FILES = (".jsonl", ".json", ".parquet")  # a document per row, in the field `text`
OWNERLESS = {"wikitext": "Salesforce/wikitext", "c4": "allenai/c4", "gsm8k": "openai/gsm8k"}
SPLIT = re.compile(r":(?P<split>[A-Za-z_][\w.+-]*(\[[^\]]*\])?)$")
PART = re.compile(r"\[((?P<start>\d{1,3})%)?:((?P<stop>\d{1,3})%)?\]$")
INSTEAD = "pass a local file or directory, or bundled:NAME"


def bundled_names() -> list[str]:
    """The texts shipped with the package: `calibration`, then the held-out ones by name."""
    return ["calibration", *heldout_names()]


def heldout_names() -> list[str]:
    """The held-out texts shipped with the package, by name (`prose`, `code`, ...)."""
    return sorted(path.stem for path in (BUNDLED_TEXT / "heldout").glob("*.txt"))


def name_sources(sources: dict[str, str] | list[str] | str | None, option: str = "--data.heldout") -> dict[str, str]:
    """Sources by name: `prose` for bundled:prose, the stem of the path for any other; None: all bundled held-out texts.

    Raises:
        ValueError: two sources get the same name.
    """
    if sources is None:
        sources = [f"bundled:{name}" for name in heldout_names()]
    if isinstance(sources, dict):
        return dict(sources)
    if isinstance(sources, str):
        sources = [sources]
    named: dict[str, str] = {}
    for source in sources:
        bundled = source.startswith("bundled:")
        name = source.removeprefix("bundled:") if bundled else Path(source).stem
        if name in named:
            raise ValueError(
                f"{option}: {named[name]} and {source} would both be called {name!r}; pass "
                "{name: source} instead of a list"
            )
        named[name] = source
    return named


def read_documents(source: str) -> list[str]:
    """Reads all non-empty documents of a source (see the module's docstring), in a fixed order.

    Raises:
        FileNotFoundError: there is no such bundled text, file, directory or data set.
        ValueError: a file is not text or has no field `text`, or all documents are blank.
    """
    whole, start, stop = _take_part(source)
    if whole != source:
        documents = _part(read_documents(whole), start, stop)
    elif source.startswith("bundled:"):
        documents = [_read_bundled(source.removeprefix("bundled:"))]
    else:
        documents = _read_path(source) if _is_path(source) else _read_dataset(source)
    documents = [document for document in documents if document.strip()]
    if not documents:
        raise ValueError(f"{source} is empty: it holds no text; {INSTEAD}")
    return documents


def _take_part(source: str) -> tuple[str, int, int]:
    """The source without `[FROM%:TO%]`, and the two numbers.

    Raises:
        ValueError: the numbers are not a part of a text.
    """
    match = PART.search(source)
    is_split = SPLIT.search(source) and not source.startswith("bundled:")
    if match is None or is_split or Path(source).expanduser().exists():
        return source, 0, 100
    start, stop = int(match["start"] or 0), int(match["stop"] or 100)
    if not 0 <= start < stop <= 100:
        raise ValueError(f"{source}: {start}% to {stop}% is not a part of a text: pass 0 <= FROM < TO <= 100")
    return source[: match.start()], start, stop


def _part(documents: list[str], start: int, stop: int) -> list[str]:
    """The lines between two percentages of all characters; a part that starts at `stop` starts where this one ends."""
    total, offset, parts = sum(map(len, documents)), 0, []
    for document in documents:
        ends = [_line_start(document, total * percent // 100 - offset) for percent in (start, stop)]
        parts.append(document[ends[0] : ends[1]])
        offset += len(document)
    return parts


def _line_start(document: str, position: int) -> int:
    """The start of the first line that begins at `position` or later."""
    if position <= 0:
        return 0
    return (document.find("\n", position - 1) + 1) or len(document)


def _read_bundled(name: str) -> str:
    path = BUNDLED_TEXT / ("calibration.txt" if name == "calibration" else f"heldout/{name}.txt")
    if name not in bundled_names() or not path.is_file():
        raise FileNotFoundError(
            f"there is no bundled text {name!r}; pass one of "
            f"{', '.join('bundled:' + known for known in bundled_names())}, or a local file"
        )
    return _read_text(path)


def _is_path(source: str) -> bool:
    if SPLIT.search(source) and not Path(source).exists():
        return False
    return (
        Path(source).expanduser().exists()
        or source.startswith(("/", "./", "../", "~"))
        or source.endswith(TEXT_FILES + ROW_FILES)
    )


def _read_path(source: str) -> list[str]:
    path = Path(source).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"{source} does not exist; {INSTEAD}")
    if path.is_file():
        return _read_file(path)
    files = sorted(f for f in path.rglob("*") if f.suffix in TEXT_FILES + ROW_FILES and f.is_file())
    if not files:
        known = " ".join(TEXT_FILES + ROW_FILES)
        raise FileNotFoundError(f"{source} has no text files below it ({known}); {INSTEAD}")
    return [document for file in files for document in _read_file(file)]


def _read_file(path: Path) -> list[str]:
    if path.suffix == ".parquet":
        import pyarrow.parquet

        return _table_to_documents(pyarrow.parquet.ParquetFile(path).read().to_pydict(), str(path))
    text = _read_text(path)
    if path.suffix not in ROW_FILES:
        return [text]
    # not splitlines(), which also splits at U+2028 and the like, inside a JSON string
    lines = enumerate(text.split("\n"), 1) if path.suffix == ".jsonl" else [(1, text)]
    rows = []
    for number, line in lines:
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: not JSON ({error})") from error
        for row in value if isinstance(value, list) else [value]:
            if not isinstance(row, dict) or not isinstance(row.get("text"), str):
                fields = sorted(row) if isinstance(row, dict) else type(row).__name__
                raise ValueError(f"{path}, line {number}: a row needs a string in field `text`, but has {fields}")
            rows.append(row["text"])
    return _join_lines(rows)


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 text (byte {error.start} is 0x{error.object[error.start]:02x}); "
            "convert it, for instance with iconv -t utf-8"
        ) from error


def _read_dataset(source: str) -> list[str]:
    match = SPLIT.search(source)
    name, split = (source[: match.start()], match["split"]) if match else (source, "train")
    path = Path(name).expanduser()
    if path.is_dir():
        name, config = str(path), None
    elif path.parent.is_dir() and path.parent != Path():
        name, config = str(path.parent), path.name
    elif path.is_absolute() or name.startswith("."):
        raise FileNotFoundError(f"{name} of {source} does not exist; {INSTEAD}")
    else:
        name, config = _hub_name(name, source)
    dataset = _load_dataset(name, config, split, source)
    return _table_to_documents({column: dataset[column] for column in dataset.column_names}, source)


def _hub_name(name: str, source: str) -> tuple[str, str | None]:
    """OWNER/NAME and CONFIG of a hub name (see the module's docstring)."""
    first, *rest = name.split("/")
    parts = [*OWNERLESS.get(first, first).split("/"), *rest]
    if not all(re.fullmatch(r"[\w.-]+", part) for part in parts) or len(parts) > 3:
        raise ValueError(f"{source!r} is not a text source: {INSTEAD}, or OWNER/NAME[/CONFIG][:SPLIT]")
    return "/".join(parts[:2]), (parts[2] if len(parts) == 3 else None)


def _load_dataset(name: str, config: str | None, split: str, source: str):
    import datasets  # takes a second, so only when needed

    if not Path(name).is_dir() and not _is_cached(name) and not _hub_is_reachable():
        raise FileNotFoundError(
            f"{source}: no such file or directory, and no data set {name!r} in the cache; the "
            f"Hugging Face hub cannot be reached from this machine: {INSTEAD}"
        )
    try:
        return datasets.load_dataset(name, config, split=split)
    except (FileNotFoundError, ConnectionError) as error:
        raise FileNotFoundError(f"{source}: no data set {name!r} can be read ({error}); {INSTEAD}") from error
    except ValueError as error:  # the message lists the configs or splits that exist
        raise ValueError(f"{source} (data set {name!r}): {error}") from error


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


def _table_to_documents(columns: dict, source: str) -> list[str]:
    """The documents in the column `text`."""
    if "text" not in columns:
        raise ValueError(f"{source} has no column `text`, only {', '.join(sorted(columns))}")
    return _join_lines([row or "" for row in columns["text"]])


def _join_lines(rows: list[str]) -> list[str]:
    """Rows as documents, or as the lines of one document.

    Data sets like wikitext hold one line per row, a third of them blank. If more than a tenth of all
    rows are blank, the rows are joined with two newlines into one document, as GPTQ and later papers
    do, so that perplexities can be compared.
    """
    num_blank = sum(not row.strip() for row in rows)
    return ["\n\n".join(rows)] if num_blank * 10 > len(rows) else rows


def stored_source(source: str) -> str:
    """A source as runs store it: with the absolute path of a file or a directory of this machine, else unchanged."""
    whole = _take_part(source)[0]
    match = None if _is_path(whole) else SPLIT.search(whole)
    name = whole[: match.start()] if match else whole
    path = Path(name).expanduser()
    is_local = path.exists() or (match is not None and path.parent.is_dir() and path.parent != Path())
    if source.startswith("bundled:") or not is_local:
        return source
    return os.path.abspath(path) + source[len(name) :]
