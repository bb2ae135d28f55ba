"""The experts of a block: how many at a time changes nothing, and who is starved borrows the right tokens."""

import pytest
import tiny_models
import torch
from torch import Tensor

from eacmoe_lightning.adapter import MoEModel
from eacmoe_lightning.grid import Quantized
from eacmoe_lightning.ranks import Ranks
from eacmoe_lightning.recipe import Recipe
from eacmoe_lightning.solver import BlockSolver


def solve(**options) -> tuple[dict[str, Quantized], BlockSolver]:
    """The routed experts of a tiny model's first block, from random tokens."""
    block = MoEModel(tiny_models.build("mixtral").requires_grad_(False)).blocks[0]
    solver = BlockSolver(block, 3, Recipe(bits=(2,), group_size=32, **options), Ranks())
    x = torch.randn(400, 64, generator=torch.Generator().manual_seed(0))
    solver.solve_experts(x, block.route(x))
    return solver.solved, solver


def same(a: Tensor, b: Tensor) -> float:
    return float((a == b).float().mean())


def test_memory_changes_nothing_but_the_number_of_experts_at_a_time():
    together, alone = solve(min_expert_tokens=1)[0], solve(min_expert_tokens=1, solver_gib=1e-9)[0]
    assert together.keys() == alone.keys() and len(together) == 2
    for name, quantized in together.items():
        assert same(quantized.codes, alone[name].codes) > 0.99  # products of one and of many may sum in another order
        assert same(quantized.scale, alone[name].scale) > 0.9


@pytest.mark.parametrize("affinity", [False, True])
def test_a_starved_expert_borrows_the_tokens_that_score_highest_for_it(affinity):
    block = MoEModel(tiny_models.build("mixtral").requires_grad_(False)).blocks[0]
    x = torch.randn(400, 64, generator=torch.Generator().manual_seed(0))
    routing = block.route(x)
    solver = BlockSolver(block, 3, Recipe(min_expert_tokens=150, affinity=affinity), Ranks())
    tokens, weights = solver._tokens(routing)
    for e, index in enumerate(tokens):
        own = set((routing.ids == e).any(-1).nonzero().squeeze(1).tolist())
        others = [n for n in routing.logits[:, e].argsort(descending=True).tolist() if n not in own]
        assert set(index.tolist()) == own | set(others[: max(0, 150 - len(own))])
        assert (e in solver.starved) == (len(own) < 150)
        if affinity:
            torch.testing.assert_close(weights[e], routing.logits.softmax(-1)[index, e].square())
    assert solver.starved and (weights is None) == (not affinity)
