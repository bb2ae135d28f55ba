"""GGUF files of every architecture, without llama.cpp: against its own converter, its router, and its limits.

`gguf_reference.json` holds what llama.cpp's converter makes of the same models (`benchmarks/gguf_reference.py` writes
it); `benchmarks/export_check.py --families gguf` runs them in llama.cpp.
"""

import itertools
import json
from pathlib import Path

import gguf_models
import numpy as np
import pytest
import torch
from test_packed_loading import compress
from torch import Tensor

from eacmoe_lightning import load
from eacmoe_lightning.exports.export import export
from eacmoe_lightning.exports.gguf_architectures import ARCHITECTURES, SIGMOID, SOFTMAX
from eacmoe_lightning.exports.gguf_keys import architecture_of, keys_of, warn_of_rounding
from eacmoe_lightning.exports.gguf_tensors import plan, widths_of
from eacmoe_lightning.models.moe import MoEModel
from eacmoe_lightning.models.transformers_loader import empty_model

gguf = pytest.importorskip("gguf")
REFERENCE = json.loads(Path(__file__).with_name("gguf_reference.json").read_text())
QUICK = ("deepseek_v2", "ernie4_5_moe", "glm4_moe", "glm4_moe-plain", "gpt_oss")
WITHOUT = {  # keys that the converter writes with the value that llama.cpp has without them
    "expert_gating_func": SOFTMAX,
    "expert_group_count": 1,
    "expert_group_used_count": 1,
    "expert_weights_scale": 1.0,
    "nextn_predict_layers": 0,
    "rope.scaling.type": "none",
    "rope.scaling.yarn_beta_fast": 32.0,
    "rope.scaling.yarn_beta_slow": 1.0,
}


LONG_YARN = gguf_models.YARN | {"original_max_position_embeddings": 4096}
KIMI_YARN = LONG_YARN | {"rope_theta": 5e4, "mscale": 1.0, "mscale_all_dim": 1.0, "beta_fast": 1.0, "beta_slow": 1.0}


def empty(name: str, **changes) -> MoEModel:
    return MoEModel(empty_model(gguf_models.config_of(name, **changes), torch.float32))


def keys(moe: MoEModel, directory: Path) -> dict:
    """The keys as they stand in a file, without the architecture before them."""
    architecture = architecture_of(moe)
    writer = gguf.GGUFWriter(directory / "keys.gguf", architecture.name)
    for name, value in keys_of(moe, architecture, widths_of(plan(moe, {}, architecture))).items():
        getattr(writer, f"add_{name}")(value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    fields = gguf.GGUFReader(directory / "keys.gguf").fields
    prefix = f"{architecture.name}."
    return {n.removeprefix(prefix): field.contents() for n, field in fields.items() if n.startswith(prefix)}


@pytest.mark.parametrize("name", REFERENCE)
def test_tensors_and_keys_are_those_of_llama_cpps_converter(name, tmp_path):
    moe, expected = empty(name), REFERENCE[name]
    architecture = architecture_of(moe)
    assert architecture.name == expected["architecture"]
    tensors = {entry.name: [n for n in entry.shape if n > 1] for entry in plan(moe, {}, architecture)}
    reference = {
        pattern.replace("blk.N", f"blk.{block}"): shape
        for pattern, (shape, blocks) in expected["tensors"].items()
        for block in blocks or [""]
    }
    assert tensors == reference
    written = keys(moe, tmp_path)
    if expected["keys"]["context_length"] == 2**20:  # "for those who use the default", which is a lot of memory
        expected["keys"]["context_length"] = moe.config.max_position_embeddings
    if layers := expected["keys"].pop("attention.recurrent_layers", None):  # in newer files, instead of the interval
        assert layers == [(i + 1) % written["full_attention_interval"] > 0 for i in range(len(layers))]
        del expected["keys"]["full_attention_interval"]
    for key, value in expected["keys"].items():
        assert written.get(key, WITHOUT.get(key)) == pytest.approx(value), key


@pytest.mark.parametrize("name", sorted({*ARCHITECTURES} - {"nemotron_h"}))  # which transformers never ties
def test_tied_models_have_a_head_where_llama_cpp_requires_one(name):
    """`LLM_TENSOR_OUTPUT` without `TENSOR_NOT_REQUIRED` in llama.cpp's src/models."""
    moe = empty(name, tie_word_embeddings=True)
    is_written = "output.weight" in [entry.name for entry in plan(moe, {}, architecture_of(moe))]
    assert is_written == (name in ("dots1", "exaone_moe", "gpt_oss", "minimax_m2", "olmoe", "qwen2_moe"))


# --- routers


def routed(logits: Tensor, bias: Tensor | None, keys: dict, architecture) -> tuple[Tensor, Tensor]:
    """llama.cpp's `build_moe_ffn` from logits [N, E]: experts [N, K] and their weights."""
    gating = keys.get("expert_gating_func", architecture.gating)
    scores = logits.sigmoid() if gating == SIGMOID else logits.softmax(-1)
    chosen = scores if bias is None else scores + bias
    if groups := keys.get("expert_group_count"):
        grouped = chosen.unflatten(-1, (groups, -1))
        best = grouped.topk(2).values.sum(-1).topk(keys["expert_group_used_count"]).indices
        kept = torch.zeros(best.shape[0], groups).scatter(1, best, 1).bool()
        chosen = grouped.masked_fill(~kept[..., None], -torch.inf).flatten(1)
    ids = chosen.topk(keys["expert_used_count"]).indices
    weights = scores.gather(1, ids)
    if keys.get("expert_weights_norm", architecture.normalizes):
        weights = weights / weights.sum(-1, keepdim=True)
    return ids, weights * keys.get("expert_weights_scale", 1.0)


@pytest.mark.parametrize(
    "name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in gguf_models.NAMES]
)
@torch.no_grad()
def test_the_keys_describe_the_router(name, tmp_path):
    model, seen = gguf_models.build(name), []
    moe = MoEModel(model)
    written, architecture = keys(moe, tmp_path), architecture_of(moe)
    block = moe.moe_blocks[-1]
    block.watch_router(lambda routing, _: seen.append(routing))
    model(torch.randint(1, 4096, (2, 64), generator=torch.Generator().manual_seed(0)))
    biases = [entry.parameter for entry in plan(moe, {}, architecture) if "exp_probs_b" in entry.name]
    state = model.state_dict()
    bias = state[biases[-1]].flatten() if biases else None
    ids, weights = routed(seen[0].logits.float(), bias, written, architecture)
    dense = torch.zeros(seen[0].logits.shape)
    expected = dense.scatter(1, seen[0].ids, seen[0].weights.float())
    torch.testing.assert_close(dense.scatter(1, ids, weights), expected, rtol=1e-4, atol=1e-6)


# --- what llama.cpp computes differently


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("olmoe", {"clip_qkv": 8.0}, r"clip_qkv=8.0, but llama.cpp's architecture olmoe has None"),
        ("olmoe", {"num_key_value_heads": 2}, "num_key_value_heads=2"),
        ("olmoe", {"norm_topk_prob": True}, "norm_topk_prob=True"),
        ("dots1", {"layer_types": ["full_attention", "sliding_attention", "full_attention"]}, "layer_types="),
        ("ernie4_5_moe", {"use_bias": True}, "use_bias=True"),
        ("ernie4_5_moe", {"moe_layer_start_index": 0, "moe_layer_interval": 2}, r"blocks \[0, 2\] have no experts"),
        ("lfm2_moe", {"routed_scaling_factor": 2.5}, "routed_scaling_factor=2.5"),
        ("lfm2_moe", {"use_expert_bias": False}, "use_expert_bias=False"),
        (
            "deepseek_v2",
            {"topk_method": "group_limited_greedy", "n_group": 2},
            r"n_group and topk_group=\(2, 1\), but llama.cpp's architecture deepseek2 has \(1, 1\)",
        ),
        ("deepseek_v3", {"rope_interleave": False}, "rope_interleave=False"),
        ("deepseek_v3", {"rms_norm_eps": 1e-5}, r"norm\.eps=.*architecture deepseek2 has"),
        ("deepseek_v3", {"rope_parameters": gguf_models.YARN}, "scaling="),
        ("deepseek_v3", {"num_hidden_layers": 26}, "q_lora_rank, at 26 blocks and 4096 tokens=32"),
        (
            "deepseek_v3",
            {"num_hidden_layers": 48, "vocab_size": 128256},
            "q_lora_rank, at 48 blocks and 128256 tokens=32",
        ),
        ("qwen2_moe", {"head_dim": 32}, "head_dim=32, but llama.cpp's architecture qwen2moe has 16"),
        ("lfm2_moe", {"head_dim": 32}, "head_dim=32"),
        (
            "ernie4_5_moe",
            {"moe_norm_min": 1e-3},
            "moe_norm_min=0.001, but llama.cpp's architecture ernie4_5-moe has 6.1",
        ),
        ("qwen3_next", {"rms_norm_eps": 1e-5}, "rms_norm_eps=1e-05, but llama.cpp's architecture qwen3next has 1e-06"),
        ("qwen3_5_moe_text", {"rms_norm_eps": 1e-4}, "rms_norm_eps=0.0001"),
        ("exaone_moe", {"layer_types": ["full_attention"] * 3}, "some layers with sliding windows=False"),
        ("gpt_oss", {"layer_types": ["full_attention"] * 3}, "some layers with sliding windows=False"),
        ("qwen3_next", {"layer_types": ["full_attention"] * 3}, "some layers without attention=False"),
        ("qwen3_next", {"layer_types": ["linear_attention"] * 3}, "some layers with attention=False"),
        ("qwen3_5_moe_text", {"layer_types": ["linear_attention"] * 3}, "some layers with attention=False"),
        ("lfm2_moe", {"layer_types": ["conv"] * 3}, "some layers with attention=False"),
        ("lfm2_moe", {"layer_types": ["full_attention"] * 3}, "some layers without attention=False"),
        ("granitemoehybrid", {"layer_types": ["mamba"] * 3}, "some layers with attention=False"),
        ("nemotron_h", {"layers_block_type": ["attention", "moe"] * 2}, "some layers without attention=False"),
        ("nemotron_h", {"layers_block_type": ["mamba", "moe"] * 2}, "some layers with attention=False"),
        ("qwen3_next", {"layer_types": ["full_attention", "linear_attention", "full_attention"]}, "layer_types="),
        ("qwen3_next", {"linear_value_head_dim": 32}, "linear_value_head_dim=32"),
        ("qwen3_5_moe_text", {"head_dim": 16}, "mrope_section longer than a head=True"),
        (
            "qwen3_5_moe_text",
            {"rope_parameters": gguf_models.SECTIONED | {"mrope_section": [1, 2, 1], "partial_rotary_factor": 1.0}},
            r"rotated pairs in no mrope_section=\[3",
        ),
        ("granitemoehybrid", {"mamba_n_groups": 2}, "mamba_n_groups=2"),
        ("granitemoehybrid", {"layer_types": ["attention"] * 3}, "some layers without attention=False"),
        ("granitemoehybrid", {"mamba_conv_bias": False}, "mamba_conv_bias=False"),
        ("granitemoehybrid", {"time_step_limit": (0.0, 0.1)}, r"time_step_limit=\(0.0, 0.1\)"),
        ("granitemoehybrid", {"mamba_proj_bias": True}, "in_proj.bias: llama.cpp's architecture granitehybrid has no"),
        ("nemotron_h", {"mlp_hidden_act": "silu"}, "mlp_hidden_act='silu'"),
        ("nemotron_h", {"time_step_limit": (0.0, 0.1)}, r"time_step_limit=\(0.0, 0.1\)"),
        ("nemotron_h", {"use_conv_bias": False}, "use_conv_bias=False"),
        ("nemotron_h", {"use_bias": True}, "in_proj.bias: llama.cpp's architecture nemotron_h_moe has no such"),
        (
            "nemotron_h",
            {"layers_block_type": ["linear_attention", "mlp", "full_attention", "moe"]},
            r"layer_types=\['linear_attention', 'mlp'",
        ),
        ("glm4_moe", {"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ("gpt_oss", {"swiglu_limit": 5.0}, "swiglu_limit=5.0"),
        ("qwen3_moe", {"norm_topk_prob": False}, "norm_topk_prob=False"),
        (
            "qwen3_moe",
            {"rope_parameters": gguf_models.YARN | {"attention_factor": 1.5}},
            r"attention_scaling=1.5, but llama.cpp's architecture qwen3moe has 1.13",
        ),
        ("qwen3_moe", {"rope_parameters": gguf_models.YARN | {"rope_type": "linear"}}, "rope_type='linear'"),
        (
            "qwen3_moe",
            {"rope_parameters": LONG_YARN | {"beta_fast": 16.0}},
            "beta_fast=16.0, but llama.cpp's architecture qwen3moe has 32.0",
        ),
        (
            "gpt_oss",
            {"rope_parameters": LONG_YARN | {"beta_slow": 4.0}},
            "beta_slow=4.0, but llama.cpp's architecture gpt-oss has 1.0",
        ),
        ("qwen3_moe", {"rope_parameters": LONG_YARN | {"truncate": False}}, "truncate=False"),
        ("deepseek_v3", {**gguf_models.EPSILON, "rope_parameters": KIMI_YARN}, "beta_fast=1.0"),
        ("hunyuan_v1_moe", {"attention_bias": True}, "o_proj.bias: llama.cpp's architecture hunyuan-moe has no such"),
    ],
)
def test_other_computations_are_refused(name, changes, message):
    with pytest.raises(ValueError, match=f"(?s){message}.*--format dense"):
        moe = empty(name, **changes)
        plan(moe, {}, architecture_of(moe))


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("deepseek_v3", {"num_hidden_layers": 48}),
        ("deepseek_v3", {"vocab_size": 128256}),
        ("deepseek_v3", {"num_hidden_layers": 27, "q_lora_rank": None}),
        ("ernie4_5_moe", {"moe_norm_min": 6e-5}),
        ("exaone_moe", {"layer_types": ["sliding_attention"] * 3}),
        ("qwen3_moe", {"hidden_act": "swish"}),
        ("qwen3_moe", {"rope_parameters": LONG_YARN | {"beta_fast": 16.0, "factor": 1.0}}),
        ("nemotron_h", {"mamba_hidden_act": "swish"}),
    ],
)
def test_computations_that_are_the_same_are_accepted(name, changes):
    moe = empty(name, **changes)
    assert plan(moe, {}, architecture_of(moe))


def test_hunyuans_alpha_is_a_base_by_both_of_its_names(tmp_path):
    rope = {"rope_theta": 10000.0, "alpha": 1000.0, "factor": 1.0}
    written = [
        keys(empty("hunyuan_v1_moe", rope_parameters=rope | {"rope_type": kind}), tmp_path)
        for kind in ("ntk_alpha", "dynamic")
    ]
    assert written[0] == written[1] and written[1]["rope.freq_base"] == pytest.approx(1e4 * 1000 ** (16 / 14))
    with pytest.raises(ValueError, match="rope_type='dynamic'"):
        architecture_of(empty("hunyuan_v1_moe", rope_parameters=rope | {"rope_type": "dynamic", "alpha": None}))


def test_limits_of_yarn_that_llama_cpp_rounds_are_named():
    with pytest.warns(UserWarning, match="truncate=false"):
        warn_of_rounding(empty("gpt_oss", rope_parameters=gguf_models.YARN | {"truncate": False}))


def rotated_by_llama_cpp(pairs: int, theta: float, original: int, factor: float) -> np.ndarray:
    """Frequencies of `ggml_rope_yarn_corr_dims` and `rope_yarn` at llama.cpp's 32 and 1 turns."""
    start, end = pairs * np.log(original / (2 * np.pi * np.array([32, 1]))) / np.log(theta)
    low, high = max(0, np.floor(start)), min(2 * pairs - 1, np.ceil(end))
    interpolated = np.clip((np.arange(pairs) - low) / max(0.001, high - low), 0, 1)
    return theta ** (-np.arange(pairs) / pairs) * (interpolated / factor + 1 - interpolated)


@pytest.mark.parametrize("name", ["glm4_moe", "qwen3_moe"])
@pytest.mark.parametrize("theta", [1e3, 1.5e5])
@pytest.mark.parametrize("original", [8, 4096])
def test_yarn_is_accepted_where_llama_cpp_rotates_alike(name, theta, original):
    yarn = gguf_models.YARN | {"rope_theta": theta, "original_max_position_embeddings": original}
    yarn |= {"partial_rotary_factor": 0.5 if name == "glm4_moe" else 1.0}
    accepted = set()
    for fast, slow, truncate in itertools.product((1, 24, 31, 32, 64), (0.5, 0.9, 1, 4), (True, False)):
        moe = empty(name, rope_parameters=yarn | {"beta_fast": fast, "beta_slow": slow, "truncate": truncate})
        frequencies = next(module.inv_freq for module in moe.decoder.modules() if hasattr(module, "inv_freq")).numpy()
        expected = rotated_by_llama_cpp(len(frequencies), theta, original, yarn["factor"])
        if np.allclose(frequencies, expected, rtol=1e-5):
            architecture_of(moe)
            accepted.add((fast, slow, truncate))
        else:
            with pytest.raises(ValueError, match="beta_fast|beta_slow|truncate"):
                architecture_of(moe)
    assert (32, 1, True) in accepted and len(accepted) < 40


# --- rows that change places


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """`exported(name)`: the tensors of a file by name, float32, and our decoded model's parameters."""

    def make(name: str) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        folder = tmp_path_factory.mktemp(name)
        gguf_models.build(name).save_pretrained(folder / "original")
        gguf_models.tokenizer().save_pretrained(folder / "original")
        compress(folder / "original", folder / "compressed", symmetric=True)
        export(str(folder / "compressed"), str(folder / "out"), "gguf")
        reader = gguf.GGUFReader(folder / "out" / "model.gguf")
        stored = {t.name: gguf.dequantize(t.data, t.tensor_type).reshape(t.shape[::-1]) for t in reader.tensors}
        state = load(folder / "compressed", packed=False).state_dict()
        return stored, {name: tensor.numpy() for name, tensor in state.items()}

    return make


def test_gate_and_up_of_gpt_oss_alternate_in_columns(exported):
    stored, state = exported("gpt_oss")
    both = state["model.layers.1.mlp.experts.gate_up_proj"].swapaxes(1, 2)
    np.testing.assert_array_equal(stored["blk.1.ffn_gate_exps.weight"], both[:, 0::2])
    np.testing.assert_array_equal(stored["blk.1.ffn_up_exps.weight"], both[:, 1::2])
    biases = state["model.layers.1.mlp.experts.gate_up_proj_bias"]
    np.testing.assert_array_equal(stored["blk.1.ffn_up_exps.bias"], biases[:, 1::2])
    down = state["model.layers.1.mlp.experts.down_proj"].swapaxes(1, 2)
    np.testing.assert_array_equal(stored["blk.1.ffn_down_exps.weight"], down)
    np.testing.assert_array_equal(stored["blk.1.attn_sinks.weight"], state["model.layers.1.self_attn.sinks"])


def test_the_bias_that_llama_cpp_requires_of_gpt_oss_is_zero_where_the_model_has_none(exported):
    stored, state = exported("gpt_oss-plain")
    assert not [name for name in state if "self_attn" in name and name.endswith("bias")]
    np.testing.assert_array_equal(stored["blk.1.attn_output.bias"], np.zeros(64))
    np.testing.assert_array_equal(stored["blk.1.attn_output.weight"], state["model.layers.1.self_attn.o_proj.weight"])
    assert "blk.1.attn_q.bias" not in stored


def test_keys_and_values_of_latent_attention_are_split_by_head(exported):
    """As in llama.cpp's conversion: 4 heads, each with 16 rows of its key and 16 of its value."""
    stored, state = exported("deepseek_v3")
    heads = state["model.layers.1.self_attn.kv_b_proj.weight"].reshape(4, 32, 32)
    np.testing.assert_array_equal(stored["blk.1.attn_v_b.weight"], heads[:, 16:])
    keys = heads[:, :16].swapaxes(1, 2).astype(np.float16)
    np.testing.assert_array_equal(stored["blk.1.attn_k_b.weight"], keys.astype(np.float32))
    bias = state["model.layers.1.mlp.gate.e_score_correction_bias"]
    np.testing.assert_array_equal(stored["blk.1.exp_probs_b.bias"], bias)


VALUE_HEADS = [0, 2, 1, 3]  # of each round over the key heads: in the model the two of a key head are adjacent


def test_value_heads_of_qwen3_5_are_in_rounds_over_the_key_heads(exported):
    """As in llama.cpp's conversion: 4 value heads of 32, and 2 key heads."""
    stored, state = exported("qwen3_5_moe_text")
    parts = {name.rpartition("linear_attn.")[2]: t for name, t in state.items() if "layers.0.linear_attn" in name}
    out = parts["out_proj.weight"].reshape(64, 4, 32)[:, VALUE_HEADS].reshape(64, 128)
    np.testing.assert_array_equal(stored["blk.0.ssm_out.weight"], out)
    for name, parameter in {"attn_qkv.weight": "in_proj_qkv.weight", "ssm_conv1d.weight": "conv1d.weight"}.items():
        keys, values = np.split(parts[parameter].reshape(256, -1), 2)
        values = values.reshape(4, 32, -1)[VALUE_HEADS].reshape(keys.shape)
        np.testing.assert_array_equal(stored[f"blk.0.{name}"], np.concatenate([keys, values]))
    gates = parts["in_proj_z.weight"].reshape(4, 32, 64)[VALUE_HEADS].reshape(128, 64)
    np.testing.assert_array_equal(stored["blk.0.attn_gate.weight"], gates)
    np.testing.assert_array_equal(stored["blk.0.ssm_alpha.weight"], parts["in_proj_a.weight"][VALUE_HEADS])
    np.testing.assert_array_equal(stored["blk.0.ssm_dt.bias"], parts["dt_bias"][VALUE_HEADS])


@pytest.mark.slow
def test_columns_of_value_heads_that_share_a_block_are_written_as_float16(exported):
    stored, state = exported("qwen3_5_moe_text-cut")  # heads of 16 in blocks of 32
    out = state["model.layers.0.linear_attn.out_proj.weight"].reshape(64, 4, 16)[:, VALUE_HEADS].reshape(64, 64)
    np.testing.assert_array_equal(stored["blk.0.ssm_out.weight"], out.astype(np.float16).astype(np.float32))
