"""Tiny random models of every type that llama.cpp runs, with the settings that it computes.

`CHANGES` is what differs from `architectures.SETTINGS`, whose models have options that llama.cpp lacks.
"""

from typing import Any

import architectures
import tiny_models
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from eacmoe_lightning.exports.gguf_architectures import ARCHITECTURES
from eacmoe_lightning.models.originals import BUNDLED

YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
SECTIONED = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5, "mrope_section": [2, 1, 1]}
FULL = {"layer_types": ["full_attention"] * 3, "sliding_window": None}
EPSILON = {"rms_norm_eps": 1e-6}  # that of the norms of latent vectors, which no option sets
NO_GROUPS = {"topk_method": "greedy", "n_group": 1, "topk_group": 1}
CHANGES: dict[str, dict[str, Any]] = {
    "afmoe": dict(num_hidden_layers=4, layer_types=["sliding_attention"] * 3 + ["full_attention"]),
    "deepseek_v2": dict(**NO_GROUPS, **EPSILON),
    "deepseek_v2-yarn": dict(**NO_GROUPS, q_lora_rank=None, **EPSILON,
                             rope_parameters=YARN | {"mscale": 0.7, "mscale_all_dim": 0.7}),
    "deepseek_v3": EPSILON,
    "deepseek_v3-yarn": dict(**EPSILON, rope_parameters=YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}),
    "dots1": dict(num_key_value_heads=4, **FULL),
    "ernie4_5_moe": dict(use_bias=False),
    "granitemoehybrid-rope": dict(position_embedding_type="rope"),
    "glm4_moe-plain": dict(use_qk_norm=False, attention_bias=True, norm_topk_prob=False, n_group=1, topk_group=1),
    "glm4_moe_lite": EPSILON,
    "gpt_oss-plain": dict(rope_parameters=YARN, attention_bias=False),
    "gpt_oss-yarn": dict(rope_parameters=YARN),
    "hunyuan_v1_moe-alpha": dict(rope_parameters={"rope_type": "ntk_alpha", "rope_theta": 10000.0, "alpha": 1000.0}),
    "lfm2_moe": dict(routed_scaling_factor=1.0, tie_word_embeddings=True),
    "minimax_m2": dict(rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}),
    "nemotron_h-latent": dict(moe_latent_size=32),
    "olmoe": dict(clip_qkv=None, num_key_value_heads=4),
    "olmoe-tied": dict(clip_qkv=None, num_key_value_heads=4, tie_word_embeddings=True),
    "qwen2_moe-tied": dict(tie_word_embeddings=True),
    "qwen3_5_moe_text": dict(head_dim=32, linear_key_head_dim=32, linear_value_head_dim=32),
    "qwen3_5_moe_text-cut": dict(rope_parameters=SECTIONED),
    "qwen3_next": dict(mlp_only_layers=[], norm_topk_prob=True),
    "qwen3_moe-yarn": dict(rope_parameters=YARN),
    "solar_open": dict(rope_parameters={"rope_type": "default", "rope_theta": 1e6, "partial_rotary_factor": 1.0}),
}  # fmt: skip
NAMES = sorted({*CHANGES, *ARCHITECTURES})


def config_of(name: str, **changes) -> PreTrainedConfig:
    """The configuration of a type, or of one with a variant after a dash."""
    kind = name.partition("-")[0]
    settings = {**tiny_models.COMMON, **architectures.SETTINGS[kind], **CHANGES.get(name, {}), **changes}
    return AutoConfig.for_model(kind, **settings)


def build(name: str) -> PreTrainedModel:
    """A random float32 model in eval mode."""
    return architectures.build_from(config_of(name))


def tokenizer() -> PreTrainedTokenizerBase:
    """The bundled one."""
    return AutoTokenizer.from_pretrained(BUNDLED)
