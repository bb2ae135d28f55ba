"""The part of inference.py that loads a model directory in a fresh process and prints the cost.

    python benchmarks/inference_load.py DIRECTORY packed|bf16

Prints seconds, and resident and peak bytes beyond those of the process before (Linux: /proc).
"""

import json
import sys
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

import eacmoe_lightning


def resident(field: str) -> int:
    """`VmRSS` (now) or `VmHWM` (the peak since the last reset) of this process, in bytes."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition(f"{field}:")[2].split()[0]) * 1024


def main() -> None:
    directory, form = sys.argv[1:]
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    start = time.perf_counter()
    if form == "packed":
        model = eacmoe_lightning.load(directory)
    else:
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)
    seconds = time.perf_counter() - start
    for tensor in (*model.parameters(), *model.buffers()):  # mapped pages count only after they are read
        tensor.view(-1)[:: max(1, 4096 // tensor.element_size())].sum()
    peak = resident("VmHWM") - before
    print(json.dumps({"seconds": seconds, "resident_bytes": resident("VmRSS") - before, "peak_bytes": peak}))


if __name__ == "__main__":
    main()
