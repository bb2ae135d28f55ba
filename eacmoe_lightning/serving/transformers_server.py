"""transformers' own server and terminal chat (`transformers serve`, `transformers chat`) with models of this package.

Both load a model by a class that its config.json names, which a compressed directory has not. So the server gets a
manager that loads the one model in our way, and every request is for that model. All names from inside
`transformers.cli` are used in this file; transformers 5.10 to 5.24 have them.
"""

from __future__ import annotations

import inspect
import json
import logging
import socket
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from eacmoe_lightning.compressed.format import read_config as read_directory
from eacmoe_lightning.compressed.loading import load
from eacmoe_lightning.compressed.opening import OpenedModel
from eacmoe_lightning.models.originals import read_config, resolve_model
from eacmoe_lightning.models.tokenizer import tokenizer_of
from eacmoe_lightning.models.transformers_loader import auto_class
from eacmoe_lightning.serving import requests
from eacmoe_lightning.skipping.stored import KEY as SKIPPING
from eacmoe_lightning.skipping.stored import read_rule
from eacmoe_lightning.text.windows import read_sizes

log = logging.getLogger(__name__)

NEEDS = ("fastapi", "uvicorn", "openai", "pydantic", "rich", "accelerate")  # of transformers' extra `serving`
CONTINUE = "continue"  # instead of a file with a chat template: the last message is continued as plain text
BATCHES = "--continuous-batching"  # of `transformers serve`
CHATML = "<|im_start|>"  # in the chat templates of most families
START_SECONDS = 60  # until the server answers, once the model is loaded
NO_TEMPLATE = (
    "this model has no chat template: ask for /v1/completions, which continues a text, or start the server with "
    "--chat_template FILE (the chat_template.jinja of a chat model of this family) or --chat_template continue"
)


def missing_packages() -> list[str]:
    """The packages that transformers' server and chat need and this environment lacks."""
    return [name for name in NEEDS if find_spec(name) is None]


@dataclass(frozen=True)
class Served:
    """What a server serves.

    Attributes:
        name: by which clients ask for the model.
        opened: the model.
        template: a chat template in place of the tokenizer's, or `CONTINUE`; None: the tokenizer's, if it has one.
    """

    name: str
    opened: OpenedModel
    template: str | None = None

    @property
    def positions(self) -> int | None:
        """The number of the model's positions, if it has one."""
        return read_sizes(self.opened.directory)[1]

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer; without a chat template, one that refuses conversations with status 400."""
        opened = self.opened
        tokenizer = tokenizer_of(str(opened.directory), "MODEL", opened.trust_remote_code)
        if self.template is not None:
            tokenizer.chat_template = continuing(tokenizer) if self.template == CONTINUE else self.template
            if CHATML not in tokenizer.chat_template:
                tokenizer.response_template = _plain_answers(tokenizer)
        if tokenizer.chat_template is None:
            tokenizer.apply_chat_template = _refuse_conversations
        return tokenizer

    def model(self, dtype: torch.dtype | str | None, device: str | int) -> PreTrainedModel:
        """The model in eval mode: packed, if it is a compressed one."""
        if self.opened.is_compressed:
            model = load(self.opened.directory, _dtype_name(dtype))
            return model.to(_single_device(device)).eval()
        source = resolve_model(self.opened.name)
        config, _ = read_config(source, self.opened.trust_remote_code)
        return auto_class(config).from_pretrained(source, dtype=dtype, device_map=device).eval()


def continuing(tokenizer: PreTrainedTokenizerBase) -> str:
    """A chat template with which the model continues the last message as plain text."""
    begins = tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]  # what the tokenizer does to plain text
    return ("{{ bos_token }}" if begins else "") + "{{ messages[-1]['content'] }}"


def _plain_answers(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Reads an answer as it is: by a model's type alone transformers looks for ChatML, and repeats the prompt."""
    content = {"content": "text"} | ({"close": tokenizer.eos_token} if tokenizer.eos_token else {})
    return {"start_anchor_pattern": r"\Z", "fields": {"content": content}}


def serve(served: Served, words: Sequence[str]) -> None:
    """Runs `transformers serve` until a signal ends it.

    Args:
        served: the model.
        words: further options of `transformers serve`, such as `--port 8001`.

    Raises:
        ValueError: an option does not suit the model.
    """
    import typer
    from transformers.cli.serve import Serve

    refuse_mixed(served.opened, words)
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(Serve)
    with _our_parts(served):
        app([served.name, *words], prog_name="transformers serve")


def refuse_mixed(opened: OpenedModel, words: Sequence[str]) -> None:
    """Raises ValueError if requests would share a batch though the model skips experts by those of each sequence."""
    stored = read_directory(opened.directory).get(SKIPPING) if opened.is_compressed else None
    if BATCHES in words and stored and read_rule(stored).needs_sequences:
        raise ValueError(
            f"{BATCHES}: this model skips experts by the tokens of each sequence, and a batch would mix those of "
            "several requests: leave the option out"
        )


@contextmanager
def serving(served: Served) -> Iterator[str]:
    """`transformers serve` in a thread of this process, on a port that is free.

    Yields:
        Its address.

    Raises:
        RuntimeError: it does not answer.
    """
    from transformers.cli.serve import Serve

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with _our_parts(served):
        server = Serve(served.name, host="127.0.0.1", port=port, log_level="error", non_blocking=True)
    for name in ("uvicorn.error", "uvicorn.access"):
        logging.getLogger(name).setLevel(logging.WARNING)
    url = f"http://127.0.0.1:{port}"
    try:
        _wait_for(f"{url}/health")
        yield url
    finally:
        server.kill_server()


def chat(name: str, url: str, words: Sequence[str]) -> None:
    """Runs `transformers chat` with a server that has OpenAI's interface until the user leaves.

    Args:
        name: of the model, as the server calls it.
        url: of the server, without `/v1`.
        words: settings of `generate` such as `max_new_tokens=60`, and options of `transformers chat`.
    """
    import typer
    from huggingface_hub import get_async_session, set_async_client_factory
    from transformers.cli import chat as module

    client = type(get_async_session())
    set_async_client_factory(lambda: client(follow_redirects=True, timeout=None))  # HF_HUB_OFFLINE does not stop it

    class Interface(module.RichInterface):
        """Asks the server to load the model only if it can: servers other than transformers' have loaded it."""

        def print_model_load(self, model: str) -> None:
            if _can_load(url):
                super().print_model_load(model)

    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(module.Chat)
    theirs, module.RichInterface = module.RichInterface, Interface
    try:
        app([name, url, *words], prog_name="transformers chat")
    except EOFError:
        print()
    finally:
        module.RichInterface = theirs


def check_settings(words: Sequence[str]) -> None:
    """Raises ValueError for a word such as `max_new_tokens=abc`, which is no setting of `generate`."""
    from transformers.cli.chat import parse_generate_flags

    for before, word in zip(["", *words], words, strict=False):
        if before.startswith("-") or word.startswith("-") or "=" not in word:
            continue  # an option or its value
        try:
            unknown = GenerationConfig().update(**parse_generate_flags([word]))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{word}: no such value of a setting of `generate` ({error})") from error
        if unknown:
            raise ValueError(f"{word}: `generate` has no such setting (`max_new_tokens=60 do_sample=False` are two)")


@contextmanager
def _our_parts(served: Served) -> Iterator[None]:
    """Lets `Serve` be made with our manager, our answer to requests that it cannot read, and an end of others."""
    import uvicorn
    from transformers.cli.serving import model_manager, server

    theirs = model_manager.ModelManager, server.build_server, uvicorn.Server
    stopping = threading.Event()

    class Server(theirs[2]):
        def handle_exit(self, *args: Any) -> None:
            stopping.set()
            super().handle_exit(*args)

    model_manager.ModelManager = _manager_of(served, theirs[0], stopping)
    server.build_server, uvicorn.Server = partial(_build_server, theirs[1], served), Server
    try:
        yield
    finally:
        model_manager.ModelManager, server.build_server, uvicorn.Server = theirs


def _build_server(theirs: Callable[..., Any], served: Served, *args: Any, **kwargs: Any) -> Any:
    """transformers' app, which refuses with a reason what it cannot answer, and notes who leaves."""
    from fastapi import HTTPException
    from fastapi.exceptions import RequestValidationError
    from jinja2 import TemplateError

    given = inspect.signature(theirs).bind(*args, **kwargs).arguments
    checks = {"chat_handler": requests.problem_of_messages, "completion_handler": requests.problem_of_prompt}
    for name in (*checks, "response_handler"):
        _check_first(given[name], checks.get(name), served.positions)
    app = theirs(*args, **kwargs)
    for error in (HTTPException, RequestValidationError, TemplateError, ValueError, KeyError, TypeError):
        app.add_exception_handler(error, _bad_request)
    app.add_exception_handler(requests.GivenUp, _given_up)
    app.add_middleware(requests.Watched)
    return app


def _check_first(handler: Any, problem_of_text: Callable[[dict], str | None] | None, positions: int | None) -> None:
    """Has a handler refuse what `requests` finds, and mark its generation configs."""
    from fastapi import HTTPException

    handle, build = handler.handle_request, handler._build_generation_config

    async def checked(body: dict[str, Any], request_id: str) -> Any:
        problem = requests.problem_of(body, positions) or (problem_of_text and problem_of_text(body))
        if problem:
            raise HTTPException(400, problem)
        return await handle(body, request_id)

    def marked(*args: Any, use_cb: bool = False, **kwargs: Any) -> Any:
        config = build(*args, use_cb=use_cb, **kwargs)
        return config if use_cb else requests.mark(config)

    handler.handle_request, handler._build_generation_config = checked, marked


def _manager_of(served: Served, manager: type, stopping: threading.Event) -> type:
    """transformers' manager of models, with one model, which stops generating when `stopping` is set."""

    class Manager(manager):
        @staticmethod
        def process_model_name(model_id: str) -> str:
            return model_id  # no revision

        def _load_processor(self, *_: Any, **__: Any) -> PreTrainedTokenizerBase:
            return served.tokenizer()

        def _load_model(self, *_: Any, **__: Any) -> PreTrainedModel:
            if self.quantization is not None:
                raise ValueError(f"--quantization {self.quantization}: the model is served as it is stored")
            model = served.model(self.dtype, self.device)
            if self.attn_implementation is not None:
                model.set_attn_implementation(self.attn_implementation)
            return requests.interruptible(model, stopping)

        def list_models(self, *_: Any) -> list[dict[str, Any]]:
            created = int((served.opened.directory / "config.json").stat().st_mtime)
            return [{"id": served.name, "object": "model", "owned_by": "eacmoe-lightning", "created": created}]

        get_gen_models = list_models  # its name until 5.23

    return Manager


async def _bad_request(request: Any, error: Exception) -> Any:
    """An error as OpenAI's clients read it; with status 400 what would be 500 in transformers' server."""
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import JSONResponse

    if isinstance(error, RequestValidationError):
        message = "; ".join(f"the body: {one['msg']}" for one in error.errors())
    else:
        message = f"{error} is missing" if isinstance(error, KeyError) else str(getattr(error, "detail", error))
    log.warning("%s refused: %s", request.url.path, message)
    status = getattr(error, "status_code", 400)
    return JSONResponse({"error": {"message": message, "type": "invalid_request_error"}}, status_code=status)


async def _given_up(request: Any, error: Exception) -> Any:
    """The answer to a request whose client has left, or which the end of the server has cut off."""
    from fastapi.responses import JSONResponse

    log.warning("%s given up: %s", request.url.path, error)
    return JSONResponse({"error": {"message": str(error), "type": "server_error"}}, status_code=503)


def _refuse_conversations(*_: Any, **__: Any) -> Any:
    raise ValueError(NO_TEMPLATE)


def _wait_for(url: str) -> None:
    until = time.monotonic() + START_SECONDS
    while True:
        try:
            urllib.request.urlopen(url, timeout=10).close()
            return
        except OSError as error:
            if time.monotonic() > until:
                raise RuntimeError(f"{url} does not answer ({error})") from error
            time.sleep(0.1)


def _can_load(url: str) -> bool:
    """Whether a server has transformers' own request to load a model."""
    try:
        with urllib.request.urlopen(f"{url}/openapi.json", timeout=10) as answer:
            return "/load_model" in json.loads(answer.read())["paths"]
    except (OSError, ValueError, KeyError):
        return False


def _dtype_name(dtype: torch.dtype | str | None) -> str:
    return "auto" if dtype in (None, "auto") else str(dtype).rpartition(".")[2]


def _single_device(device: str | int) -> torch.device:
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(device)
