"""Errors of a known size in chosen experts, and the weights put back afterwards.

Two kinds. A *codec* writes and reads the weights, and leaves the error that offloaded experts really have. A *noise* of
the same nominal size e is what MoE-Compression (arXiv 2509.07727) measured instead: N(0, e), whose root mean square is
e; `uniform-noise` in [-e, e] has that of an ideal codec, e / sqrt(3).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from eacmoe_lightning.models.block import Block
from eacmoe_lightning.offload.codecs import Bound, codec, decode

NOISES: dict[str, Callable[[Tensor, torch.Generator], Tensor]] = {
    "gaussian-noise": lambda weight, generator: torch.randn(weight.shape, generator=generator),
    "uniform-noise": lambda weight, generator: torch.rand(weight.shape, generator=generator) * 2 - 1,
}

BoundOf = Callable[[int, int], Bound]  # of a block and an expert


@dataclass
class Disturbance:
    """What was done to the experts: summed over their weights.

    Attributes:
        num_weights: of the disturbed experts.
        stored_bytes: of their records; 0 for a noise.
        squared_error, squared_weight: sums of (w - w')^2 and w^2.
    """

    num_weights: int = 0
    stored_bytes: int = 0
    squared_error: float = 0.0
    squared_weight: float = 0.0

    def summary(self) -> dict[str, float]:
        """`relative_error`, the root of the squared error over the squared weights; of a codec `bits` and bytes."""
        relative = (self.squared_error / max(self.squared_weight, 1e-300)) ** 0.5
        summary = {"num_weights": self.num_weights, "relative_error": relative}
        if self.stored_bytes:
            summary |= {"stored_bytes": self.stored_bytes, "bits": 8 * self.stored_bytes / self.num_weights}
        return summary


def disturb(weight: Tensor, kind: str, bound: Bound, generator: torch.Generator) -> tuple[Tensor, int]:
    """A weight with an error of this kind and size, in its own dtype, and the bytes of its record (0 for a noise).

    Args:
        weight: any shape and float dtype; not changed.
        generator: on CPU, read by noises only.

    Raises:
        ValueError: the weight holds NaN or infinite values.
    """
    if kind in NOISES:
        noise = NOISES[kind](weight, generator).to(weight.device) * bound.absolute(weight)
        return (weight.float() + noise).to(weight.dtype), 0
    record = codec(f"{kind}:{bound.mode}:{bound.value!r}").encode(weight)
    return decode(record).to(weight.device), len(record)


@contextmanager
def disturbed(
    blocks: list[Block], experts: Mapping[int, list[int]], kind: str, bound_of: BoundOf, seed_of: Callable[..., int]
) -> Iterator[Disturbance]:
    """While inside, the model's experts have errors; behind it, their weights again, whatever happened.

    Args:
        blocks: of the model; those that `experts` names are disturbed.
        experts: by block index, the experts.
        kind: see the head of this file.
        bound_of: the bound of a block's expert.
        seed_of: the noise's seed from block, projection and expert: one expert's noise is the same in all cells but
            for its size.
    """
    kept: list[tuple[Tensor, Tensor]] = []
    done = Disturbance()
    try:
        with torch.no_grad():
            for block in blocks:
                for projection in block.experts.projections if block.index in experts else ():
                    for expert in experts[block.index]:
                        weight = block.experts.weight(projection)[expert]
                        kept.append((weight, weight.clone()))
                        generator = torch.Generator().manual_seed(seed_of(block.index, projection, expert))
                        changed, size = disturb(weight, kind, bound_of(block.index, expert), generator)
                        done.num_weights += weight.numel()
                        done.stored_bytes += size
                        done.squared_error += (weight.double() - changed.double()).square().sum().item()
                        done.squared_weight += weight.double().square().sum().item()
                        weight.copy_(changed)
        yield done
    finally:
        with torch.no_grad():
            for weight, original in reversed(kept):
                weight.copy_(original)
