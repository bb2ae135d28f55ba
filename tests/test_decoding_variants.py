"""What published quantized models have beside the usual: other names, other splits, cut-off groups, scaled inputs."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from quantized_models import (
    Tensors,
    assert_decoded,
    float8,
    gptq_model,
    gptq_parts,
    grids,
    nvfp4,
    quantized,
    renamed,
    rounded,
    split,
    words,
)
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GptOssConfig

from eacmoe_lightning.models.checkpoint import Checkpoint

GPT_OSS = GptOssConfig(
    vocab_size=128, hidden_size=64, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
    intermediate_size=32, num_local_experts=2, num_experts_per_tok=2, pad_token_id=0,
)  # fmt: skip
BY_AUTO_ROUND = {"quant_method": "auto-round", "bits": 4, "group_size": 32, "sym": True}
AS_GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True}
BY_LLM_COMPRESSOR = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "config_groups": {"a": {"weights": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}}},
}


@pytest.mark.parametrize(
    ("config", "alternating"),
    [
        (BY_AUTO_ROUND, True),
        (AS_GPTQ | {"provider": "auto-round"}, True),
        (BY_LLM_COMPRESSOR, True),
        (AS_GPTQ | {"meta": {"quantizer": ["gptqmodel:7.7.0"]}}, False),
        (AS_GPTQ, None),
    ],
)
def test_the_program_says_which_rows_of_gpt_oss_are_gates(config, alternating, tmp_path):
    torch.manual_seed(0)
    state = AutoModelForCausalLM.from_config(GPT_OSS).state_dict()
    experts, expected = "model.layers.0.mlp.experts", {}
    stacks = {name: state.pop(f"{experts}.{name}") for name in ("gate_up_proj", "gate_up_proj_bias")}
    whole = torch.empty(2, 64, 64)  # [E, 2 x 32 rows, 64]
    for expert in range(2):
        rows, biases = stacks["gate_up_proj"][expert].T, stacks["gate_up_proj_bias"][expert]
        parts = {"gate": slice(0, None, 2), "up": slice(1, None, 2)} if alternating else {}
        for name, part in (parts or {"gate": slice(0, 32), "up": slice(32, 64)}).items():
            linear = f"{experts}.{expert}.{name}_proj"
            codes, _, scales, whole[expert, part] = rounded(rows[part].contiguous(), True)
            if config["quant_method"] == "compressed-tensors":
                packed = torch.from_numpy(words(codes.numpy(), 4))
                of_linear = {"packed": packed, "scale": scales.float(), "shape": torch.tensor([32, 64])}
                state |= {f"{linear}.weight_{kind}": tensor for kind, tensor in of_linear.items()}
            else:
                of_linear = gptq_parts(rows[part].contiguous(), True, left_out=1)
                state |= {f"{linear}.{kind}": tensor for kind, tensor in of_linear.items()}
            state[f"{linear}.bias"] = biases[part]
    expected = {
        f"{experts}.gate_up_proj": whole.mT.contiguous(),
        f"{experts}.gate_up_proj_bias": stacks["gate_up_proj_bias"],
    }
    save_file({key: tensor.contiguous() for key, tensor in state.items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(GPT_OSS.to_dict() | {"quantization_config": config}))
    if alternating is None:
        with pytest.raises(ValueError, match=r"0.gate_proj.\w+ is.*GptOssExperts alternates the rows of gate and up"):
            Checkpoint(str(tmp_path))
    else:
        assert_decoded(tmp_path, expected, "float32")


@pytest.mark.parametrize("g_idx", ["stored", "zeros", "none"])
@pytest.mark.parametrize("config", [{"group_size": 48}, {"group_size": 16, "dynamic": {"+:.*": {"group_size": 32}}}])
def test_the_last_group_of_gptq_may_be_cut_off(config, g_idx, tiny_model_dir, tmp_path):
    """Inputs of 64 in groups of 48 are 48 and 16, and not 32 and 32; own sizes of linears stay what they are."""
    size = 32 if "dynamic" in config else 48
    expected: Tensors = {}

    def change(key: str, weight: torch.Tensor) -> Tensors:
        group = np.arange(weight.shape[1]) // size
        codes, zeros, scales, expected[key] = grids(key, weight, 4, group)
        parts = {
            "qweight": torch.from_numpy(words(codes, 4).T.copy()),
            "qzeros": torch.from_numpy(words(zeros, 4)),
            "scales": torch.from_numpy(scales),
            "g_idx": torch.from_numpy(group.astype(np.int32)) * (g_idx == "stored"),
        }
        if g_idx == "none":
            del parts["g_idx"]
        return {f"{key.removesuffix('.weight')}.{kind}": tensor for kind, tensor in parts.items()}

    config = {"quant_method": "gptq", "bits": 4, "checkpoint_format": "gptq_v2", "sym": False} | config
    folder = quantized(tiny_model_dir("mixtral"), tmp_path / "out", config, change)
    assert_decoded(folder, {key: weight for key, weight in expected.items() if "self_attn" in key})


def test_the_last_group_of_compressed_tensors_may_be_cut_off(tiny_model_dir, tmp_path):
    expected: Tensors = {}

    def change(key: str, weight: torch.Tensor) -> Tensors:
        codes, _, scales, expected[key] = grids(key, weight, 4, np.arange(weight.shape[1]) // 48)
        steps = torch.from_numpy(codes) - 8
        scales = torch.from_numpy(scales).T.float()
        expected[key] = steps * scales.repeat_interleave(48, 1)[:, : weight.shape[1]]
        return {key: steps.to(torch.int8), f"{key}_scale": scales.contiguous()}

    weights = {"num_bits": 8, "type": "int", "strategy": "group", "group_size": 48}
    config = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "config_groups": {"a": {"weights": weights}},
    }
    folder = quantized(tiny_model_dir("mixtral"), tmp_path / "out", config, change)
    assert_decoded(folder, {key: weight for key, weight in expected.items() if "self_attn" in key})


@pytest.mark.parametrize("structures", [["32x16"], [[32, 16], [16, 8]]])
def test_blocks_of_compressed_tensors(structures, tiny_model_dir, tmp_path):
    """Their sizes may be one word, and differ between groups of the config."""
    groups = {
        str(i): {"weights": {"num_bits": 8, "type": "float", "block_structure": b}} for i, b in enumerate(structures)
    }
    config = {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": groups}
    expected: Tensors = {}

    def change(key: str, weight: torch.Tensor) -> Tensors:
        rows, columns = (16, 8) if len(structures) > 1 and "k_proj" in key else (32, 16)
        codes, scale = float8((rows, columns))(key, weight).values()
        expected[key] = codes.float() * scale.repeat_interleave(rows, 0).repeat_interleave(columns, 1)
        return {key: codes, f"{key}_scale": scale}

    folder = quantized(tiny_model_dir("mixtral"), tmp_path / "out", config, change)
    assert_decoded(folder, {key: weight for key, weight in expected.items() if "self_attn" in key})


def test_three_bits_of_compressed_tensors(tiny_model_dir, tmp_path):
    """Codes that cross words, as the library packs them since 0.15."""
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    weights = {"num_bits": 3, "type": "int", "strategy": "group", "group_size": 32, "symmetric": False}
    config = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"a": {"weights": weights}},
    }
    expected: Tensors = {}

    def change(key: str, weight: torch.Tensor) -> Tensors:
        codes, zeros, scales, _ = (
            torch.as_tensor(part) for part in grids(key, weight, 3, np.arange(weight.shape[1]) // 32)
        )
        steps, zeros, scales = codes - 4, zeros.T - 4, scales.T.float()
        expected[key] = (steps - zeros.repeat_interleave(32, 1)) * scales.repeat_interleave(32, 1)
        parts = {
            "packed": helpers.pack_to_int32(steps.to(torch.int8), 3),
            "zero_point": helpers.pack_to_int32(zeros.to(torch.int8), 3, packed_dim=0),
            "scale": scales,
            "shape": torch.tensor(weight.shape),
        }
        return {f"{key}_{kind}": tensor.contiguous() for kind, tensor in parts.items()}

    folder = quantized(tiny_model_dir("mixtral"), tmp_path / "out", config, change)
    assert_decoded(folder, {key: weight for key, weight in expected.items() if "self_attn" in key})


def test_biases_of_zeros_that_the_model_has_not(tiny_model_dir, tmp_path):
    """Some programs write one for every linear, under the names of split experts too."""
    folder, expected = gptq_model(tiny_model_dir("mixtral"), tmp_path / "out", {"sym": True}, symmetric=True)
    tensors = load_file(folder / "model.safetensors")
    linears = {key: tensor for key, tensor in tensors.items() if key.endswith("scales")}
    biases = {key.replace("scales", "bias"): torch.zeros(tensor.shape[1]) for key, tensor in linears.items()}
    save_file(tensors | biases, folder / "model.safetensors", {"format": "pt"})
    with pytest.warns(UserWarning, match="does not use"):
        assert_decoded(renamed(folder, split), expected)


# --- ModelOpt


@pytest.mark.parametrize("algorithm", ["MIXED_PRECISION", "NVFP4_AWQ"])
@pytest.mark.parametrize("kind", ["float8", "nvfp4"])
def test_what_modelopt_multiplies_inputs_by_goes_into_the_weights(algorithm, kind, tiny_model_dir, tmp_path):
    expected: Tensors = {}

    def change(key: str, weight: torch.Tensor) -> Tensors:
        if ".layers.1.self_attn" not in key:
            return {key: weight}
        before = torch.linspace(0.5, 2, weight.shape[1])
        if kind == "nvfp4":
            parts, decoded = nvfp4(key, weight)
        else:
            parts = {key: weight.to(torch.float8_e4m3fn), f"{key}_scale": torch.tensor(0.5)}
            decoded = parts[key].float() * 0.5
        expected[key] = decoded * before
        return parts | {key.removesuffix("weight") + "pre_quant_scale": before}

    config = {"quant_method": "modelopt", "quant_algo": algorithm}
    folder = quantized(tiny_model_dir("mixtral"), tmp_path / "out", config, change)
    assert len(expected) == 4
    assert_decoded(folder, expected, "float32")


@pytest.mark.parametrize(
    "algorithm", ["FP8_PB_WO", "fp8_pb_wo", "MIXED_PRECISION", "FP8_PER_CHANNEL_PER_TOKEN", "MXFP8"]
)
def test_other_float8_of_modelopt(algorithm, tiny_model_dir, tmp_path):
    """Blocks of 128 x 128, the last ones cut off, with scales of four dimensions; rows; exponents for 32 inputs."""
    expected: Tensors = {}

    def change(key: str, weight: torch.Tensor) -> Tensors:
        if ".layers.1.self_attn" not in key:
            return {key: weight}
        codes, rows = weight.to(torch.float8_e4m3fn), len(weight)
        generator = torch.Generator().manual_seed(len(key))
        if algorithm == "FP8_PER_CHANNEL_PER_TOKEN":
            scale = spread = torch.rand(rows, 1, generator=generator) + 0.5
            scale = scale[:, 0]
        elif algorithm == "MXFP8":
            scale = torch.randint(125, 129, (rows, weight.shape[1] // 32), dtype=torch.uint8, generator=generator)
            spread = torch.exp2(scale.float() - 127).repeat_interleave(32, 1)
        else:
            scale = spread = torch.rand(1, 1, generator=generator) + 0.5
            scale = scale.reshape(1, 1, 1, 1)
        expected[key] = codes.float() * spread
        return {key: codes, f"{key}_scale": scale.contiguous()}

    config = {"quant_method": "modelopt", "quant_algo": algorithm}
    folder = quantized(tiny_model_dir("mixtral"), tmp_path / "out", config, change)
    assert_decoded(folder, expected, "float32")


def test_stacks_of_experts_whose_scales_are_named_after_them(tiny_model_dir, tmp_path):
    """`experts.down_proj_weight_scale`, beside a stack that has no `.weight` in its name."""
    folder = tiny_model_dir("mixtral")
    state = dict(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict())
    expected = {}
    for name in [name for name in state if ".experts." in name]:
        scale = state[name].abs().amax() / 448
        codes = (state[name] / scale).to(torch.float8_e4m3fn)
        expected[name] = codes.float() * scale
        state |= {name: codes, f"{name}_weight_scale": scale, f"{name}_input_scale": torch.tensor(1.0)}
    out = quantized(folder, tmp_path / "out", {"quant_method": "modelopt", "quant_algo": "FP8"}, lambda k, w: {k: w})
    save_file(state, out / "model.safetensors", {"format": "pt"})
    assert_decoded(out, expected, "float32")


# --- where the config says it


def moved(folder: Path, to: str) -> Path:
    """The model with its `quantization_config` under another key, or in a file of its own."""
    config = json.loads((folder / "config.json").read_text())
    described = config.pop("quantization_config")
    if to.endswith(".json"):
        described.pop("quant_method")
        (folder / to).write_text(json.dumps({"producer": {"name": "modelopt"}, "quantization": described}))
    else:
        config[to] = described
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("method", "algorithm", "to"),
    [
        ("modelopt", "FP8", "hf_quant_config.json"),
        ("compressed-tensors", None, "compression_config"),
        ("modelopt_mixed", "MIXED_PRECISION", None),
    ],
)
def test_other_places_and_names_of_a_quantization_config(method, algorithm, to, tiny_model_dir, tmp_path):
    expected: Tensors = {}

    def change(key: str, weight: torch.Tensor) -> Tensors:
        codes, scale = weight.to(torch.float8_e4m3fn), torch.tensor(0.5)
        expected[key] = codes.float() * scale
        return {key: codes, f"{key}_scale": scale}

    weights = {"num_bits": 8, "type": "float", "strategy": "tensor"}
    config = {"quant_method": method, "quant_algo": algorithm, "format": "float-quantized"}
    config |= {"config_groups": {"a": {"weights": weights}}}
    folder = quantized(tiny_model_dir("mixtral"), tmp_path / "out", config, change)
    folder = moved(folder, to) if to else folder
    assert_decoded(folder, {key: weight for key, weight in expected.items() if "self_attn" in key}, "float32")


def test_a_damaged_hf_quant_config_is_named(tiny_model_dir, tmp_path):
    folder = quantized(tiny_model_dir("mixtral"), tmp_path / "out", None, lambda key, weight: {key: weight})
    (folder / "hf_quant_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"hf_quant_config.json is damaged .*download it again"):
        Checkpoint(str(folder))


def test_a_model_of_mlx_is_named(tiny_model_dir, tmp_path):
    folder = quantized(
        tiny_model_dir("mixtral"), tmp_path / "out", None, lambda key, weight: {key: weight},
        quantization={"group_size": 64, "bits": 4},
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"--model.name_or_path.* it is quantized by mlx .*pass the full-precision"):
        Checkpoint(str(folder))
