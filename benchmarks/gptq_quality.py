"""Quality and cost of this package beside GPTQModel, llm-compressor and AutoRound, at equal bits on equal windows.

Every tool quantizes the same MoE (float32, experts at --bits, attention at 4, groups of 128) on the same --windows of
512 tokens in the same order, in batches of 4, in a separate process and environment (gptq_tools.py), and returns dense
dequantized weights. This script checks that these lie on the requested grid and that embeddings, and of tools that do
not train them routers and norms, are the original's (dense_check.py). It measures all of them in the same way on the
held-out texts. Settings of the tools (their options are in SETTINGS; a tool without a setting is left out):

    rtn       round-to-nearest, the baseline without GPTQ
    equal     what all GPTQ tools support: min-max ranges, columns in natural order, damping 0.01, and every expert is
              calibrated on the tokens routed to it, however few
    default   the tool's defaults; ours is plain GPTQ then. AutoRound: asymmetric, 200 iterations
    best      with the tool's options for better accuracy. AutoRound: what it recommends for 2 bit, its extension with
              1000 iterations
    extension AutoRound's `enable_alg_ext` with 200 iterations. It changes symmetric grids only, so zero points, which
              the other rows have, are left out
    neuqi     AutoRound's search of scales and zero points, asymmetric, beside its extension
    block, joint, both    ours with the block stage, the joint stage, or both, as configs/tiny-2.06.yaml has them, on
              the same windows

Each of --seeds draws other calibration windows, or the same in another order if they are all there are, the same for
all tools, and seeds the tools. The rows of different seeds show the noise. Of the windows --self-windows are written by
the original instead (`--data.calibration self:NUM`); all tools get these, too.

    python benchmarks/gptq_quality.py
    python benchmarks/gptq_quality.py --tools ours llm-compressor --bits 2 --settings equal --seeds 0 1
    python benchmarks/gptq_quality.py --bits 2 --windows 249 --heldout-windows 16 --settings default block joint both

Rows are added to --json as they are made, and rows that it has are not made again: a run that was ended goes on with
the next one. The table shows all of its rows on these windows: nats lost per token and the divergence KL(original ||
result) in the calibrated domains, in German and on the texts of --far (far_texts.py writes them); bits per quantized
weight, with scales of 16 bits and zero points; the share of tokens that are sent to other experts; seconds of
quantizing, processor seconds of the whole process, and the highest memory of all its processes together.

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
import signal
import statistics
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from dense_check import inspect
from environments import python_of
from far_texts import TEXTS as FAR
from far_texts import compare
from gptq_tools import ATTENTION_BITS, GROUP_SIZE, block_bits, calibration_options
from kept_rows import KeptRows
from process_tree import run_watched
from safetensors.torch import save_file

from eacmoe_lightning.evaluation.evaluate import evaluate
from eacmoe_lightning.job.data import TextWindows
from eacmoe_lightning.job.sampling import SampledTexts
from eacmoe_lightning.models.checkpoint import Checkpoint
from eacmoe_lightning.models.moe import MoEModel
from eacmoe_lightning.models.originals import load_original, resolve_model
from eacmoe_lightning.models.streamed import StreamedModel
from eacmoe_lightning.run.directory import RunDirectory
from eacmoe_lightning.run.ranks import Ranks
from eacmoe_lightning.text.windows import read_windows

HERE = Path(__file__).resolve().parent
WINDOW_LENGTH = 512
Bits = int | list[int]  # a list: of equal shares of the blocks, from the first on
STAGES = {"router_method": "ridge", "joint_epochs": 2}  # as in configs/tiny-2.06.yaml

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
        "block": STAGES | {"joint_epochs": 0},
        "joint": STAGES | {"block_epochs": 0, "joint_code_lr": 5e-5},
        "both": STAGES | {"joint_code_lr": 5e-5},
        "routers": STAGES | {"block_epochs": 0, "joint_epochs": 0},  # for calibration.py
        "paper": {
            "router_method": "ridge",
            "block_epochs": 0,
            "joint_epochs": 0,
            "act_order": False,
            "scale_search": False,
            "refine": 0,
        },
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
    "autoround": {
        "default": {},
        "extension": {"enable_alg_ext": True, "sym": True},
        "neuqi": {"enable_alg_ext": True, "enable_neuqi": True},
        "best": {"enable_alg_ext": True, "sym": True, "iters": 1000},
    },
}
ZERO_POINT_BITS = {"ours": 8}  # in files of its format; others store zero points in as many bits as codes
DEFAULT_SETTINGS = ["rtn", "default", "extension", "neuqi", "best", "block", "joint", "both"]
PACKAGES = {  # tool -> arguments of each `pip install`
    "llm-compressor": [["torch==2.13.0"], ["llmcompressor==0.14.*"]],
    "gptqmodel": [["torch==2.14.1"], ["gptqmodel==7.7.*"]],
    "autoround": [["torch==2.13.0"], ["auto-round==0.16.1"]],
}


def draw_windows(
    model: Path, seed: int, number: int, work_dir: Path, num_heldout: int | None = None, num_self: int = 0
) -> TextWindows:
    """The texts; the calibration windows are saved where `quantize` looks for them."""
    options = calibration_options(seed, number, WINDOW_LENGTH, num_self)
    data = TextWindows(tokenizer=str(model), num_heldout_windows=num_heldout, **options)
    path = windows_file(work_dir, seed, number, num_self)
    work_dir.mkdir(parents=True, exist_ok=True)
    if num_self:
        moe = StreamedModel(Checkpoint(str(model), "float32"))
        texts = SampledTexts(data, RunDirectory(path.with_suffix("")), moe, Ranks(), str(model), "float32")
        texts.prepare(continues=False)
        texts.make()
    save_file({"input_ids": data.calibration_windows.contiguous()}, path)
    return data


def windows_file(work_dir: Path, seed: int, number: int, num_self: int = 0) -> Path:
    return work_dir / f"windows-{number}-{seed}{f'-self-{num_self}' if num_self else ''}.safetensors"


def quantize(
    tool: str, setting: str, bits: Bits, seed: int, number: int, model: Path, work_dir: Path, threads: int,
    num_self: int = 0,
) -> tuple[dict, Path]:  # fmt: skip
    """Runs one tool on `number` windows. Returns its version and cost, and the directory of its dense weights.

    Raises:
        RuntimeError: the tool failed.
    """
    setting_name = setting.replace(", ", "-").replace(" ", "-")
    windows = windows_file(work_dir, seed, number, num_self)
    place = work_dir / "results" / f"{tool}-{written(bits)}-{setting_name}-{windows.stem.removeprefix('windows-')}"
    shutil.rmtree(place, ignore_errors=True)
    (place / "scratch").mkdir(parents=True)
    job = {"model": str(model), "windows": str(windows), "self_windows": num_self, "seed": seed, "bits": bits}
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


def judge(
    weights: Path,
    original: MoEModel,
    texts: dict[str, torch.Tensor],
    batch_size: int,
    by_block: list[int],
    zero_point_bits: int | None,
    trains: bool,
) -> dict:
    """Checks dense weights and measures them: a row's part that does not come from the tool.

    Args:
        weights: directory of a tool's result.
        texts: held-out windows [S, T] by text.
        by_block: bits of each block's experts.
        zero_point_bits, trains: see `inspect`.

    Raises:
        RuntimeError: see `inspect`.
    """
    moe = MoEModel(load_original(str(weights), "float32"))

    def bits_of(block: int, part: str) -> int:
        return by_block[block] if part == "experts" else ATTENTION_BITS

    row = inspect(moe, original, bits_of, GROUP_SIZE, zero_point_bits, trains)
    measured = evaluate(original, moe, texts, batch_size)
    row["perplexity"] = {text: streams["compressed"] for text, streams in measured["perplexity"].items()}
    row["expert_shift"] = measured["expert_shift"]["mean"]
    figures = {text: compare({"": moe.model}, original.model, windows)[""] for text, windows in texts.items()}
    return row | {kind: {text: figure[kind] for text, figure in figures.items()} for kind in ("lost", "kl", "original")}


def read(bits: str) -> Bits:
    """An option's bits: `2`, or `3,2` for the first and the second half of the blocks."""
    widths = [int(width) for width in bits.split(",")]
    return widths if len(widths) > 1 else widths[0]


def written(bits: Bits) -> str:
    return ",".join(map(str, bits)) if isinstance(bits, list) else str(bits)


def far_windows(folder: Path, model: Path, number: int | None) -> dict[str, torch.Tensor]:
    return {name: read_windows(str(folder / f"{name}.txt"), model, number, WINDOW_LENGTH) for name in FAR}


def show(row: dict) -> None:
    texts = row.get("perplexity", {})
    mean = f"{math.exp(sum(map(math.log, texts.values())) / len(texts)):9.3f} " if texts else row["error"]
    each = " ".join(f"{text} {value:.3f}" for text, value in texts.items())
    cost = f" {row['seconds']:.0f} s {row['tree_peak_bytes'] / 1e6:.0f} MB" if "seconds" in row else ""
    about = f"{written(row['bits']):>3} {row['seed']:>2} {row['tool']:15s} {row['setting']:24s}"
    print(f"{about} {mean} {each}{cost}", flush=True)


def table(rows: list[dict]) -> str:
    """Means over the seeds of a tool's setting, with the standard deviation where there are several."""
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        if "lost" in row:
            groups.setdefault((written(row["bits"]), row["tool"], row["setting"]), []).append(row)
    titles = ["bits", "tool", "setting", "seeds", "true bits", *COLUMNS]
    lines = ["| " + " | ".join(titles) + " |", "|---" * len(titles) + "|"]
    for (bits, tool, setting), same in groups.items():
        cells = [bits, tool, setting, str(len(same)), f"{same[0]['true_bits']:.3f}"]
        for figure, digits in COLUMNS.values():
            values = [value for row in same if (value := figure(row)) is not None]
            spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.{digits}f}{spread}" if values else "")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def mean_of(kind: str, chosen: Callable[[str], bool], row: dict) -> float | None:
    """Mean of `lost` or `kl` over the texts that are chosen by name; None if there are none."""
    values = [value for text, value in row[kind].items() if chosen(text)]
    return statistics.mean(values) if values else None


TEXT_GROUPS: dict[str, Callable[[str], bool]] = {
    "in": lambda text: text != "german" and text not in FAR,
    "german": lambda text: text == "german",
    "far": lambda text: text in FAR,
}
COLUMNS: dict[str, tuple[Callable[[dict], float | None], int]] = {  # title -> figure of a row, digits
    **{f"lost, {name}": (partial(mean_of, "lost", chosen), 4) for name, chosen in TEXT_GROUPS.items()},
    **{f"KL, {name}": (partial(mean_of, "kl", chosen), 4) for name, chosen in TEXT_GROUPS.items()},
    "other experts, %": (lambda row: 100 * row["expert_shift"]["any"], 1),
    "seconds": (lambda row: row["seconds"], 0),
    "processor seconds": (lambda row: row["processor_seconds"], 0),
    "peak MB": (lambda row: row["tree_peak_bytes"] / 1e6, 0),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="bundled", help="directory of an MoE with a tied output embedding")
    parser.add_argument("--tools", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument(
        "--settings", nargs="+", help="settings of each tool (default: all but equal)", default=DEFAULT_SETTINGS
    )
    of_experts = "bits of the experts; 3,2: of the first and the second half of the blocks"
    parser.add_argument("--bits", nargs="+", type=read, default=[3, 2], help=of_experts)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="of the choice of windows, and of the tools")
    parser.add_argument("--windows", type=int, default=128, help=f"calibration windows of {WINDOW_LENGTH} tokens")
    parser.add_argument("--self-windows", type=int, default=0, help="of --windows, those that the original writes")
    parser.add_argument("--heldout-windows", type=int, help="windows per text (default: all)")
    parser.add_argument("--far", type=Path, help="folder of texts that far_texts.py has written, measured too")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--work", type=Path, default=Path("runs/gptq_quality"), help="environments, logs and weights")
    parser.add_argument("--json", type=Path, help="file for the rows (default: rows.json in --work)")
    args = parser.parse_args()
    if unknown := set(args.settings) - {name.partition(",")[0] for settings in SETTINGS.values() for name in settings}:
        parser.error(f"--settings: no tool has {', '.join(sorted(unknown))}")
    if not 0 <= args.self_windows < args.windows:
        parser.error(f"--self-windows {args.self_windows}: pass less than --windows, which is {args.windows}")

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the tool at work is ended, too
    torch.set_num_threads(args.threads)
    work_dir, model = args.work.resolve(), Path(resolve_model(args.model)).resolve()
    drawn = args.windows, work_dir, args.heldout_windows, args.self_windows
    data = {seed: draw_windows(model, seed, *drawn) for seed in args.seeds}
    heldout = data[args.seeds[0]]
    texts = heldout.heldout_windows | (far_windows(args.far, model, args.heldout_windows) if args.far else {})
    measured_on = {text: list(windows.shape) for text, windows in texts.items()}
    shared = {"model": args.model, "windows": args.windows, "self_windows": args.self_windows}
    shared |= {"texts": measured_on, "group_size": GROUP_SIZE}

    rows = KeptRows(args.json or work_dir / "rows.json", {"self_windows": 0})
    original = MoEModel(load_original(str(model), "float32"))
    for seed, bits, tool in itertools.product(args.seeds, args.bits, args.tools):
        for setting, options in SETTINGS[tool].items():
            if setting.partition(",")[0] not in args.settings:
                continue
            row = shared | {"tool": tool, "setting": setting, "bits": bits, "seed": seed, "options": options}
            if (made := rows.of(row)) is not None:
                show(made)
                continue
            try:
                run = model, work_dir, args.threads, args.self_windows
                result, weights = quantize(tool, setting, bits, seed, args.windows, *run)
                zero_point_bits = 0 if options.get("sym") else ZERO_POINT_BITS.get(tool)
                by_block = block_bits(model, bits)
                about = by_block, zero_point_bits, "router_method" in options
                row |= result | judge(weights, original, texts, heldout.heldout_batch_size, *about)
            except (RuntimeError, subprocess.CalledProcessError) as error:
                row["error"] = str(error)
            rows.add(row)
            show(row)
    print(table([row for row in rows if shared.items() <= row.items()]))


if __name__ == "__main__":
    main()
