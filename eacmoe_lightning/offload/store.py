"""All experts of a model as compressed records in one file, on disk or in host memory, mapped and never read whole.

    records    one after another, at multiples of ALIGNMENT (`codecs/record.py`)
    index      JSON: where each record is, and what the store was made from
    footer     magic, offset, length and CRC-32 of the index

Opening a store checks the index's checksum and the file's size. Decoding a record checks the record's checksums. So a
damaged expert raises an error that names file, block, expert and weight before its weights are used.
"""

from __future__ import annotations

import json
import mmap
import os
import struct
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from eacmoe_lightning.offload.codecs.record import ALIGNMENT, Header, RecordError, read_header, read_record
from eacmoe_lightning.offload.memory import memory_file
from eacmoe_lightning.run.files import StoreError, write_atomically

FOOTER = struct.Struct("<8sQII")
MAGIC = b"eacmoe-x"
FORMAT_VERSION = 1


class Key(NamedTuple):
    """One weight of one expert."""

    block: int  # index of the decoder block
    expert: int
    projection: str  # gate_up_proj, up_proj or down_proj


class ExpertStore:
    """The records of a file that `write` made.

    Args:
        file: open for reading.
        name: the store's name in errors.

    Raises:
        StoreError: the file is truncated, altered or not a store.
    """

    def __init__(self, file: BinaryIO, name: str) -> None:
        self.file, self.name = file, name
        self.nbytes = os.fstat(file.fileno()).st_size
        if self.nbytes < FOOTER.size:
            raise StoreError(f"{name} is truncated: it has {self.nbytes} bytes. {REMEDY}")
        self.view = memoryview(mmap.mmap(file.fileno(), self.nbytes, access=mmap.ACCESS_READ))
        magic, offset, length, crc = FOOTER.unpack_from(self.view, self.nbytes - FOOTER.size)
        text = self.view[offset : offset + length]
        if magic != MAGIC or offset + length + FOOTER.size != self.nbytes or zlib.crc32(text) != crc:
            raise StoreError(f"{name} is truncated or altered: its index is not what was written. {REMEDY}")
        index = json.loads(bytes(text))
        if (version := index["format_version"]) > FORMAT_VERSION:
            raise StoreError(f"{name} has format version {version}; this release reads up to {FORMAT_VERSION}")
        self.about: dict[str, Any] = index["about"]
        self.places = {Key(*key): (offset, length) for *key, offset, length in index["records"]}

    @classmethod
    def open(cls, path: str | Path) -> ExpertStore:
        """Raises FileNotFoundError or StoreError."""
        if not Path(path).is_file():
            raise FileNotFoundError(f"there is no store of experts at {path}")
        return cls(open(path, "rb"), str(path))

    @classmethod
    def in_memory(cls, records: Iterable[tuple[Key, bytes]], about: dict[str, Any]) -> ExpertStore:
        """A new store in host memory."""
        file = memory_file("eacmoe-store")
        _write(file, records, about)
        return cls(file, "the in-memory store of experts")

    def name_of(self, key: Key) -> str:
        return f"{self.name}: block {key.block}, expert {key.expert}, {key.projection}"

    def record(self, key: Key) -> memoryview:
        """A record, its checksums not checked yet.

        Raises:
            StoreError: the store has no such expert.
        """
        if key not in self.places:
            raise StoreError(f"{self.name_of(key)} is missing. {REMEDY}")
        offset, length = self.places[key]
        return self.view[offset : offset + length]

    def header(self, key: Key) -> Header:
        return read_header(self.record(key), self.name_of(key))

    def check_size(self) -> None:
        """Raises StoreError if the file is shorter than when it was mapped: reading past its end kills the process."""
        if (size := os.fstat(self.file.fileno()).st_size) < self.nbytes:
            raise StoreError(
                f"{self.name} was truncated while it was in use: {size} of {self.nbytes} bytes are left. {REMEDY}"
            )

    def __iter__(self) -> Iterator[Key]:
        return iter(self.places)

    @property
    def record_bytes(self) -> int:
        """Size of all records."""
        return sum(length for _, length in self.places.values())

    def verify(self) -> None:
        """Reads all records and checks their checksums.

        Raises:
            RecordError: names the first damaged record.
        """
        for key in self.places:
            try:
                read_record(self.record(key), self.name_of(key))
            except RecordError as error:
                raise RecordError(f"{error}. {REMEDY}") from error


def write(path: str | Path, records: Iterable[tuple[Key, bytes]], about: dict[str, Any]) -> None:
    """Writes a store, whole or not at all. It takes records one at a time, so they need not all fit into memory.

    Args:
        about: what the store was made from, kept in the index.

    Raises:
        StoreError: the disk is full.
    """

    def fill(partial: Path) -> None:
        with open(partial, "wb") as file:
            _write(file, records, about)

    write_atomically(Path(path), fill)


def _write(file: BinaryIO, records: Iterable[tuple[Key, bytes]], about: dict[str, Any]) -> None:
    places, position = [], 0
    for key, record in records:
        places.append([*key, position, len(record)])
        file.write(record + bytes(-len(record) % ALIGNMENT))
        position += len(record) + -len(record) % ALIGNMENT
    index = json.dumps({"format_version": FORMAT_VERSION, "about": about, "records": places}).encode()
    file.write(index + FOOTER.pack(MAGIC, position, len(index), zlib.crc32(index)))
    file.flush()


REMEDY = "Delete it so that it is written again, or restore it from a backup"
