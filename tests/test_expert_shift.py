"""Expert-shift by hand: the three change rates with one, two and three experts per token."""

import pytest
import torch

from eacmoe_lightning.routers.expert_shift import (
    ExpertShift,
    change_counts,
    change_rates,
    expert_load,
    mean_rates,
    num_changed,
)


def rates_of(original: list[list[int]], ids: list[list[int]]) -> dict[str, float]:
    original, ids = torch.tensor(original), torch.tensor(ids)
    return change_rates(change_counts(original, ids), len(original), original.shape[1])


def test_number_of_changed_selections_by_hand():
    original = torch.tensor([[0, 1, 2], [0, 1, 2], [0, 1, 2], [0, 1, 2], [5, 4, 3]])
    ids = torch.tensor([[2, 0, 1], [0, 1, 7], [7, 2, 6], [5, 6, 7], [3, 4, 5]])
    assert num_changed(original, ids).tolist() == [0, 1, 2, 3, 0]


def test_one_expert_per_token():
    rates = rates_of([[0], [1], [2], [3]], [[0], [1], [2], [7]])
    assert rates == {"any": 0.25, "half": 0.25, "all": 0.25, "selections": 0.25}


def test_two_experts_per_token():
    """One of two changed is half, so `half` equals `any`."""
    original = [[0, 1]] * 4
    rates = rates_of(original, [[1, 0], [0, 5], [5, 1], [5, 6]])  # 0, 1, 1, 2 changed
    assert rates == {"any": 0.75, "half": 0.75, "all": 0.25, "selections": 0.5}


def test_three_experts_per_token():
    """One of three changed is less than half, two are more."""
    original = [[0, 1, 2]] * 5
    ids = [[0, 1, 2], [0, 1, 9], [9, 1, 8], [7, 8, 9], [2, 1, 0]]  # 0, 1, 2, 3, 0 changed
    assert rates_of(original, ids) == {"any": 3 / 5, "half": 2 / 5, "all": 1 / 5, "selections": 6 / 15}


@pytest.mark.parametrize("top_k", [1, 2, 3, 8])
def test_the_order_of_experts_does_not_matter(top_k):
    generator = torch.Generator().manual_seed(top_k)
    a, b = (torch.rand(200, 12, generator=generator).topk(top_k).indices for _ in range(2))
    shuffled = b.gather(1, torch.rand(200, top_k, generator=generator).argsort())
    assert torch.equal(change_counts(a, b), change_counts(a, shuffled))
    assert change_counts(a, a.flip(1)).tolist() == [0, 0, 0, 0]
    expected = [len(set(x) - set(y)) for x, y in zip(a.tolist(), b.tolist(), strict=True)]
    assert num_changed(a, b).tolist() == expected


def test_expert_load_by_hand():
    assert expert_load(torch.tensor([[0, 3], [3, 1], [3, 0]]), 5).tolist() == [2, 1, 0, 3, 0]
    assert expert_load(torch.empty(0, 2, dtype=torch.int64), 3).tolist() == [0, 0, 0]


def test_metric_accumulates_over_batches_of_different_size():
    generator = torch.Generator().manual_seed(0)
    original, ids = ([torch.rand(70, 8, generator=generator).topk(3).indices for _ in range(2)] for _ in range(2))
    metric = ExpertShift([3, 3])
    for rows in (slice(0, 10), slice(10, 11), slice(11, 70)):
        metric.update([block[rows] for block in original], [block[rows] for block in ids])
    for block, rates in enumerate(metric.compute()):
        assert rates == rates_of(original[block].tolist(), ids[block].tolist())
    metric.reset()
    metric.update([t[:5] for t in original], [t[:5] for t in original])
    assert metric.compute() == [{"any": 0.0, "half": 0.0, "all": 0.0, "selections": 0.0}] * 2


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_a_metric_without_updates_is_zero():
    assert ExpertShift([2]).compute() == [{"any": 0.0, "half": 0.0, "all": 0.0, "selections": 0.0}]


def test_blocks_must_match():
    ids = torch.zeros(4, 2, dtype=torch.int64)
    with pytest.raises(ValueError):
        ExpertShift([2, 2]).update([ids, ids], [ids])


def test_mean_over_blocks():
    blocks = [{"any": 0.5, "all": 0.0}, {"any": 1.0, "all": 0.5}]
    assert mean_rates(blocks) == {"any": 0.75, "all": 0.25}
    assert mean_rates([]) == {}
