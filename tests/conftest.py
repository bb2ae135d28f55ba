"""Shared fixtures: tiny models on disk and offloaded, finished runs, a tokenizer, and temporary caches.

Tests run in two processes (`-n 2` in pyproject.toml), and the fixtures here are made once for both.
"""

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Callable
from pathlib import Path

# Set before anything imports datasets: tests use neither the user's caches nor the network.
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="eacmoe-tests-")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"  # tiny models gain nothing from threads

import jobs
import pytest
import tiny_models
import torch
from filelock import FileLock
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from eacmoe_lightning.models.originals import BUNDLED
from eacmoe_lightning.offload import offload_experts
from eacmoe_lightning.offload.model import Offload

IS_WORKER = "PYTEST_XDIST_WORKER" in os.environ  # one of the processes in which tests run


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerBase:
    """The bundled tokenizer: byte-level BPE of 4,096 tokens."""
    return AutoTokenizer.from_pretrained(BUNDLED)


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Callable[[Path], object]], Path]:
    """`once(name, make)`: the path that `make(path)` has filled, once for all processes. Tests only read it."""
    base = tmp_path_factory.getbasetemp()
    shared = (base.parent if IS_WORKER else base) / "shared"
    shared.mkdir(exist_ok=True)

    def path_of(name: str, make: Callable[[Path], object]) -> Path:
        path, made = shared / name, shared / f"{name}.made"
        with FileLock(shared / f"{name}.lock"):
            if not made.exists():
                make(path)
                made.touch()
        return path

    return path_of


@pytest.fixture(scope="session")
def tiny_model_dir(once, tokenizer: PreTrainedTokenizerBase) -> Callable[[str], Path]:
    """`tiny_model_dir(family)`: a saved tiny model with tokenizer."""
    return lambda family: once(family, lambda folder: tiny_models.save(family, folder, tokenizer))


@pytest.fixture(scope="session")
def fitted(once, tiny_model_dir) -> Callable[..., Path]:
    """`fitted(family, ...)`: a finished run of `jobs.fit` with these options, for tests to read or to copy."""

    def run(family: str, **options) -> Path:
        key = hashlib.sha256(json.dumps(options, sort_keys=True, default=str).encode()).hexdigest()[:12]
        return once(f"{family}-{key}", lambda path: jobs.fit(tiny_model_dir(family), path, **options))

    return run


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


# --- two processes


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begins with the slow tests in a run of several processes, so that these end together."""
    if IS_WORKER:
        items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> object:
    """Gives each test to a process that is free, but those of one architecture to one, which keeps its trial."""
    from xdist.scheduler import LoadScopeScheduling

    class Scheduler(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            trial = re.search(r"test_architectures\.py::.*\[(\w+)", nodeid)
            return trial[1] if trial else nodeid

    return Scheduler(config, log)
