"""Quantized originals are decoded while they are streamed: equal to transformers and other readers of the formats."""

import json
import math
import re
from collections.abc import Callable
from typing import Any

import jobs
import numpy as np
import pytest
import torch
from quantized_models import (
    Change,
    Tensors,
    assert_decoded,
    float8,
    gptq_model,
    grids,
    nvfp4,
    quantized,
    read,
    renamed,
    rounded,
    split,
    words,
)
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, FineGrainedFP8Config, GptOssConfig, Mxfp4Config
from transformers.quantizers import quantizer_finegrained_fp8

from eacmoe_lightning.calibration.recipe import num_quantized
from eacmoe_lightning.cli import main
from eacmoe_lightning.models.checkpoint import Checkpoint
from eacmoe_lightning.models.decoding.floats import Float8
from eacmoe_lightning.models.decoding.words import GPTQ
from eacmoe_lightning.models.streamed import StreamedModel
from eacmoe_lightning.planning.shapes import load_shapes, stored_share

# --- float8


@pytest.mark.parametrize(("family", "dtype"), [("mixtral", "bfloat16"), ("deepseek", "float32")])
def test_block_scaled_float8_is_decoded_as_by_transformers(family, dtype, tiny_model_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(quantizer_finegrained_fp8, "is_accelerate_available", lambda: True)  # only asked for, not used
    config = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [32, 16]}
    folder = quantized(tiny_model_dir(family), tmp_path / "fp8", config, float8((32, 16)), dtype=dtype)
    whole = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, quantization_config=FineGrainedFP8Config(weight_block_size=(32, 16), dequantize=True)
    )
    assert_decoded(folder, whole.state_dict(), dtype)
    assert Checkpoint(str(folder)).files.description == "float8 in blocks of 32 x 16"


@pytest.mark.parametrize("block", [(48, 40), (128, 128)])
def test_float8_blocks_may_be_cut_off(block, tiny_model_dir, tmp_path):
    change, folder = float8(block), tiny_model_dir("mixtral")
    config = {"quant_method": "fp8", "weight_block_size": list(block), "modules_to_not_convert": ["lm_head"]}
    out = quantized(folder, tmp_path / "fp8", config, change)
    key = "model.layers.1.self_attn.q_proj.weight"
    weight, scale = change(key, load_file(folder / "model.safetensors")[key]).values()
    expected = torch.empty(weight.shape)
    for row in range(64):
        for column in range(64):
            expected[row, column] = weight[row, column].float() * scale[row // block[0], column // block[1]]
    assert_decoded(out, {key: expected})


@pytest.mark.parametrize("kind", ["tensor", "scalar", "row", "uint8", "renamed"])
def test_other_scales_of_float8(kind, tiny_model_dir, tmp_path):
    """One scale, one a row, exponents as bytes, and DeepSeek-V4's names."""

    def change(key: str, weight: Tensor) -> dict[str, Tensor]:
        codes = (weight * 64).to(torch.float8_e4m3fn)
        scale = {
            "tensor": torch.tensor([[1 / 64]]),
            "scalar": torch.tensor(1 / 64),
            "row": torch.full((len(weight), 1), 1 / 64),
            "uint8": torch.full((2, 2), 127 - 6, dtype=torch.uint8),
            "renamed": torch.tensor([[1 / 64]]),
        }[kind]
        name = key.replace(".weight", ".scale") if kind == "renamed" else f"{key}_scale_inv"
        return {key: codes, name: scale, key.replace(".weight", ".activation_scale"): torch.tensor(1.0)}

    folder = tiny_model_dir("mixtral")
    out = quantized(folder, tmp_path / "fp8", {"quant_method": "fp8", "weight_block_size": None}, change)
    key = "model.layers.0.self_attn.v_proj.weight"
    weight = load_file(folder / "model.safetensors")[key]
    assert_decoded(out, {key: (weight * 64).to(torch.float8_e4m3fn).float() / 64})


# --- MXFP4


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_mxfp4_is_decoded_as_by_transformers(dtype, tmp_path):
    config = GptOssConfig(
        vocab_size=128, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
        intermediate_size=32, num_local_experts=4, num_experts_per_tok=2, pad_token_id=0,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, tensor in AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).state_dict().items():
        if name.endswith(("gate_up_proj", "down_proj")):
            experts, inputs, outputs = tensor.shape
            shape = experts, outputs, inputs // 32
            tensors[f"{name}_blocks"] = torch.randint(256, (*shape, 16), generator=generator, dtype=torch.uint8)
            tensors[f"{name}_scales"] = torch.randint(110, 130, shape, generator=generator, dtype=torch.uint8)
        else:
            tensors[name] = torch.randn(tensor.shape, generator=generator).bfloat16()
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    described = config.to_dict() | {"quantization_config": {"quant_method": "mxfp4"}, "dtype": "bfloat16"}
    (tmp_path / "config.json").write_text(json.dumps(described))
    whole = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=dtype, quantization_config=Mxfp4Config(dequantize=True)
    )
    assert_decoded(tmp_path, whole.state_dict(), dtype)


# --- ModelOpt


def test_nvfp4_of_modelopt_is_decoded_by_the_formats_definition(tiny_model_dir, tmp_path):
    expected: Tensors = {}

    def change(key: str, weight: Tensor) -> Tensors:
        if ".layers.1.self_attn" not in key:
            return {key: weight}
        parts, expected[key] = nvfp4(key, weight)
        return parts

    config = {"quant_method": "modelopt", "quant_algo": "NVFP4"}
    folder = quantized(tiny_model_dir("mixtral"), tmp_path / "out", config, change)
    assert len(expected) == 4
    assert_decoded(folder, expected)
    assert Checkpoint(str(folder)).files.description == "ModelOpt NVFP4"


def test_float8_of_modelopt(tiny_model_dir, tmp_path, tokens):
    """The same tensors as of `fp8`, with one scale for a weight."""

    def change(key: str, weight: Tensor) -> Tensors:
        codes, scale = float8((64, 64))(key, weight).values()
        return {key: codes, f"{key}_scale": scale.reshape(()), key.replace("weight", "input_scale"): torch.tensor(1.0)}

    own, other = (
        StreamedModel(Checkpoint(str(quantized(tiny_model_dir("mixtral"), tmp_path / method, config, change))))
        for method in ("modelopt", "fp8")
        for config in [{"quant_method": method, "quant_algo": "FP8"}]
    )
    with torch.no_grad():
        assert torch.equal(own.logits(tokens), other.logits(tokens))


# --- compressed-tensors


SCHEMES = {  # name: format, weights
    "int4 groups": ("pack-quantized", {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}),
    "int4 asymmetric": (
        "pack-quantized",
        {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": False},
    ),
    "int8 channels": ("pack-quantized", {"num_bits": 8, "type": "int", "strategy": "channel"}),
    "int8": ("int-quantized", {"num_bits": 8, "type": "int", "strategy": "channel"}),
    "int8 asymmetric": ("int-quantized", {"num_bits": 8, "type": "int", "strategy": "tensor", "symmetric": False}),
    "nvfp4": (
        "nvfp4-pack-quantized",
        {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16},
    ),
    "mxfp4": ("mxfp4-pack-quantized", {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32}),
    "mxfp8": ("mxfp8-quantized", {"num_bits": 8, "type": "float", "strategy": "group", "group_size": 32}),
    "float8": ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "channel"}),
    "float8 blocks": (
        "float-quantized",
        {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [32, 16]},
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", SCHEMES)
def test_compressed_tensors_is_decoded_as_by_its_library(kind, dtype, tiny_model_dir, tmp_path):
    library = pytest.importorskip("compressed_tensors.compressors")
    quantization = pytest.importorskip("compressed_tensors.quantization")
    form, described = SCHEMES[kind]
    arguments = quantization.QuantizationArgs(**described)
    scheme = quantization.QuantizationScheme(targets=["Linear"], weights=arguments)
    compressor = library.BaseCompressor.get_value_from_registry(form)
    expected: dict[str, Tensor] = {}

    def change(key: str, weight: Tensor) -> dict[str, Tensor]:
        rows, columns = weight.shape
        groups = {
            "group": (rows, columns // 32),
            "tensor_group": (rows, columns // 16),
            "channel": (rows, 1),
            "tensor": (1,),
            "block": (rows // 32, columns // 16),
        }
        shape = groups[described["strategy"]]
        generator = torch.Generator().manual_seed(rows + len(key))
        scale = (0.01 + 0.02 * torch.rand(shape, generator=generator)).to(dtype)
        state = {"weight": weight.to(dtype), "weight_scale": scale}
        if kind == "nvfp4":
            state["weight_global_scale"] = 448 * 6 / weight.abs().max().float().reshape(1)
            state["weight_scale"] = (scale.float() * state["weight_global_scale"] / 6).clamp(max=448)
        if described.get("symmetric") is False:
            state["weight_zero_point"] = torch.randint(-7, 7, shape, generator=generator, dtype=torch.int8)
        stored = compressor.compress(state, scheme)
        expected[key] = compressor.decompress(dict(stored), scheme)["weight"].to(dtype)
        name = key.removesuffix("weight")
        return {f"{name}{kind}": tensor.contiguous() for kind, tensor in stored.items()}

    config = {
        "quant_method": "compressed-tensors", "format": form, "ignore": ["lm_head"],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": described}},
    }  # fmt: skip
    name = str(dtype).rpartition(".")[2]
    folder = quantized(tiny_model_dir("qwen2_moe"), tmp_path / "out", config, change, dtype=name)
    attention = {key: weight for key, weight in expected.items() if "self_attn" in key or "shared_expert" in key}
    stack = [expected[f"model.layers.1.mlp.experts.{e}.down_proj.weight"] for e in range(8)]
    assert len(attention) == 21
    assert_decoded(folder, attention | {"model.layers.1.mlp.experts.down_proj": torch.stack(stack)})


def asymmetric(with_zero_points: bool) -> tuple[dict[str, Any], Change, Tensors]:
    """Codes in words with zero points in bytes, as the library stored them before it packed these too."""
    weights = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": False}
    config = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"a": {"weights": weights}},
    }
    expected: Tensors = {}

    def change(key: str, weight: Tensor) -> Tensors:
        codes, zeros, scales, expected[key] = rounded(weight, False)
        parts = {
            "packed": torch.from_numpy(words(codes.numpy(), 4)),
            "scale": scales.float(),
            "shape": torch.tensor(weight.shape),
        }
        if with_zero_points:
            parts["zero_point"] = (zeros.int() - 8).to(torch.int8)
        return {f"{key}_{kind}": tensor.contiguous() for kind, tensor in parts.items()}

    return config, change, expected


def test_zero_points_of_compressed_tensors_in_bytes(tiny_model_dir, tmp_path):
    config, change, expected = asymmetric(with_zero_points=True)
    folder = quantized(tiny_model_dir("mixtral"), tmp_path / "out", config, change)
    assert_decoded(folder, {key: weight for key, weight in expected.items() if "self_attn" in key})


def test_zero_points_that_compressed_tensors_promises_and_the_files_lack(tiny_model_dir, tmp_path):
    config, change, _ = asymmetric(with_zero_points=False)
    with pytest.raises(ValueError, match=r"w1.weight has no zero points, and config_groups says"):
        read(quantized(tiny_model_dir("mixtral"), tmp_path / "out", config, change))


# --- GPTQ and AWQ: references from the formats' definitions, word by word


@pytest.mark.parametrize(("bits", "form"), [(4, "gptq"), (8, "gptq"), (4, "gptq_v2"), (3, "gptq_v2"), (2, "gptq")])
@pytest.mark.parametrize("in_order", [True, False])
def test_gptq_is_decoded_by_the_formats_definition(bits, form, in_order, tiny_model_dir, tmp_path):
    expected: dict[str, Tensor] = {}

    def change(key: str, weight: Tensor) -> dict[str, Tensor]:
        if ".layers.1." not in key:
            return {key: weight}
        group = np.arange(weight.shape[1]) // 32
        if not in_order:
            group = np.random.default_rng(0).permutation(group)  # desc_act
        codes, zeros, scales, expected[key] = grids(key, weight, bits, group)
        name = key.removesuffix(".weight")
        parts = {
            "qweight": words(codes, bits).T,
            "qzeros": words(zeros - (form == "gptq"), bits),
            "scales": scales,
            "g_idx": group.astype(np.int32),
        }
        return {f"{name}.{part}": torch.from_numpy(np.ascontiguousarray(value)) for part, value in parts.items()}

    config = {
        "quant_method": "gptq", "bits": bits, "group_size": 32, "desc_act": not in_order, "sym": False,
        "checkpoint_format": form,
    }  # fmt: skip
    folder = quantized(tiny_model_dir("mixtral"), tmp_path / "gptq", config, change)
    attention = {key: weight for key, weight in expected.items() if "self_attn" in key}
    stack = [expected[f"model.layers.1.block_sparse_moe.experts.{e}.w2.weight"] for e in range(8)]
    assert_decoded(folder, attention | {"model.layers.1.mlp.experts.down_proj": torch.stack(stack)})


@pytest.mark.parametrize("kinds", ["qweight scales g_idx", "qweight scales"])
def test_symmetric_gptq_needs_no_zero_points(kinds, tiny_model_dir, tmp_path):
    folder, expected = gptq_model(
        tiny_model_dir("mixtral"), tmp_path / "out", {"sym": True}, symmetric=True, kinds=kinds
    )
    assert_decoded(folder, expected)
    other, _ = gptq_model(tiny_model_dir("mixtral"), tmp_path / "b", {"sym": False}, symmetric=True, kinds=kinds)
    with pytest.raises(ValueError, match=r"--model.name_or_path.*w1.qweight has no qzeros beside it"):
        Checkpoint(str(other))


@pytest.mark.parametrize("label", ["gptq", "gptq_v2", None])
@pytest.mark.parametrize("left_out", [0, 1])
def test_symmetric_zero_points_say_themselves_how_they_are_stored(label, left_out, tiny_model_dir, tmp_path):
    config = {"checkpoint_format": label} | ({"sym": True} if label else {})
    folder, expected = gptq_model(
        tiny_model_dir("mixtral"), tmp_path / "out", config, symmetric=True, left_out=left_out
    )
    assert_decoded(folder, expected)


@pytest.mark.parametrize(("label", "left_out"), [("gptq", 0), (None, 0), ("gptq_v2", 1)])
def test_asymmetric_zero_points_of_the_other_version_are_refused(label, left_out, tiny_model_dir, tmp_path):
    config = {"sym": False, "checkpoint_format": label}
    folder, _ = gptq_model(tiny_model_dir("mixtral"), tmp_path / "out", config, symmetric=False, left_out=left_out)
    right = "gptq" if left_out else "gptq_v2"
    with pytest.raises(ValueError, match=rf'lie one step beside 0 .*write "checkpoint_format": "{right}"'):
        read(folder)
    right_folder, expected = gptq_model(
        tiny_model_dir("mixtral"), tmp_path / "b", {"sym": False, "checkpoint_format": right}, symmetric=False,
        left_out=left_out,
    )  # fmt: skip
    assert_decoded(right_folder, expected)


@pytest.mark.parametrize("form", ["auto_round:auto_gptq", "auto_round", None])
def test_autoround_in_the_form_of_gptq(form, tiny_model_dir, tmp_path):
    config = {"quant_method": "auto-round", "packing_format": form, "sym": True}
    folder, expected = gptq_model(tiny_model_dir("mixtral"), tmp_path / "out", config, symmetric=True, left_out=1)
    assert_decoded(folder, expected)


AUTO_ROUND_AWQ = {"quant_method": "auto-round", "packing_format": "auto_round:auto_awq"}


@pytest.mark.parametrize("config", [None, {"quant_method": "fp8", "weight_block_size": [32, 32]}])
def test_experts_that_were_split_out_of_stacks_are_stacked_again(config, tiny_model_dir, tmp_path, tokens):
    change = float8((32, 32)) if config else lambda key, weight: {key: weight}
    plain = quantized(tiny_model_dir("mixtral"), tmp_path / "plain", config, change)
    other = renamed(quantized(tiny_model_dir("mixtral"), tmp_path / "split", config, change), split)
    with torch.no_grad():
        own, read_so = (StreamedModel(Checkpoint(str(folder))).logits(tokens) for folder in (plain, other))
    assert torch.equal(own, read_so)


def test_a_missing_expert_among_split_ones_is_named(tiny_model_dir, tmp_path):
    folder = quantized(tiny_model_dir("mixtral"), tmp_path / "split", None, lambda key, weight: {key: weight})
    renamed(folder, lambda key: None if "layers.1" in key and "experts.5.w3" in key else split(key))
    message = r"--model.name_or_path.*model.layers.1.mlp.experts, 1 are missing, such as up_proj of expert 5: a file"
    with pytest.raises(ValueError, match=message):
        Checkpoint(str(folder))


def test_more_split_experts_than_the_model_has_are_refused(tiny_model_dir, tmp_path):
    folder = quantized(
        tiny_model_dir("mixtral"), tmp_path / "split", None, lambda key, weight: {key: weight}, num_local_experts=7
    )
    with pytest.raises(ValueError, match=r"model.layers.0.mlp.experts has 7 experts, and the files hold 8 of them"):
        Checkpoint(str(renamed(folder, split)))


def test_rows_of_gate_and_up_that_may_be_mixed_are_refused(tmp_path):
    """GPTQModel splits gpt-oss into halves that hold both; what others do is not known."""
    config = GptOssConfig(
        vocab_size=128, hidden_size=64, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
        intermediate_size=32, num_local_experts=2, num_experts_per_tok=2, pad_token_id=0,
    )  # fmt: skip
    state = AutoModelForCausalLM.from_config(config).state_dict()
    experts = "model.layers.0.mlp.experts"
    for expert in range(2):
        gate, up = state[f"{experts}.gate_up_proj"][expert].T.chunk(2)
        state |= {f"{experts}.{expert}.gate_proj.weight": gate, f"{experts}.{expert}.up_proj.weight": up}
    del state[f"{experts}.gate_up_proj"]
    save_file({key: tensor.contiguous() for key, tensor in state.items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    with pytest.raises(ValueError, match=r"0.gate_proj.weight is.*GptOssExperts alternates the rows of gate and up"):
        Checkpoint(str(tmp_path))


@pytest.mark.parametrize("method", [{"quant_method": "awq", "version": "gemm"}, AUTO_ROUND_AWQ])
@pytest.mark.parametrize(("bits", "order"), [(4, (0, 2, 4, 6, 1, 3, 5, 7)), (8, (0, 2, 1, 3))])
def test_awq_is_decoded_by_the_formats_definition(bits, order, method, tiny_model_dir, tmp_path):
    expected: dict[str, Tensor] = {}

    def interleaved(codes: np.ndarray) -> np.ndarray:
        """Columns in the order in which a word holds them."""
        return codes.reshape(len(codes), -1, len(order))[:, :, list(order)].reshape(codes.shape)

    def change(key: str, weight: Tensor) -> dict[str, Tensor]:
        if ".layers.1.self_attn" not in key:
            return {key: weight}
        codes, zeros, scales, expected[key] = grids(key, weight, bits, np.arange(weight.shape[1]) // 32)
        name = key.removesuffix(".weight")
        parts = {
            "qweight": words(interleaved(codes.T), bits),
            "qzeros": words(interleaved(zeros), bits),
            "scales": scales,
        }
        return {f"{name}.{part}": torch.from_numpy(np.ascontiguousarray(value)) for part, value in parts.items()}

    config = {"bits": bits, "group_size": 32, "zero_point": True} | method
    folder = quantized(tiny_model_dir("mixtral"), tmp_path / "awq", config, change)
    assert len(expected) == 4
    assert_decoded(folder, expected)


def test_symmetric_awq_needs_no_zero_points(tiny_model_dir, tmp_path):
    expected: Tensors = {}

    def change(key: str, weight: Tensor) -> Tensors:
        codes, _, scales, expected[key] = rounded(weight, True)
        order = [0, 2, 4, 6, 1, 3, 5, 7]
        name, columns = key.removesuffix(".weight"), codes.T.reshape(weight.shape[1], -1, 8)[..., order].flatten(1)
        return {
            f"{name}.qweight": torch.from_numpy(words(columns.numpy(), 4)),
            f"{name}.scales": scales.T.contiguous(),
        }

    config = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": False}
    folder = quantized(tiny_model_dir("mixtral"), tmp_path / "awq", config, change)
    assert_decoded(folder, {key: weight for key, weight in expected.items() if "self_attn" in key})


def test_words_that_need_no_decoding_are_read_as_they_are(tiny_model_dir, tmp_path):
    """A dequantized copy whose config still says that it is quantized."""
    plain = quantized(tiny_model_dir("mixtral"), tmp_path / "x", {"quant_method": "fp8"}, lambda key, t: {key: t})
    whole = AutoModelForCausalLM.from_pretrained(tiny_model_dir("mixtral"))
    with pytest.warns(UserWarning, match="none of its tensors is quantized: they are read as they are"):
        assert_decoded(plain, whole.state_dict())


@pytest.mark.parametrize("size", [[0, 0], [1, 32, 32]])
def test_a_block_size_that_is_none_is_named(size, tiny_model_dir, tmp_path):
    config = {"quant_method": "fp8", "weight_block_size": size}
    folder = quantized(tiny_model_dir("mixtral"), tmp_path / "out", config, float8((32, 32)))
    with pytest.raises(ValueError, match=re.escape(f"weight_block_size={size} in `quantization_config`")):
        read(folder)


def test_scales_of_zero_are_refused(tiny_model_dir, tmp_path):
    def change(key: str, weight: Tensor) -> dict[str, Tensor]:
        return {name: t * 0 if name.endswith("scale_inv") else t for name, t in float8((32, 32))(key, weight).items()}

    config = {"quant_method": "fp8", "weight_block_size": [32, 32]}
    with pytest.raises(ValueError, match="decodes to zeros as float8 in blocks of 32 x 32, because its scales are"):
        read(quantized(tiny_model_dir("mixtral"), tmp_path / "out", config, change))


def without(*ends: str) -> Callable[[str], str | None]:
    return lambda key: None if key.endswith(ends) else key


@pytest.mark.parametrize(
    ("config", "rename", "message"),
    [
        ({"desc_act": True}, without(".g_idx"), "its inputs are in the order of their importance"),
        ({}, without("1.self_attn.q_proj.g_idx"), "q_proj.weight has no g_idx beside it"),
        ({"sym": True}, without("1.self_attn.q_proj.qzeros"), "q_proj.weight has no qzeros beside it"),
        ({"group_size": 64}, without(".g_idx"), "it has scales for 2 groups, and 64 inputs in groups of 64"),
    ],
)
def test_gptq_that_lacks_what_its_config_or_its_other_linears_have(config, rename, message, tiny_model_dir, tmp_path):
    folder, _ = gptq_model(tiny_model_dir("mixtral"), tmp_path / "out", config, symmetric=False, left_out=1)
    with pytest.raises(ValueError, match=message):
        read(renamed(folder, rename))


def test_inputs_that_are_all_in_the_first_group_are_in_order(tiny_model_dir, tmp_path):
    folder, expected = gptq_model(tiny_model_dir("mixtral"), tmp_path / "out", {}, symmetric=False, left_out=1)
    tensors = load_file(folder / "model.safetensors")
    tensors = {key: t * 0 if key.endswith("g_idx") else t for key, t in tensors.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert_decoded(folder, expected)
    tensors = {key: t + 1 if key.endswith("g_idx") else t for key, t in tensors.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="its `g_idx` does not put inputs into each of its 2 groups"):
        read(folder)


def test_a_zero_point_of_0_that_gptqmodel_has_taken_from_a_whole_word(tiny_model_dir, tmp_path):
    zeros = np.arange(64, dtype=np.int64)[None] % 16  # of 64 outputs in one group
    stored = words(zeros, 4).view(np.uint32) - np.uint32(0x11111111)
    scheme = GPTQ({"quant_method": "gptq", "bits": 4, "group_size": 64, "sym": False}, {})
    codes = torch.randint(0, 16, (64, 64), generator=torch.Generator().manual_seed(0))
    parts = {
        "qweight": torch.from_numpy(words(codes.numpy(), 4).T.copy()),
        "qzeros": torch.from_numpy(stored.view(np.int32)),
        "scales": torch.ones(1, 64),
    }
    assert torch.equal(scheme.decode("weight", parts), (codes - torch.from_numpy(zeros.T)).float())


# --- whole jobs


@pytest.mark.parametrize(
    ("config", "bits"),
    [
        ({"quant_method": "fp8", "weight_block_size": [64, 64]}, 8),
        ({"quant_method": "gptq", "bits": 4, "group_size": 64}, 4 + 20 / 64),
        ({"quant_method": "compressed-tensors",
          "config_groups": {"a": {"weights": {"num_bits": 4, "type": "int", "group_size": 32}}}}, 4.5),
    ],
)  # fmt: skip
def test_plan_counts_the_bytes_of_a_quantized_original(config, bits, tiny_model_dir, tmp_path):
    """From its files, and without them from its config."""
    folder = quantized(tiny_model_dir("mixtral"), tmp_path / "model", config, float8((64, 64)))
    moe = load_shapes(str(folder), "bfloat16")
    parameters, linears = sum(p.numel() for p in moe.model.parameters()), num_quantized(moe)
    if bits == 8:
        expected = (folder / "model.safetensors").stat().st_size
        assert stored_share(str(folder), moe) == expected / (2 * parameters)
    (folder / "model.safetensors").unlink()
    expected = linears * bits / 8 + 4 * (parameters - linears)  # the rest is float32
    assert stored_share(str(folder), moe) == pytest.approx(expected / (2 * parameters))


def test_only_one_block_of_a_quantized_original_is_in_memory(tiny_model_dir, tmp_path, monkeypatch, tokens):
    """Weights are decoded block by block, and the model is the one that transformers would load."""
    monkeypatch.setattr(quantizer_finegrained_fp8, "is_accelerate_available", lambda: True)
    config = {"quant_method": "fp8", "weight_block_size": [64, 64]}
    folder = quantized(tiny_model_dir("mixtral"), tmp_path / "fp8", config, float8((64, 64)))
    decoded: list[str] = []
    decode = Float8.decode
    monkeypatch.setattr(Float8, "decode", lambda self, key, parts: decoded.append(key) or decode(self, key, parts))
    streamed = StreamedModel(Checkpoint(str(folder)))
    assert not decoded
    for block in streamed.blocks:
        with streamed.loaded(block.index):
            assert decoded and all(f".layers.{block.index}." in key for key in decoded)
        decoded.clear()
    whole = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=FineGrainedFP8Config(weight_block_size=(64, 64), dequantize=True)
    )
    with torch.no_grad():
        assert torch.equal(streamed.logits(tokens), whole(tokens, use_cache=False).logits)


def test_a_quantized_original_is_compressed_and_the_report_says_what_it_was(tiny_model_dir, tmp_path, capsys):
    config = {"quant_method": "fp8", "weight_block_size": [64, 64]}
    folder = quantized(tiny_model_dir("mixtral"), tmp_path / "fp8", config, float8((64, 64)))
    run = jobs.fit(folder, tmp_path / "run", model__joint_epochs=0, data__num_windows=4)
    report = json.loads((run / "report.json").read_text())
    assert report["model"]["stored"] == "float8 in blocks of 64 x 64"
    assert report["size_bytes"]["original"] == (folder / "model.safetensors").stat().st_size
    assert "float8 in blocks of 64 x 64" in (run / "report.md").read_text()
    assert (
        "quantization_config" not in json.loads((run / "compressed" / "config.json").read_text())["original"]["config"]
    )


# --- what cannot be decoded


@pytest.mark.parametrize("shape", [(4, 1), (1, 4, 1), (2, 4)])
def test_float8_blocks_of_another_size_than_the_config_says_are_refused(shape, tiny_model_dir, tmp_path):
    """Four scales of a weight of 64 x 64 in blocks of 32 x 32 would also fit blocks of 16 x 64."""

    def change(key: str, weight: Tensor) -> dict[str, Tensor]:
        return {key: weight.to(torch.float8_e4m3fn), f"{key}_scale_inv": torch.ones(shape)}

    config = {"quant_method": "fp8", "weight_block_size": [32, 32]}
    folder = quantized(tiny_model_dir("mixtral"), tmp_path / "out", config, change)
    with pytest.raises(ValueError, match=r"do not fit a weight \(64, 64\), which has \(2, 2\) blocks of 32 x 32"):
        read(folder)


@pytest.mark.parametrize(
    ("factor", "message"), [(1, "decodes to weights of"), (math.nan, "decodes to NaN or infinite")]
)
def test_scales_that_divide_are_named(factor, message, tiny_model_dir, tmp_path, capsys):
    """The reciprocals of the scales: weights of a hundred thousand, which no dtype overflows."""

    def change(key: str, weight: Tensor) -> Tensors:
        weight, scale = float8((64, 64))(key, weight).values()
        return {key: weight, f"{key}_scale_inv": factor / scale}

    config = {"quant_method": "fp8", "weight_block_size": [64, 64]}
    folder = quantized(tiny_model_dir("mixtral"), tmp_path / "out", config, change)
    with pytest.raises(SystemExit):
        main(["fit", *jobs.options(folder, tmp_path / "run")])
    error = capsys.readouterr().err
    named = "block_sparse_moe.experts.0.w1.weight"
    assert f"{named} {message}" in error and "--model.name_or_path" in error and "Traceback" not in error
    assert not (tmp_path / "run" / "blocks").exists()


def test_large_and_small_weights_are_read(tiny_model_dir, tmp_path):
    def change(key: str, weight: Tensor) -> Tensors:
        factor = 1e4 if "w2" in key else 1e-9 if "w1" in key else 0 if "w3" in key else 1
        if not factor:
            return {key: weight.mul(0).to(torch.float8_e4m3fn), f"{key}_scale_inv": torch.zeros(1, 1)}
        return float8((64, 64))(key, weight * factor)

    config = {"quant_method": "fp8", "weight_block_size": [64, 64]}
    read(quantized(tiny_model_dir("mixtral"), tmp_path / "out", config, change))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"quant_method": "gptq", "checkpoint_format": "marlin"}, "GPTQ in the format 'marlin'"),
        ({"quant_method": "gptq", "is_marlin_format": True}, "GPTQ in the format 'marlin'"),
        ({"quant_method": "auto-round", "packing_format": "auto_round:itrex"}, "auto-round in the format 'itrex'"),
        ({"quant_method": "modelopt", "quant_algo": "W4A8_AWQ"}, "modelopt as W4A8_AWQ"),
        ({"quant_method": "compressed-tensors", "format": "marlin-24"}, "in the format marlin-24"),
        (
            {"quant_method": "compressed-tensors", "sparsity_config": {"format": "sparse-24-bitmask"}},
            "sparse-24-bitmask",
        ),
        ({"quant_method": "compressed-tensors", "config_groups": {"a": {"weights": {"type": "int"}}}}, "not complete"),
        ({"quant_method": "compressed-tensors", "config_groups": [1]}, "not complete"),
    ],
)
def test_other_formats_of_a_known_method_are_refused(config, message, tiny_model_dir, tmp_path):
    folder = quantized(tiny_model_dir("mixtral"), tmp_path / "out", config, lambda key, weight: {key: weight})
    with pytest.raises(ValueError, match=f"--model.name_or_path.* cannot be read: .*{message}"):
        Checkpoint(str(folder))


@pytest.mark.parametrize(
    ("kind", "change"),
    [("qweight", lambda t: t[:-1]), ("scales", lambda t: t[:, :-8]), ("g_idx", lambda t: t + 100)],
)
def test_parts_that_do_not_fit_each_other_are_named(kind, change, tiny_model_dir, tmp_path):
    damaged = "model.layers.1.self_attn.q_proj"

    def gptq(key: str, weight: Tensor) -> dict[str, Tensor]:
        name, (rows, columns) = key.removesuffix(".weight"), weight.shape
        parts = {
            "qweight": torch.zeros(columns // 8, rows, dtype=torch.int32), "scales": torch.ones(2, rows),
            "qzeros": torch.full((2, rows // 8), 0x77777777, dtype=torch.int32),
            "g_idx": torch.arange(columns) // (columns // 2),
        }  # fmt: skip
        if name == damaged:
            parts[kind] = change(parts[kind]).contiguous()
        return {f"{name}.{part}": tensor for part, tensor in parts.items()}

    config = {"quant_method": "gptq", "bits": 4, "group_size": 32}
    folder = quantized(tiny_model_dir("mixtral"), tmp_path / "out", config, gptq)
    with pytest.raises(ValueError, match=rf"{damaged}.weight cannot be decoded as GPTQ, 4 bits.*qweight \(.*download"):
        read(folder)
