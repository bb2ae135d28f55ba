"""Reading the documents: fenced blocks, the commands in them, and inline code."""

import re
import shlex
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

FENCE = re.compile(r"\s*(`{3,}|~{3,})\s*(\w*)")
EXEMPTION = re.compile(r"<!--\s*not run:\s*(.*?)\s*-->")
INLINE = re.compile(r"(?<!`)(`+)(?!`)(.+?)(?<!`)\1(?!`)", re.DOTALL)
ENVIRONMENT = re.compile(r"[A-Za-z_]\w*=.*", re.DOTALL)


@dataclass(frozen=True)
class Block:
    """What is fenced, with the number of its first line and why it is exempt, if it is."""

    document: str
    line: int
    language: str
    text: str
    exemption: str | None

    def __str__(self) -> str:
        return f"{self.document}:{self.line}"


@dataclass(frozen=True)
class Command:
    """The words of a command, where it stands, and the variables that are set for it, NAME=VALUE."""

    place: str
    words: tuple[str, ...]
    variables: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.place} {' '.join(self.words)}"


def read(path: Path, document: str) -> tuple[list[Block], str]:
    """The fenced blocks of a document, and the text without them."""
    blocks, prose, lines = [], [], path.read_text().splitlines()
    start, end, language, before = 0, "", "", ""
    for number, line in enumerate(lines, 1):
        fence = FENCE.match(line)
        if end and fence and fence[1].startswith(end):
            exemption = EXEMPTION.fullmatch(before.strip())
            text = "\n".join(lines[start : number - 1])
            blocks.append(Block(document, start + 1, language, text, exemption[1] if exemption else None))
            end, before = "", ""
        elif not end and fence:
            start, end, language = number, fence[1], fence[2]
        elif not end:
            prose.append(line)
            before = line if line.strip() else before
    assert not end, f"{document}:{start}: the block has no end"
    return blocks, "\n".join(prose)


def inline_code(prose: str) -> list[str]:
    """What stands between backticks, paragraph by paragraph."""
    paragraphs = re.split(r"\n\s*\n", prose)
    return [" ".join(span.split()) for paragraph in paragraphs for _, span in INLINE.findall(paragraph)]


def commands(text: str, place: str) -> list[Command]:
    """The simple commands of a shell text: comments, prompts, redirections and `...` are left out.

    Raises:
        ValueError: a here-document, which this does not read.
    """
    found = []
    for line in text.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line.strip().removeprefix("$ "), posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        words: list[str] = []
        is_target = False  # of a redirection
        for word in [*lexer, ";"]:
            if word == "<<":
                raise ValueError(f"{place}: a here-document")
            if set(word) <= set("<>"):
                is_target = True
            elif set(word) <= set("();|&"):
                variables = tuple(takewhile(ENVIRONMENT.fullmatch, words))
                if len(words) > len(variables):
                    found.append(Command(place, tuple(words[len(variables) :]), variables))
                words = []
            elif is_target or word == "...":
                is_target = False
            else:
                words.append(word)
    return found
