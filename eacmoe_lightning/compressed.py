"""The compressed model directory: what a run leaves behind, and `load`.

    config.json        model_type "eacmoe", the original's config, how each weight is stored
    weights-block-003.safetensors, weights-rest.safetensors, weights.safetensors.index.json
    tokenizer, generation config

Quantized weights are `<parameter>.codes` (packed, `bits` bytes for eight codes), `.scale` (float16) and `.zero_point`
(uint8), under the parameter names that the model has in memory; everything else is stored as it is. Where the experts
of a stack differ in bits, the config has a list and `.codes` is flat, one expert after another (format version 2). A
pruned model's config says under `kept_experts` which experts its blocks still have (version 2 as well). Such a
directory is read by `load`, or by transformers once this package is imported (`transformers_loading.py`).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from eacmoe_lightning.adapter import Block, MoEModel
from eacmoe_lightning.grid import Quantized, packed, take_quantized
from eacmoe_lightning.models.transformers_loader import empty_model
from eacmoe_lightning.originals import local_directory, resolve_model
from eacmoe_lightning.packed_modules import set_activations
from eacmoe_lightning.pruning.surgery import pruned_config
from eacmoe_lightning.skipping import stored
from eacmoe_lightning.store import StoreError, read_tensors, whole_directory, write_json, write_tensors
from eacmoe_lightning.streaming import StreamedModel
from eacmoe_lightning.transformers_loading import INDEX, METHOD
from eacmoe_lightning.version import __version__

FORMAT_VERSION = 2  # 1 where no experts of a stack differ in bits, and none were removed
SHARD, REST = "weights-block-{:03d}.safetensors", "weights-rest.safetensors"


def is_compressed(path: str | Path) -> bool:
    config = Path(path) / "config.json"
    return config.exists() and json.loads(config.read_text()).get("model_type") == METHOD


def read_config(path: str | Path) -> dict[str, Any]:
    """The config of a compressed directory.

    Raises:
        FileNotFoundError: it is not one.
        ValueError: a newer version of this package wrote it.
    """
    if not is_compressed(path):
        raise FileNotFoundError(f"{path} is not a compressed model directory of eacmoe-lightning (no such config.json)")
    config = json.loads((Path(path) / "config.json").read_text())
    check_format(config)
    return config


def original_config(config: dict[str, Any]) -> PreTrainedConfig:
    """The original's config that a compressed directory's config holds."""
    original = dict(config["original"]["config"])
    return AutoConfig.for_model(original.pop("model_type"), **original)


def check_format(config: dict[str, Any]) -> None:
    """Raises ValueError for a config.json that a newer version of this package wrote."""
    if config["format_version"] > FORMAT_VERSION:
        raise ValueError(
            f"the compressed model has format version {config['format_version']}, this eacmoe-lightning "
            f"({__version__}) reads up to {FORMAT_VERSION}: install a newer one"
        )


def fingerprint(name_or_path: str) -> str:
    """SHA-256 over the original's config and its weight files' headers, ends and sizes."""
    path = local_directory(name_or_path)
    sha = hashlib.sha256((path / "config.json").read_bytes())
    for file in sorted(path.glob("*.safetensors")):
        with open(file, "rb") as stream:
            header = stream.read(8)
            sha.update(header + stream.read(min(int.from_bytes(header, "little"), 1 << 26)))
            stream.seek(-min(file.stat().st_size, 1 << 20), 2)
            sha.update(stream.read())
        sha.update(f"{file.name} {file.stat().st_size}".encode())
    return sha.hexdigest()


def save(
    path: str | Path,
    moe: MoEModel,
    name_or_path: str,
    quantized_blocks: Iterable[dict[str, Quantized]],
    description: dict[str, Any],
) -> None:
    """Writes a compressed directory, whole or not at all.

    Args:
        path: where; an older directory there is replaced.
        moe: the compressed model (dequantized, calibrated), in memory or streamed.
        name_or_path: the original, for its tokenizer, generation config and dtype; or the compressed directory that the
            model was cut out of, for those and for what it says of the original and of skipping.
        quantized_blocks: per block, the codes by parameter name.
        description: kept in the config under `quantization`.

    Raises:
        StoreError: a weight is not quantized.
    """
    source = resolve_model(name_or_path)
    held = read_config(source) if is_compressed(source) else {}
    config = pruned_config(original_config(held) if held else AutoConfig.from_pretrained(source), moe)
    stored_dtype = getattr(config.get_text_config(), "dtype", None) or moe.model.dtype
    tied = _tied_names(moe.model)
    names = [name for name in moe.model.state_dict() if name not in tied]
    grids: dict[str, tuple[int, int]] = {}

    def others(chosen: list[str]) -> dict[str, Tensor]:
        return {name: _narrowed(tensor, stored_dtype) for name, tensor in moe.read(chosen).items()}

    def shards() -> Iterator[tuple[str, dict[str, Tensor]]]:
        for block, quantized in zip(moe.blocks, quantized_blocks, strict=True):
            missing = block.weights().keys() - quantized.keys()
            if missing and description.get("quantizer") != "none":
                raise StoreError(f"{sorted(missing)[0]} was not quantized, so no model is written")
            grids.update({name: (q.bits, q.group_size) for name, q in quantized.items()})
            own = [name for name in names if name.startswith(f"{block.name}.")]
            yield SHARD.format(block.index), packed(quantized) | others([n for n in own if n not in quantized])
        in_blocks = tuple(f"{block.name}." for block in moe.blocks)
        yield REST, others([name for name in names if not name.startswith(in_blocks)])

    with whole_directory(path) as partial:
        _write_weights(partial, shards())
        AutoTokenizer.from_pretrained(source).save_pretrained(partial)
        if moe.model.can_generate():
            moe.model.generation_config.save_pretrained(partial)
        write_json(
            partial / "config.json",
            {
                "model_type": METHOD,
                "format_version": 2 if moe.is_pruned or any(not isinstance(b, int) for b, _ in grids.values()) else 1,
                "original": {
                    "name_or_path": held["original"]["name_or_path"] if held else name_or_path,
                    "config": config.to_dict(),
                },
                "dtype": str(moe.model.dtype).rpartition(".")[2],
                "quantization": description
                | {
                    "bits": {name: bits for name, (bits, _) in grids.items()},
                    "group_sizes": {name: group_size for name, (_, group_size) in grids.items()},
                },
            }
            | {key: value for key, value in held.items() if key == stored.KEY},
        )


def save_packed(path: str | Path, model: PreTrainedModel) -> None:
    """Writes a packed model that `load` gave, as it is in memory, without its tokenizer."""
    config = {k: v for k, v in model.hf_quantizer.quantization_config.directory_config.items() if k != stored.KEY}
    shards: dict[str, dict[str, Tensor]] = {}
    for name, tensor in untied(model).items():
        layer = re.match(r"[^0-9]*\.(\d+)\.", name)
        shards.setdefault(SHARD.format(int(layer[1])) if layer else REST, {})[name] = tensor
    with whole_directory(path) as partial:
        _write_weights(partial, shards.items())
        model.generation_config.save_pretrained(partial)
        dtype = str(model.dtype).rpartition(".")[2]
        write_json(partial / "config.json", config | {"dtype": dtype} | stored.stored_rule(model))


def _write_weights(directory: Path, shards: Iterable[tuple[str, dict[str, Tensor]]]) -> None:
    """The shards and the index in which transformers looks up what lies where."""
    places: dict[str, str] = {}
    for file, tensors in shards:
        write_tensors(directory / file, tensors)
        places |= dict.fromkeys(tensors, file)
    write_json(directory / INDEX, {"metadata": {"total_size": size_of(directory)}, "weight_map": places})


def load(path: str | Path, dtype: str = "auto", packed: bool = True, activations: str = "exact") -> PreTrainedModel:
    """The compressed model as a transformers causal LM in eval mode.

    Args:
        path: a compressed directory, or a run directory that holds one.
        dtype: `auto` (in which it was calibrated), `float32`, `bfloat16` or `float16`.
        packed: keep quantized weights packed in memory; otherwise they are decoded to an ordinary model.
        activations: `exact`, or `int8` for faster products with rounded activations (LOG.md has what that costs).

    Raises:
        FileNotFoundError: there is no compressed model.
        StoreError: a file is missing, truncated or altered, or tensors are missing.
        ValueError: a newer version of this package wrote it.
    """
    path = Path(path)
    path = path / "compressed" if is_compressed(path / "compressed") else path
    config = read_config(path)
    torch_dtype = getattr(torch, config["dtype"] if dtype == "auto" else dtype)
    if packed:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch_dtype)
        set_activations(model, activations)
        return model
    moe = StreamedModel(CompressedWeights(path, dtype))
    moe.load_all()
    return moe.model.requires_grad_(True)


class CompressedWeights:
    """A compressed directory's weights, decoded as they are read (see `streaming.Weights`).

    Args:
        path: of the compressed directory.
        dtype: `auto` (in which it was calibrated), `float32`, `bfloat16` or `float16`.

    Raises:
        FileNotFoundError: it is none.
        StoreError: a file is missing, truncated or altered; when it is read.
        ValueError: a newer version of this package wrote it.
    """

    def __init__(self, path: str | Path, dtype: str = "auto") -> None:
        self.path = Path(path)
        config = self._directory_config = read_config(path)
        self.dtype: torch.dtype = getattr(torch, config["dtype"] if dtype == "auto" else dtype)
        self._config = original_config(config)
        self._config.dtype = self.dtype
        self._bits = config["quantization"]["bits"]
        moe = MoEModel(self.skeleton())
        self._blocks = moe.blocks
        self._owners = {name: block for block in moe.blocks for name in block.weights()}
        self._files = {name: SHARD.format(b.index) for b in moe.blocks for name in _names(b)}

    def __str__(self) -> str:
        return str(self.path)

    def skeleton(self) -> PreTrainedModel:
        model = empty_model(self._config, self.dtype)
        if (self.path / "generation_config.json").exists():
            model.generation_config = GenerationConfig.from_pretrained(self.path)
        model.config.name_or_path = str(self.path)
        stored.restore_rule(model, self._directory_config)
        return model

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        names, found = set(names), {}
        for file in sorted({self._files.get(name, REST) for name in names}):
            tensors, _ = read_tensors(self.path / file)
            for name in names & {n.removesuffix(".codes") for n in tensors if n.endswith(".codes")}:
                block = self._owners[name]
                quantized = take_quantized(tensors, name, self._bits[name], block.weights()[name][1].shape[-1])
                found[name] = block.as_parameter(name, quantized.dequantize(self.dtype)).contiguous()
            for name in names & tensors.keys():
                tensor = tensors[name]
                found[name] = tensor.to(self.dtype) if tensor.is_floating_point() else tensor
        return found

    def quantized(self, index: int) -> dict[str, Quantized]:
        """A block's codes, scales and zero points by parameter name."""
        tensors, _ = read_tensors(self.path / SHARD.format(index))
        weights = {n: weight for n, (_, weight) in self._blocks[index].weights().items() if n in self._bits}
        return {n: take_quantized(tensors, n, self._bits[n], weight.shape[-1]) for n, weight in weights.items()}

    def prefetch(self, names: Iterable[str]) -> None:
        """Packed blocks are small: they are read when they are needed."""


def _names(block: Block) -> list[str]:
    return [f"{block.name}.{name}" for name in block.layer.state_dict()]


def untied(model: PreTrainedModel) -> dict[str, Tensor]:
    """The model's tensors, each once."""
    tied = _tied_names(model)
    return {name: tensor for name, tensor in model.state_dict().items() if name not in tied}


def _tied_names(model: PreTrainedModel) -> set[str]:
    """Names that only repeat another tensor (a tied output embedding)."""
    seen: dict[int, str] = {}
    repeated = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if seen.setdefault(id(tensor), name) != name:
            repeated.add(name)
    return repeated


def _narrowed(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in the original's dtype where that loses nothing, else as it is."""
    if tensor.is_floating_point() and torch.equal(tensor.to(dtype).to(tensor.dtype), tensor):
        return tensor.to(dtype)
    return tensor


def size_of(path: str | Path) -> int:
    """Bytes of the weight files in a model directory."""
    return sum(file.stat().st_size for file in Path(path).glob("*.safetensors"))
