"""Files that are written whole or not at all, and tensor files that carry a digest of their content.

A file is written beside its place, flushed to disk and renamed. A truncated or altered tensor file is named, not
used."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

KEY = "eacmoe"  # of the metadata


class StoreError(RuntimeError):
    """A file of the run cannot be written or is not what was written."""


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Lets `write` fill a file beside `path`, flushes it to disk and renames it into place.

    Raises:
        StoreError: the disk is full; nothing that was there before is lost.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_name(path)
    with full_disk_named(path, partial):
        write(partial)
        settle(partial, path)


def partial_name(path: Path) -> Path:
    """Where a file is written before it is whole: beside its place, by this process."""
    return path.with_name(f".{path.name}.{os.getpid()}.partial")


def settle(partial: Path, path: Path) -> None:
    """Puts a written file in its place, for good even if the power goes now."""
    with open(partial, "rb+") as file:
        os.fsync(file.fileno())
    os.replace(partial, path)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)  # the rename itself survives a power cut
    finally:
        os.close(directory)


@contextmanager
def full_disk_named(path: Path, partial: Path) -> Iterator[None]:
    """Removes the partial file where what is done inside fails.

    Raises:
        StoreError: it failed for a full disk or quota.
    """
    try:
        yield
    except BaseException as error:
        size = partial.stat().st_size if partial.exists() else 0
        partial.unlink(missing_ok=True)
        if is_disk_full(error):
            free = shutil.disk_usage(path.parent).free
            raise StoreError(
                f"no room for {path}: {size} bytes were written before the disk or quota was full, {free} bytes are "
                "free. Free some, and continue this run with --ckpt_path last: everything finished is kept"
            ) from error
        raise


@contextmanager
def whole_directory(path: str | Path) -> Iterator[Path]:
    """A directory to fill that takes the place of `path` when the block ends; an older one there stays until then."""
    path = Path(path)
    partial, old = path.with_name(f".{path.name}.partial"), path.with_name(f".{path.name}.old")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    yield partial
    shutil.rmtree(old, ignore_errors=True)
    if path.exists():
        path.rename(old)
    partial.rename(path)
    shutil.rmtree(old, ignore_errors=True)


def is_disk_full(error: BaseException) -> bool:
    codes = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    if isinstance(error, OSError) and error.errno in codes:
        return True
    return any(f"os error {code}" in str(error).lower() for code in codes)  # safetensors reports from Rust


def write_json(path: Path, value: Any) -> None:
    text = json.dumps(value, indent=2, sort_keys=True) + "\n"
    write_atomically(path, lambda partial: partial.write_text(text))


def digest(tensors: dict[str, Tensor], note: str = "") -> str:
    """SHA-256 over names, dtypes, shapes and bytes, in the order of the names."""
    sha = hashlib.sha256(note.encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        if tensor.numel():
            sha.update(memoryview(tensor.reshape(-1).view(torch.uint8).numpy()))
    return sha.hexdigest()


def write_tensors(path: Path, tensors: dict[str, Tensor], note: dict[str, Any] | None = None) -> None:
    """A safetensors file with a JSON note and a digest of both in its metadata."""
    text = json.dumps(note or {}, sort_keys=True)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    # one key: safetensors writes several in an order that changes from run to run
    metadata = {KEY: json.dumps({"note": text, "sha256": digest(tensors, text)})}
    write_atomically(path, lambda partial: save_file(tensors, partial, metadata))


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `write_tensors` wrote.

    Raises:
        StoreError: the file is missing, truncated or altered.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = json.loads((file.metadata() or {}).get(KEY, "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise StoreError(f"{path} is missing, truncated or corrupt ({error}); {REMEDY}") from error
    if metadata.get("sha256") != digest(tensors, metadata.get("note", "")):
        raise StoreError(f"{path} does not hold what was written: its checksum differs; {REMEDY}")
    return tensors, json.loads(metadata["note"])


def read_note(path: Path) -> dict[str, Any]:
    """The note alone, without the tensors and without their checksum.

    Raises:
        StoreError: the file is missing or truncated.
    """
    try:
        with safe_open(path, "pt") as file:
            return json.loads(json.loads((file.metadata() or {})[KEY])["note"])
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise StoreError(f"{path} is missing, truncated or corrupt ({error}); {REMEDY}") from error


REMEDY = "delete this file and continue with --ckpt_path last to have it computed again, or restore it from a backup"
