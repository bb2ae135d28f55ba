"""A server with OpenAI's completions interface (vLLM, SGLang, llama.cpp and others) as the writer of sampled text."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import dataclass
from functools import cached_property
from typing import Any

RETRIES = 4  # after a first try, if the server does not answer or is overloaded
TIMEOUT = 600.0  # seconds for one answer


@dataclass(frozen=True)
class Completion:
    """What a server wrote.

    Attributes:
        text: without the prompt.
        token_ids: of the text, from servers that return them (vLLM with `return_token_ids`).
        is_whole: whether the model ended the text itself.
    """

    text: str
    token_ids: list[int] | None
    is_whole: bool


class ServerError(ValueError):
    """The server refuses, does not answer, or answers something else than a completion."""


class Server:
    """Asks a server for completions.

    Args:
        url: its address, such as `http://127.0.0.1:8000/v1`; without a path, `/v1` is added.
    """

    def __init__(self, url: str) -> None:
        parts = urllib.parse.urlsplit(url)
        path = parts.path.rstrip("/").removesuffix("/completions") or "/v1"
        self.url = urllib.parse.urlunsplit((parts.scheme, parts.netloc, path, "", ""))
        self._takes_ids = True  # prompts as token ids, and token ids back

    @cached_property
    def model(self) -> str:
        """The name of the model that it serves; of several, the first.

        Raises:
            ServerError: it does not answer, or serves none.
        """
        answer = self._ask("models", None, retries=0)
        try:
            return answer["data"][0]["id"]
        except (KeyError, IndexError, TypeError) as error:
            raise ServerError(f"{self.url}/models names no model: start the server with the original") from error

    def complete(self, prompt: list[int], text: str, max_tokens: int, temperature: float, seed: int) -> Completion:
        """Lets the model continue a prompt.

        Args:
            prompt: token ids.
            text: the same as text, for servers that take no ids.
            max_tokens: of the continuation.
            temperature, seed: of the draw.

        Raises:
            ServerError: see the class.
        """
        request = {"model": self.model, "max_tokens": max_tokens, "temperature": temperature, "seed": seed}
        if self._takes_ids:
            try:
                return _completion(self._ask("completions", request | {"prompt": prompt, "return_token_ids": True}))
            except _Refused:
                self._takes_ids = False  # for good
        return _completion(self._ask("completions", request | {"prompt": text}))

    def _ask(self, path: str, request: dict[str, Any] | None, retries: int = RETRIES) -> Any:
        body = None if request is None else json.dumps(request).encode()
        asked = urllib.request.Request(f"{self.url}/{path}", body, {"Content-Type": "application/json"})
        for number in range(retries + 1):
            try:
                with urllib.request.urlopen(asked, timeout=TIMEOUT if body else 10) as answer:
                    return json.loads(answer.read())
            except urllib.error.HTTPError as error:
                reason = f"{error.code} {error.reason}: {error.read(500).decode(errors='replace')}"
                if error.code in (400, 404, 405, 422):
                    raise _Refused(f"{self.url}/{path} answers {reason}") from error
            except (OSError, ValueError) as error:
                reason = str(error)
            if number < retries:
                time.sleep(2**number)
        raise ServerError(
            f"{self.url}/{path} does not answer ({reason}): start a server with OpenAI's completions interface there"
        )


class _Refused(ServerError):
    """The server does not take a request of this kind."""


def _completion(answer: Any) -> Completion:
    try:
        choice = answer["choices"][0]
        ids = choice.get("token_ids")
        return Completion(choice["text"], None if ids is None else list(ids), choice.get("finish_reason") == "stop")
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise ServerError(f"the server's answer is no completion: {str(answer)[:200]}") from error
