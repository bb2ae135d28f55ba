"""The cost of `fit` phase by phase (`plan`)."""

from __future__ import annotations

from dataclasses import replace

import torch

from eacmoe_lightning.calibration.recipe import Recipe
from eacmoe_lightning.calibration.solver import experts_together, stack_bytes, tokens_at_once
from eacmoe_lightning.models.block import Block
from eacmoe_lightning.models.moe import MoEModel
from eacmoe_lightning.models.sampling import batch_size, cache_bytes
from eacmoe_lightning.planning.joint import add_joint_stage
from eacmoe_lightning.planning.sizes import (
    LOADED,
    Cost,
    Job,
    Plan,
    Shapes,
    block_activations,
    disk_use,
    gram_flops,
    num_bytes,
    num_quantized_of,
    sampling_bytes,
    step_bytes,
    trained_bytes,
    vocabulary,
)
from eacmoe_lightning.quantization.grid import Grid
from eacmoe_lightning.routers import ridge
from eacmoe_lightning.tuning.codes import trains_weights


def plan(moe: MoEModel, recipe: Recipe, job: Job) -> Plan:
    """The costs of `fit`; only the model's shapes are used, so its parameters may be on the meta device."""
    result = Plan(disk=disk_use(moe, recipe, job))
    phases, itemsize, hidden = result.phases, moe.model.dtype.itemsize, moe.config.hidden_size
    in_blocks = sum(num_bytes(block.layer.parameters(), itemsize) for block in moe.blocks)
    outside_blocks = num_bytes(moe.model.parameters(), itemsize) - in_blocks
    logits = vocabulary(moe)
    stream = job.tokens * hidden * job.stream_bytes
    batch = job.batch_size * job.window_length
    share = 1 / job.processes
    of_blocks = [Shapes(block, block.top_k, hidden, job) for block in moe.blocks]
    for block, shapes in zip(moe.blocks, of_blocks, strict=True):
        size = num_bytes(block.layer.parameters(), itemsize)
        stored = size * job.stored_share
        largest = max(parameter.numel() for parameter in block.layer.parameters()) * itemsize
        here = outside_blocks + size
        active = here + batch * itemsize * (8 * hidden + shapes.activations)
        routing = job.tokens * share * (4 * block.num_experts + 24 * moe.top_k)
        phases["check"].add(here + 2 * largest, read_bytes=stored, loop_bytes=LOADED * size)
        phases["read"].add(here + 2 * largest, read_bytes=stored, again_bytes=stored, loop_bytes=LOADED * size)
        forward = dict(flops=job.tokens * shapes.forward * share, loop_bytes=job.tokens * shapes.touched * share)
        through = dict(read_bytes=stream, written_bytes=stream, again_bytes=2 * stream)
        phases["observe"].add(active + routing, **forward, **through)
        phases["replay"].add(active + routing, **forward, **through)
        _linears(phases["attention"], shapes.attention, recipe, job, here, share)
        # attention runs once: its end is kept, and what comes after it starts there
        kept, attention = job.tokens * shapes.attention_input * itemsize, job.tokens * share * shapes.attention_forward
        phases["attention"].add(active, flops=attention, written_bytes=kept, read_bytes=kept, again_bytes=2 * kept)
        if not job.block_epochs:
            phases["replay"].add(flops=-attention, read_bytes=kept, again_bytes=kept)
        passes = len({name for name, *_ in shapes.attention}) + 1
        read = dict(read_bytes=passes * stream, written_bytes=stream, again_bytes=(passes + 1) * stream)
        phases["attention"].add(**read, loop_bytes=job.tokens * share * passes * 16 * hidden * itemsize)
        _linears(phases["experts"], shapes.shared, recipe, job, here, share)
        if block.is_moe:
            _router(phases["router"], shapes, recipe, job, hidden, here + routing, share)
            _experts(phases["experts"], shapes, recipe, job, here + routing)
        if job.block_epochs:
            _block_stage(phases["block"], block, shapes, job, here + routing, hidden, stream)
    forward = sum(shapes.forward for shapes in of_blocks) + 2 * hidden * logits
    if job.sampled_windows:
        _sample(phases["sample"], moe, job, forward)
    if job.measured_widths:
        _sensitivity(phases["sensitivity"], moe, of_blocks, recipe, job, outside_blocks)
    if job.joint_epochs:
        add_joint_stage(phases["joint"], moe, recipe, job, forward)
    block_size = max(num_bytes(block.layer.parameters(), itemsize) for block in moe.blocks)
    codes = result.disk["compressed model"]
    phases["write"].add(2 * outside_blocks + block_size, read_bytes=codes, written_bytes=codes, again_bytes=2 * codes)
    evaluations = 1 if job.router_method == "none" or job.block_epochs else 2  # before and after calibration
    read, touched = (
        evaluations * (in_blocks * job.stored_share + codes),
        sum(s.touched for s in of_blocks) + 6 * 4 * logits,
    )
    evaluated = 2 * evaluations * job.heldout_tokens + job.floor_tokens  # tokens through all blocks
    phases["evaluate"].add(
        2 * outside_blocks + max(2 * block_size + batch * 8 * hidden * itemsize, job.window_length * 12 * logits),
        flops=evaluated * share * forward,
        loop_bytes=evaluated * share * touched,
        read_bytes=read,
        again_bytes=read,
    )
    return result


def _block_stage(cost: Cost, block: Block, shapes: Shapes, job: Job, here: float, hidden: int, stream: float) -> None:
    """Adds the passes that train a block: forward and backward, on x_hat and the original block's output."""
    itemsize, quantized = next(block.layer.parameters()).element_size(), num_quantized_of(block)
    share, epochs, parts = 1 / job.processes, job.block_epochs, job.batch_size / job.at_once
    activations = block_activations(shapes, hidden, itemsize, job.at_once * job.window_length)
    read = 2 * epochs * stream * share
    decodes = trains_weights(job.block_kinds)
    in_memory = here - quantized * itemsize if decodes else here  # these weights are decoded from codes instead
    cost.add(
        in_memory + trained_bytes([block], job.block_kinds) + activations,
        flops=(4 if parts == 1 else 5) * epochs * job.tokens * share * shapes.forward,  # experts' runs twice
        loop_bytes=job.steps(epochs) * parts * step_bytes(quantized, job.block_kinds, activations),
        read_bytes=read,
        again_bytes=read,
    )


def _sample(cost: Cost, moe: MoEModel, job: Job, forward: float) -> None:
    """Adds windows that the original writes token by token. A step reads all weights that its tokens pass through.

    Args:
        forward: operations of a token.
    """
    itemsize, size = moe.model.dtype.itemsize, num_bytes(moe.model.parameters(), moe.model.dtype.itemsize)
    windows = batch_size(moe.config, itemsize, job.sampled_windows, job.window_length, job.device)
    batches = -(-job.sampled_windows // windows)
    steps = -(-batches // job.processes) * job.window_length
    of_experts = sum(num_bytes(block.experts.module.parameters(), itemsize) for block in moe.moe_blocks)
    unused = of_experts * (1 - moe.top_k / moe.num_experts) ** windows  # if all experts are selected equally
    kept = windows * job.window_length / 2 * cache_bytes(moe.config, itemsize)
    cost.add(
        sampling_bytes(moe, windows, job.window_length),
        flops=steps * windows * forward,
        loop_bytes=steps * (size - unused + kept) + LOADED * size,
        read_bytes=size * job.stored_share,
    )


def _sensitivity(
    cost: Cost, moe: MoEModel, of_blocks: list[Shapes], recipe: Recipe, job: Job, outside_blocks: int
) -> None:
    """Adds the solves of every width, and the probes of all earlier parts, which run through each block."""
    job, itemsize, hidden = replace(job, processes=1), moe.model.dtype.itemsize, moe.config.hidden_size
    probes, stream = 0, job.tokens * hidden * itemsize
    for block, shapes in zip(moe.blocks, of_blocks, strict=True):
        size = num_bytes(block.layer.parameters(), itemsize)
        here = outside_blocks + 2 * size + job.batch_size * job.window_length * itemsize * (
            8 * hidden + shapes.activations
        )  # fmt: skip
        passes = len({name for name, *_ in shapes.attention}) * job.measured_widths
        cost.add(here, read_bytes=size * job.stored_share + (2 + passes) * stream, written_bytes=stream)
        cost.add(flops=job.tokens * (2 * shapes.forward + passes * shapes.attention_forward))
        for _ in range(job.measured_widths):
            _linears(cost, shapes.attention + shapes.shared, recipe, job, here, 1.0)
            if block.is_moe:
                _experts(cost, shapes, recipe, job, here)
        begun = job.measured_widths * len({part for part, _ in block.weights().values()})
        tokens = job.probe_windows * job.window_length * (probes + begun + 1)
        states = 2 * tokens * hidden * itemsize
        cost.add(flops=tokens * shapes.forward, loop_bytes=tokens * shapes.touched, again_bytes=states)
        cost.add(read_bytes=states / 2, written_bytes=states / 2)
        probes += begun
    cost.add(flops=2 * job.probe_windows * job.window_length * (probes + 1) * hidden * vocabulary(moe))


def _linears(
    cost: Cost, linears: list[tuple[str, int, int]], recipe: Recipe, job: Job, here: float, share: float
) -> None:
    """Adds a Hessian for each group of layers with the same input, and the solves: every process solves all layers."""
    if not recipe.quantizes:
        return
    for columns in {group: columns for group, _, columns in linears}.values():
        cost.add(flops32=gram_flops(job.tokens * share, columns))
    device, grid = torch.device(job.device), recipe.grid(0, 1, "attention")
    for _, rows, columns in linears:
        _solve(cost, 1, rows, columns, recipe, grid)
        cost.add(here + 4 * columns**2 + recipe.solver.working_bytes(1, rows, columns, device))


def _solve(cost: Cost, number: float, rows: int, columns: int, recipe: Recipe, grid: Grid) -> None:
    one = recipe.solver.arithmetic(rows, columns, grid)
    cost.add(flops32=number * one.flops, loop_bytes=number * one.loop_bytes)


def _router(cost: Cost, shapes: Shapes, recipe: Recipe, job: Job, hidden: int, here: float, share: float) -> None:
    experts, stream = shapes.num_experts, job.tokens * share * hidden * job.stream_bytes
    if job.router_method == "ridge":
        num_targets = min(job.num_targets, experts)
        shared = num_targets == experts  # every token is a target of every expert, so all share one matrix
        together = ridge.experts_together(experts, hidden, recipe.solver_gib, shared)
        matrices, taught = (1, 1) if shared else (experts, num_targets)
        passes, batches = -(-experts // together), job.num_windows / job.batch_size * share
        cost.add(
            here + ridge.working_bytes(min(together, matrices), hidden),
            flops32=gram_flops(job.tokens * share * taught, hidden) + 2 / 3 * matrices * hidden**3,  # in float64
            loop_bytes=batches * matrices * 8 * hidden**2,
            read_bytes=(passes + 1) * stream,
            again_bytes=(passes + 1) * stream,
        )
    elif job.router_method == "sgd":
        cost.add(
            here,
            flops32=6 * job.router_epochs * job.tokens * share * experts * hidden,
            read_bytes=job.router_epochs * stream,
            again_bytes=job.router_epochs * stream,
        )


def _experts(cost: Cost, shapes: Shapes, recipe: Recipe, job: Job, here: float) -> None:
    """Adds Hessians of this process's tokens and solves of its share of the experts."""
    if not recipe.quantizes:
        return
    (up_rows, up_columns), (_, down_columns) = shapes.experts
    share = 1 / job.processes
    sent = max(job.tokens * shapes.top_k, recipe.min_expert_tokens * shapes.num_experts) * share
    device, experts = torch.device(job.device), shapes.num_experts
    together = experts_together(recipe.solver, shapes.experts, experts, recipe.solver_gib, job.processes, device)
    stack_size = stack_bytes(recipe.solver, shapes.experts, together, job.processes, device)
    token = shapes.itemsize * (up_columns + up_rows + 2 * down_columns) + 4 * max(up_columns, down_columns)
    activations = min(job.tokens * share, tokens_at_once(shapes.experts)) * token
    cost.add(here + stack_size + activations, flops=2 * sent * up_rows * up_columns)
    for rows, columns in shapes.experts:
        cost.add(flops32=gram_flops(sent, columns))
        _solve(cost, experts * share, rows, columns, recipe, recipe.grid(0, 1, "experts"))
