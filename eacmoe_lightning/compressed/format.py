"""The format of a compressed model directory, which `fit` writes and `load` reads.

    config.json        model_type "eacmoe", the original's config, how each weight is stored
    weights-block-003.safetensors, weights-rest.safetensors, weights.safetensors.index.json
    weights-draft.safetensors     the original's draft layers (`models/draft.py`), if it has any; not in the index
    tokenizer, generation config
    configuration_eacmoe.py       imports this package; transformers runs it if the user passes trust_remote_code=True
    other Python files            code that came with the original, if the user trusted it

Quantized weights are `<parameter>.codes` (packed, `bits` bytes for eight codes), `.scale` (float16) and `.zero_point`
(uint8), under the model's parameter names; all other tensors are stored unchanged (the config lists under `float32` of
its `original` those that are float32 because the original stores them so: `float32.py`). If the experts of a stack
differ in bits, the config has a list of bits and `.codes` is flat, one expert after another (format version 2). A
pruned model's config lists under `kept_experts` the experts that its blocks still have (version 2 as well). Weights on
a lattice have `.stream`, `.ends`, `.shape` and `.scale` (`quantization/packing.py`), and the config lists their names
under `lattice` (version 3). Weights in llama.cpp's blocks have one tensor, `.blocks`, and the config lists their types
under `kquants` (version 4). A quantized output head is in `weights-rest.safetensors`, under the embedding's name if
both are one weight (version 5).

`load` reads such a directory, and so does transformers once this package is imported (`loading.py`). transformers looks
for no entry points of packages, so somebody has to import it: the user, or `configuration_eacmoe.py`, to which the
config's `auto_map` leads.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from eacmoe_lightning.models.originals import read_config as read_original_config
from eacmoe_lightning.models.remote_code import check_code, register_remote_code
from eacmoe_lightning.models.transformers_loader import knows_config
from eacmoe_lightning.run.files import read_json, write_json
from eacmoe_lightning.version import __version__

FORMAT_VERSION = 5  # see the module's docstring
LATTICE, KQUANTS = "lattice", "kquants"  # keys of the config's `quantization`
SHARD, REST = "weights-block-{:03d}.safetensors", "weights-rest.safetensors"
DRAFT = "weights-draft.safetensors"
METHOD = "eacmoe"  # model type and quantization method
INDEX = "weights.safetensors.index.json"
CODE = "configuration_eacmoe.py"
CODE_DIGEST = "code"  # key of the config's `original`: by what the original's own Python code is recognized
CODE_TEXT = '''"""Opens this compressed model in transformers, in an environment that has the package eacmoe-lightning.

transformers runs this file if you pass `trust_remote_code=True`. It only imports the package, so you may as well write

    import eacmoe_lightning

before `from_pretrained`, and trust nothing.
"""

from eacmoe_lightning.compressed.loading import CompressedConfig  # noqa: F401
'''


def is_compressed(path: str | Path) -> bool:
    config = Path(path) / "config.json"
    return config.exists() and read_json(config).get("model_type") == METHOD


def write_config(directory: Path, config: dict[str, Any]) -> None:
    """Writes config.json, and the file that lets transformers open the directory without an import of this package."""
    (directory / CODE).write_text(CODE_TEXT)
    write_json(directory / "config.json", config | {"auto_map": {"AutoConfig": f"{Path(CODE).stem}.CompressedConfig"}})


def read_config(path: str | Path) -> dict[str, Any]:
    """The config of a compressed directory.

    Raises:
        FileNotFoundError: `path` is not a compressed directory.
        StoreError: its config.json is damaged.
        ValueError: a newer version of this package wrote it.
    """
    if not is_compressed(path):
        raise FileNotFoundError(
            f"{path} is not a compressed model directory of eacmoe-lightning: its config.json is missing or of "
            "another model type than 'eacmoe'"
        )
    config = read_json(Path(path) / "config.json")
    check_format(config)
    return config


def original_config(config: dict[str, Any]) -> PreTrainedConfig:
    """The original model's config, which a compressed directory's config contains.

    Raises:
        ValueError: its model type is unknown.
    """
    original = dict(config["original"]["config"])
    model_type = original.pop("model_type")
    if not knows_config(model_type):
        raise ValueError(
            f"the compressed model is of type {model_type!r}, which transformers does not know: register its classes, "
            "or let the code that came with the original run (`load(..., trust_remote_code=True)`; "
            "--trust_remote_code true, for fit and its evaluations --model.trust_remote_code true)"
        )
    check_code(model_type, config["original"].get(CODE_DIGEST))
    return AutoConfig.for_model(model_type, **original)


def trust_code(directory: str | Path, config: dict[str, Any]) -> None:
    """Registers the classes of the code that came with the original: from beside the compressed model, where it lies.

    Raises:
        FileNotFoundError: the code is missing.
        ValueError: other code was registered for the model type.
    """
    original = config["original"]
    stored = original["config"]
    if CODE_DIGEST not in original:
        if not knows_config(stored["model_type"]):  # the directory is of a version that left the code where it was
            read_original_config(original["name_or_path"], True)
        return
    beside = {auto: reference.rpartition("--")[2] for auto, reference in stored["auto_map"].items()}
    register_remote_code(str(directory), stored["model_type"], beside)


def check_format(config: dict[str, Any]) -> None:
    """Raises ValueError for a config.json that a newer version of this package wrote."""
    if config["format_version"] > FORMAT_VERSION:
        raise ValueError(
            f"the compressed model has format version {config['format_version']}, but this eacmoe-lightning "
            f"({__version__}) reads up to {FORMAT_VERSION}: install a newer one"
        )


def runs_packed(config: dict[str, Any]) -> bool:
    """Whether packed modules hold the weights of a compressed directory, by its config: those on the grid alone."""
    return LATTICE not in config["quantization"] and KQUANTS not in config["quantization"]


def size_of(path: str | Path) -> int:
    """Total bytes of the weight files in a model directory."""
    return sum(file.stat().st_size for file in Path(path).glob("*.safetensors"))
