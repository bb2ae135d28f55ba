"""What all tests share: tiny models on disk, a tokenizer, and caches that are thrown away."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

# Before anything imports datasets: tests neither read nor fill the user's caches, nor the network.
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="eacmoe-tests-")
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import tiny_models
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from eacmoe_lightning.adapter import BUNDLED


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerBase:
    """The bundled tokenizer: byte-level BPE of 4,096 tokens."""
    return AutoTokenizer.from_pretrained(BUNDLED)


@pytest.fixture(scope="session")
def tiny_model_dir(
    tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerBase
) -> Callable[[str], Path]:
    """`tiny_model_dir(family)`: a saved tiny model with tokenizer, built once per session."""
    folders: dict[str, Path] = {}

    def folder_of(family: str) -> Path:
        if family not in folders:
            folder = tmp_path_factory.mktemp(family)
            folders[family] = tiny_models.save(family, folder, tokenizer)
        return folders[family]

    return folder_of
