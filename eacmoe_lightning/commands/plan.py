"""`eacmoe plan`: the options of `fit`, and what that run would take, from the model's config.json alone."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path

import torch

from eacmoe_lightning.commands.fit import parse_fit
from eacmoe_lightning.planning.machine import Rates, measure
from eacmoe_lightning.planning.report import report, summary, warnings
from eacmoe_lightning.planning.shapes import load_shapes
from eacmoe_lightning.planning.sizes import job_of
from eacmoe_lightning.planning.sizes import plan as plan_run
from eacmoe_lightning.run.memory import available_memory


def options() -> argparse.ArgumentParser:
    """The options of `plan` beside those of `fit`."""
    program = f"{Path(sys.argv[0]).name} plan"
    parser = argparse.ArgumentParser(prog=program, description=__doc__, allow_abbrev=False, add_help=False)
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    parser.add_argument("--processes", type=int, default=1, help="that share windows and experts")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="that is timed")
    for rate, unit in (
        ("flops", "operations in the model's dtype"),
        ("flops32", "operations in float32"),
        ("memory", "bytes copied in memory"),
        ("disk", "bytes read or written"),
    ):
        parser.add_argument(f"--rate.{rate}", type=float, help=f"{unit} per second, of another machine")
    parser.add_argument("--available.memory", type=float, help="bytes, of another machine")
    parser.add_argument("--available.disk", type=float, help="bytes, of another machine")
    return parser


def plan(words: list[str]) -> None:
    """The command line of `plan`: the options of `fit`, and those of `options`.

    Raises:
        ValueError, FileNotFoundError: what `fit` would refuse for this model is refused here.
    """
    parser = options()
    own, words = parser.parse_known_args(words)
    if "-h" in words or "--help" in words:
        parser.print_help()  # those of fit follow
    module, data, folder = parse_fit(words)
    moe = load_shapes(module.name_or_path, module.dtype_name)
    module.recipe.check(moe)
    job = job_of(module, data, moe, own.processes, torch.device(own.device).type)
    found = plan_run(moe, module.recipe, job)
    device, folder = torch.device(own.device), _existing(Path(folder))
    rates = vars(measure(device, moe.model.dtype, folder, moe.config.hidden_size))
    rates = Rates(**{name: getattr(own, f"rate.{name}") or value for name, value in rates.items()})
    memory = getattr(own, "available.memory") or available_memory(device)
    free = getattr(own, "available.disk") or shutil.disk_usage(folder).free
    said = warnings(found, module.recipe.grids(moe), int(memory), int(free), own.processes)
    if rates.flops < rates.flops32 / 2:
        said.insert(
            0,
            f"products in {moe.model.dtype} run at {rates.flops / 1e9:.1f} GFLOP/s on this machine, in float32 at "
            f"{rates.flops32 / 1e9:.1f}: --model.dtype float32 is faster, at twice the memory for a block",
        )
    result = report(found, moe, job, rates, int(memory), said)
    print(summary(result, module.name_or_path))
    if own.json:
        own.json.write_text(json.dumps(result, indent=2) + "\n")


def _existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that there is: planning creates nothing."""
    return next(place for place in (folder.absolute(), *folder.absolute().parents) if place.is_dir())
