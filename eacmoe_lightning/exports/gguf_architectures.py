"""How llama.cpp computes each model type: the table behind GGUF exports.

For each architecture, llama.cpp has a fixed computation (`src/models/*.cpp`; read in llama-cpp-python 0.3.36) and reads
some of its options from keys of the file (`gguf_keys.py`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

SOFTMAX, SIGMOID = 1, 2  # values of llama.cpp's expert_gating_func
QKV = ("attn_q", "attn_k", "attn_v")


@dataclass(frozen=True)
class Architecture:
    """How llama.cpp computes a model type.

    Attributes:
        name: llama.cpp's name for the architecture.
        reorders: whether transformers rotates the two halves of a head where llama.cpp rotates adjacent rows. The rows
            of the query and key projections are then reordered.
        partial_rotary: whether a part of each head may stay as it is.
        latent: whether keys and values are made of a latent vector (DeepSeek's MLA).
        multi_head: whether each query head must have a key and value head of its own.
        full_width: whether the query heads together must be as wide as the model.
        layers: the kinds of layers that there may be.
        rotates_sliding: whether layers with sliding windows alone rotate, all but each fourth.
        recurrent: what the layers without attention are, if they hold a state space: `delta net`, where one in every so
            many layers has full attention, or `mamba`.
        separate: whether a layer is either attention, a state space or experts.
        leading_dense: whether the first blocks may be dense.
        gating: the key for what turns the router's logits into scores; None: there is none.
        normalizes: whether the weights of the selected experts are divided by their sum; None: a key says so.
        scales: whether a key has a factor for these weights.
        grouped: whether keys have groups of experts, which are ranked by the sum of their two best scores.
        alternates: whether the rows of gate and up alternate in memory.
        norms_less_one: whether the model has the weights of norms less 1.
        tiles_values: whether linear attention's value head n belongs to key head n modulo their number; in the model
            those of a key head are adjacent.
        biases: the linears and experts whose biases are added.
        needs_biases: those of these linears that the file must have, if only as zeros.
        needs_head: whether the file must have an output matrix where it equals the embedding.
        prefix: what names of parameters begin with in the `gguf` package's tables, in place of `model`.
        expects: options of the config, and their values in llama.cpp's computation.
        keys: further keys: name of the writer's method without `add_` -> option of the config, or a constant. Options
            that are None are left out.
    """

    name: str
    reorders: bool = False
    partial_rotary: bool = False
    latent: bool = False
    multi_head: bool = False
    full_width: bool = False
    layers: tuple[str, ...] = ("full_attention",)
    rotates_sliding: bool = False
    recurrent: str | None = None
    separate: bool = False
    leading_dense: bool = False
    gating: int | None = None
    normalizes: bool | None = True
    scales: bool = False
    grouped: bool = False
    alternates: bool = False
    norms_less_one: bool = False
    tiles_values: bool = False
    biases: tuple[str, ...] = QKV
    needs_biases: tuple[str, ...] = ()
    needs_head: bool = False
    prefix: str = "model"
    expects: Mapping[str, Any] = field(default_factory=dict)
    keys: Mapping[str, str | int] = field(default_factory=dict)


DEEPSEEK_ROUTER = {"gating": SIGMOID, "normalizes": None, "scales": True, "grouped": True}
DEEPSEEK_V3 = {"leading_dense": True, **DEEPSEEK_ROUTER}
GRANITE = Architecture(
    "granitemoe",
    reorders=True,
    biases=(*QKV, "attn_output"),
    keys={
        "logit_scale": "logits_scaling",
        "residual_scale": "residual_multiplier",
        "embedding_scale": "embedding_multiplier",
        "attention_scale": "attention_multiplier",
    },
)
DELTA_NET = {
    "partial_rotary": True,
    "layers": ("full_attention", "linear_attention"),
    "recurrent": "delta net",
    "expects": {"rms_norm_eps": 1e-6},  # llama.cpp's norm of linear attention's queries and keys has the same epsilon
    "norms_less_one": True,
    "keys": {
        "ssm_conv_kernel": "linear_conv_kernel_dim",
        "ssm_state_size": "linear_key_head_dim",
        "ssm_group_count": "linear_num_key_heads",
        "ssm_time_step_rank": "linear_num_value_heads",
    },
}
ARCHITECTURES = {  # by transformers' model_type
    "mixtral": Architecture("llama", reorders=True),
    "qwen2_moe": Architecture("qwen2moe", full_width=True, normalizes=False, needs_head=True),
    "qwen3_moe": Architecture("qwen3moe"),
    "deepseek": Architecture("deepseek", reorders=True, full_width=True, leading_dense=True, normalizes=False),
    "deepseek_v2": Architecture(
        "deepseek2", latent=True, leading_dense=True, gating=SOFTMAX, normalizes=False, scales=True
    ),
    "deepseek_v3": Architecture("deepseek2", latent=True, **DEEPSEEK_V3, expects={"rope_interleave": True}),
    "glm4_moe": Architecture("glm4moe", partial_rotary=True, **DEEPSEEK_V3),
    "solar_open": Architecture("glm4moe", partial_rotary=True, **DEEPSEEK_V3),
    "glm4_moe_lite": Architecture("deepseek2", latent=True, **DEEPSEEK_V3, expects={"rope_interleave": True}),
    "dots1": Architecture("dots1", multi_head=True, needs_head=True, **DEEPSEEK_V3),
    "gpt_oss": Architecture(
        "gpt-oss",
        layers=("full_attention", "sliding_attention"),
        alternates=True,
        biases=(*QKV, "attn_output", "ffn_gate_inp", "ffn_gate_exps", "ffn_up_exps", "ffn_down_exps"),
        needs_biases=("attn_output",),
        needs_head=True,
        expects={"swiglu_alpha": 1.702, "swiglu_limit": 7.0},
    ),
    "olmoe": Architecture(
        "olmoe", multi_head=True, full_width=True, normalizes=False, needs_head=True, expects={"clip_qkv": None}
    ),
    "granitemoe": GRANITE,
    "granitemoeshared": GRANITE,
    "granitemoehybrid": replace(
        GRANITE,
        name="granitehybrid",
        layers=("full_attention", "attention", "linear_attention", "mamba"),  # the names of all versions
        recurrent="mamba",
        biases=(*GRANITE.biases, "ssm_conv1d"),
        expects={
            "mamba_expand": 2,
            "mamba_n_groups": 1,
            "mamba_conv_bias": True,
            "time_step_limit": (0.0, math.inf),
        },
        keys={
            **GRANITE.keys,
            "ssm_conv_kernel": "mamba_d_conv",
            "ssm_state_size": "mamba_d_state",
            "ssm_group_count": "mamba_n_groups",
            "ssm_time_step_rank": "mamba_n_heads",
        },
    ),
    "ernie4_5_moe": Architecture(
        "ernie4_5-moe", leading_dense=True, expects={"use_bias": False}, keys={"interleave_moe_layer_step": 1}
    ),
    "hunyuan_v1_moe": Architecture("hunyuan-moe"),
    "minimax_m2": Architecture("minimax-m2", partial_rotary=True, gating=SIGMOID, needs_head=True),
    "lfm2_moe": Architecture(
        "lfm2moe",
        full_width=True,
        layers=("full_attention", "conv"),
        leading_dense=True,
        gating=SIGMOID,
        expects={"use_expert_bias": True, "conv_bias": False},
        keys={"shortconv_l_cache": "conv_L_cache"},
    ),
    "qwen3_next": Architecture("qwen3next", **DELTA_NET),
    "qwen3_5_moe_text": Architecture("qwen35moe", **DELTA_NET, tiles_values=True),
    "afmoe": Architecture(
        "afmoe",
        layers=("full_attention", "sliding_attention"),
        rotates_sliding=True,
        leading_dense=True,
        gating=SIGMOID,
        expects={"mup_enabled": True, "score_func": "sigmoid"},
        keys={"expert_weights_norm": True, "expert_weights_scale": "route_scale"},
    ),
    "nemotron_h": Architecture(
        "nemotron_h_moe",
        layers=("full_attention", "attention", "linear_attention", "mamba", "moe"),  # the names of all versions
        recurrent="mamba",
        separate=True,
        biases=("ssm_conv1d",),
        prefix="backbone",
        **DEEPSEEK_ROUTER,
        expects={
            "mlp_hidden_act": "relu2",
            "mamba_hidden_act": "silu",
            "use_conv_bias": True,
            "time_step_limit": (0.0, math.inf),
            "residual_in_fp32": False,
        },
        keys={
            "layer_norm_eps": "layer_norm_epsilon",
            "expert_shared_count": "n_shared_experts",
            "moe_latent_size": "moe_latent_size",
            "ssm_conv_kernel": "conv_kernel",
            "ssm_state_size": "ssm_state_size",
            "ssm_group_count": "n_groups",
            "ssm_time_step_rank": "mamba_num_heads",
        },
    ),
    "exaone_moe": Architecture(
        "exaone-moe", layers=("full_attention", "sliding_attention"), needs_head=True, **DEEPSEEK_V3
    ),
}
