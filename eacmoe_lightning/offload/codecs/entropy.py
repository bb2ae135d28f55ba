"""Codes at their entropy: asymmetric numeral systems (through `constriction`), where Huffman codes round to whole bits.

At 2 bits, a Huffman code over single codes loses 0.03 to 0.1 bit; asymmetric numeral systems lose nothing measurable.
Two codecs:

    entropy:MODE:BOUND          codes of a uniform step, as in `uniform`; `encode_lattice` takes GPTQ's lattice codes
    packed-entropy:BITS:GROUP   group-wise codes of QESC, with one distribution for each zero point

The zero point tells where in their range a group's codes lie; knowing it saves another 0.05 bit (at 3 bits) to 0.13 bit
(at 2 bits). It is decoded first. Distributions are stored as 16-bit frequencies, so that encoder and decoder compute
the same model.
"""

from __future__ import annotations

import struct
from typing import Any

import constriction
import numpy as np
import torch
from torch import Tensor

from eacmoe_lightning.offload.codecs.bounded import Bounded
from eacmoe_lightning.offload.codecs.lossless import byte_planes, fill_from_planes, unzstd, zstd
from eacmoe_lightning.offload.codecs.packed import Packed, PackedCodes
from eacmoe_lightning.offload.codecs.record import Buffer, Header
from eacmoe_lightning.quantization.lattice import Lattice
from eacmoe_lightning.quantization.packing import pack, unpack

ALPHABET = 1 << 12  # largest range of codes: beyond it the table of frequencies is no longer small
TABLE = struct.Struct("<iI")  # smallest code, number of values up to the largest
Model = constriction.stream.model.Categorical


def encode_codes(codes: np.ndarray, given: np.ndarray | None = None) -> bytes:
    """Encodes integers [n] at their entropy, or at their entropy given uint8 [n], which the decoder must know.

    Raises:
        ValueError: the codes span more than ALPHABET values.
    """
    if not codes.size:
        return b""
    low, high = int(codes.min()), int(codes.max())
    if high - low >= ALPHABET:
        raise ValueError(f"codes from {low} to {high} span more than {ALPHABET} values")
    symbols, size = (codes - low).astype(np.int32), max(high - low + 1, 2)  # the library needs at least two symbols
    coder, tables = constriction.stream.stack.AnsCoder(), []
    for case in reversed(_cases(symbols.size, given)):  # a stack: what is decoded first is encoded last
        counts = np.bincount(symbols[case], minlength=size)
        table = (-(-counts * 65535 // counts.max())).astype("<u2")  # rounded up, so that no symbol that occurs gets 0
        coder.encode_reverse(symbols[case], _model(table))
        tables.insert(0, table)
    head = TABLE.pack(low, size)
    return b"".join([head, *(table.tobytes() for table in tables), coder.get_compressed().astype("<u4").tobytes()])


def decode_codes(data: Buffer, count: int, given: np.ndarray | None = None) -> np.ndarray:
    """The inverse of `encode_codes`: int32 [count]."""
    if not count:
        return np.empty(0, np.int32)
    low, size = TABLE.unpack_from(data)
    cases = _cases(count, given)
    tables = np.frombuffer(data, "<u2", len(cases) * size, TABLE.size).reshape(len(cases), size)
    words = np.frombuffer(data, "<u4", offset=TABLE.size + tables.nbytes).astype(np.uint32)
    coder = constriction.stream.stack.AnsCoder(words)
    codes = np.empty(count, np.int32)
    for case, table in zip(cases, tables, strict=True):
        codes[case] = coder.decode(_model(table), codes[case].size)
    return codes + low


def _cases(count: int, given: np.ndarray | None) -> list[Any]:
    """For each distribution, the index of its codes."""
    if given is None:
        return [slice(0, count)]
    return [np.flatnonzero(given == value) for value in np.unique(given)]


def _model(table: np.ndarray) -> Model:
    return Model(table.astype(np.float64), perfect=False)


class Entropy(Bounded):
    """Codes of a uniform step, or of GPTQ on a lattice, at their entropy."""

    name, releases_gil = "entropy", False

    def compress(self, values: Tensor, bound: float) -> tuple[bytes, dict[str, Any]] | None:
        step = 2 * bound
        codes = torch.round(values.double() / step)
        if codes.max() - codes.min() >= ALPHABET or codes.abs().max() > torch.iinfo(torch.int32).max:
            return None
        return encode_codes(codes.int().numpy()), {"step": step}

    def encode_lattice(self, lattice: Lattice, dtype: torch.dtype) -> bytes:
        """A record of GPTQ's codes [O, I] and steps [I]; it decodes to `lattice.dequantize(dtype)`.

        Raises:
            ValueError: the codes span more than ALPHABET values.
        """
        weight = torch.empty(lattice.codes.shape, dtype=dtype, device="meta")
        steps = zstd(byte_planes(lattice.step.half()))
        codes = encode_codes(lattice.codes.cpu().numpy().reshape(-1))
        return self.record(weight, steps + codes, {"columns": lattice.step.numel(), "step_bytes": len(steps)})

    @classmethod
    def decode_into(cls, header: Header, payload: memoryview, out: Tensor) -> None:
        size = header.options.get("step_bytes", 0)
        codes = torch.from_numpy(decode_codes(payload[size:], out.numel())).view(out.shape)
        if not size:
            out.copy_(codes.float().mul_(header.options["step"]))
            return
        planes, steps = torch.empty(2, header.options["columns"], dtype=torch.uint8), torch.empty(out.shape[-1]).half()
        unzstd(payload[:size], planes)
        fill_from_planes(steps, planes)
        out.copy_(codes.float().mul_(steps.float()))


class PackedEntropy(PackedCodes):
    """Group-wise codes at their entropy given their group's zero point."""

    name, releases_gil = "packed-entropy", False

    def parts(self, codes: Tensor, scale: Tensor, zero_point: Tensor) -> list[Buffer]:
        count = codes.shape[-1] // self.bits * 8
        plain, zeros = unpack(codes, self.bits, count), zero_point.numpy().reshape(-1)
        given = zero_point.repeat_interleave(count // zero_point.shape[-1], -1).numpy().reshape(-1)
        return [encode_codes(plain.numpy().reshape(-1), given), zstd(byte_planes(scale)), encode_codes(zeros)]

    @classmethod
    def fill_parts(cls, bits: int, parts: list[memoryview], out: Packed) -> None:
        codes, scale, zero_point = out
        zeros = torch.from_numpy(decode_codes(parts[2], zero_point.numel()).astype(np.uint8))
        zero_point.copy_(zeros.view(zero_point.shape))
        count = codes.shape[-1] // bits * 8
        given = zero_point.repeat_interleave(count // zero_point.shape[-1], -1).numpy().reshape(-1)
        plain = decode_codes(parts[0], given.size, given).astype(np.uint8).reshape(*codes.shape[:-1], count)
        codes.copy_(pack(torch.from_numpy(plain), bits))
        planes = torch.empty(2, scale.numel(), dtype=torch.uint8)
        unzstd(parts[1], planes)
        fill_from_planes(scale, planes)
