"""From a text source to documents: the only place that reads text.

text/sources.py has the names of sources. Files and data sets are read by rows, only as far as documents are taken; rows
that are null are skipped and counted in a warning.

This module uses neither Lightning nor global random state.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Iterator
from fractions import Fraction
from glob import glob
from itertools import chain, islice
from pathlib import Path

from eacmoe_lightning.text.files import READ_FILES, Table, files_below, read_file, read_text
from eacmoe_lightning.text.hub import (
    INSTEAD,
    hub_name,
    is_dataset_directory,
    is_declared_config,
    read_dataset,
    refuse_folder_of_saved,
)
from eacmoe_lightning.text.rows import Document, columns_of, columns_read, document_of, left_out
from eacmoe_lightning.text.sampled import SELF
from eacmoe_lightning.text.sources import (
    BUNDLED_TEXT,
    SPLIT,
    bundled_names,
    is_path,
    is_pattern,
    take_column,
    take_part,
)

LOOKAHEAD = 1000  # rows that show whether a table holds documents or the lines of one
COLUMN_REMEDY = "; name the column with --data.column NAME or SOURCE#NAME, or two: QUESTION,ANSWER"
log = logging.getLogger(__name__)


def read_documents(source: str, column: str | None = None) -> list[Document]:
    """Reads all documents of a source, in a fixed order: see `documents`."""
    return list(documents(source, column))


def documents(source: str, column: str | None = None, *, joins_lines: bool = True) -> Iterator[Document]:
    """The non-empty documents of a source, in a fixed order, read as they are taken.

    Args:
        source: see text/sources.py.
        column: the column of the documents, or `QUESTION,ANSWER`, where the source names none.
        joins_lines: the rows of a table with many blank ones are the lines of one document (see `_join_lines`).

    Raises:
        FileNotFoundError: there is no such bundled text, file, directory or data set.
        ValueError: a file is not text, a row has no such column, or all documents are blank.
    """
    if not source.strip():
        raise ValueError(f"{source!r} is not a text source: {INSTEAD}")
    read = False
    for document in _documents(source, column, joins_lines):
        if not isinstance(document, str) or document.strip():
            read = True
            yield document
    if not read:
        raise ValueError(f"{source} is empty: it holds no text; {INSTEAD}")


def _documents(source: str, column: str | None, joins_lines: bool) -> Iterator[Document]:
    if SELF.fullmatch(source):
        raise ValueError(f"{source} is text that the model writes: only fit takes it, in --data.calibration")
    whole, start, stop = take_part(source)
    if whole != source:
        yield from _part(list(documents(whole, column, joins_lines=joins_lines)), start, stop)
        return
    source, column = take_column(source, column)
    if source.startswith("bundled:"):
        yield _read_bundled(source.removeprefix("bundled:"))
        return
    for held in _read_path(source) if is_path(source) else [_read_split(source)]:
        if isinstance(held, str):
            yield held
        else:
            rows = _row_documents(held, column)
            yield from _join_lines(rows, held.name) if joins_lines else rows


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


def _read_path(source: str) -> Iterator[str | Table]:
    """The texts and tables of a file, of the files below a directory, or of those that match a pattern."""
    path = Path(source).expanduser()
    if is_pattern(source):
        yield from map(read_file, _matching(source))
    elif is_declared_config(path):
        yield read_dataset(str(path.parent), path.name, None, source)
    elif not path.exists():
        raise FileNotFoundError(f"{source} does not exist; {INSTEAD}")
    elif path.is_file():
        yield read_file(path)
    elif is_dataset_directory(path):
        yield read_dataset(str(path), None, None, source)
    else:
        refuse_folder_of_saved(path, source)
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
    if path.is_file():
        raise ValueError(f"{source}: a file has no splits: pass {name}, or its directory with a split")
    if path.is_dir() and not is_declared_config(path):
        name, config = str(path), None
    elif path.parent.is_dir() and path.parent != Path():
        name, config = str(path.parent), path.name
    elif path.is_absolute() or name.startswith("."):
        raise FileNotFoundError(f"{name} of {source} does not exist; {INSTEAD}")
    else:
        name, config = hub_name(name, source)
    return read_dataset(name, config, split, source)


def _row_documents(table: Table, column: str | None) -> Iterator[Document]:
    """The documents of a table's rows, blank ones included; null rows are left out and counted."""
    chosen = None if table.columns is None else columns_of(table.columns, column)
    if table.columns is not None and chosen is None:
        names = ", ".join(_short(name) for name in sorted(table.columns))
        raise ValueError(f"{table.name} has no column `{column or 'text'}`, only {names}{COLUMN_REMEDY}")
    num_rows = num_null = 0
    unread: Counter[str] = Counter()
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
                unread.update(filter(None, [left_out(row, columns)]))
            num_null += document is None
            if document is not None:
                yield document
    finally:
        if num_null:
            log.warning("%s: %d of %d rows are null or hold no turns, and were skipped", table.name, num_null, num_rows)
        for name, number in unread.items():
            log.warning(
                "%s: `%s` of %d of %d rows is neither text nor a list of texts and was left out of the questions",
                *(table.name, name, number, num_rows),
            )


def _row_needs(row: object, column: str | None) -> str:
    fields = [_short(name) for name in sorted(row)] if isinstance(row, dict) else type(row).__name__
    return f"a row needs a string in field `{column or 'text'}`, but has {fields}"


def _short(name: str) -> str:
    """A column's name in a message; of a table without a header it is a cell of any length."""
    return name if len(name) <= 60 else f"{name[:60]}..."


def _join_lines(rows: Iterable[Document], name: str) -> Iterator[Document]:
    """Rows as documents, or as the lines of one document.

    Data sets like wikitext hold one line per row, a third of them blank. If more than a tenth of the first rows are
    blank, the rows are joined with two newlines into one document, as GPTQ and later papers do, so that perplexities
    can be compared.
    """
    rows = iter(rows)
    first = list(islice(rows, LOOKAHEAD))
    num_blank = sum(isinstance(row, str) and not row.strip() for row in first)
    if num_blank * 10 > len(first) and all(isinstance(row, str) for row in first):
        log.warning(
            "%s: %d of the first %d rows are blank, so all rows are joined into one document, as the lines of wikitext "
            "are: remove them, or calibrate with --data.documents separate or packed, to have a document per row",
            *(name, num_blank, len(first)),
        )
        yield "\n\n".join(chain(first, rows))
    else:
        yield from first
        yield from rows
