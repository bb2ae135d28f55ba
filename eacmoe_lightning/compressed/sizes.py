"""What the weights of a compressed directory take on disk, from the headers of its files."""

from __future__ import annotations

import json
from pathlib import Path

from eacmoe_lightning.compressed.format import read_config
from eacmoe_lightning.models.moe import MoEModel

HEAD = "head"  # the part of the output head


def stored_parts(directory: Path, moe: MoEModel) -> dict[str, tuple[int, float, int]]:
    """By part, the number of quantized weights, the mean bits of their codes, and the bytes of all that they store.

    The parts are those of the blocks (`calibration.recipe.PARTS`), and HEAD for a quantized output head.
    """
    sizes, bits = tensor_sizes(directory), read_config(directory)["quantization"]["bits"]
    parts: dict[str, tuple[int, float, int]] = {}
    weights = {name: part_and_weight for block in moe.blocks for name, part_and_weight in block.weights().items()}
    parameters = dict(moe.model.named_parameters())
    weights |= {name: (HEAD, parameters[name]) for name in bits.keys() & parameters.keys() - weights.keys()}
    for name, (part, weight) in weights.items():
        if name not in bits:
            continue
        width = sum(bits[name]) / len(bits[name]) if isinstance(bits[name], list) else bits[name]
        stored = sum(size for tensor, size in sizes.items() if tensor.startswith(f"{name}."))
        number, codes, size = parts.get(part, (0, 0.0, 0))
        total = number + weight.numel()
        parts[part] = total, (number * codes + weight.numel() * width) / total, size + stored
    return parts


def tensor_sizes(directory: Path) -> dict[str, int]:
    """The bytes of each tensor in the safetensors files of a directory, from their headers."""
    sizes = {}
    for file in directory.glob("*.safetensors"):
        with open(file, "rb") as opened:
            header = json.loads(opened.read(int.from_bytes(opened.read(8), "little")))
        header.pop("__metadata__", None)
        sizes |= {name: entry["data_offsets"][1] - entry["data_offsets"][0] for name, entry in header.items()}
    return sizes
