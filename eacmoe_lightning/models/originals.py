"""Where an original model's files are, and loading all of it into memory (`checkpoint.Checkpoint` reads parts)."""

from __future__ import annotations

import hashlib
from pathlib import Path

from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.utils import cached_file

NO_MODEL = (
    "no causal language model can be loaded from {!r} (--model.name_or_path): pass `bundled`, a local Hugging Face "
    "directory or the id of a hub model that this machine can reach. {}"
)
BUNDLED = Path(__file__).parent.parent / "assets" / "tiny-moe"


def resolve_model(name_or_path: str) -> str:
    """The directory of the bundled MoE for `bundled`; a directory or a hub id unchanged."""
    return str(BUNDLED) if name_or_path == "bundled" else str(name_or_path)


def local_directory(name_or_path: str) -> Path:
    """The directory with a model's files: the given one, or the snapshot in the hub's cache.

    Raises:
        FileNotFoundError: there is no such directory, and the hub has no such model or cannot be reached.
    """
    path = resolve_model(name_or_path)
    if Path(path).is_dir():
        return Path(path)
    try:
        return Path(cached_file(path, "config.json")).parent
    except (OSError, ValueError) as error:
        raise FileNotFoundError(NO_MODEL.format(name_or_path, error)) from error


def load_original(name_or_path: str, dtype: str = "auto") -> PreTrainedModel:
    """Loads a full-precision causal LM in eval mode, because PhiMoE's router samples in train mode.

    Args:
        name_or_path: `bundled`, a local directory or a hub id (`--model.name_or_path`).
        dtype: `auto` (as stored), `float32`, `bfloat16` or `float16` (`--model.dtype`).

    Raises:
        FileNotFoundError: no model can be loaded from there.
    """
    path = resolve_model(name_or_path)
    try:
        config = AutoConfig.from_pretrained(path)
        model = AutoModelForCausalLM.from_pretrained(path, config=config, dtype=dtype)
    except (OSError, ValueError) as error:
        raise FileNotFoundError(NO_MODEL.format(name_or_path, error)) from error
    return model.eval()


def fingerprint(name_or_path: str) -> str:
    """SHA-256 of the original's config and of the headers, ends and sizes of its weight files."""
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
