"""The cache of offloaded experts: what it fetches, counts and evicts, and how small it may be."""

import json
import re

import pytest
import tiny_models
import torch
from offloading import EXPERT_BYTES, generate
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from eacmoe_lightning import load
from eacmoe_lightning.models.moe import MoEModel
from eacmoe_lightning.offload import offload_experts
from eacmoe_lightning.offload.policy import LeastFrequent, LeastRecent

# --- what is fetched


def test_skipped_experts_are_never_fetched(offloaded, tokens):
    """An expert that a router hook replaces with the id E (PESF) is not fetched, as if its weight were zero."""

    def skip(module, args, output):
        logits, weights, ids = output
        dropped = (ids == 3) | (ids == 6)
        return logits, weights.masked_fill(dropped, 0), ids.masked_fill(dropped, 8)

    def zero_weights(module, args, output):
        logits, weights, ids = output
        return logits, weights.masked_fill((ids == 3) | (ids == 6), 0), ids

    model, handle = offloaded("qwen3_moe", 1.0, lookahead=0)
    reference = tiny_models.build("qwen3_moe")
    for hooked, hook in ((model, skip), (reference, zero_weights)):
        for block in MoEModel(hooked).moe_blocks:
            block.router.register_forward_hook(hook)
    with torch.no_grad():
        torch.testing.assert_close(model(tokens).logits, reference(tokens).logits, rtol=1e-5, atol=1e-5)
    fetched = {expert for cache in handle.caches for _, expert in cache.entries}
    assert fetched == {0, 1, 2, 4, 5, 7}


def test_a_pass_that_skips_every_expert_gives_zeros(offloaded):
    model, handle = offloaded("mixtral", 1.0, lookahead=0)
    experts = MoEModel(model).moe_blocks[0].experts.module
    out = experts(torch.ones(3, 64), torch.full((3, 2), 8), torch.zeros(3, 2))
    assert torch.equal(out, torch.zeros(3, 64)) and handle.counters.requests == 0


def test_the_next_router_predicts_and_no_hook_sees_it(offloaded, tokens):
    model, handle = offloaded("mixtral", 1.0, lookahead=2.0)
    blocks, calls = MoEModel(model).moe_blocks, []
    for block in blocks:
        block.router.register_forward_hook(lambda *_, index=block.index: calls.append(index))
    with torch.no_grad():
        model(tokens[:1, :1])
    assert calls == [0, 1, 2]
    counters = handle.counters
    assert counters.prefetches > 0 and counters.requests == 6  # one token, two experts in three blocks
    hidden = torch.randn(1, 64, generator=torch.Generator().manual_seed(1))
    for cache in handle.caches:
        for place in list(cache.entries):
            cache.wait(place)
            cache.free.append(cache.forget(place).slot)
    handle.predict(0, hidden)
    likely = set((hidden @ blocks[1].router_weight.float().t()).topk(2).indices[0].tolist())
    assert {place for cache in handle.caches for place in cache.entries} == {(1, expert) for expert in likely}


def test_a_block_whose_experts_are_all_here_is_not_predicted(offloaded, tokens, monkeypatch):
    model, handle = offloaded("mixtral", 1.0, lookahead=2.0)
    blocks = handle.blocks
    for block in blocks:
        handle.cache_of[block.index].prefetch(block.index, range(8))
        for expert in range(8):
            handle.cache_of[block.index].wait((block.index, expert))
    predicted = []
    for block in blocks:
        monkeypatch.setattr(block, "router_logits", lambda x: predicted.append(x))
    with torch.no_grad():
        model(tokens)
    assert not predicted and all(cache.holds(1, 8) for cache in handle.caches)
    cache = handle.cache_of[1]
    cache.wait((1, 3))
    cache.free.append(cache.forget((1, 3)).slot)
    assert not cache.holds(1, 8) and (1, 3) not in cache.fetching


def test_counters_by_hand(offloaded):
    model, handle = offloaded("mixtral", 4 * EXPERT_BYTES, "plain", num_workers=0, eviction="lru")
    experts = MoEModel(model).moe_blocks[0].experts.module

    def request(*ids: int) -> None:
        experts(torch.ones(1, 64), torch.tensor([ids]), torch.ones(1, len(ids)))

    request(0, 1)  # two misses
    request(1, 2)  # a hit, a miss
    request(3, 4)  # two misses; 0 is evicted
    request(0, 3)  # a miss and a hit; 1 is evicted
    counters, record = handle.counters.to_dict(), handle.store.record_bytes // 24
    assert {name: counters[name] for name in ("hits", "late", "misses", "evictions", "prefetches")} == {
        "hits": 2, "late": 0, "misses": 6, "evictions": 2, "prefetches": 0,
    }  # fmt: skip
    assert counters["hit_rate"] == 0.25 and counters["bytes_moved"] == 6 * record
    assert counters["bytes_saved"] == 6 * (EXPERT_BYTES - record) < 0  # headers, and nothing compressed
    assert counters["stall_seconds"] > 0 < counters["decode_seconds"]
    assert {expert for cache in handle.caches for _, expert in cache.entries} == {0, 2, 3, 4}
    handle.counters.reset()
    assert handle.counters.requests == handle.counters.bytes_moved == 0


def test_counters_in_tensorboard(offloaded, tokens, tmp_path):
    model, handle = offloaded("mixtral", 0.5)
    with SummaryWriter(tmp_path) as writer, torch.no_grad():
        model(tokens)
        handle.counters.log(writer, step=7)
    events = EventAccumulator(str(tmp_path)).Reload()
    assert set(events.Tags()["scalars"]) == {f"offload/{name}" for name in handle.counters.to_dict()}
    (event,) = events.Scalars("offload/bytes_moved")
    assert event.step == 7 and event.value == handle.counters.bytes_moved


# --- what is evicted


def test_the_least_recent_is_evicted():
    lru = LeastRecent()
    for expert in (0, 1, 2, 0):
        lru.used((0, expert))
    assert lru.victim([(0, 0), (0, 1), (0, 2)]) == (0, 1)
    assert lru.victim([]) is None


def test_the_rarest_is_evicted_by_given_frequencies_then_by_use():
    rare = LeastFrequent({0: [8, 1, 1], 1: [1, 0, 9]})
    places = [(block, expert) for block in (0, 1) for expert in range(3)]
    assert rare.victim(places) == (1, 1)
    assert rare.victim([(0, 0), (0, 1), (1, 0)]) in ((0, 1), (1, 0))
    for _ in range(40):  # the text has changed
        rare.used((0, 1))
    assert rare.victim([(0, 0), (0, 1), (1, 2)]) == (0, 0)
    for _ in range(300_000):
        rare.used((1, 1))
    assert rare.victim([(1, 1), (1, 2)]) == (1, 2) and rare.unit < 1e101


def test_frequency_keeps_frequent_experts_where_a_cycle_defeats_recency(offloaded):
    """Experts 0 and 1 in every step, 2 to 7 in turn, three slots."""
    hits = {}
    for eviction in ("lru", "frequency"):
        model, handle = offloaded(
            "mixtral", 3 * EXPERT_BYTES, "plain", num_workers=0, eviction=eviction, frequencies={0: [50, 50, *[1] * 6]}
        )
        experts = MoEModel(model).moe_blocks[0].experts.module
        for step in range(24):
            for expert in (0, 2 + step % 6, 2 + (step + 1) % 6, 1):
                experts(torch.ones(1, 64), torch.tensor([[expert]]), torch.ones(1, 1))
        hits[eviction] = handle.counters.hits
    assert hits["frequency"] >= 46 > hits["lru"]


# --- the cache's size


def test_a_cache_without_room_for_one_expert_is_refused():
    for cache_bytes in (EXPERT_BYTES - 1, 0.01):
        message = f"too small for one expert: one takes {EXPERT_BYTES} bytes, all of them"
        with pytest.raises(ValueError, match=message) as error:
            offload_experts(tiny_models.build("mixtral"), cache_bytes)
        assert f"cache_bytes={cache_bytes}" in str(error.value)
    for wrong in (0, -5, 1.5, float("nan")):
        with pytest.raises(ValueError, match="must be a positive number of bytes or a share"):
            offload_experts(tiny_models.build("mixtral"), wrong)
    with pytest.raises(ValueError, match="num_workers=-1"):
        offload_experts(tiny_models.build("mixtral"), 1.0, num_workers=-1)


def test_a_cache_without_room_for_a_block_warns_that_it_is_slow(offloaded, tokens):
    model, handle = offloaded("mixtral", 3 * EXPERT_BYTES)
    with pytest.warns(UserWarning, match="needs [4-8] experts at once, but the cache holds 3.*slower") as caught:
        generate(model, tokens)
    assert f"{8 * EXPERT_BYTES} bytes (cache_bytes)" in str(caught[0].message)
    assert handle.counters.passes > 0


@pytest.mark.parametrize(
    "options, message",
    [
        ({"frequencies": {0: [1, 2]}}, "frequencies has 2 numbers for block 0, which has 8 experts"),
        ({"frequencies": {"9": [1] * 8}}, "frequencies has 8 numbers for block 9, which has no experts"),
        ({"lookahead": -1}, "lookahead=-1 is not a number from 0 on"),
        ({"lookahead": "1"}, "lookahead='1' is not a number from 0 on"),
        ({"num_workers": 1.5}, "num_workers=1.5 is not a whole number from 0 on"),
        ({"cache_bytes": "0.25"}, "cache_bytes='0.25' is neither a number of bytes nor a share"),
    ],
)
def test_options_that_would_be_ignored_or_misread_are_refused(options, message, tmp_path):
    with pytest.raises(ValueError, match=re.escape(message)):
        offload_experts(
            tiny_models.build("mixtral"), **{"cache_bytes": 0.5, "directory": tmp_path / "store", **options}
        )
    assert not (tmp_path / "store").exists()  # before experts are compressed


def test_frequencies_of_a_pruned_run_are_those_of_the_experts_that_are_left(fitted):
    """`expert_frequency.json` counts by the original's numbers."""
    run = fitted("mixtral", pruning__keep=6)
    loads = {
        index: load["compressed"] for index, load in json.loads((run / "expert_frequency.json").read_text()).items()
    }
    model = load(run)
    block = MoEModel(model).moe_blocks[0]
    handle = offload_experts(model, 0.5, num_workers=0, frequencies=loads)
    counts = handle.caches[0].policy.counts
    kept = [loads["0"][expert] for expert in block.expert_numbers]
    assert len(kept) == 6 and [counts[0, e] > 0 for e in range(6)] == [value > 0 for value in kept]
    assert max(range(6), key=lambda e: counts[0, e]) == max(range(6), key=lambda e: kept[e])


def test_frequencies_as_json_has_them():
    model = tiny_models.build("mixtral")
    handle = offload_experts(model, 0.5, num_workers=0, frequencies={"0": [50, 50, *[1] * 6]})
    assert handle.caches[0].policy.counts[0, 1] > handle.caches[0].policy.counts[0, 2]
