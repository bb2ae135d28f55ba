"""`fit` of the bundled model on the GPU beside the same fit on the CPU, both at once: perplexities and seconds.

All stages run, and the output head, which is tied to the embedding, is quantized to 8 bits and tried packed.
Sums run in another order on a GPU, codes that are decided by a hair fall otherwise, and training follows: so the two
results are near, not equal. With --cpu-result the CPU's side comes from an earlier run's output.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from gpu_parts.device import Device

ROOT = Path(__file__).resolve().parent.parent.parent
NEAR = 0.01  # relative difference of a compressed model's perplexity
EXACT = 1e-4  # the same of the original's


def rows(options: argparse.Namespace, device: Device) -> Iterator[dict]:
    stored = stored_result(options.cpu_result) if options.cpu_result else None
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        sides = {"gpu": "gpu" if device.is_cuda else "cpu"} | ({} if stored else {"cpu": "cpu"})
        started = {side: start(Path(scratch) / side, words(options, device, kind)) for side, kind in sides.items()}
        try:
            results = {side: finish(process, Path(scratch) / side) for side, process in started.items()}
        finally:
            for process in started.values():
                process.kill()
    results = ({"cpu": stored} if stored else {}) | results
    for side, result in results.items():
        yield {"side": side} | result
    gpu, cpu = (results[side]["perplexity"] for side in ("gpu", "cpu"))
    for text in cpu:
        away = {stream: abs(gpu[text][stream] / cpu[text][stream] - 1) for stream in ("original", "compressed")}
        passed = away["compressed"] <= NEAR and away["original"] <= EXACT
        yield {"text": text, "gpu": gpu[text], "cpu": cpu[text], "away": away, "passed": passed}


def words(options: argparse.Namespace, device: Device, accelerator: str) -> list[str]:
    """The command line of `fit`."""
    windows, length = (4, 64) if device.is_miniature else (options.fit_windows, options.fit_length)
    chosen = {
        "trainer.accelerator": accelerator,
        "trainer.devices": 1,
        "trainer.enable_progress_bar": "false",
        "model.head_bits": 8,
        "data.num_windows": windows,
        "data.window_length": length,
        "data.num_heldout_windows": 1 if device.is_miniature else 16,
    }
    if device.is_miniature:
        chosen |= {"model.joint_epochs": 1, "data.heldout": "bundled:prose", "model.refine": 0}
        chosen |= {"model.scale_search": "false", "model.clip_search": "false"}
    return [word for name, value in chosen.items() for word in (f"--{name}", str(value))]


def start(folder: Path, options: list[str]) -> subprocess.Popen:
    """`fit` in a process of its own, its output in `FOLDER.log`; on the CPU no GPU is visible to it."""
    command = [sys.executable, ROOT / "train.py", "fit", "--config", ROOT / "configs" / "tiny.yaml"]
    command += ["--trainer.default_root_dir", folder, *options]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"HF_HUB_OFFLINE": "1"}
    environment |= {"CUDA_VISIBLE_DEVICES": ""} if folder.name == "cpu" else {}
    with open(f"{folder}.log", "w") as log:
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT)


def finish(process: subprocess.Popen, folder: Path) -> dict:
    """Perplexities by text, seconds by phase and the machine of a fit."""
    if process.wait():
        raise RuntimeError(f"fit in {folder.name} failed:\n{Path(f'{folder}.log').read_text()[-6000:]}")
    report = json.loads((folder / "report.json").read_text())
    seconds: dict[str, float] = defaultdict(float)
    for cost in map(json.loads, (folder / "costs.jsonl").read_text().splitlines()):
        seconds[cost["phase"]] += cost["seconds"]
    return {"perplexity": report["perplexity"], "seconds": dict(seconds), "machine": report["machine"]}


def stored_result(path: Path) -> dict:
    """The CPU's side in the output of an earlier run."""
    found = [row for row in map(json.loads, path.read_text().splitlines()) if row.get("side") == "cpu"]
    if not found:
        raise ValueError(f"{path} (--cpu-result) holds no fit on a CPU")
    return {name: found[-1][name] for name in ("perplexity", "seconds", "machine")}


def line(row: dict) -> str:
    if "side" in row:
        phases = ", ".join(f"{name} {seconds:.1f}" for name, seconds in row["seconds"].items())
        return f"fit on {row['side']} ({row['machine']['processor']}): {sum(row['seconds'].values()):.1f} s ({phases})"
    gpu, cpu, away = row["gpu"], row["cpu"], row["away"]
    return (
        f"{row['text']:8s} original {gpu['original']:8.3f} (CPU {cpu['original']:8.3f}, {away['original']:.1e}), "
        f"compressed {gpu['compressed']:8.3f} (CPU {cpu['compressed']:8.3f}, {away['compressed']:.2%} of {NEAR:.0%})"
    )
