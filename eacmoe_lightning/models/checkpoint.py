"""An original model's weights, read from its files a few parameters at a time, as `from_pretrained` would load them.

Parameters in memory differ from tensors on disk: transformers stacks the experts of a block, renames and splits. Here
its conversions run on a skeleton without weights, for the requested tensors only; the results equal those of
`from_pretrained` bit for bit. These loader calls are internal to transformers (`transformers_loader.py`).

While one block is processed, a thread reads the bytes of the next into the operating system's page cache. So reading
overlaps with computing, and takes only memory that the system can reclaim.
"""

from __future__ import annotations

import json
import logging
import os
import threading
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig, GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils.logging import disable_progress_bar, enable_progress_bar, is_progress_bar_enabled

from eacmoe_lightning.models.originals import NO_MODEL, resolve_model
from eacmoe_lightning.models.transformers_loader import checkpoint_files, empty_model, load_tensors, source_keys

log = logging.getLogger(__name__)

CHUNK = 8 << 20  # bytes per read of the prefetching thread


class Checkpoint:
    """The weights of a causal LM on disk.

    Args:
        name_or_path: `bundled`, a local directory or a hub id (`--model.name_or_path`).
        dtype: `auto` (as stored), `float32`, `bfloat16` or `float16` (`--model.dtype`).

    Raises:
        FileNotFoundError: there is no such model, or one of its files is missing or truncated.
        ValueError: the model is itself quantized.
    """

    def __init__(self, name_or_path: str, dtype: str = "auto") -> None:
        self.name_or_path, self.path = name_or_path, resolve_model(name_or_path)
        try:
            self.config: PreTrainedConfig = AutoConfig.from_pretrained(self.path)
            self._files = checkpoint_files(self.path)
            self._keys = {key: file for file in self._files for key in _keys(file)}
            self.dtype: torch.dtype = self._dtype(dtype)
            self._loader = empty_model(self.config, self.dtype)
        except (OSError, ValueError, SafetensorError) as error:
            raise FileNotFoundError(NO_MODEL.format(name_or_path, error)) from error
        if getattr(self.config, "quantization_config", None):
            raise ValueError(
                f"{name_or_path!r} (--model.name_or_path) is itself quantized (`quantization_config` in its "
                "config.json): pass the full-precision model that it was made of"
            )
        # the keys on disk of each parameter; of several made together, the first has the keys and the others lead to it
        self._sources, self._made_with = source_keys(self._loader, self._keys)
        self._lock = threading.Lock()
        self._prefetching: threading.Thread | None = None

    def __str__(self) -> str:
        return f"{self.name_or_path} (--model.name_or_path)"

    def _dtype(self, dtype: str) -> torch.dtype:
        if dtype != "auto":
            return getattr(torch, dtype)
        if self.config.dtype is not None:
            return self.config.dtype
        for key, file in self._keys.items():
            with _opened(file) as tensors:
                first = tensors.lazy(key)[...]
            if first.is_floating_point():
                return first.dtype
        return torch.float32

    def skeleton(self) -> PreTrainedModel:
        """The model in eval mode, with buffers in memory and parameters on the meta device."""
        model = empty_model(self.config, self.dtype)
        if model.can_generate():
            try:
                model.generation_config = GenerationConfig.from_pretrained(self.path)
            except OSError:
                pass  # the model has none: the one derived from its config stays
        return model

    # --- reading --------------------------------------------------------------------------------------

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Parameters and buffers by name in the model, in host memory; those that are not on disk are left out.

        Raises:
            ValueError: a tensor has another shape than config.json says.
            FileNotFoundError: a file is missing or truncated.
        """
        tensors: dict[str, Tensor] = {}
        with self._lock, ExitStack() as stack, _no_progress_bar():
            files: dict[str, _Tensors] = {}
            for name in names:
                owner = self._made_with.get(name, name)
                if name in tensors or owner not in self._sources:
                    continue
                slices = {}
                try:
                    for key in self._sources[owner]:
                        file = self._keys[key]
                        if file not in files:
                            files[file] = stack.enter_context(_opened(file))
                        slices[key] = files[file].lazy(key)
                    tensors |= self._convert(slices)
                except (OSError, SafetensorError) as error:
                    raise FileNotFoundError(f"{name} of {self.name_or_path!r} cannot be read: {error}") from error
        return {name: tensors[name] for name in names if name in tensors}

    def _convert(self, slices: dict[str, Any]) -> dict[str, Tensor]:
        """The parameters that transformers builds from these tensors on disk; the loader's go back to meta."""
        model = self._loader
        missing, problems = load_tensors(model, slices, self.dtype)
        if problems:
            raise ValueError(f"{self.name_or_path!r} does not fit its config.json: {problems[0]}")
        taken = {}
        for name in model.state_dict().keys() - missing:
            taken[name] = model.get_parameter_or_buffer(name).detach()
            put(model, name, taken[name].to("meta"))
        return taken

    def prefetch(self, names: Iterable[str]) -> None:
        """Starts to read the bytes of these parameters into the page cache, and returns at once."""
        if self._prefetching is not None and self._prefetching.is_alive():
            return  # the disk is the bottleneck: `read` waits for it anyway
        keys = [key for name in names for key in self._sources.get(self._made_with.get(name, name), ())]
        self._prefetching = threading.Thread(target=self._touch, args=(keys,), daemon=True)
        self._prefetching.start()

    def _touch(self, keys: list[str]) -> None:
        try:
            for file in dict.fromkeys(self._keys[key] for key in keys):
                keys_of_file = [key for key in keys if self._keys[key] == file]
                with open(file, "rb", buffering=0) as stream:
                    buffer = bytearray(CHUNK)
                    for start, end in _byte_ranges(file, keys_of_file):
                        for offset in range(start, end, CHUNK):
                            os.preadv(stream.fileno(), [memoryview(buffer)[: min(CHUNK, end - offset)]], offset)
        except OSError as error:  # `read` will raise it
            log.debug("prefetch: %s", error)


def put(model: torch.nn.Module, name: str, tensor: Tensor) -> None:
    """Makes `tensor` the parameter or buffer with this name."""
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    if leaf in module._parameters:
        tensor = torch.nn.Parameter(tensor, requires_grad=False)
    setattr(module, leaf, tensor)


class _Tensors:
    """An open checkpoint file; a tensor is read when it is indexed."""

    def __init__(self, tensors: Any) -> None:
        self._tensors = tensors

    def lazy(self, key: str) -> Any:
        return self._tensors[key] if isinstance(self._tensors, dict) else self._tensors.get_slice(key)


@contextmanager
def _opened(file: str) -> Iterator[_Tensors]:
    if not file.endswith(".safetensors"):
        yield _Tensors(torch.load(file, map_location="cpu", mmap=True, weights_only=True))
        return
    with safe_open(file, "pt", backend="pread") as tensors:  # mapped pages would count as this process's memory
        yield _Tensors(tensors)


def _keys(file: str) -> list[str]:
    if file.endswith(".safetensors"):
        with safe_open(file, "pt") as tensors:
            return list(tensors.keys())
    return list(torch.load(file, map_location="meta", mmap=True, weights_only=True))


def _byte_ranges(file: str, keys: list[str]) -> list[tuple[int, int]]:
    """The byte ranges of tensors in a safetensors file; empty for other files."""
    if Path(file).suffix != ".safetensors":
        return []
    with open(file, "rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(length))
    return sorted(tuple(8 + length + offset for offset in header[key]["data_offsets"]) for key in keys)


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    """Turns off transformers' progress bar, which would appear for every parameter."""
    enabled = is_progress_bar_enabled()
    disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            enable_progress_bar()
