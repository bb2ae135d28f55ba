"""From a text source to documents: the only place that reads text.

Text for calibration and evaluation comes from the package, from the user's files or from a data set.
A *source* is a string:

- `bundled:NAME`: a text shipped with the package (`bundled:calibration`, `bundled:prose`, ...);
- `PATH`: a file (.txt and .md: one document; .jsonl, .json, .csv, .tsv and .parquet: one per row), which may be
  compressed (.gz), or a directory: all such files below it, sorted by path;
- `PATTERN`: a path with `*`, `?`, `[...]` or `**` (any number of directories): the files that match, sorted by path;
- `DIRECTORY[/CONFIG][:SPLIT]`: a split of a data set stored on this machine, in the hub's layout or by `save_to_disk`;
- `[OWNER/]NAME[/CONFIG][:SPLIT]`: a data set of the Hugging Face hub; SPLIT defaults to `train`
  and may be a slice (`train[:1%]`).

`self[:NUM][:MODEL]`, which a model writes, is no text to read (text/sampled.py); `./self` is a path.

`SOURCE#COLUMN` and `SOURCE#QUESTION,ANSWER` name the columns of rows; without them a row's document is in `text`, or
it is a conversation in `messages`, `conversations` or a pair such as `prompt` and `response` (text/rows.py). Rows
that are null are skipped and counted in a warning.

`SOURCE[FROM%:TO%]` is a part of any of them, counted in characters and cut at line ends:
`bundled:prose[:50%]` and `bundled:prose[50%:]` do not overlap. Of conversations it is a part of the rows. (After a
data set's split, the brackets are that library's slice, counted in rows.)

The forms are tried in this order. A source is a path if it exists on disk, if it begins with `/`, `./`, `../` or `~`,
if it has a `*`, `?` or `[`, or if it ends like a text file. In a hub name, two parts are `OWNER/NAME` and three are
`OWNER/NAME/CONFIG`. Some names that papers use without an owner (`OWNERLESS`, such as
wikitext) stand for owner and name: `wikitext/wikitext-2-raw-v1:train` is `Salesforce/wikitext`,
config `wikitext-2-raw-v1`.

Files and data sets are read by rows, only as far as documents are taken.

This module uses neither Lightning nor global random state.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterable, Iterator
from fractions import Fraction
from glob import glob
from itertools import chain, islice
from pathlib import Path

from eacmoe_lightning.text.files import (
    READ_FILES,
    ROW_FILES,
    Table,
    files_below,
    is_text_file,
    kind_of,
    read_file,
    read_text,
)
from eacmoe_lightning.text.hub import INSTEAD, hub_name, is_dataset_directory, read_dataset
from eacmoe_lightning.text.rows import Document, columns_of, columns_read, document_of
from eacmoe_lightning.text.sampled import SELF, sampled_source

BUNDLED_TEXT = Path(__file__).parent.parent / "assets" / "text"
SPLIT = re.compile(r":(?P<split>[A-Za-z_][\w.+-]*(\[[^\]]*\])?)$")
PART = re.compile(r"\[((?P<start>\d+(\.\d+)?)%)?:((?P<stop>\d+(\.\d+)?)%)?\]$")
COLUMN = re.compile(r"#(?P<column>[^#/\[\]]+)$")
UNREAD_LIST = re.compile(r"\[.*[,:].*\]|\{.*:.*\}", re.S)  # a list or a dictionary that YAML did not take for one
WILDCARD = re.compile(r"[*?\[]")
LOOKAHEAD = 1000  # rows that show whether a table holds documents or the lines of one
COLUMN_REMEDY = "; name the column with --data.column NAME or SOURCE#NAME, or two: QUESTION,ANSWER"
log = logging.getLogger(__name__)


def bundled_names() -> list[str]:
    """The texts shipped with the package: `calibration`, then the held-out ones by name."""
    return ["calibration", *heldout_names()]


def heldout_names() -> list[str]:
    """The held-out texts shipped with the package, by name (`prose`, `code`, ...)."""
    return sorted(path.stem for path in (BUNDLED_TEXT / "heldout").glob("*.txt"))


def name_sources(sources: dict[str, str] | list[str] | str | None, option: str = "--data.heldout") -> dict[str, str]:
    """Sources by name: `prose` for bundled:prose, the stem of the path for any other; None: all bundled held-out texts.

    Raises:
        ValueError: two sources get the same name, or one that no file can have; or one is empty, or not a part of a
            text.
    """
    if sources is None:
        sources = [f"bundled:{name}" for name in heldout_names()]
    if isinstance(sources, str):
        sources = [sources]
    for source in sources.values() if isinstance(sources, dict) else sources:
        check_source(source, option)
    if isinstance(sources, dict):
        for name in sources:
            _check_name(str(name), option)
        return dict(sources)
    named: dict[str, str] = {}
    for source in sources:
        bundled = source.startswith("bundled:")
        name = source.removeprefix("bundled:") if bundled else "self" if SELF.fullmatch(source) else _stem(source)
        if name in named:
            raise ValueError(
                f"{option}: {named[name]} and {source} would both be called {name!r}; pass "
                "{name: source} instead of a list"
            )
        named[name] = source
    return named


def _check_name(name: str, option: str) -> None:
    """Raises ValueError for a name that cannot be part of the name of a file, as that of a held-out text is."""
    if not name.strip() or name in (".", "..") or re.search(r"[/\\\0]", name):
        raise ValueError(
            f"{option}: a text cannot be called {name!r}: pass {{name: source}} with a name without / and \\"
        )


def check_source(source: str, option: str) -> None:
    """Raises ValueError for a source that names nothing, such as a variable of the shell that is not set."""
    if not source.strip():
        raise ValueError(f"{option} names no source, but {source!r}: {INSTEAD}")
    if is_unread_list(source):
        raise ValueError(
            f"{option}: {source} is one text and no list: put quotes around each source that has brackets, as in "
            "['bundled:prose[:50%]', 'bundled:code[:50%]'] or {prose: 'bundled:prose[:50%]'}"
        )
    try:
        _take_part(source)
    except ValueError as error:
        raise ValueError(f"{option}: {error}") from error


def may_have_rows(source: str) -> bool:
    """Whether a source may be a table: bundled text, text that a model samples and files of plain text are none."""
    whole = _take_part(source)[0]
    if source.startswith("bundled:") or SELF.fullmatch(source):
        return False
    return not Path(whole).expanduser().is_file() or kind_of(Path(whole)) in ROW_FILES


def is_unread_list(source: str) -> bool:
    """Whether a source looks like several, or like {name: source}."""
    return UNREAD_LIST.fullmatch(source.strip()) is not None and not (glob(source) or Path(source).exists())


def _stem(source: str) -> str:
    """The last part of a source without its end; of a pattern, the last one without wildcards."""
    if _is_pattern(_take_part(source)[0]):
        return next((part for part in reversed(Path(source).parts) if not WILDCARD.search(part)), "pattern")
    name = Path(source).stem
    return name if name.strip(".") else Path(source).absolute().resolve().stem or "text"


def read_documents(source: str, column: str | None = None) -> list[Document]:
    """Reads all documents of a source, in a fixed order: see `documents`."""
    return list(documents(source, column))


def documents(source: str, column: str | None = None) -> Iterator[Document]:
    """The non-empty documents of a source (see the module's docstring), in a fixed order, read as they are taken.

    Args:
        source: see the module's docstring.
        column: the column of the documents, or `QUESTION,ANSWER`, where the source names none.

    Raises:
        FileNotFoundError: there is no such bundled text, file, directory or data set.
        ValueError: a file is not text, a row has no such column, or all documents are blank.
    """
    if not source.strip():
        raise ValueError(f"{source!r} is not a text source: {INSTEAD}")
    read = False
    for document in _documents(source, column):
        if not isinstance(document, str) or document.strip():
            read = True
            yield document
    if not read:
        raise ValueError(f"{source} is empty: it holds no text; {INSTEAD}")


def _documents(source: str, column: str | None) -> Iterator[Document]:
    if SELF.fullmatch(source):
        raise ValueError(f"{source} is text that the model writes: only fit takes it, in --data.calibration")
    whole, start, stop = _take_part(source)
    if whole != source:
        yield from _part(read_documents(whole, column), start, stop)
        return
    source, column = _take_column(source, column)
    if source.startswith("bundled:"):
        yield _read_bundled(source.removeprefix("bundled:"))
        return
    for held in _read_path(source) if _is_path(source) else [_read_split(source)]:
        if isinstance(held, str):
            yield held
        else:
            yield from _join_lines(_row_documents(held, column))


def _take_column(source: str, column: str | None) -> tuple[str, str | None]:
    """The source without `#COLUMN`, and that column or else the given one."""
    match = COLUMN.search(source)
    if match is None or Path(source).expanduser().exists():
        return source, column
    return source[: match.start()], match["column"]


def _take_part(source: str) -> tuple[str, Fraction, Fraction]:
    """The source without `[FROM%:TO%]`, and the two numbers as parts of 1.

    Raises:
        ValueError: the numbers are not a part of a text.
    """
    match = PART.search(source)
    is_split = SPLIT.search(source) and not source.startswith("bundled:")
    if match is None or is_split or Path(source).expanduser().exists():
        return source, Fraction(0), Fraction(1)
    start, stop = match["start"] or "0", match["stop"] or "100"
    first, last = Fraction(start) / 100, Fraction(stop) / 100
    if not first < last <= 1:
        raise ValueError(f"{source}: {start}% to {stop}% is not a part of a text: pass 0 <= FROM < TO <= 100")
    return source[: match.start()], first, last


def _part(documents: list[Document], start: Fraction, stop: Fraction) -> list[Document]:
    """The lines between two parts of all characters; a part that starts at `stop` starts where this one ends.

    With conversations among them, the documents between two parts of their number.
    """
    if not all(isinstance(document, str) for document in documents):
        return documents[int(len(documents) * start) : int(len(documents) * stop)]
    total, offset, parts = sum(map(len, documents)), 0, []
    for document in documents:
        mark = "\n" if len(documents) > 1 or "\n" in document else " "  # one line has no other place to be cut
        ends = [_line_start(document, int(total * part) - offset, mark) for part in (start, stop)]
        parts.append(document[ends[0] : ends[1]])
        offset += len(document)
    return parts


def _line_start(document: str, position: int, mark: str) -> int:
    """The start of the first line that begins at `position` or later; a mark ends each."""
    if position <= 0:
        return 0
    return (document.find(mark, position - 1) + 1) or len(document)


def _read_bundled(name: str) -> str:
    path = BUNDLED_TEXT / ("calibration.txt" if name == "calibration" else f"heldout/{name}.txt")
    if name not in bundled_names() or not path.is_file():
        raise FileNotFoundError(
            f"there is no bundled text {name!r}; pass one of "
            f"{', '.join('bundled:' + known for known in bundled_names())}, or a local file"
        )
    return read_text(path)


def _is_pattern(source: str) -> bool:
    """Whether a path stands for all files that match it."""
    return WILDCARD.search(source) is not None and not SPLIT.search(source) and not Path(source).expanduser().exists()


def _is_path(source: str) -> bool:
    if SPLIT.search(source) and not Path(source).exists():
        return False
    return (
        Path(source).expanduser().exists()
        or _is_pattern(source)
        or source.startswith(("/", "./", "../", "~"))
        or is_text_file(source.rpartition("/")[2])
    )


def _read_path(source: str) -> Iterator[str | Table]:
    """The texts and tables of a file, of the files below a directory, or of those that match a pattern."""
    path = Path(source).expanduser()
    if _is_pattern(source):
        yield from map(read_file, _matching(source))
    elif not path.exists():
        raise FileNotFoundError(f"{source} does not exist; {INSTEAD}")
    elif path.is_file():
        yield read_file(path)
    elif is_dataset_directory(path):
        yield read_dataset(str(path), None, None, source)
    else:
        files = files_below(path)
        if not files:
            raise FileNotFoundError(f"{source} has no text files below it ({' '.join(READ_FILES)}); {INSTEAD}")
        yield from map(read_file, files)


def _matching(pattern: str) -> list[Path]:
    """The files that match a pattern, sorted by path; hidden ones only if it names the dot.

    Raises:
        FileNotFoundError: there are none.
    """
    found = sorted(Path(name) for name in glob(str(Path(pattern).expanduser()), recursive=True) if Path(name).exists())
    files = [path for path in found if path.is_file()]
    if not files:
        what = f"only directories, such as {found[0]}: {pattern}/* are the files in them" if found else "no file"
        raise FileNotFoundError(f"{pattern} matches {what}; {INSTEAD}")
    return files


def _read_split(source: str) -> Table:
    """A data set, as its directory and split or by its name on the hub."""
    match = SPLIT.search(source)
    name, split = (source[: match.start()], match["split"]) if match else (source, None)
    path = Path(name).expanduser()
    if path.is_dir():
        name, config = str(path), None
    elif path.parent.is_dir() and path.parent != Path():
        name, config = str(path.parent), path.name
    elif path.is_absolute() or name.startswith("."):
        raise FileNotFoundError(f"{name} of {source} does not exist; {INSTEAD}")
    else:
        name, config = hub_name(name, source)
    return read_dataset(name, config, split, source)


# --- rows


def _row_documents(table: Table, column: str | None) -> Iterator[Document]:
    """The documents of a table's rows, blank ones included; null rows are left out and counted."""
    chosen = None if table.columns is None else columns_of(table.columns, column)
    if table.columns is not None and chosen is None:
        names = ", ".join(_short(name) for name in sorted(table.columns))
        raise ValueError(f"{table.name} has no column `{column or 'text'}`, only {names}{COLUMN_REMEDY}")
    num_rows = num_null = 0
    try:
        for number, row in table.rows(None if chosen is None else columns_read(table.columns, chosen)):
            num_rows += 1
            where = f"{table.name}, {table.unit} {number}"
            document = None
            if isinstance(row, str) and column is None:
                row = {"text": row}
            if row is not None:
                columns = chosen or (columns_of(row, column) if isinstance(row, dict) else None)
                if columns is None:
                    raise ValueError(f"{where}: {_row_needs(row, column)}{COLUMN_REMEDY}")
                document = document_of(row, columns, where)
            num_null += document is None
            if document is not None:
                yield document
    finally:
        if num_null:
            log.warning("%s: %d of %d rows are null and were skipped", table.name, num_null, num_rows)


def _row_needs(row: object, column: str | None) -> str:
    fields = [_short(name) for name in sorted(row)] if isinstance(row, dict) else type(row).__name__
    return f"a row needs a string in field `{column or 'text'}`, but has {fields}"


def _short(name: str) -> str:
    """A column's name in a message; of a table without a header it is a cell of any length."""
    return name if len(name) <= 60 else f"{name[:60]}..."


def _join_lines(rows: Iterable[Document]) -> Iterator[Document]:
    """Rows as documents, or as the lines of one document.

    Data sets like wikitext hold one line per row, a third of them blank. If more than a tenth of the first rows are
    blank, the rows are joined with two newlines into one document, as GPTQ and later papers do, so that perplexities
    can be compared.
    """
    rows = iter(rows)
    first = list(islice(rows, LOOKAHEAD))
    num_blank = sum(isinstance(row, str) and not row.strip() for row in first)
    if num_blank * 10 > len(first) and all(isinstance(row, str) for row in first):
        yield "\n\n".join(chain(first, rows))
    else:
        yield from first
        yield from rows


def stored_sources(sources: dict[str, str] | list[str] | str | None) -> dict[str, str] | list[str] | str | None:
    """Sources as runs store them: see `stored_source`."""
    if isinstance(sources, list):
        return [stored_source(source) for source in sources]
    if isinstance(sources, dict):
        return {name: stored_source(source) for name, source in sources.items()}
    return None if sources is None else stored_source(sources)


def stored_source(source: str) -> str:
    """A source as runs store it: with the absolute path of files or a directory of this machine, else unchanged."""
    if sampled := sampled_source(source):
        return sampled.stored
    whole = _take_column(_take_part(source)[0], None)[0]
    match = None if _is_path(whole) else SPLIT.search(whole)
    name = whole[: match.start()] if match else whole
    path = Path(name).expanduser()
    is_local = (
        path.exists() or _is_pattern(name) or (match is not None and path.parent.is_dir() and path.parent != Path())
    )
    if source.startswith("bundled:") or is_unread_list(source) or not is_local:
        return source
    return os.path.abspath(path) + source[len(name) :]
