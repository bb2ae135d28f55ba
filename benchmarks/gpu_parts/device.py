"""Where the parts run: a GPU with its clocks and limits, or, in miniature, this CPU in its place.

Without a GPU the operators of packed weights are given their CUDA implementations for CPU tensors too, and Triton's
kernels run under its interpreter: so a miniature run takes the ways that a GPU takes. The interpreter gets bfloat16
products wrong, so a miniature computes in float32.
"""

from __future__ import annotations

import os
import resource
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from eacmoe_lightning.runtime import kernels

COPIED = 2 << 30  # bytes, far beyond any cache, of the copy that gives the memory bandwidth
SIDE = 8192  # of the product that gives the arithmetic limit
FLUSHED = 512 << 20  # bytes written before a timed call: its weights are then in no cache, as between a model's blocks


@dataclass(frozen=True)
class Device:
    """What a part is given.

    Attributes:
        is_miniature: tiny shapes; times are printed and mean nothing.
        dtype: of the dense models and of activations.
    """

    device: torch.device
    is_miniature: bool

    @property
    def is_cuda(self) -> bool:
        return self.device.type == "cuda"

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.is_cuda else torch.float32

    @property
    def name(self) -> str:
        return torch.cuda.get_device_name(self.device) if self.is_cuda else "cpu"

    def synchronize(self) -> None:
        if self.is_cuda:
            torch.cuda.synchronize(self.device)

    # --- clocks -----------------------------------------------------------------------------------------

    def seconds(self, call: Callable[[], Any]) -> float:
        """Of the device, for one call whose weights are in no cache; the host's launches overlap the flush."""
        if not self.is_cuda:
            start = time.perf_counter()
            call()
            return time.perf_counter() - start
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        _flushed(self.device).zero_()
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    def wall_seconds(self, call: Callable[[], Any], number: int = 20) -> float:
        """Of the host's clock, per call of so many in a row: launches count where they are slower than the device."""
        number = number if self.is_cuda else 1
        self.synchronize()
        start = time.perf_counter()
        for _ in range(number):
            call()
        self.synchronize()
        return (time.perf_counter() - start) / number

    def waits(self, call: Callable[[], Any]) -> str | None:
        """Why a call that was made before cannot be captured as a CUDA graph: something in it waits for the GPU. Empty:
        nothing does. None: there is no GPU."""
        if not self.is_cuda:
            return None
        try:
            with torch.cuda.graph(torch.cuda.CUDAGraph()):
                call()
        except RuntimeError as error:
            torch.cuda.synchronize(self.device)
            return str(error).partition("\n")[0]
        return ""

    # --- limits -----------------------------------------------------------------------------------------

    def bandwidth(self) -> float:
        """Bytes per second, read and written, of a copy."""
        source = torch.ones((COPIED if self.is_cuda else 1 << 20) // 4, device=self.device)
        target = torch.empty_like(source)
        return 2 * source.nbytes / self._best(lambda: target.copy_(source))

    def matmul_rate(self) -> float:
        """Operations per second of a large product in `dtype`."""
        side = SIDE if self.is_cuda else 128
        a, b = (torch.randn(side, side, device=self.device, dtype=self.dtype) for _ in range(2))
        return 2 * side**3 / self._best(lambda: a @ b)

    def _best(self, call: Callable[[], Any], rounds: int = 10) -> float:
        for _ in range(3):
            call()
        return min(self.seconds(call) for _ in range(rounds))

    # --- memory -----------------------------------------------------------------------------------------

    def allocated(self) -> int:
        """Bytes of tensors on the GPU; on a CPU what the process has."""
        if self.is_cuda:
            return torch.cuda.memory_allocated(self.device)
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * resource.getpagesize()


_buffers: dict[torch.device, Tensor] = {}


def _flushed(device: torch.device) -> Tensor:
    if device not in _buffers:
        _buffers[device] = torch.empty(FLUSHED, dtype=torch.uint8, device=device)
    return _buffers[device]


@dataclass(frozen=True)
class Call:
    """What is timed, and what is done before, outside the time."""

    run: Callable[[], Any]
    prepare: Callable[[], Any] = lambda: None


def interleaved(device: Device, calls: dict[Any, Call], rounds: int = 20, seconds: float = 1.0) -> dict[Any, float]:
    """Medians of the calls' device seconds, one call each in turn; each is first run once, to be compiled.

    Args:
        seconds: after which a call takes no further turn.
    """
    times: dict[Any, list[float]] = {name: [] for name in calls}
    for turn in range(1 + (rounds if device.is_cuda else 1)):
        for name, call in calls.items():
            if sum(times[name]) >= seconds:
                continue
            call.prepare()
            if turn:
                times[name].append(device.seconds(call.run))
            else:
                call.run()
                device.synchronize()
    return {name: statistics.median(found) for name, found in times.items()}


def choose_kernels(name: str) -> list[str]:
    """Lets packed weights run through the kernel of this name (`kernels.CUDA`), or the next that takes them; the names
    of the kernels that there are from it on."""
    os.environ["EACMOE_CUDA"] = name
    kernels.cuda_kernels.cache_clear()
    return [module.__name__.rpartition(".")[2].removesuffix("_kernels") for module in kernels.cuda_kernels()]


def stand_in() -> None:
    """Lets operators on CPU tensors take the way that they take on CUDA."""
    library = torch.library.Library("eacmoe", "IMPL")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "(?s).*Overriding a previously registered kernel")
        for operator in ("linear", "experts"):
            library.impl(operator, getattr(kernels, f"_{operator}_cuda"), "CPU", allow_override=True)
    _libraries.append(library)


_libraries: list[torch.library.Library] = []  # an implementation goes with its library
