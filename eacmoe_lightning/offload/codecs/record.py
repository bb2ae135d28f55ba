"""One compressed tensor as one blob of bytes that says what it is and whether it is whole.

    8 bytes    magic
    4 + 4      length and CRC-32 of the header, little-endian
    header     JSON, padded with spaces so that the payload begins at a multiple of ALIGNMENT
    payload    what the codec made; its length and CRC-32 stand in the header

A record is decoded only after both checksums were compared, so a truncated or altered one is an error with its name,
never a wrong weight.
"""

from __future__ import annotations

import json
import struct
import zlib
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from eacmoe_lightning.run.files import StoreError

MAGIC = b"eacmoe1\n"
PREFIX = struct.Struct("<8sII")
ALIGNMENT = 64
DTYPES = {str(d).rpartition(".")[2]: d for d in (torch.float32, torch.bfloat16, torch.float16)}

Buffer = bytes | bytearray | memoryview


class RecordError(StoreError):
    """A record is truncated, altered or of a kind that this version cannot read."""


@dataclass(frozen=True)
class Header:
    """What a record says of itself.

    Attributes:
        codec: the name of the codec that decodes the payload.
        dtype: of the tensor: `float32`, `bfloat16` or `float16`.
        shape: of the tensor.
        options: what the codec needs beside the payload.
        bound: of a lossy codec: `mode` and `value` as asked for, `absolute` in weight units, `effective` (what the
            compressor was told, so that the bound holds after the cast to `dtype`; 0: stored losslessly) and `error`
            (the largest one measured).
    """

    codec: str
    dtype: str
    shape: tuple[int, ...]
    options: dict[str, Any] = field(default_factory=dict)
    bound: dict[str, Any] | None = None
    payload_bytes: int = 0
    payload_crc32: int = 0

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def num_weights(self) -> int:
        return torch.Size(self.shape).numel()

    @property
    def dense_bytes(self) -> int:
        """Bytes of the decoded tensor."""
        return self.num_weights * self.torch_dtype.itemsize

    @property
    def bits_per_weight(self) -> float:
        """Of the payload."""
        return 8 * self.payload_bytes / max(self.num_weights, 1)


def dtype_name(tensor: torch.Tensor) -> str:
    """The name that headers use.

    Raises:
        ValueError: not a dtype of weights.
    """
    name = str(tensor.dtype).rpartition(".")[2]
    if name not in DTYPES:
        raise ValueError(f"codecs take {', '.join(DTYPES)} tensors, not {name}")
    return name


def write_record(header: Header, payload: Buffer) -> bytes:
    """Header and payload as one blob; lengths and checksums are filled in."""
    described = asdict(header) | {"payload_bytes": len(payload), "payload_crc32": zlib.crc32(payload)}
    text = json.dumps(described, sort_keys=True).encode()
    text += b" " * (-(PREFIX.size + len(text)) % ALIGNMENT)
    return b"".join((PREFIX.pack(MAGIC, len(text), zlib.crc32(text)), text, payload))


def read_header(record: Buffer, name: str = "record") -> Header:
    """The header alone; the payload is not looked at.

    Raises:
        RecordError: it is truncated, altered or no record.
    """
    return _parse(record, name)[0]


def read_record(record: Buffer, name: str = "record") -> tuple[Header, memoryview]:
    """Header and payload, both checksums compared.

    Args:
        record: may be longer than the record.
        name: what errors call it.

    Raises:
        RecordError: it is truncated, altered or no record.
    """
    header, start = _parse(record, name)
    payload = memoryview(record)[start : start + header.payload_bytes]
    if len(payload) < header.payload_bytes:
        raise RecordError(f"{name} is truncated: {len(payload)} of {header.payload_bytes} bytes are there")
    if zlib.crc32(payload) != header.payload_crc32:
        raise RecordError(f"{name} does not hold what was written: the checksum of its content differs")
    return header, payload


def _parse(record: Buffer, name: str) -> tuple[Header, int]:
    view = memoryview(record)
    if len(view) < PREFIX.size:
        raise RecordError(f"{name} is truncated: it has {len(view)} bytes")
    magic, length, crc = PREFIX.unpack_from(view)
    text = view[PREFIX.size : PREFIX.size + length]
    if magic != MAGIC or len(text) < length or zlib.crc32(text) != crc:
        raise RecordError(f"{name} is truncated or altered: its header does not hold what was written")
    fields = json.loads(bytes(text))
    return Header(**fields | {"shape": tuple(fields["shape"])}), PREFIX.size + length
