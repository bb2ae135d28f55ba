"""Which epoch of `fit` does what: every block has router epochs and block epochs; joint epochs follow."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Epoch:
    """One epoch's place in the run.

    Attributes:
        stage: what it trains: a block's `router`, a whole `block`, or all blocks together (`joint`).
        block: index of its block; in the joint stage, the number of blocks.
        number, passes: its index among the stage's epochs, from 0, and how many of them there are.
    """

    stage: Literal["router", "block", "joint"]
    block: int
    number: int
    passes: int

    @property
    def is_first(self) -> bool:
        """Whether it is the first of its stage."""
        return self.number == 0

    @property
    def is_last(self) -> bool:
        """Whether it is the last of its stage."""
        return self.number == self.passes - 1


@dataclass(frozen=True)
class Epochs:
    """All epochs of a run.

    Attributes:
        num_blocks: number of the model's blocks.
        router, block: epochs of each block's two stages; the first has at least one.
        joint: epochs of the joint stage.
    """

    num_blocks: int
    router: int
    block: int
    joint: int

    @property
    def of_blocks(self) -> int:
        return self.num_blocks * (self.router + self.block)

    @property
    def total(self) -> int:
        return self.of_blocks + self.joint

    def at(self, epoch: int) -> Epoch:
        """The place of an epoch; those after the last count as joint."""
        if epoch >= self.of_blocks:
            return Epoch("joint", self.num_blocks, epoch - self.of_blocks, self.joint)
        block, number = divmod(epoch, self.router + self.block)
        if number < self.router:
            return Epoch("router", block, number, self.router)
        return Epoch("block", block, number - self.router, self.block)

    def leaves_block(self, epoch: int) -> bool:
        """Whether an epoch is the last of its block."""
        place = self.at(epoch)
        return place.is_last and place.stage == ("block" if self.block else "router")
