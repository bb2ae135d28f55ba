"""A conversation becomes tokens: rendered by a chat template, with the tokens of the answers marked."""

from __future__ import annotations

import inspect
import json
import os
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from jinja2 import TemplateError, TemplateSyntaxError

from eacmoe_lightning.models.transformers_loader import dated
from eacmoe_lightning.text.files import check_fetched, read_text
from eacmoe_lightning.text.rows import Conversation

GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")  # encloses the answers in templates that mark them
# its code may do anything
TEMPLATE_ERRORS = (TemplateError, TypeError, LookupError, ArithmeticError, AttributeError, ValueError)
DATE = datetime(2026, 1, 1)  # in templates that tell the date: a run is continued with the same text on another day
PLAIN = [{"role": "user", "content": "How are you?"}, {"role": "assistant", "content": "Well."}]
OTHER_ANSWER = "\N{SNOWMAN}"  # begins as no answer does
NO_TEMPLATE = (
    "{}: the tokenizer has no chat template to render conversations with: pass one with --data.chat_template FILE "
    "(the chat_template.jinja of a chat model of this family), or name a column of plain text with --data.column"
)


def read_template(path: Path, option: str) -> str:
    """A chat template from its file.

    Args:
        path: a file with a Jinja template, or JSON with one under `chat_template`.
        option: the command-line option that errors name.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not text.
    """
    if not path.is_file():
        what = "is not a file" if path.exists() else "does not exist"
        raise FileNotFoundError(f"{option}: {path} {what}: pass a file with a Jinja template")
    try:
        check_fetched(path)
        text = read_text(path)
        if path.suffix.lower() == ".json":  # chat_template.json and tokenizer_config.json have it under this name
            return _template_in(path, text)
        return text
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{option}: {error}") from error
    except ValueError as error:
        raise ValueError(f"{option}: {error}") from error


def _template_in(path: Path, text: str) -> str:
    """The template in a JSON file that holds one by name."""
    try:
        content = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error})") from error
    template = content.get("chat_template") if isinstance(content, dict) else None
    if not isinstance(template, str):
        raise ValueError(f"{path} has no template under `chat_template`: pass a file with a Jinja template")
    return template


def conversation_tokens(conversation: Conversation, tokenizer: Any, answers: bool) -> tuple[list[int], list[bool]]:
    """Token ids of a conversation and, for each, whether it counts. The template alone adds special tokens.

    Args:
        conversation: the turns.
        tokenizer: a transformers tokenizer with a chat template.
        answers: only the assistant's turns count; else every token.

    Raises:
        ValueError: there is no template, it refuses these turns, or it does not show where the answers are.
    """
    _check_renders(conversation, tokenizer)
    template = tokenizer.chat_template
    messages, tools = conversation.messages, conversation.tools
    if answers and isinstance(template, str) and GENERATION.search(template):
        encoded = _apply(
            conversation, tokenizer, messages, tools=tools, return_dict=True, return_assistant_tokens_mask=True
        )
        return list(encoded["input_ids"]), [bool(mark) for mark in encoded["assistant_masks"]]
    text = _apply(conversation, tokenizer, messages, tools=tools, tokenize=False)
    spans = _answer_spans(conversation, tokenizer, text) if answers else [(0, len(text))]
    return _tokens_in_spans(text, spans, tokenizer)


def rendered(conversation: Conversation, tokenizer: Any, **options: Any) -> str:
    """A conversation as the chat template renders it.

    Raises:
        ValueError: there is no template, or it refuses these turns.
    """
    _check_renders(conversation, tokenizer)
    return _apply(conversation, tokenizer, conversation.messages, tokenize=False, **options)


def _check_renders(conversation: Conversation, tokenizer: Any) -> None:
    """Raises ValueError for a tokenizer without a chat template, or of a kind that takes none (mistral_common's)."""
    if "chat_template" not in inspect.signature(tokenizer.apply_chat_template).parameters:
        raise ValueError(
            f"{conversation.where}: the tokenizer is a {type(tokenizer).__name__}, which renders requests and no "
            "answers, and takes no chat template: put a tokenizer.json of this model in the place of its own file, or "
            "name a column of plain text with --data.column"
        )
    if tokenizer.chat_template is None:
        raise ValueError(NO_TEMPLATE.format(conversation.where))


def _apply(conversation: Conversation, tokenizer: Any, messages: list[dict], **options: Any) -> Any:
    _check_default(tokenizer)
    messages = _as_read(messages, tokenizer, conversation.where)
    parsed = [_with_parsed_arguments(message) for message in messages]
    try:
        return _render(tokenizer, parsed, **options)
    except TEMPLATE_ERRORS as error:
        if parsed != messages:
            try:
                return _render(tokenizer, messages, **options)  # some templates join arguments as text
            except TEMPLATE_ERRORS:
                pass  # the first error says more
        try:
            _render(tokenizer, PLAIN, tokenize=False)
        except TEMPLATE_ERRORS as broken:
            line = f"line {broken.lineno}: " if isinstance(broken, TemplateSyntaxError) else ""
            message = broken.message if isinstance(broken, TemplateSyntaxError) else broken
            raise ValueError(
                "the chat template (--data.chat_template, or else the tokenizer's) is broken, it does not even render "
                f"a question and its answer: {line}{message}. Mend it, or pass another with --data.chat_template FILE"
            ) from error
        roles = ", ".join(message["role"] for message in messages)
        raise ValueError(
            f"{conversation.where}: the chat template does not render turns of {roles}: {error}. Mend or remove the "
            "row, or pass another template with --data.chat_template FILE"
        ) from error


@contextmanager
def on_a_fixed_date(tokenizer: Any) -> Iterator[None]:
    """Inside the `with` block all chat templates of a tokenizer that tell the date tell `DATE`."""
    templates = tokenizer.chat_template
    with ExitStack() as stack:
        for template in templates.values() if isinstance(templates, dict) else [templates]:
            if template is not None:
                stack.enter_context(dated(template, DATE))
        yield


def _render(tokenizer: Any, messages: list[dict[str, Any]], **options: Any) -> Any:
    with on_a_fixed_date(tokenizer):
        return tokenizer.apply_chat_template(messages, **options)


def _check_default(tokenizer: Any) -> None:
    """Raises ValueError if a tokenizer has several templates by name, and none is the default."""
    templates = tokenizer.chat_template
    if isinstance(templates, dict) and "default" not in templates:
        raise ValueError(
            f"the tokenizer has chat templates for {', '.join(sorted(templates))}, but no default: pass one of them "
            "with --data.chat_template FILE"
        )


def _with_parsed_arguments(message: dict[str, Any]) -> dict[str, Any]:
    """A turn whose calls of tools have their arguments as a dict, which templates expect, instead of as JSON text."""
    calls = message.get("tool_calls")
    if not isinstance(calls, list):
        return message
    return message | {"tool_calls": [_with_parsed_call(call) for call in calls]}


def _with_parsed_call(call: Any) -> Any:
    if not isinstance(call, dict):
        return call
    if isinstance(function := call.get("function"), dict):
        return call | {"function": _with_parsed_call(function)}
    try:
        arguments = json.loads(call["arguments"])
    except (KeyError, TypeError, ValueError):
        return call
    return call | {"arguments": arguments} if isinstance(arguments, dict) else call


def _as_read(messages: list[dict[str, Any]], tokenizer: Any, where: str) -> list[dict[str, Any]]:
    """Turns with their contents as the template reads them: as text, or as parts (of models that see images).

    Raises:
        ValueError: it renders neither, so that a conversation would be its roles alone.
    """
    form = _form_read(tokenizer, str(tokenizer.chat_template))
    if form == "neither":
        raise ValueError(
            f"{where}: the chat template (--data.chat_template, or else the tokenizer's) leaves out what the turns "
            "say. Mend it, or pass another with --data.chat_template FILE"
        )
    return _in_parts(messages) if form == "parts" else messages


@lru_cache(maxsize=8)
def _form_read(tokenizer: Any, template: str) -> Literal["text", "parts", "neither"]:
    """The form of contents that a tokenizer's template shows. One that is broken says so when it renders a row."""
    as_text = _shows_content(tokenizer, PLAIN)
    if as_text:
        return "text"
    if _shows_content(tokenizer, _in_parts(PLAIN)):
        return "parts"
    return "text" if as_text is None else "neither"


def _shows_content(tokenizer: Any, messages: list[dict[str, Any]]) -> bool | None:
    """Whether the template renders what these turns of `PLAIN` say; None: it does not render them at all."""
    try:
        text = _render(tokenizer, messages, tokenize=False)
    except TEMPLATE_ERRORS:
        return None
    return all(message["content"].casefold() in text.casefold() for message in PLAIN)


def _in_parts(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [message | {"content": [{"type": "text", "text": message["content"]}]} for message in messages]


def _answer_spans(conversation: Conversation, tokenizer: Any, text: str) -> list[tuple[int, int]]:
    """The parts of the rendered text that the assistant wrote, from the first character to the end of its turn.

    An answer is what a longer conversation adds to the prompt for it. Where a template renders the longer conversation
    in another way (without earlier thoughts, say), the answer is its content wherever that follows the turns before.
    """
    messages, spans, end = conversation.messages, [], 0
    for index, message in enumerate(messages):
        content = message["content"].strip()
        if message["role"] != "assistant":
            found = text.find(content, end)
            end = end if found < 0 else found + len(content)
            continue
        before, after = _around(conversation, tokenizer, index)
        if before is not None and text.startswith(after) and after.startswith(before):
            span = len(before), len(after)
        else:
            content = content.rpartition("</think>")[2].strip()
            start = text.find(content, end)
            if start < 0:
                raise ValueError(
                    f"{conversation.where}, turn {index + 1}: the chat template does not show where the answer is "
                    "(--data.answers_only): pass a template that marks answers by {% generation %}, with "
                    "--data.chat_template FILE"
                )
            span = start, start + len(content)
        spans.append(span)
        end = span[1]
    return spans


def _around(conversation: Conversation, tokenizer: Any, index: int) -> tuple[str | None, str]:
    """The rendered turns before an answer, with the prompt for it, and those up to and with the answer.

    A template that knows no prompt (`add_generation_prompt`) shows it by two answers that begin differently.
    """
    messages, options = conversation.messages, {"tools": conversation.tools, "tokenize": False}
    try:
        before = _apply(conversation, tokenizer, messages[:index], add_generation_prompt=True, **options)
        after = _apply(conversation, tokenizer, messages[: index + 1], **options)
        if before == _apply(conversation, tokenizer, messages[:index], **options):
            other = [*messages[:index], {"role": "assistant", "content": OTHER_ANSWER}]
            before = os.path.commonprefix([after, _apply(conversation, tokenizer, other, **options)])
        return before, after
    except (ValueError, IndexError):  # a template may refuse a conversation that ends here, or an empty one
        return None, ""


def _tokens_in_spans(text: str, spans: list[tuple[int, int]], tokenizer: Any) -> tuple[list[int], list[bool]]:
    """The tokens of a text, and which of them have a character in one of the spans."""
    options = {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}
    if spans == [(0, len(text))]:
        ids = tokenizer(text, **options)["input_ids"]
        return ids, [True] * len(ids)
    if getattr(tokenizer, "is_fast", False):
        encoded = tokenizer(text, return_offsets_mapping=True, **options)
        inside = [False] * len(text)
        for start, end in spans:
            inside[start:end] = [True] * (end - start)
        return encoded["input_ids"], [any(inside[start:end]) for start, end in encoded["offset_mapping"]]
    ids, counts, done = [], [], 0  # a tokenizer without offsets gets each part by itself
    for start, end in [*spans, (len(text), len(text))]:
        for piece, counted in ((text[done:start], False), (text[start:end], True)):
            tokens = tokenizer(piece, **options)["input_ids"] if piece else []
            ids += tokens
            counts += [counted] * len(tokens)
        done = end
    return ids, counts
