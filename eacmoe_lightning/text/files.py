"""Files of text on this machine, read piece by piece: a whole text, or the rows of a table.

The kind follows the end of a file's name, and `.gz` may follow it. A byte order mark is not text. What git-lfs has not
fetched is refused by name.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import logging
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

TEXT_FILES = (".txt", ".md")  # one document each
JSON_FILES = (".jsonl", ".ndjson", ".json")
ROW_FILES = (*JSON_FILES, ".csv", ".tsv", ".parquet")  # a document per row
READ_FILES = TEXT_FILES + ROW_FILES
OTHER_ARCHIVES = (".zst", ".bz2", ".xz", ".zip", ".tar", ".tgz", ".7z", ".lz4", ".rar")
NO_TEXT = {  # ends of files that hold no plain text, and what to do with them
    **dict.fromkeys((".pdf", ".epub", ".rtf"), "save it as text"),
    **dict.fromkeys((".doc", ".docx", ".odt", ".ppt", ".pptx", ".odp"), "it is an office document: save it as text"),
    **dict.fromkeys((".xls", ".xlsx", ".ods"), "it is a spreadsheet: save it as .csv"),
    ".arrow": "pass its folder if `save_to_disk` wrote it, or save it as .parquet",
    **dict.fromkeys((".feather", ".orc", ".avro", ".h5", ".hdf5"), "save its rows as .parquet"),
    **dict.fromkeys((".db", ".sqlite", ".sqlite3"), "it is a database: save its rows as .csv"),
    **dict.fromkeys((".pkl", ".pickle", ".npy", ".npz"), "it holds objects of Python: save its rows as .jsonl"),
    **dict.fromkeys((".safetensors", ".gguf", ".bin", ".pt", ".pth", ".ckpt"), "it holds the weights of a model"),
}
NULLS = (
    "",
    "#N/A",
    "<NA>",
    "N/A",
    "NA",
    "NULL",
    "NaN",
    "None",
    "n/a",
    "nan",
    "null",
)  # cells that `datasets` calls null
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
BEGINNINGS = {  # of files that are no text, though some may be UTF-8, and what to do with them
    b"\xff\xfe\0\0": "it is UTF-32: convert it with iconv -f utf-32 -t utf-8",
    b"\xff\xfe": "it is UTF-16: convert it with iconv -f utf-16 -t utf-8",
    b"\xfe\xff": "it is UTF-16: convert it with iconv -f utf-16 -t utf-8",
    b"\x1f\x8b": "it is compressed by gzip: let its name end with .gz",
    b"PK\x03\x04": "it is a zip archive or an office document: unpack it, or save it as text",
    b"%PDF-": "it is a PDF: save it as text",
    b"{\\rtf": "it is an office document: save it as text",
    b"\xd0\xcf\x11\xe0": "it is an office document: save it as text",
    b"PAR1\x15": "it is a parquet file: let its name end with .parquet",
    b"ARROW1\0": "it is an Arrow file: save it as .parquet",
    b"SQLite format 3\0": "it is a database: save its rows as .csv",
}
MARK = "\ufeff"  # the byte order mark, decoded
CARD_KEYS = re.compile(  # in the YAML at the head of a data set's README.md
    rb"^(configs|dataset_info|license|task_categories|task_ids|size_categories|pretty_name|annotations_creators):", re.M
)
log = logging.getLogger(__name__)


Rows = Iterator[tuple[int, Any]]  # the number of each row, from 1, and its value: a dict by column, or anything


@dataclass
class Table:
    """Rows, read one after another.

    Attributes:
        name: of the file or data set.
        rows: starts to read them, with the values of at least the given columns (None: of all).
        unit: what the rows' numbers count: `line` or `row`.
        columns: the columns' names if all rows have the same; None if each row has its own.
    """

    name: str
    rows: Callable[[list[str] | None], Rows]
    unit: str = "row"
    columns: list[str] | None = None


def kind_of(path: Path) -> str:
    """The end of a file's name that says what it holds, such as `.jsonl` for `A.JSONL.gz`."""
    return Path(path.stem if path.suffix.lower() == ".gz" else path.name).suffix.lower()


def is_text_file(name: str) -> bool:
    """Whether a name ends like that of a file that can be read."""
    return kind_of(Path(name)) in READ_FILES


def files_below(folder: Path) -> list[Path]:
    """The files of text below a folder, sorted by path, without hidden ones and without the README.md of a data set.

    A README.md is text if it is one of several Markdown files, or the only file.
    """
    below = [path for path in sorted(folder.rglob("*")) if not is_hidden(path.relative_to(folder)) and path.is_file()]
    files = [path for path in below if is_text_file(path.name)]
    if files and (unread := [path for path in below if path.suffix.lower() in (*OTHER_ARCHIVES, ".arrow")]):
        log.warning("%s is not read, nor other files of its kind (%d): unpack or convert them", unread[0], len(unread))
    described = any(kind_of(path) != ".md" for path in files)
    pages = {path for path in files if kind_of(path) == ".md"}
    readmes = {path for path in pages if path.name.lower() == "readme.md"}
    cards = {path for path in readmes if is_dataset_card(path)} | (readmes if described and readmes == pages else set())
    for path in sorted(cards):
        log.warning("%s describes the files beside it and is not read as text", path)
    return [path for path in files if path not in cards]


def is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def is_dataset_card(path: Path, keys: re.Pattern[bytes] = CARD_KEYS) -> bool:
    """Whether a file is the README.md of a data set of the hub: it begins with YAML that has one of the keys."""
    return keys.search(card_head(path)) is not None


def card_head(path: Path) -> bytes:
    """The YAML at the head of a README.md, empty if there is none."""
    head = re.match(rb"(?:\xef\xbb\xbf)?---\s*\n(.*?\n)---", path.read_bytes(), re.S) if path.is_file() else None
    return b"" if head is None else head[1]


def check_fetched(path: Path) -> None:
    """Refuses what git-lfs has put in a file's place.

    Raises:
        FileNotFoundError: the file is a pointer of git-lfs.
    """
    with open(path, "rb") as file:
        if file.read(len(LFS_POINTER)) == LFS_POINTER:
            raise FileNotFoundError(
                f"{path} is a pointer of Git LFS, not the file itself: run `git lfs pull` in its repository"
            )


def read_file(path: Path) -> str | Table:
    """The text of a file, or its rows.

    Raises:
        FileNotFoundError: git-lfs has not fetched the file.
        ValueError: it is not UTF-8 text, or not of the kind that its name says. The rows of a table raise it too.
    """
    check_fetched(path)
    kind = kind_of(path)
    if kind in OTHER_ARCHIVES:
        raise ValueError(f"{path} is an archive of a kind that is not read ({kind}): unpack it, or compress with gzip")
    if kind in NO_TEXT:
        raise ValueError(f"{path} is a file of a kind that is not read ({kind}): {NO_TEXT[kind]}")
    if kind == ".parquet":
        return _parquet(path)
    if kind in JSON_FILES:
        return Table(str(path), lambda columns: _json_rows(path), "line")
    if kind in (".csv", ".tsv"):
        delimiter = "," if kind == ".csv" else "\t"
        return Table(str(path), lambda columns: _csv_rows(path, delimiter), "line")
    return read_text(path)


def read_text(path: Path) -> str:
    """A file as text, without a byte order mark and with line ends as `\\n`.

    Raises:
        ValueError: the file is not UTF-8 text.
    """
    with _opened(path) as file:
        content = _read(file, path)
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 text (byte {error.start} is 0x{error.object[error.start]:02x}); {_remedy(content)}"
        ) from error
    if known := _known(content):
        raise ValueError(f"{path} is no text: {known}")
    if "\0" in text:
        raise ValueError(
            f"{path} is no text: it holds {text.count(chr(0))} NUL characters, as UTF-16 and binary files do. "
            "Convert it, for instance with iconv -f utf-16 -t utf-8"
        )
    return io.IncrementalNewlineDecoder(None, translate=True).decode(text, final=True)


def _known(content: bytes) -> str | None:
    """What a file is and what to do with it, if it begins as files do that are no text."""
    return next((what for start, what in BEGINNINGS.items() if content.startswith(start)), None)


def _remedy(content: bytes) -> str:
    """What to do with a file that is not UTF-8 text, by how it begins."""
    return _known(content) or "convert it, for instance with iconv -t utf-8"


def _opened(path: Path) -> BinaryIO:
    return gzip.open(path) if path.suffix.lower() == ".gz" else open(path, "rb")


def _read(file: BinaryIO, path: Path) -> bytes:
    try:
        return file.read()
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(_damaged(path, error)) from error


def _damaged(path: Path, error: Exception) -> str:
    return f"{path} is not a whole gzip file ({error})"


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """The lines of a file, ended by `\\n` alone: U+2028 and the like may stand inside a JSON string."""
    number = 0
    with _opened(path) as file:
        try:
            for number, line in enumerate(file, 1):
                yield number, line.decode("utf-8").removeprefix(MARK)
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{path}, line {number}: not UTF-8 text (byte {error.start} of the line is "
                f"0x{error.object[error.start]:02x}); {_remedy(error.object if number == 1 else b'')}"
            ) from error
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise ValueError(_damaged(path, error)) from error


def _json_rows(path: Path) -> Rows:
    """Rows of JSON: a value or a list of rows in each line, or in the whole file. The content decides, not the name."""
    is_first = True
    for number, line in _lines(path):
        if not line.strip():
            continue
        try:
            value = _parsed(line, f"{path}, line {number}")
        except json.JSONDecodeError as error:
            if not is_first:
                raise ValueError(f"{path}, line {number}: not JSON ({error})") from error
            yield from _each(number, _json_value(path))
            return
        is_first = False
        yield from _each(number, value)


def _each(number: int, value: Any) -> Rows:
    """(number, row) for the value of a line, or for each row of a list of them."""
    for row in value if isinstance(value, list) else [value]:
        yield number, row


def _json_value(path: Path) -> Any:
    """The one JSON value that the whole file holds."""
    try:
        return _parsed(read_text(path), str(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {error.lineno}: not JSON ({error})") from error


def _parsed(text: str, where: str) -> Any:
    """The value of a JSON text.

    Raises:
        JSONDecodeError: the text is not JSON.
        ValueError: it is, and no value of Python's.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        raise
    except (ValueError, RecursionError) as error:  # numbers of too many digits, lists in lists in lists
        raise ValueError(f"{where}: this JSON holds no text ({error})") from error


def _csv_rows(path: Path, delimiter: str) -> Rows:
    """Rows of a table with a header. Empty cells and those of `NULLS` are null, as in `datasets`."""
    csv.field_size_limit(1 << 30)  # the default, 128 KB, is less than a book
    reader = csv.reader((line for _, line in _lines(path)), delimiter=delimiter, strict=True)
    try:
        header = next(reader, [])
        _check_names(header, path)
        end_of_header = reader.line_num
        for cells in reader:
            if len(cells) > len(header):
                raise ValueError(
                    f"{path}, line {reader.line_num}: {len(cells)} cells, but the header has {len(header)}"
                )
            if cells:
                cells += [""] * (len(header) - len(cells))
                yield (
                    reader.line_num,
                    {name: None if cell in NULLS else cell for name, cell in zip(header, cells, strict=True)},
                )
        if header and reader.line_num == end_of_header:
            log.warning("%s has no rows: its first line names the columns", path)
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num}: not CSV ({error})") from error


def _check_names(columns: list[str], path: Path) -> None:
    """Raises ValueError if two columns of a table have one name: a row would hold the last of them alone."""
    if repeated := sorted({name for name in columns if name and columns.count(name) > 1}):
        raise ValueError(f"{path} has {columns.count(repeated[0])} columns called `{repeated[0]}`: rename all but one")


def _parquet(path: Path) -> Table:
    import pyarrow.parquet  # takes a second, so only when needed

    try:
        file = pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{path} is not a parquet file ({error})") from error
    _check_names(file.schema_arrow.names, path)
    return Table(str(path), lambda columns: _parquet_rows(str(path), file, columns), columns=file.schema_arrow.names)


def _parquet_rows(name: str, file: Any, columns: list[str] | None) -> Rows:
    number = 0
    try:
        for batch in file.iter_batches(batch_size=1024, columns=columns):
            for row in batch.to_pylist():
                number += 1
                yield number, row
    except OSError as error:  # of pages and dictionaries; pyarrow reads the footer alone when it opens a file
        raise ValueError(f"{name} is damaged after row {number} ({error}): download it again") from error
