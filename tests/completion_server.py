"""A small server that runs a model and speaks OpenAI's completions format, for the tests of `self:URL`."""

import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


class Completions(BaseHTTPRequestHandler):
    """`/v1/models` and `/v1/completions`. The server object holds model, tokenizer and what it takes."""

    def do_GET(self) -> None:
        self.answer(200, {"data": [{"id": "tiny"}]} if self.path == "/v1/models" else {})

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        prompt = request["prompt"]
        with self.server.lock:
            self.server.requests.append(request)
            if len(self.server.requests) in self.server.fails:
                return self.answer(503, {"error": "overloaded"})
            if isinstance(prompt, list) and not self.server.takes_ids:
                return self.answer(422, {"error": "prompt must be text"})
            assert self.path == "/v1/completions" and request["model"] == "tiny"
            ids, stopped = self.write(request)
        choice = {"text": self.server.tokenizer.decode(ids), "finish_reason": "stop" if stopped else "length"}
        if self.server.takes_ids and request.get("return_token_ids"):
            choice["token_ids"] = ids
        self.answer(200, {"choices": [choice]})

    def write(self, request: dict) -> tuple[list[int], bool]:
        prompt = request["prompt"]
        if isinstance(prompt, str):
            prompt = self.server.tokenizer(prompt)["input_ids"]
        ids, written = torch.tensor([prompt]), []
        generator = torch.Generator().manual_seed(request["seed"])
        for _ in range(request["max_tokens"]):
            with torch.no_grad():
                logits = self.server.model(ids).logits[0, -1].double() / request["temperature"]
            token = torch.multinomial(logits.softmax(-1), 1, generator=generator)
            if len(written) == self.server.stops_after:
                return written, True
            written.append(token.item())
            ids = torch.cat([ids, token[None]], dim=1)
        return written, False

    def answer(self, status: int, content: dict) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_) -> None: ...


@contextmanager
def serving(folder: Path, takes_ids: bool = True, stops_after: int | None = None, fails: tuple[int, ...] = ()):
    """The server at work; `url` is its address and `requests` what it was asked.

    Args:
        folder: of the model and its tokenizer.
        takes_ids: whether it takes prompts as token ids and returns ids.
        stops_after: tokens after which it ends a text, as if the model had.
        fails: numbers of requests, from 1, that it answers with 503.
    """
    server = ThreadingHTTPServer(("127.0.0.1", 0), Completions)
    server.model, server.tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    server.takes_ids, server.stops_after, server.fails = takes_ids, stops_after, fails
    server.requests, server.lock, server.url = [], threading.Lock(), f"http://127.0.0.1:{server.server_port}/v1"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
