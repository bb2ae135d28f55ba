"""What a codec is, and the two functions that need no codec object: `codec` (by its name) and `decode` (any record).

    record = codec("sz3:mean:0.1").encode(weight)     # bytes
    weight = decode(record)                           # the record knows its codec

| specification | |
|---|---|
| `plain` | the bytes as they are |
| `lossless` | byte planes through zstd |
| `sz3:MODE:BOUND` | SZ3 without prediction; MODE is `absolute`, `range` or `mean` |
| `uniform:MODE:BOUND` | codes of a uniform step through zstd |
| `entropy:MODE:BOUND` | the same codes at their entropy |
| `packed:BITS:GROUP`, `packed-zstd:BITS:GROUP` | the codes of QESC, packed as on disk (`packing.py`), or through zstd |
| `packed-entropy:BITS:GROUP` | the same codes at their entropy given the zero point |
| `nvcomp`, `nvcomp:MODE:BOUND` | on CUDA: byte planes, or codes of a uniform step, through nvCOMP |
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from eacmoe_lightning.offload.codecs.record import Buffer, Header, RecordError, dtype_name, read_record, write_record

CODECS: dict[str, type[Codec]] = {}  # subclasses of Codec add themselves


class Codec(ABC):
    """Encodes a tensor as a record, and decodes a record's payload to a tensor."""

    name: ClassVar[str]
    is_lossless: ClassVar[bool] = False
    releases_gil: ClassVar[bool] = True  # while it decodes, so that threads can decode beside the model

    def __init_subclass__(cls) -> None:
        if "name" in vars(cls):
            CODECS[cls.name] = cls

    @classmethod
    @abstractmethod
    def parse(cls, *words: str) -> Self:
        """The codec of a specification, from the words after its name."""

    @property
    @abstractmethod
    def specification(self) -> str:
        """The string from which `codec` makes this codec."""

    @abstractmethod
    def encode(self, weight: Tensor) -> bytes:
        """Encodes a float32, bfloat16 or float16 tensor of any shape, on any device, as one record.

        Raises:
            ValueError: the tensor has another dtype, or NaN or infinite values and the codec is not lossless.
        """

    @classmethod
    @abstractmethod
    def decode_into(cls, header: Header, payload: memoryview, out: Tensor) -> None:
        """Fills `out`, which has the header's shape and dtype and is contiguous."""

    def header(
        self, weight: Tensor, options: dict[str, Any] | None = None, bound: dict[str, Any] | None = None
    ) -> Header:
        return Header(self.name, dtype_name(weight), tuple(weight.shape), options or {}, bound)

    def record(
        self,
        weight: Tensor,
        payload: Buffer,
        options: dict[str, Any] | None = None,
        bound: dict[str, Any] | None = None,
    ) -> bytes:
        return write_record(self.header(weight, options, bound), payload)


def codec(specification: str | Codec) -> Codec:
    """The codec of a specification such as `lossless` or `sz3:mean:0.1`; see the top of this file.

    Raises:
        ValueError: there is no such codec, or the codec does not take these words.
    """
    if isinstance(specification, Codec):
        return specification
    if not isinstance(specification, str):
        raise ValueError(f"codec {specification!r} is neither a string such as 'sz3:mean:0.1' nor a Codec")
    name, *words = specification.split(":")
    if name not in CODECS:
        raise ValueError(f"codec {specification!r}: {name!r} is not one of {', '.join(CODECS)}")
    try:
        return CODECS[name].parse(*words)
    except (TypeError, ValueError) as error:
        raise ValueError(f"codec {specification!r}: {error}") from error


def codec_of(header: Header, name: str = "record") -> type[Codec]:
    """The class that decodes a record.

    Raises:
        RecordError: this version knows no such codec.
    """
    if header.codec not in CODECS:
        raise RecordError(f"{name} was written by codec {header.codec!r}; this version knows {', '.join(CODECS)}")
    return CODECS[header.codec]


def decode(record: Buffer, out: Tensor | None = None, name: str = "record") -> Tensor:
    """Checks a record's checksums and decodes its tensor.

    Args:
        record: what `Codec.encode` returned.
        out: the tensor to fill, contiguous, of the record's shape and dtype; None: a new one on CPU.
        name: the record's name in errors.

    Raises:
        RecordError: the record is truncated or altered.
        ValueError: `out` does not match the record.
    """
    header, payload = read_record(record, name)
    if out is None:
        out = torch.empty(header.shape, dtype=header.torch_dtype)
    elif out.shape != header.shape or out.dtype != header.torch_dtype or not out.is_contiguous():
        raise ValueError(
            f"{name} holds {header.dtype} {tuple(header.shape)}; out is {out.dtype} {tuple(out.shape)}"
            f"{'' if out.is_contiguous() else ', not contiguous'}"
        )
    if out.numel():
        codec_of(header, name).decode_into(header, payload, out)
    return out
