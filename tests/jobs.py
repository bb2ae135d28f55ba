"""Runs small real jobs through the command line: 8 windows of 64 tokens and one pass of each stage on a tiny model."""

import json
import os
import re
import subprocess
import sys
import threading
from functools import cache
from pathlib import Path

from eacmoe_lightning.cli import main

ROOT = Path(__file__).resolve().parent.parent


def options(model: Path | str, run: Path | str, **more) -> list[str]:
    """Options of the command line.

    `more` replaces or adds options: `model__bits=2` is `--model.bits 2`. None leaves an option at its default.
    """
    values = {
        "trainer.default_root_dir": run,
        "trainer.accelerator": "cpu",
        "trainer.enable_progress_bar": "false",
        "model.name_or_path": model,
        "model.group_size": 32,
        "model.min_expert_tokens": 32,
        "model.block_epochs": 1,
        "model.joint_epochs": 1,
        "data.calibration": "bundled:calibration[:10%]",  # all that is read becomes tokens
        "data.heldout": "{prose: 'bundled:prose[:10%]', code: 'bundled:code[:10%]'}",
        "data.num_windows": 8,
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
        [sys.executable, *command],
        cwd=ROOT, env=env, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def finish(process: subprocess.Popen, timeout: float = 240) -> str:
    """Waits for a process, kills it on timeout, and returns its output."""
    try:
        return process.communicate(timeout=timeout)[0]
    finally:
        process.kill()
        process.wait()


# exit codes of signals that a process may answer, and of a full disk
ENDS = {"SIGTERM": 143, "SIGINT": 130, "SIGHUP": 129, "full": 1}


def attempts(model: Path, run: Path, places: list, more: dict) -> str:
    """Runs a job, ending it at every place (`kill_driver.py`), and then to its end.

    Every end must have come where it was to come.

    Returns:
        The output of all attempts.
    """
    driver, lines = _kill_driver(), []
    watchdog = threading.Timer(900, driver.kill)
    watchdog.start()
    driver.stdin.write(json.dumps([places, options(model, run, **more)]) + "\n")
    driver.stdin.flush()
    for line in driver.stdout:
        if line == "END\n":
            break
        lines.append(line)
    watchdog.cancel()
    output = "".join(lines)
    status = [json.loads(line) for line in re.findall(r"^STATUS (.*)$", output, re.MULTILINE)]
    expected = [[place, ENDS[place[3]] if place[3:] else -9] for place in places] + [[None, 0]]
    assert status == expected, f"{[end for end in status if end not in expected]}\n{output[-4000:]}"
    return output


@cache
def _kill_driver() -> subprocess.Popen:
    """One process for all jobs, since its imports take long; it ends with this process, which holds its input."""
    return start("tests/kill_driver.py")


def contents(folder: Path) -> dict[str, bytes]:
    """The contents of every file below a folder by relative path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def short_texts(folder: Path) -> Path:
    """A text of 90 different documents of 3 to 46 tokens of the bundled tokenizer."""
    words = "the a few experts read what tokens say and route them to others again".split()
    texts = [" ".join(words[(i * j + j) % len(words)] for j in range(1 + i * 17 % 31)) + f" {i}" for i in range(90)]
    (folder / "short.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    return folder / "short.jsonl"
