"""How weights are quantized, as exports and engines see it: one grid a weight, and the linears in it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

FUSED: dict[str, tuple[str, ...]] = {  # linears of the same inputs that vLLM and SGLang load as one, by its name there
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "w13": ("w1", "w3"),
    "in_proj_qkvz": ("in_proj_qkv", "in_proj_z"),
    "in_proj_ba": ("in_proj_b", "in_proj_a"),
    "fused_qkv_a_proj": ("q_a_proj", "kv_a_proj_with_mqa"),  # vLLM
    "fused_qkv_a_proj_with_mqa": ("q_a_proj", "kv_a_proj_with_mqa"),  # SGLang
}


@dataclass(frozen=True)
class WeightGrid:
    """How one weight is quantized, or will be.

    Attributes:
        name: name of the parameter in memory, e.g. `model.layers.3.mlp.experts.down_proj`.
        block: index of its block.
        part: `attention`, `shared` or `experts`.
        shape: [..., O, I].
        bits, group_size, symmetric: the grid.
        experts: the experts of a stack that have this grid; None: all.
        on_lattice: whether the matrix has one step and codes stored at their entropy, instead of groups.
        kquant: its type, if it is in llama.cpp's blocks.
    """

    name: str
    block: int
    part: str
    shape: tuple[int, ...]
    bits: int | float
    group_size: int
    symmetric: bool
    experts: tuple[int, ...] | None = None
    on_lattice: bool = False
    kquant: str | None = None


@dataclass(frozen=True)
class Original:
    """What formats ask about the original.

    Attributes:
        model_type: in its config.
        stacked: the first tensor of its checkpoint that holds the experts of a block together; None: each expert has
            its own tensors.
    """

    model_type: str
    stacked: str | None


def split_projection(stack: str) -> tuple[str, ...]:
    """The linears of one expert in a stack, by the stack's name in memory, in the order of its rows."""
    projection = stack.rpartition(".")[2]
    return ("gate_proj", "up_proj") if projection == "gate_up_proj" else (projection,)


def by_bits(bits: int | Sequence[int]) -> list[tuple[int, tuple[int, ...] | None]]:
    """Each width in bits of a weight, and the experts of its stack that have it (None: all)."""
    widths = {*bits} if isinstance(bits, Sequence) else {bits}
    if len(widths) == 1:
        return [(*widths, None)]
    return [(width, tuple(e for e, b in enumerate(bits) if b == width)) for width in sorted(widths)]


def wholes_of(module: str) -> list[str]:
    """The names that vLLM and SGLang give to the linear that a module is part of; none: they load it alone."""
    parent, _, linear = module.rpartition(".")
    return [f"{parent}.{whole}" for whole, parts in FUSED.items() if linear in parts]


def fused_names(modules: Iterable[str]) -> list[str]:
    """Those of `wholes_of` these modules whose parts are all among them, sorted."""
    modules = set(modules)
    wholes = {whole for module in modules for whole in wholes_of(module)}
    parts = {whole: FUSED[whole.rpartition(".")[2]] for whole in wholes}
    return sorted(w for w in wholes if all(f"{w.rpartition('.')[0]}.{part}" in modules for part in parts[w]))
