"""Speed of packed models on CPU at real shapes, compared with transformers in bf16, llama.cpp and ONNX Runtime.

    python benchmarks/inference.py --json inference.json
    python benchmarks/inference.py --shapes qwen1.5-moe --bits 3 --work decode --llama-cpp runs/llama.cpp

The model has one layer, random weights and a small vocabulary. Parts: `moe` is its MoE block (router, routed and shared
experts) on hidden states; `layer` is the whole model (attention, MoE block, a small head) on tokens, without a cache.
Work: `decode` is 1x1, `prefill` 1x512, `batch` 4x512 (batch x tokens). In every round, all backends of all bit widths
take turns, one call each; a row has the median over the rounds. `generate` is a model of --layers layers (part `model`)
that continues prompts of --prompts tokens by 32 others, greedily, with a cache; its rows are seconds a token after the
prompt, packed, in llama.cpp, and with --dense of as many layers in bf16, if the memory holds them too. Its output head
has --vocabulary rows, in bf16 or packed (--head-bits; several widths take turns, and each has a llama.cpp of its own in
memory, with its closest format):

    python benchmarks/inference.py --work generate --shapes qwen1.5-moe --bits 3 --layers 8 --vocabulary 32000 \
        --head-bits 16 8 6 --llama-cpp runs/llama.cpp

The backends are:

    transformers   `eager` and `grouped_mm` (only `eager` if a call takes long) in bf16, with --float32 also in float32,
                   which is faster on CPUs without bf16 instructions
    this package   with bf16 and with `int8` activations
    llama.cpp      with --llama-cpp DIR, for `layer` only, in its closest format
    ONNX Runtime   with --onnxruntime DIR, for `moe` only, at 4 bit, with and without rounded activations

The last two run in separate environments, which are created under DIR (llama.cpp is compiled for some minutes). `load`
opens the layer's directory, compressed or bf16, in fresh processes (Linux).

Rows: part, work, shape, bits, backend, threads, median_s, ratio_to_bf16 (to the faster bf16 backend at the same work),
limit (`bandwidth` or `arithmetic`, whichever takes longer at this machine's rates, which are measured in the same run;
arithmetic at the better of bf16 and float32), limit_share (the share of that limit that was reached; it can exceed 1
because integers can be multiplied faster), weight_bytes (of the part, in memory; of a model that generates, of its
layers and its head). Rows of `generate` also have layers, vocabulary, head_bits and prompt. Rows of `load` also have
resident_bytes and peak_bytes, beyond those of the process before, and file_bytes.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from environments import python_of
from inference_models import (
    SHAPES,
    VOCABULARY,
    bf16_model,
    bytes_of,
    deep_config,
    deep_model,
    dense_in_float32,
    flops,
    heads_of,
    packed_model,
    save_compressed,
    used_bytes,
    weights_of,
)
from kept_rows import write_rows
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel

from eacmoe_lightning.calibration.recipe import HEAD_BITS
from eacmoe_lightning.compressed.format import size_of
from eacmoe_lightning.runtime.packed_modules import set_activations

HERE = Path(__file__).resolve().parent
WORK = {"decode": (1, 1), "prefill": (1, 512), "batch": (4, 512)}
PARTS = {"decode": ("moe", "layer"), "prefill": ("moe", "layer"), "batch": ("layer",)}  # measured by default
LOAD, LOADS = "load", 1  # fresh processes for each `load` row
GENERATE, GENERATED = "generate", 32
MOST_TOKENS = 2048  # of a sequence in llama.cpp, if no prompt is longer
LONG = 30  # expected seconds of a bf16 call above which `grouped_mm` is left out
LLAMA_FORMATS = {2: "Q2_K", 3: "Q3_K", 4: "Q4_0"}  # llama.cpp's closest formats: 2.6, 3.4 and 4.5 bits a weight
LLAMA_HEADS = {4: "Q4_0", 5: "Q5_0", 6: "Q6_K", 8: "Q8_0", 16: "F16"}  # of its output head, by bits
LLAMA_PACKAGES = ["llama-cpp-python==0.3.36", "gguf>=0.18", "numpy"]
ONNX_BITS = 4  # the smallest width of its CPU kernel for experts (QMoE)
ONNX_PACKAGES = ["onnxruntime==1.32.*", "onnx", "numpy"]


def best_of(action: Callable[[], object], rounds: int = 5) -> float:
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        action()
        times.append(time.perf_counter() - start)
    return min(times)


def machine_limits() -> tuple[float, float, float]:
    """Bytes per second of reading 512 MB, and flop per second of a 1024^3 product in bf16 and in float32."""
    block = torch.ones(2**28, dtype=torch.bfloat16).view(torch.int64)
    squares = [torch.ones(1024, 1024, dtype=dtype) for dtype in (torch.bfloat16, torch.float32)]
    rates = (2 * 1024**3 / best_of(lambda square=square: square @ square) for square in squares)
    return block.nbytes / best_of(block.sum), *rates


class Other:
    """Another engine in a separate process and environment, which times itself on request.

    Args:
        directory: directory for its model and its environment, which is created if it is missing.
        packages: arguments of pip for the environment.
        script: the script to run, next to this one.
        job: the script's argument, as JSON.
    """

    def __init__(self, directory: Path, packages: list[str], script: str, job: dict[str, Any]) -> None:
        directory = directory.resolve()
        python = python_of(directory / "environment", [packages])
        job = job | {"directory": str(directory)}
        self.process = subprocess.Popen(
            [python, HERE / script, json.dumps(job)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=open(directory / "log.txt", "a"),  # noqa: SIM115
            text=True,
        )
        ready = self.process.stdout.readline()
        if not ready:
            raise RuntimeError(f"{script} did not start: see {directory / 'log.txt'}")
        self.weight_bytes, *others = map(int, ready.split())  # of the part
        self.head_bytes = sum(others)

    def seconds(self, batch: int, tokens: int, threads: int) -> float:
        return self._ask("pass", batch, tokens, threads)

    def seconds_a_token(self, prompt: int, tokens: int, threads: int) -> float:
        return self._ask("generate", prompt, tokens, threads)

    def _ask(self, *words: object) -> float:
        self.process.stdin.write(" ".join(map(str, words)) + "\n")
        self.process.stdin.flush()
        return float(self.process.stdout.readline())

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def llama_cpp(directory: Path, config: Any, bits: int, head_bits: int = 16, most_tokens: int = MOST_TOKENS) -> Other:
    job = {"config": config.to_dict(), "format": LLAMA_FORMATS[bits], "head": LLAMA_HEADS[head_bits]}
    job["most_tokens"] = most_tokens
    return Other(directory, LLAMA_PACKAGES, "inference_llama.py", job)


def others(shape: str, args: argparse.Namespace) -> dict[str, tuple[str, int, Other]]:
    """The other engines by name: the part that an engine computes, its bits, and the engine."""
    config, engines = SHAPES[shape].to_dict(), {}
    if args.llama_cpp and (not args.parts or "layer" in args.parts):
        for bits in sorted(LLAMA_FORMATS.keys() & set(args.bits)):
            engines[f"llama.cpp {LLAMA_FORMATS[bits]}"] = "layer", bits, llama_cpp(args.llama_cpp, SHAPES[shape], bits)
    if args.onnxruntime and (not args.parts or "moe" in args.parts):
        for level, activations in ((0, ""), (4, " int8")):
            job = {"config": config, "bits": ONNX_BITS, "level": level}
            engine = Other(args.onnxruntime, ONNX_PACKAGES, "inference_onnx.py", job)
            engines[f"onnxruntime {ONNX_BITS} bit{activations}"] = "moe", ONNX_BITS, engine
    return engines


def load_rows(shape: str, dense: PreTrainedModel, packed: dict[int, PreTrainedModel]) -> list[dict[str, Any]]:
    """The cost of opening the layer in bf16 and compressed, measured in turns."""
    models, names = {16: dense, **packed}, {16: "bf16"} | dict.fromkeys(packed, "packed")
    runs: dict[int, list[dict[str, float]]] = {bits: [] for bits in models}
    with tempfile.TemporaryDirectory() as folder:
        directories = {bits: Path(folder) / str(bits) for bits in models}
        dense.save_pretrained(directories[16])
        for bits, model in packed.items():
            save_compressed(directories[bits], model)
        sizes = {bits: size_of(directory) for bits, directory in directories.items()}
        for _, bits in itertools.product(range(LOADS), models):
            command = [sys.executable, HERE / "inference_load.py", directories[bits], names[bits]]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            runs[bits].append(json.loads(done.stdout))
    rows = []
    for bits, runs_of_bits in runs.items():
        medians = {key: statistics.median(run[key] for run in runs_of_bits) for key in runs_of_bits[0]}
        seconds = medians.pop("seconds")
        row = {"part": "layer", "work": LOAD, "shape": shape, "bits": bits, "backend": names[bits], "threads": 1}
        row |= {"median_s": seconds, "ratio_to_bf16": (rows[0]["median_s"] if rows else seconds) / seconds}
        rows.append(row | medians | {"file_bytes": sizes[bits], "weight_bytes": bytes_of(models[bits])})
    return rows


def timed(model: PreTrainedModel, part: str, ids: Tensor, experts: str = "eager", activations: str = "exact") -> float:
    model.config._experts_implementation = experts
    set_activations(model, activations)
    if part == "layer":
        start = time.perf_counter()
        model(ids, use_cache=False, logits_to_keep=1)
    else:
        hidden, block = model.get_input_embeddings()(ids), model.model.layers[0].mlp
        start = time.perf_counter()
        block(hidden)
    return time.perf_counter() - start


def seconds_a_token(
    model: PreTrainedModel,
    head: torch.nn.Module,
    prompt: Tensor,
    threads: int,
    activations: str = "exact",
    experts: str = "eager",
) -> float:
    """Of greedy generation with this output head, without the prompt's share."""
    model.lm_head = head
    torch.set_num_threads(threads)
    model.config._experts_implementation = experts
    set_activations(model, activations)
    clock, tokens = Clock(), 1 + GENERATED
    options = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, "pad_token_id": 0}
    model.generate(prompt, **options, logits_processor=LogitsProcessorList([clock]))
    return (clock.times[-1] - clock.times[0]) / GENERATED


class Clock(LogitsProcessor):
    """Notes when the logits of each token were there."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.times.append(time.perf_counter())
        return scores


def compare_generation(shape: str, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Rows of whole models, one width after the other, because each may fill the memory."""
    ids = torch.randint(0, VOCABULARY, (1, max(args.prompts)), generator=torch.Generator().manual_seed(0))
    most_tokens = max(MOST_TOKENS, max(args.prompts) + GENERATED)
    dense = bf16_model(deep_config(shape, args.layers, args.vocabulary)) if args.dense else None
    for bits in args.bits:
        model = deep_model(shape, bits, args.layers, args.vocabulary)
        heads, engines = heads_of(model, args.head_bits), {}
        if args.llama_cpp and bits in LLAMA_FORMATS:
            engines = {
                h: llama_cpp(args.llama_cpp, model.config, bits, h, most_tokens) for h in heads if h in LLAMA_HEADS
            }
        for threads, prompt in itertools.product(args.threads, args.prompts):
            backends: dict[tuple[str, int], Callable[[], float]] = {
                (name, head_bits): functools.partial(
                    seconds_a_token, model, head, ids[:, :prompt], threads, activations
                )
                for head_bits, head in heads.items()
                for name, activations in (("packed", "exact"), ("packed int8", "int8"))
            }
            for head_bits, engine in engines.items():
                name = f"llama.cpp {LLAMA_FORMATS[bits]}"
                backends[name, head_bits] = functools.partial(engine.seconds_a_token, prompt, GENERATED, threads)
            for experts in () if dense is None else ("eager", "grouped_mm"):
                backends[f"bf16 {experts}", 16] = functools.partial(
                    seconds_a_token, dense, dense.lm_head, ids[:, :prompt], threads, experts=experts
                )
            medians = interleaved(backends, args.rounds, 10 * args.seconds)
            bf16 = min((seconds for (name, _), seconds in medians.items() if name.startswith("bf16")), default=None)
            for (name, head_bits), seconds in medians.items():
                size = bytes_of(model.model.layers) + bytes_of(heads[head_bits])
                if name.startswith("bf16"):
                    size = bytes_of(dense.model.layers) + bytes_of(dense.lm_head)
                elif name.startswith("llama"):
                    size = engines[head_bits].weight_bytes + engines[head_bits].head_bytes
                row = {"part": "model", "work": GENERATE, "shape": shape, "bits": bits, "backend": name}
                row |= {"threads": threads, "layers": args.layers, "vocabulary": args.vocabulary, "prompt": prompt}
                row |= {"head_bits": head_bits, "median_s": seconds, "weight_bytes": size}
                yield row | ({"ratio_to_bf16": bf16 / seconds} if bf16 else {})
        for engine in engines.values():
            engine.close()


def compare(shape: str, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """All rows of one shape, each as soon as it is measured."""
    if GENERATE in args.work:
        yield from compare_generation(shape, args)
    if not set(args.work) - {GENERATE}:
        return
    dense = bf16_model(SHAPES[shape])
    packed = {bits: packed_model(dense, bits) for bits in args.bits}
    wide = dense_in_float32(dense) if args.float32 else None
    engines = others(shape, args)
    for threads in args.threads:
        torch.set_num_threads(threads)
        bandwidth, bf16_rate, float_rate = machine_limits()
        cells = [(part, work) for work in args.work if work in WORK for part in args.parts or PARTS[work]]
        for part, work in cells:
            batch, tokens = WORK[work]
            operations = flops(dense.config, part, batch * tokens)
            long = operations / bf16_rate > LONG
            ids = torch.randint(0, VOCABULARY, (batch, tokens), generator=torch.Generator().manual_seed(0))
            backends: dict[tuple[str, int], Callable[[], float]] = {}  # by name, bits
            for name, bits, model in (("bf16", 16, dense), ("fp32", 32, wide)):
                for experts in () if model is None else ("eager",) if long else ("eager", "grouped_mm"):
                    run = functools.partial(timed, model, part, ids, experts=experts)
                    backends[f"{name} {experts}", bits] = run
            for bits, model in packed.items():
                for name, activations in (("packed", "exact"), ("packed int8", "int8")):
                    backends[name, bits] = functools.partial(timed, model, part, ids, activations=activations)
            for name, (engine_part, bits, engine) in engines.items():
                if engine_part == part:
                    backends[name, bits] = functools.partial(engine.seconds, batch, tokens, threads)
            medians = interleaved(backends, args.rounds * (8 if work == "decode" else 1), args.seconds)
            bf16 = min(seconds for (_, bits), seconds in medians.items() if bits == 16)
            for (name, bits), seconds in medians.items():
                row = {"part": part, "work": work, "shape": shape, "bits": bits, "backend": name, "threads": threads}
                row |= {"median_s": seconds, "ratio_to_bf16": bf16 / seconds}
                if name in engines:
                    row["weight_bytes"] = engines[name][2].weight_bytes
                else:
                    model = {16: dense, 32: wide}.get(bits) or packed[bits]
                    row["weight_bytes"] = bytes_of(weights_of(model, part))
                    reading = used_bytes(model, part, batch * tokens) / bandwidth
                    arithmetic = operations / max(bf16_rate, float_rate)
                    row["limit"] = "bandwidth" if reading > arithmetic else "arithmetic"
                    row["limit_share"] = max(reading, arithmetic) / seconds
                yield row
    for _, _, engine in engines.values():
        engine.close()
    if LOAD in args.work:
        yield from load_rows(shape, dense, packed)


def interleaved(backends: dict[Any, Callable[[], float]], rounds: int, seconds: float) -> dict[Any, float]:
    """Medians of the backends, which take turns with one call each. The first call warms up and counts only if alone.

    Args:
        backends: functions that return seconds, by name.
        rounds: number of rounds after the first.
        seconds: total seconds after which a backend takes no further turn.
    """
    times: dict[Any, list[float]] = {name: [] for name in backends}
    for _ in range(rounds + 1):
        for name, run in backends.items():
            if sum(times[name]) < seconds:
                times[name].append(run())
    return {name: statistics.median(values[1:] or values) for name, values in times.items()}


def show(row: dict[str, Any]) -> None:
    limit = f"{row['limit_share']:5.0%} of {row['limit']}" if "limit" in row else ""
    if row["work"] == LOAD:
        limit = f"{row['resident_bytes'] / 1e6:.0f} MB, peak {row['peak_bytes'] / 1e6:.0f}"
    ratio = f"{row['ratio_to_bf16']:6.2f} x bf16" if "ratio_to_bf16" in row else ""
    head = f", head {row['head_bits']}, after {row['prompt']}" if "head_bits" in row else ""
    print(
        f"{row['shape']:12s} {row['part']:6s} {row['work']:8s} {row['bits']} bit {row['threads']} threads "
        f"{row['backend'] + head:22s}"
        f"{1e3 * row['median_s']:9.2f} ms {ratio} {limit:22s}"
        f"{row['weight_bytes'] / 1e6:8.0f} MB",
        flush=True,
    )


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--bits", nargs="+", type=int, default=[3, 4])
    parser.add_argument("--parts", nargs="+", choices=["moe", "layer"], help="default: moe not at `batch`")
    parser.add_argument("--work", nargs="+", choices=[*WORK, LOAD, GENERATE], default=[*WORK, LOAD])
    parser.add_argument("--layers", type=int, default=24, help="of the model that generates")
    parser.add_argument("--prompts", nargs="+", type=int, default=[32], help="tokens before those it generates")
    parser.add_argument("--vocabulary", type=int, default=VOCABULARY, help="of the model that generates")
    parser.add_argument(
        "--head-bits", nargs="+", type=int, choices=[16, *HEAD_BITS], default=[16],
        help="of the output head of the model that generates; 16: bf16",
    )  # fmt: skip
    parser.add_argument("--dense", action="store_true", help="measure the model that generates in bf16, too")
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--rounds", type=int, default=3, help="rounds of calls (decode: 8 times as many)")
    parser.add_argument("--seconds", type=float, default=5, help="total after which a backend takes no further turn")
    parser.add_argument("--float32", action="store_true", help="measure transformers in float32, too")
    parser.add_argument("--llama-cpp", type=Path, help="directory for llama.cpp's environment and models")
    parser.add_argument("--onnxruntime", type=Path, help="directory for ONNX Runtime's environment and model")
    parser.add_argument("--json", type=Path, help="file for the rows")
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for shape in args.shapes:
        for row in compare(shape, args):
            rows.append(row)
            show(row)
            write_rows(args.json, rows)


if __name__ == "__main__":
    main()
