"""The compressed model directory: what a run leaves behind, and `load`.

    config.json        model_type "eacmoe", the original's config, how each weight is stored
    weights-block-003.safetensors, weights-rest.safetensors, weights.safetensors.index.json
    tokenizer, generation config

Quantized weights are `<parameter>.codes` (packed, `bits` bytes for eight codes), `.scale` (float16) and `.zero_point`
(uint8), under the parameter names that the model has in memory; everything else is stored as it is. Where the experts
of a stack differ in bits, the config has a list and `.codes` is flat, one expert after another (format version 2). A
pruned model's config says under `kept_experts` which experts its blocks still have (version 2 as well). Weights on a
lattice have `.stream`, `.ends`, `.shape` and `.scale` (`quantization/packing.py`), and the config lists their names
under `lattice` (version 3).

Such a directory is read by `load`, or by transformers once this package is imported (`loading.py`).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from eacmoe_lightning.version import __version__

FORMAT_VERSION = 3  # 3 with weights on a lattice; 2 where experts of a stack differ in bits or were removed; else 1
LATTICE = "lattice"  # key of the config's `quantization`
SHARD, REST = "weights-block-{:03d}.safetensors", "weights-rest.safetensors"
METHOD = "eacmoe"  # model type and quantization method
INDEX = "weights.safetensors.index.json"


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


def size_of(path: str | Path) -> int:
    """Bytes of the weight files in a model directory."""
    return sum(file.stat().st_size for file in Path(path).glob("*.safetensors"))
