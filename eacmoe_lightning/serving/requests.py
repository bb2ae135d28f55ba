"""Requests to transformers' server: refused before anything runs if it could not answer them, ended if nobody waits.

The server reads a request with few checks of its own, and computes an answer to its end, whoever has left.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from contextlib import suppress
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, StoppingCriteria, StoppingCriteriaList

LENGTHS = ("max_tokens", "max_completion_tokens", "max_output_tokens")
NUMBERS = {"temperature": (0, 2), "top_p": (0, 1), "frequency_penalty": (-2, 2)}  # with what OpenAI's interface allows
ONLY = {"n": 1, "best_of": 1}  # options that the server accepts and does not follow: the values that change nothing
UNUSED = ("logprobs", "top_logprobs", "echo", "presence_penalty", "logit_bias")
GONE = "_gone"  # name in a generation config of the event that the client has left

Handle = Callable[[dict[str, Any], str], Awaitable[Any]]
_gone: ContextVar[threading.Event | None] = ContextVar("gone", default=None)


class GivenUp(Exception):
    """An answer that is not computed to its end: the client has left, or the server is being stopped."""


def problem_of(body: dict[str, Any], positions: int | None) -> str | None:
    """What the server cannot read in a request, or would not follow; None: nothing.

    Args:
        body: of a request to /v1/completions, /v1/chat/completions or /v1/responses.
        positions: of the model; None: it has no limit.
    """
    for name in LENGTHS:
        length = body.get(name)
        if length is not None and (not _is_whole(length) or length < 1):
            return f"{name} is not a positive number of tokens: {length!r}"
        if length is not None and positions and length > positions:
            return f"{name} is {length}, and the model has {positions} positions"
    for name, (least, most) in NUMBERS.items():
        number = body.get(name)
        if number is not None and (not _is_number(number) or not least <= number <= most):
            return f"{name} is not a number from {least} to {most}: {number!r}"
    if body.get("seed") is not None and not _is_whole(body["seed"]):
        return f"seed is not a whole number: {body['seed']!r}"
    stop = body.get("stop")
    if stop is not None and not isinstance(stop, str) and not _is_list_of(str, stop):
        return f"stop is neither a text nor a list of texts: {stop!r}"
    for name in (*ONLY, *UNUSED):
        if body.get(name) and body[name] != ONLY.get(name):
            return f"{name} is not supported by transformers' server: leave it out, or serve the model with vLLM"
    if (body.get("response_format") or {"type": "text"}) != {"type": "text"}:
        return "response_format is not supported by transformers' server: leave it out, or serve the model with vLLM"
    return None


def problem_of_prompt(body: dict[str, Any]) -> str | None:
    """The same for the prompt of a completion."""
    prompt = body.get("prompt")
    if isinstance(prompt, str):
        return None if prompt else "prompt is empty"
    return "prompt is missing" if prompt is None else f"prompt must be a string, and not a {type(prompt).__name__}"


def problem_of_messages(body: dict[str, Any]) -> str | None:
    """The same for the messages of a conversation."""
    messages = body.get("messages")
    if not _is_list_of(dict, messages) or not messages:
        return "messages is not a list of messages with a role and a content each"
    for number, message in enumerate(messages):
        content = message.get("content")
        if not isinstance(message.get("role"), str):
            return f"messages[{number}] has no role"
        if not isinstance(content, str | list) and not message.get("tool_calls"):
            return f"messages[{number}] has no content"
    return None


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_list_of(kind: type, value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, kind) for item in value)


# --- answers that nobody waits for ----------------------------------------------------------------------------------


class Watched:
    """ASGI middleware: notes for the request that it handles when its client leaves."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: dict, receive: Callable, send: Callable) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        gone, messages = threading.Event(), asyncio.Queue()
        token = _gone.set(gone)

        async def watch() -> None:
            while True:
                message = await receive()
                messages.put_nowait(message)
                if message["type"] == "http.disconnect":
                    gone.set()
                    return

        watching = asyncio.create_task(watch())
        try:
            await self.app(scope, messages.get, send)
        finally:
            watching.cancel()
            with suppress(asyncio.CancelledError):
                await watching
            _gone.reset(token)


def mark(config: GenerationConfig) -> GenerationConfig:
    """Notes in a request's generation config the event that its client leaves."""
    setattr(config, GONE, _gone.get())
    return config


def interruptible(model: PreTrainedModel, stopping: threading.Event) -> PreTrainedModel:
    """The model, whose `generate` ends with GivenUp when nobody waits for the answer.

    Args:
        model: generates with a config from `mark`.
        stopping: set when the server is being stopped.
    """
    theirs = model.generate

    def generate(*args: Any, generation_config: GenerationConfig, **kwargs: Any) -> Any:
        gone = vars(generation_config).pop(GONE, None) or threading.Event()
        if not kwargs["input_ids"].shape[-1]:
            raise ValueError("the request renders to a prompt without any token")
        criteria = StoppingCriteriaList([_Waited(gone, stopping)])
        return theirs(*args, generation_config=generation_config, stopping_criteria=criteria, **kwargs)

    model.generate = generate
    return model


class _Waited(StoppingCriteria):
    def __init__(self, gone: threading.Event, stopping: threading.Event) -> None:
        self.gone, self.stopping = gone, stopping

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        if self.stopping.is_set():
            raise GivenUp("the server is being stopped")
        if self.gone.is_set():
            raise GivenUp("the client has left")
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
