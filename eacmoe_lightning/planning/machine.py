"""Measures in about a second how fast this machine is: matrix products, memory and disk. `plan` estimates from it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from eacmoe_lightning.planning.sizes import Cost

SECONDS = 0.3  # duration of one measurement


@dataclass(frozen=True)
class Rates:
    """Rates per second.

    Attributes:
        flops, flops32: operations of matrix products in the model's dtype and in float32.
        memory: bytes read and written in memory.
        disk: bytes read from or written to disk.
    """

    flops: float
    flops32: float
    memory: float
    disk: float

    def seconds(self, cost: Cost, cached: bool = False) -> float:
        """The estimated time of a phase, assuming that products, other passes over memory and the disk do not overlap.

        Args:
            cost: the phase.
            cached: whether the page cache has room for the files that are used again.
        """
        computed = cost.flops / self.flops + cost.flops32 / self.flops32 + cost.loop_bytes / self.memory
        again = cost.again_bytes if cached else 0
        return computed + (cost.read_bytes + cost.written_bytes - again) / self.disk + 2 * again / self.memory


def measure(device: torch.device, dtype: torch.dtype, folder: Path, width: int = 1024) -> Rates:
    """Times matrix products, copies of 64 MB in memory and a file of 64 MB in `folder`.

    Products are of 1024 tokens and of the model's width, at most 1024; on CUDA both are 8192.
    """
    rows, width = (8192, 8192) if device.type == "cuda" else (1024, min(width, 1024))
    flops = {d: _product_rate(rows, width, d, device) for d in {dtype, torch.float32}}
    source = torch.ones(16 << 20, device=device)  # 64 MB
    target = torch.empty_like(source)
    copies = _per_second(lambda: target.copy_(source), device)
    return Rates(flops[dtype], flops[torch.float32], 2 * source.nbytes * copies, _disk_rate(folder))


def _product_rate(rows: int, width: int, dtype: torch.dtype, device: torch.device) -> float:
    a, b = (torch.ones(n, width, dtype=dtype, device=device) for n in (rows, width))
    out = torch.empty_like(a)
    return 2 * rows * width**2 * _per_second(lambda: torch.mm(a, b, out=out), device)


def _per_second(work: Callable[[], object], device: torch.device) -> float:
    def finish() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    work()
    finish()
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < SECONDS:
        work()
        finish()
        count += 1
    return count / (time.perf_counter() - start)


def _disk_rate(folder: Path) -> float:
    """Bytes per second of writing a file to disk and reading it back."""
    folder.mkdir(parents=True, exist_ok=True)
    path, content = folder / f".plan.{os.getpid()}.partial", bytes(64 << 20)
    try:
        start = time.perf_counter()
        with open(path, "wb", buffering=0) as file:
            file.write(content)
            os.fsync(file.fileno())
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        path.read_bytes()
        return 2 * len(content) / (time.perf_counter() - start)
    finally:
        path.unlink(missing_ok=True)
