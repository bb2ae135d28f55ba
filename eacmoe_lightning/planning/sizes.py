"""Arithmetic, memory and disk of a run by phase, from the shapes of a model and the options of `fit` alone.

Counts are of multiplications and additions (2 for each weight that a token meets). They are those of the code as it is:
the streams go through a block twice, attention is run up to each group of linears that is solved, a Hessian [I, I] is
made of all tokens that reach it, and GPTQ factors it (4/3 I^3), spreads errors (O I^2) and weighs them (4 O I^2).
Letters: N tokens, D hidden, F expert width, E experts, K top_k, O/I out/in features.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from eacmoe_lightning.adapter import Block, MoEModel
from eacmoe_lightning.recipe import Recipe, num_quantized
from eacmoe_lightning.targets import WeightGrid

GENERATIONS = 3  # of both streams on disk while a block is left: before it, behind it, and of the last checkpoint
STACK_BYTES = 4 << 30  # that a stack of experts takes while it is solved; one expert where that is more
LAST = ("o_proj", "out_proj", "down_proj", "dense", "w2")  # linears that share their input with no other


@dataclass(frozen=True)
class Job:
    """What the cost depends on besides the model and its recipe.

    Attributes:
        num_windows, window_length, batch_size: of the calibration text.
        heldout_tokens: of the evaluation at the end.
        router_method, router_epochs, num_targets, joint_epochs, trains_scales: as `fit` has them.
        stream_bytes: of a number in the hidden streams on disk.
        processes: that share windows and experts.
    """

    num_windows: int
    window_length: int
    batch_size: int
    heldout_tokens: int
    router_method: str
    router_epochs: int
    num_targets: int
    joint_epochs: int
    trains_scales: bool
    stream_bytes: int
    processes: int = 1

    @property
    def tokens(self) -> int:
        return self.num_windows * self.window_length


@dataclass
class Cost:
    """Of one phase over all blocks.

    Attributes:
        flops: in the model's dtype.
        flops32: in float32, whatever the model's dtype.
        loop_bytes: that GPTQ's column loop touches.
        read_bytes, written_bytes: from and to disk.
        peak_bytes: of one process, at the worst block, without what Python itself takes.
    """

    flops: float = 0.0
    flops32: float = 0.0
    loop_bytes: float = 0.0
    read_bytes: float = 0.0
    written_bytes: float = 0.0
    peak_bytes: float = 0.0

    def add(self, peak_bytes: float = 0.0, **more: float) -> None:
        for name, value in more.items():
            setattr(self, name, getattr(self, name) + value)
        self.peak_bytes = max(self.peak_bytes, peak_bytes)


PHASES = ("read", "observe", "attention", "router", "experts", "replay", "joint", "write", "evaluate")


@dataclass
class Plan:
    """What `fit` will take."""

    phases: dict[str, Cost] = field(default_factory=lambda: {name: Cost() for name in PHASES})
    disk: dict[str, int] = field(default_factory=dict)  # bytes by what they are for

    @property
    def peak_bytes(self) -> float:
        return max(phase.peak_bytes for phase in self.phases.values())

    @property
    def disk_bytes(self) -> int:
        return sum(self.disk.values())


def weight_grids(moe: MoEModel, recipe: Recipe) -> list[WeightGrid]:
    """How each weight is going to be quantized."""
    grids = []
    for block in moe.blocks:
        for name, (part, weight) in block.weights().items():
            grid, shape = recipe.grid(block.index, len(moe.blocks), part), tuple(weight.shape)
            groups: dict[int, list[int]] = {grid.bits: []}
            if part == "experts":
                projection = name.rpartition(".")[2]
                bits = recipe.expert_bits(block.index, len(moe.blocks), projection, range(block.num_experts))
                groups = {b: [e for e, own in enumerate(bits) if own == b] for b in sorted(set(bits))}
            for bits, experts in groups.items():
                some = tuple(experts) if len(groups) > 1 else None
                grids.append(
                    WeightGrid(name, block.index, part, shape, bits, grid.group_size, recipe.symmetric, experts=some)
                )
    return grids


def packed_bytes(grids: Iterable[WeightGrid]) -> int:
    """Codes, float16 scales and 8-bit zero points."""
    total = 0.0
    for grid in grids:
        *stack, rows, columns = grid.shape
        number = len(grid.experts) if grid.experts is not None else (stack[0] if stack else 1)
        total += number * rows * (columns * grid.bits / 8 + 3 * columns / grid.group_size)
    return int(total)


def num_bytes(parameters: Iterable, itemsize: int) -> int:
    return sum(parameter.numel() for parameter in parameters) * itemsize


def joint_bytes(moe: MoEModel, trains_scales: bool) -> int:
    """Memory that the joint stage takes for weights: all of them in the model's dtype and, where scales are trained,
    the codes (a byte each), what is decoded from them and the gradients of that. Activations come on top."""
    itemsize = moe.model.dtype.itemsize
    whole = num_bytes(moe.model.parameters(), itemsize)
    return whole + (num_quantized(moe) * (1 + 2 * itemsize) if trains_scales else 0)


def disk_use(moe: MoEModel, recipe: Recipe, job: Job) -> dict[str, int]:
    """Bytes that a run directory takes at most, by what they are for."""
    hidden = job.tokens * moe.config.hidden_size * job.stream_bytes
    packed, itemsize = packed_bytes(weight_grids(moe, recipe)), moe.model.dtype.itemsize
    rest = num_bytes(moe.model.parameters(), itemsize) - num_quantized(moe) * itemsize
    evaluated = 2 * job.heldout_tokens * moe.config.hidden_size * itemsize
    teachers = sum(block.num_experts for block in moe.moe_blocks) * job.tokens * 2 if job.joint_epochs else 0
    return {
        "hidden streams": (2 * GENERATIONS + 1) * hidden,  # and what reaches the router
        "router logits for the joint stage": teachers,
        "finished blocks": packed,
        "compressed model": packed + rest,
        "hidden states of the evaluation": evaluated,
    }


def plan(moe: MoEModel, recipe: Recipe, job: Job) -> Plan:
    """The costs of `fit` for a model of which only the shapes are known (parameters may be on the meta device)."""
    result = Plan(disk=disk_use(moe, recipe, job))
    phases, itemsize, hidden = result.phases, moe.model.dtype.itemsize, moe.config.hidden_size
    in_blocks = sum(num_bytes(block.layer.parameters(), itemsize) for block in moe.blocks)
    rest = num_bytes(moe.model.parameters(), itemsize) - in_blocks
    vocabulary = moe.model.get_output_embeddings().weight.shape[0]
    stream = job.tokens * hidden * job.stream_bytes
    batch = job.batch_size * job.window_length
    share = 1 / job.processes
    for block in moe.blocks:
        size = num_bytes(block.layer.parameters(), itemsize)
        shapes = _Shapes(block, moe.top_k, hidden, job.window_length)
        largest = max(parameter.numel() for parameter in block.layer.parameters()) * itemsize
        here = rest + size
        active = here + batch * itemsize * (8 * hidden + shapes.activations)
        routing = job.tokens * share * (4 * block.num_experts + 24 * moe.top_k)
        phases["read"].add(here + 2 * largest, read_bytes=2 * size)  # once to check it, once to calibrate it
        forward = dict(flops=job.tokens * shapes.forward * share)
        phases["observe"].add(active + routing, **forward, read_bytes=stream, written_bytes=stream)
        phases["replay"].add(active + routing, **forward, read_bytes=stream, written_bytes=stream)
        _linears(phases["attention"], shapes.attention, job.tokens * share, here)
        passes = len({name for name, *_ in shapes.attention}) + 1
        phases["attention"].add(active, flops=job.tokens * share * passes * shapes.attention_forward)
        phases["attention"].add(written_bytes=stream, read_bytes=passes * stream)
        _linears(phases["experts"], shapes.shared, job.tokens * share, here)
        if block.is_moe:
            _router(phases["router"], block, job, hidden, here + routing, share)
            _experts(phases["experts"], shapes, job, here + routing, share)
    if job.joint_epochs:
        forward = sum(_Shapes(b, moe.top_k, hidden, job.window_length).forward for b in moe.blocks)
        activations = batch * 4 * (len(moe.blocks) * (12 * hidden + 4 * shapes.activations) + 4 * vocabulary)
        phases["joint"].add(
            joint_bytes(moe, job.trains_scales) + rest + activations,
            flops=3 * job.joint_epochs * job.tokens * share * (forward + 4 * hidden * vocabulary),
        )
    block_size = max(num_bytes(block.layer.parameters(), itemsize) for block in moe.blocks)
    codes = result.disk["compressed model"]
    phases["write"].add(2 * rest + block_size, read_bytes=codes, written_bytes=codes)
    evaluations = 1 if job.router_method == "none" else 2  # before and after calibration
    forward = sum(_Shapes(b, moe.top_k, hidden, job.window_length).forward for b in moe.blocks)
    phases["evaluate"].add(
        2 * (rest + block_size) + batch * 8 * hidden * itemsize + job.window_length * 8 * vocabulary,
        flops=2 * evaluations * job.heldout_tokens * share * (forward + 2 * hidden * vocabulary),
        read_bytes=evaluations * (in_blocks + codes),
    )
    return result


class _Shapes:
    """One block as numbers per token, and its linears as (input group, O, I)."""

    def __init__(self, block: Block, top_k: int, hidden: int, length: int) -> None:
        linears = [
            (part, f"{n.rpartition('.')[0]}/{n if n.rpartition('.')[2] in LAST else block.linear(n).in_features}", *w)
            for n, part in block.linears.items()
            for w in [tuple(block.linear(n).weight.shape)]
        ]
        self.attention = [(group, rows, columns) for part, group, rows, columns in linears if part == "attention"]
        self.shared = [(group, rows, columns) for part, group, rows, columns in linears if part == "shared"]
        heads = [columns for group, _, columns in self.attention if group.rpartition(".")[2] in LAST]
        scores = 2 * length * max(heads, default=hidden)  # of queries with keys and of weights with values, causal
        self.attention_forward = sum(2 * rows * columns for _, rows, columns in self.attention) + scores
        self.forward = self.attention_forward + sum(2 * rows * columns for _, rows, columns in self.shared)
        self.activations = sum(rows for _, rows, _ in self.shared)
        self.top_k, self.num_experts, self.experts = top_k, block.num_experts, []
        if block.is_moe:
            self.experts = [tuple(block.experts.weight(p).shape[-2:]) for p in block.experts.projections]
            self.forward += top_k * sum(2 * rows * columns for rows, columns in self.experts)
            self.forward += 2 * block.num_experts * hidden
            self.activations += top_k * sum(rows for rows, _ in self.experts)


def gptq_flops(rows: int, columns: int) -> float:
    return 4 / 3 * columns**3 + 5 * rows * columns**2


def solve_bytes(rows: int, columns: int) -> int:
    """The Hessian, its factor and its inverse; the weight, its codes and errors: float32."""
    return 4 * (4 * columns**2 + 4 * rows * columns)


def loop_bytes(rows: int, columns: int) -> float:
    """Each column spreads its error over half a group of 128, read and written."""
    return rows * columns * 64 * 8


def _linears(cost: Cost, linears: list[tuple[str, int, int]], tokens: float, here: float) -> None:
    """A Hessian for each group of linears with the same input, of this process's tokens; every process solves all."""
    for columns in {group: columns for group, _, columns in linears}.values():
        cost.add(flops32=2 * tokens * columns**2)
    for _, rows, columns in linears:
        peak = here + solve_bytes(rows, columns)
        cost.add(peak, flops32=gptq_flops(rows, columns), loop_bytes=loop_bytes(rows, columns))


def _router(cost: Cost, block: Block, job: Job, hidden: int, here: float, share: float) -> None:
    experts = block.num_experts
    if job.router_method == "ridge":
        cost.add(
            here + 3 * 4 * experts * hidden**2,
            flops32=2 * job.tokens * share * job.num_targets * hidden**2 + 2 * 2 / 3 * experts * hidden**3,
        )
    elif job.router_method == "sgd":
        stream = job.tokens * share * hidden * job.stream_bytes
        cost.add(
            here,
            flops32=6 * job.router_epochs * job.tokens * share * experts * hidden,
            read_bytes=job.router_epochs * stream,
        )


def _experts(cost: Cost, shapes: _Shapes, job: Job, here: float, share: float) -> None:
    """Hessians of this process's tokens; solves of its share of the experts."""
    (up_rows, up_columns), (down_rows, down_columns) = shapes.experts
    sent = job.tokens * share * shapes.top_k
    each = max(solve_bytes(rows, columns) for rows, columns in shapes.experts)
    stack = max(each, min(shapes.num_experts * each, STACK_BYTES))
    cost.add(here + stack, flops=2 * sent * up_rows * up_columns, flops32=2 * sent * (up_columns**2 + down_columns**2))
    solved = shapes.num_experts * share
    for rows, columns in shapes.experts:
        cost.add(flops32=solved * gptq_flops(rows, columns), loop_bytes=solved * loop_bytes(rows, columns))
