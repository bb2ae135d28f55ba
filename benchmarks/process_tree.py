"""Runs a command and measures the memory of all its processes, so that a tool's workers count, too (Linux)."""

from __future__ import annotations

import resource
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

INTERVAL, COST = 0.1, 0.01  # minimum seconds between two samples, and maximum share of the time spent on sampling


def run_watched(command: list[str], **options: Any) -> tuple[int, float, float, int]:
    """Exit status, wall seconds, processor seconds, and peak of the total bytes of the process and its descendants.

    A page that several processes map counts proportionally for each (PSS). `options` are those of `subprocess.Popen`.
    """
    start, used = time.perf_counter(), _processor_seconds()
    process = subprocess.Popen(command, **options)
    peak, done = 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        sampling_seconds = 0.0  # sampling walks all pages, and competes with the command for the processor
        while not done.wait(max(INTERVAL, sampling_seconds / COST)):
            sampling_start = time.thread_time()
            peak = max(peak, sum(map(_bytes_of, _tree(process.pid))))
            sampling_seconds = time.thread_time() - sampling_start

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        code = process.wait()
    finally:
        if process.poll() is None:  # this process is being ended
            process.kill()
        done.set()
        watcher.join()
    return code, time.perf_counter() - start, _processor_seconds() - used, peak


def _processor_seconds() -> float:
    """Processor seconds of all children that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _tree(root: int) -> list[int]:
    """The process and all its present descendants."""
    pids = [root]
    for pid in pids:
        for tasks in Path(f"/proc/{pid}/task").glob("*/children"):
            try:
                pids += map(int, tasks.read_text().split())
            except OSError:
                continue  # the process has ended
    return pids


def _bytes_of(pid: int) -> int:
    try:
        rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except OSError:
        return 0
    return int(rollup.partition("\nPss:")[2].split()[0]) * 1024 if "\nPss:" in rollup else 0
