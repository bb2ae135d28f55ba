"""`load_offloaded`: a model whose experts go from its files into the store, a block at a time, never all in memory.

An original's experts are read as `streaming` reads them, a compressed directory's shard by shard. Then the rest is
loaded with the offloaded experts already in their places.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from eacmoe_lightning import compressed
from eacmoe_lightning.adapter import MoEModel
from eacmoe_lightning.grid import expert_codes
from eacmoe_lightning.models.transformers_loader import ignore_unexpected
from eacmoe_lightning.offload import store as stores
from eacmoe_lightning.offload.codecs import Codec
from eacmoe_lightning.offload.codecs import codec as codec_named
from eacmoe_lightning.offload.model import STORE, attach, encode, packed_codec, refuse_to_save
from eacmoe_lightning.offload.store import ExpertStore, Key
from eacmoe_lightning.originals import local_directory
from eacmoe_lightning.store import read_tensors
from eacmoe_lightning.streaming import Checkpoint, StreamedModel

Records = Iterator[tuple[Key, bytes]]


def load_offloaded(
    name_or_path: str | Path,
    cache_bytes: int | float,
    codec: str | Codec = "lossless",
    directory: str | Path | None = None,
    dtype: str = "auto",
    device: str | torch.device = "cpu",
    **options: Any,
) -> PreTrainedModel:
    """Loads a model with its experts offloaded; `model.offload` is their handle.

    Args:
        name_or_path: a compressed or run directory, `bundled`, or an original's directory or hub id.
        cache_bytes, codec: as of `offload_experts`.
        directory: where the store is kept; one that is already there, of this model and codec, is used as it is.
        dtype: of everything that is not quantized.
        device: where computing takes place.
        **options: further ones of `offload_experts`.

    Raises:
        FileNotFoundError: there is no such model.
        ValueError, StoreError: as `offload_experts`, or a file of the model is damaged.
    """
    path, how = Path(name_or_path), codec_named(codec)
    path = path / "compressed" if compressed.is_compressed(path / "compressed") else path
    options |= {"cache_bytes": cache_bytes, "device": device}
    if compressed.is_compressed(path):
        return _load_packed(path, how, directory, dtype, options)
    streamed = StreamedModel(Checkpoint(str(name_or_path), dtype), device)
    about = _about(str(local_directory(str(name_or_path))), how, streamed.weights.dtype)
    attach(streamed, _store(directory, lambda: _dense_records(streamed, how), about), **options)
    streamed.load_all()
    return streamed.model


def _load_packed(
    path: Path, how: Codec, directory: str | Path | None, dtype: str, options: dict[str, Any]
) -> PreTrainedModel:
    config = AutoConfig.from_pretrained(path)
    torch_dtype = config.dtype if dtype == "auto" else getattr(torch, dtype)
    store = _store(directory, lambda: _packed_records(path, config, how), _about(str(path), how, torch_dtype))

    def prepare(model: PreTrainedModel) -> None:
        attach(MoEModel(model), store, **options)
        ignore_unexpected(model, r"\.experts\.")

    config.quantization_config["prepare"] = [prepare]
    model = AutoModelForCausalLM.from_pretrained(path, config=config, dtype=torch_dtype)
    model.config.quantization_config.prepare = ()
    model.save_pretrained = refuse_to_save  # in the place of a packed model's own
    return model.to(options["device"]).eval()


def _about(source: str, how: Codec, dtype: torch.dtype) -> dict[str, str]:
    """What a store must have been made of to be used again."""
    return {"codec": how.specification, "model": compressed.fingerprint(source), "dtype": str(dtype)}


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


def _packed_records(path: Path, config: PreTrainedConfig, how: Codec) -> Records:
    bits = config.quantization_config["bits"]
    with torch.device("meta"):
        moe = MoEModel(AutoModelForCausalLM.from_config(config))
    for block in moe.moe_blocks:
        tensors, _ = read_tensors(path / compressed.SHARD.format(block.index))
        for expert in range(block.num_experts):
            for projection in block.experts.projections:
                name = f"{block.name}.{block.experts_name}.{projection}"
                scale, width = tensors[f"{name}.scale"], bits[name]
                columns = block.experts.weight(projection).shape[-1]
                own = width if isinstance(width, int) else tuple(width)
                codes = expert_codes(tensors[f"{name}.codes"], own, expert, columns)
                parts = codes, scale[expert], tensors[f"{name}.zero_point"][expert]
                kind = packed_codec(how, own if isinstance(own, int) else own[expert], columns // scale.shape[-1])
                yield Key(block.index, expert, projection), kind.encode_packed(parts)


def _dense_records(streamed: StreamedModel, how: Codec) -> Records:
    for block in streamed.moe_blocks:
        names = {p: f"{block.name}.{block.experts_name}.{p}" for p in block.experts.projections}
        stacks = streamed.weights.read(names.values())  # in host memory
        for expert in range(block.num_experts):
            for projection, name in names.items():
                key = Key(block.index, expert, projection)
                yield key, encode(how, stacks[name][expert], key)
