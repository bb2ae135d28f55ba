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

from typing import Any

import numpy as np
import torch
from torch import Tensor

from eacmoe_lightning.offload.codecs.bounded import Bounded
from eacmoe_lightning.offload.codecs.lossless import byte_planes, fill_from_planes, unzstd, zstd
from eacmoe_lightning.offload.codecs.packed import Packed, PackedCodes
from eacmoe_lightning.offload.codecs.record import Buffer, Header
from eacmoe_lightning.quantization.entropy_coding import ALPHABET, decode_codes, encode_codes
from eacmoe_lightning.quantization.lattice import Lattice
from eacmoe_lightning.quantization.packing import pack, unpack


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
        """A record of GPTQ's codes [O, I] and steps; it decodes to `lattice.dequantize(dtype)`.

        Raises:
            ValueError: the codes span more than ALPHABET values.
        """
        weight = torch.empty(lattice.codes.shape, dtype=dtype, device="meta")
        steps = zstd(byte_planes(lattice.scale))
        codes = encode_codes(lattice.codes.cpu().numpy().reshape(-1))
        return self.record(weight, steps + codes, {"columns": lattice.scale.numel(), "step_bytes": len(steps)})

    @classmethod
    def decode_into(cls, header: Header, payload: memoryview, out: Tensor) -> None:
        size = header.options.get("step_bytes", 0)
        codes = torch.from_numpy(decode_codes(payload[size:], out.numel())).view(out.shape)
        if not size:
            out.copy_(codes.float().mul_(header.options["step"]))
            return
        columns = header.options["columns"]  # that have a step of their own; 1: one step for all
        planes, steps = torch.empty(2, columns, dtype=torch.uint8), torch.empty(columns, dtype=torch.float16)
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
