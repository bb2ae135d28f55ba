"""`eacmoe serve MODEL`: an endpoint with OpenAI's interface, run by vLLM's server or that of transformers."""

from __future__ import annotations

import argparse
import inspect
import os
import socket
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from jinja2 import TemplateError

from eacmoe_lightning.compressed.format import read_config
from eacmoe_lightning.compressed.opening import OpenedModel, open_model
from eacmoe_lightning.models.originals import read_config as read_original_config
from eacmoe_lightning.models.originals import resolve_model
from eacmoe_lightning.models.transformers_loader import check_template
from eacmoe_lightning.serving import transformers_server
from eacmoe_lightning.serving.packed_model import check_servable
from eacmoe_lightning.serving.transformers_server import CONTINUE, Served
from eacmoe_lightning.text.chat import read_template

ENGINES = ("vllm", "transformers")  # the first that is installed is the default
VLLM_SERVER = "vllm.entrypoints.openai.api_server"
TRUST = "--trust-remote-code"  # of both servers
LOADS = (None, "compressed-tensors")  # quantization methods of exports that transformers loads


def serve(words: Sequence[str]) -> None:
    """Serves a model to clients of OpenAI's interface, through vLLM or transformers.

    Options that are not of this command go to the server: those of `vllm serve` or of `transformers serve`.

    Args:
        words: the command's words.

    Raises:
        FileNotFoundError: there is no such model, or the run is not finished.
        ValueError: an option is wrong, the engine is not installed or does not load the model, or the port is taken.
    """
    given, words = options().parse_known_args(words)
    engine = choose_engine(given.engine)
    template = template_of(given.chat_template)
    opened = open_served(given.model, TRUST in words)
    check_port(given.host, given.port)
    name, place = given.name or given.model, ["--host", given.host, "--port", str(given.port)]
    if engine == "transformers":
        check_loads(opened)
        transformers_server.serve(Served(name, opened, template), [*place, *words])
        return
    if opened.is_compressed:
        try:
            check_servable(read_config(opened.directory))
        except ValueError as error:
            raise ValueError(f"{error}; or serve it with --engine transformers") from error
    path = str(opened.directory) if opened.is_compressed else resolve_model(given.model)
    command = [sys.executable, "-m", VLLM_SERVER, "--model", path, "--served-model-name", name, *place]
    if template is not None:
        command += ["--chat-template", "{{ messages[-1]['content'] }}" if template == CONTINUE else template]
    sys.stdout.flush()
    os.execv(sys.executable, [*command, *words])


def options() -> argparse.ArgumentParser:
    """The command's options."""
    parser = argparse.ArgumentParser(
        f"{Path(sys.argv[0]).name} serve", description=inspect.getdoc(serve).split("\n\nArgs")[0], allow_abbrev=False
    )
    add_model(parser)
    parser.add_argument("--engine", choices=ENGINES, help="the server (default: vllm where it is installed)")
    parser.add_argument("--host", default="localhost", help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=int, default=8000, help="port to listen on (default: %(default)s)")
    parser.add_argument("--name", help="by which clients ask for the model (default: MODEL as it is written)")
    return parser


def add_model(parser: argparse.ArgumentParser, **options: object) -> None:
    """The options that `serve` and `chat` share."""
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="a run directory, a compressed directory, an export that transformers or vLLM loads, or an original",
        **options,
    )
    parser.add_argument(
        "--chat_template",
        metavar="FILE",
        help="a Jinja file in place of the tokenizer's chat template; `continue`: the model continues the last message "
        "of a conversation as plain text",
    )


def choose_engine(engine: str | None) -> str:
    """The engine to serve with.

    Args:
        engine: the user's choice; None: vLLM if it is installed, else transformers.

    Raises:
        ValueError: it is not installed.
    """
    has_vllm, missing = find_spec("vllm") is not None, transformers_server.missing_packages()
    engine = engine or ("vllm" if has_vllm else "transformers")
    if engine == "vllm" and not has_vllm:
        raise ValueError(
            "--engine vllm: vLLM is not installed (`pip install 'eacmoe-lightning[vllm]'`; without a GPU see "
            "docs/serving.md)"
        )
    if engine == "transformers" and missing:
        raise ValueError(
            f"--engine transformers: its server needs {', '.join(missing)}, which "
            f"{'is' if len(missing) == 1 else 'are'} not installed: `pip install 'eacmoe-lightning[serve]'`"
        )
    return engine


def template_of(chat_template: str | None) -> str | None:
    """The template in a file; `continue` and None unchanged.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no template.
    """
    if chat_template in (None, CONTINUE):
        return chat_template
    template = read_template(Path(chat_template).expanduser(), "--chat_template")
    try:
        check_template(template)
    except TemplateError as error:
        raise ValueError(f"--chat_template: {chat_template} is no template ({error})") from error
    return template


def open_served(model: str, trust_remote_code: bool = False) -> OpenedModel:
    """Opens a model that is to be served.

    Raises:
        FileNotFoundError: there is no such model, or the run is not finished.
        ValueError: it is a GGUF file.
    """
    path = Path(model)
    files = [path] if path.suffix == ".gguf" else sorted(path.glob("*.gguf"))
    if files and not (path / "config.json").exists():
        raise ValueError(f"{model} (MODEL) is for llama.cpp: `llama-server -m {files[0]}` serves it")
    return open_model(model, option="MODEL", trust_remote_code=trust_remote_code)


def check_loads(opened: OpenedModel) -> None:
    """Raises ValueError for a model that transformers loads wrongly or not at all."""
    if opened.is_compressed:
        return
    method = (read_original_config(resolve_model(opened.name), opened.trust_remote_code)[1] or {}).get("quant_method")
    if method not in LOADS:
        raise ValueError(
            f"{opened.name} (MODEL) is quantized by {method!r}, and transformers would leave its experts without "
            "weights: serve the run or the compressed directory that it was exported from, or pass --engine vllm"
        )


def check_port(host: str, port: int) -> None:
    """Raises ValueError if nothing can listen there."""
    try:
        with socket.create_server((host, port)):
            pass
    except (OSError, OverflowError) as error:
        raise ValueError(f"--port {port} on {host} (--host) cannot be used: {error}") from error
