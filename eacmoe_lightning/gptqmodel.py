"""Which linears of each model type GPTQModel loads packed.

GPTQModel builds transformers' modules, splits stacks of experts into a linear for each expert, and replaces the linears
that its definition of the model type names by packed ones. Where it takes a linear for an ordinary one, it ignores the
packed tensors and computes with uninitialised weights, without an error. So an export packs what is listed here and
nothing else, and types whose experts are not packed are refused: they have no definition, or one with the module names
of older versions of transformers.

From GPTQModel 7.7.0 with defuser 0.0.28, which splits the experts: `simple_layer_modules` of its definitions, and runs
of tiny models with transformers 5.24 (`python benchmarks/export_check.py --engines gptqmodel --cases --families all`),
Llama 4 with images with 5.23.
"""

from __future__ import annotations

import re

VERSION = "GPTQModel 7.7.0"

_QKVO = r"self_attn\.[qkvo]_proj"
_LATENT = r"self_attn\.(q_proj|q_a_proj|q_b_proj|kv_a_proj_with_mqa|kv_b_proj|o_proj)"
_LATENT_INDEXED = rf"{_LATENT}|self_attn\.indexer\.(wk|wq_b)"
_DELTA_NET = r"linear_attn\.(in_proj_qkv|in_proj_z|out_proj)"
_GATED = r"(gate|up|down)_proj"
_DENSE = rf"mlp\.{_GATED}"
_SHARED = rf"mlp\.shared_experts\.{_GATED}"
_LLAMA4 = rf"feed_forward\.(experts\.\d+|shared_expert)\.{_GATED}"
_EXPERTS = rf"mlp\.experts\.\d+\.{_GATED}"


def _layers(*parts: str, path: str = "model.layers") -> re.Pattern[str]:
    return re.compile(rf"{re.escape(path)}\.\d+\.({'|'.join(parts)})")


_WRAPPED = "model.language_model.layers"

FAILS = dict.fromkeys(  # loaded, but not run, by model type
    ("glm4_moe", "glm4_moe_lite"),
    f"{VERSION} loads this model, but its forward pass fails, because the router of transformers returns a tuple from "
    "5.13 on: try it with a newer release before you ship it",
)

PACKED: dict[str, re.Pattern[str]] = {  # by transformers' model_type; module names with stacks of experts split
    "axk2": _layers(
        r"self_attn\.(q_a_proj|kv_a_proj_with_mqa|q_gate_proj|kv_b_proj|o_proj)", _DENSE, _SHARED, _EXPERTS
    ),
    "cohere2_moe": _layers(_QKVO, _DENSE, _EXPERTS),
    "deepseek_v2": _layers(_LATENT, _DENSE, _SHARED, _EXPERTS),
    "deepseek_v3": _layers(_LATENT, _DENSE, _SHARED, _EXPERTS),
    "deepseek_v32": _layers(_LATENT_INDEXED, _DENSE, _SHARED, _EXPERTS),
    "deepseek_v4": _layers(r"self_attn\.(q_a_proj|q_b_proj|o_b_proj|kv_proj)", _SHARED, _EXPERTS),
    "dots1": _layers(_QKVO, _DENSE, _SHARED, _EXPERTS),
    "ernie4_5_moe": _layers(_QKVO, _DENSE, _SHARED, _EXPERTS),
    "glm4_moe": _layers(_QKVO, _DENSE, _SHARED, _EXPERTS),
    "glm4_moe_lite": _layers(_LATENT, _DENSE, _SHARED, _EXPERTS),
    "glm4v_moe": _layers(_QKVO, _DENSE, _SHARED, _EXPERTS, path=_WRAPPED),
    "glm_moe_dsa": _layers(_LATENT_INDEXED, _DENSE, _SHARED, _EXPERTS),
    "gpt_oss": _layers(_QKVO, _EXPERTS),
    "hunyuan_v1_moe": _layers(_QKVO, rf"mlp\.shared_mlp\.{_GATED}", _EXPERTS),
    "hy_v3": _layers(_QKVO, _DENSE, _SHARED, _EXPERTS),
    "inkling_mm_model": _layers(r"self_attn\.[qkvro]_proj", _DENSE, _EXPERTS, path=_WRAPPED),
    "laguna": _layers(_QKVO, _DENSE, rf"mlp\.shared_experts?\.{_GATED}", _EXPERTS),
    "llama4": _layers(_QKVO, _LLAMA4, path="language_model.model.layers"),
    "llama4_text": _layers(_QKVO, _LLAMA4),
    "minimax_m3_vl": _layers(
        _QKVO, r"self_attn\.indexer\.[qk]_proj", r"mlp\.(shared_experts\.)?(gate_up|down)_proj", _EXPERTS, path=_WRAPPED
    ),
    "mixtral": _layers(_QKVO, _EXPERTS),
    "olmoe": _layers(_QKVO, _EXPERTS),
    "phimoe": _layers(_QKVO, _EXPERTS),
    "qwen2_moe": _layers(_QKVO, rf"mlp\.shared_expert\.{_GATED}", _EXPERTS),
    "qwen3_5_moe": _layers(_QKVO, _DELTA_NET, rf"mlp\.shared_expert\.{_GATED}", _EXPERTS, path=_WRAPPED),
    "qwen3_5_moe_text": _layers(_QKVO, _DELTA_NET, rf"mlp\.shared_expert\.{_GATED}", _EXPERTS),
    "qwen3_moe": _layers(_QKVO, _EXPERTS),
    "qwen3_next": _layers(_QKVO, r"linear_attn\.(in_proj_qkvz|out_proj)", rf"mlp\.shared_expert\.{_GATED}", _EXPERTS),
    "qwen3_vl_moe": _layers(_QKVO, _EXPERTS, path=_WRAPPED),
    "qwen4_exp_text": _layers(_QKVO, _DELTA_NET, rf"mlp\.shared_expert\.{_GATED}", _EXPERTS),
    "solar_open": _layers(_QKVO, _SHARED, _EXPERTS),
}
