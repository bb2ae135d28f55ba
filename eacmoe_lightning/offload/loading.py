"""`load_offloaded`: moves a model's experts from its files into the store one block at a time, never all in memory.

The experts of an original are read block by block (`models/streamed.py`), those of a compressed directory shard by
shard. The rest of the model is loaded afterwards, with the offloaded experts already in place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from eacmoe_lightning.compressed.directory import CompressedWeights
from eacmoe_lightning.compressed.format import SHARD, read_config, runs_packed
from eacmoe_lightning.compressed.opening import open_model
from eacmoe_lightning.models.block import Block
from eacmoe_lightning.models.checkpoint import dtype_name
from eacmoe_lightning.models.fingerprint import fingerprint
from eacmoe_lightning.models.moe import MoEModel
from eacmoe_lightning.models.streamed import StreamedModel
from eacmoe_lightning.models.transformers_loader import auto_class, ignore_unexpected
from eacmoe_lightning.offload import store as stores
from eacmoe_lightning.offload.codecs import Codec
from eacmoe_lightning.offload.codecs import codec as codec_named
from eacmoe_lightning.offload.codecs.entropy import Entropy, PackedEntropy
from eacmoe_lightning.offload.model import STORE, attach, encode, packed_codec, refuse_to_save
from eacmoe_lightning.offload.store import ExpertStore, Key
from eacmoe_lightning.quantization.lattice import Lattice
from eacmoe_lightning.quantization.packing import expert_codes
from eacmoe_lightning.run.files import read_tensors

Records = Iterator[tuple[Key, bytes]]


def load_offloaded(
    name_or_path: str | Path,
    cache_bytes: int | float,
    codec: str | Codec = "lossless",
    directory: str | Path | None = None,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "cpu",
    trust_remote_code: bool = False,
    **options: Any,
) -> PreTrainedModel:
    """Loads a model with its experts offloaded; `model.offload` is their handle.

    Args:
        name_or_path: a compressed or run directory, `bundled`, or an original's directory or hub id.
        cache_bytes, codec: see `offload_experts`. Experts on a lattice are decoded and stored with any codec; with
            `packed-entropy` their codes stay as they are.
        directory: where to keep the store; a store of the same model, codec and dtype is reused, any other is
            overwritten. None: in host memory.
        dtype: of everything that is not quantized: `auto`, `float32`, `bfloat16` or `float16`, by name or as torch has
            it.
        device: where the model runs.
        trust_remote_code: whether Python code that came with the model may run.
        **options: further options of `offload_experts`.

    Raises:
        FileNotFoundError: there is no such model.
        ValueError, StoreError: as in `offload_experts`, or a file of the model or the store is damaged.
    """
    dtype = dtype_name(dtype)
    parsed = codec_named(codec)
    opened = open_model(name_or_path, dtype, "name_or_path", trust_remote_code)
    options |= {"cache_bytes": cache_bytes, "device": device}
    if opened.is_compressed and runs_packed(read_config(opened.directory)):
        return _load_packed(opened.directory, parsed, directory, dtype, options)
    streamed = opened.streamed(device)
    about = _about(str(opened.directory), parsed, streamed.weights.dtype)
    attach(streamed, lambda: _store(directory, lambda: _dense_records(streamed, parsed), about), **options)
    streamed.load_all()
    return streamed.model


def _load_packed(
    path: Path, codec: Codec, directory: str | Path | None, dtype: str, options: dict[str, Any]
) -> PreTrainedModel:
    config = AutoConfig.from_pretrained(path)
    torch_dtype = config.dtype if dtype == "auto" else getattr(torch, dtype)
    store = _store(directory, lambda: _packed_records(path, config, codec), _about(str(path), codec, torch_dtype))

    def prepare(model: PreTrainedModel) -> None:
        attach(MoEModel(model), lambda: store, **options)
        ignore_unexpected(model, r"\.experts\.")

    config.quantization_config["prepare"] = [prepare]
    model = auto_class(config).from_pretrained(path, config=config, dtype=torch_dtype)
    model.config.quantization_config.prepare = ()
    model.save_pretrained = refuse_to_save  # replaces the method that loading gives a packed model
    return model.to(options["device"]).eval()


def _about(source: str, codec: Codec, dtype: torch.dtype) -> dict[str, str]:
    """What a store must have been made from to be reused."""
    return {"codec": codec.specification, "model": fingerprint(source), "dtype": str(dtype)}


def _store(directory: str | Path | None, records: Callable[[], Records], about: dict[str, str]) -> ExpertStore:
    if directory is None:
        return ExpertStore.in_memory(records(), about)
    path = Path(directory) / STORE
    if path.exists():
        store = ExpertStore.open(path)
        if store.about == about:
            return store
    stores.write(path, records(), about)
    return ExpertStore.open(path)


def _packed_records(path: Path, config: PreTrainedConfig, codec: Codec) -> Records:
    bits = config.quantization_config["bits"]
    with torch.device("meta"):
        moe = MoEModel(auto_class(config).from_config(config))
    for block in moe.moe_blocks:
        tensors, _ = read_tensors(path / SHARD.format(block.index))
        for expert in range(block.num_experts):
            for projection in block.experts.projections:
                name = f"{block.name}.{block.experts_name}.{projection}"
                scale, width = tensors[f"{name}.scale"], bits[name]
                columns = block.experts.weight(projection).shape[-1]
                stack_bits = width if isinstance(width, int) else tuple(width)
                codes = expert_codes(tensors[f"{name}.codes"], stack_bits, expert, columns)
                parts = codes, scale[expert], tensors[f"{name}.zero_point"][expert]
                expert_bits = stack_bits if isinstance(stack_bits, int) else stack_bits[expert]
                encoder = packed_codec(codec, expert_bits, columns // scale.shape[-1])
                yield Key(block.index, expert, projection), encoder.encode_packed(parts)


def _dense_records(streamed: StreamedModel, codec: Codec) -> Records:
    for block in streamed.moe_blocks:
        names = {p: f"{block.name}.{block.experts_name}.{p}" for p in block.experts.projections}
        if isinstance(codec, PackedEntropy):
            yield from _lattice_records(streamed, block, names)
            continue
        stacks = streamed.weights.read(names.values())  # in host memory
        for expert in range(block.num_experts):
            for projection, name in names.items():
                key = Key(block.index, expert, projection)
                yield key, encode(codec, stacks[name][expert], key)


def _lattice_records(streamed: StreamedModel, block: Block, names: dict[str, str]) -> Records:
    """The codes of a block's experts on a lattice, at their entropy; they decode to the model's parameters."""
    if not isinstance(streamed.weights, CompressedWeights):
        raise ValueError(f"{PackedEntropy.name} stores the codes of a compressed model, and this one has none")
    quantized, coder = streamed.weights.quantized(block.index), codec_named(f"{Entropy.name}:mean:1")
    for expert in range(block.num_experts):
        for projection, name in names.items():
            stack = quantized[name]
            codes = block.as_parameter(name, stack.codes[expert]).contiguous()
            record = coder.encode_lattice(Lattice(codes, stack.scale[expert]), streamed.weights.dtype)
            yield Key(block.index, expert, projection), record
