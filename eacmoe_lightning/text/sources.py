"""What a text source is called, and what its name stands for.

Text for calibration and evaluation comes from the package, from the user's files or from a data set.
A *source* is a string:

- `bundled:NAME`: a text shipped with the package (`bundled:calibration`, `bundled:prose`, ...);
- `PATH`: a file (.txt and .md: one document; .jsonl, .json, .csv, .tsv and .parquet: one per row), which may be
  compressed (.gz), or a directory: all such files below it, sorted by path;
- `PATTERN`: a path with `*`, `?`, `[...]` or `**` (any number of directories): the files that match, sorted by path;
- `DIRECTORY[/CONFIG][:SPLIT]`: a split of a data set stored on this machine, in the hub's layout or by `save_to_disk`;
  a config that its README.md declares has the files that it says, whatever lies in the folder of that name;
- `[OWNER/]NAME[/CONFIG][:SPLIT]`: a data set of the Hugging Face hub; SPLIT defaults to `train`
  and may be a slice (`train[:1%]`).

`self[:NUM][:MODEL]`, which a model writes, is no text to read (text/sampled.py); `./self` is a path.

`SOURCE#COLUMN` and `SOURCE#QUESTION,ANSWER` name the columns of rows; without them a row's document is in `text`, or
it is a conversation in `messages`, `conversations` or a pair such as `prompt` and `response` (text/rows.py).

`SOURCE[FROM%:TO%]` is a part of any of them, counted in characters and cut at line ends:
`bundled:prose[:50%]` and `bundled:prose[50%:]` do not overlap. Of conversations it is a part of the rows. (After a
data set's split, the brackets are that library's slice, counted in rows.)

The forms are tried in this order. A source is a path if it exists on disk, if it begins with `/`, `./`, `../` or `~`,
if it has a `*`, `?` or `[`, or if it ends like a text file. In a hub name, two parts are `OWNER/NAME` and three are
`OWNER/NAME/CONFIG`. Some names that papers use without an owner (`OWNERLESS`, such as
wikitext) stand for owner and name: `wikitext/wikitext-2-raw-v1:train` is `Salesforce/wikitext`,
config `wikitext-2-raw-v1`.

text/documents.py reads them.
"""

from __future__ import annotations

import os
import re
from fractions import Fraction
from glob import glob
from pathlib import Path

from eacmoe_lightning.text.files import ROW_FILES, is_text_file, kind_of
from eacmoe_lightning.text.hub import INSTEAD
from eacmoe_lightning.text.sampled import SELF, sampled_source

BUNDLED_TEXT = Path(__file__).parent.parent / "assets" / "text"
SPLIT = re.compile(r":(?P<split>[A-Za-z_][\w.+-]*(\[[^\]]*\])?)$")
PART = re.compile(r"\[((?P<start>\d+(\.\d+)?)%)?:((?P<stop>\d+(\.\d+)?)%)?\](?P<column>#[^#/\[\]]+)?$")
COLUMN = re.compile(r"#(?P<column>[^#/\[\]]+)$")
UNREAD_LIST = re.compile(r"\[.*[,:].*\]|\{.*:.*\}", re.S)  # a list or a dictionary that YAML did not take for one
WILDCARD = re.compile(r"[*?\[]")


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
    if not isinstance(sources, list | tuple | dict):
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
    if not isinstance(source, str):
        raise ValueError(f"{option}: a source is a string, but {source!r} is {type(source).__name__}: {INSTEAD}")
    if not source.strip():
        raise ValueError(f"{option} names no source, but {source!r}: {INSTEAD}")
    if is_unread_list(source):
        raise ValueError(
            f"{option}: {source} is one text and no list: put quotes around each source that has brackets, as in "
            "['bundled:prose[:50%]', 'bundled:code[:50%]'] or {prose: 'bundled:prose[:50%]'}"
        )
    try:
        take_part(source)
    except ValueError as error:
        raise ValueError(f"{option}: {error}") from error


def may_have_rows(source: str) -> bool:
    """Whether a source may be a table: bundled text, text that a model samples and files of plain text are none."""
    whole = take_part(source)[0]
    if source.startswith("bundled:") or SELF.fullmatch(source):
        return False
    return not Path(whole).expanduser().is_file() or kind_of(Path(whole)) in ROW_FILES


def is_unread_list(source: str) -> bool:
    """Whether a source looks like several, or like {name: source}."""
    return UNREAD_LIST.fullmatch(source.strip()) is not None and not (glob(source) or Path(source).exists())


def _stem(source: str) -> str:
    """The last part of a source without its end; of a pattern, the last one without wildcards."""
    if is_pattern(take_part(source)[0]):
        return next((part for part in reversed(Path(source).parts) if not WILDCARD.search(part)), "pattern")
    name = Path(source).stem
    return name if name.strip(".") else Path(source).absolute().resolve().stem or "text"


def take_column(source: str, column: str | None) -> tuple[str, str | None]:
    """The source without `#COLUMN`, and that column or else the given one."""
    match = COLUMN.search(source)
    if match is None or Path(source).expanduser().exists():
        return source, column
    return source[: match.start()], match["column"]


def take_part(source: str) -> tuple[str, Fraction, Fraction]:
    """The source without `[FROM%:TO%]`, which may stand before or after a column, and the two numbers as parts of 1.

    Raises:
        ValueError: the numbers are not a part of a text.
    """
    match = PART.search(source)
    sliced = source[: match.start("column")] if match and match["column"] else source  # without a column
    is_split = SPLIT.search(sliced) and not source.startswith("bundled:")
    if match is None or is_split or any(Path(name).expanduser().exists() for name in (source, sliced)):
        return source, Fraction(0), Fraction(1)
    start, stop = match["start"] or "0", match["stop"] or "100"
    first, last = Fraction(start) / 100, Fraction(stop) / 100
    if not first < last <= 1:
        raise ValueError(f"{source}: {start}% to {stop}% is not a part of a text: pass 0 <= FROM < TO <= 100")
    return source[: match.start()] + (match["column"] or ""), first, last


def is_pattern(source: str) -> bool:
    """Whether a path stands for all files that match it."""
    return WILDCARD.search(source) is not None and not SPLIT.search(source) and not Path(source).expanduser().exists()


def is_path(source: str) -> bool:
    if SPLIT.search(source) and not Path(source).exists():
        return False
    return (
        Path(source).expanduser().exists()
        or is_pattern(source)
        or source.startswith(("/", "./", "../", "~"))
        or is_text_file(source.rpartition("/")[2])
    )


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
    whole = take_column(take_part(source)[0], None)[0]
    match = None if is_path(whole) else SPLIT.search(whole)
    name = whole[: match.start()] if match else whole
    path = Path(name).expanduser()
    is_local = path.exists() or is_pattern(name) or (path.parent.is_dir() and path.parent != Path())
    if source.startswith("bundled:") or is_unread_list(source) or not is_local:
        return source
    return os.path.abspath(path) + source[len(name) :]
