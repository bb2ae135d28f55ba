"""Shared fixtures: tiny models on disk and offloaded, a tokenizer, and temporary caches."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

# Set before anything imports datasets: tests use neither the user's caches nor the network.
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="eacmoe-tests-")
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import tiny_models
import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from eacmoe_lightning.models.originals import BUNDLED
from eacmoe_lightning.offload import offload_experts
from eacmoe_lightning.offload.model import Offload


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


@pytest.fixture(scope="session")
def tokens() -> torch.Tensor:
    return torch.randint(0, tiny_models.VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def offloaded() -> Callable[..., tuple[PreTrainedModel, Offload]]:
    """`offloaded(family, cache_bytes, codec, ...)`: an offloaded tiny model and its handle, closed afterwards."""
    handles = []

    def make(family: str, *args, **options) -> tuple[PreTrainedModel, Offload]:
        model = tiny_models.build(family)
        handles.append(offload_experts(model, *args, **options))
        return model, handles[-1]

    yield make
    for handle in handles:
        handle.close()
