"""The weight files of an original: which tensors they hold, by their headers alone, and what is wrong with them.

safetensors files and pickles of PyTorch are read. A pickle is only ever opened with `weights_only`, since it may run
code otherwise.
"""

from __future__ import annotations

import json
import math
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from eacmoe_lightning.models.transformers_loader import checkpoint_files
from eacmoe_lightning.run.files import StoreError, first_of, read_json

WEIGHTS = (".safetensors", ".bin")
PLAIN = {f"{name}{end}" for name in ("model.safetensors", "pytorch_model.bin") for end in ("", ".index.json")}
MERGE = "merge it into its base model (`merge_and_unload` of peft), save the result, and pass that"
LFS = b"version https://git-lfs.github.com/spec/"
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


class DamagedFile(FileNotFoundError):
    """A file of a model is missing, truncated, damaged or not fetched; the message names it."""


@dataclass(frozen=True)
class Stored:
    """A tensor in a file.

    Attributes:
        file: the file that holds it.
        dtype: its dtype in the file; None if this version of torch has no such dtype.
        shape: its shape.
        span: its first byte in the file and the byte after its last; None in a pickle.
    """

    file: str
    dtype: torch.dtype | None
    shape: tuple[int, ...]
    span: tuple[int, int] | None = None

    @property
    def num_bytes(self) -> int:
        return self.span[1] - self.span[0] if self.span else math.prod(self.shape) * self.dtype.itemsize


def stored_tensors(path: str) -> dict[str, Stored]:
    """Every tensor of a model's weight files by its key, from the headers of the files.

    Args:
        path: a local directory or a hub id.

    Raises:
        OSError: there are no weight files.
        DamagedFile: one is missing, truncated, damaged or not fetched by git-lfs.
        ValueError: a pickle holds Python objects besides tensors, or two files hold different tensors of one name.
    """
    check_fetched(path)
    files = weight_files(path)
    if missing := [Path(file).name for file in files if not Path(file).exists()]:
        raise DamagedFile(
            f"of the {len(files)} files that its index names, {path} lacks {first_of(missing, 'file')}: download the "
            "model again"
        )
    stored: dict[str, Stored] = {}
    for file in files:
        for key, tensor in _read_header(file).items():
            if key in stored and not _is_equal(key, stored[key], tensor):
                raise ValueError(
                    f"{path} (--model.name_or_path) holds {key} twice with different values, in "
                    f"{Path(stored[key].file).name} and {Path(file).name}: download the model again, or remove the "
                    "file that is not part of it"
                )
            stored[key] = tensor
    return stored


def _is_equal(key: str, *tensors: Stored) -> bool:
    """Whether two files hold the same under a key."""
    if len({(tensor.dtype, tensor.shape) for tensor in tensors}) > 1:
        return False
    read = []
    for tensor in tensors:
        with opened(tensor.file) as file:
            read.append(file.lazy(key)[...].contiguous().view(-1).view(torch.uint8))
    return torch.equal(*read)


def weight_files(path: str) -> list[str]:
    """The weight files of a local directory or a hub id.

    Raises:
        OSError: there are none.
        DamagedFile: their index is missing or damaged.
    """
    try:
        return checkpoint_files(path)
    except (KeyError, ValueError) as error:  # JSONDecodeError is a ValueError
        raise DamagedFile(
            f"the index of the weight files in {path} is damaged ({error!r}): download it again"
        ) from error
    except OSError as error:
        shards = sorted(Path(path).glob("model-*-of-*.safetensors"))
        if not shards:
            raise
        raise DamagedFile(
            f"{path} holds {first_of([shard.name for shard in shards], 'shard')}, but no model.safetensors.index.json "
            "that lists them: download it"
        ) from error


def check_fetched(path: str, weights: bool = True) -> None:
    """Raises DamagedFile if a file of a local directory, weights or not, is a pointer of git-lfs or a dangling link."""
    if not Path(path).is_dir():
        return
    for file in sorted(Path(path).iterdir()):
        if (file.suffix in WEIGHTS) != weights:
            continue
        if file.is_symlink() and not file.exists() and (weights or file.suffix == ".json"):
            raise DamagedFile(f"{file} is a link to a missing file, {file.readlink()}: download it again")
        if file.is_file() and file.stat().st_size < 1024 and file.read_bytes().startswith(LFS):
            raise DamagedFile(f"{file} is a pointer of git-lfs and not the file itself: run `git lfs pull` in {path}")


def found_instead(folder: Path) -> str:
    """What a directory holds that is no model of transformers, and what to do, as sentences; "" if nothing is known."""
    names = sorted(path.name for path in folder.iterdir())
    if snapshots := sorted(file.parent for file in folder.glob("snapshots/*/config.json")):
        return f"{folder} is a model's folder in the hub's cache: pass the snapshot in it, such as {snapshots[-1]}."
    if "run.json" in names:
        return f"{folder} is a run directory: pass the original that the run has calibrated."
    if "adapter_config.json" in names:
        return f"{folder} holds an adapter (adapter_config.json): {MERGE}."
    if any(name.endswith(".gguf") for name in names):
        return f"{folder} holds GGUF files, which are not read: pass the model that they were made of."
    others = [name for name in names if name.endswith((*WEIGHTS, ".pth", ".pt", ".ckpt")) and name not in PLAIN]
    if others and not any(name in PLAIN or name.endswith(".index.json") for name in names):
        return (
            f"{folder} holds {first_of(others, 'file')}, but neither model.safetensors nor an index: convert it to the "
            "layout of transformers."
        )
    return ""


def check_no_adapter(path: str) -> None:
    """Refuses a model with an adapter beside it, which transformers would apply, and which is not read.

    Raises:
        ValueError: there is one in this local directory.
    """
    if (Path(path) / "adapter_config.json").is_file() and (Path(path) / "config.json").is_file():
        raise ValueError(
            f"{path} (--model.name_or_path) holds an adapter (adapter_config.json) beside the model, which would not "
            f"take part: {MERGE}; or move the adapter's files elsewhere"
        )


def check_option_files(path: str) -> None:
    """Raises DamagedFile if a file of options in a local directory is damaged, which transformers would pass over."""
    for name in ("config.json", "generation_config.json"):
        file = Path(path) / name
        if file.is_file():
            try:
                read_json(file)
            except StoreError as error:
                raise DamagedFile(f"{str(error).partition(';')[0]}: download it again") from error


def _read_header(file: str) -> dict[str, Stored]:
    if not file.endswith(".safetensors"):
        content = _load_pickle(file, True)
        entries = content if isinstance(content, dict) else {"the whole of it": content}
        if odd := [key for key, value in entries.items() if not isinstance(value, torch.Tensor)]:
            raise ValueError(
                f"{file} holds {odd[0]!r}, which is no tensor but {type(entries[odd[0]]).__name__}: it is of a "
                "training job, and not of a model alone. Write the model with its `save_pretrained`"
            )
        return {key: Stored(file, tensor.dtype, tuple(tensor.shape)) for key, tensor in entries.items()}
    size = Path(file).stat().st_size
    with open(file, "rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        try:
            if not 0 < length <= size - 8:
                raise ValueError(f"a header of {length} bytes in a file of {size}")
            header = json.loads(stream.read(length))
            header.pop("__metadata__", None)
            tensors = {
                key: Stored(
                    file,
                    DTYPES.get(entry["dtype"]),
                    tuple(entry["shape"]),
                    (8 + length + entry["data_offsets"][0], 8 + length + entry["data_offsets"][1]),
                )
                for key, entry in sorted(header.items())  # as the library lists them
            }
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DamagedFile(f"{file} is damaged, its header cannot be read ({error}): download it again") from error
    end = max((tensor.span[1] for tensor in tensors.values()), default=8 + length)
    if end > size:
        raise DamagedFile(f"{file} is truncated: it has {size} bytes, and its header promises {end}. Download it again")
    return tensors


def _load_pickle(file: str, only_shapes: bool = False) -> dict[str, torch.Tensor]:
    options = {"map_location": "meta" if only_shapes else "cpu", "weights_only": True}
    try:
        try:
            return torch.load(file, mmap=True, **options)
        except RuntimeError as error:
            if "mmap" not in str(error):
                raise
            return torch.load(file, **options)  # the format of before torch 1.6 cannot be mapped
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{file} holds Python objects besides tensors, and such a file may run code when it is opened: convert it "
            f"to safetensors. {str(error).splitlines()[0]}"
        ) from error
    except (RuntimeError, EOFError, KeyError) as error:
        raise DamagedFile(f"{file} is truncated or damaged ({error}): download it again") from error


class OpenFile:
    """An open weight file; a tensor is read when it is indexed."""

    def __init__(self, tensors: Any) -> None:
        self._tensors = tensors

    def lazy(self, key: str) -> Any:
        """The tensor, which `[...]` reads."""
        if isinstance(self._tensors, dict):
            return self._tensors[key]
        tensor = self._tensors.get_slice(key)
        return self._tensors.get_tensor(key) if 0 in tensor.get_shape() else tensor  # it does not slice empty ones


@contextmanager
def opened(file: str) -> Iterator[OpenFile]:
    """An open weight file.

    Raises:
        OSError, SafetensorError: it cannot be read.
    """
    if not file.endswith(".safetensors"):
        yield OpenFile(_load_pickle(file))
        return
    with safe_open(file, "pt", backend="pread") as tensors:  # mapped pages would count as this process's memory
        yield OpenFile(tensors)
