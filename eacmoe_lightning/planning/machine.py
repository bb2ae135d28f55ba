"""How fast this machine is, from a second of timing: products, memory, disk. Estimates are made of these rates."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from eacmoe_lightning.planning.sizes import Cost

SECONDS = 0.3  # that one rate is measured


@dataclass(frozen=True)
class Rates:
    """Per second: operations of a matrix product in the model's dtype and in float32, bytes copied in memory, bytes
    read from and written to disk."""

    flops: float
    flops32: float
    memory: float
    disk: float

    def seconds(self, cost: Cost, cached: bool = False) -> float:
        """Products, other passes over memory and the disk one after another: nothing is assumed to overlap. `cached`:
        memory has room for the files that are used again."""
        computed = cost.flops / self.flops + cost.flops32 / self.flops32 + cost.loop_bytes / self.memory
        again = cost.again_bytes if cached else 0
        return computed + (cost.read_bytes + cost.written_bytes - again) / self.disk + 2 * again / self.memory


def measure(device: torch.device, dtype: torch.dtype, folder: Path, width: int = 1024) -> Rates:
    """Times products of 1024 tokens as wide as the model up to that (on CUDA of 8192), copies of 64 MB, and a file of
    64 MB in `folder`."""
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
    start, number = time.perf_counter(), 0
    while time.perf_counter() - start < SECONDS:
        work()
        finish()
        number += 1
    return number / (time.perf_counter() - start)


def _disk_rate(folder: Path) -> float:
    """Bytes per second of a file written to disk and read back from there."""
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
