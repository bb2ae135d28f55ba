"""Virtual environments for the tools that this package is compared with, created on first use."""

from __future__ import annotations

import subprocess
import venv
from pathlib import Path


def python_of(path: Path, packages: list[list[str]]) -> str:
    """The Python of the environment at `path`; `packages` lists the arguments of each `pip install`."""
    python, done = path / "bin" / "python", path / "installed"
    if not done.exists():
        venv.create(path, with_pip=True, clear=True)
        for step in packages:
            subprocess.run([python, "-m", "pip", "install", "--quiet", *step], check=True)
        done.touch()
    return str(python)
