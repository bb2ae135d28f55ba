"""From a row of a table to a document: plain text, or a conversation.

Which columns of a table make its documents is decided once, by their names (`columns_of`):

- the column that the user named, or the pair of columns `QUESTION,ANSWER`;
- else `text`;
- else turns, in `messages` or `conversations`: dicts with `role` and `content`, or with `from` and `value` (ShareGPT);
- else a question and its answer in two columns (`prompt` and `response`, `instruction` and `output`, ...), after the
  earlier turns in `history`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from eacmoe_lightning.text.turns import (
    LOOKS_LIKE_TURNS,
    messages_of,
    parsed_list,
    parsed_turns,
    says_something,
    whole_characters,
    without_nulls,
)

TURNS = ("messages", "conversations", "conversation")
PAIRS = (
    ("prompt", "response"),
    ("prompt", "completion"),
    ("prompt", "answer"),
    ("instruction", "output"),
    ("instruction", "response"),
    ("question", "answer"),
    ("question", "response"),
    ("query", "response"),
    ("problem", "solution"),
    ("input", "output"),
)
BESIDE = ("input", "context")  # what an instruction speaks about, in a column of its own
HISTORY = "history"  # the turns before a question: pairs of a question and its answer, or turns
SYSTEM = ("system", "system_prompt")


@dataclass(frozen=True)
class Conversation:
    """Turns between a user and an assistant, to be rendered by a tokenizer's chat template.

    Attributes:
        messages: dicts with `role`, `content` and whatever else the row gave a message.
        tools: descriptions of tools, for templates that list them; None if the row has none.
        where: file and line, or data set and row, for error messages.
    """

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None
    where: str = "the conversation"


Document = str | Conversation


def columns_of(names: Collection[str], column: str | None = None) -> tuple[str, ...] | None:
    """The columns that hold a document, one or two (a question and its answer), or None.

    Args:
        names: the columns of the table.
        column: the user's choice, a name or `QUESTION,ANSWER`; None chooses as the module's docstring says.
    """
    if column is not None:
        wanted = (column,) if column in names else tuple(name.strip() for name in column.split(","))
        return wanted if len(wanted) <= 2 and all(name in names for name in wanted) else None
    single = next((name for name in ("text", *TURNS) if name in names), None)
    if single is not None:
        return (single,)
    return next((pair for pair in PAIRS if all(name in names for name in pair)), None)


def columns_read(names: Collection[str], columns: tuple[str, ...]) -> list[str]:
    """The columns that `document_of` looks at: those of the document and, for a conversation, those beside it."""
    return [name for name in names if name in (*columns, *SYSTEM, HISTORY, "tools", *BESIDE)]


def document_of(row: Mapping[str, Any], columns: tuple[str, ...], where: str) -> Document | None:
    """The document of a row, or None if the row is null.

    Args:
        row: the row's values by column.
        columns: of `columns_of`.
        where: file and line, or data set and row, for error messages.

    Raises:
        ValueError: a value is neither text nor turns, or turns that say nothing.
    """
    values = [_parsed(row[name], name, where) for name in columns]
    if len(values) == 1 and isinstance(values[0], str):
        return whole_characters(values[0])
    if any(value is None or value == [] for value in values) or all(map(_is_blank, values)):
        return None
    for name, value in zip(columns, values, strict=True):
        if not isinstance(value, str | list):
            raise ValueError(
                f"{where}: a row needs a string in field `{name}`, or a list of turns, but has {_kinds(row)}"
            )
    if len(values) == 1:
        messages = messages_of(values[0], columns[0], where)
    else:
        messages = _history(row.get(HISTORY), where) + _asked(row, columns, values, where)
    if not any(map(says_something, messages)):
        raise ValueError(f"{where}: the {len(messages)} turns say nothing: write what they say into `content`")
    system = next((row[name] for name in SYSTEM if isinstance(row.get(name), str) and row[name]), None)
    if system is not None and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": whole_characters(system)})
    tools = without_nulls(_parsed(row.get("tools"), "tools", where))
    return Conversation(messages, tools if isinstance(tools, list) and tools else None, where)


def _is_blank(value: Any) -> bool:
    return isinstance(value, str) and not value.strip()


def _asked(
    row: Mapping[str, Any], columns: tuple[str, ...], values: list[str | list], where: str
) -> list[dict[str, Any]]:
    """A question, with what stands beside it, and its answer; an answer that repeats the question's turns is both."""
    question, answer = (
        [{"role": role, "content": value}] if isinstance(value, str) else value
        for role, value in zip(("user", "assistant"), values, strict=True)
    )
    asked = messages_of(question, columns[0], where)
    answered = messages_of(answer, columns[1], where)
    spoken, heard = ([(m["role"], m["content"]) for m in turns if m["role"] != "system"] for turns in (asked, answered))
    if spoken and heard[: len(spoken)] == spoken:
        has_system = answered[0]["role"] == "system"
        return answered if has_system else [m for m in asked if m["role"] == "system"] + answered
    beside = next(filter(None, (_text_beside(row[name]) for name in _beside(row, columns))), None)
    if beside and isinstance(values[0], str):
        asked[0]["content"] += f"\n\n{whole_characters(beside)}"
    return asked + answered


def left_out(row: Mapping[str, Any], columns: tuple[str, ...]) -> str | None:
    """The column beside a question that is left out, because it is neither text nor a list of texts."""
    if len(columns) == 1:
        return None
    return next((name for name in _beside(row, columns) if row[name] and _text_beside(row[name]) is None), None)


def _beside(row: Mapping[str, Any], columns: tuple[str, ...]) -> list[str]:
    return [name for name in BESIDE if name in row and name not in columns]


def _text_beside(value: Any) -> str | None:
    """What an instruction speaks about as text: a text, a number, or paragraphs."""
    if isinstance(value, str | int | float):
        return str(value)
    if isinstance(value, list) and all(isinstance(part, str) for part in value):
        return "\n\n".join(value)
    return None


def _kinds(row: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}: {type(value).__name__}" for name, value in sorted(row.items()))


def _parsed(value: Any, name: str, where: str) -> Any:
    """Turns that a table holds as the text of a list, in JSON or as Python prints it, or else the value itself.

    In columns whose names do not promise turns, a text is one unless all in it are turns.

    Raises:
        ValueError: the text looks like turns and is no list of them.
    """
    if not isinstance(value, str):
        return value
    if name not in (*TURNS, HISTORY, "tools"):
        return parsed_turns(value) or value
    held = parsed_list(value)
    if held is None and name in TURNS and LOOKS_LIKE_TURNS.match(value):
        raise ValueError(
            f"{where}: field `{name}` holds text that looks like turns and is no list in JSON, but {value[:40]!r} ...: "
            "write it as a list of turns with `role` and `content`"
        )
    return value if held is None else held


def _history(value: Any, where: str) -> list[dict[str, Any]]:
    """The messages before a question.

    Raises:
        ValueError: the value holds neither pairs nor turns.
    """
    turns = _parsed(value, HISTORY, where) or []
    if isinstance(turns, list) and all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in turns):
        roles = ("user", "assistant")
        turns = [{"role": role, "content": text} for pair in turns for role, text in zip(roles, pair, strict=True)]
    if not isinstance(turns, list):
        raise ValueError(f"{where}: field `{HISTORY}` holds {type(turns).__name__}, not pairs of question and answer")
    return messages_of(turns, HISTORY, where)
