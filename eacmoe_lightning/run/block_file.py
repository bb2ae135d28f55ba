"""The file of a compressed block: its quantized weights, its router, and its statistics; and that of the head."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor

from eacmoe_lightning.quantization.packing import packed, take_quantized
from eacmoe_lightning.quantization.quantizers import QuantizedWeight
from eacmoe_lightning.run.directory import RunDirectory
from eacmoe_lightning.run.files import read_note, read_tensors, write_tensors


@dataclass
class RemovedExperts:
    """What pruning did to a block.

    Attributes:
        kept, removed: experts by their numbers in the original.
        removed_selections: the share of the calibration text's selections that went to the removed experts.
        scores: [E] the scores of all experts.
        below_alpha: experts that alpha would remove, kept because a token selects top_k.
    """

    kept: list[int]
    removed: list[int]
    removed_selections: float
    scores: list[float]
    below_alpha: list[int]


@dataclass
class Reconstruction:
    """What the block stage did to a block.

    Attributes:
        held_back: relative squared error of the block's output on the windows held back, before the first and after
            every pass; empty if no window was held back.
        taken: the pass whose result was taken: 0 for the solver's, otherwise the number of the pass.
        moved: share of the codes that differ from the solver's.
    """

    held_back: list[float]
    taken: int
    moved: float


@dataclass
class BlockStats:
    """Statistics of a block's calibration, over the tokens of all processes.

    Attributes:
        block, name: the block's index, and its name in the model.
        error: relative squared output error by parameter name (experts: the mean).
        expert_shift: change rates on the calibration text (`routers.expert_shift`), `before` and `after` the router's
            calibration; empty for a dense block.
        expert_load: [E] tokens routed to each of the original's experts, by the `original` and the `compressed` router.
        source_load: by calibration text, [E] its tokens routed to each of the original's experts by its router.
        starved: experts that fewer than `min_expert_tokens` tokens reached; None for a dense block.
        pruning: the removed experts; None if the run prunes nothing, or for a dense block.
        reconstruction: the block stage; None without it.
    """

    block: int
    name: str
    error: dict[str, float] = field(default_factory=dict)
    expert_shift: dict[str, dict[str, float]] = field(default_factory=dict)
    expert_load: dict[str, list[int]] = field(default_factory=dict)
    source_load: list[list[int]] = field(default_factory=list)
    starved: list[int] | None = None
    pruning: RemovedExperts | None = None
    reconstruction: Reconstruction | None = None

    @property
    def is_moe(self) -> bool:
        return bool(self.expert_shift)

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON values; leaves out those that a dense block does not have."""
        empty = {"expert_shift": {}, "expert_load": {}, "source_load": [], "starved": None, "pruning": None}
        empty |= {"reconstruction": None}
        return {name: value for name, value in asdict(self).items() if name not in empty or value != empty[name]}

    @classmethod
    def from_json(cls, stored: dict[str, Any]) -> BlockStats:
        parts = {"pruning": RemovedExperts, "reconstruction": Reconstruction}
        return cls(**stored | {name: part(**stored[name]) for name, part in parts.items() if name in stored})


def write_block(
    run: RunDirectory,
    stats: BlockStats,
    quantized: dict[str, QuantizedWeight],
    others: dict[str, Tensor],
    is_finished: bool = True,
) -> None:
    """Writes a block; `others` are tensors stored unquantized (the router, trained norms).

    With `is_finished` false it is the file that holds the block until the block stage has trained it.
    """
    note = {"quantized": _stored(quantized), "stats": stats.to_json()}
    path = run.block(stats.block) if is_finished else run.solved(stats.block)
    write_tensors(path, packed(quantized) | others, note)


def _stored(quantized: dict[str, QuantizedWeight]) -> dict[str, Any]:
    """What `take_quantized` needs to know of each weight."""
    return {name: {"bits": q.bits, "in_features": q.codes.shape[-1]} for name, q in quantized.items()}


def write_head(run: RunDirectory, head: dict[str, QuantizedWeight]) -> None:
    """Writes the quantized output head, by parameter name."""
    write_tensors(run.head, packed(head), {"quantized": _stored(head)})


def read_head(run: RunDirectory) -> dict[str, QuantizedWeight]:
    """The quantized output head by parameter name; empty if the run does not quantize it."""
    if not run.head.exists():
        return {}
    tensors, note = read_tensors(run.head)
    return {name: take_quantized(tensors, name, **spec) for name, spec in note["quantized"].items()}


def read_block(
    run: RunDirectory, index: int, is_finished: bool = True, is_checked: bool = True
) -> tuple[dict[str, QuantizedWeight], dict[str, Tensor], BlockStats]:
    """Reads a block: quantized weights and other tensors (router, norms) by parameter name, and statistics.

    `is_checked` false leaves out the file's checksum, for a file that is read many times.
    """
    tensors, note = read_tensors(run.block(index) if is_finished else run.solved(index), is_checked)
    quantized = {name: take_quantized(tensors, name, **spec) for name, spec in note["quantized"].items()}
    return quantized, tensors, BlockStats.from_json(note["stats"])


def read_stats(run: RunDirectory, index: int) -> BlockStats:
    """Reads only the statistics; does not read the tensors or check their checksum."""
    return BlockStats.from_json(read_note(run.block(index))["stats"])
