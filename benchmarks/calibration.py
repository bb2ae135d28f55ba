"""Cost of calibration: seconds and memory of this package and its peers, and how our cost scales.

Every tool quantizes the same model on the same windows to the same bits and group size. Each runs in a separate process
and environment (gptq_quality.py builds them). The tools take turns for --rounds rounds, and medians are printed. Rows
of --json:

    tool         ours (routers in closed form), the same with the paper's GPTQ (no activation order, scale search or
                 refinement), ours with the block stage, the joint stage or both, gptqmodel, llm-compressor, AutoRound
                 with its defaults and with its extension for low bits
    model        bundled, or `blocks`: random weights in the block shapes of Qwen1.5-MoE-A2.7B (hidden 2048, experts of
                 1408 top-4, a shared one of 5632), with --blocks blocks of --experts experts
    seconds      of quantizing, with router calibration, without loading and writing
    wall_seconds, processor_seconds   of the whole process; processor seconds are meaningful on a shared machine, too
    peak_bytes   highest total memory of the process and all its descendants
    perplexity   of the bundled model, geometric mean over the held-out texts; null for random weights

    python benchmarks/calibration.py --json calibration.json
    python benchmarks/calibration.py --growth --json growth.json

--growth runs only ours, on random models. It doubles one size at a time, twice: tokens, experts, width of an expert,
blocks. It prints the seconds with a fitted exponent, and the rate of GPTQ's column loop as a share of this machine's
rate of matrix products. The requirements are those of gptq_quality.py.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import shutil
import statistics
import subprocess
import time
from pathlib import Path

import torch
from gptq_quality import WINDOW_LENGTH, draw_windows, quantize
from kept_rows import write_rows
from transformers import AutoTokenizer, Qwen2MoeConfig, Qwen2MoeForCausalLM

from eacmoe_lightning.evaluation.evaluate import evaluate
from eacmoe_lightning.models.moe import MoEModel
from eacmoe_lightning.models.originals import BUNDLED, load_original
from eacmoe_lightning.quantization.column_loop import column_loop
from eacmoe_lightning.quantization.grid import Grid

TOOLS = {  # row's tool -> tool and setting of gptq_quality.py
    "ours": ("ours", "routers"),
    "ours, the paper's GPTQ": ("ours", "paper"),
    "ours, block stage": ("ours", "block"),
    "ours, joint stage": ("ours", "joint"),
    "ours, both stages": ("ours", "both"),
    "gptqmodel": ("gptqmodel", "best"),
    "llm-compressor": ("llm-compressor", "best, routed tokens"),
    "autoround": ("autoround", "default"),
    "autoround, extension": ("autoround", "extension"),
}
QWEN = {"hidden_size": 2048, "moe_intermediate_size": 1408, "shared_expert_intermediate_size": 5632}
SMALL = {"hidden_size": 512, "moe_intermediate_size": 256, "shared_expert_intermediate_size": 512}
GROWTH = {"tokens": (8192, 16384, 32768), "experts": (8, 16, 32), "width": (256, 512, 1024), "blocks": (1, 2, 4)}


def random_model(path: Path, blocks: int, experts: int, shape: dict[str, int]) -> Path:
    """A saved Qwen2-MoE with random weights, the bundled tokenizer and a tied embedding."""
    if not (path / "config.json").exists():
        tokenizer = AutoTokenizer.from_pretrained(BUNDLED)
        config = Qwen2MoeConfig(
            vocab_size=len(tokenizer),
            num_hidden_layers=blocks,
            num_experts=experts,
            num_experts_per_tok=min(4, experts),
            num_attention_heads=shape["hidden_size"] // 128,
            num_key_value_heads=shape["hidden_size"] // 128,
            intermediate_size=shape["shared_expert_intermediate_size"],
            tie_word_embeddings=True,
            **shape,
        )
        with torch.random.fork_rng():
            torch.manual_seed(0)
            Qwen2MoeForCausalLM(config).save_pretrained(path)
        tokenizer.save_pretrained(path)
    return path


def measure(tool: str, bits: int, model: Path, number: int, work_dir: Path, threads: int) -> tuple[dict, Path]:
    """One row of one tool on `number` windows, and the directory of its dense weights."""
    result, weights = quantize(*TOOLS[tool], bits, 0, number, model, work_dir, threads)
    keys = ("seconds", "wall_seconds", "processor_seconds", "version")
    return {key: result[key] for key in keys} | {"peak_bytes": result["tree_peak_bytes"]}, weights


def compare(args: argparse.Namespace) -> list[dict]:
    models = {"bundled": BUNDLED}
    if "blocks" in args.models:
        path = args.work / f"qwen-{args.blocks}x{args.experts}"
        models["blocks"] = random_model(path, args.blocks, args.experts, QWEN)
    rows: dict[tuple[str, str], dict] = {}
    for name in args.models:
        work_dir = args.work / name
        data = draw_windows(models[name], 0, args.windows, work_dir)
        (work_dir / "environments").exists() or (work_dir / "environments").symlink_to(args.work / "environments")
        for round_, tool in itertools.product(range(args.rounds), args.tools):
            about = {"tool": tool, "model": name, "bits": args.bits, "tokens": args.windows * WINDOW_LENGTH}
            row = rows.setdefault((name, tool), about | {"perplexity": None, "runs": []})
            if "error" in row:
                continue
            try:
                run, weights = measure(tool, args.bits, models[name], args.windows, work_dir, args.threads)
            except (RuntimeError, subprocess.CalledProcessError) as error:
                rows[name, tool] = about | {"error": str(error)}
                continue
            row["runs"].append(run)
            for key in ("seconds", "wall_seconds", "processor_seconds", "peak_bytes"):
                row[key] = statistics.median(one[key] for one in row["runs"])
            if name == "bundled" and round_ == 0:
                moe = MoEModel(load_original(str(weights), "float32"))
                texts = evaluate(None, moe, data.heldout_windows, data.heldout_batch_size)["perplexity"]
                logs = [math.log(streams["original"]) for streams in texts.values()]
                row["perplexity"] = math.exp(sum(logs) / len(logs))
            shutil.rmtree(weights, ignore_errors=True)
            print(f"{name} round {round_} {tool}: {run['seconds']:.0f} s", flush=True)
            write_rows(args.json, list(rows.values()))
    for row in rows.values():
        print(json.dumps({key: value for key, value in row.items() if key != "runs"}), flush=True)
    return list(rows.values())


def grow(args: argparse.Namespace) -> list[dict]:
    base = {"tokens": 8192, "experts": 8, "width": 256, "blocks": 1}
    rows = []
    for size_name, sizes in GROWTH.items():
        seconds = []
        for size in sizes:
            sizes_of_run = base | {size_name: size}
            shape = SMALL | {"moe_intermediate_size": sizes_of_run["width"]}
            name = "-".join(f"{key}{value}" for key, value in sizes_of_run.items())
            model = random_model(args.work / name / "model", sizes_of_run["blocks"], sizes_of_run["experts"], shape)
            number = sizes_of_run["tokens"] // WINDOW_LENGTH
            draw_windows(model, 0, number, args.work / name)
            row, _ = measure("ours", args.bits, model, number, args.work / name, args.threads)
            seconds.append(row["seconds"])
            rows.append({"tool": "ours", "model": "growth", "of": size_name, **sizes_of_run, **row})
        exponent = _slope([math.log(size) for size in sizes], [math.log(value) for value in seconds])
        rows.append({"tool": "ours", "model": "growth", "of": size_name, "exponent": exponent})
        figures = ", ".join(f"{size}: {value:.1f} s" for size, value in zip(sizes, seconds, strict=True))
        print(f"{size_name:8s} {figures}; seconds ~ {size_name}^{exponent:.2f}", flush=True)
    return [*rows, loop_rate(args.bits)]


def _slope(x: list[float], y: list[float]) -> float:
    """The slope of the least-squares line."""
    return statistics.covariance(x, y) / statistics.variance(x)


def loop_rate(bits: int, rows: int = 2816, columns: int = 128, candidates: int = 21) -> dict:
    """Multiply-adds per second of processor time of the column loop, and of a large matrix product."""
    g = torch.Generator().manual_seed(0)
    value, matrix = torch.randn(2, rows, columns, generator=g), torch.randn(2048, 2048, generator=g)
    factor = 0.01 * torch.randn(2, columns, columns, generator=g)  # only the part right of the diagonal is read
    scale = (0.5 + torch.rand(2, rows, candidates, generator=g)) * 4 / 2**bits
    zero = torch.full(scale.shape, float(2 ** (bits - 1)))
    loops, products = [], []
    for _ in range(5):
        start = time.process_time()
        column_loop(value, value, factor, torch.ones(2, columns), scale[..., :1], zero[..., :1], Grid(bits, columns))
        loops.append(2 * rows * columns * (columns - 1) / 2 / (time.process_time() - start))
        start = time.process_time()
        torch.mm(matrix, matrix)
        products.append(2048**3 / (time.process_time() - start))
    loop, product = statistics.median(loops), statistics.median(products)
    print(f"column loop {loop / 1e9:.1f}, matrix product {product / 1e9:.1f} GFMA/s: {loop / product:.0%}", flush=True)
    return {"tool": "ours", "model": "column loop", "fma_per_second": loop, "matrix_fma_per_second": product}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tools", nargs="+", choices=list(TOOLS), default=list(TOOLS))
    parser.add_argument("--models", nargs="+", choices=["bundled", "blocks"], default=["bundled", "blocks"])
    parser.add_argument("--bits", type=int, default=3, help="bits of the experts; attention has 4")
    parser.add_argument("--windows", type=int, default=128, help=f"number of windows of {WINDOW_LENGTH} tokens")
    parser.add_argument("--blocks", type=int, default=4, help="blocks of the random model")
    parser.add_argument("--experts", type=int, default=60, help="experts in each of its blocks")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--growth", action="store_true", help="measure how our cost scales, instead of the comparison")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--work", type=Path, default=Path("runs/calibration"), help="environments, models and logs")
    parser.add_argument("--json", type=Path, help="file for the rows")
    args = parser.parse_args()
    args.work = args.work.resolve()
    (args.work / "environments").mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(args.threads)
    rows = grow(args) if args.growth else compare(args)
    write_rows(args.json, rows)


if __name__ == "__main__":
    main()
