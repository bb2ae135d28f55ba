"""Hidden states in files: as many tokens as the disk holds, of which only the rows in use are in memory.

A file is raw numbers [S, T, D], written window after window and beside it `NAME.json` with shape, dtype, digest and a
note. The JSON is written last: a file without it is not finished. Reading maps the file, copies the wanted rows and
unmaps it again, so nothing stays resident.
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

HASHED_AT_ONCE = 1 << 26  # bytes


class HiddenFile:
    """A tensor [S, ...] on disk that is indexed like one; what comes out is a copy in host memory.

    Args:
        path: of the raw numbers.
        shape, dtype: what they are.
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
        """The same numbers with neighbouring dimensions made one, as `Tensor.flatten`."""
        merged = torch.Size(self.shape[first : last + 1]).numel()
        return HiddenFile(self.path, (*self.shape[:first], merged, *self.shape[last + 1 :]), self.dtype)

    def delete(self) -> None:
        _note(self.path).unlink(missing_ok=True)
        self.path.unlink(missing_ok=True)

    @classmethod
    def open(cls, path: Path, note: dict[str, Any]) -> HiddenFile:
        """A finished file, its content checked.

        Raises:
            StoreError: it is missing, altered, or has another note.
        """
        try:
            written = json.loads(_note(path).read_text())
            found = cls(path, tuple(written["shape"]), getattr(torch, written["dtype"]))
            sha = hashlib.sha256()
            with open(path, "rb") as file:
                while chunk := file.read(HASHED_AT_ONCE):
                    sha.update(chunk)
        except (OSError, ValueError, KeyError) as error:
            raise StoreError(f"{path} is missing or corrupt ({error}); {REMEDY}") from error
        if sha.hexdigest() != written["sha256"]:
            raise StoreError(f"{path} does not hold what was written: its checksum differs; {REMEDY}")
        if written["note"] != note:
            raise StoreError(f"{path} holds hidden states of other windows ({written['note']}, not {note}); {REMEDY}")
        return found

    @staticmethod
    def is_finished(path: Path) -> bool:
        return path.exists() and _note(path).exists()


class HiddenWriter:
    """Writes a `HiddenFile` window after window; until `finish`, it lies beside its place under another name.

    Args:
        path: where the finished file is to be.
        dtype: in which it is stored.
    """

    def __init__(self, path: Path, dtype: torch.dtype) -> None:
        self.path, self.dtype = path, dtype
        self.partial = partial_name(path)
        self._sha, self._windows, self._rest = hashlib.sha256(), 0, (0,)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(self.partial, "wb", buffering=0)  # noqa: SIM115  (closed by `written`)

    def append(self, rows: Tensor) -> None:
        """The next windows [b, ...].

        Raises:
            StoreError: the disk is full.
        """
        rows = rows.to("cpu", self.dtype).contiguous()
        self._windows, self._rest = self._windows + len(rows), tuple(rows.shape[1:])
        view = memoryview(rows.reshape(-1).view(torch.uint8).numpy())
        self._sha.update(view)
        with full_disk_named(self.path, self.partial):
            while view:
                view = view[self._file.write(view) :]

    def written(self) -> HiddenFile:
        """What was written, to be read before it is finished, or without it ever being."""
        self._file.close()
        return HiddenFile(self.partial, (self._windows, *self._rest), self.dtype)

    def finish(self, note: dict[str, Any]) -> HiddenFile:
        """Puts the file in its place for good: it survives a kill or a power cut from here on."""
        file = self.written()
        with full_disk_named(self.path, self.partial):
            settle(self.partial, self.path)
        dtype = str(self.dtype).rpartition(".")[2]
        content = {"shape": file.shape, "dtype": dtype, "sha256": self._sha.hexdigest(), "note": note}
        write_json(_note(self.path), content)
        return HiddenFile(self.path, file.shape, self.dtype)


class Shelf(MutableMapping):
    """Tensors by key in files of one directory, for as long as a pass takes: a dict that needs no memory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._files: dict[Any, HiddenFile] = {}
        self._names: dict[Any, str] = {}

    @classmethod
    @contextmanager
    def opened(cls, directory: Path) -> Iterator[Shelf]:
        """An empty one whose directory is removed at the end."""
        shutil.rmtree(directory, ignore_errors=True)
        try:
            yield cls(directory)
        finally:
            shutil.rmtree(directory, ignore_errors=True)

    def __setitem__(self, key: Any, tensor: Tensor) -> None:
        name = self._names.setdefault(key, f"{len(self._names):05d}")
        writer = HiddenWriter(self.directory / name, tensor.dtype)  # in the place of what was there
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
