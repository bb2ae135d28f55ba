"""The programs in examples/, as people run them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def run(folder: Path, program: str, *words: str) -> str:
    """What one of them prints, run in an empty folder."""
    command = [sys.executable, ROOT / "examples" / f"{program}.py", *words]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_WAIT_POLICY": "passive"}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_calibrate_then_chat_then_offload(tmp_path):
    run(tmp_path, "calibrate")
    assert (tmp_path / "runs" / "example" / "report.md").exists()
    assert "perplexity prose" in run(tmp_path, "calibrate")  # a finished run says what it gave
    assert run(tmp_path, "chat", "runs/example", "--prompt", "The whale").startswith("The whale")
    printed = run(tmp_path, "offload", "runs/example", "--max_new_tokens", "8", "--store", "store")
    counters = dict(line.split() for line in printed.splitlines() if len(line.split()) == 2)
    assert int(counters["misses"]) > 0 and int(counters["bytes_moved"]) > 0 and int(counters["evictions"]) > 0
    assert (tmp_path / "store").is_dir()


@pytest.mark.slow
def test_an_original_runs_offloaded_within_an_error_bound(tmp_path):
    printed = run(tmp_path, "offload", "bundled", "--codec", "uniform:mean:0.1", "--max_new_tokens", "2")
    assert "23.6 MB of experts, 5.9 MB" in printed
