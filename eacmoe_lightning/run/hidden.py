"""Hidden states in files: the disk limits the number of tokens, and only the rows in use are in memory.

A file holds raw numbers [S, T, D], written window by window. In models whose blocks hand over more than hidden states,
`StateWriter` writes a file for each tensor. Next to it `NAME.json` holds shape, dtype, checksum and a
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
from torch.utils._pytree import (
    TreeSpec,
    tree_flatten,
    tree_leaves,
    tree_map_only,
    tree_unflatten,
    treespec_dumps,
    treespec_loads,
)

from eacmoe_lightning.run.files import REMEDY, StoreError, full_disk_named, partial_name, settle, write_json

HASHED_AT_ONCE = 1 << 26  # bytes read at a time to compute a checksum


# What a block hands to the next: hidden states [B, T, D]; in some models a tuple of them and of more, or a dict around
# them (`models.block.Block.forward`). The first tensor is the hidden states.
State = Any


def moved(state: State, device: torch.device) -> State:
    """The state on another device."""
    return tree_map_only(Tensor, lambda tensor: tensor.to(device), state)


def rows_of(state: State, rows: Any) -> State:
    """Some rows of a state, or whatever else can be cut from all of its tensors: `rows` is their index."""
    return tree_map_only(Tensor, lambda tensor: tensor[rows], state)


def hidden_of(state: State) -> Tensor:
    """The hidden states [B, T, D] of a state."""
    return next(leaf for leaf in tree_leaves(state) if isinstance(leaf, Tensor))


class HiddenFile:
    """A tensor [S, ...] on disk. Indexing works as for a tensor and returns a copy in host memory.

    Args:
        path: the file of raw numbers.
        shape, dtype: of the tensor on disk.
        returned: dtype in which it is read; None: as stored.
    """

    def __init__(
        self, path: Path, shape: tuple[int, ...], dtype: torch.dtype, returned: torch.dtype | None = None
    ) -> None:
        self.path, self.shape, self.dtype, self.returned = path, tuple(shape), dtype, returned

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice | Tensor) -> Tensor:
        if 0 in self.shape:
            return torch.empty(self.shape, dtype=self.returned or self.dtype)[rows]
        mapped = torch.from_file(str(self.path), False, torch.Size(self.shape).numel(), dtype=self.dtype)
        return mapped.view(self.shape)[rows].clone().to(self.returned or self.dtype)

    def flatten(self, first: int, last: int) -> HiddenFile:
        """The same file with dimensions `first` to `last` merged, like `Tensor.flatten`."""
        merged = torch.Size(self.shape[first : last + 1]).numel()
        return HiddenFile(self.path, (*self.shape[:first], merged, *self.shape[last + 1 :]), self.dtype, self.returned)

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

    def written(self, returned: torch.dtype | None = None) -> HiddenFile:
        """Closes the file and returns it for reading under its temporary name; `finish` may follow.

        Args:
            returned: dtype in which it is read; None: as stored.
        """
        self._file.close()
        return HiddenFile(self.partial, (self._windows, *self._window_shape), self.dtype, returned)

    def finish(self, note: dict[str, Any], more: dict[str, Any] | None = None) -> HiddenFile:
        """Renames the file to its final name and writes its JSON; from then on it survives a kill or a power cut.

        Args:
            note: what `HiddenFile.open` compares.
            more: further content of the JSON.
        """
        file = self.written()
        with full_disk_named(self.path, self.partial):
            settle(self.partial, self.path)
        dtype = str(self.dtype).rpartition(".")[2]
        content = {"shape": file.shape, "dtype": dtype, "sha256": self._sha.hexdigest(), "note": note}
        content |= more or {}
        write_json(_note(self.path), content)
        return HiddenFile(self.path, file.shape, self.dtype)


class StateFile:
    """States [S, ...] on disk. Indexing by rows gives the states of these rows.

    Args:
        files: one per tensor, in their order in the state; None where the state has None.
        spec: the state's structure.
        dtype: dtype of the hidden states that are returned; None returns them as stored.
    """

    def __init__(self, files: list[HiddenFile | None], spec: TreeSpec, dtype: torch.dtype | None) -> None:
        self.files, self.spec, self.dtype = files, spec, dtype

    @property
    def path(self) -> Path:
        return self.files[0].path

    def __getitem__(self, rows: slice | Tensor) -> State:
        tensors = [None if file is None else file[rows] for file in self.files]
        if self.dtype is not None:
            tensors[0] = tensors[0].to(self.dtype)
        return tree_unflatten(tensors, self.spec)

    def delete(self) -> None:
        for file in self.files:
            if file is not None:
                file.delete()

    @classmethod
    def open(cls, path: Path, note: dict[str, Any]) -> StateFile:
        """Opens finished files and checks their content.

        Raises:
            StoreError: a file is missing or altered, or has another note.
        """
        first, written = HiddenFile.open(path, note), json.loads(_note(path).read_text())
        parts = written["parts"]
        others = [HiddenFile.open(_part(path, i), note) if parts[i] else None for i in range(1, len(parts))]
        dtype = written["returned_dtype"]
        return cls([first, *others], treespec_loads(written["spec"]), dtype and getattr(torch, dtype))


class StateWriter:
    """Writes a `StateFile` window by window, under temporary names until `finish`.

    Args:
        path: of the hidden states' finished file; those of other tensors get a number after its name.
        dtype: the storage dtype of hidden states; None stores them in theirs. Other tensors keep their dtypes.
    """

    def __init__(self, path: Path, dtype: torch.dtype | None) -> None:
        self.path, self.dtype = path, dtype
        self._writers: list[HiddenWriter | None] = []
        self._spec: TreeSpec = tree_flatten(torch.empty(0))[1]
        self._returned: torch.dtype | None = None  # the hidden states' dtype, if another one is stored

    def append(self, state: State) -> None:
        """Appends the next windows.

        Raises:
            StoreError: the disk is full.
        """
        tensors, self._spec = tree_flatten(state)
        if not self._writers:
            hidden = tensors[0]
            dtypes = [self.dtype or hidden.dtype, *(None if tensor is None else tensor.dtype for tensor in tensors[1:])]
            self._returned = hidden.dtype if self.dtype not in (None, hidden.dtype) else None
            self._writers = [dtype and HiddenWriter(_part(self.path, i), dtype) for i, dtype in enumerate(dtypes)]
        for writer, tensor in zip(self._writers, tensors, strict=True):
            if writer is not None:
                writer.append(tensor)

    def written(self) -> StateFile:
        """Closes the files and returns them for reading under their temporary names; `finish` may follow."""
        self._open_if_empty()
        return self._as_file([writer and writer.written() for writer in self._writers])

    def finish(self, note: dict[str, Any]) -> StateFile:
        """Renames the files to their final names; from then on they survive a kill or a power cut.

        The file of the hidden states comes last, so that its JSON says that all are complete.
        """
        self._open_if_empty()
        others = [writer and writer.finish(note) for writer in self._writers[1:]]
        content = {
            "parts": [writer is not None for writer in self._writers],
            "spec": treespec_dumps(self._spec),
            "returned_dtype": self._returned and str(self._returned).rpartition(".")[2],
        }
        return self._as_file([self._writers[0].finish(note, content), *others])

    def _open_if_empty(self) -> None:
        if not self._writers:  # a process without windows
            self._writers = [HiddenWriter(self.path, self.dtype or torch.float32)]

    def _as_file(self, files: list[HiddenFile | None]) -> StateFile:
        return StateFile(files, self._spec, self._returned)


def _part(path: Path, number: int) -> Path:
    """The file of a state's tensor with this number."""
    return path.with_name(f"{path.name}.{number}") if number else path


class Shelf(MutableMapping):
    """A dict of states that are stored in files of one directory instead of in memory, for the length of a pass."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._files: dict[Any, StateFile] = {}
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

    def __setitem__(self, key: Any, state: State) -> None:
        name = self._names.setdefault(key, f"{len(self._names):05d}")
        writer = StateWriter(self.directory / name, None)  # overwrites the key's previous files
        writer.append(state)
        self._files[key] = writer.written()

    def __getitem__(self, key: Any) -> State:
        return self._files[key][:]

    def __delitem__(self, key: Any) -> None:
        self._files.pop(key).delete()

    def __iter__(self) -> Iterator[Any]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


def _note(path: Path) -> Path:
    return path.with_name(f"{path.name}.json")
