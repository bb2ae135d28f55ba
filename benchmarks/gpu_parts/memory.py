"""What a model takes on the GPU: loaded at 3 bit and in bfloat16, beside the size of its files.

The bundled model and one of Qwen3-30B-A3B's shapes with two blocks, with random codes, are opened by `load` and moved
to the device. `peak` is that of a forward pass over `TOKENS` tokens. The bundled model's logits (in miniature the small
one's) are compared with those of the same packed model on the CPU.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from inference_models import bytes_of, packed_model, save_compressed
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from eacmoe_lightning import load
from eacmoe_lightning.compressed.format import size_of
from eacmoe_lightning.models.originals import BUNDLED, load_original
from eacmoe_lightning.run.memory import peak_memory, reset_peak_memory
from gpu_parts import shapes
from gpu_parts.device import Device, choose_kernels

SHAPE, BLOCKS, BITS, TOKENS = "qwen3", 2, 3, 512
NEAR = 1e-4  # relative difference of float32 logits between devices
SLACK = 0.05  # of the GPU's memory over the tensors' bytes, and of the tensors' over the file's
ROUNDING = 8 << 20  # bytes more that the allocator may take


@torch.no_grad()
def rows(options: argparse.Namespace, device: Device) -> Iterator[dict]:
    disable_progress_bar()
    choose_kernels("decode" if device.is_miniature else "triton")  # Humming keeps a copy; the interpreter is slow
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        bundled, original, packed = (Path(scratch) / name for name in ("bundled", "original", "packed"))
        save_compressed(bundled, packed_model(load_original("bundled", "bfloat16"), BITS))
        yield from _compare(device, "bundled", BUNDLED, bundled)
        dense = shapes.dense(device, shapes.config(device, SHAPE, BLOCKS)).to(torch.bfloat16)
        save_compressed(packed, shapes.packed(device, dense, BITS).cpu())
        dense.cpu().save_pretrained(original)
        del dense
        yield from _compare(device, f"{SHAPE}, {BLOCKS} blocks", original, packed)
        yield _logits(device, packed if device.is_miniature else bundled)


def _compare(device: Device, name: str, original: Path, compressed: Path) -> Iterator[dict]:
    def in_bf16() -> PreTrainedModel:
        return AutoModelForCausalLM.from_pretrained(original, dtype=torch.bfloat16).eval()

    dtype = str(device.dtype).rpartition(".")[2]
    bf16 = _resident(device, in_bf16) | {"model": name, "bits": 16, "file_bytes": size_of(original)}
    packed = _resident(device, lambda: load(compressed, dtype=dtype))
    packed |= {"model": name, "bits": BITS, "file_bytes": size_of(compressed)}
    for row in (bf16, packed):
        row["times_less"] = bf16["resident_bytes"] / row["resident_bytes"] if row["resident_bytes"] > 0 else None
        tensors, resident = row["tensor_bytes"], row["resident_bytes"]
        fits = tensors <= row["file_bytes"] * (1 + SLACK) + ROUNDING
        row["passed"] = fits and (not device.is_cuda or resident <= tensors * (1 + SLACK) + ROUNDING)
        yield row


def _resident(device: Device, make: Callable[[], PreTrainedModel]) -> dict:
    """Bytes that the model made takes on the device, and that a forward pass takes at its peak."""
    if device.is_cuda:
        torch.cuda.empty_cache()
    before = device.allocated()
    model = make().to(device.device)
    row = {"resident_bytes": device.allocated() - before, "tensor_bytes": bytes_of(model)}
    reset_peak_memory()
    generator = torch.Generator().manual_seed(0)
    count = 16 if device.is_miniature else TOKENS
    ids = torch.randint(model.config.vocab_size, (1, count), generator=generator).to(device.device)
    logits = model(ids, use_cache=False).logits
    device.synchronize()
    row["peak_bytes"] = peak_memory() - (before if device.is_cuda else 0)
    if not logits.isfinite().all():
        raise RuntimeError("the logits are not finite")
    return row


def _logits(device: Device, compressed: Path) -> dict:
    """The packed model in float32 on the device, beside itself on the CPU."""
    ids = torch.randint(1000, (2, 64), generator=torch.Generator().manual_seed(1))
    ids = ids[:, :2] if device.is_miniature else ids
    model = load(compressed, dtype="float32")
    expected = model(ids, use_cache=False).logits.double()
    choose_kernels("triton")
    result = model.to(device.device)(ids.to(device.device), use_cache=False).logits.double().cpu()
    away = float((result - expected).norm() / expected.norm())
    return {"logits_error": away, "bound": NEAR, "passed": away <= NEAR}


def line(row: dict) -> str:
    if "logits_error" in row:
        return f"packed, in float32: logits differ from the CPU's by {row['logits_error']:.1e} of {row['bound']:.0e}"
    less = f"  {row['times_less']:5.2f} times less than bf16" if row["times_less"] else ""
    head = f"{row['model']:16s} {row['bits']:2d} bit:"
    names = {"resident": "resident_bytes", "tensors": "tensor_bytes", "files": "file_bytes", "peak": "peak_bytes"}
    return head + "".join(f"  {name} {row[key] / 1e6:9.1f} MB" for name, key in names.items()) + less
