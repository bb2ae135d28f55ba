"""Where an original model's files are, and the whole of it in memory (piece by piece: `streaming.Checkpoint`)."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.utils import cached_file

BUNDLED = Path(__file__).parent / "assets" / "tiny-moe"


def resolve_model(name_or_path: str) -> str:
    """`bundled` is the MoE that the package ships; a directory or a hub id stands for itself."""
    return str(BUNDLED) if name_or_path == "bundled" else str(name_or_path)


def local_directory(name_or_path: str) -> Path:
    """Where a model's files lie: the directory itself, or the snapshot in the hub's cache."""
    path = resolve_model(name_or_path)
    return Path(path) if Path(path).is_dir() else Path(cached_file(path, "config.json")).parent


def load_original(name_or_path: str, dtype: str = "auto") -> PreTrainedModel:
    """Loads a full-precision causal LM in eval mode (PhiMoE's router samples in train mode).

    Args:
        name_or_path: `bundled`, a local directory or a hub id (`--model.name_or_path`).
        dtype: `auto` (as stored), `float32`, `bfloat16` or `float16` (`--model.dtype`).

    Raises:
        FileNotFoundError: nothing can be loaded from there.
    """
    path = resolve_model(name_or_path)
    try:
        config = AutoConfig.from_pretrained(path)
        model = AutoModelForCausalLM.from_pretrained(path, config=config, dtype=dtype)
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"no causal language model can be loaded from {name_or_path!r} (--model.name_or_path): pass "
            f"`bundled`, a local Hugging Face directory or a hub id that this machine reaches. {error}"
        ) from error
    return model.eval()
