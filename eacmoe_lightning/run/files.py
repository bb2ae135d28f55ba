"""Files written atomically, and tensor files with a checksum of their content.

A file is written under a temporary name, flushed to disk and renamed, so it is complete or absent. A truncated or
altered tensor file raises an error that names it.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

KEY = "eacmoe"  # of our entry in the metadata of a safetensors file


class StoreError(RuntimeError):
    """A file of the run cannot be written, or its content is not what was written."""


class FullDisk(StoreError):
    """A file cannot be written because the disk or quota is full."""


def first_of(names: Sequence[str], noun: str) -> str:
    """Names in an error message: the first of them, and how many others of this kind of thing there are."""
    others = len(names) - 1
    return f"{names[0]} and {others} other {noun}{'s' if others > 1 else ''}" if others else names[0]


def read_json(path: Path) -> dict[str, Any]:
    """The options or figures by name in a JSON file of this package.

    Raises:
        StoreError: the file is missing, or damaged.
    """
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:  # JSON and UTF-8 errors are ValueErrors
        raise StoreError(f"{path} is missing, truncated or corrupt ({error}); {RESTORE}") from error
    if not isinstance(content, dict):
        raise StoreError(f"{path} does not hold what was written, but a {type(content).__name__}; {RESTORE}")
    return content


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Lets `write` fill a temporary file, flushes it to disk and renames it to `path`.

    Raises:
        StoreError: the disk is full; an existing file at `path` is kept.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_name(path)
    with full_disk_named(path, partial):
        partial.touch()
        mode = stat.S_IMODE(partial.stat().st_mode)  # by the user's umask; safetensors lets nobody else read its files
        write(partial)
        partial.chmod(mode)
        settle(partial, path)


def partial_name(path: Path) -> Path:
    """The temporary name, in the same directory, under which this process writes a file."""
    return path.with_name(f".{path.name}.{os.getpid()}.partial")


def settle(partial: Path, path: Path) -> None:
    """Flushes a written file to disk and renames it to `path`, so that it survives a power cut."""
    with open(partial, "rb+") as file:
        os.fsync(file.fileno())
    os.replace(partial, path)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)  # so that the rename survives a power cut
    finally:
        os.close(directory)


@contextmanager
def full_disk_named(path: Path, partial: Path) -> Iterator[None]:
    """Removes the partial file if the body of the `with` statement raises.

    Raises:
        FullDisk: the body failed because the disk or quota is full.
    """
    try:
        yield
    except BaseException as error:
        size = partial.stat().st_size if partial.exists() else 0
        partial.unlink(missing_ok=True)
        if is_disk_full(error):
            free = shutil.disk_usage(path.parent).free
            raise FullDisk(
                f"no room for {path}: {size} bytes were written before the disk or quota was full, {free} bytes are "
                "free. Free some space"
            ) from error
        raise


@contextmanager
def whole_directory(path: str | Path) -> Iterator[Path]:
    """A directory to fill, which replaces `path` when the `with` statement ends; until then an older one is kept."""
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


def copy_files(files: Iterable[Path], source: Path, directory: Path) -> None:
    """Copies files below one directory to another, into the same folders."""
    for file in files:
        place = directory / file.relative_to(source)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, place)


def write_json(path: Path, value: Any) -> None:
    text = json.dumps(value, indent=2, sort_keys=True) + "\n"
    write_atomically(path, lambda partial: partial.write_text(text))


def digest(tensors: dict[str, Tensor], note: str = "") -> str:
    """SHA-256 over names, dtypes, shapes and bytes, ordered by name."""
    sha = hashlib.sha256(note.encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        if tensor.numel():
            sha.update(memoryview(tensor.reshape(-1).view(torch.uint8).numpy()))
    return sha.hexdigest()


def write_tensors(path: Path, tensors: dict[str, Tensor], note: dict[str, Any] | None = None) -> None:
    """Writes a safetensors file with a JSON note and a checksum of both in its metadata."""
    text = json.dumps(note or {}, sort_keys=True)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    # one key, because safetensors writes several keys in an order that varies from run to run
    metadata = {KEY: json.dumps({"note": text, "sha256": digest(tensors, text)})}
    write_atomically(path, lambda partial: save_file(tensors, partial, metadata))


def read_tensors(path: Path, is_checked: bool = True) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Reads the tensors and the note that `write_tensors` wrote.

    Raises:
        StoreError: the file is missing or truncated; or, with `is_checked`, altered.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = json.loads((file.metadata() or {}).get(KEY, "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise StoreError(f"{path} is missing, truncated or corrupt ({error}); {REMEDY}") from error
    if is_checked and metadata.get("sha256") != digest(tensors, metadata.get("note", "")):
        raise StoreError(f"{path} does not hold what was written: its checksum differs; {REMEDY}")
    return tensors, json.loads(metadata["note"])


def read_note(path: Path) -> dict[str, Any]:
    """Reads only the note; does not read the tensors or check their checksum.

    Raises:
        StoreError: the file is missing or truncated.
    """
    try:
        with safe_open(path, "pt") as file:
            return json.loads(json.loads((file.metadata() or {})[KEY])["note"])
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise StoreError(f"{path} is missing, truncated or corrupt ({error}); {REMEDY}") from error


RESTORE = "restore it from a backup, or make its directory again"
REMEDY = "delete this file and continue with --ckpt_path auto to compute it again, or restore it from a backup"
