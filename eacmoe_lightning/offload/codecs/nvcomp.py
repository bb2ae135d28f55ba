"""Codecs that decode on the GPU, through NVIDIA's nvCOMP (`pip install nvidia-nvcomp-cu12`).

Compressed bytes are copied to the device and become weights there. Without a bound they are byte planes coded by
nvCOMP's ANS; with one, the codes of a uniform step (as in cuSZp), coded the same way. Written against the Python
interface of nvCOMP 6.0.

Encoding and decoding need the package and a CUDA device; without them they raise ValueError.
"""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor

from eacmoe_lightning.offload.codecs.base import Codec
from eacmoe_lightning.offload.codecs.bound import Bound, before_cast, max_error
from eacmoe_lightning.offload.codecs.bounded import INTEGERS
from eacmoe_lightning.offload.codecs.lossless import fill, fill_from_planes
from eacmoe_lightning.offload.codecs.record import Header

ALGORITHM = "ANS"


def missing() -> str | None:
    """Why nvCOMP cannot run here; None if it can."""
    if not torch.cuda.is_available():
        return "codec nvcomp needs a CUDA device, and torch sees none"
    try:
        from nvidia import nvcomp  # noqa: F401
    except ImportError as error:
        major = torch.version.cuda.partition(".")[0]
        return f"codec nvcomp needs NVIDIA's library: pip install nvidia-nvcomp-cu{major} ({error})"
    return None


def _coder() -> Any:
    """A codec of nvCOMP on torch's current stream.

    Raises:
        ValueError: nvCOMP cannot run here.
    """
    if reason := missing():
        raise ValueError(reason)
    from nvidia import nvcomp

    stream = torch.cuda.current_stream().cuda_stream
    return nvcomp.Codec(algorithm=ALGORITHM, data_type="|u1", cuda_stream=stream)


def _compress(data: Tensor) -> bytes:
    """Compresses a uint8 tensor on CUDA."""
    from nvidia import nvcomp

    stream = torch.cuda.current_stream().cuda_stream
    coded = _coder().encode(nvcomp.as_array(data, cuda_stream=stream))
    return torch.from_dlpack(coded.to_dlpack(cuda_stream=stream)).cpu().view(torch.uint8).numpy().tobytes()


def _decompress(payload: memoryview, out: Tensor) -> None:
    """Fills `out`, contiguous uint8 on CUDA."""
    from nvidia import nvcomp

    coded = torch.empty(len(payload), dtype=torch.uint8, pin_memory=True)
    fill(coded, payload)
    coded = coded.to(out.device, non_blocking=True)
    stream = torch.cuda.current_stream().cuda_stream
    _coder().decode(nvcomp.as_array(coded, cuda_stream=stream), data_type="|u1", out=out.view(-1))


def _planes(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8).view(-1, tensor.dtype.itemsize).t().contiguous()


class NvComp(Codec):
    """nvCOMP's ANS over byte planes (lossless), or over the codes of a uniform step (with a bound)."""

    name = "nvcomp"

    def __init__(self, bound: Bound | None = None) -> None:
        self.bound = bound

    @classmethod
    def parse(cls, mode: str | None = None, value: str = "nan") -> Self:
        return cls(None if mode is None else Bound(mode, float(value)))

    @property
    def specification(self) -> str:
        return self.name if self.bound is None else f"{self.name}:{self.bound.mode}:{self.bound.value:g}"

    def encode(self, weight: Tensor) -> bytes:
        if reason := missing():
            raise ValueError(reason)
        weight = weight.detach().cuda().contiguous()
        absolute = self.bound.absolute(weight) if self.bound else 0.0
        if not weight.numel():
            return self.record(weight, b"")
        step = 2 * before_cast(weight, absolute)
        if step > 0:
            codes = torch.round(weight.double() / step)
            if codes.abs().max() <= torch.iinfo(torch.int32).max:
                width = next(b for b in (1, 2, 4) if codes.abs().max() < 2 ** (8 * b - 1))
                decoded = (codes.float() * step).to(weight.dtype)
                if (error := max_error(weight, decoded)) <= absolute:
                    bound = {"mode": self.bound.mode, "value": self.bound.value, "absolute": absolute}
                    bound |= {"effective": step / 2, "error": error}
                    payload = _compress(_planes(codes.to(INTEGERS[width])))
                    return self.record(weight, payload, {"step": step, "code_bytes": width}, bound)
        return self.record(weight, _compress(_planes(weight)))

    @classmethod
    def decode_into(cls, header: Header, payload: memoryview, out: Tensor) -> None:
        if reason := missing():
            raise ValueError(reason)
        target = out if out.is_cuda else torch.empty_like(out, device="cuda")
        step, width = header.options.get("step"), header.options.get("code_bytes", out.dtype.itemsize)
        planes = torch.empty(width, out.numel(), dtype=torch.uint8, device=target.device)
        _decompress(payload, planes)
        if step is None:
            fill_from_planes(target, planes)
        else:
            codes = torch.empty(out.numel(), dtype=INTEGERS[width], device=target.device)
            fill_from_planes(codes, planes)
            target.view(-1).copy_(codes.float().mul_(step))
        if target is not out:
            out.copy_(target)
