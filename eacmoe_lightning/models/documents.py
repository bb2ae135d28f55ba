"""Whether a model keeps documents apart that share a window.

Their position ids begin with 0 at each document. From such ids transformers makes a mask with which tokens attend to
their document alone, but many models have parts that read other tokens without a mask: convolutions, state spaces,
attention to selected tokens. So documents of one window are run alone as well, block by block, and must give the same.
"""

from __future__ import annotations

import inspect
from contextlib import nullcontext

import torch
from torch import Tensor

from eacmoe_lightning.models.block import Block, Call
from eacmoe_lightning.models.moe import MoEModel
from eacmoe_lightning.run.hidden import State, hidden_of

NUM_DOCUMENTS = 4  # of a window that are compared, the longest ones


def spans(position_ids: Tensor) -> list[slice]:
    """The documents of a window, from its position ids [T]."""
    starts = (position_ids == 0).nonzero().flatten().tolist()
    return [slice(start, end) for start, end in zip(starts, [*starts[1:], len(position_ids)], strict=True)]


def most_telling(position_ids: Tensor) -> int:
    """Of windows with these position ids [S, T], the one with the longest document that is not its first."""
    longest = [max((span.stop - span.start for span in spans(row)[1:]), default=0) for row in position_ids]
    return longest.index(max(longest))


class DocumentsAlone:
    """Documents of one window, run alone beside it.

    Args:
        moe: the model.
        input_ids, position_ids: the window [1, T].

    Raises:
        ValueError: the model takes no position ids.
    """

    def __init__(self, moe: MoEModel, input_ids: Tensor, position_ids: Tensor) -> None:
        self.moe, self.input_ids = moe, input_ids
        later = sorted(spans(position_ids[0])[1:], key=lambda span: span.start - span.stop)
        self.states: dict[tuple[int, int], State | None] = {(s.start, s.stop): None for s in later[:NUM_DOCUMENTS]}
        parameters = inspect.signature(moe.model.forward).parameters.values()
        if not any(p.name == "position_ids" or p.kind == p.VAR_KEYWORD for p in parameters):
            raise self._error("its forward pass takes no position ids")

    def check(self, block: Block, call: Call) -> None:
        """Compares the documents alone with the window in one block; to be called with every block in order.

        The experts are left out, because they read single tokens, and because rounding may send tokens to others.

        Args:
            block: with its weights in memory.
            call: the block's call for the window.

        Raises:
            ValueError: a document differs.
        """
        with block.without_experts() if block.is_moe else nullcontext():
            together = hidden_of(block.forward(call)[0])
        for (start, end), state in self.states.items():
            alone = self.moe.call(block.index, self.input_ids[:, start:end], state)
            if block.index == 0:
                self.compare(block, call.hidden[:, start:end], alone.hidden)
            alone = alone.with_hidden(call.hidden[:, start:end])  # so that rounding does not add up over blocks
            with block.without_experts() if block.is_moe else nullcontext():
                state, _ = block.forward(alone)
            self.compare(block, together[:, start:end], hidden_of(state))
            if not isinstance(state, Tensor):  # the next call needs more of it than the hidden states
                state, _ = block.forward(alone)
            self.states[start, end] = state

    def compare(self, block: Block, together: Tensor, alone: Tensor) -> None:
        """Compares what a document's tokens [1, n, ...] are in the window and alone; not where those alone overflow."""
        if together.shape != alone.shape:
            raise self._error(f"{block.name}: the shape {tuple(together.shape)}, and {tuple(alone.shape)} alone")
        difference = self.difference(together, alone)
        is_same = difference <= max(3 * torch.finfo(alone.dtype).eps, 1e-4)  # False for NaN
        if alone.isfinite().all() and not is_same:
            raise self._error(f"{block.name}: a token differs by {difference:.2g} of its norm from its document alone")

    @staticmethod
    def difference(together: Tensor, alone: Tensor) -> float:
        """The largest of any token, relative to its norm."""
        one, other = (x.flatten(2).double() for x in (together, alone))
        return float(((one - other).norm(dim=-1) / other.norm(dim=-1).clamp(min=1e-30)).max())

    def _error(self, reason: str) -> ValueError:
        return ValueError(
            f"{self.moe.config.model_type} does not keep documents of one window apart ({reason}), so they cannot "
            "share windows (--data.documents packed): pass --data.documents separate, which begins a window with "
            "every document"
        )
