"""Exports for vLLM and SGLang on a GPU: Humming's products from their tensors, and vLLM on the bundled model's exports.

Humming reads `compressed-tensors` and `gptq_v2` by its own schemas, as both engines let it: every width, with and
without zero points. vLLM, where it is installed, runs exports in each of its formats; the log-probabilities of a prompt
are compared with those of transformers. In miniature, and without Humming, the exports' own decoding takes its place.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from eacmoe_lightning.exports import compressed_tensors, gptq
from eacmoe_lightning.exports.export import export
from eacmoe_lightning.quantization.grid import Grid, Quantized, round_to_nearest
from gpu_parts.device import Device

SHAPE, GROUP_SIZE, BOUND = (256, 256), 64, 1e-3  # of a product's error in float16
LOGPROBS = 0.1  # largest difference in float16
VLLM = {  # name: bits of attention, of gate and up, of down; symmetric; format
    "4 bit": (4, 4, 4, True, "compressed-tensors"),
    "4 bit asymmetric": (4, 4, 4, False, "compressed-tensors"),
    "2 bit": (4, 2, 2, False, "compressed-tensors"),
    "3 bit": (4, 3, 3, False, "compressed-tensors"),
    "6 bit": (8, 6, 6, True, "compressed-tensors"),
    "4 bit gptq": (8, 4, 4, True, "gptq"),
    "3 bit gptq_v2": (4, 3, 3, False, "gptq_v2"),
}


def rows(options: argparse.Namespace, device: Device) -> Iterator[dict]:
    with_humming = device.is_cuda and find_spec("humming") is not None
    product = humming_product if with_humming else decoded_product
    for form in ("compressed-tensors", "gptq_v2"):
        for bits in range(2, 9):
            for symmetric in (True, False):
                generator = torch.Generator().manual_seed(bits)
                weight = torch.randn(SHAPE, generator=generator) + 0.3
                quantized = round_to_nearest(weight, Grid(bits, GROUP_SIZE, symmetric))
                quantized = Quantized(quantized.codes, quantized.scale.half().float(), quantized.zero_point, bits)
                x = torch.randn(9, SHAPE[1], generator=generator).half()
                exact = x.double() @ quantized.dequantize().double().T
                result = product(device, form, quantized, symmetric, x).double().cpu()
                error = float((result - exact).norm(dim=-1).div(exact.norm(dim=-1)).max())
                row = {"reader": "humming" if with_humming else "decoded", "format": form, "bits": bits}
                yield row | {"symmetric": symmetric, "error": error, "bound": BOUND, "passed": error <= BOUND}
    if device.is_cuda and find_spec("vllm"):
        yield from vllm_rows(options)
    else:
        yield {"reader": "vllm", "absent": True}


def tensors_and_config(form: str, quantized: Quantized, symmetric: bool) -> tuple[dict[str, Tensor], dict]:
    """A linear's tensors without its name, and what the config says of it."""
    if form == "gptq_v2":
        tensors = gptq.to_tensors("linear", quantized, is_v2=True)
        config = {"quant_method": "gptq", "bits": quantized.bits, "group_size": GROUP_SIZE, "sym": symmetric}
    else:
        tensors = compressed_tensors.to_tensors("linear", quantized, torch.float16, symmetric)
        config = {"quant_method": "compressed-tensors", "format": "pack-quantized", "type": "int", "strategy": "group"}
        config |= {"num_bits": quantized.bits, "group_size": GROUP_SIZE, "symmetric": symmetric}
    return {name.removeprefix("linear."): tensor for name, tensor in tensors.items()}, config


def humming_product(device: Device, form: str, quantized: Quantized, symmetric: bool, x: Tensor) -> Tensor:
    """By Humming's own schema of the format, as vLLM and SGLang call it."""
    from humming.forward import humming_forward
    from humming.schema import BaseWeightSchema
    from humming.transform import prepare_and_transform_humming_tensors

    tensors, config = tensors_and_config(form, quantized, symmetric)
    tensors = {name: tensor.to(device.device) for name, tensor in tensors.items()}
    out_features, in_features = SHAPE
    schema, tensors = BaseWeightSchema.from_config(config).convert_humming(
        tensors=tensors, shape_n_stacks=[out_features], shape_k_stacks=[in_features], param_dtype=torch.float16
    )
    layer, tensors = prepare_and_transform_humming_tensors(
        tensors, shape_n=out_features, shape_k=in_features, weight_schema=schema, torch_dtype=torch.float16,
        device=device.device,
    )  # fmt: skip
    locks = torch.zeros(2048, dtype=torch.int32, device=device.device)
    inputs = x.to(device.device)
    return humming_forward(layer, inputs=inputs, locks=locks, compute_config={"gemm_type": "dense"}, **tensors)


def decoded_product(device: Device, form: str, quantized: Quantized, symmetric: bool, x: Tensor) -> Tensor:
    tensors, config = tensors_and_config(form, quantized, symmetric)
    tensors = {f"linear.{name}": tensor for name, tensor in tensors.items()}
    if form == "gptq_v2":
        weight = gptq.decode(tensors, config | {"dynamic": {}, "checkpoint_format": form})["linear.weight"]
    else:
        groups = {"group_0": {"targets": ["linear"], "weights": config}}
        weight = compressed_tensors.decode(tensors, {"config_groups": groups})["linear.weight"]
    return x.double().to(device.device) @ weight.double().to(device.device).T


def vllm_rows(options: argparse.Namespace) -> Iterator[dict]:
    import export_check
    import serve_check
    import serve_engine
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(serve_check.BUNDLED)
    prompts = [tokenizer(text).input_ids for text in serve_check.PROMPTS]
    for name, (attention, up, down, symmetric, form) in VLLM.items():
        with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
            source, place = Path(scratch) / "compressed", Path(scratch) / "export"
            export_check.rounded(source, attention, up, down, symmetric)
            export(str(source), str(place), form, "vllm", dtype="float16")
            settings = {"dtype": "float16", "gpu_memory_utilization": 0.2}
            settings |= {"quantization": "humming"} if form == "gptq_v2" else {}
            seen = serve_engine.run(str(place), prompts, 16, settings)
            row = serve_check.compare(source, "float16", prompts, seen)
            yield {"reader": "vllm", "model": name, "format": form, **row, "passed": row["logprobs"] <= LOGPROBS}
            sys.stdout.flush()


def line(row: dict) -> str:
    if row.get("absent"):
        return "vLLM is not installed: its formats were not run"
    if row["reader"] == "vllm":
        return f"vLLM, {row['model']:18s} tokens {row['tokens']}, log-probabilities differ by {row['logprobs']:.3f}"
    kind = "symmetric" if row["symmetric"] else "asymmetric"
    return (
        f"{row['reader']:8s} {row['format']:18s} {row['bits']} bit {kind:10s} {row['error']:.1e} of {row['bound']:.0e}"
    )
