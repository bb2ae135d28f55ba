"""What it costs to calibrate one block of a real model, and how memory grows with the number of blocks.

    python benchmarks/block_cost.py --json FILE [--shapes mixtral qwen1.5 qwen3] [--windows 4 --length 512]

Random bfloat16 weights of the real shapes are written to disk as a checkpoint. Then `fit` takes the block through its
phases in `--dtype`: check, read, observe, attention, router (closed form), experts, block, replay. Every row runs in a
separate process, which reports seconds and peak memory by phase, next to what `plan` predicts from this machine's
rates. `--paper` turns off activation order, scale search, refinement and the block stage; `--joint` adds one pass of
the joint stage, which streams the blocks. The line "experts" also gives the rate of GPTQ and its Hessians as a share of
this machine's rate of matrix products.

`--blocks 2 4 8 16` does the same with a small shape and that many blocks: the peak must not grow with their number. It
grows up to a point because glibc keeps pieces of freed tensors below 32 MiB. With MALLOC_MMAP_THRESHOLD_=1048576 in the
environment it does not keep them, but is slower.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from kept_rows import write_rows
from safetensors.torch import save_file
from transformers import MixtralConfig, PreTrainedConfig, Qwen2MoeConfig, Qwen3MoeConfig

from eacmoe_lightning.callbacks import CompressedModel, RoutingReport, TokenScores
from eacmoe_lightning.commands.trainer import calibration_trainer
from eacmoe_lightning.evaluation.report import cost
from eacmoe_lightning.job.data import TextWindows
from eacmoe_lightning.job.qesc import QESC
from eacmoe_lightning.models.moe import MoEModel
from eacmoe_lightning.models.transformers_loader import empty_model, original_names
from eacmoe_lightning.planning.joint import JointMemory
from eacmoe_lightning.planning.machine import measure as rates_of
from eacmoe_lightning.planning.phases import plan
from eacmoe_lightning.planning.sizes import job_of
from eacmoe_lightning.run.directory import RunDirectory
from eacmoe_lightning.run.memory import available_memory
from eacmoe_lightning.text.windows import Windows

VOCABULARY = 1024  # of the random models; small, because embeddings are not measured


def config_of(shape: str, num_blocks: int) -> PreTrainedConfig:
    common = {"vocab_size": VOCABULARY, "num_hidden_layers": num_blocks, "max_position_embeddings": 4096}
    if shape == "mixtral":
        return MixtralConfig(**common)  # Mixtral-8x7B is the class's default
    if shape == "qwen1.5":  # Qwen1.5-MoE-A2.7B
        return Qwen2MoeConfig(
            **common, hidden_size=2048, num_attention_heads=16, num_key_value_heads=16, intermediate_size=5632,
            moe_intermediate_size=1408, shared_expert_intermediate_size=5632, num_experts=60, num_experts_per_tok=4,
        )  # fmt: skip
    if shape == "qwen3":  # Qwen3-30B-A3B
        return Qwen3MoeConfig(
            **common, hidden_size=2048, num_attention_heads=32, num_key_value_heads=4, head_dim=128,
            intermediate_size=6144, moe_intermediate_size=768, num_experts=128, num_experts_per_tok=8,
        )  # fmt: skip
    return Qwen3MoeConfig(  # small
        **common, hidden_size=512, num_attention_heads=8, num_key_value_heads=4, head_dim=64, intermediate_size=512,
        moe_intermediate_size=512, num_experts=32, num_experts_per_tok=4,
    )  # fmt: skip


def write_checkpoint(config: PreTrainedConfig, folder: Path) -> None:
    """Writes random weights in the original's format, one file for each parameter in memory."""
    model = empty_model(config, torch.bfloat16)
    routers = {block.router_parameter_name for block in MoEModel(model).moe_blocks}
    weight_map: dict[str, str] = {}
    generator = torch.Generator().manual_seed(0)
    for i, (name, empty) in enumerate(model.state_dict().items()):
        scale = 1 / empty.shape[-1] ** 0.5 if empty.ndim > 1 else 0.0
        weight = torch.empty(empty.shape, dtype=empty.dtype).normal_(generator=generator).mul_(scale)
        weight = weight + 1 if empty.ndim == 1 else weight * (4 if name in routers else 1)
        tensors = {key: part.contiguous() for key, part in original_names(model, {name: weight}).items()}
        save_file(tensors, folder / f"model-{i:05d}.safetensors", {"format": "pt"})
        weight_map |= dict.fromkeys(tensors, f"model-{i:05d}.safetensors")
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config.dtype = torch.bfloat16
    config.save_pretrained(folder)


class RandomWindows(TextWindows):
    """Random tokens in the place of calibration text; batches of one window."""

    def __init__(self, windows: int, length: int) -> None:
        super().__init__(heldout=[], num_windows=windows, window_length=length, batch_size=1)

    @cached_property
    def _read(self) -> dict[str, Windows]:
        shape, generator = (self.num_windows, self.window_length), torch.Generator().manual_seed(1)
        tokens = Windows(torch.randint(0, VOCABULARY, shape, generator=generator))
        return dict.fromkeys(self.calibration_texts, tokens)

    def check_model(self, moe: MoEModel, stage: str) -> None:
        """Random tokens need no tokenizer."""


def measure(
    shape: str,
    num_blocks: int,
    windows: int,
    length: int,
    dtype: str,
    paper: bool,
    folder: Path,
    device: torch.device | str = "cpu",
    **options: Any,
) -> dict:
    """Runs `fit` on the checkpoint in `folder`, and returns one row of the result: the costs up to the last block."""
    if options.get("joint_epochs"):
        JointMemory.fits = lambda memory, job, device, host: host < float("inf")  # blocks do not fit together
    if paper:
        options |= {"act_order": False, "scale_search": False, "refine": 0, "block_epochs": 0}
    module = QESC(str(folder), dtype, bits=[3], **{"joint_epochs": 0, **options})
    data, run = RandomWindows(windows, length), RunDirectory(folder / "run")
    accelerator = "gpu" if torch.device(device).type == "cuda" else "cpu"
    trainer = calibration_trainer(run.path, progress_bar=False, accelerator=accelerator, devices=1, logger=False)
    trainer.callbacks = [
        c for c in trainer.callbacks if not isinstance(c, (CompressedModel, RoutingReport, TokenScores))
    ]
    trainer.fit(module, data)
    phases = {name: phase for name, phase in cost(run).items() if isinstance(phase, dict)}
    moe, recipe = module.moe, module.recipe
    job = job_of(module, data, moe, 1, moe.device.type, available_memory(moe.device))
    planned = plan(moe, recipe, job).phases
    rates = rates_of(moe.device, moe.model.dtype, folder, moe.config.hidden_size)
    for name, phase in phases.items():
        if name in planned:
            phase["planned_seconds"] = rates.seconds(planned[name], cached=True)
            phase["planned_bytes"] = planned[name].peak_bytes
            phase["flops"] = planned[name].flops + planned[name].flops32
    weights = [p for p in moe.blocks[0].layer.parameters()]
    errors = module.block_stats()[-1].error
    return {
        "shape": shape,
        "blocks": num_blocks,
        "tokens": windows * length,
        "dtype": dtype,
        "block_bytes": sum(p.numel() * p.element_size() for p in weights),
        "seconds": sum(phase["seconds"] for phase in phases.values()),
        "peak_bytes": max(phase["peak_bytes"] for phase in phases.values()),
        "phases": phases,
        "paper": paper,
        "matrix_flops_per_second": rates.flops32,
        "error": sum(errors.values()) / len(errors),
    }


def row(shape: str, num_blocks: int, options: argparse.Namespace) -> dict:
    """Runs `measure` in a separate process, so that the peak of an earlier row does not count."""
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        folder = Path(scratch)
        write_checkpoint(config_of(shape, num_blocks), folder)
        arguments = [
            shape,
            *map(str, (num_blocks, options.windows, options.length, options.dtype, int(options.paper))),
            *(scratch, str(int(options.joint))),
        ]
        done = subprocess.run([sys.executable, __file__, "--measure", *arguments], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{shape} with {num_blocks} blocks failed:\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--shapes", nargs="*", default=["mixtral", "qwen1.5", "qwen3"])
    parser.add_argument("--blocks", nargs="*", type=int, default=[2, 4, 8, 16], help="blocks of the small shape")
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--dtype", default="float32", help="dtype of the computation; bfloat16 is slow without AVX512")
    parser.add_argument("--paper", action="store_true", help="use the paper's GPTQ")
    parser.add_argument("--joint", action="store_true", help="run a streamed joint stage too")
    parser.add_argument("--scratch", help="directory for the checkpoints; the system's temporary one by default")
    parser.add_argument("--measure", nargs=8, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        shape, *numbers, dtype, paper, folder, joint = options.measure
        more = {"joint_epochs": int(joint)}
        print(json.dumps(measure(shape, *map(int, numbers), dtype, bool(int(paper)), Path(folder), **more)))
        return
    rows = []
    for shape, num_blocks in [(s, 1) for s in options.shapes] + [("small", n) for n in options.blocks]:
        rows.append(row(shape, num_blocks, options))
        result = rows[-1]
        print(
            f"{shape:8s} {num_blocks:3d} blocks of {result['block_bytes'] / 2**20:6.0f} MiB, "
            f"{result['tokens']} tokens: {result['seconds']:7.1f} s, peak {result['peak_bytes'] / 2**30:5.2f} GiB"
        )
        for name, phase in result["phases"].items():
            line = f"    {name:10s} {phase['seconds']:8.1f} s  {phase['peak_bytes'] / 2**30:6.2f} GiB"
            if "planned_seconds" in phase:
                line += f"  planned {phase['planned_seconds']:8.1f} s {phase['planned_bytes'] / 2**30:6.2f} GiB"
            if name == "experts":
                rate, peak_rate = phase["flops"] / phase["seconds"] / 1e9, result["matrix_flops_per_second"] / 1e9
                line += f"  {rate:.1f} of {peak_rate:.1f} GFLOP/s: {rate / peak_rate:.0%}"
            print(line, flush=True)
        write_rows(options.json, rows)


if __name__ == "__main__":
    main()
