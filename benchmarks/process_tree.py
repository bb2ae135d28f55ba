"""Runs a command and watches the memory of all its processes, so that a tool with workers hides nothing (Linux)."""

from __future__ import annotations

import subprocess
import threading
import time
from pathlib import Path
from typing import Any

INTERVAL = 0.1  # seconds between two looks


def run_watched(command: list[str], **options: Any) -> tuple[int, float, int]:
    """Exit status, wall seconds, and peak bytes of the process and its descendants together.

    A page that several of them map is shared out among them (PSS). `options` are those of `subprocess.Popen`.
    """
    start = time.perf_counter()
    process = subprocess.Popen(command, **options)
    peak, done = 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(INTERVAL):
            peak = max(peak, sum(map(_bytes_of, _tree(process.pid))))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        code = process.wait()
    finally:
        done.set()
        watcher.join()
    return code, time.perf_counter() - start, peak


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
