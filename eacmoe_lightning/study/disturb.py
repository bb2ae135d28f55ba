"""Puts errors of a known size into chosen experts, and restores the weights afterwards.

There are two kinds of error. A *codec* encodes and decodes the weights and leaves the error that offloaded experts
really have. A *noise* has the same nominal size e. MoE-Compression (arXiv 2509.07727) measured `gaussian-noise`,
N(0, e), whose root mean square is e; `uniform-noise` in [-e, e] has that of an ideal codec, e / sqrt(3).
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

BoundOf = Callable[[int, int], Bound]  # from block and expert


@dataclass
class Disturbance:
    """Totals over the weights of the disturbed experts.

    Attributes:
        num_weights: number of weights.
        stored_bytes: size of their records; 0 for a noise.
        squared_error, squared_weight: sums of (w - w')^2 and w^2.
    """

    num_weights: int = 0
    stored_bytes: int = 0
    squared_error: float = 0.0
    squared_weight: float = 0.0

    def summary(self) -> dict[str, float]:
        """`num_weights`, `relative_error` (root mean square over that of the weights); for a codec bytes and `bits`."""
        relative = (self.squared_error / max(self.squared_weight, 1e-300)) ** 0.5
        summary = {"num_weights": self.num_weights, "relative_error": relative}
        if self.stored_bytes:
            summary |= {"stored_bytes": self.stored_bytes, "bits": 8 * self.stored_bytes / self.num_weights}
        return summary


def disturb(weight: Tensor, kind: str, bound: Bound, generator: torch.Generator) -> tuple[Tensor, int]:
    """A weight with an error of this kind and size, in its own dtype, and the size of its record (0 for a noise).

    Args:
        weight: any shape and float dtype; not changed.
        generator: on CPU, used by noises only.

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
    """Puts errors into the model's experts on entry, and restores their weights on exit, whatever happens inside.

    Args:
        blocks: blocks of the model; those in `experts` are disturbed.
        experts: the experts to disturb, by block index.
        kind: a codec or a noise, see the top of this file.
        bound_of: the bound of an expert, from block and expert.
        seed_of: the noise's seed, from block, projection and expert, so that in all cells an expert's noise differs
            only in size.
    """
    originals: list[tuple[Tensor, Tensor]] = []
    disturbance = Disturbance()
    try:
        with torch.no_grad():
            for block in blocks:
                for projection in block.experts.projections if block.index in experts else ():
                    for expert in experts[block.index]:
                        weight = block.experts.weight(projection)[expert]
                        originals.append((weight, weight.clone()))
                        generator = torch.Generator().manual_seed(seed_of(block.index, projection, expert))
                        changed, size = disturb(weight, kind, bound_of(block.index, expert), generator)
                        disturbance.num_weights += weight.numel()
                        disturbance.stored_bytes += size
                        disturbance.squared_error += (weight.double() - changed.double()).square().sum().item()
                        disturbance.squared_weight += weight.double().square().sum().item()
                        weight.copy_(changed)
        yield disturbance
    finally:
        with torch.no_grad():
            for weight, original in reversed(originals):
                weight.copy_(original)
