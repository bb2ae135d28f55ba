"""`eacmoe plan` estimates the cost of a `fit` from its options and the model's config.json alone."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections import defaultdict
from contextlib import suppress
from dataclasses import fields
from math import inf, prod
from pathlib import Path

import torch

from eacmoe_lightning.budget.rest import Rest
from eacmoe_lightning.calibration.recipe import num_quantized
from eacmoe_lightning.commands.fit import parse_fit
from eacmoe_lightning.exports.linears import original_of
from eacmoe_lightning.job.qesc import QESC
from eacmoe_lightning.models.fingerprint import fingerprint
from eacmoe_lightning.models.moe import MoEModel
from eacmoe_lightning.planning.machine import Rates, measure
from eacmoe_lightning.planning.phases import plan as plan_run
from eacmoe_lightning.planning.report import report, summary, warnings
from eacmoe_lightning.planning.shapes import load_shapes, stored_share
from eacmoe_lightning.planning.sizes import job_of
from eacmoe_lightning.run.device import device_of
from eacmoe_lightning.run.memory import available_memory
from eacmoe_lightning.targets import TARGETS

CPU = torch.device("cpu")


def options() -> argparse.ArgumentParser:
    """The options of `plan` in addition to those of `fit`."""
    program = f"{Path(sys.argv[0]).name} plan"
    parser = argparse.ArgumentParser(prog=program, description=__doc__, allow_abbrev=False, add_help=False)
    parser.add_argument("--json", type=Path, help="file to write the numbers to as JSON")
    parser.add_argument("--processes", type=int, default=1, help="number of processes that share windows and experts")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="device to time")
    for rate, unit in (
        ("flops", "operations in the model's dtype"),
        ("flops32", "operations in float32"),
        ("memory", "bytes read and written in memory"),
        ("disk", "bytes read from or written to disk"),
    ):
        parser.add_argument(f"--rate.{rate}", type=float, help=f"{unit} per second on another machine")
    parser.add_argument("--available.memory", type=float, help="bytes of memory on another machine")
    parser.add_argument("--available.host_memory", type=float, help="bytes of memory beside that of the device")
    parser.add_argument("--available.disk", type=float, help="bytes of free disk space on another machine")
    return parser


def plan(words: list[str]) -> None:
    """Runs the `plan` command, which takes the options of `fit` and those of `options`.

    Raises:
        ValueError, FileNotFoundError: as in `fit`, for options that do not suit the model.
    """
    parser = options()
    chosen, words = parser.parse_known_args(words)
    if "-h" in words or "--help" in words:
        parser.print_help()  # those of fit follow
    _check(chosen)
    module, data, folder = parse_fit(words)
    moe = load_shapes(module.name_or_path, module.dtype_name, module.trust_remote_code)
    module.recipe.check(moe)
    if module.pruning is not None:
        module.pruning.check(moe)
    by_size = _choose_bits(module, moe)
    share = stored_share(module.name_or_path, moe)
    is_described = getattr(chosen, "available.memory") and None not in [
        getattr(chosen, f"rate.{f.name}") for f in fields(Rates)
    ]
    device = torch.device(chosen.device) if is_described else device_of(chosen.device)
    folder = _existing(Path(folder))
    memory = getattr(chosen, "available.memory") or available_memory(device)
    job = job_of(module, data, moe, chosen.processes, device.type, memory, share)
    costs = plan_run(moe, module.recipe, job)
    rates = {field.name: getattr(chosen, f"rate.{field.name}") for field in fields(Rates)}
    if None in rates.values():
        measured = vars(measure(device, moe.model.dtype, folder, moe.config.hidden_size))
        rates = {name: rate or measured[name] for name, rate in rates.items()}
    rates = Rates(**rates)
    free = getattr(chosen, "available.disk") or shutil.disk_usage(folder).free
    grids = module.recipe.grids(moe)
    host = memory if device.type == "cpu" else getattr(chosen, "available.host_memory") or available_memory(CPU)
    targets = module.targets or TARGETS
    messages = warnings(costs, grids, original_of(moe), int(memory), int(free), chosen.processes, int(host), targets)
    if rates.flops < rates.flops32 / 2:
        messages.insert(
            0,
            f"matrix products run at {rates.flops / 1e9:.1f} GFLOP/s in {moe.model.dtype} and at "
            f"{rates.flops32 / 1e9:.1f} in float32: --model.dtype float32 is faster, at twice the memory per block",
        )
    result = report(costs, moe, job, rates, int(host), messages)
    print("\n".join([summary(result, module.name_or_path), *by_size]))
    if chosen.json:
        chosen.json.write_text(json.dumps(result, indent=2) + "\n")


def _check(chosen: argparse.Namespace) -> None:
    """Raises ValueError if an option of the command is out of its range, or its file cannot be written."""
    if chosen.processes < 1:
        raise ValueError(f"--processes {chosen.processes} is below 1")
    for option, value in vars(chosen).items():
        if option.startswith(("rate.", "available.")) and value is not None and not 0 < value < inf:
            raise ValueError(f"--{option} {value:g} is not a positive number")
    if chosen.json is not None and (chosen.json.is_dir() or not chosen.json.absolute().parent.is_dir()):
        raise ValueError(f"{chosen.json} (--json) cannot be written: pass the name of a file in an existing directory")


def _choose_bits(module: QESC, moe: MoEModel) -> list[str]:
    """Gives the module the widths of the size that was asked for, and says what will come out; nothing without one.

    Raises:
        FileNotFoundError, ValueError: as in `fit`.
    """
    chosen, size = module.chosen_bits, module.chosen_bits.size
    if not size:
        return []
    name, original = module.name_or_path, None
    with suppress(FileNotFoundError):  # without weights
        original = fingerprint(name) if chosen.path else None
    choice = chosen.check(moe, Rest.of(moe, name, module.trust_remote_code), original)
    rest = choice.rest_bytes
    if choice.sensitivity is None:
        bits = 8 * size.nbytes(moe, rest) / num_quantized(moe)
        return [f"by size: {bits:.3f} bits a weight; what it loses is known once `eacmoe sensitivity` has measured it"]
    allocation = choice.allocate()
    module.recipe, module.pruning = allocation.applied(module.recipe, module.pruning)
    lines = [
        f"by size: {(allocation.nbytes + rest) / 1e9:.4g} GB with everything; {allocation.described()}",
        choice.around(),
    ]
    shares: dict[tuple[str, float], int] = defaultdict(int)
    for grid in module.recipe.grids(moe):
        shares[grid.part, grid.bits] += prod(grid.shape)
    for part in dict.fromkeys(part for part, _ in shares):
        total = sum(number for (of, _), number in shares.items() if of == part)
        widths = sorted((bits, number / total) for (of, bits), number in shares.items() if of == part)
        lines.append(f"  {part}: " + ", ".join(f"{share:.0%} at {bits:g}" for bits, share in widths))
    return lines


def _existing(folder: Path) -> Path:
    """The folder, or its nearest parent that exists, since planning creates no folders."""
    return next(place for place in (folder.absolute(), *folder.absolute().parents) if place.is_dir())
