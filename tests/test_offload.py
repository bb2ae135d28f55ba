"""Offloaded experts: the same tokens, bounded memory, what is fetched and what not, and what happens when it breaks."""

import os
import signal
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny_models
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_packed_loading import compress
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from transformers import PreTrainedModel

from eacmoe_lightning import load
from eacmoe_lightning.adapter import MoEModel
from eacmoe_lightning.offload import offload_experts
from eacmoe_lightning.offload.cache import Entry
from eacmoe_lightning.offload.codecs import codec, decode
from eacmoe_lightning.offload.fetch import Processes
from eacmoe_lightning.offload.model import STORE, Offload
from eacmoe_lightning.offload.policy import LeastFrequent, LeastRecent
from eacmoe_lightning.offload.store import ExpertStore, Key, write
from eacmoe_lightning.packed_modules import PackedExperts
from eacmoe_lightning.store import StoreError

families = pytest.mark.parametrize("family", tiny_models.MOE_FAMILIES)
EXPERT_BYTES = 3 * 64 * 64 * 4  # gate, up and down of a tiny expert in float32


@pytest.fixture(scope="module")
def tokens() -> Tensor:
    return torch.randint(0, tiny_models.VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(0))


def generate(model: PreTrainedModel, tokens: Tensor, new: int = 6) -> tuple[Tensor, Tensor]:
    """Greedy tokens and all their logits, for a batch with left padding."""
    mask = torch.ones_like(tokens)
    mask[0, :3] = 0
    how = {"max_new_tokens": new, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    out = model.generate(tokens, attention_mask=mask, **how, output_logits=True, return_dict_in_generate=True)
    return out.sequences, torch.stack(out.logits)


def same(model: PreTrainedModel, expected: tuple[Tensor, Tensor], tokens: Tensor) -> bool:
    return all(torch.equal(a, b) for a, b in zip(generate(model, tokens), expected, strict=True))


@pytest.fixture
def offloaded() -> Callable[..., tuple[PreTrainedModel, Offload]]:
    """`offloaded(family, cache_bytes, codec, ...)`: a tiny model and its handle, closed at the end."""
    handles = []

    def make(family: str, *args, **options) -> tuple[PreTrainedModel, Offload]:
        model = tiny_models.build(family)
        handles.append(offload_experts(model, *args, **options))
        return model, handles[-1]

    yield make
    for handle in handles:
        handle.close()


# --- the same as without offloading


@families
@pytest.mark.parametrize("share", [1.0, 0.3, 0.07])
def test_lossless_offload_gives_the_same_bits(family, share, offloaded, tokens, tmp_path):
    expected = generate(tiny_models.build(family), tokens)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # at 0.07 the cache holds one expert, and it says so
        model, handle = offloaded(family, share, "lossless", directory=tmp_path if share == 0.3 else None)
        assert same(model, expected, tokens)
    counters = handle.counters
    assert counters.requests == counters.hits + counters.late + counters.misses > 0
    assert counters.bytes_moved > 0 and (counters.evictions > 0) == (share < 1)
    assert handle.cache_bytes <= share * handle.expert_bytes
    assert all(len(cache.entries) <= cache.capacity for cache in handle.caches)


@families
def test_nothing_of_the_experts_stays_in_the_model(family, offloaded):
    model, handle = offloaded(family, 0.3)
    blocks = MoEModel(tiny_models.build(family)).moe_blocks
    experts = {f"{b.name}.{b.experts_name}.{p}" for b in blocks for p in b.experts.projections}
    held = dict(model.named_parameters()) | dict(model.named_buffers())
    assert not experts & held.keys() and len(handle.store.places) == 8 * 2 * len(blocks)
    assert handle.expert_bytes == 8 * EXPERT_BYTES * len(blocks)
    assert len(MoEModel(model).moe_blocks) == len(blocks)  # routers can still be found


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_the_configured_implementation_runs(implementation, offloaded, tokens):
    reference = tiny_models.build("qwen3_moe")
    reference.set_experts_implementation(implementation)
    model, _ = offloaded("qwen3_moe", 1.0)
    model.set_experts_implementation(implementation)
    assert same(model, generate(reference, tokens), tokens)


@torch.no_grad()
@pytest.mark.parametrize("how", ["sz3:mean:0.2", "uniform:range:0.01", "entropy:mean:0.3", "packed-entropy:4:32"])
def test_lossy_offload_is_the_model_with_decoded_weights(how, offloaded, tokens):
    model, handle = offloaded("mixtral", 0.5, how, num_workers=0)
    reference = tiny_models.build("mixtral")
    for block in MoEModel(reference).moe_blocks:
        for projection in block.experts.projections:
            for expert in range(8):
                weight = block.experts.weight(projection)[expert]
                weight.copy_(decode(codec(how).encode(weight)))
    assert torch.equal(model(tokens).logits, reference(tokens).logits)
    assert handle.counters.bytes_saved > handle.counters.bytes_moved


@torch.no_grad()
def test_each_expert_may_have_a_codec_of_its_own(offloaded, tokens):
    reference = tiny_models.build("mixtral")
    codecs = {str(b): [f"sz3:mean:{0.1 * (1 + e + b):.1f}" for e in range(8)] for b in range(3)}  # as JSON has it
    for block in MoEModel(reference).moe_blocks:
        for projection in block.experts.projections:
            for expert in range(8):
                weight = block.experts.weight(projection)[expert]
                weight.copy_(decode(codec(codecs[str(block.index)][expert]).encode(weight)))
    model, handle = offloaded("mixtral", 0.5, codecs, num_workers=0)
    assert torch.equal(model(tokens).logits, reference(tokens).logits)
    assert handle.store.header(Key(1, 4, "down_proj")).bound["value"] == 0.6
    for wrong in ({0: codecs["0"]}, codecs | {"2": codecs["2"][:7]}):
        with pytest.raises(ValueError, match="codecs for block"):
            offload_experts(tiny_models.build("mixtral"), 0.5, wrong)


@families
@torch.no_grad()
@pytest.mark.parametrize("share", [1.0, 0.2])
def test_quantized_experts_stay_packed(family, share, tmp_path, tiny_model_dir, tokens):
    folder = compress(tiny_model_dir(family), tmp_path / "compressed")
    expected, model = load(folder)(tokens).logits, load(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        handle = offload_experts(model, share, "packed-entropy:3:32" if share == 1 else "packed-zstd:3:32")
        torch.testing.assert_close(model(tokens).logits, expected, rtol=1e-5, atol=1e-5)
        assert generate(model, tokens)[0].shape == (2, 18)
    assert not any(isinstance(module, PackedExperts) for module in model.modules())
    last = max(key.block for key in handle.store)
    assert handle.store.header(Key(0 if family != "deepseek" else 1, 0, "down_proj")).options["bits"] == 3
    assert handle.store.header(Key(last, 0, "down_proj")).options["bits"] == 2
    assert len(handle.caches) == 2  # one for each shape
    packed = 8 * 3 * 64 * (64 * 3 / 8 + 2 * 3)  # codes, and two groups' scale and zero point in each row
    assert handle.caches[0].expert_bytes * 8 == packed
    handle.close()


# --- what is fetched


def test_skipped_experts_are_never_fetched(offloaded, tokens):
    """What a router hook takes out by the id E (PESF) costs no fetch, and counts as a weight of zero."""

    def skip(module, args, output):
        logits, weights, ids = output
        dropped = (ids == 3) | (ids == 6)
        return logits, weights.masked_fill(dropped, 0), ids.masked_fill(dropped, 8)

    def silence(module, args, output):
        logits, weights, ids = output
        return logits, weights.masked_fill((ids == 3) | (ids == 6), 0), ids

    model, handle = offloaded("qwen3_moe", 1.0, lookahead=0)
    reference = tiny_models.build("qwen3_moe")
    for each, hook in ((model, skip), (reference, silence)):
        for block in MoEModel(each).moe_blocks:
            block.router.register_forward_hook(hook)
    with torch.no_grad():
        torch.testing.assert_close(model(tokens).logits, reference(tokens).logits, rtol=1e-5, atol=1e-5)
    fetched = {expert for cache in handle.caches for _, expert in cache.entries}
    assert fetched == {0, 1, 2, 4, 5, 7}


def test_a_pass_in_which_everything_is_skipped_gives_zeros(offloaded):
    model, handle = offloaded("mixtral", 1.0, lookahead=0)
    experts = MoEModel(model).moe_blocks[0].experts.module
    out = experts(torch.ones(3, 64), torch.full((3, 2), 8), torch.zeros(3, 2))
    assert torch.equal(out, torch.zeros(3, 64)) and handle.counters.requests == 0


def test_predictions_are_the_next_routers_choice_and_no_hook_sees_them(offloaded, tokens):
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
        cache.entries.clear()
    handle.predict(0, hidden)
    likely = set((hidden @ blocks[1].router_weight.float().t()).topk(2).indices[0].tolist())
    assert {place for cache in handle.caches for place in cache.entries} == {(1, expert) for expert in likely}


def test_counters_by_hand(offloaded):
    model, handle = offloaded("mixtral", 4 * EXPERT_BYTES, "plain", num_workers=0, eviction="lru")
    experts = MoEModel(model).moe_blocks[0].experts.module

    def ask(*ids: int) -> None:
        experts(torch.ones(1, 64), torch.tensor([ids]), torch.ones(1, len(ids)))

    ask(0, 1)  # two misses
    ask(1, 2)  # a hit, a miss
    ask(3, 4)  # two misses; 0 leaves
    ask(0, 3)  # a miss; 1 leaves
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


# --- who leaves


def test_the_least_recent_leaves():
    lru = LeastRecent()
    for expert in (0, 1, 2, 0):
        lru.used((0, expert))
    assert lru.victim([(0, 0), (0, 1), (0, 2)]) == (0, 1)
    assert lru.victim([]) is None


def test_the_rarest_leaves_by_given_frequencies_then_by_use():
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


def test_frequencies_keep_the_frequent_ones_where_a_circle_defeats_recency(offloaded):
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
        with pytest.raises(ValueError, match=f"holds no expert: one takes {EXPERT_BYTES} bytes, all of them") as error:
            offload_experts(tiny_models.build("mixtral"), cache_bytes)
        assert f"cache_bytes={cache_bytes}" in str(error.value)
    for wrong in (0, -5, 1.5, float("nan")):
        with pytest.raises(ValueError, match="neither a number of bytes nor a share"):
            offload_experts(tiny_models.build("mixtral"), wrong)
    with pytest.raises(ValueError, match="num_workers=-1"):
        offload_experts(tiny_models.build("mixtral"), 1.0, num_workers=-1)


def test_a_cache_without_room_for_a_block_says_that_it_is_slow(offloaded, tokens):
    model, handle = offloaded("mixtral", 3 * EXPERT_BYTES)
    with pytest.warns(UserWarning, match="needs [4-8] experts at once, and the cache holds 3.*slower") as said:
        generate(model, tokens)
    assert f"{8 * EXPERT_BYTES} bytes (cache_bytes)" in str(said[0].message)
    assert handle.counters.passes > 0


# --- damage


def damaged(tmp_path: Path, change: Callable[[bytearray], None]) -> Path:
    """A store of a tiny model's experts, altered."""
    handle = offload_experts(tiny_models.build("mixtral"), 1.0, directory=tmp_path)
    handle.close()
    data = bytearray((tmp_path / STORE).read_bytes())
    change(data)
    (tmp_path / STORE).write_bytes(data)
    return tmp_path / STORE


def test_a_truncated_store_is_named(tmp_path):
    def cut(data: bytearray) -> None:
        del data[-1000:]

    path = damaged(tmp_path, cut)
    with pytest.raises(StoreError, match=f"{STORE} is truncated or altered"):
        ExpertStore.open(path)
    path.write_bytes(b"short")
    with pytest.raises(StoreError, match=f"{STORE} is truncated: it has 5 bytes"):
        ExpertStore.open(path)
    with pytest.raises(FileNotFoundError, match="no store of experts"):
        ExpertStore.open(tmp_path / "none")


def test_a_store_that_is_cut_off_while_in_use_is_named(tmp_path, tokens):
    model = tiny_models.build("mixtral")
    handle = offload_experts(model, 0.5, directory=tmp_path)
    os.truncate(tmp_path / STORE, 5000)
    with pytest.raises(StoreError, match=f"{STORE} was cut off while it was in use: 5000 of"), torch.no_grad():
        model(tokens)
    handle.close()


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_flipped_bit_stops_the_pass_that_needs_it(num_workers, tmp_path, tokens):
    model = tiny_models.build("mixtral")
    handle = offload_experts(model, 0.5, directory=tmp_path, num_workers=num_workers)
    offset, length = handle.store.places[Key(1, 2, "down_proj")]
    with open(tmp_path / STORE, "r+b") as file:  # behind the open store's back
        file.seek(offset + length // 2)
        byte = file.read(1)[0]
        file.seek(offset + length // 2)
        file.write(bytes([byte ^ 8]))
    with pytest.raises(StoreError, match=f"{STORE}: block 1, expert 2, down_proj.*checksum"), torch.no_grad():
        model(torch.arange(512).view(4, 128))  # selects every expert
    with pytest.raises(StoreError, match="block 1, expert 2, down_proj.*written again"):
        handle.store.verify()
    handle.close()


def test_every_bit_of_the_index_is_checked(tmp_path):
    path = tmp_path / "store"
    write(path, [(Key(0, 0, "down_proj"), codec("plain").encode(torch.ones(4, 4)))], {"a": 1})
    good = path.read_bytes()
    store = ExpertStore.open(path)
    store.verify()
    assert store.about == {"a": 1} and list(store) == [Key(0, 0, "down_proj")]
    first = sum(store.places[Key(0, 0, "down_proj")])
    for position in range(first + -first % 64, len(good)):
        broken = bytearray(good)
        broken[position] ^= 1
        path.write_bytes(broken)
        with pytest.raises(StoreError, match="truncated or altered"):
            ExpertStore.open(path)
    with pytest.raises(StoreError, match="block 0, expert 1, down_proj is missing"):
        store.record(Key(0, 1, "down_proj"))


def test_a_store_of_another_model_is_refused(tmp_path):
    handle = offload_experts(tiny_models.build("mixtral"), 1.0, directory=tmp_path)
    handle.close()
    from eacmoe_lightning.offload.model import attach

    moe = MoEModel(tiny_models.build("mixtral"))
    for block in moe.moe_blocks:
        block.experts.module.down_proj = torch.nn.Parameter(torch.zeros(8, 64, 32))
    with pytest.raises(StoreError, match="down_proj has shape .64, 64., the model's .64, 32.: it is of another model"):
        attach(moe, ExpertStore.open(tmp_path / STORE), 1.0)


# --- worker processes


def wait_for_worker(handle: Offload) -> int:
    assert isinstance(handle.fetcher, Processes)
    (worker,) = [each for each in handle.fetcher.workers if each.process.returncode is None]
    deadline = time.monotonic() + 60
    while not worker.is_ready(60):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return worker.process.pid


@pytest.mark.slow
def test_processes_decode_the_same_and_their_death_hangs_nothing(offloaded, tokens):
    plain, _ = offloaded("mixtral", 0.5, "sz3:mean:0.1", num_workers=0)
    expected = generate(plain, tokens)
    model, handle = offloaded("mixtral", 0.5, "sz3:mean:0.1", num_workers=1)
    assert same(model, expected, tokens)  # while the worker is starting
    pid = wait_for_worker(handle)
    assert same(model, expected, tokens) and handle.counters.dead_workers == 0

    os.kill(pid, signal.SIGKILL)
    with pytest.warns(UserWarning, match="worker that decodes experts failed.*another is started"):
        assert same(model, expected, tokens)
    assert handle.counters.dead_workers == 1

    other = wait_for_worker(handle)
    assert other != pid
    handle.fetcher.timeout = 1.0
    os.kill(other, signal.SIGSTOP)  # alive, and silent
    start = time.monotonic()
    with pytest.warns(UserWarning, match="no answer within 1.0 s"):
        assert same(model, expected, tokens)
    assert handle.counters.dead_workers == 2 and time.monotonic() - start < 30

    for entries in (cache.entries for cache in handle.caches):
        assert all(isinstance(entry, Entry) for entry in entries.values())


@pytest.mark.slow
def test_a_damaged_record_is_named_by_a_worker_process(offloaded, tmp_path):
    model, handle = offloaded("mixtral", 0.5, "sz3:mean:0.1", num_workers=1, directory=tmp_path)
    wait_for_worker(handle)
    offset, length = handle.store.places[Key(0, 0, "gate_up_proj")]
    with open(tmp_path / STORE, "r+b") as file:
        file.seek(offset + length - 1)
        file.write(b"x")
    with pytest.raises(StoreError, match="block 0, expert 0, gate_up_proj.*checksum"), torch.no_grad():
        model(torch.arange(512).view(4, 128))
