"""The output of `plan`: the cost of a run by phase, and warnings of what will fail."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from eacmoe_lightning.calibration.recipe import num_quantized
from eacmoe_lightning.models.moe import MoEModel
from eacmoe_lightning.planning.machine import Rates
from eacmoe_lightning.planning.sizes import Job, Plan, num_bytes
from eacmoe_lightning.target_rules import Target
from eacmoe_lightning.targets import TARGETS
from eacmoe_lightning.weight_grids import Original, WeightGrid

PYTHON_BYTES = 600 << 20  # the interpreter with torch and transformers
DEVICES = (2, 4, 8)  # device counts that engines may split linear layers over
GB = 1e9


def warnings(
    costs: Plan,
    grids: list[WeightGrid],
    original: Original,
    memory: int,
    free: int,
    processes: int = 1,
    host_memory: float = math.inf,
    targets: Sequence[Target] = TARGETS,
) -> list[str]:
    """The expected failures, each with a remedy.

    Args:
        costs: the plan of the run.
        grids: the grid of every quantized weight.
        original: what export formats ask about the original.
        memory, free: available bytes of memory and of disk.
        processes: number of processes that share the memory.
        host_memory: available bytes beside an accelerator's memory.
        targets: the formats and engines that the exports are for.
    """
    messages = []
    for name, cost in costs.phases.items():
        needed = processes * (cost.peak_bytes + PYTHON_BYTES)
        if needed > memory:
            remedy = {
                "sample": "self:RUN, a run directory whose compressed model writes, or self:URL, a server's address",
                "joint": "--model.joint_code_lr 0 or --data.micro_batch_size 1",
                "block": "--model.block_code_lr 0 or --data.micro_batch_size 1",
                "router": "a smaller --model.solver_gib",
                "experts": "a smaller --model.solver_gib",
            }.get(name, "smaller batches (--data.batch_size), fewer processes or a larger machine")
            messages.append(
                f"{name} takes {needed / GB:.1f} GB of memory, but {memory / GB:.1f} GB are available: {remedy}"
            )
        if (host := processes * cost.host_bytes) > host_memory:
            messages.append(
                f"{name} takes {host / GB:.1f} GB of host memory, but {host_memory / GB:.1f} GB are available: "
                "--model.joint_code_lr 0, --model.joint_scale_lr 0 or smaller batches (--data.batch_size)"
            )
    if costs.disk_bytes > free:
        messages.append(
            f"the run takes up to {costs.disk_bytes / GB:.1f} GB of disk, but {free / GB:.1f} GB are free: use fewer "
            "or shorter windows (--data.num_windows, --data.window_length), --model.stream_dtype bfloat16, or another "
            "--trainer.default_root_dir"
        )
    split_problems: dict[str, str] = {}  # weight -> message
    for target in targets:
        if refused := target.problems(grids, original):
            reasons = "; ".join(problem.partition(": ")[0] for problem in refused)
            messages.append(f"export --format {target.format} --target {target.engine} will be refused: {reasons}")
        for devices in DEVICES if target.format != "dense" else ():
            for problem in target.problems(grids, original, devices):
                if problem not in refused:  # a weight is reported once, for the fewest devices that split its groups
                    split_problems.setdefault(
                        problem.partition(" is ")[0], f"tensor parallelism over {devices}: {problem}"
                    )
    messages += split_problems.values()
    return messages


def report(costs: Plan, moe: MoEModel, job: Job, rates: Rates, memory: int, messages: list[str]) -> dict[str, Any]:
    """Everything that `summary` prints, with unrounded numbers; `messages` are the warnings.

    `memory` is the host's, in which files stay that were used shortly before.
    """
    size = num_bytes(moe.model.parameters(), moe.model.dtype.itemsize)
    cached = size + costs.disk_bytes + costs.peak_bytes < memory
    itemsize = moe.model.dtype.itemsize
    sizes = [num_bytes(block.layer.parameters(), itemsize) for block in moe.blocks]
    phases = {
        name: vars(cost) | {"peak_bytes": cost.peak_bytes + PYTHON_BYTES, "seconds": rates.seconds(cost, cached)}
        for name, cost in costs.phases.items()
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
            "stored_bytes": round(size * job.stored_share),
            "block_bytes": max(sizes),
        },
        "job": vars(job),
        "rates": vars(rates),
        "phases": phases,
        "seconds": sum(phase["seconds"] for phase in phases.values()),
        "peak_bytes": costs.peak_bytes + PYTHON_BYTES,
        "host_bytes": costs.host_bytes,
        "disk": costs.disk,
        "disk_bytes": costs.disk_bytes,
        "warnings": messages,
    }


def summary(result: dict[str, Any], name: str) -> str:
    """The report as text for the terminal."""
    model, job, rates = result["model"], result["job"], result["rates"]
    tokens = job["num_windows"] * job["window_length"]
    lines = [
        f"{name}: {model['parameters'] / GB:.1f} billion parameters, {model['bytes'] / GB:.1f} GB "
        f"({model['stored_bytes'] / GB:.1f} GB on disk); "
        f"{model['blocks']} blocks of up to {model['block_bytes'] / GB:.2f} GB, {model['experts']} experts, "
        f"top {model['top_k']}",
        f"calibrated on {job['num_windows']} x {job['window_length']} = {tokens} tokens; processes: {job['processes']}",
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
        "   (estimated from these rates; it can be off by a factor of two)",
        "",
        *([f"host memory: {host / GB:.1f} GB beside the device's"] if (host := result["host_bytes"]) else []),
        f"disk: at most {result['disk_bytes'] / GB:.1f} GB: "
        + ", ".join(f"{name} {size / GB:.1f}" for name, size in result["disk"].items() if size),
    ]
    return "\n".join(lines + [f"warning: {message}" for message in result["warnings"]])


def duration(seconds: float) -> str:
    if seconds < 600:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
