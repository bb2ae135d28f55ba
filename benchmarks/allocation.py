"""Ways to choose bits, at equal true bits a weight: how much each loses, and whether the losses are predicted.

    python benchmarks/allocation.py --rows half random frequency block expert --seeds 0 1 2 --far far_texts
    python benchmarks/allocation.py --rows drawn --drawn 30          # rank correlation of predicted and measured loss

For each seed `eacmoe sensitivity` measures the model once on that seed's calibration windows, and `eacmoe fit` runs
with every row's widths. Options after `--` go to both, such as `--model.block_epochs 0` or `--data.num_windows 64`.

The budgets are the sizes of the paper's settings: attention at 4 bits, and a share of the routed experts at 3, the
others at 2 (0: its 2.06 bits, 0.5: 2.54, 1: 3.03). Rows:

    half        the experts of the first blocks at 3 bits (the paper's setting for 2.54)
    random      experts drawn at random
    frequency   the experts that the most calibration tokens select, over all blocks
    block       chosen by size, one width for a block's experts
    expert      chosen by size, each projection of each expert by itself
    autoscheme  chosen by AutoRound's AutoScheme on the calibration windows, one width for a block's experts
    autoscheme-expert   by the same scores, each projection of each expert by itself
    drawn       --drawn allocations with widths drawn for every part and expert; no equal size

With --mixes, at each of these bits a weight of the original: all experts with the bits that fit, and 1/8, 1/4 and 1/2
of them dropped (by the score of REAP) with more bits for the others.

`autoscheme` needs a package index on first use: it makes AutoRound's environment, 6 GB or less, in --work
(gptq_quality.py). `--autoscheme-tokens 16 128` gives it AutoScheme's default for MoEs, 16 windows of 128 tokens.

The table has the KL divergence from the original on held-out text: the calibrated domains, German, and the texts of
--far (far_texts.py writes them). Rows are added to --json as they are made; rows that it has are not made again.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from statistics import mean

import numpy as np
import torch
from environments import python_of
from gptq_quality import PACKAGES
from kept_rows import KeptRows
from safetensors.torch import save_file

from eacmoe_lightning.budget.allocation import Allocation, Allocator, Key
from eacmoe_lightning.budget.rest import Rest
from eacmoe_lightning.budget.sensitivity import Sensitivity, read
from eacmoe_lightning.budget.target import BySize, SizeTarget
from eacmoe_lightning.cli import main as run
from eacmoe_lightning.commands.fit import parse_fit
from eacmoe_lightning.models.originals import resolve_model
from eacmoe_lightning.planning.shapes import load_shapes
from eacmoe_lightning.pruning.rule import PruningRule

ROWS = ("half", "random", "frequency", "block", "expert", "autoscheme", "autoscheme-expert", "drawn")
OVERHEAD_BITS = 16 + 8  # of a group: scale and zero point in this package's format
AUTOROUND = Path(__file__).resolve().parent / "autoscheme.py"
LINEAR = re.compile(r"\.(\d+)\.(?:self_attn|mlp\.(shared_expert)|mlp\.experts\.(\d+))\.(\w+)$")


def main() -> None:
    words, more = sys.argv[1:], []
    if "--" in words:
        words, more = words[: words.index("--")], words[words.index("--") + 1 :]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="bundled")
    parser.add_argument("--config", default="tiny")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=ROWS[:5])
    parser.add_argument("--shares", type=float, nargs="+", default=[0, 0.25, 0.5, 1], help="of the experts at 3 bits")
    parser.add_argument("--mixes", type=float, nargs="*", default=[], help="bits of the sizes with fewer experts")
    parser.add_argument("--drawn", type=int, default=30)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--heldout", nargs="+", default=["prose", "code", "german"], help="bundled texts")
    parser.add_argument("--heldout-windows", type=int, default=8)
    parser.add_argument("--far", type=Path)
    parser.add_argument("--autoscheme-tokens", type=int, nargs=2, metavar=("WINDOWS", "TOKENS"), help="default: all")
    parser.add_argument("--autoscheme-widths", type=int, nargs="+", default=[2, 3, 4, 8])
    parser.add_argument("--work", type=Path, default=Path("runs/allocation"))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(words)
    args.work.mkdir(parents=True, exist_ok=True)
    rows = KeptRows(args.json or args.work / "rows.json")
    for seed in args.seeds:
        options = ["--config", args.config, "--model.name_or_path", args.model, "--data.seed", str(seed), *more]
        allocator, found = sensitivities(args, options, seed)
        for name, share, allocation in allocations(args, options, allocator, found, seed):
            about = {"name": name, "share": share, "seed": seed}
            if rows.of(about) is None:
                measured = fit(args, options, allocation, f"{name}-{share:g}-{seed}")
                add(rows, about | {"predicted": allocation.damage} | measured)
        for name, bits, words, predicted in mixes(args, allocator, found, seed):
            about = {"name": name, "share": bits, "seed": seed}
            if rows.of(about) is None:
                measured = evaluate(args, [*options, *words], f"{name}-{bits:g}-{seed}".replace("/", "."))
                add(rows, about | {"predicted": predicted} | measured)
    print(table(rows.rows))


def add(rows: KeptRows, row: dict) -> None:
    rows.add(row)
    print(row, flush=True)


def mixes(
    args: argparse.Namespace, allocator: Allocator, found: Sensitivity, seed: int
) -> Iterator[tuple[str, float, list[str], float]]:
    """Names, bits, options of `fit` and predicted losses of the rows with fewer experts."""
    moe, number, rest = allocator.moe, allocator.moe.num_experts, Rest(0, torch.float32)  # a size in bits needs none
    for bits in args.mixes:
        for share in (0, 1 / 8, 1 / 4, 1 / 2):
            keep = round((1 - share) * number)
            rule = PruningRule("reap", keep=keep) if share else None
            try:
                choice = BySize(SizeTarget(bits=bits), allocator.recipe, moe, [], rest, found, pruning=rule)
                allocation = choice.allocate()
            except ValueError:
                continue  # there is no such size
            words = ["--model.target_bits", str(bits), "--model.sensitivity", str(args.work / f"sensitivity-{seed}")]
            words += ["--pruning.keep", str(keep), "--pruning.criterion", "reap"] if share else []
            yield f"{keep} of {number} experts", bits, words, allocation.damage


def sensitivities(args: argparse.Namespace, options: list[str], seed: int) -> tuple[Allocator, Sensitivity]:
    output = args.work / f"sensitivity-{seed}"
    run(["sensitivity", "--output", str(output), *options])
    module, _, _ = parse_fit(options)
    moe = load_shapes(module.name_or_path, module.dtype_name, module.trust_remote_code)
    module.recipe.check(moe)
    found = read(output)
    return Allocator(module.recipe, moe, found), found


def allocations(
    args: argparse.Namespace, options: list[str], allocator: Allocator, found: Sensitivity, seed: int
) -> Iterator[tuple[str, float, Allocation]]:
    """Names, shares and allocations of the rows of one seed."""
    recipe, moe = allocator.recipe, allocator.moe
    by_block = Allocator(recipe, moe, found, "block")
    experts = [(block.index, e) for block in moe.moe_blocks for e in range(block.num_experts)]
    draw = random.Random(seed)
    orders = {
        "half": experts,
        "random": draw.sample(experts, len(experts)),
        "frequency": sorted(experts, key=lambda place: -found.blocks[place[0]]["load"][place[1]]),
    }
    for share in args.shares:
        chosen = {name: set(order[: round(share * len(experts))]) for name, order in orders.items()}

        def widths(key, at_three):
            if not key[1].startswith("experts"):
                return 4
            return 3 if (key[0], int(key[1].split(".")[1])) in at_three else 2

        plain = {name: allocator.of(lambda key, at=at: widths(key, at)) for name, at in chosen.items()}
        size = plain["half"].nbytes
        for name in args.rows:
            if name in plain and (name == "half" or 0 < share < 1):
                yield name, share, plain[name]
            elif name in ("block", "expert"):
                yield name, share, (by_block if name == "block" else allocator).allocate(size)
            elif name.startswith("autoscheme"):
                bits = autoscheme(args, options, seed, plain["half"].bits, share, name == "autoscheme-expert")
                yield name, share, within(allocator.of(units_of(bits).__getitem__), size)
    for number in range(args.drawn if "drawn" in args.rows else 0):
        # a width for all, moved up or down by part and block and by expert, so that sizes and mixtures differ
        level = draw.uniform(2, 4)
        of_group = {(b.index, p): draw.gauss(0, 0.7) for b in moe.blocks for p in ("attention", "shared", "experts")}

        def drawn(key, level=level, of_group=of_group):
            own = draw.gauss(0, 0.5) if key[1].startswith("experts") else 0
            return min(max(round(level + of_group[key[0], key[1].partition(".")[0]] + own), 2), 5)

        yield f"drawn {number}", 0, allocator.of(drawn)


def autoscheme(
    args: argparse.Namespace, options: list[str], seed: int, true_bits: float, share: float, by_expert: bool
) -> dict[str, int]:
    """Bits by linear that AutoScheme chooses for a size: true bits a weight by this package's count."""
    work = args.work.resolve()
    module, data, _ = parse_fit(options)
    number, length = args.autoscheme_tokens or data.calibration_windows.shape
    windows = data.calibration_windows[:number, :length]
    kind = f"{'expert' if by_expert else 'block'}-{share:g}"
    folder = work / f"autoscheme-{seed}-{number}x{length}-{'-'.join(map(str, args.autoscheme_widths))}"
    folder.mkdir(exist_ok=True)
    save_file({"input_ids": windows.contiguous()}, folder / "windows.safetensors")
    job = {
        "model": str(Path(resolve_model(args.model)).resolve()),
        "windows": str(folder / "windows.safetensors"),
        "bits": true_bits - OVERHEAD_BITS / module.recipe.group_size + 1e-6,  # it rounds the sum of all bits down
        "group_size": module.recipe.group_size,
        "widths": args.autoscheme_widths,
        "by_expert": by_expert,
        "cache": str(folder / "scores"),
        "out": str(folder / f"{kind}.json"),
    }
    if not Path(job["out"]).exists():
        python = python_of(work / "environments" / "autoround", PACKAGES["autoround"])
        env = os.environ | {"PYTHONPATH": "", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
        command = [python, AUTOROUND, json.dumps(job)]
        with open(folder / f"{kind}.log", "w") as log:
            subprocess.run(command, cwd=folder, env=env, stdout=log, stderr=log, check=True)
    result = json.loads(Path(job["out"]).read_text())
    cost = f"{result['seconds']:.0f} s ({result['processor_seconds']:.0f} s of the processor)"
    print(f"AutoScheme {result['version']}, {kind}: {cost}, scores of other rows not counted", flush=True)
    return result["bits"]


def units_of(bits: dict[str, int]) -> dict[Key, int]:
    """The widths of an allocator's units from those of linears: the largest where they differ within a unit."""
    units: dict[Key, int] = {}
    for name, width in bits.items():
        block, shared, expert, projection = LINEAR.search(name).groups()
        key = "shared" if shared else "attention"
        if expert:
            key = f"experts.{expert}.{'down_proj' if projection == 'down_proj' else 'gate_up_proj'}"
        units[int(block), key] = max(width, units.get((int(block), key), 0))
    return units


def within(allocation: Allocation, size: float) -> Allocation:
    if allocation.nbytes > size:
        raise RuntimeError(f"the allocation takes {allocation.nbytes:.0f} bytes, more than the {size:.0f} of its size")
    return allocation


def fit(args: argparse.Namespace, options: list[str], allocation: Allocation, name: str) -> dict:
    """Fits with these widths."""
    return evaluate(args, [*options, "--model.overrides", json.dumps(allocation.overrides)], name)


def evaluate(args: argparse.Namespace, options: list[str], name: str) -> dict:
    """Fits with these options; true bits and the mean KL divergence by text."""
    folder = args.work / "runs" / name
    texts = {text: f"bundled:{text}" for text in args.heldout}
    texts |= {f"far_{path.stem}": str(path.resolve()) for path in sorted(args.far.glob("*.txt"))} if args.far else {}
    words = [
        *("--trainer.default_root_dir", str(folder), "--trainer.enable_progress_bar", "false", "--ckpt_path", "auto"),
        *("--data.heldout", json.dumps(texts), "--data.num_heldout_windows", str(args.heldout_windows)),
        *("--data.noise_floor", "0"),
    ]
    run(["fit", *options, *words])
    report = json.loads((folder / "report.json").read_text())
    kl = {text: figures["compressed"]["kl"]["mean"] for text, figures in report["divergence"]["texts"].items()}
    far = [value for text, value in kl.items() if text.startswith("far_")]
    near = [value for text, value in kl.items() if not text.startswith("far_") and text != "german"]
    return {
        "bits": report["bits"]["true"],
        "in": mean(near),
        "german": kl.get("german"),
        "far": mean(far) if far else None,
        "texts": kl,
        "seconds": report["cost"]["total_seconds"],
    }


def table(rows: list[dict]) -> str:
    lines = []
    drawn = [row for row in rows if row["name"].startswith("drawn")]
    if len(drawn) > 2:
        for text in ("in", "german", "far"):
            if drawn[0][text] is not None:
                rho = rank_correlation([row["predicted"] for row in drawn], [row[text] for row in drawn])
                lines.append(f"rank correlation of predicted and measured divergence, {text}: {rho:.3f} ({len(drawn)})")
    lines += ["| experts at 3 bit | chosen by | true bits | predicted | in | German | far |", "|---" * 7 + "|"]
    places = dict.fromkeys((row["share"], row["name"]) for row in rows if row not in drawn)
    for share, name in sorted(places, key=lambda place: (place[0], (*ROWS, place[1]).index(place[1]))):
        of_seeds = [row for row in rows if (row["share"], row["name"]) == (share, name)]
        cells = [_over([row[key] for row in of_seeds]) for key in ("bits", "predicted", "in", "german", "far")]
        what = f"{share:.0%}" if name in ROWS else f"{share:g} bits"
        lines.append(f"| {what} | {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _over(values: list[float | None]) -> str:
    """The mean over seeds, and half of their range."""
    if None in values:
        return ""
    half = (max(values) - min(values)) / 2
    return f"{mean(values):.4f}" + (f" ± {half:.4f}" if len(values) > 1 else "")


def rank_correlation(a: list[float], b: list[float]) -> float:
    """Spearman's: the correlation of ranks."""
    ranks = [np.argsort(np.argsort(values)) for values in (a, b)]
    return float(np.corrcoef(*ranks)[0, 1])


if __name__ == "__main__":
    main()
