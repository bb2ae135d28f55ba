"""How much the original's predictions depend on what each block hands over for each token.

That is the mean square of the gradient of -log p(y) with respect to a token's hidden states behind the block, with the
next tokens y drawn from the original's own distribution: the trace of their Fisher information, as in the block
reconstruction of BRECQ (arXiv 2102.05426), for whole tokens instead of single numbers. The block stage weights its
squared error by it, so that it spends little on tokens whose continuation is certain anyway.

One forward and one backward pass through the original computes them, block by block, for as many windows at a time as
their hidden states between all blocks fit into `BORDER_BYTES` of host memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor

from eacmoe_lightning.calibration.streams import Streams
from eacmoe_lightning.models.block import Block
from eacmoe_lightning.models.moe import MoEModel
from eacmoe_lightning.run.hidden import HiddenFile, HiddenWriter, State, moved
from eacmoe_lightning.run.memory import available_memory
from eacmoe_lightning.tuning.chain import Chain

BORDER_BYTES = 16 << 30


class TokenWeights:
    """The weights of this process's tokens, with a mean of 1 over all counted tokens of each block.

    Args:
        file: [S, L, T], as `measure` writes them: windows, blocks, tokens.
        streams: of the same windows.
    """

    def __init__(self, file: HiddenFile, streams: Streams) -> None:
        self.file, self.streams = file, streams
        total = torch.zeros(2, file.shape[1], dtype=torch.float64)
        for rows in streams.slices:
            counted = streams.counted(file[rows].transpose(1, 2).flatten(0, 1), rows).double()
            total += torch.stack([counted.sum(0), torch.full((file.shape[1],), float(len(counted)))])
        sums, numbers = streams.ranks.sum(total)
        self._means = (sums / numbers.clamp(min=1)).clamp(min=torch.finfo(torch.float32).tiny)

    def rows(self, block: int, local: Tensor) -> Tensor:
        """The weights [b, T] behind a block, for windows of this process [b]; in host memory."""
        return self.file[local][:, block] / float(self._means[block])


def windows_together(moe: MoEModel, window_length: int, batch_size: int, memory: float) -> int:
    """How many windows go through the model at a time: whole batches."""
    border = len(moe.blocks) * window_length * moe.config.hidden_size * moe.model.dtype.itemsize
    return max(1, int(min(BORDER_BYTES, memory / 4) / border / batch_size)) * batch_size


def measure(streams: Streams, batch_size: int, seed: int) -> TokenWeights:
    """The weights of this process's tokens, from their file if a killed run has left it.

    Args:
        streams: of the windows; they stay where they are.
        batch_size: windows per pass of a block.
        seed: of the next tokens that are drawn, beside the window's number.
    """
    moe, path, note = streams.moe, streams.token_weights_path, streams.note
    if HiddenFile.is_finished(path):
        return TokenWeights(HiddenFile.open(path, note), streams)
    writer, together = (
        HiddenWriter(path, torch.float32),
        windows_together(moe, streams.windows.shape[1], batch_size, available_memory(torch.device("cpu"))),
    )
    for start in range(0, len(streams.windows), together):
        writer.append(_measured(streams, slice(start, start + together), batch_size, seed))
    if not len(streams.windows):
        writer.append(torch.empty(0, len(moe.blocks), streams.windows.shape[1]))
    return TokenWeights(writer.finish(note), streams)


def _measured(streams: Streams, windows: slice, batch_size: int, seed: int) -> Tensor:
    """The weights [b, L, T] of some windows, without scale."""
    moe = streams.moe
    ids, positions = streams.batch(windows)
    blocks = [_BlockStep(moe, block, ids, positions, batch_size) for block in moe.blocks]
    numbers = torch.arange(len(ids)) + streams.first_window + windows.start
    head = _HeadStep(moe, ids, [seed + int(number) for number in numbers])
    chain = Chain([*blocks, head], len(ids), moe.device, nullcontext)
    inputs, _ = chain.forward_kept(runs_last=False)
    weights = torch.zeros(len(ids), len(moe.blocks), ids.shape[1])
    counts = streams.counts
    gradient = torch.ones(ids.numel()) if counts is None else counts[windows].flatten().float()
    for step, of_inputs, _ in chain.backward(inputs, gradient.to(moe.device)):
        before = len(moe.blocks) - 1 if step is head else step.block.index - 1
        hidden = next(one for one in of_inputs if one is not None)
        weights[:, before] = hidden.float().square().flatten(2).mean(-1).cpu()
        if before == 0:
            break  # nobody asks what goes into the first block
    return weights


@dataclass
class _BlockStep:
    """A block of the original as a step of a chain."""

    moe: MoEModel
    block: Block
    input_ids: Tensor
    position_ids: Tensor | None
    at_once: int
    trained: list[Tensor] = field(default_factory=list)

    @contextmanager
    def loaded(self) -> Iterator[None]:
        with self.moe.loaded(self.block.index):
            yield

    def run(self, state: State | None, rows: slice) -> tuple[State, None]:
        state = None if state is None else moved(state, self.moe.device)
        positions = None if self.position_ids is None else self.position_ids[rows]
        call = self.moe.call(self.block.index, self.input_ids[rows], state, positions)
        expert = (lambda e, x: self.block.experts.output(x, e)) if self.block.is_moe else None
        return self.block.forward(call, expert=expert)[0], None


@dataclass
class _HeadStep:
    """The original's head: -log p of next tokens that it draws itself, a window at a time."""

    moe: MoEModel
    input_ids: Tensor
    seeds: list[int]
    at_once: int = 1
    trained: list[Tensor] = field(default_factory=list)

    @contextmanager
    def loaded(self) -> Iterator[None]:
        yield

    def run(self, state: State, rows: slice) -> tuple[None, Tensor]:
        logits = self.moe.head(moved(state, self.moe.device), self.input_ids[rows]).float()
        drawn = draw(logits.detach(), self.seeds[rows.start])
        return None, -logits.log_softmax(-1).gather(-1, drawn).flatten()


def draw(logits: Tensor, seed: int) -> Tensor:
    """A token from each distribution: logits [B, T, V] -> [B, T, 1]."""
    generator = torch.Generator(logits.device).manual_seed(seed)
    below = logits.softmax(-1).cumsum(-1)
    uniform = torch.rand(*logits.shape[:-1], 1, generator=generator, device=logits.device)
    return torch.searchsorted(below, uniform * below[..., -1:]).clamp(max=logits.shape[-1] - 1)
