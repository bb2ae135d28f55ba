"""`eacmoe serve` and `eacmoe chat`: OpenAI's client against transformers' server, and what both commands refuse.

Tests that run the server are skipped where its packages are not installed (`pip install -e ".[test,serve]"`).
"""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import jobs
import pytest
import tiny_models
import torch
from transformers import AutoTokenizer

import eacmoe_lightning
from eacmoe_lightning import load
from eacmoe_lightning.cli import main
from eacmoe_lightning.commands.serve import check_loads, check_port, open_served, template_of
from eacmoe_lightning.exports.export import export
from eacmoe_lightning.serving import requests
from eacmoe_lightning.serving.transformers_server import (
    BATCHES,
    CONTINUE,
    Served,
    missing_packages,
    refuse_mixed,
    serve,
)
from eacmoe_lightning.skipping.stored import KEY as SKIPPING

sys.path.append(str(jobs.ROOT / "benchmarks"))
import serve_check

MISSING = missing_packages()
needs_server = pytest.mark.skipif(bool(MISSING), reason=f"not installed (extra: serve): {', '.join(MISSING)}")
RUN = "import sys; sys.argv[0] = 'eacmoe'; from eacmoe_lightning.cli import main; main()"


@pytest.fixture(scope="session")
def directory(once, tokenizer):
    """A tiny compressed model, whose tokenizer has no chat template."""

    def make(folder):
        folder.mkdir()
        tiny_models.save("qwen3_moe", folder / "original", tokenizer)
        serve_check.round_model(folder / "compressed", str(folder / "original"), 32, "3")

    return once("served", make) / "compressed"


# --- what is refused before anything is loaded


@pytest.mark.skipif(not MISSING, reason="the server's packages are installed")
@pytest.mark.parametrize("command", ["serve", "chat"])
def test_without_the_packages_one_error_names_the_extra(command, directory, capsys):
    with pytest.raises(SystemExit) as end:
        main([command, str(directory), *(["--engine", "transformers"] if command == "serve" else [])])
    said = capsys.readouterr().err
    assert end.value.code == 1 and said.count("error: ") == 1
    assert f"needs {', '.join(MISSING)}, which" in said and "pip install 'eacmoe-lightning[serve]'" in said


def test_models_that_cannot_be_served(tmp_path, directory):
    with pytest.raises(FileNotFoundError, match=r"\(MODEL\).*no such directory"):
        open_served(str(tmp_path / "none"))
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"\(MODEL\) has no compressed model yet"):
        open_served(str(tmp_path))
    (tmp_path / "model.gguf").touch()
    for given in (tmp_path, tmp_path / "model.gguf"):
        with pytest.raises(ValueError, match=f"`llama-server -m {tmp_path / 'model.gguf'}`"):
            open_served(str(given))
    export(str(directory), str(tmp_path / "gptq"), "gptq_v2")
    with pytest.raises(ValueError, match=r"\(MODEL\) is quantized by 'gptq'.*--engine vllm"):
        check_loads(open_served(str(tmp_path / "gptq")))
    for loads in (directory, directory.parent / "original"):
        check_loads(open_served(str(loads)))
    load(directory).save_pretrained(tmp_path / "alone")
    with pytest.raises(FileNotFoundError, match=r"alone' \(MODEL\) has no tokenizer"):
        Served("alone", open_served(str(tmp_path / "alone")), None).tokenizer()


def test_options_that_cannot_be_met(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"--chat_template: .*none\.jinja does not exist"):
        template_of(str(tmp_path / "none.jinja"))
    (tmp_path / "bad.jinja").write_text("{{ bad")
    with pytest.raises(ValueError, match=r"--chat_template: .*bad\.jinja is no template \(.*end of template"):
        template_of(str(tmp_path / "bad.jinja"))
    (tmp_path / "named.json").write_text('{"chat_template": "{{ good }}"}')
    assert template_of(str(tmp_path / "named.json")) == "{{ good }}"
    with socket.create_server(("localhost", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=rf"--port {port} on localhost \(--host\).*in use"):
            check_port("localhost", port)
    check_port("localhost", port)
    with pytest.raises(ValueError, match="--port 70000"):
        check_port("localhost", 70000)


@needs_server
def test_words_of_a_chat_that_are_no_settings(directory, capsys):
    for word, message in (("max_new_tokens=abc", "no such value"), ("tokens=3", "no such setting")):
        with pytest.raises(SystemExit):
            main(["chat", str(directory), word])
        assert f"error: {word}: " in (said := capsys.readouterr().err) and message in said


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"max_tokens": 5000}, "max_tokens is 5000, and the model has 4096 positions"),
        ({"max_completion_tokens": 0}, "max_completion_tokens is not a positive number of tokens: 0"),
        ({"max_tokens": 2.5}, "max_tokens is not a positive number of tokens: 2.5"),
        ({"top_p": 7}, "top_p is not a number from 0 to 1: 7"),
        ({"temperature": True}, "temperature is not a number from 0 to 2: True"),
        ({"seed": "x"}, "seed is not a whole number: 'x'"),
        ({"stop": 5}, "stop is neither a text nor a list of texts: 5"),
        ({"logprobs": 1}, "logprobs is not supported"),
        ({"response_format": {"type": "json_object"}}, "response_format is not supported"),
        ({"n": 1, "logprobs": None, "echo": False, "response_format": {"type": "text"}, "stop": ["a"]}, None),
        ({"max_tokens": 4096, "temperature": 0, "top_p": 1.0, "seed": 3, "stop": "a"}, None),
    ],
)
def test_what_a_request_may_hold(body, message):
    problem = requests.problem_of(body, 4096)
    assert problem is None if message is None else message in problem


def test_models_that_skip_experts_by_the_sequence_take_no_batches(tmp_path, directory):
    for file in directory.iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "config.json").unlink()

    def skipping_by(**rule) -> Served:
        config = json.loads((directory / "config.json").read_text()) | {SKIPPING: rule}
        (tmp_path / "config.json").write_text(json.dumps(config))
        return Served("it", open_served(str(tmp_path)))

    with pytest.raises(ValueError, match=f"{BATCHES}: this model skips experts"):
        serve(skipping_by(rule="pesf", alpha=0.3), [BATCHES])
    refuse_mixed(skipping_by(rule="truncation", top_k=1).opened, [BATCHES])


# --- conversations


def test_without_a_chat_template_conversations_are_refused_or_continued(directory):
    messages = [{"role": "user", "content": "I begin."}, {"role": "user", "content": "The whale"}]
    refusing = Served("it", open_served(str(directory))).tokenizer()
    with pytest.raises(ValueError, match="/v1/completions.*--chat_template FILE.*--chat_template continue"):
        refusing.apply_chat_template(messages)
    opened = open_served(str(directory))
    continuing = Served("it", opened, CONTINUE).tokenizer()
    expected = AutoTokenizer.from_pretrained(directory)("The whale")["input_ids"]
    assert continuing.apply_chat_template(messages)["input_ids"] == expected
    continuing = Served("it", opened, "{% for m in messages %}<{{ m.content }}>{% endfor %}").tokenizer()
    assert continuing.apply_chat_template(messages, tokenize=False) == "<I begin.><The whale>"


# --- the server


def start(*words: str, **options) -> subprocess.Popen:
    environment = os.environ | {"PYTHONPATH": str(jobs.ROOT)}
    return subprocess.Popen([sys.executable, "-P", "-c", RUN, *words], env=environment, text=True, **options)


@pytest.mark.slow
@needs_server
def test_a_client_of_openai(directory, tmp_path):
    import openai

    with socket.create_server(("localhost", 0)) as free:
        port = str(free.getsockname()[1])
    with open(tmp_path / "log", "w") as log:
        server = start("serve", str(directory), "--engine", "transformers", "--port", port, "--name", "it", stderr=log)
        try:
            answers = _ask(openai, f"http://localhost:{port}", server)
        finally:
            server.terminate()
            code = server.wait(60)
    assert code == 143 and "stopped by SIGTERM" in (tmp_path / "log").read_text()  # as schedulers expect
    tokenizer, model = AutoTokenizer.from_pretrained(directory), eacmoe_lightning.load(directory)
    for prompt, answer in answers.items():
        inputs = tokenizer(prompt, return_tensors="pt")
        with torch.no_grad():
            output = model.generate(**inputs, max_new_tokens=12, do_sample=False)
        assert answer == tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def _ask(openai, url: str, server: subprocess.Popen) -> dict[str, str]:
    """Completions of the server by prompt, after all else was asked of it."""
    for _ in range(600):
        try:
            urllib.request.urlopen(f"{url}/health").close()
            break
        except OSError:
            assert server.poll() is None, "the server has ended"
            time.sleep(0.2)
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    assert [model.id for model in client.models.list()] == ["it"]
    options = {"model": "it", "max_tokens": 12, "temperature": 0}
    complete = client.completions.create
    answers = {prompt: complete(prompt=prompt, **options) for prompt in ("The whale", "def f(", "Il est", "x = 2")}
    assert all(answer.model == "it" and answer.usage.completion_tokens <= 12 for answer in answers.values())
    texts = {prompt: answer.choices[0].text for prompt, answer in answers.items()}
    stream = complete(prompt="The whale", stream=True, **options)
    assert "".join(part.choices[0].text for part in stream) == texts["The whale"]
    with ThreadPoolExecutor(4) as pool:
        together = pool.map(lambda prompt: complete(prompt=prompt, **options).choices[0].text, texts)
        assert [*together] == [*texts.values()]
    chat = client.chat.completions.create
    for ask, status, message in (
        (lambda: complete(**options | {"model": "other"}, prompt="x"), 400, "requested 'other'"),
        (lambda: complete(**options | {"max_tokens": "many"}, prompt="x"), 400, "max_tokens is not a positive number"),
        (lambda: complete(**options, prompt=""), 400, "prompt is empty"),
        (lambda: complete(**options, prompt=["a", "b"]), 400, "prompt must be a string"),
        (lambda: complete(**options, prompt="x", n=2), 400, "n is not supported"),
        (lambda: chat(**options, messages="hi"), 400, "messages is not a list"),
        (lambda: chat(**options, messages=[{"role": "user"}]), 400, r"messages\[0\] has no content"),
        (lambda: complete(**options, prompt="x", extra_body={"nonsense": 1}), 422, "nonsense"),
        (lambda: chat(**options, messages=[{"role": "user", "content": "x"}]), 400, "has no chat template"),
    ):
        with pytest.raises(openai.APIStatusError, match=message) as refused:
            ask()
        assert refused.value.status_code == status
    bad = urllib.request.Request(f"{url}/v1/completions", b"[1", {"Content-Type": "application/json"})
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(bad)
    assert refused.value.code == 400 and "the body: JSON" in json.loads(refused.value.read())["error"]["message"]
    long = options | {"max_tokens": 4000, "prompt": "The whale"}
    with pytest.raises(openai.APITimeoutError):
        complete(**long, timeout=2)
    started = time.monotonic()  # it is not computed to its end for a client that has left
    assert complete(prompt="The whale", **options).choices[0].text == texts["The whale"]
    assert time.monotonic() - started < 20
    with pytest.raises(openai.APIStatusError, match="the server is being stopped"), ThreadPoolExecutor(1) as pool:
        answer = pool.submit(lambda: complete(**long))
        time.sleep(2)
        server.terminate()
        answer.result()
    return texts


@pytest.mark.slow
@needs_server
def test_a_chat_in_the_terminal(directory):
    words = ("chat", str(directory), "max_new_tokens=8", "do_sample=False")
    done = start(*words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    said, errors = done.communicate("The whale\nn\n!exit\n", timeout=300)
    assert done.returncode == 0, errors
    model, tokenizer = eacmoe_lightning.load(directory), AutoTokenizer.from_pretrained(directory)
    inputs = tokenizer("The whale", return_tensors="pt")
    with torch.no_grad():
        output = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    first = tokenizer.decode(output, skip_special_tokens=True).split()[0]
    assert first in said and "8 tokens in" in said and "The whale" not in said  # the prompt is not repeated
