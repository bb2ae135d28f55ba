"""vLLM loads exports, in a process that `test_vllm_formats.py` starts in vLLM's environment.

    python vllm_trial.py JOB

with JOB = {"cases": [{"directory", "quantization"}, ...], "out": .json}. For each export vLLM builds its own model on
the CPU and reads the files with its own loader. Written for each: parameters that were not loaded, the kernels that
vLLM selects, and beside `expected.safetensors` of the directory (decoded weights by their names in the checkpoint) the
largest relative difference of a weight that is decoded from vLLM's parameters, and of a product where vLLM's CPU
kernels have one.

The kernels are those that vLLM selects on a GPU of compute capability 8.0: only while it selects, its platform says
that it is one. Of Humming's kernels only the selection is reached, for which `humming-kernels` need not be installed;
`--quantization humming` reads its schemas and needs the package.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_PLUGINS": "", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
os.environ |= {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_HOST_IP": "127.0.0.1"}

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor
from vllm.config import set_current_vllm_config
from vllm.distributed import init_distributed_environment, initialize_model_parallel
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.fused_moe.oracle import int_wna16
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.model_executor.model_loader.utils import initialize_model
from vllm.platforms import current_platform
from vllm.platforms.interface import DeviceCapability, PlatformEnum

CAPABILITY = (8, 0)
LAYERS = "vllm.model_executor.layers.quantization"
COMPRESSED = f"{LAYERS}.compressed_tensors"
SELECT = {  # where vLLM selects kernels
    f"{COMPRESSED}.schemes.compressed_tensors_wNa16": ["choose_mp_linear_kernel"],
    f"{COMPRESSED}.compressed_tensors_moe.compressed_tensors_moe_wna16": ["select_wna16_moe_backend"],
    f"{LAYERS}.auto_gptq": ["choose_mp_linear_kernel", "select_wna16_moe_backend", "verify_marlin_supported"],
    f"{LAYERS}.humming": ["check_and_fallback_input_schema", "select_humming_moe_experts"],
}
UNUSED = (".k_scale", ".v_scale", ".q_scale", ".k_zero_point", ".v_zero_point", ".q_zero_point", "_bias", "g_idx")


@contextlib.contextmanager
def as_gpu() -> Iterator[None]:
    """vLLM's platform says that it is a GPU."""
    major, minor = CAPABILITY
    number = 10 * major + minor

    def has(capability, *_, **__) -> bool:
        return number >= (capability if isinstance(capability, int) else 10 * capability[0] + capability[1])

    answers = {"is_cuda": True, "is_cuda_alike": True, "is_cpu": False}
    answers |= {"get_device_capability": DeviceCapability(major, minor)}
    fields = {name: (lambda *_, _answer=answer, **__: _answer) for name, answer in answers.items()}
    fields |= {"has_device_capability": has, "_enum": PlatformEnum.CUDA}
    before = dict(vars(current_platform))
    vars(current_platform).update(fields)
    try:
        yield
    finally:
        vars(current_platform).clear()
        vars(current_platform).update(before)


def select_as_gpu(selected: Counter) -> None:
    """Has vLLM select as on a GPU; where its CPU has a kernel for a linear, that one is built."""
    if find_spec("humming"):
        import_module("humming.device").current_device._value = SimpleNamespace(sm_version=10 * CAPABILITY[0])
    for module in ("fused_moe.experts.fused_humming_moe",):
        import_module(f"vllm.model_executor.layers.{module}").has_humming = lambda: True
    import_module("vllm.model_executor.kernels.linear.mixed_precision.humming").has_humming = lambda: True

    def wrapped(select):
        def select_here(*args, **options):
            with as_gpu():
                found = select(*args, **options)
            kernel = found[1] if isinstance(found, tuple) else found
            if isinstance(kernel, type):
                selected[kernel.__name__] += 1
            with contextlib.suppress(ValueError):
                return select(*args, **options) if select.__name__ == "choose_mp_linear_kernel" else found
            return found

        return select_here

    for name, functions in SELECT.items():
        module = import_module(name)
        for function in functions:
            setattr(module, function, wrapped(getattr(module, function)))


def codes(words: Tensor, bits: int) -> Tensor:
    """int32 [..., W] -> [..., W * 32 / bits], a little-endian stream of bits."""
    stream = np.unpackbits(words.contiguous().numpy().view(np.uint8), axis=-1, bitorder="little")
    stream = stream[..., : stream.shape[-1] // bits * bits]
    return torch.from_numpy(stream.reshape(*words.shape[:-1], -1, bits) @ (1 << np.arange(bits))).float()


def decoded(tensors: dict[str, Tensor], bits: int, symmetric: bool) -> Tensor:
    """The weights [..., O, I] in a layer's parameters, which have the checkpoint's layout until kernels repack them."""
    if "weight_packed" in tensors:
        steps, scale = codes(tensors["weight_packed"], bits), tensors["weight_scale"].float()
        zero_point = None if symmetric else codes(tensors["weight_zero_point"].mT, bits).mT
    else:
        steps, scale = codes(tensors["qweight"].mT, bits), tensors["scales"].float().mT
        zero_point = None if symmetric else codes(tensors["qzeros"], bits).mT
    if zero_point is None:
        zero_point = torch.full_like(scale, 2.0 ** (bits - 1))
    groups = scale.shape[-1]
    return ((steps.unflatten(-1, (groups, -1)) - zero_point[..., None]) * scale[..., None]).flatten(-2)


def emulated(tensors: dict[str, Tensor], symmetric: bool) -> Tensor:
    """The weights [E, O, I] of 4-bit experts by vLLM's emulation of its kernels."""
    if "weight_packed" in tensors:
        packed, scale = tensors["weight_packed"].mT.contiguous(), tensors["weight_scale"].mT.contiguous()
        zero_point = None if symmetric else tensors["weight_zero_point"].mT.contiguous()
    else:
        packed, scale, zero_point = (tensors[name] for name in ("qweight", "scales", "qzeros"))
        zero_point = None if symmetric else zero_point
    return int_wna16._unpack_and_dequant_int4_gptq(packed, scale, zero_point, True, torch.float32)


def error(weight: Tensor, expected: Tensor) -> float:
    """The largest difference relative to the element that it should be."""
    return float(((weight - expected).abs() / expected.abs().clamp(min=1e-6)).max())


def grid_of(layer: torch.nn.Module) -> tuple[int, bool]:
    """The bits that vLLM takes a layer to have, and whether it takes it to be symmetric."""
    method = layer.quant_method
    for source, bits, symmetric in (
        (getattr(layer, "scheme", None), "num_bits", "symmetric"),  # a linear of compressed-tensors
        (method, "num_bits", "symmetric"),  # its experts
        (getattr(method, "weight_schema", None), "bits", "sym"),  # Humming
        (getattr(method, "quant_config", None), "weight_bits", "is_sym"),  # gptq
    ):
        if hasattr(source, bits):
            return getattr(source, bits), getattr(source, symmetric)
    raise AttributeError(f"{type(method).__name__} says no bits")


def load(directory: Path, quantization: str | None) -> dict:
    args = EngineArgs(str(directory), dtype="float16", enforce_eager=True, max_model_len=64, quantization=quantization)
    config = args.create_engine_config()
    with set_current_vllm_config(config):
        if not torch.distributed.is_initialized():
            place = Path(tempfile.mkdtemp()) / "store"
            init_distributed_environment(1, 0, f"file://{place}", 0, "gloo")
            initialize_model_parallel(1, 1)
        torch.set_default_dtype(torch.float16)
        model = initialize_model(config)
        loaded = model.load_weights(DefaultModelLoader(config.load_config).get_all_weights(config.model_config, model))
        torch.set_default_dtype(torch.float32)
        expected = load_file(directory / "expected.safetensors")
        seen = compare(model, expected)
    names = {name for name, _ in model.named_parameters()}
    placeholders = {name for name in names if name.removesuffix("weight") + "qweight" in names}
    seen["missing"] = sorted(name for name in names - {*loaded} - placeholders if not name.endswith(UNUSED))
    seen["uncompared"] = sorted(set(expected) - set(seen.pop("compared")))
    return seen


@torch.no_grad()
def compare(model: torch.nn.Module, expected: dict[str, Tensor]) -> dict:
    """Differences of vLLM's layers from the weights that they should hold."""
    wholes = getattr(model, "packed_modules_mapping", {})
    seen = {"weights": 0.0, "emulated": 0.0, "products": 0.0, "num_products": 0, "bits": set(), "compared": []}
    for prefix, layer in model.named_modules():
        tensors = {name: p.data for name, p in layer.named_parameters(recurse=False)}
        if isinstance(layer, LinearBase) and {"weight_packed", "qweight"} & tensors.keys():
            parent, _, last = prefix.rpartition(".")
            names = [f"{parent}.{part}" for part in wholes.get(last, [last])]
            weight = torch.cat([expected[name] for name in names])
            bits, symmetric = grid_of(layer)
            seen["weights"] = max(seen["weights"], error(decoded(tensors, bits, symmetric), weight))
            seen["compared"] += names
            if type(layer_kernel(layer)).__name__.startswith("CPU"):
                x = torch.randn(5, weight.shape[1], generator=torch.Generator().manual_seed(0)).half()
                layer.quant_method.process_weights_after_loading(layer)
                product, exact = layer.quant_method.apply(layer, x).float(), x.float() @ weight.T
                seen["products"] = max(seen["products"], float((product - exact).norm() / exact.norm()))
                seen["num_products"] += 1
        elif isinstance(layer, RoutedExperts):
            parent, (bits, symmetric) = prefix.removesuffix(".routed_experts"), grid_of(layer)
            projections = {
                "w13": (layer.ckpt_gate_proj_name, layer.ckpt_up_proj_name),
                "w2": (layer.ckpt_down_proj_name,),
            }
            for stack, parts in projections.items():
                names = [[f"{parent}.{e}.{part}" for part in parts] for e in range(layer.local_num_experts)]
                weight = torch.stack([torch.cat([expected[name] for name in expert]) for expert in names])
                stored = {n.removeprefix(f"{stack}_"): t for n, t in tensors.items() if n.startswith(f"{stack}_")}
                seen["weights"] = max(seen["weights"], error(decoded(stored, bits, symmetric), weight))
                if bits == 4:
                    seen["emulated"] = max(seen["emulated"], error(emulated(stored, symmetric), weight))
                seen["bits"].add(bits)
                seen["compared"] += sum(names, [])
    seen["bits"] = sorted(seen["bits"])
    return seen


def layer_kernel(layer: LinearBase):
    return getattr(getattr(layer, "scheme", layer.quant_method), "kernel", None)


def main() -> None:
    job = json.loads(sys.argv[1])
    selected: Counter = Counter()
    select_as_gpu(selected)
    results = []
    for case in job["cases"]:
        selected.clear()
        if case["quantization"] == "humming" and not find_spec("humming"):
            results.append({"skipped": "humming-kernels is not installed beside vLLM"})
            continue
        try:
            results.append(load(Path(case["directory"]), case["quantization"]) | {"kernels": dict(selected)})
        except Exception:
            torch.set_default_dtype(torch.float32)
            results.append({"error": traceback.format_exc()})
    Path(job["out"]).write_text(json.dumps(results))


if __name__ == "__main__":
    main()
