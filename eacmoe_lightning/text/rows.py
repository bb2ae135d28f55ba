"""From a row of a table to a document: plain text, or a conversation.

Which columns of a table make its documents is decided once, by their names (`columns_of`):

- the column that the user named, or the pair of columns `QUESTION,ANSWER`;
- else `text`;
- else turns, in `messages` or `conversations`: dicts with `role` and `content`, or with `from` and `value` (ShareGPT);
- else a question and its answer in two columns (`prompt` and `response`, `instruction` and `output`, ...), after the
  earlier turns in `history`.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

TURNS = ("messages", "conversations", "conversation")
LOOKS_LIKE_TURNS = re.compile(r"""\s*\[?\s*\{\s*['"](role|content|from|value)['"]\s*:""")
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
ROLES = {  # by other words for them
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bing", "bard", "claude", "bot", "model"), "assistant"),
    "system": "system",
}
SHAREGPT = {  # further ones in `from`
    **ROLES,
    "function_call": "assistant",
    **dict.fromkeys(("tool", "observation", "function_response"), "tool"),
}


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
        ValueError: a value is neither text nor turns.
    """
    values = [_parsed(row[name], name, where) for name in columns]
    if len(values) == 1 and isinstance(values[0], str):
        return whole_characters(values[0])
    if any(value is None or value == [] for value in values):
        return None
    for name, value in zip(columns, values, strict=True):
        if not isinstance(value, str | list):
            raise ValueError(
                f"{where}: a row needs a string in field `{name}`, or a list of turns, but has {_kinds(row)}"
            )
    if len(values) == 1:
        messages = _messages(values[0], columns[0], where)
    else:
        question, answer = (whole_characters(value) if isinstance(value, str) else value for value in values)
        if isinstance(question, str):
            beside = next((row[name] for name in BESIDE if row.get(name) and name not in columns), None)
            question = [{"role": "user", "content": f"{question}\n\n{beside}" if beside else question}]
        answer = [{"role": "assistant", "content": answer}] if isinstance(answer, str) else answer
        messages = _history(row.get(HISTORY), where)
        messages += _messages(question, columns[0], where) + _messages(answer, columns[1], where)
    system = next((row[name] for name in SYSTEM if isinstance(row.get(name), str) and row[name]), None)
    if system is not None and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": whole_characters(system)})
    tools = _parsed(row.get("tools"), "tools", where)
    return Conversation(messages, tools if isinstance(tools, list) and tools else None, where)


def _kinds(row: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}: {type(value).__name__}" for name, value in sorted(row.items()))


def _parsed(value: Any, name: str, where: str) -> Any:
    """Turns that a table holds as the text of a list, in JSON or as Python prints it, or else the value itself.

    Raises:
        ValueError: the text looks like turns and is no list of them.
    """
    if not isinstance(value, str) or name not in (*TURNS, HISTORY, "tools"):
        return value
    for parse in (json.loads, ast.literal_eval) if value.lstrip()[:1] == "[" else ():
        try:
            return parse(value)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            continue
    if name in TURNS and LOOKS_LIKE_TURNS.match(value):
        raise ValueError(
            f"{where}: field `{name}` holds text that looks like turns and is no list in JSON, but {value[:40]!r} ...: "
            "write it as a list of turns with `role` and `content`"
        )
    return value


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
    return _messages(turns, HISTORY, where)


def _messages(turns: list, column: str, where: str) -> list[dict[str, Any]]:
    messages = []
    for number, turn in enumerate(turns, 1):
        place = f"{where}, turn {number} of `{column}`"
        if not isinstance(turn, Mapping):
            remedy = ": give each text a row of its own, or make it a turn" if isinstance(turn, str) else ""
            raise ValueError(f"{place} is {type(turn).__name__}, not a dict with `role` and `content`{remedy}")
        turn = {key: value for key, value in turn.items() if value is not None}
        content, fields = turn.pop("content", turn.pop("value", "")), sorted(turn)
        if isinstance(role := turn.pop("role", None), str):
            role = ROLES.get(role.lower(), role)  # others are the template's business
        elif isinstance(speaker := turn.pop("from", None), str) and speaker.lower() in SHAREGPT:
            role = SHAREGPT[speaker.lower()]
        else:
            raise ValueError(
                f"{place} needs a string in `role`, or one of {', '.join(SHAREGPT)} in `from`, but `from` is "
                f"{speaker!r} and the fields are {fields}"
            )
        messages.append({"role": role, "content": _text(content, place), **turn})
    return messages


def _text(content: Any, place: str) -> str:
    """The text of a message; content may be a list of parts, all of them text."""
    if isinstance(content, list):
        kinds = [part.get("type", "text") if isinstance(part, Mapping) else type(part).__name__ for part in content]
        if any(kind != "text" for kind in kinds):
            raise ValueError(f"{place} has parts of type {', '.join(sorted(set(kinds)))}: only text calibrates")
        content = "".join(part.get("text") or "" for part in content)
    if not isinstance(content, str):
        raise ValueError(f"{place}: its content is {type(content).__name__}, not text")
    return whole_characters(content)


def whole_characters(text: str) -> str:
    """A text with halves of surrogate pairs, which JSON can hold and tokenizers refuse, replaced by U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text
