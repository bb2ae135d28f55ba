"""`load_offloaded`: a model whose experts go from its files into the store, a block at a time, never all in memory.

A compressed directory's experts are read shard by shard, an original's by transformers itself, which is given a model
in which only one block has experts. Then the rest is loaded with the offloaded experts already in their places.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from eacmoe_lightning import compressed
from eacmoe_lightning.adapter import MoEModel, local_directory, resolve_model
from eacmoe_lightning.grid import expert_codes
from eacmoe_lightning.offload import store as stores
from eacmoe_lightning.offload.codecs import Codec
from eacmoe_lightning.offload.codecs import codec as codec_named
from eacmoe_lightning.offload.model import STORE, attach, expert_records, packed_codec, refuse_to_save
from eacmoe_lightning.offload.store import ExpertStore, Key
from eacmoe_lightning.store import read_tensors
from eacmoe_lightning.transformers_loading import PackedConfig

METHOD = "eacmoe-offload"


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
    path = Path(resolve_model(str(name_or_path)))
    path = path / "compressed" if compressed.is_compressed(path / "compressed") else path
    is_packed, how = compressed.is_compressed(path), codec_named(codec)
    config = AutoConfig.from_pretrained(path if is_packed else resolve_model(str(name_or_path)))
    source = str(path if is_packed else local_directory(str(name_or_path)))
    torch_dtype = config.dtype if dtype == "auto" else getattr(torch, dtype)

    def records() -> Iterator[tuple[Key, bytes]]:
        return _packed_records(path, config, how) if is_packed else _dense_records(source, torch_dtype, how)

    about = {"codec": how.specification, "model": compressed.fingerprint(source), "dtype": str(torch_dtype)}
    store = _store(directory, records, about)

    def prepare(model: PreTrainedModel) -> None:
        attach(MoEModel(model), store, cache_bytes, device=device, **options)

    model = _from_pretrained(source, config, torch_dtype, prepare).to(device)
    model.save_pretrained = refuse_to_save  # in the place of a packed model's own
    return model


def _store(directory: str | Path | None, records: Callable[[], Any], about: dict[str, Any]) -> ExpertStore:
    if directory is None:
        return ExpertStore.in_memory(records(), about)
    path = Path(directory) / STORE
    if path.exists():
        store = ExpertStore.open(path)
        if store.about == about:
            return store
    stores.write(path, records(), about)
    return ExpertStore.open(path)


def _packed_records(path: Path, config: PreTrainedConfig, how: Codec) -> Iterator[tuple[Key, bytes]]:
    bits = config.quantization_config["bits"]
    for block in _skeleton(config).moe_blocks:
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


def _dense_records(source: str, dtype: torch.dtype, how: Codec) -> Iterator[tuple[Key, bytes]]:
    config = AutoConfig.from_pretrained(source)
    for index in [block.index for block in _skeleton(config).moe_blocks]:

        def keep_one(model: PreTrainedModel, index: int = index) -> None:
            for block in MoEModel(model).moe_blocks:
                if block.index != index:
                    block.layer.set_submodule(block.experts_name, torch.nn.Identity())

        model = _from_pretrained(source, AutoConfig.from_pretrained(source), dtype, keep_one)
        yield from expert_records(MoEModel(model).moe_blocks, how)


def _skeleton(config: PreTrainedConfig) -> MoEModel:
    with torch.device("meta"):
        return MoEModel(AutoModelForCausalLM.from_config(config))


def _from_pretrained(
    source: str,
    config: PreTrainedConfig,
    dtype: torch.dtype,
    prepare: Callable[[PreTrainedModel], None],
) -> PreTrainedModel:
    """transformers' own, with `prepare` on the model before its weights are read."""

    def prepare_and_ignore(model: PreTrainedModel) -> None:
        prepare(model)
        ignored = model._keys_to_ignore_on_load_unexpected or ()
        model._keys_to_ignore_on_load_unexpected = {*ignored, r"\.experts\."}

    if not getattr(config, "quantization_config", None):
        config.quantization_config = {"quant_method": METHOD}
    config.quantization_config["prepare"] = [prepare_and_ignore]
    try:
        model = AutoModelForCausalLM.from_pretrained(source, config=config, dtype=dtype)
    finally:
        del config.quantization_config["prepare"]
    if isinstance(kept := getattr(model.config, "quantization_config", None), PackedConfig):
        kept.prepare = ()
    return model.eval()


@register_quantization_config(METHOD)
class PreparedConfig(QuantizationConfigMixin):
    """Carries a function through `from_pretrained`."""

    def __init__(self, prepare: Any = None, **_: Any) -> None:
        self.quant_method, self.prepare = METHOD, prepare


@register_quantizer(METHOD)
class PreparedQuantizer(HfQuantizer):
    """Calls that function; quantizes nothing."""

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **_: Any) -> None:
        self.quantization_config.prepare[0](model)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: Any) -> None:
        model.hf_quantizer = None
        for holder in (model.config, model):
            vars(holder).pop("quantization_config", None)

    def is_serializable(self) -> bool:
        return False

    @property
    def is_trainable(self) -> bool:
        return False
