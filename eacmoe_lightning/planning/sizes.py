"""Computes arithmetic, memory and disk of a run by phase from a model's shapes and the options of `fit` alone.

Operations are multiplications and additions: 2 per weight that a token passes through. They are counted as the code
performs them. The streams run through each block twice. Attention also runs up to each group of linear layers that is
solved. A Hessian [I, I] is the sum over all tokens that reach it (its upper half). GPTQ factors the Hessian (4/3 I^3),
multiplies the weight by it (2 O I^2), spreads errors (O I^2), tries scales in its column loop, and refines
(`quantization/quantizers.py`).
Letters: N tokens, D hidden, F expert width, E experts, K top_k, O/I out/in features.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch

from eacmoe_lightning.calibration.blocks import PHASES
from eacmoe_lightning.calibration.recipe import Recipe, num_quantized, stored_bits
from eacmoe_lightning.models.block import Block
from eacmoe_lightning.models.moe import MoEModel
from eacmoe_lightning.models.sampling import working_bytes
from eacmoe_lightning.planning.states import LAST, passed_on
from eacmoe_lightning.quantization.gram import TILE
from eacmoe_lightning.tuning.codes import trains_weights
from eacmoe_lightning.weight_grids import WeightGrid

LOADED = 20  # bytes of memory traffic per byte loaded: copies, conversions, pages touched for the first time
MOVABLE = 0.2  # share of the codes that training can change (`tuning.codes.movable`), seen at 2, 3 and 4 bits
POSITION_BYTES = 20  # memory of such a code: its place, its position, the position's gradient and AdamW's two moments
STORED_BYTES = 16  # of these in a checkpoint: all but the gradient
SCALE_BYTES = 18  # memory of a scale in training: float32, its gradient, two moments; and the stored float16
STORED_SCALE_BYTES = 12  # of these in a checkpoint
DECODED_BYTES = 48  # memory traffic per weight in a step for decoding it and for the gradient of its scale
TRAINED_BYTES = 24  # further memory traffic per weight in a step that trains codes: rounding, the codes' gradient
STEP_PASSES = 3  # passes over the activations in a step, besides matrix products


@dataclass(frozen=True)
class Job:
    """The settings that the cost depends on besides the model and its recipe.

    Attributes:
        num_windows, window_length, batch_size: size of the calibration text and of a batch.
        micro_batch_size: windows that the stages that train run at a time; None: a batch.
        heldout_tokens: number of tokens of the evaluation at the end.
        floor_tokens: those among them on which it measures the noise floor.
        router_method, router_epochs, num_targets, block_epochs, joint_epochs: as in `fit`.
        block_kinds, joint_kinds: what the block and the joint stage train: of router, norm, scale and code.
        stream_bytes: bytes per number of the hidden streams on disk.
        processes: number of processes that share windows and experts.
        kept_experts: number of experts that pruning keeps per block; None counts all (also with a rule by `alpha`,
            whose outcome is unknown).
        device: the type of device that it runs on, `cpu` or `cuda`.
        stored_share: bytes of the original's files per byte that its weights take in memory.
        sampled_windows: number of windows that the original itself writes.
        measured_widths, probe_windows: widths and windows of the sensitivities that the run measures; 0: it does not.
        memory: bytes of the device's memory, which decide whether the joint stage streams the blocks.
    """

    num_windows: int
    window_length: int
    batch_size: int
    heldout_tokens: int
    router_method: str
    router_epochs: int
    num_targets: int
    joint_epochs: int
    stream_bytes: int
    block_epochs: int = 0
    block_kinds: tuple[str, ...] = ()
    joint_kinds: tuple[str, ...] = ()
    processes: int = 1
    kept_experts: int | None = None
    device: str = "cpu"
    stored_share: float = 1.0
    sampled_windows: int = 0
    measured_widths: int = 0
    probe_windows: int = 0
    floor_tokens: int = 0
    memory: float = math.inf
    micro_batch_size: int | None = None

    def share(self, num_experts: int) -> float:
        """The share of a block's experts that pruning keeps."""
        return min(num_experts, self.kept_experts or num_experts) / num_experts

    @property
    def tokens(self) -> int:
        return self.num_windows * self.window_length

    @property
    def at_once(self) -> int:
        """The windows that the stages that train run through a block at a time."""
        return min(self.batch_size, self.micro_batch_size or self.batch_size)

    def steps(self, epochs: int) -> float:
        """The steps of a process in this many passes, as shares of whole batches."""
        return epochs * self.num_windows / self.batch_size / self.processes


@dataclass
class Cost:
    """The cost of one phase, summed over all blocks.

    Attributes:
        flops: operations of matrix products in the model's dtype.
        flops32: operations of matrix products that are in float32 whatever the model's dtype.
        loop_bytes: memory traffic of everything but matrix products.
        read_bytes, written_bytes: bytes read from and written to files.
        again_bytes: the part of these that was used shortly before or is read again shortly after. If memory has room
            for it, it does not wait for the disk.
        peak_bytes: peak memory of one process at the largest block, without Python itself.
        host_bytes: host memory that a process on an accelerator takes besides for what is trained.
    """

    flops: float = 0.0
    flops32: float = 0.0
    loop_bytes: float = 0.0
    read_bytes: float = 0.0
    written_bytes: float = 0.0
    again_bytes: float = 0.0
    peak_bytes: float = 0.0
    host_bytes: float = 0.0

    def add(self, peak_bytes: float = 0.0, **more: float) -> None:
        for name, value in more.items():
            setattr(self, name, getattr(self, name) + value)
        self.peak_bytes = max(self.peak_bytes, peak_bytes)


@dataclass
class Plan:
    """The estimated costs of `fit`."""

    phases: dict[str, Cost] = field(
        default_factory=lambda: {
            name: Cost() for name in ("check", "sample", "sensitivity", *PHASES, "joint", "write", "evaluate")
        }
    )
    disk: dict[str, int] = field(default_factory=dict)  # bytes by purpose

    @property
    def peak_bytes(self) -> float:
        return max(phase.peak_bytes for phase in self.phases.values())

    @property
    def host_bytes(self) -> float:
        return max(phase.host_bytes for phase in self.phases.values())

    @property
    def disk_bytes(self) -> int:
        return sum(self.disk.values())


def packed_bytes(grids: Iterable[WeightGrid], share: float = 1.0) -> int:
    """Bytes of codes, float16 scales and 8-bit zero points; `share` is the share of the experts that is counted."""
    total = 0.0
    for grid in grids:
        *stack, rows, columns = grid.shape
        number = stack[0] * share if grid.part == "experts" else 1
        total += number * rows * columns * stored_bits(grid) / 8
    return int(total)


def vocabulary(moe: MoEModel) -> int:
    """Number of logits of a token."""
    return moe.model.get_output_embeddings().weight.shape[0]


def stored_bytes(recipe: Recipe, kinds: Collection[str], quantized: int) -> int:
    """Bytes of a checkpoint while this many quantized weights are trained; routers and norms are small beside them."""
    codes = STORED_BYTES * MOVABLE * quantized if "code" in kinds else 0
    return int(codes + (STORED_SCALE_BYTES * quantized / recipe.group_size if "scale" in kinds else 0))


def num_bytes(parameters: Iterable, itemsize: int) -> int:
    return sum(parameter.numel() for parameter in parameters) * itemsize


def trained_bytes(blocks: Iterable[Block], kinds: Collection[str]) -> int:
    """Memory of the codes and positions of blocks in training, and of the linears decoded from them with gradients.

    Experts are decoded one at a time.
    """
    if not trains_weights(kinds):
        return 0
    each = 1 + ("code" in kinds) * MOVABLE * POSITION_BYTES
    weights = [(part, weight) for block in blocks for part, weight in block.weights().values()]
    decoded = sum(2 * num_bytes([weight], weight.element_size()) for part, weight in weights if part != "experts")
    return int(sum(weight.numel() for _, weight in weights) * each) + decoded


def sampling_bytes(moe: MoEModel, windows: int, window_length: int) -> int:
    """Memory that the original takes while it writes a batch of calibration windows."""
    itemsize = moe.model.dtype.itemsize
    return num_bytes(moe.model.parameters(), itemsize) + working_bytes(moe.config, itemsize, windows, window_length)


def disk_use(moe: MoEModel, recipe: Recipe, job: Job) -> dict[str, int]:
    """The most bytes that a run directory takes, by purpose."""
    outside = recipe.outside(moe)
    streams, state_bytes = stream_use(moe, recipe, job)
    packed, itemsize = packed_bytes(recipe.grids(moe), job.share(moe.num_experts)), moe.model.dtype.itemsize
    unquantized = num_bytes(moe.model.parameters(), itemsize) - num_quantized(moe) * itemsize
    packed_head = packed_bytes(outside)
    unquantized += packed_head - sum(math.prod(grid.shape) for grid in outside) * itemsize
    evaluated = (2 * job.heldout_tokens + job.floor_tokens) // job.window_length * state_bytes
    teachers = sum(block.num_experts for block in moe.moe_blocks) * job.tokens * 2 if job.joint_epochs else 0
    in_training = [  # of the joint stage, and of the largest block
        (job.joint_kinds, num_quantized(moe) if job.joint_epochs else 0),
        (job.block_kinds, max(num_quantized_of(block) for block in moe.blocks) if job.block_epochs else 0),
    ]
    checkpoint = 2 * max(stored_bytes(recipe, kinds, number) for kinds, number in in_training)  # and its successor
    return {
        "hidden streams": streams,
        "router logits for the joint stage": teachers,
        "checkpoints": checkpoint,
        # with one in training, and the head
        "finished blocks": packed + (packed // len(moe.blocks) if job.block_epochs else 0) + packed_head,
        "compressed model": packed + unquantized,
        "hidden states of the evaluation": evaluated,
        "hidden states of sensitivities": job.probe_windows * 2 * (num_probes(moe, job) + 1) * state_bytes,
    }


def num_probes(moe: MoEModel, job: Job) -> int:
    """The parts of all blocks at each measured width (`budget.measure`)."""
    return job.measured_widths * sum(len({part for part, _ in block.weights().values()}) for block in moe.blocks)


def stream_use(moe: MoEModel, recipe: Recipe, job: Job) -> tuple[int, int]:
    """The most bytes of both streams on disk with what a block's parts read; and of a state in the model's dtype.

    At a block there are the streams before it, after it, and those that the last checkpoint may need. After it the
    compressed stream comes last, when the experts' inputs are gone, and the attention's too if the block was trained.
    Experts are taken to read something of their own, and attention to end in its output projection.
    """
    at_blocks = passed_on(moe, job.window_length)
    states = [at_blocks[0].output * job.stream_bytes]  # the embedded tokens, the same in both streams
    states += [one.output * job.stream_bytes + one.more for one in at_blocks]
    itemsize, needed = moe.model.dtype.itemsize, []
    keeps_attention = recipe.quantizes and recipe.solver.needs
    for index, one in enumerate(at_blocks):
        before = states[0] if index == 0 else 2 * states[index]
        checkpoint = 0 if index == 0 else states[0] if index == 1 else 2 * states[index - 1]
        router, experts = one.router_input * job.stream_bytes, one.expert_input * job.stream_bytes
        attention, after = one.attention_input * itemsize if keeps_attention else 0, states[index + 1]
        at_the_end = 2 * after + (0 if job.block_epochs else attention)
        needed.append(checkpoint + before + router + max(after + attention + experts, at_the_end))
    return max(needed) * job.num_windows, max(one.output * itemsize + one.more for one in at_blocks)


def num_quantized_of(block: Block) -> int:
    return sum(weight.numel() for _, weight in block.weights().values())


def step_bytes(quantized: int, kinds: Collection[str], activations: float) -> float:
    """Memory traffic of a step that trains this many quantized weights, besides matrix products."""
    decoded = DECODED_BYTES if trains_weights(kinds) else 0
    return quantized * (decoded + TRAINED_BYTES * ("code" in kinds)) + STEP_PASSES * activations


def block_activations(shapes: Shapes, hidden: int, itemsize: int, tokens: int) -> float:
    """Memory of a block's activations in a step that trains it, and of the expert that is decoded, with gradients."""
    experts = sum(rows * columns for rows, columns in shapes.experts)
    per_token = itemsize * (12 * hidden + 4 * shapes.shared_activations) + 16 * shapes.top_k * hidden
    return tokens * per_token + 16 * experts


class Shapes:
    """Arithmetic and memory of a block per token, and its linear layers as (input group, O, I)."""

    def __init__(self, block: Block, top_k: int, hidden: int, job: Job) -> None:
        linears = [
            (part, f"{n.rpartition('.')[0]}/{n if n.rpartition('.')[2] in LAST else block.linear(n).in_features}", *w)
            for n, part in block.linears.items()
            for w in [tuple(block.linear(n).weight.shape)]
        ]
        self.attention = [(group, rows, columns) for part, group, rows, columns in linears if part == "attention"]
        self.shared = [(group, rows, columns) for part, group, rows, columns in linears if part == "shared"]
        heads = [columns for group, _, columns in self.attention if group.rpartition(".")[2] in LAST]
        length, itemsize = job.window_length, next(block.layer.parameters()).element_size()
        self.itemsize = itemsize
        self.attention_input = heads[0] if heads else hidden  # numbers that the output projection reads
        scores = 2 * length * max(heads, default=hidden)  # queries with keys and attention weights with values, causal
        self.attention_forward = sum(2 * rows * columns for _, rows, columns in self.attention) + scores
        self.forward = self.attention_forward + sum(2 * rows * columns for _, rows, columns in self.shared)
        self.activations = self.shared_activations = sum(rows for _, rows, _ in self.shared)
        self.top_k, self.experts = top_k, []
        self.num_experts = round(block.num_experts * job.share(block.num_experts)) if block.is_moe else 0
        if block.is_moe:
            self.experts = block.experts.shapes
            self.forward += top_k * sum(2 * rows * columns for rows, columns in self.experts)
            self.forward += 2 * block.num_experts * hidden
            self.activations += top_k * sum(rows for rows, _ in self.experts)
        self.touched = itemsize * 4 * (8 * hidden + self.activations)  # memory traffic of the activations


def gram_flops(tokens: float, columns: int) -> float:
    """Operations of a Hessian: only the tiles on and above the diagonal are computed."""
    return tokens * columns * (columns + min(TILE, columns))


def job_of(
    module: Any, data: Any, moe: MoEModel, processes: int, device: str, memory: float, stored_share: float = 1.0
) -> Job:
    """The `Job` of the options of `fit`. Held-out text counts if its length is set or the text can be read."""
    if data.num_heldout_windows is not None:
        heldout = len(data.heldout) * data.num_heldout_windows
    else:
        try:
            heldout = sum(len(windows) for windows in data.heldout_windows.values())
        except (OSError, ValueError, ConnectionError):
            heldout = 0
    dtype = moe.model.dtype if module.stream_dtype == "auto" else getattr(torch, module.stream_dtype)
    return Job(
        num_windows=data.num_calibration_windows,
        window_length=data.window_length,
        batch_size=data.batch_size,
        micro_batch_size=data.micro_batch_size,
        heldout_tokens=heldout * data.window_length,
        floor_tokens=min(heldout, len(data.heldout) * data.noise_floor) * data.window_length,
        router_method=module.router_method,
        router_epochs=module.router_epochs,
        num_targets=module.router_loss.num_targets(moe.num_experts, moe.top_k),
        block_epochs=module.block_epochs,
        joint_epochs=module.joint_epochs,
        block_kinds=tuple(module.kinds("block")),
        joint_kinds=tuple(module.kinds("joint")),
        stream_bytes=dtype.itemsize,
        processes=processes,
        kept_experts=module.pruning.keep if module.pruning and module.pruning.keep != "auto" else None,
        device=device,
        stored_share=stored_share,
        memory=memory,
        **module.chosen_bits.measured(data.num_calibration_windows, data.window_length),
        sampled_windows=sum(
            data.windows_by_text[name] for name, source in data.sampled_texts.items() if source.model is None
        ),
    )
