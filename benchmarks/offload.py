"""Generation with offloaded experts: bytes moved, speed, and the link speed up to which compression pays.

    python benchmarks/offload.py --json offload.json
    python benchmarks/offload.py --storage plain sz3:mean:0.3 --caches 0.25 --links 0.5 2

The bundled model (bfloat16) continues --prompts held-out texts by --new greedy tokens, one text at a time. Its experts
are stored in host memory: `plain` unchanged; `lossless`, `sz3:...` and others compressed by that codec; `packed:3:128`
and `packed-zstd:3:128` as the codes of a model that was rounded to 3 bits and runs on them. For each storage, all cache
sizes take turns with the same model without offloading, one text each, for --rounds rounds; a row has medians.

Rows: storage, cache (as a share of the experts' bytes in their cached form), pesf (alpha, in prefill and decode; null:
off), eviction, tokens_per_s, slowdown (relative to no offloading), bytes_per_token, hit_rate, stall and decode (seconds
per token), cache_bytes, store_bytes, resident_bytes (their sum, the memory of the experts), unoffloaded_bytes (the
experts' memory without offloading), rss_bytes (of the process, with all models of this row's group), same_tokens (the
share of tokens that equal those of the model without offloading).

Links: without an accelerator, a link is simulated. A fetch waits for as long as its bytes take over a link of that many
GB/s, one fetch after another. A row per link has tokens_per_s. `break_even_GB_s` is the link speed at which moving and
decoding compressed bytes takes as long as moving plain ones, computed from measured bytes and decoding seconds
(`serial`: moving and decoding do not overlap; `overlapped`: only the slower of the two counts). Below that speed
compression pays.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import tempfile
import threading
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from kept_rows import write_rows
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel

from eacmoe_lightning import load, pesf
from eacmoe_lightning.compressed.directory import save_compressed
from eacmoe_lightning.models.moe import MoEModel
from eacmoe_lightning.models.originals import BUNDLED, load_original
from eacmoe_lightning.offload import Offload, offload_experts
from eacmoe_lightning.quantization.grid import Grid, round_to_nearest
from eacmoe_lightning.text.documents import read_documents
from eacmoe_lightning.text.sources import heldout_names

STORAGE = ["plain", "lossless", "sz3:mean:0.1", "sz3:mean:0.3", "packed:3:128", "packed-zstd:3:128"]


def rounded(directory: Path, bits: int, group_size: int) -> Path:
    """The bundled model as a compressed directory, rounded to nearest."""
    moe = MoEModel(load_original("bundled"))
    blocks = []
    for block in moe.blocks:
        grids = {
            name: Grid(4 if part == "attention" else bits, group_size) for name, (part, _) in block.weights().items()
        }
        quantized = {name: round_to_nearest(w, grids[name]) for name, (_, w) in block.weights().items()}
        moe.put({name: block.as_parameter(name, q.dequantize(moe.model.dtype)) for name, q in quantized.items()})
        blocks.append(quantized)
    save_compressed(directory, moe, "bundled", blocks, {"method": "round to nearest"})
    return directory


class Case:
    """One storage and one cache size (None: not offloaded), with or without PESF."""

    def __init__(self, storage: str, cache: float | None, alpha: float | None, packed: Path, args: Any) -> None:
        self.storage, self.cache, self.alpha = storage, cache, alpha
        self.is_packed = storage.startswith("packed")
        self.model: PreTrainedModel = load(packed, dtype="bfloat16") if self.is_packed else load_original("bundled")
        self.handle: Offload | None = None
        if cache is not None:
            self.handle = offload_experts(
                self.model, cache, storage, eviction=args.eviction, num_workers=args.workers, lookahead=args.lookahead
            )
            for worker in getattr(self.handle.fetcher, "workers", []):
                while not worker.is_ready(120):
                    time.sleep(0.05)
        self.seconds: list[float] = []
        self.tokens: dict[int, Tensor] = {}

    def run(self, index: int, prompt: Tensor, new: int) -> None:
        skipping = pesf(self.model, self.alpha, decode=True) if self.alpha else nullcontext()
        with skipping:
            start = time.perf_counter()
            out = self.model.generate(prompt, max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0)
            self.seconds.append(time.perf_counter() - start)
        self.tokens[index] = out[0, prompt.shape[1] :]

    def close(self) -> None:
        if self.handle is not None:
            self.handle.close()


def slow_link(handle: Offload, gb_per_s: float) -> None:
    """Makes every fetch wait for a simulated link, which carries one fetch at a time."""
    decode, link = handle.fetcher.decode, threading.Lock()

    def decode_over_link(job: Any) -> float:
        with link:
            time.sleep(sum(length for _, length, _ in job.records) / (gb_per_s * 1e9))
        return decode(job)

    handle.fetcher.decode = decode_over_link


def expert_bytes(model: PreTrainedModel) -> int:
    experts = [block.experts.module for block in MoEModel(model).moe_blocks]
    return sum(t.nbytes for e in experts for t in (*e.parameters(), *e.buffers()))


def row_of(case: Case, base: Case, prompts: list[Tensor], args: Any) -> dict[str, Any]:
    counters, produced = case.handle.counters, len(case.seconds) * args.new
    same = [(case.tokens[i] == base.tokens[i]).double().mean().item() for i in range(len(prompts))]
    seconds, without = statistics.median(case.seconds), statistics.median(base.seconds)
    return {
        "storage": case.storage,
        "cache": case.cache,
        "pesf": case.alpha,
        "eviction": args.eviction,
        "tokens_per_s": args.new / seconds,
        "slowdown": seconds / without,
        "bytes_per_token": counters.bytes_moved / produced,
        "hit_rate": counters.hit_rate,
        "stall": counters.stall_seconds / produced,
        "decode": counters.decode_seconds / produced,
        "cache_bytes": case.handle.cache_bytes,
        "store_bytes": case.handle.store.nbytes,
        "resident_bytes": case.handle.cache_bytes + case.handle.store.nbytes,
        "unoffloaded_bytes": expert_bytes(base.model),
        "rss_bytes": int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"),
        "same_tokens": statistics.mean(same),
    }


def compare(cases: list[Case], prompts: list[Tensor], args: Any) -> None:
    """Runs all cases in turn; the first round is a warm-up."""
    for turn in range(args.rounds + 1):
        for (index, prompt), case in itertools.product(enumerate(prompts), cases):
            case.run(index, prompt, args.new)
        if not turn:
            for case in cases:
                case.seconds.clear()
                if case.handle is not None:
                    case.handle.counters.reset()


def break_even(row: dict[str, Any], plain: dict[str, Any]) -> dict[str, float]:
    """GB/s at which compressed and plain experts take equally long; inf if the compressed ones are always faster."""
    slower, saved = row["decode"] - plain["decode"], plain["bytes_per_token"] - row["bytes_per_token"]
    return {
        "serial": saved / slower / 1e9 if slower > 0 else float("inf"),
        "overlapped": plain["bytes_per_token"] / row["decode"] / 1e9 if row["decode"] > 0 else float("inf"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--storage", nargs="+", default=STORAGE)
    parser.add_argument("--caches", nargs="+", type=float, default=[0.25, 0.5, 1.0])
    parser.add_argument("--pesf", type=float, default=0.3, help="alpha; 0: only rows without PESF")
    parser.add_argument(
        "--links", nargs="*", type=float, default=[0.05, 0.2, 1.0, 4.0], help="GB/s, at the first cache size"
    )
    parser.add_argument("--eviction", choices=["frequency", "lru"], default="frequency")
    parser.add_argument("--lookahead", type=float, default=1.0)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--prompts", type=int, default=3)
    parser.add_argument("--length", type=int, default=64, help="tokens per prompt")
    parser.add_argument("--new", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="file for the rows")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    tokenizer = AutoTokenizer.from_pretrained(BUNDLED)
    texts = [read_documents(f"bundled:{name}")[0] for name in heldout_names()[: args.prompts]]
    prompts = [tokenizer(text[:8192], return_tensors="pt").input_ids[:, : args.length] for text in texts]
    rows: list[dict[str, Any]] = []

    def keep(row: dict[str, Any]) -> None:
        rows.append(row)
        print(" ".join(f"{name}={f'{v:.4g}' if isinstance(v, float) else v}" for name, v in row.items()), flush=True)
        write_rows(args.json, rows)

    with tempfile.TemporaryDirectory() as folder:
        packed = rounded(Path(folder) / "packed", 3, 128) if any("packed" in s for s in args.storage) else Path()
        plain: dict[tuple[float, float | None], dict[str, Any]] = {}
        for alpha in [None, args.pesf] if args.pesf else [None]:
            for storage in args.storage:
                cases = [Case(storage, cache, alpha, packed, args) for cache in (None, *args.caches)]
                compare(cases, prompts, args)
                for case in cases[1:]:
                    row = row_of(case, cases[0], prompts, args)
                    if storage == "plain":
                        plain[case.cache, alpha] = row
                    elif (case.cache, alpha) in plain and row["bytes_per_token"]:
                        row["break_even_GB_s"] = break_even(row, plain[case.cache, alpha])
                    keep(row)
                    case.close()
        for link in args.links:
            cases = [Case(storage, args.caches[0], None, packed, args) for storage in args.storage]
            for case in cases:
                slow_link(case.handle, link)
            compare(cases, prompts, args)
            for case in cases:
                seconds = statistics.median(case.seconds)
                where = {"storage": case.storage, "cache": case.cache, "link_GB_s": link}
                keep(where | {"tokens_per_s": args.new / seconds, "hit_rate": case.handle.counters.hit_rate})
                case.close()


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
