"""`offload_experts`: moves a model's experts into a compressed store, from which its blocks fetch them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from eacmoe_lightning.models.block import Block
from eacmoe_lightning.models.moe import MoEModel
from eacmoe_lightning.offload import store as stores
from eacmoe_lightning.offload.cache import ExpertCache
from eacmoe_lightning.offload.codecs import Codec, codec_of
from eacmoe_lightning.offload.codecs import codec as codec_named
from eacmoe_lightning.offload.codecs.packed import PackedCodes
from eacmoe_lightning.offload.counters import Counters
from eacmoe_lightning.offload.experts import OffloadedExperts, OffloadedPackedExperts
from eacmoe_lightning.offload.fetch import Fetcher, Processes, Threads
from eacmoe_lightning.offload.jobs import Part, parts_of, widest
from eacmoe_lightning.offload.memory import Arena
from eacmoe_lightning.offload.policy import policy
from eacmoe_lightning.offload.slots import Layout, Plan, Slots, nbytes_of, pin
from eacmoe_lightning.offload.store import ExpertStore, Key
from eacmoe_lightning.run.files import StoreError
from eacmoe_lightning.runtime.packed_modules import PackedExperts

STORE = "experts.eacmoe"  # file name of a store in its directory


@dataclass
class Offload:
    """The handle of an offloaded model: `model.offload` after `offload_experts`.

    Attributes:
        store: the compressed experts.
        caches: one for each layout of experts.
        counters: what happened so far.
    """

    store: ExpertStore
    caches: list[ExpertCache]
    counters: Counters
    fetcher: Fetcher
    blocks: list[Block]
    top_k: int
    lookahead: float

    def __post_init__(self) -> None:
        self.successor = {a.index: b for a, b in zip(self.blocks, self.blocks[1:], strict=False)}
        self.cache_of: dict[int, ExpertCache] = {}

    @property
    def expert_bytes(self) -> int:
        """Size of all experts as the cache holds them: uncompressed, or packed."""
        return sum(self.cache_of[block.index].expert_bytes * block.num_experts for block in self.blocks)

    @property
    def cache_bytes(self) -> int:
        """Size of all caches when full."""
        return sum(cache.expert_bytes * cache.capacity for cache in self.caches)

    def predict(self, block: int, hidden: Tensor) -> None:
        """Prefetches the experts that the next block's router selects for this block's hidden states.

        Hidden states change little from block to block, so the next block is likely to select them. The prediction uses
        the router's weights without calling the router, so hooks on it (PESF) do not see it. Nothing is predicted for
        routers without one matrix, or with one for other inputs than the experts get (latent experts).
        """
        following = self.successor.get(block)
        if following is None or not self.lookahead or not self.fetcher.is_parallel:
            return
        if not following.calibrates or following.router_weight.shape[1] != hidden.shape[-1]:
            return
        if self.cache_of[following.index].holds(following.index, following.num_experts):
            return
        logits = following.router_logits(hidden)
        ids = logits.topk(self.top_k, dim=-1).indices
        load = torch.bincount(ids.flatten(), minlength=logits.shape[-1])
        likely = load.argsort(descending=True, stable=True)[: round(self.lookahead * self.top_k)]
        likely = likely[load[likely] > 0].tolist()
        self.cache_of[following.index].prefetch(following.index, likely)

    def close(self) -> None:
        """Stops the workers; the model cannot fetch experts afterwards."""
        self.fetcher.close()


def expert_records(
    blocks: Iterable[Block], codec: Codec | None | Mapping[int, Sequence[Codec]]
) -> Iterator[tuple[Key, bytes]]:
    """Every expert's weights as records, one at a time.

    Args:
        codec: for dense experts, one codec, or by block index one for each expert. Packed experts are stored as their
            codes, plain or entropy-coded (`packed-zstd`, `packed-entropy`).
    """
    for block in blocks:
        experts = block.experts.module
        for expert in range(block.num_experts):
            for projection in block.experts.projections:
                key = Key(block.index, expert, projection)
                weight = getattr(experts, projection)
                if isinstance(experts, PackedExperts):
                    *tensors, bits = weight.expert(expert)
                    yield key, packed_codec(codec, bits, weight.group_size).encode_packed(tuple(tensors))
                else:
                    expert_codec = codec[block.index][expert] if isinstance(codec, Mapping) else codec
                    yield key, encode(expert_codec, weight[expert], key)


def encode(codec: Codec, weight: Tensor, key: Key) -> bytes:
    """The record of an expert's weight; errors name block, expert and projection."""
    try:
        return codec.encode(weight)
    except ValueError as error:
        raise ValueError(f"block {key.block}, expert {key.expert}, {key.projection}: {error}") from error


def packed_codec(codec: Codec, bits: int, group_size: int) -> PackedCodes:
    """A codec for packed codes of these bits: of `codec`'s class if that takes packed codes, else `PackedCodes`."""
    return (type(codec) if isinstance(codec, PackedCodes) else PackedCodes)(bits, group_size)


def codec_of_each(blocks: Iterable[Block], codecs: Mapping[int | str, Sequence[str | Codec]]) -> dict[int, list[Codec]]:
    """By block index, a codec for each expert.

    Args:
        codecs: specifications for every block; the block indices may be strings, as in JSON.

    Raises:
        ValueError: a block has no codecs, or not as many as experts.
    """
    by_block = {int(block): specifications for block, specifications in codecs.items()}
    for block in blocks:
        if len(by_block.get(block.index, ())) != block.num_experts:
            raise ValueError(
                f"codec has {len(by_block.get(block.index, ()))} codecs for block {block.index}, which has "
                f"{block.num_experts} experts"
            )
    return {block: [codec_named(name) for name in names] for block, names in by_block.items()}


def offload_experts(
    model: PreTrainedModel,
    cache_bytes: int | float,
    codec: str | Codec | Mapping[int | str, Sequence[str | Codec]] = "lossless",
    directory: str | Path | None = None,
    eviction: Literal["frequency", "lru"] = "frequency",
    frequencies: Mapping[int | str, Sequence[float]] | None = None,
    lookahead: float = 1.0,
    num_workers: int | None = None,
) -> Offload:
    """Compresses the experts of a loaded model, frees them, and lets blocks fetch them when a token needs them.

    Args:
        model: a causal LM of transformers with routed experts, or a packed one from `load`. It is changed in place.
        cache_bytes: size of the cache of decoded experts; a float up to 1.0 is a share of all experts.
        codec: how experts are stored (`offload/codecs/base.py`): one specification, or by block index a list with one
            for each expert, such as `codecs` in a study's `bounds-*.json`. Packed experts are stored as their codes
            whatever the codec; `packed-zstd:...` and `packed-entropy:...` also entropy-code them.
        directory: where to write the store, which is then mapped; None: in host memory.
        eviction: what a full cache evicts: the expert selected least often (`frequency`) or least recently (`lru`).
        frequencies: selections per expert, by block index (a string, as in JSON, will do), that `frequency` starts
            from, such as those in `expert_frequency.json`.
        lookahead: number of experts to prefetch for the next block, in multiples of top_k; 0: none.
        num_workers: number of threads or processes that decode; None: one less than there are cores, at least 1;
            0: the thread that runs the model decodes.

    Returns:
        The handle, also kept as `model.offload`; its `counters` say what happens.

    Raises:
        ValueError: the model has no routed experts, weights are not finite, or the cache is too small for one expert.
        StoreError: the disk is full.
    """
    if isinstance(getattr(model, "offload", None), Offload):
        raise ValueError("the model's experts are offloaded already: load it again to offload them in another way")
    moe = MoEModel(model)
    parsed = codec_of_each(moe.moe_blocks, codec) if isinstance(codec, Mapping) else codec_named(codec)
    about = {"codec": "each expert's own" if isinstance(parsed, Mapping) else parsed.specification}
    about |= {"model_type": model.config.model_type}

    def make_store() -> ExpertStore:
        records = expert_records(moe.moe_blocks, parsed)
        if directory is None:
            return ExpertStore.in_memory(records, about)
        stores.write(Path(directory) / STORE, records, about)
        return ExpertStore.open(Path(directory) / STORE)

    return attach(moe, make_store, cache_bytes, eviction, frequencies, lookahead, num_workers)


def attach(
    moe: MoEModel,
    make_store: Callable[[], ExpertStore],
    cache_bytes: int | float,
    eviction: Literal["frequency", "lru"] = "frequency",
    frequencies: Mapping[int | str, Sequence[float]] | None = None,
    lookahead: float = 1.0,
    num_workers: int | None = None,
    device: str | torch.device | None = None,
) -> Offload:
    """Replaces a model's experts (dense, packed or on the meta device) with those of a store; see `offload_experts`.

    `make_store` is called once the options are known to be good, since it may take long.
    """
    counters, blocks = Counters(), moe.moe_blocks
    if not isinstance(cache_bytes, int | float):
        raise ValueError(f"cache_bytes={cache_bytes!r} is neither a number of bytes nor a share, a float up to 1.0")
    if not isinstance(lookahead, int | float) or lookahead < 0:
        raise ValueError(f"lookahead={lookahead!r} is not a number from 0 on")
    count, eviction_policy = _num_workers(num_workers), policy(eviction, _by_block(frequencies, blocks))
    store = make_store()
    layouts = {block.index: layout_of(block, store) for block in blocks}
    plans = plan(layouts, {block.index: block.num_experts for block in blocks}, cache_bytes)
    device = torch.device(moe.device if device is None else device)
    if device.type != "cpu":
        for pool in plans:
            pool.in_arena = max(count, 1)
    for previous, pool in zip(plans, plans[1:], strict=False):
        pool.start = previous.start + previous.nbytes
    arena = Arena(plans[-1].start + plans[-1].nbytes)
    if device.type == "cuda":
        pin(arena)
    if not count:
        fetcher = Fetcher(store, arena, counters)
    else:
        in_threads = all(codec_of(store.header(key)).releases_gil for key in store)
        fetcher = (Threads if in_threads else Processes)(store, arena, counters, count)
    caches = {
        pool.layout: ExpertCache(Slots(pool, arena, device), store, fetcher, eviction_policy, counters)
        for pool in plans
    }
    handle = Offload(store, list(caches.values()), counters, fetcher, blocks, moe.top_k, lookahead)
    for block in blocks:
        cache = handle.cache_of[block.index] = caches[layouts[block.index]]
        experts = block.experts.module
        module = OffloadedPackedExperts if isinstance(experts, PackedExperts) else OffloadedExperts
        offloaded = module(experts, block.experts.projections, block.index, cache, handle.predict)
        block.layer.set_submodule(block.experts_name, offloaded)
        block.experts.module = offloaded
        block.moe._is_hf_initialized = True  # some models (Qwen3-Omni) would draw values for experts by their names
    moe.model.offload, moe.model.save_pretrained = handle, refuse_to_save
    return handle


def refuse_to_save(*_: object, **__: object) -> None:
    raise ValueError("the experts of an offloaded model are in its store: save the model it was made from instead")


def layout_of(block: Block, store: ExpertStore) -> Layout:
    """The tensors of one cached expert of a block.

    Raises:
        StoreError: the store's records are of another model.
    """
    packed = isinstance(block.experts.module, PackedExperts)
    experts: dict[str, list[tuple[Part, ...]]] = {projection: [] for projection in block.experts.projections}
    for expert in range(block.num_experts):
        headers = {p: store.header(Key(block.index, expert, p)) for p in block.experts.projections}
        for projection, header in headers.items():
            experts[projection].append(parts_of(header, packed))
            shape = tuple(getattr(block.experts.module, projection).shape[1:])
            if header.shape != shape:
                name = store.name_of(Key(block.index, expert, projection))
                raise StoreError(f"{name} has shape {header.shape}, in the model {shape}: it is from another model")
    return tuple((projection, widest(parts)) for projection, parts in experts.items())


def plan(layouts: Mapping[int, Layout], num_experts: Mapping[int, int], cache_bytes: int | float) -> list[Plan]:
    """Divides the cache among the layouts: each gets slots for the same share of its experts, at most for all.

    Raises:
        ValueError: `cache_bytes` is out of range, or some layout would get no slot.
    """
    counts: dict[Layout, int] = {}
    for block, layout in layouts.items():
        counts[layout] = counts.get(layout, 0) + num_experts[block]
    total = sum(nbytes_of(layout) * count for layout, count in counts.items())
    share = cache_bytes if isinstance(cache_bytes, float) else cache_bytes / total
    if not 0 < share or (isinstance(cache_bytes, float) and share > 1):
        raise ValueError(f"cache_bytes={cache_bytes} must be a positive number of bytes or a share, a float up to 1.0")
    capacities = {layout: min(count, int(share * count + 1e-9)) for layout, count in counts.items()}
    if not all(capacities.values()):
        smallest = max(-(-total // count) for count in counts.values())
        largest = max(nbytes_of(layout) for layout in counts)
        raise ValueError(
            f"cache_bytes={cache_bytes} is too small for one expert: one takes {largest} bytes, all of them {total}. "
            f"Pass at least {smallest}; with {max(num_experts.values()) * largest}, a block's experts fit at once"
        )
    return [Plan(layout, capacity, capacity) for layout, capacity in capacities.items()]


def _by_block(
    frequencies: Mapping[int | str, Sequence[float]] | None, blocks: Sequence[Block]
) -> dict[int, Sequence[float]] | None:
    """Frequencies by block index, which may be a string as in JSON, of the experts that a pruned block still has.

    Raises:
        ValueError: they are not those of this model's experts.
    """
    if frequencies is None:
        return None
    found = {int(index): loads for index, loads in frequencies.items()}
    by_index = {block.index: block for block in blocks}
    for index, loads in found.items():
        block = by_index.get(index)
        if block is not None and len(loads) > max(block.expert_numbers) >= block.num_experts:  # those of a pruned run
            found[index] = loads = [loads[expert] for expert in block.expert_numbers]
        if block is None or len(loads) != block.num_experts:
            raise ValueError(
                f"frequencies has {len(loads)} numbers for block {index}, which has "
                f"{'no' if block is None else block.num_experts} experts"
            )
    return found


def _num_workers(requested: int | None) -> int:
    if requested is not None and (not isinstance(requested, int) or requested < 0):
        raise ValueError(f"num_workers={requested!r} is not a whole number from 0 on")
    return max(1, (os.cpu_count() or 2) - 1) if requested is None else requested
