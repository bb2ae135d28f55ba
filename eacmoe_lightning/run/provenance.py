"""The provenance of a report's figures: command, settings, versions, commit, machine."""

from __future__ import annotations

import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("eacmoe-lightning", "torch", "lightning", "transformers", "torchmetrics", "datasets")


# those of Lightning's trainer on which a run's result depends
TRAINER_OPTIONS = ("precision", "accumulate_grad_batches", "gradient_clip_val", "limit_train_batches")
_given: list[str] = []  # the words of a command that Python code runs; empty: those of the process


def remember_command(words: Sequence[str] | None) -> None:
    """Keeps the words of a command that Python code runs, `cli.main([...])`; None: those of the process count."""
    _given[:] = words or []


def command_line() -> str:
    """The command that runs, quoted as a shell reads it."""
    return shlex.join(["eacmoe", *_given] if _given else sys.argv)


def origin(config: dict[str, Any], seed: int, num_processes: int = 1) -> dict[str, Any]:
    """The provenance of a report's figures, as the report stores it."""
    return {
        "command": command_line(),
        "config": config,
        "versions": {name: _version(name) for name in PACKAGES} | {"python": platform.python_version()},
        "commit": commit(),
        "seed": seed,
        "machine": {"processor": processor(), "threads": torch.get_num_threads(), "processes": num_processes},
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except Exception:
        return "not installed"


def commit() -> str:
    """The commit of the checkout that this package runs from, or `unknown`."""
    checkout = Path(__file__).resolve().parents[2]
    try:
        result = subprocess.run(
            ["git", "-C", checkout, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return result.stdout.strip() if result.returncode == 0 else "unknown"


def processor() -> str:
    """The name of the GPU if there is one, else of the CPU."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    try:
        names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        return names[0].partition(":")[2].strip()
    except (OSError, IndexError):
        return platform.processor() or platform.machine()
