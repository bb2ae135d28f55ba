"""Runs small real jobs through the command line: 16 windows of 64 tokens on a tiny model."""

import json
import os
import subprocess
import sys
from pathlib import Path

from eacmoe_lightning.cli import main

ROOT = Path(__file__).resolve().parent.parent


def options(model: Path | str, run: Path | str, **more) -> list[str]:
    """Options of the command line. `more` replaces or adds options: `model__bits=2` is `--model.bits 2`."""
    values = {
        "trainer.default_root_dir": run,
        "trainer.accelerator": "cpu",
        "trainer.enable_progress_bar": "false",
        "model.name_or_path": model,
        "model.group_size": 32,
        "model.min_expert_tokens": 32,
        "data.calibration": "bundled:calibration",
        "data.heldout": "{prose: 'bundled:prose[:10%]', code: 'bundled:code[:10%]'}",  # all that is read becomes tokens
        "data.num_windows": 16,
        "data.window_length": 64,
        "data.num_heldout_windows": 3,
        "data.heldout_batch_size": 2,
    }
    values |= {name.replace("__", "."): value for name, value in more.items()}
    return [word for name, value in values.items() if value is not None for word in (f"--{name}", str(value))]


def fit(model: Path | str, run: Path | str, *words: str, **more) -> Path:
    """Runs `fit` in this process and returns the run directory."""
    main(["fit", *options(model, run, **more), *words])
    return Path(run)


def start(*command: str, **environment: str) -> subprocess.Popen:
    """Starts a single-threaded Python process that imports this checkout, with stdout and stderr in one pipe."""
    env = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "OMP_NUM_THREADS": "1", **environment}
    return subprocess.Popen(
        [sys.executable, *command], cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finish(process: subprocess.Popen, timeout: float = 240) -> str:
    """Waits for a process, kills it on timeout, and returns its output."""
    try:
        return process.communicate(timeout=timeout)[0]
    finally:
        process.kill()
        process.wait()


def contents(folder: Path) -> dict[str, bytes]:
    """The contents of every file below a folder by relative path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def short_texts(folder: Path) -> Path:
    """A text of 90 different documents of 3 to 46 tokens of the bundled tokenizer."""
    words = "the a few experts read what tokens say and route them to others again".split()
    texts = [" ".join(words[(i * j + j) % len(words)] for j in range(1 + i * 17 % 31)) + f" {i}" for i in range(90)]
    (folder / "short.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    return folder / "short.jsonl"
