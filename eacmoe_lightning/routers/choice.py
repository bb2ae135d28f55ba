"""What a router selects by: its scores plus a correction, if it has one (DeepSeek-V3, arXiv 2412.19437, section 2.1).

Such a router turns logits into scores, adds a bias to them that balances the load, and takes the largest sums; the
weights are made of the scores alone. So the largest logits are not the selected experts.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

Scoring = Callable[[Tensor], Tensor]  # router logits [N, E] -> scores [N, E]
AGREE = 0.99  # least share of tokens whose selection a scoring must reproduce


def _softmax(logits: Tensor) -> Tensor:
    return logits.softmax(-1)


def _square_root_of_softplus(logits: Tensor) -> Tensor:
    return nn.functional.softplus(logits).sqrt()


def _logits(logits: Tensor) -> Tensor:
    return logits


SCORINGS: tuple[Scoring, ...] = (torch.sigmoid, _softmax, _square_root_of_softplus, nn.functional.softplus, _logits)


def find_scoring(logits: Tensor, ids: Tensor, correction: Tensor, num_groups: int = 1) -> Scoring | None:
    """The scoring for which scores plus correction are largest at the selected experts; None if none is.

    Args:
        logits: [N, E].
        ids: [N, K], the selected experts.
        correction: [E].
        num_groups: of consecutive experts. A token selects from some groups only, so only experts of a group from
            which it selected are compared.
    """
    group_size = logits.shape[1] // num_groups
    groups = torch.zeros(len(ids), num_groups, dtype=torch.bool, device=ids.device).scatter(1, ids // group_size, True)
    others = groups.repeat_interleave(group_size, 1).scatter(1, ids, False)
    best, explained = None, AGREE
    for scoring in SCORINGS:
        sums = scoring(logits.float()) + correction.to(logits).float()
        weakest, strongest = sums.gather(1, ids).amin(1), sums.masked_fill(~others, -torch.inf).amax(1)
        share = float((weakest >= strongest).float().mean())
        if share > explained or (share == explained and best is None):
            best, explained = scoring, share
    return best
