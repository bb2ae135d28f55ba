"""Turns of a conversation, in the forms that data sets have, as messages with `role` and `content`."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping
from typing import Any

CONTENT = ("content", "value", "text")  # what a turn says: OpenAI's word, ShareGPT's, others'
CALLS = ("tool_calls", "function_call")  # a turn with one of them need not say anything
LIST_OF_DICTS = re.compile(r"\s*\[\s*\{\s*['\"]")
LOOKS_LIKE_TURNS = re.compile(r"""\s*\[?\s*\{\s*['"](role|content|from|value)['"]\s*:""")
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


def parsed_list(text: str) -> list | None:
    """The list that a text is, in JSON or as Python prints it."""
    for parse in (json.loads, ast.literal_eval) if text.lstrip()[:1] == "[" else ():
        try:
            return parse(text)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            continue
    return None


def parsed_turns(text: str) -> list | None:
    """The turns that a text holds, if each of them has a known role and says something."""
    turns = parsed_list(text) if LIST_OF_DICTS.match(text) else None
    return turns if turns and all(map(_is_turn, turns)) else None


def _is_turn(value: Any) -> bool:
    if not isinstance(value, Mapping):
        return False
    role, speaker = (str(value.get(name)).lower() for name in ("role", "from"))
    return (role in (*ROLES, "tool") or speaker in SHAREGPT) and any(name in value for name in (*CONTENT, *CALLS))


def messages_of(turns: list, column: str, where: str) -> list[dict[str, Any]]:
    """The messages of turns.

    Args:
        turns: the value of a row's column.
        column: its name.
        where: file and line, or data set and row, for error messages.

    Raises:
        ValueError: a turn does not tell its role, or what it says.
    """
    messages = []
    for number, turn in enumerate(turns, 1):
        place = f"{where}, turn {number} of `{column}`"
        if not isinstance(turn, Mapping):
            remedy = ": give each text a row of its own, or make it a turn" if isinstance(turn, str) else ""
            raise ValueError(f"{place} is {type(turn).__name__}, not a dict with `role` and `content`{remedy}")
        may_be_silent = any(name in turn for name in CONTENT[:2])  # null there
        turn = {key: value for key, value in turn.items() if value is not None}
        fields = sorted(turn)
        if isinstance(role := turn.pop("role", None), str):
            role = ROLES.get(role.lower(), role)  # others are the template's business
        elif isinstance(speaker := turn.pop("from", None), str) and speaker.lower() in SHAREGPT:
            role = SHAREGPT[speaker.lower()]
        else:
            raise ValueError(
                f"{place} needs a string in `role`, or one of {', '.join(SHAREGPT)} in `from`, but `from` is "
                f"{speaker!r} and the fields are {fields}"
            )
        said = next((name for name in CONTENT if name in turn), None)
        if said is None and not may_be_silent and not any(name in turn for name in CALLS):
            raise ValueError(
                f"{place} has no `content`, but the fields {', '.join(fields)}: rename the one with its text"
            )
        content = _text(turn.pop(said), place) if said else ""
        turn |= {name: without_nulls(turn[name]) for name in CALLS if name in turn}
        messages.append({"role": role, "content": content, **turn})
    return messages


def _text(content: Any, place: str) -> str:
    """The text of a message; content may be a list of parts, all of them text."""
    if isinstance(content, list):
        kinds = [part.get("type", "text") if isinstance(part, Mapping) else type(part).__name__ for part in content]
        if any(kind != "text" for kind in kinds):
            raise ValueError(f"{place} has parts of type {', '.join(sorted(set(kinds)))}: only text calibrates")
        if without := [part for part in content if not isinstance(part.get("text"), str)]:
            names = ", ".join(sorted(without[0])) or "none"
            raise ValueError(f"{place} has a part without a string in `text`, but the fields {names}: rename its text")
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise ValueError(f"{place}: its content is {type(content).__name__}, not text")
    return whole_characters(content)


def says_something(message: Mapping[str, Any]) -> bool:
    return bool(message["content"].strip()) or any(message.get(name) for name in CALLS)


def without_nulls(value: Any) -> Any:
    """A value without the null fields with which a table fills up dicts, so that all of a column have the same."""
    if isinstance(value, Mapping):
        return {key: without_nulls(held) for key, held in value.items() if held is not None}
    return [without_nulls(held) for held in value] if isinstance(value, list) else value


def whole_characters(text: str) -> str:
    """A text with halves of surrogate pairs, which JSON can hold and tokenizers refuse, replaced by U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text
