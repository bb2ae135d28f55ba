"""Writes an export as a Hugging Face directory: shards and index, config, tokenizer, generation config."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from eacmoe_lightning.compressed.card import NAME
from eacmoe_lightning.compressed.format import CODE, INDEX
from eacmoe_lightning.exports.source import Source
from eacmoe_lightning.models.remote_code import code_files
from eacmoe_lightning.run.files import StoreError, copy_files, digest, write_atomically, write_json

FORMAT_FILES = ("config.json", INDEX, CODE, NAME)  # of a compressed directory: not copied


def write_checkpoint(
    source: Source, directory: Path, shards: Iterator[dict[str, Tensor]], quantization: dict[str, Any] | None = None
) -> None:
    """Fills a directory that transformers opens as the original's model type.

    Args:
        source: the model whose config, tokenizer and generation config are written.
        directory: the directory to fill.
        shards: all tensors under their names in the checkpoint, one file's tensors at a time, written as they arrive;
            those of draft layers come after them.
        quantization: the `quantization_config` of config.json.
    """
    draft = [source.draft] if source.draft else []
    _write_shards(directory, chain(shards, draft), len(source.moe.blocks) + 1 + len(draft))
    source.config.save_pretrained(directory)
    config = json.loads((directory / "config.json").read_text())
    config |= {"dtype": source.dtype_name, "architectures": [type(source.skeleton).__name__]}
    write_json(directory / "config.json", config | ({"quantization_config": quantization} if quantization else {}))
    beside = (file for file in {*source.path.iterdir(), *code_files(source.path)} if file.is_file())
    left = (file for file in beside if file.name not in FORMAT_FILES and file.suffix != ".safetensors")
    copy_files(left, source.path, directory)


def check_draft(source: Source, directory: Path) -> None:
    """Raises StoreError if the draft layers in a filled directory are not those of the source, bit for bit."""
    if not source.draft:
        return
    written = load_file(sorted(directory.glob("model-*.safetensors"))[-1])
    changed = [n for n, t in source.draft.items() if n not in written or digest({n: t}) != digest({n: written[n]})]
    if changed:
        raise StoreError(f"{directory}: {changed[0]} of the draft layers was written otherwise than it was read")


def _write_shards(directory: Path, shards: Iterator[dict[str, Tensor]], num_files: int) -> None:
    """Writes `model-00001-of-00003.safetensors` and so on, and the index, named as transformers names them."""
    weight_map: dict[str, str] = {}
    size = 0
    for i, tensors in enumerate(shards):
        file = f"model-{i + 1:05d}-of-{num_files:05d}.safetensors"
        tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
        write_atomically(directory / file, lambda partial, t=tensors: save_file(t, partial, {"format": "pt"}))
        weight_map |= dict.fromkeys(tensors, file)
        size += sum(tensor.nbytes for tensor in tensors.values())
    write_json(directory / "model.safetensors.index.json", {"metadata": {"total_size": size}, "weight_map": weight_map})
