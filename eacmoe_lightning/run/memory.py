"""What a phase takes, and what is left: on the CUDA device where there is one, else of this process and machine."""

from __future__ import annotations

import ctypes
import os
import resource
import time
from pathlib import Path

import torch

_MEMORY, _CGROUP = Path("/proc/meminfo"), Path("/sys/fs/cgroup")
_STATUS, _CLEAR, _IO = Path("/proc/self/status"), Path("/proc/self/clear_refs"), Path("/proc/self/io")


class Watch:
    """What a stretch of this process takes, from its creation on."""

    def __init__(self) -> None:
        reset_peak_memory()
        self._started, self._disk = time.perf_counter(), disk_traffic()

    def cost(self) -> dict[str, float]:
        """`seconds`; `peak_bytes` of memory; `read_bytes` and `written_bytes`, from and to the disk itself: what the
        system's page cache had or still holds is not among them (0 where the system does not tell)."""
        read, written = (now - then for now, then in zip(disk_traffic(), self._disk, strict=True))
        seconds = round(time.perf_counter() - self._started, 4)
        return {"seconds": seconds, "peak_bytes": peak_memory(), "read_bytes": read, "written_bytes": written}


def disk_traffic() -> tuple[int, int]:
    """Bytes that this process has had read from and written to disk so far."""
    try:
        counters = dict(line.split(": ") for line in _IO.read_text().splitlines())
        return int(counters["read_bytes"]), int(counters["write_bytes"])
    except (OSError, ValueError, KeyError):
        return 0, 0  # another system


def reset_peak_memory() -> None:
    """Starts a new phase, where the system allows it; elsewhere peaks are those of the run so far."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        try:
            _CLEAR.write_text("5")  # Linux: VmHWM := VmRSS
        except OSError:
            pass


def peak_memory() -> int:
    """Bytes at the highest point since `reset_peak_memory`."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    try:
        line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def return_free_memory() -> None:
    """Hands what is free in the C library's heap back to the system (glibc keeps it, in ever more pieces)."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, TypeError, AttributeError):
        pass  # another C library


def available_memory(device: torch.device) -> int:
    """Bytes that this process can still take on a device, within the limits of its container."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    lines = _MEMORY.read_text().splitlines() if _MEMORY.exists() else []
    found = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")]
    try:
        limit, used = ((_CGROUP / name).read_text().strip() for name in ("memory.max", "memory.current"))
        cached = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
        if limit != "max":  # the page cache counts as used, and is given back
            found.append(int(limit) - int(used) + int(cached.get("inactive_file", 0)))
    except (OSError, ValueError):
        pass  # no limit, or another system
    return min(found, default=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
