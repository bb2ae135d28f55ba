"""The compressed model directory: what a run leaves behind, and `load`.

    config.json        model_type "eacmoe", the original's config, how each weight is stored
    weights-block-003.safetensors, weights-rest.safetensors
    tokenizer, generation config

Quantized weights are `<parameter>.codes` (packed, `bits` bytes for eight codes), `.scale` (float16) and `.zero_point`
(uint8), under the parameter names that the model has in memory; everything else is stored as it is. The model type is
not one that transformers knows, so nobody can open the directory without this package and get random weights.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from eacmoe_lightning.adapter import MoEModel, local_directory, resolve_model
from eacmoe_lightning.grid import Quantized, packed, take_quantized
from eacmoe_lightning.store import StoreError, read_tensors, write_json, write_tensors

MODEL_TYPE = "eacmoe"
FORMAT_VERSION = 1
REST = "weights-rest.safetensors"


def is_compressed(path: str | Path) -> bool:
    config = Path(path) / "config.json"
    return config.exists() and json.loads(config.read_text()).get("model_type") == MODEL_TYPE


def read_config(path: str | Path) -> dict[str, Any]:
    """The config of a compressed directory.

    Raises:
        FileNotFoundError: it is not one.
        ValueError: a newer version of this package wrote it.
    """
    if not is_compressed(path):
        raise FileNotFoundError(f"{path} is not a compressed model directory of eacmoe-lightning (no such config.json)")
    config = json.loads((Path(path) / "config.json").read_text())
    if config["format_version"] > FORMAT_VERSION:
        raise ValueError(
            f"{path} has format version {config['format_version']}, this package reads up to {FORMAT_VERSION}"
        )
    return config


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
    quantized_blocks: list[dict[str, Quantized]],
    description: dict[str, Any],
) -> None:
    """Writes a compressed directory, whole or not at all.

    Args:
        path: where; an older directory there is replaced.
        moe: the compressed model (dequantized, calibrated) as it is in memory.
        name_or_path: the original, for its tokenizer, generation config and dtype.
        quantized_blocks: per block, the codes by parameter name.
        description: kept in the config under `quantization`.
    """
    path, source = Path(path), resolve_model(name_or_path)
    partial = path.with_name(f".{path.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    config = AutoConfig.from_pretrained(source)
    stored_dtype = getattr(config.get_text_config(), "dtype", None) or moe.model.dtype
    bits: dict[str, int] = {}
    state = moe.model.state_dict()
    tied = _tied_names(moe.model)
    written: set[str] = set()
    for block, quantized in zip(moe.blocks, quantized_blocks, strict=True):
        tensors = packed(quantized)
        bits |= {name: q.bits for name, q in quantized.items()}
        own = {n: t for n, t in state.items() if n.startswith(f"{block.name}.") and n not in quantized}
        tensors |= {n: _narrowed(t, stored_dtype) for n, t in own.items()}
        write_tensors(partial / f"weights-block-{block.index:03d}.safetensors", tensors)
        written |= own.keys() | quantized.keys()
    rest = {n: _narrowed(t, stored_dtype) for n, t in state.items() if n not in written and n not in tied}
    write_tensors(partial / REST, rest)
    AutoTokenizer.from_pretrained(source).save_pretrained(partial)
    if moe.model.can_generate():
        moe.model.generation_config.save_pretrained(partial)
    write_json(
        partial / "config.json",
        {
            "model_type": MODEL_TYPE,
            "format_version": FORMAT_VERSION,
            "original": {"name_or_path": name_or_path, "config": config.to_dict()},
            "dtype": str(moe.model.dtype).rpartition(".")[2],
            "quantization": description | {"bits": bits},
        },
    )
    if path.exists():
        old = path.with_name(f".{path.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        path.rename(old)
        partial.rename(path)
        shutil.rmtree(old)
    else:
        partial.rename(path)


def load(path: str | Path, dtype: str = "auto") -> PreTrainedModel:
    """The compressed model as a transformers causal LM in eval mode, its weights decoded.

    Args:
        path: a compressed directory, or a run directory that holds one.
        dtype: `auto` (in which it was calibrated), `float32`, `bfloat16` or `float16`.

    Raises:
        FileNotFoundError: there is no compressed model.
        StoreError: a file is missing, truncated or altered, or tensors are missing.
    """
    path = Path(path)
    path = path / "compressed" if is_compressed(path / "compressed") else path
    config = read_config(path)
    torch_dtype = getattr(torch, config["dtype"] if dtype == "auto" else dtype)
    original = dict(config["original"]["config"])
    model_config = AutoConfig.for_model(original.pop("model_type"), **original)
    model_config.dtype = torch_dtype
    with no_init_weights():  # memory is reserved, not touched: every tensor is replaced below
        model = AutoModelForCausalLM.from_config(model_config, dtype=torch_dtype)
    model.tie_weights()
    moe, tied = MoEModel(model), _tied_names(model)
    state: dict[str, Tensor] = {}
    files = [path / f"weights-block-{block.index:03d}.safetensors" for block in moe.blocks] + [path / REST]
    bits = config["quantization"]["bits"]
    owner = {name: block for block in moe.blocks for name in block.weights()}
    for file in files:
        tensors, _ = read_tensors(file)
        for name in [n.removesuffix(".codes") for n in tensors if n.endswith(".codes")]:
            quantized = take_quantized(tensors, name, bits[name], owner[name].weights()[name][1].shape[-1])
            state[name] = owner[name].as_parameter(name, quantized.dequantize(torch_dtype)).contiguous()
        state |= {name: t.to(torch_dtype) if t.is_floating_point() else t for name, t in tensors.items()}
    missing, unexpected = model.load_state_dict(state, strict=False, assign=True)
    model.tie_weights()
    if unexpected or set(missing) - tied:
        raise StoreError(
            f"{path} does not fit its config: missing {sorted(set(missing) - tied)[:3]}, unexpected {unexpected[:3]}"
        )
    generation = path / "generation_config.json"
    if generation.exists():
        model.generation_config = GenerationConfig.from_pretrained(path)
    model.config.name_or_path = str(path)
    return model.eval()


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
