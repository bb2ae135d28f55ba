"""The costs of a phase and the memory still available: on the CUDA device if there is one, else on this machine."""

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
    """Measures the costs of this process from the object's creation on."""

    def __init__(self) -> None:
        reset_peak_memory()
        self._started, self._disk = time.perf_counter(), disk_traffic()

    def cost(self) -> dict[str, float]:
        """`seconds`, `peak_bytes` of memory, and `read_bytes` and `written_bytes` of disk traffic.

        Disk traffic excludes reads and writes that the page cache absorbs; it is 0 where the system does not report it.
        """
        read, written = (now - then for now, then in zip(disk_traffic(), self._disk, strict=True))
        seconds = round(time.perf_counter() - self._started, 4)
        return {"seconds": seconds, "peak_bytes": peak_memory(), "read_bytes": read, "written_bytes": written}


def disk_traffic() -> tuple[int, int]:
    """Bytes that this process has read from and written to disk so far."""
    try:
        counters = dict(line.split(": ") for line in _IO.read_text().splitlines())
        return int(counters["read_bytes"]), int(counters["write_bytes"])
    except (OSError, ValueError, KeyError):
        return 0, 0  # not Linux


def reset_peak_memory() -> None:
    """Resets the peak, where the system allows it; elsewhere peaks cover the whole run so far."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        try:
            _CLEAR.write_text("5")  # Linux: VmHWM := VmRSS
        except OSError:
            pass


def peak_memory() -> int:
    """The peak memory in bytes since `reset_peak_memory`."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    try:
        line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def return_free_memory() -> None:
    """Returns free memory of the C library's heap to the system; glibc keeps it, and it fragments."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, TypeError, AttributeError):
        pass  # another C library


def available_memory(device: torch.device) -> int:
    """Bytes that this process can still allocate on a device, within the limits of its container."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    lines = _MEMORY.read_text().splitlines() if _MEMORY.exists() else []
    available = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")]
    try:
        limit, used = ((_CGROUP / name).read_text().strip() for name in ("memory.max", "memory.current"))
        cached = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
        if limit != "max":  # the page cache counts as used but can be reclaimed
            available.append(int(limit) - int(used) + int(cached.get("inactive_file", 0)))
    except (OSError, ValueError):
        pass  # no limit, or not Linux
    return min(available, default=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
