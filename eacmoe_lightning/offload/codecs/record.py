"""One compressed tensor as one blob of bytes that describes itself and carries checksums.

    8 bytes    magic
    4 + 4      length and CRC-32 of the header, little-endian
    header     JSON, padded with spaces so that the payload begins at a multiple of ALIGNMENT
    payload    the codec's bytes; their length and CRC-32 are in the header

A record is decoded only after both checksums have been checked. A truncated or altered one raises an error with its
name, and never gives a wrong weight.
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
    """A record is truncated, altered, or from a codec that this version does not know."""


@dataclass(frozen=True)
class Header:
    """The description of a record's tensor.

    Attributes:
        codec: name of the codec that decodes the payload.
        dtype: of the tensor: `float32`, `bfloat16` or `float16`.
        shape: of the tensor.
        options: what the codec needs besides the payload.
        bound: for a lossy codec: `mode` and `value` as requested, `absolute` in weight units, `effective` (the bound
            given to the compressor, so that `absolute` holds after the cast to `dtype`; 0: stored losslessly) and
            `error` (the largest error measured).
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
        """Size of the decoded tensor."""
        return self.num_weights * self.torch_dtype.itemsize

    @property
    def bits_per_weight(self) -> float:
        """Bits of the payload per weight."""
        return 8 * self.payload_bytes / max(self.num_weights, 1)


def dtype_name(tensor: torch.Tensor) -> str:
    """The dtype's name in headers.

    Raises:
        ValueError: codecs do not take tensors of this dtype.
    """
    name = str(tensor.dtype).rpartition(".")[2]
    if name not in DTYPES:
        raise ValueError(f"codecs take {', '.join(DTYPES)} tensors, not {name}")
    return name


def write_record(header: Header, payload: Buffer) -> bytes:
    """Header and payload as one blob; fills in the header's length and checksum of the payload."""
    fields = asdict(header) | {"payload_bytes": len(payload), "payload_crc32": zlib.crc32(payload)}
    text = json.dumps(fields, sort_keys=True).encode()
    text += b" " * (-(PREFIX.size + len(text)) % ALIGNMENT)
    return b"".join((PREFIX.pack(MAGIC, len(text), zlib.crc32(text)), text, payload))


def read_header(record: Buffer, name: str = "record") -> Header:
    """The header alone; the payload is not checked.

    Raises:
        RecordError: the header is truncated, altered or not that of a record.
    """
    return _parse(record, name)[0]


def read_record(record: Buffer, name: str = "record") -> tuple[Header, memoryview]:
    """Header and payload, after both checksums have been checked.

    Args:
        record: a buffer that begins with the record; it may be longer.
        name: the record's name in errors.

    Raises:
        RecordError: the record is truncated or altered, or the buffer holds no record.
    """
    header, start = _parse(record, name)
    payload = memoryview(record)[start : start + header.payload_bytes]
    if len(payload) < header.payload_bytes:
        raise RecordError(f"{name} is truncated: {len(payload)} of {header.payload_bytes} bytes are there")
    if zlib.crc32(payload) != header.payload_crc32:
        raise RecordError(f"{name} is altered: the checksum of its payload differs")
    return header, payload


def _parse(record: Buffer, name: str) -> tuple[Header, int]:
    view = memoryview(record)
    if len(view) < PREFIX.size:
        raise RecordError(f"{name} is truncated: it has {len(view)} bytes")
    magic, length, crc = PREFIX.unpack_from(view)
    text = view[PREFIX.size : PREFIX.size + length]
    if magic != MAGIC or len(text) < length or zlib.crc32(text) != crc:
        raise RecordError(f"{name} is truncated or altered: its header is not what was written")
    fields = json.loads(bytes(text))
    return Header(**fields | {"shape": tuple(fields["shape"])}), PREFIX.size + length
