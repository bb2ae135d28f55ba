"""Where an original model's files are, what its config says, and how errors name it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils import cached_file

from eacmoe_lightning.models.config_errors import described
from eacmoe_lightning.models.remote_code import register_remote_code, registered_code
from eacmoe_lightning.models.transformers_loader import UNBUILDABLE, auto_class, knows_config
from eacmoe_lightning.models.weight_files import (
    DamagedFile,
    check_fetched,
    check_no_adapter,
    check_option_files,
    found_instead,
)
from eacmoe_lightning.run.files import first_of

BUNDLED = Path(__file__).parent.parent / "assets" / "tiny-moe"
TESTBEDS = Path(__file__).parent.parent.parent / "testbeds"  # in a checkout only: too large for the wheel
QUANTIZATION = ("quantization_config", "compression_config")  # the second is of old versions of llm-compressor
MLX = ("quantization", {"bits", "group_size"})  # its name for that, and what it holds at least
MODELOPT_FILE = "hf_quant_config.json"  # where older versions of ModelOpt write it
PROCESSOR_FILES = (
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "chat_template.json",
)
LICENSE_FILES = ("LICENSE*", "NOTICE*", "USE_POLICY*")


def resolve_model(name_or_path: str) -> str:
    """The directory of the bundled MoE for `bundled`, of another testbed for `bundled:NAME`; all else unchanged.

    Raises:
        FileNotFoundError: there is no such testbed, or this is no checkout.
    """
    name = str(name_or_path)
    if not is_bundled(name):
        return name
    directory = TESTBEDS / name.removeprefix("bundled:") if ":" in name else BUNDLED
    if not directory.is_dir():
        known = sorted(path.name for path in TESTBEDS.glob("*") if path.is_dir())
        there = (
            f"there are bundled and {', '.join(f'bundled:{one}' for one in known)}"
            if known
            else ("models other than `bundled` are in a checkout of the repository, not in the installed package")
        )
        raise FileNotFoundError(f"there is no model {name}: {there}")
    return str(directory)


def is_bundled(name_or_path: str) -> bool:
    """Whether a name stands for a model of this project: `bundled` or `bundled:NAME`."""
    return name_or_path == "bundled" or name_or_path.startswith("bundled:")


def no_model(name_or_path: str, reason: object, option: str = "--model.name_or_path") -> FileNotFoundError:
    """The error of a model that cannot be loaded.

    Args:
        name_or_path: as the user gave it.
        reason: what went wrong, as the last sentence.
        option: with which it was given.
    """
    path = Path(resolve_model(name_or_path)).expanduser()
    looks_like_a_path = name_or_path.count("/") > 1 or name_or_path.startswith((".", "/", "~"))
    if path.is_file():
        is_gguf = path.suffix == ".gguf"
        remedy = "which is not read: pass the model that it was made of" if is_gguf else "pass the directory it lies in"
        reason = f"That is a {'GGUF file, ' if is_gguf else 'file: '}{remedy}."
    elif looks_like_a_path and not path.is_dir():
        reason = "There is no such directory."  # whatever the hub says of such a name
    elif path.is_dir():
        reason = f"{reason} {found_instead(path)}".strip()
    return FileNotFoundError(
        f"no causal language model can be loaded from {name_or_path!r} ({option}): pass `bundled`, a local Hugging "
        f"Face directory or the id of a hub model that this machine can reach. {reason}"
    )


def local_directory(name_or_path: str, option: str = "--model.name_or_path") -> Path:
    """The directory with a model's files: the given one, or the snapshot in the hub's cache.

    Args:
        name_or_path: `bundled`, a local directory or a hub id.
        option: that errors name.

    Raises:
        FileNotFoundError: the directory holds no model; or there is none, and the hub has no such model or cannot be
            reached.
    """
    path = resolve_model(name_or_path)
    if Path(path).is_dir():
        if not (Path(path) / "config.json").is_file():
            raise no_model(name_or_path, "There is no config.json.", option)
        return Path(path)
    try:
        return Path(cached_file(path, "config.json")).parent
    except (OSError, ValueError) as error:
        raise no_model(name_or_path, error, option) from error


def read_config(name_or_path: str, trust_remote_code: bool = False) -> tuple[PreTrainedConfig, dict[str, Any] | None]:
    """An original's config as if it were not quantized, and its `quantization_config`.

    Args:
        name_or_path: `bundled`, a local directory or a hub id (`--model.name_or_path`).
        trust_remote_code: whether Python code beside the model may run (`--model.trust_remote_code`). Where
            transformers has a class of its own, or one was registered, that one is taken.

    Raises:
        FileNotFoundError: there is no config, it is damaged or not understood, or its model type is unknown.
        ValueError: the model needs code that came with it, and that is not trusted; or an adapter lies beside it.
    """
    path = resolve_model(name_or_path)
    check_fetched(path, weights=False)
    check_option_files(path)
    check_no_adapter(path)
    stored: dict[str, Any] = {}
    try:
        stored, _ = PreTrainedConfig.get_config_dict(path)
        if {"original", "format_version"} <= stored.keys():
            raise ValueError(f"It is a compressed model of this package: pass its original, {_original_of(stored)!r}.")
        model_type, auto_map = stored.get("model_type"), stored.get("auto_map", {})
        is_known = knows_config(model_type)
        if "AutoConfig" in auto_map and (not is_known or registered_code(model_type)):
            if not (is_known or trust_remote_code):
                raise UntrustedCode(name_or_path, "`auto_map` in its config.json")
            register_remote_code(path, model_type, auto_map)
        config = _config(path, stored)
        if not isinstance(config.get_text_config(), PreTrainedConfig):
            raise TypeError("its text_config holds no options")
    except UntrustedCode:
        raise
    except (OSError, ValueError) as error:
        raise no_model(name_or_path, error) from error
    except UNBUILDABLE as error:
        raise DamagedFile(
            f"{name_or_path!r} (--model.name_or_path): transformers does not understand its config.json "
            f"({described(error, stored)}): mend it, or restore the one that was published"
        ) from error
    quantization = None
    for part in {id(part): part for part in (config, config.get_text_config())}.values():
        _fill_head_dim(part)
        if vars(part).get("return_dict") is False:
            part.return_dict = True  # transformers' own models cannot run with tuples from each other
        for name in QUANTIZATION:
            if (found := getattr(part, name, None)) is not None:
                quantization = quantization or (found if isinstance(found, dict) else found.to_dict())
            if name in vars(part):
                delattr(part, name)
        of_mlx = getattr(part, MLX[0], None)
        if isinstance(of_mlx, dict) and of_mlx.keys() >= MLX[1]:
            quantization = quantization or {"quant_method": "mlx", **of_mlx}
    return config, quantization or _modelopt(path)


def _modelopt(path: str) -> dict[str, Any] | None:
    """What ModelOpt wrote beside the config.json, if there is such a file."""
    try:
        file = Path(path) / MODELOPT_FILE if Path(path).is_dir() else Path(cached_file(path, MODELOPT_FILE))
        return {"quant_method": "modelopt", **json.loads(file.read_text())}
    except OSError:
        return None
    except ValueError as error:
        raise ValueError(f"{path}: {MODELOPT_FILE} is damaged ({error}): download it again") from error


def _config(path: str, stored: dict[str, Any]) -> PreTrainedConfig:
    """The config in a directory or on the hub, whose content is `stored`."""
    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=False)
    except StrictDataclassError:  # LongRoPE's lengths are checked with a `head_dim` that is not filled in yet
        heads, hidden = stored.get("num_attention_heads"), stored.get("hidden_size")
        if stored.get("head_dim") is not None or not heads or not hidden:
            raise
        return CONFIG_MAPPING[stored["model_type"]].from_dict({**stored, "head_dim": hidden // heads})


def _fill_head_dim(config: PreTrainedConfig) -> None:
    """Gives a config without a `head_dim` the one that the attention takes then.

    transformers' YaRN, dynamic and LongRoPE frequencies multiply by None otherwise, as Mixtral's config has it.
    """
    values = vars(config)  # to ask a config whose layers have heads of different sizes is an error
    rope, heads, hidden = (values.get(name) for name in ("rope_parameters", "num_attention_heads", "hidden_size"))
    is_scaled = isinstance(rope, dict) and rope.get("rope_type", "default") != "default"
    if is_scaled and values.get("head_dim", 0) is None and heads and hidden:
        config.head_dim = hidden // heads


def _original_of(compressed: dict[str, Any]) -> str | None:
    return (compressed["original"] or {}).get("name_or_path")


class UntrustedCode(ValueError):
    """A model needs Python code that came with it, and the user has not said that it may run."""

    def __init__(self, name_or_path: str, what: str) -> None:
        super().__init__(
            f"{name_or_path!r} (--model.name_or_path) needs Python code that came with it ({what}): read that code and "
            "pass --model.trust_remote_code true to run it, or register its classes with transformers before you start"
        )


def processor_files(name_or_path: str) -> list[Path]:
    """The files by which a model's images, sound and chats are prepared, as far as it has any."""
    found = []
    for name in PROCESSOR_FILES:
        try:
            found.append(Path(cached_file(resolve_model(name_or_path), name)))
        except OSError:
            continue  # the model has no such file
    return found


def license_files(name_or_path: str) -> list[Path]:
    """The license and the notices beside a model that is on this machine."""
    return sorted(file for name in LICENSE_FILES for file in local_directory(name_or_path).glob(name) if file.is_file())


def load_original(name_or_path: str, dtype: str = "auto", trust_remote_code: bool = False) -> PreTrainedModel:
    """Loads a full-precision causal LM in eval mode, because PhiMoE's router samples in train mode.

    Args:
        name_or_path: `bundled`, a local directory or a hub id (`--model.name_or_path`).
        dtype: `auto` (as stored), `float32`, `bfloat16` or `float16` (`--model.dtype`).
        trust_remote_code: see `read_config`.

    Raises:
        FileNotFoundError: no model can be loaded from there, or weights are missing.
        ValueError: the model is quantized (`streamed.StreamedModel.load_all` brings such a one into memory).
    """
    path = resolve_model(name_or_path)
    config, quantization = read_config(name_or_path, trust_remote_code)
    if quantization is not None:
        raise ValueError(f"{name_or_path!r} is quantized: open it as StreamedModel(Checkpoint(...))")
    try:
        model, info = auto_class(config).from_pretrained(path, config=config, dtype=dtype, output_loading_info=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise no_model(name_or_path, error) from error
    if missing := sorted(info["missing_keys"]):  # transformers would leave them random
        raise no_model(name_or_path, f"Its files lack {first_of(missing, 'weight')}.")
    return model.eval()


def stored_name(name_or_path: str) -> str:
    """A model's name as runs and compressed directories store it: of a local directory, the absolute path."""
    path = Path(name_or_path).expanduser()
    return os.path.abspath(path) if not is_bundled(name_or_path) and path.is_dir() else str(name_or_path)
