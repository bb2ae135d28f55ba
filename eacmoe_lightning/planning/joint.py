"""Memory and arithmetic of the joint stage, with the blocks in memory or streamed."""

from __future__ import annotations

import math
from dataclasses import dataclass

from eacmoe_lightning.calibration.recipe import Recipe, num_quantized
from eacmoe_lightning.models.block import Block
from eacmoe_lightning.models.moe import MoEModel
from eacmoe_lightning.planning.sizes import (
    MOVABLE,
    POSITION_BYTES,
    SCALE_BYTES,
    Cost,
    Job,
    Shapes,
    block_activations,
    num_bytes,
    packed_bytes,
    step_bytes,
    vocabulary,
)
from eacmoe_lightning.quantization.kquant import TYPES
from eacmoe_lightning.tuning.codes import trains_weights

LOGITS_BYTES = 24  # of each number in a window's logits: both models' in float32, their softmax and gradients


@dataclass(frozen=True)
class JointMemory:
    """Bytes that the joint stage takes, without Python.

    Attributes:
        device: on the model's device.
        host: in host memory besides; on a CPU both are the same memory.
    """

    device: float
    host: float

    def fits(self, job: Job, memory: float, host_memory: float) -> bool:
        """Whether it fits into this much memory of the device, and of the host, which the processes share."""
        if job.device == "cpu":
            return job.processes * (self.device + self.host) <= memory
        return self.device <= memory and job.processes * self.host <= host_memory


def joint_memory(moe: MoEModel, recipe: Recipe, job: Job, is_resident: bool) -> JointMemory:
    """What the joint stage takes of memory.

    Args:
        is_resident: whether all blocks and activations are in memory; otherwise one at a time is, and scales,
            positions and AdamW's moments are in host memory.
    """
    itemsize, hidden, batch = moe.model.dtype.itemsize, moe.config.hidden_size, job.batch_size * job.window_length
    in_blocks = sum(num_bytes(block.layer.parameters(), itemsize) for block in moe.blocks)
    outside = num_bytes(moe.model.parameters(), itemsize) - in_blocks
    blocks = [_block_bytes(block, job, itemsize) for block in moe.blocks]
    grids = recipe.grids(moe)
    scales = 0
    if "scale" in job.joint_kinds:
        scales = sum(math.prod(g.shape) / (TYPES[g.kquant].block if g.kquant else g.group_size) for g in grids)
    codes = sum(math.prod(grid.shape) for grid in grids) if "code" in job.joint_kinds else 0
    trained = SCALE_BYTES * scales + MOVABLE * POSITION_BYTES * codes
    shapes = [Shapes(block, block.top_k, hidden, job) for block in moe.blocks]
    at_once = batch if is_resident else job.at_once * job.window_length
    activations = [block_activations(one, hidden, itemsize, at_once) for one in shapes]
    logits = job.window_length * vocabulary(moe) * LOGITS_BYTES
    borders = (len(moe.blocks) + 2) * batch * hidden * itemsize
    if is_resident:
        return JointMemory(2 * outside + sum(blocks) + trained + sum(activations) + job.batch_size * logits, 0)
    in_file = packed_bytes(grids) / len(blocks)
    return JointMemory(2 * outside + max(blocks) + in_file + max(*activations, logits), trained + borders)


def is_resident(moe: MoEModel, recipe: Recipe, job: Job) -> bool:
    """Whether the joint stage keeps all blocks in memory: where they fit."""
    return joint_memory(moe, recipe, job, True).fits(job, job.memory, float("inf"))


def add_joint_stage(cost: Cost, moe: MoEModel, recipe: Recipe, job: Job, forward: float) -> None:
    """Adds the joint stage.

    Args:
        forward: operations of a token in a forward pass.
    """
    hidden, itemsize, resident = moe.config.hidden_size, moe.model.dtype.itemsize, is_resident(moe, recipe, job)
    memory, head = joint_memory(moe, recipe, job, resident), 2 * hidden * vocabulary(moe)
    batch = job.batch_size * job.window_length
    shapes = [Shapes(block, block.top_k, hidden, job) for block in moe.blocks]
    activations = sum(block_activations(one, hidden, itemsize, batch) for one in shapes)
    activations += batch * vocabulary(moe) * LOGITS_BYTES
    steps = job.steps(job.joint_epochs)
    read = 0 if resident else 2 * steps * packed_bytes(recipe.grids(moe))  # forward and backward
    forwards = 1 if resident else 2
    cost.add(
        memory.device + (memory.host if job.device == "cpu" else 0),
        flops=job.joint_epochs * job.tokens / job.processes * ((3 + forwards) * forward + forwards * head),
        loop_bytes=steps * step_bytes(num_quantized(moe), job.joint_kinds, activations),
        read_bytes=read,
        again_bytes=read,
    )
    cost.host_bytes = 0 if job.device == "cpu" else memory.host


def _block_bytes(block: Block, job: Job, itemsize: int) -> float:
    """A block in memory: the weights in training as their codes, all others as they are."""
    everything = num_bytes(block.layer.parameters(), itemsize)
    if not trains_weights(job.joint_kinds):
        return everything
    weights = [(part, weight.numel()) for part, weight in block.weights().values()]
    decoded = sum(2 * number * itemsize for part, number in weights if part != "experts")  # with gradients
    return everything + sum(number * (1 - itemsize) for _, number in weights) + decoded
