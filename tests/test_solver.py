"""A block's experts: the result does not depend on how many are solved together; starved ones borrow tokens."""

from pathlib import Path

import pytest
import tiny_models
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from eacmoe_lightning.calibration import solver as solving
from eacmoe_lightning.calibration.recipe import Recipe
from eacmoe_lightning.calibration.solver import BlockSolver
from eacmoe_lightning.models.experts import Experts
from eacmoe_lightning.models.moe import MoEModel
from eacmoe_lightning.quantization.grid import Quantized
from eacmoe_lightning.run.ranks import Ranks


def solve(**options) -> tuple[dict[str, Quantized], BlockSolver]:
    """The routed experts of a tiny model's first block, from random tokens."""
    block = MoEModel(tiny_models.build("mixtral").requires_grad_(False)).blocks[0]
    solver = BlockSolver(block, 3, Recipe(bits=(2,), group_size=32, **options), Ranks())
    x = torch.randn(400, 64, generator=torch.Generator().manual_seed(0))
    solver.solve_experts(x, block.route(x))
    return solver.solved, solver


def same(a: Tensor, b: Tensor) -> float:
    return float((a == b).float().mean())


def test_the_memory_limit_changes_only_how_many_experts_are_solved_together():
    together, alone = solve(min_expert_tokens=1)[0], solve(min_expert_tokens=1, solver_gib=1e-9)[0]
    assert together.keys() == alone.keys() and len(together) == 2
    for name, quantized in together.items():
        assert same(quantized.codes, alone[name].codes) > 0.99  # batched products may sum in another order
        assert same(quantized.scale, alone[name].scale) > 0.9


@pytest.mark.parametrize("affinity", [False, True])
def test_an_experts_tokens_run_in_parts_of_bounded_size(affinity, monkeypatch):
    options = {"min_expert_tokens": 150, "affinity": affinity}
    (whole, solver), widest, seen = solve(**options), 128, []  # gate and up of 64 each
    intermediate = Experts.intermediate

    def watched(self: Experts, x: Tensor, *more) -> Tensor:
        seen.append(len(x))
        return intermediate(self, x, *more)

    monkeypatch.setattr(Experts, "intermediate", watched)
    monkeypatch.setattr(solving, "ROWS_BYTES", 7 * 4 * widest)
    parts, in_parts = solve(**options)
    assert max(seen) == 7 and sum(seen) >= 8 * 150
    for name, quantized in whole.items():
        assert same(quantized.codes, parts[name].codes) > 0.99  # the order of sums
        assert in_parts.error[name] == pytest.approx(solver.error[name], rel=1e-2)


WORLD = 3  # divides neither 8 experts nor 400 tokens
MIXED = {0: {"experts.3": 4, "experts.5.down_proj": 3}}


def solve_a_share(rank: int, world: int, folder: Path) -> None:
    """Solves one process's share from its tokens, and saves the experts that it holds afterwards."""
    dist.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=world)
    block = MoEModel(tiny_models.build("mixtral").requires_grad_(False)).blocks[0]
    recipe = Recipe(bits=(2,), group_size=32, min_expert_tokens=1, overrides=MIXED)
    solver = BlockSolver(block, 3, recipe, Ranks(rank, world))
    x = torch.randn(400, 64, generator=torch.Generator().manual_seed(0))[
        400 * rank // world : 400 * (rank + 1) // world
    ]
    solver.solve_experts(x, block.route(x))
    torch.save((solver.solved, solver.error), folder / f"{rank}.pt")
    dist.destroy_process_group()


def test_processes_divide_experts_of_mixed_bits(tmp_path):
    mp.spawn(solve_a_share, (WORLD, tmp_path), WORLD)
    alone, solver = solve(min_expert_tokens=1, overrides=MIXED)
    shares = [torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(WORLD)]
    for name, quantized in alone.items():
        for solved, error in shares:
            assert solved[name].bits == quantized.bits
            assert torch.equal(solved[name].codes, shares[0][0][name].codes)  # the same in all processes
            assert same(solved[name].codes, quantized.codes) > 0.97
            assert error[name] == pytest.approx(solver.error[name], rel=0.02)


@pytest.mark.parametrize("affinity", [False, True])
def test_a_starved_expert_borrows_the_tokens_with_the_highest_logits_for_it(affinity):
    block = MoEModel(tiny_models.build("mixtral").requires_grad_(False)).blocks[0]
    x = torch.randn(400, 64, generator=torch.Generator().manual_seed(0))
    routing = block.route(x)
    solver = BlockSolver(block, 3, Recipe(min_expert_tokens=150, affinity=affinity), Ranks())
    tokens, weights = solver._tokens(routing)
    for e, index in enumerate(tokens):
        routed = set((routing.ids == e).any(-1).nonzero().squeeze(1).tolist())
        others = [n for n in routing.logits[:, e].argsort(descending=True).tolist() if n not in routed]
        assert set(index.tolist()) == routed | set(others[: max(0, 150 - len(routed))])
        assert (e in solver.starved) == (len(routed) < 150)
        if affinity:
            torch.testing.assert_close(weights[e], routing.logits.softmax(-1)[index, e].square())
    assert solver.starved and (weights is None) == (not affinity)
