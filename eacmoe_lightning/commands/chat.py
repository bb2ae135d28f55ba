"""`eacmoe chat MODEL`: a chat in the terminal, the one of transformers, with a model or with a server."""

from __future__ import annotations

import argparse
import inspect
import sys
import urllib.parse
from collections.abc import Sequence
from pathlib import Path

from eacmoe_lightning.commands.serve import add_model, check_loads, choose_engine, open_served, template_of
from eacmoe_lightning.serving import transformers_server
from eacmoe_lightning.serving.transformers_server import CONTINUE, Served
from eacmoe_lightning.text.server import Server, ServerError


def chat(words: Sequence[str]) -> None:
    """Talks with a model in the terminal, through the chat of transformers.

    It loads the model, or with --url asks a server with OpenAI's interface, such as `eacmoe serve`. A model without a
    chat template continues every text by itself. Words such as `max_new_tokens=60` or `do_sample=False` set how it
    generates; further options are those of `transformers chat`.

    Args:
        words: the command's words.

    Raises:
        FileNotFoundError: there is no such model, or the run is not finished.
        ValueError: an option is wrong, a package is missing, or no server answers.
    """
    given, words = options().parse_known_args(words)
    if given.model is not None and "=" in given.model:  # a setting: MODEL was left out
        given.model, words = None, [given.model, *words]
    choose_engine("transformers")
    transformers_server.check_settings(words)
    if given.url is not None:
        if given.chat_template is not None:
            raise ValueError("--chat_template: the server of --url renders conversations, so pass it to `eacmoe serve`")
        server = Server(given.url)
        try:
            name = server.model
        except ServerError as error:
            raise ValueError(f"--url {given.url}: {error}; `eacmoe serve MODEL` is one") from error
        transformers_server.chat(given.model or name, urllib.parse.urljoin(server.url, ".").rstrip("/"), words)
        return
    if given.model is None:
        raise ValueError("pass a MODEL to load, or --url with the address of a server")
    template = template_of(given.chat_template)
    opened = open_served(given.model)
    check_loads(opened)
    served = Served(given.model, opened, template)
    if template is None and served.tokenizer().chat_template is None:
        served = Served(served.name, opened, CONTINUE)
    with transformers_server.serving(served) as url:
        transformers_server.chat(served.name, url, words)


def options() -> argparse.ArgumentParser:
    """The command's options."""
    parser = argparse.ArgumentParser(
        f"{Path(sys.argv[0]).name} chat", description=inspect.getdoc(chat).split("\n\nArgs")[0], allow_abbrev=False
    )
    add_model(parser, nargs="?")
    parser.add_argument("--url", help="address of a server; MODEL is then its name for the model (default: its first)")
    return parser
