"""An original model's weights, read from its files a few parameters at a time, as `from_pretrained` would load them.

Parameters in memory differ from tensors on disk: transformers stacks the experts of a block, renames and splits. Here
its conversions run on a skeleton without weights, for the requested tensors only; the results equal those of
`from_pretrained` bit for bit. These loader calls are internal to transformers (`transformers_loader.py`).

While one block is processed, a thread reads the bytes of the next into the operating system's page cache. So reading
overlaps with computing, and takes only memory that the system can reclaim.
"""

from __future__ import annotations

import logging
import os
import re
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from statistics import mode
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.utils.logging import disable_progress_bar, enable_progress_bar, is_progress_bar_enabled

from eacmoe_lightning.models.original_files import OriginalFiles
from eacmoe_lightning.models.originals import no_model
from eacmoe_lightning.models.transformers_loader import UNBUILDABLE, Misfit, empty_model, load_tensors, source_keys
from eacmoe_lightning.models.unstacked import Stack, find_stacks
from eacmoe_lightning.models.unused import UNQUANTIZED, check_used
from eacmoe_lightning.run.files import first_of

log = logging.getLogger(__name__)

DTYPES = ("auto", "float32", "bfloat16", "float16")
CHUNK = 8 << 20  # bytes per read of the prefetching thread
TOGETHER = 64 << 20  # bytes on disk that are converted in one call, whose fixed costs would exceed those of small ones


class Checkpoint:
    """The weights of a causal LM on disk. Quantized ones are decoded as they are read (`decoding.py`).

    Args:
        name_or_path: `bundled`, a local directory or a hub id (`--model.name_or_path`).
        dtype: `auto` (as stored, see `running_dtype`; for a quantized model, as its config says), `float32`,
            `bfloat16` or `float16` (`--model.dtype`).
        trust_remote_code: whether Python code beside the model may run (`--model.trust_remote_code`).

    Raises:
        FileNotFoundError: there is no such model, or one of its files is missing, truncated or damaged.
        ValueError: the model is quantized by an unknown scheme, its scales or the config that says how they apply are
            missing, or it needs code that is not trusted.
    """

    def __init__(self, name_or_path: str, dtype: str = "auto", trust_remote_code: bool = False) -> None:
        self.name_or_path = name_or_path
        self.files = OriginalFiles(name_or_path, trust_remote_code)
        self.path, self.config = self.files.path, self.files.config
        self._usual_dtype = self._dtype("auto")  # now: the skeleton changes the config's
        self.dtype: torch.dtype = self._dtype(dtype)
        try:
            self._loader = empty_model(self.config, self.dtype)
        except ValueError as error:
            raise no_model(name_or_path, error) from error
        # the keys on disk of each parameter; of several made together, the first has the keys and the others lead to it
        self._sources, self._made_with = source_keys(self._loader, self.files.keys)
        if stacks := self._stacks():
            self.files.stack(stacks)
            self._sources, self._made_with = source_keys(self._loader, self.files.keys)
        check_used(self.files, self._loader, self._sources)
        self._lock = threading.Lock()
        self._prefetching: threading.Thread | None = None

    def __str__(self) -> str:
        return f"{self.name_or_path} (--model.name_or_path)"

    def _dtype(self, dtype: str) -> torch.dtype:
        if dtype != "auto":
            return getattr(torch, dtype)
        found = self.config.dtype
        if found is None:
            stored = (tensor.dtype for tensor in self.files.stored.values())  # the first counts, as in transformers
            found = next((dtype for dtype in stored if dtype in UNQUANTIZED), torch.bfloat16)
        return running_dtype(found)

    @property
    def in_float32(self) -> frozenset[str]:
        """Parameters and buffers that are stored in float32, where the config says a narrower dtype.

        Empty if that is most of the model: then the config only says what to run it in.
        """
        if self._usual_dtype == torch.float32:
            return frozenset()
        stored, num_bytes = self.files.stored, self.files.num_bytes
        names, size = [], 0
        for name in self._loader.state_dict():
            keys = self._sources.get(self._made_with.get(name, name), ())
            if keys and all(stored[part].dtype == torch.float32 for key in keys for part in self.files.keys[key]):
                names.append(name)
                size += 0 if name in self._made_with else num_bytes(keys)
        return frozenset(names if 2 * size < num_bytes(self.files.keys) else ())

    def _stacks(self) -> dict[str, Stack]:
        """Stacks of experts that transformers would not make of the linears on disk."""
        known = self._loader.state_dict()
        unknown = [key for name, keys in self._sources.items() if name not in known for key in keys]
        try:
            stacks = find_stacks(self._loader, unknown, self.files.scheme.split if self.files.scheme else None)
        except ValueError as error:
            raise ValueError(f"{self.name_or_path!r} (--model.name_or_path) cannot be read: {error}") from error
        return {name: stack for name, stack in stacks.items() if name not in self._sources}

    def skeleton(self) -> PreTrainedModel:
        """The model in eval mode, with buffers in memory and parameters on the meta device."""
        model = empty_model(self.config, self.dtype)
        if model.can_generate():
            try:
                model.generation_config = GenerationConfig.from_pretrained(self.path)
            except OSError:
                pass  # the model has none: the one derived from its config stays
            except (ValueError, *UNBUILDABLE) as error:
                raise ValueError(
                    f"{self.name_or_path!r} (--model.name_or_path): transformers does not understand its "
                    f"generation_config.json ({error!r}): mend it, or restore the one that was published"
                ) from error
        return model

    # --- reading --------------------------------------------------------------------------------------

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Parameters and buffers by name in the model, in host memory; those that are not on disk are left out.

        Raises:
            ValueError: a tensor has another shape than config.json says.
            FileNotFoundError: a file is missing or truncated.
        """
        names = list(names)
        owners = dict.fromkeys(self._made_with.get(name, name) for name in names)
        tensors: dict[str, Tensor] = {}
        with self._lock, self.files.reading() as reader, _no_progress_bar():
            for together in self._batches([owner for owner in owners if owner in self._sources]):
                try:
                    tensors |= self._convert({owner: self._lazy(owner, reader) for owner in together})
                except (OSError, SafetensorError) as error:
                    named = first_of(together, "parameter")
                    raise FileNotFoundError(f"{named} of {self.name_or_path!r} cannot be read: {error}") from error
        tensors |= {name: self._empty(name) for name in names if name not in tensors and self._is_empty(name)}
        return {name: tensors[name] for name in names if name in tensors}

    def _is_empty(self, name: str) -> bool:
        """Whether a parameter has no element, as of shared experts that there are none of: not every file holds it."""
        return self._loader.get_parameter_or_buffer(name).numel() == 0

    def _empty(self, name: str) -> Tensor:
        return torch.empty_like(self._loader.get_parameter_or_buffer(name), device="cpu")

    def _batches(self, owners: list[str]) -> Iterator[list[str]]:
        """Parameters one after another, small ones together."""
        batch: list[str] = []
        size = 0
        for owner in owners:
            num_bytes = self.files.num_bytes(self._sources[owner])
            if batch and size + num_bytes > TOGETHER:
                yield batch
                batch, size = [], 0
            batch.append(owner)
            size += num_bytes
        if batch:
            yield batch

    def _lazy(self, owner: str, reader: Any) -> dict[str, Any]:
        return {key: reader.lazy(key) for key in self._sources[owner]}

    def _convert(self, slices: dict[str, dict[str, Any]]) -> dict[str, Tensor]:
        """The parameters that transformers builds from these tensors on disk; the loader's go back to meta.

        Args:
            slices: by parameter, its tensors by their keys on disk.
        """
        model, together = self._loader, {key: tensor for of in slices.values() for key, tensor in of.items()}
        missing, misfits = load_tensors(model, together, self.dtype)
        if misfits:
            misfits.sort(key=lambda misfit: misfit.name)
            by_owner = {self._made_with.get(misfit.name, misfit.name): misfit for misfit in reversed(misfits)}
            first = next((owner for owner in slices if owner in by_owner), None)
            misfit, made_of = by_owner.get(first, misfits[0]), slices.get(first, together)
            raise ValueError(
                f"the weights in {self.name_or_path!r} (--model.name_or_path) do not fit its config.json: "
                f"{_misfit(misfit, made_of)}. One of them is of another model, or was changed: download both again"
            )
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
        tensors = [self.files.stored[part] for key in keys for part in self.files.keys[key]]
        spans: dict[str, list[tuple[int, int]]] = {}
        for tensor in tensors:
            if tensor.span:
                spans.setdefault(tensor.file, []).append(tensor.span)
        try:
            for file, ranges in spans.items():
                with open(file, "rb", buffering=0) as stream:
                    buffer = bytearray(CHUNK)
                    for start, end in sorted(ranges):
                        for offset in range(start, end, CHUNK):
                            os.preadv(stream.fileno(), [memoryview(buffer)[: min(CHUNK, end - offset)]], offset)
        except OSError as error:  # `read` will raise it
            log.debug("prefetch: %s", error)


def dtype_name(dtype: str | torch.dtype) -> str:
    """A dtype to load a model in, as the name that options have for it: `auto`, `float32`, `bfloat16`, `float16`.

    Raises:
        ValueError: it is none of these.
    """
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise ValueError(f"dtype={dtype!r}: pass one of {', '.join(DTYPES)}")
    return name


def running_dtype(stored: torch.dtype) -> torch.dtype:
    """The dtype in which weights of this dtype run: experts do not in float64."""
    return torch.float32 if stored == torch.float64 else stored


def put(model: torch.nn.Module, name: str, tensor: Tensor) -> None:
    """Makes `tensor` the parameter or buffer with this name."""
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    if leaf in module._parameters:
        tensor = torch.nn.Parameter(tensor, requires_grad=False)
    setattr(module, leaf, tensor)


def _misfit(misfit: Misfit, tensors: dict[str, Any]) -> str:
    """What is wrong with the tensors on disk, by key, that a parameter is to be made of."""
    many = f", which is made of {len(tensors)} tensors such as {next(iter(tensors))}," if len(tensors) > 1 else ""
    if misfit.wanted is not None:
        return (
            f"{misfit.name}{many} has the shape {_shape(misfit.found)} in the files and {_shape(misfit.wanted)} in the "
            "model that the config describes"
        )
    alike: dict[str, dict[str, str]] = {}  # by key without numbers: keys and shapes, of tensors to be stacked
    for key, tensor in tensors.items():
        shape = tensor.get_shape() if hasattr(tensor, "get_shape") else tensor[...].shape
        alike.setdefault(re.sub(r"(?<=\.)\d+(?=\.)", "*", key), {})[key] = _shape(shape)
    for shapes in alike.values():
        usual = mode(shapes.values())
        if odd := next((key for key, shape in shapes.items() if shape != usual), None):
            return f"{odd} has the shape {shapes[odd]}, and the others that {misfit.name} is made of have {usual}"
    numbers = " and ".join(f"{len(keys)} tensors like {next(iter(keys))}" for keys in alike.values())
    return f"{misfit.name} cannot be made of {numbers} ({misfit.reason})"


def _shape(shape: Iterable[int]) -> str:
    return " x ".join(map(str, shape)) or "of one number"


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
