"""Error-bounded codecs: SZ3 (through `pysz`), and a uniform step with zstd to compare it with.

The bound is checked: every record is decoded again before it is returned, and the largest error of the final weights is
compared with the bound. If it does not hold, the compressor gets a smaller one; after all ATTEMPTS the tensor is stored
losslessly. It is also stored losslessly if that takes fewer bytes, as with a bound below the dtype's own precision.

SZ3 runs without its predictors: neighbouring weights are uncorrelated, so prediction only adds error (2.14, 5.40, 8.71
bits per weight without, against 2.44, 5.69, 9.17 with it, on Gaussian weights). What remains is a uniform quantizer of
step 2 x bound, Huffman codes and zstd.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, Self

import numpy as np
import pysz
import torch
from torch import Tensor

from eacmoe_lightning.offload.codecs.base import Codec
from eacmoe_lightning.offload.codecs.bound import Bound, before_cast, max_error
from eacmoe_lightning.offload.codecs.lossless import Lossless, byte_planes, fill_from_planes, unzstd, zstd
from eacmoe_lightning.offload.codecs.record import Header

ATTEMPTS = (1.0, 0.999, 0.7, 0.35)  # shares of the bound to try, in turn
SMALL = 0.5  # a record above this share of the tensor's bytes is compared with the lossless one

INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32}  # by their size in bytes


class Bounded(Codec):
    """A codec with |w - w'| <= bound for every weight, measured in the weight's own dtype."""

    def __init__(self, bound: Bound) -> None:
        self.bound = bound

    @classmethod
    def parse(cls, mode: str, value: str) -> Self:
        return cls(Bound(mode, float(value)))

    @property
    def specification(self) -> str:
        return f"{self.name}:{self.bound.mode}:{self.bound.value:g}"

    def encode(self, weight: Tensor) -> bytes:
        weight = weight.detach().cpu().contiguous()
        bound = {"mode": self.bound.mode, "value": self.bound.value, "absolute": self.bound.absolute(weight)}
        record = self._encode(weight, bound) if bound["absolute"] > 0 and weight.numel() else None
        if record is None or len(record) > SMALL * weight.nbytes:
            exact = Lossless().record(weight, zstd(byte_planes(weight)), bound=bound | {"effective": 0.0, "error": 0.0})
            record = exact if record is None or len(exact) <= len(record) else record
        return record

    def _encode(self, weight: Tensor, bound: dict[str, Any]) -> bytes | None:
        values, decoded = weight.float().view(-1), torch.empty_like(weight)
        target = before_cast(weight, bound["absolute"])
        for share in ATTEMPTS:
            coded = self.compress(values, target * share)
            if coded is None:
                return None
            payload, options = coded
            self.decode_into(self.header(weight, options), memoryview(payload), decoded)
            error = max_error(weight, decoded)
            if error <= bound["absolute"]:
                return self.record(weight, payload, options, bound | {"effective": target * share, "error": error})
        return None

    @abstractmethod
    def compress(self, values: Tensor, bound: float) -> tuple[bytes, dict[str, Any]] | None:
        """Payload and options for float32 [n] on CPU; None if this codec cannot keep such a bound."""


class SZ3(Bounded):
    """SZ3's quantizer and entropy coder, without prediction."""

    name, releases_gil = "sz3", False

    def compress(self, values: Tensor, bound: float) -> tuple[bytes, dict[str, Any]]:
        config = pysz.szConfig(values.shape)
        config.errorBoundMode, config.absErrorBound = pysz.szErrorBoundMode.ABS, bound
        config.cmprAlgo = pysz.szAlgorithm.NOPRED
        return pysz.sz.compress(values.numpy(), config)[0].tobytes(), {}

    @classmethod
    def decode_into(cls, header: Header, payload: memoryview, out: Tensor) -> None:
        values, _ = pysz.sz.decompress(np.frombuffer(payload, np.uint8), np.float32, (out.numel(),))
        out.view(-1).copy_(torch.from_numpy(values))


class Uniform(Bounded):
    """Codes round(w / step) with step = 2 x bound, in the narrowest integers that hold them, as byte planes in zstd."""

    name = "uniform"

    def compress(self, values: Tensor, bound: float) -> tuple[bytes, dict[str, Any]] | None:
        step = 2 * bound
        codes = torch.round(values.double() / step)
        largest = codes.abs().max().item()
        dtype = next((d for d in INTEGERS.values() if largest <= torch.iinfo(d).max), None)
        if dtype is None:
            return None
        return zstd(byte_planes(codes.to(dtype))), {"step": step, "code_bytes": dtype.itemsize}

    @classmethod
    def decode_into(cls, header: Header, payload: memoryview, out: Tensor) -> None:
        width = header.options["code_bytes"]
        planes = torch.empty(width, out.numel(), dtype=torch.uint8)
        unzstd(payload, planes)
        codes = torch.empty(out.numel(), dtype=INTEGERS[width])
        fill_from_planes(codes, planes)
        out.view(-1).copy_(codes.float().mul_(header.options["step"]))
