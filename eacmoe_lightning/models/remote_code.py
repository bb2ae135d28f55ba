"""Python code that comes with a model (`auto_map` in its config.json): its classes, and the files that travel with it.

transformers knows one pair of classes for each model type. So within one process a type stands for one code, and a
model of the same type with other code is refused: it would run as the first one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from transformers import AutoConfig, AutoModelForCausalLM
from transformers.dynamic_module_utils import (
    HF_MODULES_CACHE,
    get_cached_module_file,
    get_class_from_dynamic_module,
    get_relative_import_files,
)

_registered: dict[str, str] = {}  # by model type, the digest of the code that its classes are from


def registered_code(model_type: str | None) -> str | None:
    """The digest of the code from which a model type was registered; None for types of transformers and of others."""
    return _registered.get(model_type)


def register_remote_code(path: str, model_type: str, auto_map: Mapping[str, str]) -> None:
    """Registers the classes that come as Python code with a model, which runs that code.

    Args:
        path: a local directory or a hub id.
        model_type: as in its config.json.
        auto_map: class references by auto class, as in its config.json.

    Raises:
        OSError: the code is missing.
        ValueError: it has no causal language model, or the type is registered from other code.
    """
    if AutoModelForCausalLM.__name__ not in auto_map:
        raise ValueError("its code (`auto_map` in config.json) has no AutoModelForCausalLM")
    references = [auto_map[AutoConfig.__name__], auto_map[AutoModelForCausalLM.__name__]]
    code = _digest(path, references)
    check_code(model_type, code)
    if model_type in _registered:
        return
    config, model = (get_class_from_dynamic_module(reference, path) for reference in references)
    config.model_type, model.config_class = model_type, config  # as `from_pretrained` pairs them
    AutoConfig.register(model_type, config, exist_ok=True)
    AutoModelForCausalLM.register(config, model, exist_ok=True)
    _registered[model_type] = code


def check_code(model_type: str, code: str | None) -> None:
    """Raises ValueError if a model type is registered from other code than that with this digest (None: unknown)."""
    if code is not None and _registered.get(model_type, code) != code:
        raise ValueError(
            f"The code of this model is not that of another one of type {model_type!r} which was opened before, and "
            "transformers knows one code for each type: open each model in a process of its own."
        )


def code_files(directory: Path) -> list[Path]:
    """The Python files beside an original or a compressed model, and those in folders that class references name."""
    folders = {directory}
    for reference in _references(directory):
        repository, _, module = reference.rpartition("--")
        folders |= set() if repository else {directory / Path(module).parent}
    return sorted(file for folder in folders for file in folder.glob("*.py"))


def _references(directory: Path) -> Iterator[str]:
    """The class references of a model and of its tokenizer, whose come in pairs, one of which may be None."""
    for name in ("config.json", "tokenizer_config.json"):
        try:
            config = json.loads((directory / name).read_text())
        except (OSError, ValueError):
            continue  # others say so
        original = (config.get("original") or {}).get("config") or {}
        for auto_map in (config.get("auto_map") or {}, original.get("auto_map") or {}):
            for reference in auto_map.values():
                several = reference if isinstance(reference, list) else [reference]
                yield from (one for one in several if isinstance(one, str))


def _digest(path: str, references: list[str]) -> str:
    """SHA-256 of the modules that class references name and of those that they import beside them; nothing is run."""
    digest = hashlib.sha256()
    for file in sorted(set(_modules(path, references)), key=lambda file: file.name):
        digest.update(f"{file.name}\0".encode() + file.read_bytes())
    return digest.hexdigest()


def _modules(path: str, references: list[str]) -> Iterator[Path]:
    for reference in references:
        repository, _, name = reference.rpartition("--")
        module = Path(HF_MODULES_CACHE) / get_cached_module_file(repository or path, f"{name.split('.')[0]}.py")
        yield from (module, *map(Path, get_relative_import_files(module)))
