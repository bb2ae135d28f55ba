"""What `plan` prints: the cost of a run by phase, and what will not work."""

from __future__ import annotations

from typing import Any

from eacmoe_lightning.calibration.recipe import num_quantized
from eacmoe_lightning.models.moe import MoEModel
from eacmoe_lightning.planning.machine import Rates
from eacmoe_lightning.planning.sizes import Job, Plan, num_bytes
from eacmoe_lightning.targets import TARGETS, WeightGrid

PYTHON_BYTES = 600 << 20  # the interpreter with torch and transformers
DEVICES = (2, 4, 8)  # over which engines may cut linears
GB = 1e9


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
