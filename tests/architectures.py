"""A tiny random model of every causal MoE type of transformers, so that each can be fitted, loaded and exported.

Each type gets what makes it differ from the others: dense blocks before sparse ones, layers of several kinds, windows
of attention shorter than the text, groups of experts, correction biases and scaling factors other than 1. Types that
this version of transformers does not have are left out.
"""

import re
from typing import Any

import tiny_models
import torch
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

LATENT = {  # multi-head latent attention
    "num_key_value_heads": 4,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 32,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
}
INDEXER = {"index_topk": 16, "index_head_dim": 32, "index_n_heads": 4}  # attention to the 16 best tokens
ROUTED = {"num_experts_per_tok": 2, "moe_intermediate_size": 64, "intermediate_size": 128}
N_ROUTED = {**ROUTED, "n_routed_experts": 8, "n_shared_experts": 1}
GROUPS = {"n_group": 2, "topk_group": 1, "norm_topk_prob": True, "routed_scaling_factor": 2.5}
GRANITE = {
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "intermediate_size": 64,
    "logits_scaling": 6.0,
    "embedding_multiplier": 12.0,
    "residual_multiplier": 0.22,
    "attention_multiplier": 0.0625,
}
DELTA_NET = {
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
DENSE_FIRST = {"mlp_layer_types": ["dense", "sparse", "sparse"]}
SLIDING = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"], "sliding_window": 24}
HYBRID = {"layer_types": ["linear_attention", "full_attention", "linear_attention"]}
MAMBA = {"mamba_n_heads": 32, "mamba_d_head": 4, "mamba_d_state": 16, "mamba_chunk_size": 32}
NEMOTRON = {
    **N_ROUTED,
    **GROUPS,
    "head_dim": 16,
    "layers_block_type": ["mamba", "moe", "attention", "moe"],
    "num_hidden_layers": 4,
    "moe_shared_expert_intermediate_size": 128,
    "ssm_state_size": 16,
    "mamba_num_heads": 32,
    "mamba_head_dim": 4,
    "n_groups": 2,
    "chunk_size": 32,
    "use_mamba_kernels": False,
}

# What differs from `tiny_models.COMMON`, by name of the architecture: a model type, or one with a variant after a dash.
SETTINGS: dict[str, dict[str, Any]] = {
    "afmoe": dict(**ROUTED, **SLIDING, head_dim=16, num_experts=8, num_shared_experts=1, num_dense_layers=1,
                  route_scale=2.5, mup_enabled=True),
    "aria_text": dict(intermediate_size=64, head_dim=16, moe_num_experts=8, moe_topk=2, moe_num_shared_experts=2),
    "axk1": dict(**LATENT, **N_ROUTED, **GROUPS, **DENSE_FIRST),
    "axk2": dict(**LATENT, **N_ROUTED, **GROUPS, **DENSE_FIRST, **INDEXER, head_dim=16, gated_norm_rank=16),
    "bailing_hybrid": dict(**{**LATENT, "q_lora_rank": None}, **ROUTED, num_local_experts=8, n_shared_experts=1,
                           num_experts=8, **GROUPS, **DENSE_FIRST, **HYBRID, head_dim=16, num_mtp_layers=0),
    "beam": dict(**ROUTED, **SLIDING, **GROUPS, **DENSE_FIRST, head_dim=16, num_experts=8),
    "cohere2_moe": dict(**SLIDING, **DENSE_FIRST, intermediate_size=64, head_dim=16, num_experts=8,
                        num_experts_per_tok=2, num_shared_experts=1, prefix_dense_intermediate_size=128,
                        expert_selection_fn="sigmoid", logit_scale=0.5),
    "dbrx": dict(d_model=64, n_heads=4, n_layers=3, max_seq_len=4096,
                 attn_config={"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
                 rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
                 ffn_config={"ffn_hidden_size": 64, "moe_num_experts": 8, "moe_top_k": 2}),
    "deepseek": dict(intermediate_size=192, moe_intermediate_size=64, n_routed_experts=8, n_shared_experts=2,
                     num_experts_per_tok=3, first_k_dense_replace=1, num_key_value_heads=4),
    "deepseek_v2": dict(**LATENT, **N_ROUTED, n_group=2, topk_group=1, topk_method="group_limited_greedy",
                        routed_scaling_factor=2.5, first_k_dense_replace=1),
    "deepseek_v3": dict(**LATENT, **N_ROUTED, **GROUPS, first_k_dense_replace=1),
    "deepseek_v32": dict(**LATENT, **N_ROUTED, **GROUPS, **INDEXER, **DENSE_FIRST),
    "deepseek_v4": dict(num_experts_per_tok=2, moe_intermediate_size=64, n_routed_experts=8, n_shared_experts=1,
                        num_hidden_layers=4, num_key_value_heads=1, head_dim=32, qk_rope_head_dim=16, q_lora_rank=32,
                        mlp_layer_types=["hash_moe", "moe", "moe", "moe"], sliding_window=24, o_groups=2,
                        o_lora_rank=32, hc_mult=2,
                        layer_types=["sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention",
                                     "sliding_attention"],
                        compress_rates={"compressed_sparse_attention": 4, "heavily_compressed_attention": 16},
                        **{**INDEXER, "index_topk": 4}),
    "doge": dict(is_moe=True, intermediate_size=128, num_experts=64, num_experts_per_tok=4, keep_window_size=64),
    "dots1": dict(**N_ROUTED, **GROUPS, **SLIDING, first_k_dense_replace=1),
    "dots3_note_text": dict(**LATENT, **N_ROUTED, **GROUPS, **DENSE_FIRST, **INDEXER,
                            shared_experts_intermediate_size=64, sliding_window=24, swa_num_attention_heads=4,
                            swa_num_key_value_heads=4, swa_q_lora_rank=32, swa_kv_lora_rank=32, swa_head_dim=48,
                            swa_qk_nope_head_dim=16, swa_v_head_dim=16),
    "ernie4_5_moe": dict(intermediate_size=128, moe_intermediate_size=64, moe_num_experts=8, moe_k=2,
                         moe_num_shared_experts=1, moe_layer_start_index=1, use_bias=True),
    "exaone_moe": dict(**ROUTED, **GROUPS, **SLIDING, **DENSE_FIRST, num_experts=8, num_shared_experts=1),
    "flex_olmo": dict(num_experts_per_tok=2, num_experts=8, intermediate_size=64, norm_topk_prob=True),
    "flint": dict(**ROUTED, **SLIDING, shared_expert_intermediate_size=64, num_experts=8, mlp_only_layers=[0],
                  head_dim=16),
    "gemma4_text": dict(num_hidden_layers=4, intermediate_size=128, head_dim=16, global_head_dim=32, sliding_window=24,
                        layer_types=["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
                        vocab_size_per_layer_input=4096, hidden_size_per_layer_input=32, num_kv_shared_layers=2,
                        enable_moe_block=True, num_experts=8, top_k_experts=2, moe_intermediate_size=64,
                        final_logit_softcapping=30.0, tie_word_embeddings=True),
    "glm4_moe": dict(**N_ROUTED, **GROUPS, head_dim=16, first_k_dense_replace=1, use_qk_norm=True, num_mtp_layers=0),
    "glm4_moe_lite": dict(**LATENT, **N_ROUTED, **GROUPS, **DENSE_FIRST),
    "glm_moe_dsa": dict(**LATENT, **N_ROUTED, **GROUPS, **INDEXER, **DENSE_FIRST,
                        indexer_types=["full", "shared", "full"]),
    "gpt_oss": dict(**SLIDING, num_local_experts=8, num_experts_per_tok=2, intermediate_size=64, head_dim=16),
    "granitemoe": GRANITE,
    "granitemoe_swa": dict(**GRANITE, **SLIDING, shared_intermediate_size=128),
    "granitemoehybrid": dict(**GRANITE, **MAMBA, shared_intermediate_size=128,
                             layer_types=["mamba", "attention", "mamba"]),
    "granitemoeshared": dict(**GRANITE, shared_intermediate_size=128),
    "hunyuan_v1_moe": dict(intermediate_size=64, head_dim=16, num_experts=8, moe_topk=2),
    "hy_v3": dict(**ROUTED, **DENSE_FIRST, head_dim=16, num_experts=8, num_shared_experts=1,
                  router_scaling_factor=2.5),
    "hy_v4": dict(**LATENT, **N_ROUTED, **GROUPS, **INDEXER, **DENSE_FIRST, hc_mult=2,
                  indexer_types=["full", "shared", "full"]),
    "inkling2_loop_text": dict(num_hidden_layers=6, head_dim=16, swa_num_attention_heads=4, swa_num_key_value_heads=2,
                               swa_head_dim=16, sliding_window_size=24, d_rel=4, rel_extent=32,
                               moe_intermediate_size=64, n_routed_experts=8, num_experts_per_tok=2,
                               n_layers_per_attn_res_block=2, unpadded_vocab_size=4090, log_scaling_n_floor=32,
                               layer_types=["hybrid_sliding", "hybrid"] * 3,
                               loop_layer_index_start=2, loop_layer_index_end=4, loop_num_passes=2, loop_gate_rank=8),
    "inkling2_text": dict(num_hidden_layers=4, head_dim=16, swa_num_attention_heads=4, swa_num_key_value_heads=2,
                          swa_head_dim=16, sliding_window_size=24, d_rel=4, rel_extent=32, moe_intermediate_size=64,
                          n_routed_experts=8, num_experts_per_tok=2, n_layers_per_attn_res_block=2,
                          layer_types=["hybrid_sliding", "hybrid", "hybrid_sliding", "hybrid"],
                          unpadded_vocab_size=4090, log_scaling_n_floor=32),
    "inkling_text": dict(head_dim=16, swa_num_attention_heads=4, swa_num_key_value_heads=2, swa_head_dim=16,
                         sliding_window_size=24, d_rel=4, rel_extent=32, moe_intermediate_size=64,
                         intermediate_size=128, n_routed_experts=8, n_shared_experts=2, num_experts_per_tok=2,
                         layer_types=["hybrid_sliding", "hybrid", "hybrid_sliding"], **DENSE_FIRST,
                         logits_mup_width_multiplier=2.0, unpadded_vocab_size=4090, log_scaling_n_floor=32),
    "jamba": dict(num_hidden_layers=4, intermediate_size=64, num_experts=8, num_experts_per_tok=2,
                  expert_layer_period=2, expert_layer_offset=1, attn_layer_period=2, attn_layer_offset=1,
                  mamba_d_state=16, use_mamba_kernels=False),
    "jetmoe": dict(kv_channels=16, intermediate_size=64, num_local_experts=8, num_experts_per_tok=2),
    "kimi_linear": dict(**{**LATENT, "q_lora_rank": None}, **ROUTED, **GROUPS, **DENSE_FIRST, **HYBRID,
                        num_local_experts=8, n_shared_experts=1, linear_head_dim=16, linear_num_heads=4),
    "kolibri1": dict(**SLIDING, num_experts_per_tok=2, moe_intermediate_size=64, shared_expert_intermediate_size=64,
                     num_experts=8, head_dim=16),
    "laguna": dict(**ROUTED, **SLIDING, **DENSE_FIRST, shared_expert_intermediate_size=64, num_experts=8, head_dim=16,
                   moe_routed_scaling_factor=2.5, num_attention_heads_per_layer=[4, 2, 4]),
    "laguna-capped": dict(**ROUTED, num_experts=8, head_dim=16, moe_router_logit_softcapping=0.5),
    "lfm2_moe": dict(**ROUTED, num_experts=8, num_dense_layers=1, routed_scaling_factor=2.5,
                     layer_types=["conv", "full_attention", "conv"]),
    "lara_mini": dict(**ROUTED, **DELTA_NET, head_dim=16, num_experts=8, shared_expert_intermediate_size=64,
                      layer_types=["linear_attention", "sliding_attention", "full_attention"], sliding_window=24,
                      tie_word_embeddings=True),
    "llama4_text": dict(num_hidden_layers=4, head_dim=16, intermediate_size=64, intermediate_size_mlp=128,
                        num_local_experts=8, num_experts_per_tok=2, interleave_moe_layer_step=2,
                        no_rope_layers=[1, 1, 1, 0], attention_chunk_size=32),
    "longcat_flash": dict(num_layers=2, num_hidden_layers=4, **LATENT, head_dim=32, ffn_hidden_size=128,
                          expert_ffn_hidden_size=64, n_routed_experts=8, zero_expert_num=4, moe_topk=3,
                          routed_scaling_factor=6.0),
    "mellum": dict(**ROUTED, **SLIDING, **DENSE_FIRST, num_experts=8, head_dim=16),
    "mimo_v2_flash": dict(**ROUTED, **GROUPS, **SLIDING, **DENSE_FIRST, n_routed_experts=8, head_dim=32,
                          v_head_dim=16),
    "minimax": dict(**HYBRID, intermediate_size=64, head_dim=16, num_local_experts=8, num_experts_per_tok=2,
                    block_size=32, linear_attn_alpha_factor=1.5, mlp_alpha_factor=1.5),
    "minimax_m2": dict(head_dim=16, intermediate_size=64, num_local_experts=8, num_experts_per_tok=2),
    "minimax_m3_vl_text": dict(head_dim=32, intermediate_size=64, num_local_experts=8, num_experts_per_tok=2,
                               dense_intermediate_size=128, shared_intermediate_size=64, rotary_dim=16,
                               routed_scaling_factor=2.0, **DENSE_FIRST, index_n_heads=2, index_head_dim=32,
                               index_block_size=8, index_topk_blocks=2),
    "mixtral": dict(intermediate_size=64, num_local_experts=8, num_experts_per_tok=2),
    "nemotron_h": NEMOTRON,
    "nemotron_h-latent": dict(**NEMOTRON, moe_latent_size=32),
    "olmoe": dict(intermediate_size=64, num_experts=8, num_experts_per_tok=2, clip_qkv=8.0),
    "phimoe": dict(intermediate_size=64, num_local_experts=8, num_experts_per_tok=2, attention_bias=True,
                   lm_head_bias=True),
    "qwen2_moe": dict(**ROUTED, shared_expert_intermediate_size=128, num_experts=8),
    "qwen3_5_moe_text": dict(**DELTA_NET, **HYBRID, head_dim=16, moe_intermediate_size=64, num_experts=8,
                             shared_expert_intermediate_size=64, num_experts_per_tok=2),
    "qwen3_moe": dict(**ROUTED, head_dim=16, num_experts=8, norm_topk_prob=True, tie_word_embeddings=True),
    "qwen3_next": dict(**ROUTED, **DELTA_NET, **HYBRID, head_dim=16, shared_expert_intermediate_size=64,
                       num_experts=8, mlp_only_layers=[0]),
    "qwen4_exp_text": dict(**DELTA_NET, layer_types=["linear_attention", "indexed_attention", "linear_attention"],
                           head_dim=16, moe_intermediate_size=64, num_experts=8, shared_expert_intermediate_size=64,
                           num_experts_per_tok=2, hc_count=2, hc_lowrank=32, ple_layer_ids=[1], ple_embed_dim=64,
                           heads_per_ngram=2, ngram_vocab_size_base=300, split_ngram_parts=4, indexer_n_heads=2,
                           indexer_kv_heads=1, indexer_head_dim=32, indexer_budget=16, indexer_compress_ratio=4),
    "sarvam_mla": dict(**LATENT, **N_ROUTED, **GROUPS, first_k_dense_replace=1),
    "sarvam_moe": dict(**N_ROUTED, **GROUPS, head_dim=16, first_k_dense_replace=1),
    "solar_open": dict(**N_ROUTED, **GROUPS, head_dim=16),
    "zaya": dict(moe_intermediate_size=64, num_experts=8, num_experts_per_tok=1, head_dim=16, router_hidden_size=32,
                 layer_types=["hybrid", "hybrid_sliding", "hybrid"], sliding_window=24),
}  # fmt: skip

ARCHITECTURES = tuple(name for name in SETTINGS if name.partition("-")[0] in CONFIG_MAPPING_NAMES or name == "deepseek")


def model_type(name: str) -> str:
    return name.partition("-")[0]


def config_of(name: str, **changes: Any) -> PreTrainedConfig:
    """The configuration of an architecture: 3 or 4 blocks, 8 experts of width 64, top-2 wherever the type allows it.

    `changes` replaces or adds options.
    """
    return AutoConfig.for_model(model_type(name), **{**tiny_models.COMMON, **SETTINGS[name], **changes})


def build(name: str, seed: int = 0) -> PreTrainedModel:
    """A random float32 model in eval mode, determined by the seed.

    No vector has its initial value, which is often 0 or 1: so a lost norm, scale or attention sink is noticed.
    """
    return build_from(config_of(name), seed)


def build_from(config: PreTrainedConfig, seed: int = 0) -> PreTrainedModel:
    """The same from a configuration."""
    model = tiny_models.build_random(config, seed)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        for key, tensor in model.state_dict().items():
            if key.endswith("tid2eid"):  # DeepSeek-V4's experts by token id
                tensor.copy_(torch.rand(len(tensor), 8).topk(tensor.shape[1]).indices)
            if tensor.is_floating_point() and tensor.ndim == 1 and (tensor == tensor[0]).all():
                tensor += 0.1 * torch.randn(len(tensor))
            if key.endswith("router.scale"):
                tensor *= 8  # Gemma 4's router divides by the square root of the hidden size
            elif re.search(r"gate\.(down_proj|router_mlp\.fc\d)\.bias|(hidden_states|residual)_bias", key):
                tensor *= 0.1  # or ZAYA would send all tokens to one expert
            elif key.endswith("router_mlp.out_proj.weight"):
                tensor *= 20
            elif key.endswith("balancing_biases"):
                tensor[-1] = -1.0  # ZAYA's skip expert: `from_pretrained` sets it to this, whatever was saved
    return model
