"""Exports in vLLM's own formats: what its loaders make of them, and what vLLM and SGLang find in their configs.

vLLM itself runs in `vllm_trial.py`, with the Python that EACMOE_VLLM_PYTHON names, or here if vLLM is installed beside
this package. Without either, the tests of the loaders are skipped. `--quantization humming` also needs humming-kernels
there (it can be imported without a GPU).
"""

import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import architectures
import jobs
import numpy as np
import pytest
import tiny_models
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from eacmoe_lightning.compressed.directory import save_compressed
from eacmoe_lightning.exports.compressed_tensors import grid_of
from eacmoe_lightning.exports.export import export
from eacmoe_lightning.exports.source import Source
from eacmoe_lightning.models.moe import MoEModel
from eacmoe_lightning.models.originals import load_original
from eacmoe_lightning.quantization.grid import Grid, round_to_nearest
from eacmoe_lightning.serving.packed_model import CONSTANTS

sys.path.append(str(jobs.ROOT / "benchmarks"))
import export_check
from serve_check import LATENT

PYTHON = os.environ.get("EACMOE_VLLM_PYTHON") or (sys.executable if find_spec("vllm") else None)
needs_vllm = pytest.mark.skipif(PYTHON is None, reason="vLLM is not installed, and EACMOE_VLLM_PYTHON names no Python")
has_amx = torch.cpu._is_amx_tile_supported() and torch.cpu._init_amx()  # it may be listed, but not allowed
SIZES = {"hidden_size": 256, "head_dim": 64, "moe_intermediate_size": 128}
GROUPS = (32, 64, 128)


def every_width(block: int, part: str) -> tuple[int, int]:
    """Bits and group size: each width in experts and in attention, each group size."""
    return (2 + block if part == "experts" else 8 - block), GROUPS[block % 3]


def without_8(block: int, part: str) -> tuple[int, int]:
    """The same, but for experts of 8 bits."""
    return ((2, 3, 4, 5, 6, 7, 4)[block] if part == "experts" else 8 - block), GROUPS[block % 3]


def without_5(block: int, part: str) -> tuple[int, int]:
    """The same, but for attention of 5 bits."""
    return (2 + block if part == "experts" else (8, 7, 6, 4, 4, 3, 2)[block]), GROUPS[block % 3]


def four_and_eight(block: int, part: str) -> tuple[int, int]:
    return (4, 8)[(block + (part == "experts")) % 2], GROUPS[block % 3]


def three(block: int, part: str) -> tuple[int, int]:
    return {"experts": 3, "shared": 8, "attention": 4}[part], 32


def four(block: int, part: str) -> tuple[int, int]:
    return 4, 32


def four_beside_eight(block: int, part: str) -> tuple[int, int]:
    return (4 if part == "experts" else 8), 32


FAMILIES = ("mixtral", "qwen2_moe", "deepseek_v2", "deepseek_v3", "glm4_moe", "ernie4_5_moe", "olmoe")
DENSE_FIRST = ("deepseek_v2", "deepseek_v3", "glm4_moe", "ernie4_5_moe")
VLLM = {  # family, layers, grids, symmetric, format
    "every width": ("qwen3_moe", 7, without_8, False, "compressed-tensors"),
    "every width, symmetric": ("qwen3_moe", 7, every_width, True, "compressed-tensors"),
    "every width, Humming": ("qwen3_moe", 7, without_5, False, "gptq_v2"),
    "every width, symmetric, Humming": ("qwen3_moe", 7, every_width, True, "gptq_v2"),
    "4 and 8 bit": ("qwen3_moe", 4, four_and_eight, True, "gptq"),
    "4 bit": ("mixtral", 2, four, False, "compressed-tensors"),
    "4 bit, symmetric": ("mixtral", 2, four, True, "compressed-tensors"),
    "mixtral, gptq_v2": ("mixtral", 2, three, False, "gptq_v2"),
    "qwen2_moe, gptq_v2": ("qwen2_moe", 2, three, False, "gptq_v2"),
}
VLLM |= {f"{family}, compressed-tensors": (family, 2, three, False, "compressed-tensors") for family in FAMILIES}
VLLM |= {f"{family}, gptq": (family, 2, four, True, "gptq") for family in FAMILIES}
SGLANG = {
    "SGLang": ("qwen3_moe", 4, four_and_eight, True, "compressed-tensors"),
    "SGLang, gptq": ("mixtral", 2, four_beside_eight, True, "gptq"),
    "SGLang, gptq_v2": ("qwen3_moe", 7, without_5, False, "gptq_v2"),
}
CASES = VLLM | SGLANG


@pytest.fixture(scope="module")
def exported(tmp_path_factory, tokenizer):
    """`exported(case)`: the directory of an export in float16, with `expected.safetensors`: the decoded weights by the
    names of their modules in the checkpoint."""
    root, made = tmp_path_factory.mktemp("formats"), {}

    def original(family: str, layers: int) -> str:
        place = root / f"{family}-{layers}"
        if not place.exists():
            settings = {**tiny_models.COMMON, **architectures.SETTINGS.get(family, {}), **SIZES}
            if family in tiny_models.MOE_FAMILIES:
                settings |= {k: v for k, v in tiny_models.config_of(family).to_dict().items() if k not in settings}
                settings |= SIZES
            settings |= {"num_hidden_layers": layers, "first_k_dense_replace": min(1, layers - 1)}
            if "kv_lora_rank" in settings:
                settings |= LATENT
                del settings["head_dim"]
            settings |= CONSTANTS.get(family, {})
            for name in ("model_type", "layer_types", "mlp_layer_types"):
                settings.pop(name, None)
            config = AutoConfig.for_model(architectures.model_type(family), **settings)
            tiny_models.build_random(config).save_pretrained(place)
            tokenizer.save_pretrained(place)
        return str(place)

    def export_case(case: str) -> Path:
        family, layers, grids, symmetric, form = CASES[case]
        if case not in made:
            source = root / f"{family}-{layers}-{grids.__name__}-{symmetric}"
            if not source.exists():
                moe, blocks = MoEModel(load_original(original(family, layers))), []
                for block in moe.blocks:
                    quantized = {}
                    for name, (part, weight) in block.weights().items():
                        bits, group_size = grids(block.index, part)
                        quantized[name] = round_to_nearest(weight, Grid(bits, group_size, symmetric, clip_search=False))
                    moe.put({name: block.as_parameter(name, q.dequantize()) for name, q in quantized.items()})
                    blocks.append(quantized)
                save_compressed(source, moe, original(family, layers), blocks, {"method": "rtn"})
            made[case] = root / f"export-{len(made)}"
            export(str(source), str(made[case]), form, "vllm" if case in VLLM else "sglang", dtype="float16")
            weights = {
                linear.name: linear.quantized.dequantize()
                for shard in Source(source).shards("original")
                for linear in shard.linears
            }
            save_file(weights, made[case] / "expected.safetensors")
        return made[case]

    return export_case


def run_vllm(directories: dict[str, Path], work: Path) -> dict[str, dict]:
    """What vLLM makes of exports, by name."""

    def case(path: Path) -> dict:
        is_v2 = schemes(path).get("checkpoint_format") == "gptq_v2"
        return {"directory": str(path), "quantization": "humming" if is_v2 else None}

    cases = [case(path) for path in directories.values()]
    command = [
        PYTHON,
        str(jobs.ROOT / "tests" / "vllm_trial.py"),
        json.dumps({"cases": cases, "out": str(work / "out")}),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(zip(directories, json.loads((work / "out").read_text()), strict=True))


# --- vLLM's loaders


@pytest.fixture(scope="module")
def loaded(exported, tmp_path_factory):
    return run_vllm({case: exported(case) for case in VLLM}, tmp_path_factory.mktemp("loaded"))


@needs_vllm
@pytest.mark.slow
@pytest.mark.parametrize("case", VLLM)
def test_vllm_loads_every_weight(case, loaded):
    """Every parameter of vLLM's model is loaded, and decodes to our weights; scales round to float16."""
    seen = loaded[case]
    if "skipped" in seen:
        pytest.skip(seen["skipped"])
    assert "error" not in seen, seen["error"][-3000:]
    family, layers, grids, _, _ = VLLM[case]
    assert not seen["missing"] and not seen["uncompared"]
    assert seen["weights"] < 2**-10 and seen["emulated"] < 2**-10
    sparse = range(family in DENSE_FIRST, layers)
    assert seen["bits"] == sorted({grids(block, "experts")[0] for block in sparse})


@needs_vllm
@pytest.mark.slow
def test_vllm_selects_the_kernels_that_the_table_names(loaded):
    """4 bit and symmetric 8 bit in Marlin, everything else in Humming."""
    assert loaded["every width"]["kernels"] == {
        "MarlinLinearKernel": 2, "HummingLinearKernel": 12, "MarlinExperts": 2, "HummingIndexedExperts": 5,
    }  # fmt: skip
    assert loaded["every width, symmetric"]["kernels"] == {
        "MarlinLinearKernel": 4, "HummingLinearKernel": 10, "MarlinExperts": 2, "HummingIndexedExperts": 5,
    }  # fmt: skip
    assert loaded["4 and 8 bit"]["kernels"] == {"MarlinLinearKernel": 8, "MarlinExperts": 4}


@needs_vllm
@pytest.mark.slow
@pytest.mark.parametrize("case", ["4 bit", "4 bit, symmetric", "mixtral, gptq"])
def test_products_of_vllms_cpu_kernels(case, loaded):
    """4-bit linears, asymmetric ones too, run in vLLM's CPU kernels; its experts' kernels, which need AMX, below."""
    assert loaded[case]["num_products"] == 4 and 0 < loaded[case]["products"] < 2e-3


@needs_vllm
@pytest.mark.slow
@pytest.mark.skipif(not has_amx, reason="vLLM's kernels for experts on CPUs need AMX")
@pytest.mark.parametrize("form", ["compressed-tensors", "gptq"])
def test_vllm_runs_4_bit_experts_in_its_own_kernels(form, tmp_path):
    """Without the plugin. They round activations to 8 bit, which our own int8 kernels do too."""
    source, out = export_check.rounded(tmp_path / "rounded", 4, 4, 4, True), tmp_path / "export"
    export(str(source), str(out), form, "vllm")
    tokens = torch.randint(5, 4096, (2, 64), generator=torch.Generator().manual_seed(0))
    np.save(tmp_path / "tokens.npy", tokens.numpy())
    (tmp_path / "texts.json").write_text("[]")
    seen, about = export_check.run_engine(PYTHON, "vllm", out, tmp_path, "float16")
    assert about["kernel"] == ["CPUExpertsInt4"]
    ours = export_check.run_ours(source, tokens, "float32", normalized=True)
    int8 = export_check.run_ours(source, tokens, "float32", True, packed=True, activations="int8")
    bound = 2 * export_check.relative(int8, ours)
    assert export_check.relative(torch.from_numpy(seen["logits"]), ours) < bound < 0.05


@needs_vllm
@pytest.mark.slow
def test_a_wrong_name_or_shape_fails(exported, tmp_path):
    """What the tests above would see if a tensor of an export had another name, another shape or another order."""
    name = "model.layers.1.block_sparse_moe.experts.3.w1.weight_zero_point"
    changes = {
        "renamed": lambda t: t.update({name.replace("zero_point", "zeros"): t.pop(name)}),
        "reshaped": lambda t: t.update({name: t[name].reshape(-1, 2)}),
        "reordered": lambda t: t.update({name: t[name].flip(0)}),
    }
    source, directories = exported("4 bit"), {}
    for change, apply in changes.items():
        place = tmp_path / change
        place.mkdir()
        for file in source.iterdir():
            tensors = load_file(file) if file.suffix == ".safetensors" else {}
            if name in tensors:
                apply(tensors)
                save_file({n: t.contiguous() for n, t in tensors.items()}, place / file.name, {"format": "pt"})
            else:
                (place / file.name).write_bytes(file.read_bytes())
        directories[change] = place
    index = directories["renamed"] / "model.safetensors.index.json"
    index.write_text(index.read_text().replace(name, name.replace("zero_point", "zeros")))
    renamed, reshaped, reordered = run_vllm(directories, tmp_path).values()
    assert "error" in renamed and "error" in reshaped
    assert reordered["weights"] > 0.1


# --- our side: what the engines find in the config


def schemes(directory: Path) -> dict:
    return json.loads((directory / "config.json").read_text())["quantization_config"]


@pytest.mark.parametrize("case", ["every width", "SGLang"])
def test_compressed_tensors_name_wholes_and_each_blocks_experts(case, exported):
    """vLLM asks for `NAME.0.gate_proj` of a block's experts, SGLang for a linear that it fuses by the whole's name."""
    _, layers, grids, symmetric, _ = CASES[case]
    config = schemes(exported(case))
    assert config["quant_method"] == "compressed-tensors" and config["format"] == "pack-quantized"
    for block in range(layers):
        layer = f"model.layers.{block}"
        for name, part in (
            (f"{layer}.mlp.experts.0.gate_proj", "experts"),
            (f"language_{layer}.mlp.experts.7.down_proj", "experts"),
            (f"{layer}.self_attn.qkv_proj", "attention"),
            (f"{layer}.self_attn.k_proj", "attention"),
        ):
            bits, group_size = grids(block, part)
            scheme = grid_of(name, config)
            assert (scheme["num_bits"], scheme["group_size"], scheme["symmetric"]) == (bits, group_size, symmetric)
            assert name not in config["ignore"]
        assert f"{layer}.mlp.gate" in config["ignore"]
    assert not any(target == "Linear" for group in config["config_groups"].values() for target in group["targets"])


def override(config: dict, module: str) -> dict | None:
    """What vLLM and SGLang find in `dynamic` for a module: None where it is not quantized."""
    for pattern, found in config["dynamic"].items():
        if re.match(pattern[2:], module):
            return None if pattern.startswith("-:") else found
    return {}


@pytest.mark.parametrize("case", ["every width, Humming", "SGLang, gptq_v2"])
def test_gptqs_dynamic_matches_the_engines_modules(case, exported):
    config = schemes(exported(case))
    assert config["checkpoint_format"] == "gptq_v2" and not config["sym"]
    for block in range(7):
        layer = f"model.layers.{block}"
        for name, part in (
            (f"{layer}.mlp.experts", "experts"),
            (f"{layer}.mlp.experts.routed_experts", "experts"),
            (f"language_{layer}.self_attn.qkv_proj", "attention"),
            (f"{layer}.self_attn.o_proj", "attention"),
        ):
            grid = {"bits": config["bits"], "group_size": config["group_size"], **override(config, name)}
            assert (grid["bits"], grid["group_size"]) == without_5(block, part)
        assert override(config, f"{layer}.mlp.gate") is None
    assert override(config, "lm_head") is None


def test_sglangs_marlin_experts_have_the_bits_of_no_rule(exported):
    """SGLang asks `dynamic` for linears only."""
    config = schemes(exported("SGLang, gptq"))
    assert (config["bits"], config["sym"]) == (4, True)
    assert override(config, "model.layers.1.self_attn.qkv_proj") == {"bits": 8, "group_size": 32}


def test_tensors_of_an_asymmetric_export(exported):
    """Names, dtypes and shapes of one linear: zero points [O * b / 32, G] along the outputs."""
    directory, found = exported("every width"), {}
    for file in directory.glob("model*.safetensors"):
        found |= load_file(file)
    bits, group_size = without_8(1, "experts")
    prefix = "model.layers.1.mlp.experts.5.down_proj.weight"
    described = {n.removeprefix(prefix): (t.dtype, tuple(t.shape)) for n, t in found.items() if n.startswith(prefix)}
    assert described == {
        "_packed": (torch.int32, (256, 128 * bits // 32)),
        "_scale": (torch.float16, (256, 128 // group_size)),
        "_shape": (torch.int64, (2,)),
        "_zero_point": (torch.int32, (256 * bits // 32, 128 // group_size)),
    }
