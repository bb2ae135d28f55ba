"""AutoRound's AutoScheme chooses bits for a model, in a process that `allocation.py` starts in AutoRound's environment.

    python autoscheme.py JOB

with JOB = {"model": .., "windows": .., "bits": .., "group_size": .., "widths": [..], "by_expert": .., "cache": ..,
"out": ..}; `bits` is the average per weight without scales and zero points, and `out` the file that gets the version,
the seconds, and the bits by linear. AutoScheme scores each width once for all sizes: `cache` keeps the scores, and may
hold those of the same windows only.

AutoScheme gives all experts of a block one width. `by_expert` takes that away: gate and up of an expert share one then,
as they do in this package, and down has its own. The attention projections of a block share a width in both.
"""

from __future__ import annotations

import json
import os
import sys
import time
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors.torch import load_file

BATCH_SIZE = 8  # AutoScheme's default
ATTENTION = [r"self_attn\.[qkvo]_proj$"]


def choose(job: dict) -> dict:
    """The bits by linear, the seconds, and AutoRound's version."""
    os.environ |= {"AR_AUTO_SCHEME_CACHE": job["cache"], "AR_ALLOW_W8_ASYM": "1"}
    from auto_round import AutoRound, AutoScheme
    from auto_round.auto_scheme import delta_loss
    from auto_round.schemes import QuantizationScheme
    from transformers import AutoModelForCausalLM, AutoTokenizer

    input_ids = load_file(job["windows"])["input_ids"]  # [S, T]
    batches = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in input_ids.split(BATCH_SIZE)]
    # it takes texts by name only, so the windows are put in the place of its loader
    delta_loss.get_dataloader = lambda *_, **__: torch.utils.data.DataLoader(batches, batch_size=None)
    shared = [ATTENTION]
    network = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32)
    if job["by_expert"]:
        shared += [[rf"\.experts\.{e}\.(gate|up)_proj$"] for e in range(network.config.num_experts)]
        delta_loss.build_expert_groups = lambda *_: []
    scheme = AutoScheme(
        avg_bits=job["bits"],
        options=[QuantizationScheme(bits=bits, group_size=job["group_size"], sym=False) for bits in job["widths"]],
        shared_layers=shared,
        ignore_scale_zp_bits=True,  # all groups take as many here
        batch_size=BATCH_SIZE,
        nsamples=len(input_ids),
        seqlen=input_ids.shape[1],
        low_cpu_mem_usage=False,
    )
    tuning = AutoRound(
        network, AutoTokenizer.from_pretrained(job["model"]), scheme=scheme, device_map="cpu", amp=False, iters=0
    )
    start, used = time.perf_counter(), time.process_time()
    tuning.post_init()
    seconds, processor_seconds = time.perf_counter() - start, time.process_time() - used
    bits = {name: layer["bits"] for name, layer in tuning.layer_config.items() if layer["bits"] < 16}
    cost = {"seconds": seconds, "processor_seconds": processor_seconds}
    return {"version": version("auto-round"), **cost, "bits": bits}


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    Path(given["out"]).write_text(json.dumps(choose(given), indent=1))
