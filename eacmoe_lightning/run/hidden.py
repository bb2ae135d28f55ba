"""Hidden states in files: the disk limits the number of tokens, and only the rows in use are in memory.

A file holds raw numbers [S, T, D], written window by window. Next to it `NAME.json` holds shape, dtype, checksum and a
note. The JSON is written last: a file without it is not finished. Reading maps the file, copies the requested rows and
unmaps it, so that nothing stays resident.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eacmoe_lightning.run.files import REMEDY, StoreError, full_disk_named, partial_name, settle, write_json

HASHED_AT_ONCE = 1 << 26  # bytes read at a time to compute a checksum


class HiddenFile:
    """A tensor [S, ...] on disk. Indexing works as for a tensor and returns a copy in host memory.

    Args:
        path: the file of raw numbers.
        shape, dtype: of the tensor.
    """

    def __init__(self, path: Path, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self.path, self.shape, self.dtype = path, tuple(shape), dtype

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice | Tensor) -> Tensor:
        if 0 in self.shape:
            return torch.empty(self.shape, dtype=self.dtype)[rows]
        mapped = torch.from_file(str(self.path), False, torch.Size(self.shape).numel(), dtype=self.dtype)
        return mapped.view(self.shape)[rows].clone()

    def flatten(self, first: int, last: int) -> HiddenFile:
        """The same file with dimensions `first` to `last` merged, like `Tensor.flatten`."""
        merged = torch.Size(self.shape[first : last + 1]).numel()
        return HiddenFile(self.path, (*self.shape[:first], merged, *self.shape[last + 1 :]), self.dtype)

    def delete(self) -> None:
        _note(self.path).unlink(missing_ok=True)
        self.path.unlink(missing_ok=True)

    @classmethod
    def open(cls, path: Path, note: dict[str, Any]) -> HiddenFile:
        """Opens a finished file and checks its content.

        Raises:
            StoreError: the file is missing or altered, or has another note.
        """
        try:
            written = json.loads(_note(path).read_text())
            file = cls(path, tuple(written["shape"]), getattr(torch, written["dtype"]))
            sha = hashlib.sha256()
            with open(path, "rb") as raw:
                while chunk := raw.read(HASHED_AT_ONCE):
                    sha.update(chunk)
        except (OSError, ValueError, KeyError) as error:
            raise StoreError(f"{path} is missing or corrupt ({error}); {REMEDY}") from error
        if sha.hexdigest() != written["sha256"]:
            raise StoreError(f"{path} does not hold what was written: its checksum differs; {REMEDY}")
        if written["note"] != note:
            raise StoreError(f"{path} holds hidden states of other windows ({written['note']}, not {note}); {REMEDY}")
        return file

    @staticmethod
    def is_finished(path: Path) -> bool:
        return path.exists() and _note(path).exists()


class HiddenWriter:
    """Writes a `HiddenFile` window by window, under a temporary name until `finish`.

    Args:
        path: of the finished file.
        dtype: the storage dtype.
    """

    def __init__(self, path: Path, dtype: torch.dtype) -> None:
        self.path, self.dtype = path, dtype
        self.partial = partial_name(path)
        self._sha, self._windows, self._window_shape = hashlib.sha256(), 0, (0,)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(self.partial, "wb", buffering=0)  # noqa: SIM115  (closed by `written`)

    def append(self, rows: Tensor) -> None:
        """Appends the next windows [b, ...].

        Raises:
            StoreError: the disk is full.
        """
        rows = rows.to("cpu", self.dtype).contiguous()
        self._windows, self._window_shape = self._windows + len(rows), tuple(rows.shape[1:])
        view = memoryview(rows.reshape(-1).view(torch.uint8).numpy())
        self._sha.update(view)
        with full_disk_named(self.path, self.partial):
            while view:
                view = view[self._file.write(view) :]

    def written(self) -> HiddenFile:
        """Closes the file and returns it for reading under its temporary name; `finish` may follow."""
        self._file.close()
        return HiddenFile(self.partial, (self._windows, *self._window_shape), self.dtype)

    def finish(self, note: dict[str, Any]) -> HiddenFile:
        """Renames the file to its final name and writes its JSON; from then on it survives a kill or a power cut."""
        file = self.written()
        with full_disk_named(self.path, self.partial):
            settle(self.partial, self.path)
        dtype = str(self.dtype).rpartition(".")[2]
        content = {"shape": file.shape, "dtype": dtype, "sha256": self._sha.hexdigest(), "note": note}
        write_json(_note(self.path), content)
        return HiddenFile(self.path, file.shape, self.dtype)


class Shelf(MutableMapping):
    """A dict of tensors that are stored in files of one directory instead of in memory, for the length of a pass."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._files: dict[Any, HiddenFile] = {}
        self._names: dict[Any, str] = {}

    @classmethod
    @contextmanager
    def opened(cls, directory: Path) -> Iterator[Shelf]:
        """An empty shelf, whose directory is removed at the end."""
        shutil.rmtree(directory, ignore_errors=True)
        try:
            yield cls(directory)
        finally:
            shutil.rmtree(directory, ignore_errors=True)

    def __setitem__(self, key: Any, tensor: Tensor) -> None:
        name = self._names.setdefault(key, f"{len(self._names):05d}")
        writer = HiddenWriter(self.directory / name, tensor.dtype)  # overwrites the key's previous file
        writer.append(tensor)
        self._files[key] = writer.written()

    def __getitem__(self, key: Any) -> Tensor:
        return self._files[key][:]

    def __delitem__(self, key: Any) -> None:
        self._files.pop(key).delete()

    def __iter__(self) -> Iterator[Any]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


def _note(path: Path) -> Path:
    return path.with_name(f"{path.name}.json")
