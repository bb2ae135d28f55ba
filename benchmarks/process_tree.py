"""Runs a command and watches the memory of all its processes, so that a tool with workers hides nothing (Linux)."""

from __future__ import annotations

import resource
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

INTERVAL, COST = 0.1, 0.01  # least seconds between two looks, and the most of the time that looking may take


def run_watched(command: list[str], **options: Any) -> tuple[int, float, float, int]:
    """Exit status, wall seconds, processor seconds, and peak bytes of the process and its descendants together.

    A page that several of them map is shared out among them (PSS). `options` are those of `subprocess.Popen`.
    """
    start, used = time.perf_counter(), _processor_seconds()
    process = subprocess.Popen(command, **options)
    peak, done = 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        looked = 0.0  # looking walks all pages, on a processor that the watched may want
        while not done.wait(max(INTERVAL, looked / COST)):
            begin = time.thread_time()
            peak = max(peak, sum(map(_bytes_of, _tree(process.pid))))
            looked = time.thread_time() - begin

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        code = process.wait()
    finally:
        done.set()
        watcher.join()
    return code, time.perf_counter() - start, _processor_seconds() - used, peak


def _processor_seconds() -> float:
    """Of all children that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _tree(root: int) -> list[int]:
    """The process and all that descend from it, as they are now."""
    found = [root]
    for pid in found:
        for tasks in Path(f"/proc/{pid}/task").glob("*/children"):
            try:
                found += map(int, tasks.read_text().split())
            except OSError:
                continue  # it has ended
    return found


def _bytes_of(pid: int) -> int:
    try:
        rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except OSError:
        return 0
    return int(rollup.partition("\nPss:")[2].split()[0]) * 1024 if "\nPss:" in rollup else 0
