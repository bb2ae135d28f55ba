"""`python train.py plan`: the options of `fit`, and what that run would take, from the model's config.json alone."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from eacmoe_lightning.adapter import MoEModel
from eacmoe_lightning.memory import available_memory
from eacmoe_lightning.models.transformers_loader import empty_model
from eacmoe_lightning.originals import resolve_model
from eacmoe_lightning.planning.machine import Rates, measure
from eacmoe_lightning.planning.sizes import Job, Plan, num_bytes, plan
from eacmoe_lightning.recipe import num_quantized
from eacmoe_lightning.targets import TARGETS, WeightGrid

PYTHON_BYTES = 600 << 20  # the interpreter with torch and transformers
DEVICES = (2, 4, 8)  # over which engines may cut linears
GB = 1e9


def load_shapes(name_or_path: str, dtype: str) -> MoEModel:
    """The model without weights, from its config.json alone.

    Raises:
        FileNotFoundError: there is none, or it is not that of a causal language model.
    """
    try:
        config = AutoConfig.from_pretrained(resolve_model(name_or_path))
        stored = config.get_text_config().dtype or torch.bfloat16
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"no config.json is found for {name_or_path!r} (--model.name_or_path): pass a directory that holds one, or "
            f"a hub id that this machine reaches; weights are not needed. {error}"
        ) from error
    return MoEModel(empty_model(config, stored if dtype == "auto" else getattr(torch, dtype)))


def job_of(module: Any, data: Any, moe: MoEModel, processes: int, device: str) -> Job:
    """What the options of `fit` say about cost. Held-out text counts where its length is known or can be read."""
    if data.num_heldout_windows is not None:
        heldout = len(data.heldout) * data.num_heldout_windows
    else:
        try:
            heldout = sum(len(windows) for windows in data.heldout_windows.values())
        except (OSError, ValueError, ConnectionError):
            heldout = 0
    dtype = moe.model.dtype if module.stream_dtype == "auto" else getattr(torch, module.stream_dtype)
    return Job(
        num_windows=data.num_windows,
        window_length=data.window_length,
        batch_size=data.batch_size,
        heldout_tokens=heldout * data.window_length,
        router_method=module.router_method,
        router_epochs=module.router_epochs,
        num_targets=module.router_loss.num_targets(moe.num_experts, moe.top_k),
        joint_epochs=module.joint_epochs,
        trains_scales=bool(module.joint_lr["scale"]),
        trains_codes=bool(module.joint_lr["code"]),
        stream_bytes=dtype.itemsize,
        processes=processes,
        kept_experts=module.pruning.keep if module.pruning else None,
        device=device,
    )


def warnings(found: Plan, grids: list[WeightGrid], memory: int, free: int, processes: int = 1) -> list[str]:
    """What will not work, each with what to do; empty: nothing known against this run.

    Args:
        memory, free: bytes of memory and disk that there are.
        processes: that share this memory.
    """
    said = []
    for name, cost in found.phases.items():
        needed = processes * (cost.peak_bytes + PYTHON_BYTES)
        if needed > memory:
            cure = {
                "joint": "--model.joint_epochs 0 leaves it out, --model.joint_code_lr 0 makes it smaller",
                "router": "a smaller --model.solver_gib",
                "experts": "a smaller --model.solver_gib",
            }.get(name, "shorter batches (--data.batch_size), fewer processes or a larger machine")
            said.append(f"{name} takes {needed / GB:.1f} GB of memory, {memory / GB:.1f} GB are available: {cure}")
    if found.disk_bytes > free:
        said.append(
            f"the run takes up to {found.disk_bytes / GB:.1f} GB of disk, {free / GB:.1f} GB are free: fewer or "
            "shorter windows (--data.num_windows, --data.window_length), --model.stream_dtype bfloat16, or another "
            "--trainer.default_root_dir"
        )
    cut: dict[str, str] = {}
    for target in TARGETS:
        if refused := target.problems(grids):
            reasons = "; ".join(problem.partition(": ")[0] for problem in refused)
            said.append(f"export --format {target.format} --target {target.engine} will be refused: {reasons}")
        for devices in DEVICES if target.format != "dense" else ():
            for problem in target.problems(grids, devices):
                if problem not in refused:  # the first device count that cuts a weight's groups says it for all
                    cut.setdefault(problem.partition(" is ")[0], f"tensor parallelism over {devices}: {problem}")
    said += cut.values()
    return said


def report(found: Plan, moe: MoEModel, job: Job, rates: Rates, memory: int, said: list[str]) -> dict[str, Any]:
    """Everything that is printed, with numbers as they are."""
    size = num_bytes(moe.model.parameters(), moe.model.dtype.itemsize)
    cached = size + found.disk_bytes + found.peak_bytes < memory
    itemsize = moe.model.dtype.itemsize
    sizes = [num_bytes(block.layer.parameters(), itemsize) for block in moe.blocks]
    phases = {
        name: vars(cost) | {"peak_bytes": cost.peak_bytes + PYTHON_BYTES, "seconds": rates.seconds(cost, cached)}
        for name, cost in found.phases.items()
        if cost.peak_bytes and (cost.flops or cost.flops32 or cost.read_bytes)
    }
    return {
        "model": {
            "type": moe.config.model_type,
            "blocks": len(moe.blocks),
            "moe_blocks": len(moe.moe_blocks),
            "experts": moe.num_experts,
            "top_k": moe.top_k,
            "parameters": sum(p.numel() for p in moe.model.parameters()),
            "quantized_parameters": num_quantized(moe),
            "bytes": size,
            "block_bytes": max(sizes),
        },
        "job": vars(job),
        "rates": vars(rates),
        "phases": phases,
        "seconds": sum(phase["seconds"] for phase in phases.values()),
        "peak_bytes": found.peak_bytes + PYTHON_BYTES,
        "disk": found.disk,
        "disk_bytes": found.disk_bytes,
        "warnings": said,
    }


def summary(result: dict[str, Any], name: str) -> str:
    model, job, rates = result["model"], result["job"], result["rates"]
    tokens = job["num_windows"] * job["window_length"]
    lines = [
        f"{name}: {model['parameters'] / GB:.1f} billion parameters, {model['bytes'] / GB:.1f} GB; "
        f"{model['blocks']} blocks of up to {model['block_bytes'] / GB:.2f} GB, {model['experts']} experts, "
        f"top {model['top_k']}",
        f"calibrated on {job['num_windows']} x {job['window_length']} = {tokens} tokens, processes: {job['processes']}",
        f"rates: {rates['flops'] / 1e9:.1f} GFLOP/s in the model's dtype, {rates['flops32'] / 1e9:.1f} in float32, "
        f"memory {rates['memory'] / GB:.1f} GB/s, disk {rates['disk'] / GB:.2f} GB/s",
        "",
        f"{'phase':10s} {'TFLOP':>9s} {'disk GB':>9s} {'peak GB':>9s} {'time':>9s} {'share':>7s}",
    ]
    for phase, cost in result["phases"].items():
        flops, disk = cost["flops"] + cost["flops32"], cost["read_bytes"] + cost["written_bytes"]
        lines.append(
            f"{phase:10s} {flops / 1e12:9.1f} {disk / GB:9.1f} {cost['peak_bytes'] / GB:9.2f} "
            f"{duration(cost['seconds']):>9s} {cost['seconds'] / result['seconds']:7.1%}"
        )
    lines += [
        f"{'all':10s} {'':9s} {'':9s} {result['peak_bytes'] / GB:9.2f} {duration(result['seconds']):>9s}"
        "   (an estimate from these rates: expect a factor of two)",
        "",
        f"disk, at most: {result['disk_bytes'] / GB:.1f} GB: "
        + ", ".join(f"{what} {size / GB:.1f}" for what, size in result["disk"].items() if size),
    ]
    return "\n".join(lines + [f"warning: {said}" for said in result["warnings"]])


def duration(seconds: float) -> str:
    if seconds < 600:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def main(words: list[str]) -> None:
    """The command line of `plan`: the options of `fit`, and these of its own.

    Raises:
        ValueError, FileNotFoundError: what `fit` would refuse for this model is refused here.
    """
    from eacmoe_lightning.cli import parse_fit

    parser = argparse.ArgumentParser(prog="train.py plan", description=__doc__, allow_abbrev=False)
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
    own, words = parser.parse_known_args(words)
    if "-h" in words or "--help" in words:
        parser.print_help()
    module, data, folder = parse_fit(words)
    moe = load_shapes(module.name_or_path, module.dtype_name)
    module.recipe.check(moe)
    job = job_of(module, data, moe, own.processes, torch.device(own.device).type)
    found = plan(moe, module.recipe, job)
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
