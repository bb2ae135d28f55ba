"""Plain GPTQ at equal settings: held-out perplexity of this package's, llm-compressor's and GPTQModel's results.

Every tool quantizes the same MoE (float32, experts at --bits, attention at 4, groups of 128, asymmetric, routers
unchanged) on the same 128 windows of 512 tokens, in a separate process and environment (gptq_tools.py), and returns
dense dequantized weights. This script checks that these lie on the requested grid, and evaluates all of them with
`eacmoe_lightning.evaluation.evaluate`. Settings of the tools (their options are in SETTINGS):

    rtn       round-to-nearest, the baseline without GPTQ
    equal     what all tools support: min-max ranges, columns in natural order, damping 0.01, and every expert is
              calibrated on the tokens routed to it, however few
    default   the tool's defaults
    best      with the tool's options for better accuracy

Each of --seeds draws other calibration windows, the same for all tools. The rows of different seeds show the noise.

    python benchmarks/gptq_quality.py --json gptq_quality.json
    python benchmarks/gptq_quality.py --tools ours llm-compressor --bits 2 --settings equal --seeds 0 1

Requirements: this package installed (or PYTHONPATH=. in a checkout), Linux, and pip with a package index. Missing
environments of the peers are created under --work: 1 GB each with torch's CPU build, about 6 GB with the CUDA build on
PyPI (GPTQModel needs a newer torch than llm-compressor). A tool that cannot be installed or run is reported as a row
with its error.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from environments import python_of
from gptq_tools import ATTENTION_BITS, GROUP_SIZE
from process_tree import run_watched
from safetensors.torch import save_file

from eacmoe_lightning.evaluation.evaluate import evaluate
from eacmoe_lightning.job.data import TextWindows
from eacmoe_lightning.models.moe import MoEModel
from eacmoe_lightning.models.originals import load_original, resolve_model

HERE = Path(__file__).resolve().parent
NUM_WINDOWS, WINDOW_LENGTH = 128, 512

SETTINGS = {  # tool -> setting -> its options
    "ours": {
        "rtn": {"quantizer": "rtn", "clip_search": False},
        "equal": {
            "clip_search": False,
            "act_order": False,
            "scale_search": False,
            "refine": 0,
            "damping": 0.01,
            "min_expert_tokens": 1,
        },
        "default": {},
        "best": {"refine": 3},
        "routers": {"router_method": "ridge", "joint_epochs": 0},  # for calibration.py
        "paper": {
            "router_method": "ridge",
            "joint_epochs": 0,
            "act_order": False,
            "scale_search": False,
            "refine": 0,
        },
        "joint": {"router_method": "ridge"},
    },
    "llm-compressor": {
        "equal": {"actorder": None, "observer": "memoryless_minmax", "dampening_frac": 0.01, "all_experts": False},
        "default": {"observer": "memoryless_minmax", "all_experts": True},
        "default, routed tokens": {"observer": "memoryless_minmax", "all_experts": False},
        "best": {"actorder": "static", "observer": "memoryless_mse", "all_experts": True},
        "best, routed tokens": {"actorder": "static", "observer": "memoryless_mse", "all_experts": False},
    },
    "gptqmodel": {
        "equal": {"desc_act": False, "act_group_aware": False, "damp_percent": 0.01, "mse": 0.0, "fallback": None},
        "default": {},
        "best": {"act_group_aware": True, "mse": 2.4},
    },
}
PACKAGES = {  # tool -> arguments of each `pip install`
    "llm-compressor": [["torch==2.13.0"], ["llmcompressor==0.14.*"]],
    "gptqmodel": [["torch==2.14.1"], ["gptqmodel==7.7.*"]],
}


def quantize(
    tool: str, setting: str, bits: int, seed: int, model: Path, work_dir: Path, threads: int
) -> tuple[dict, Path]:
    """Runs one tool. Returns its version, seconds and peak bytes, and the directory of its dense weights.

    Raises:
        RuntimeError: the tool failed.
    """
    place = work_dir / "results" / f"{tool}-{bits}-{setting.replace(', ', '-').replace(' ', '-')}-{seed}"
    shutil.rmtree(place, ignore_errors=True)
    (place / "scratch").mkdir(parents=True)
    job = {"model": str(model), "windows": str(work_dir / f"windows-{seed}.safetensors"), "seed": seed, "bits": bits}
    job |= {"options": SETTINGS[tool][setting], "out": str(place / "dense")}
    is_ours = tool == "ours"
    checkout = os.pathsep.join(filter(None, [str(HERE.parent), os.environ.get("PYTHONPATH")]))
    env = os.environ | {"PYTHONPATH": checkout if is_ours else "", "OMP_NUM_THREADS": str(threads)}
    env |= {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    python = sys.executable if is_ours else python_of(work_dir / "environments" / tool, PACKAGES[tool])
    command = [python, str(HERE / "gptq_tools.py"), tool, json.dumps(job)]
    with open(place / "log.txt", "w") as log:
        code, wall, processor, peak = run_watched(command, cwd=place / "scratch", env=env, stdout=log, stderr=log)
    if code:
        last = (place / "log.txt").read_text().strip().splitlines()[-1:]
        raise RuntimeError(f"exit status {code}: {' '.join(last)[:300]} (see {place / 'log.txt'})")
    result = json.loads((place / "dense" / "result.json").read_text())
    return result | {"wall_seconds": wall, "processor_seconds": processor, "tree_peak_bytes": peak}, place / "dense"


def inspect(moe: MoEModel, bits: int) -> dict[str, int]:
    """Checks that no group of a weight has more values than its bits allow, and counts expert matrices of zeros.

    Raises:
        RuntimeError: a weight is not quantized.
    """
    zeroed = 0
    for block in moe.blocks:
        for name, (part, weight) in block.weights().items():
            allowed = 2 ** (bits if part == "experts" else ATTENTION_BITS)
            values = weight.unflatten(-1, (-1, GROUP_SIZE)).sort(-1).values  # [..., O, G, g]
            num_values = int((values.diff(dim=-1) != 0).sum(-1).max()) + 1
            if num_values > allowed:
                raise RuntimeError(f"{name} is not quantized: {num_values} values in a group, {allowed} are allowed")
            if part == "experts":
                zeroed += int((weight == 0).all(-1).all(-1).sum())
    return {"zeroed_expert_matrices": zeroed}


def show(row: dict) -> None:
    texts = row.get("perplexity", {})
    mean = f"{math.exp(sum(map(math.log, texts.values())) / len(texts)):9.3f} " if texts else row["error"]
    each = " ".join(f"{text} {value:.3f}" for text, value in texts.items())
    cost = f" {row['seconds']:.0f} s {row['peak_bytes'] / 1e6:.0f} MB" if "seconds" in row else ""
    print(f"{row['bits']:>2} {row['seed']:>2} {row['tool']:15s} {row['setting']:24s} {mean} {each}{cost}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="bundled", help="directory of an MoE with a tied output embedding")
    parser.add_argument("--tools", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument(
        "--settings", nargs="+", default=["rtn", "equal", "default", "best"], help="settings of each tool"
    )
    parser.add_argument("--bits", nargs="+", type=int, default=[3, 2], help="bits of the experts")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="seeds of the choice of calibration windows")
    parser.add_argument("--heldout-windows", type=int, help="windows per text (default: all)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--work", type=Path, default=Path("runs/gptq_quality"), help="environments, logs and weights")
    parser.add_argument("--json", type=Path, help="file for the rows")
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    work_dir, model = args.work.resolve(), Path(resolve_model(args.model)).resolve()
    work_dir.mkdir(parents=True, exist_ok=True)
    sizes = {"num_windows": NUM_WINDOWS, "window_length": WINDOW_LENGTH, "num_heldout_windows": args.heldout_windows}
    for seed in args.seeds:
        data = TextWindows(tokenizer=str(model), seed=seed, **sizes)
        save_file({"input_ids": data.calibration_windows.contiguous()}, work_dir / f"windows-{seed}.safetensors")

    def perplexity(moe: MoEModel) -> dict[str, float]:
        measured = evaluate(None, moe, data.heldout_windows, data.heldout_batch_size)["perplexity"]
        return {text: streams["original"] for text, streams in measured.items()}

    print(f"bits, seed, tool, setting, perplexity of {WINDOW_LENGTH} tokens (mean and each text), cost", flush=True)
    original = MoEModel(load_original(str(model), "float32"))
    rows: list[dict] = [{"tool": "original", "setting": "", "bits": 32, "seed": 0, "perplexity": perplexity(original)}]
    show(rows[0])
    for seed, bits, tool in itertools.product(args.seeds, args.bits, args.tools):
        for setting, options in SETTINGS[tool].items():
            if setting.partition(",")[0] not in args.settings:
                continue
            row = {"tool": tool, "setting": setting, "bits": bits, "seed": seed, "options": options}
            try:
                result, weights = quantize(tool, setting, bits, seed, model, work_dir, args.threads)
                moe = MoEModel(load_original(str(weights), "float32"))
                row |= result | inspect(moe, bits) | {"perplexity": perplexity(moe)}
            except (RuntimeError, subprocess.CalledProcessError) as error:
                row["error"] = str(error)
            rows.append(row)
            show(row)
            if args.json:
                args.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
