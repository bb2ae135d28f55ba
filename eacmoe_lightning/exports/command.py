"""`python train.py export`: write another program's format, read it back, compare, and only then say done."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from safetensors.torch import save_file
from torch import Tensor

from eacmoe_lightning import targets
from eacmoe_lightning.exports import compressed_tensors, gptq
from eacmoe_lightning.exports.check import Difference, Reference, modules_needed, read_gptq
from eacmoe_lightning.exports.source import Source
from eacmoe_lightning.store import whole_directory, write_atomically, write_json

OWN_FILES = ("config.json", "weights.safetensors.index.json")


def export(
    source: str,
    output: str,
    format: Literal["compressed-tensors", "gptq", "gptq_v2", "dense"] = "compressed-tensors",
    target: str | None = None,
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
    tensor_parallel: int = 1,
) -> Difference:
    """Writes a compressed model in a format that other programs load, reads it back and compares every weight.

    Args:
        source: A run directory or a compressed directory.
        output: The directory to write; it must be empty or not exist.
        format: compressed-tensors (pack-quantized, symmetric), gptq (zero points less 1, symmetric), gptq_v2 (true
            zero points) or dense (decoded, of the original's size).
        target: The engine that is to load it: transformers, vllm, sglang or gptqmodel; null: the format's first. What
            it is known not to load, or to load wrongly, is refused.
        dtype: Of everything that is not quantized; auto: in which the model was calibrated.
        tensor_parallel: Over how many devices the engine is to cut each linear; group sizes that do not allow it are
            refused.

    Raises:
        FileNotFoundError: the source holds no compressed model.
        ValueError: the target does not load such a model, or the output is not empty.
        StoreError: a file of the source is damaged, or what was read back is not the model; nothing is kept then.
    """
    row = targets.find(format, target)
    place = Path(output)
    if place.exists() and (not place.is_dir() or any(place.iterdir())):
        raise ValueError(f"{output} (--output) is not empty: pass a directory that is, or does not exist")
    opened = Source(source, dtype)
    weights = opened.grids()
    targets.check(row, weights, tensor_parallel)
    if format == "compressed-tensors":
        _require_library()
    place.parent.mkdir(parents=True, exist_ok=True)
    with whole_directory(place) as partial:
        try:
            config = _write(opened, weights, row, partial)
            difference = _read_back(opened, row, config, partial)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    print(f"{output}: {format} for {row.engine} ({row.version}). Read back: {difference}")
    if not row.verified:
        print(f"warning: {row.engine} was never run on an export of this package: try it before you serve it")
    return difference


def _require_library() -> None:
    try:
        import compressed_tensors as library  # noqa: F401
    except ImportError as error:
        raise ValueError(
            "--format compressed-tensors reads its result back with that library: "
            'pip install "eacmoe-lightning[export]"'
        ) from error


def _write(
    source: Source, weights: list[targets.WeightGrid], row: targets.Target, directory: Path
) -> dict[str, Any] | None:
    """Weights, index, config, tokenizer and generation config; the quantization config."""
    linears: dict[str, list[str]] = {}
    matrices: list[str] = []  # that are not quantized

    def shards() -> Iterator[dict[str, Tensor]]:
        if row.format == "dense":
            yield from dense_shards(source)
            return
        for shard in source.shards():
            originals = source.original_names(shard.dense)
            tensors = dict(shard.dense if row.names == "unstacked" else originals)
            for linear in shard.linears:
                name = linear.unstacked if row.names == "unstacked" else linear.original
                linears.setdefault(linear.parameter, []).append(name)
                if row.format == "compressed-tensors":
                    tensors |= compressed_tensors.to_tensors(name, linear.quantized, source.dtype)
                else:
                    tensors |= gptq.to_tensors(name, linear.quantized, is_v2=row.format == "gptq_v2")
            matrices.extend(n.removesuffix(".weight") for n, t in originals.items() if t.ndim == 2)
            yield tensors

    _write_shards(directory, shards(), len(source.moe.blocks) + 1)
    config = None
    if row.format == "compressed-tensors":
        routers = [block.router_parameter_name.removesuffix(".weight") for block in source.moe.moe_blocks]
        ignored = sorted({"lm_head", *matrices, *routers})
        config = compressed_tensors.quantization_config(weights, linears, ignored)
    elif row.format != "dense":
        config = gptq.quantization_config(weights, linears, is_v2=row.format == "gptq_v2")
    source.config.save_pretrained(directory)
    path = directory / "config.json"
    written = json.loads(path.read_text()) | {"dtype": source.dtype_name}
    written |= {"architectures": [type(source.skeleton).__name__]}
    write_json(path, written | ({"quantization_config": config} if config else {}))
    if config and row.format != "compressed-tensors":
        write_json(directory / "quantize_config.json", config)
    for file in source.path.iterdir():  # tokenizer, generation config
        if file.name not in OWN_FILES and file.suffix != ".safetensors":
            shutil.copyfile(file, directory / file.name)
    return config


def dense_shards(source: Source) -> Iterator[dict[str, Tensor]]:
    """Ordinary weights under the original's names, a block at a time."""
    for block, quantized, rest in source.blocks():
        decoded = {name: block.as_parameter(name, q.dequantize(source.dtype)) for name, q in quantized.items()}
        yield source.original_names(decoded | source.narrowed(rest))


def _write_shards(directory: Path, shards: Iterator[dict[str, Tensor]], number: int) -> None:
    """`model-00001-of-00003.safetensors` and the index, as transformers names them."""
    places: dict[str, str] = {}
    size = 0
    for i, tensors in enumerate(shards):
        file = f"model-{i + 1:05d}-of-{number:05d}.safetensors"
        tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
        write_atomically(directory / file, lambda partial, t=tensors: save_file(t, partial, {"format": "pt"}))
        places |= dict.fromkeys(tensors, file)
        size += sum(tensor.nbytes for tensor in tensors.values())
    write_json(directory / "model.safetensors.index.json", {"metadata": {"total_size": size}, "weight_map": places})


def _read_back(source: Source, row: targets.Target, config: dict[str, Any] | None, directory: Path) -> Difference:
    reference = Reference(source)
    if config is None or row.format == "compressed-tensors":
        return reference.compare_loaded(directory, modules_needed(source.skeleton))
    decoded = read_gptq(directory, config)
    if row.names == "unstacked":
        renamed = {f"{own.unstacked}.weight": f"{own.original}.weight" for s in source.shards() for own in s.linears}
        linears = {renamed[name]: decoded.pop(name) for name in renamed}
        decoded = linears | source.original_names(decoded)
    return reference.compare_decoded(source, decoded, directory)


def main(args: list[str] | None = None) -> None:
    """The command line of `export`."""
    from jsonargparse import auto_cli

    auto_cli(export, args=args, prog=f"{Path(sys.argv[0]).name} export", as_positional=False)
