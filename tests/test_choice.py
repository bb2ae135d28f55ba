"""Routers that select by scores plus a correction: which experts the router losses compare."""

import architectures
import pytest
import torch

from eacmoe_lightning.models.experts import Groups
from eacmoe_lightning.models.moe import MoEModel
from eacmoe_lightning.routers.choice import SCORINGS, find_scoring
from eacmoe_lightning.routers.losses import TopKMSE

TOKENS = torch.randint(1, 4096, (2, 40), generator=torch.Generator().manual_seed(0))
CORRECTED = [
    name
    for name in ("afmoe", "deepseek_v3", "deepseek_v4", "glm4_moe", "hy_v3", "lfm2_moe", "minimax_m2", "solar_open")
    if name in architectures.ARCHITECTURES
]


@pytest.mark.parametrize("scoring", SCORINGS, ids=lambda scoring: scoring.__name__)
@pytest.mark.parametrize("num_groups", [1, 4])
def test_the_scoring_is_found_from_what_was_selected(scoring, num_groups):
    generator = torch.Generator().manual_seed(0)
    logits, correction = torch.randn(200, 16, generator=generator), torch.randn(16, generator=generator)
    scores = scoring(logits)
    correction = correction * scores.std()
    sums = scores + correction
    if num_groups > 1:  # the two groups with the largest sums of their two best experts
        groups = sums.view(200, num_groups, -1).topk(2, dim=-1).values.sum(-1)
        allowed = torch.zeros(200, num_groups).scatter(1, groups.topk(2).indices, 1).repeat_interleave(4, 1).bool()
        sums = sums.masked_fill(~allowed, -torch.inf)
    assert find_scoring(logits, sums.topk(4).indices, correction, num_groups) is scoring


def test_no_scoring_explains_a_random_selection():
    generator = torch.Generator().manual_seed(0)
    logits, correction = torch.randn(200, 16, generator=generator), torch.randn(16, generator=generator)
    assert find_scoring(logits, torch.rand(200, 16, generator=generator).topk(4).indices, correction) is None


@pytest.mark.parametrize("name", CORRECTED)
@torch.no_grad()
def test_the_largest_values_of_choice_are_the_selected_experts(name):
    moe, state, moved = MoEModel(architectures.build(name)), None, 0
    for block in moe.blocks:
        state, routing = block.forward(moe.call(block.index, TOKENS, state))
        if not block.is_moe or block.correction is None:
            continue  # a dense block, or DeepSeek-V4's selection by token
        of_choice, of_logits = (
            float((values.topk(block.top_k).indices.sort().values == routing.ids.sort().values).all(1).float().mean())
            for values in (block.choice(routing.logits), routing.logits)
        )
        assert block.scoring is not None
        if Groups.of(block).number == 1:  # with groups, experts of other groups may have larger values
            assert of_choice == 1
            moved += of_logits < 1
        else:
            moved += of_logits != of_choice
    assert moved  # the corrections of the tiny models change selections


def test_the_loss_compares_experts_that_were_selected():
    """The correction lifts expert 2 over expert 0, which has the largest logit."""
    teacher = torch.tensor([[2.0, 1.0, 0.0]])
    correction = torch.tensor([0.0, 0.0, 3.0])
    student = teacher + torch.tensor([[0.0, 0.0, 1.0]])
    loss = TopKMSE(k=1)
    assert float(loss(student, teacher, 1)) == 0
    assert float(loss(student.sigmoid() + correction, teacher.sigmoid() + correction, 1)) > 0
