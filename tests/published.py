"""The fields of published models' config.json that determine their shapes, by the name of their config of the package.

Facts of the models' cards and of the defaults of transformers' classes; no file is copied from a hub. What no source at
hand confirmed is checked only by the number of parameters that the card gives.
"""

import json
from pathlib import Path

CONFIGS = {
    "qwen3-30b-a3b": dict(
        model_type="qwen3_moe", vocab_size=151936, hidden_size=2048, num_hidden_layers=48, num_attention_heads=32,
        num_key_value_heads=4, head_dim=128, intermediate_size=6144, moe_intermediate_size=768, num_experts=128,
        num_experts_per_tok=8, norm_topk_prob=True, max_position_embeddings=40960,
    ),
    # with its vision tower, as in the checkpoint; Qwen3.5-35B-A3B has the same shapes
    "qwen3.6-35b-a3b": dict(
        model_type="qwen3_5_moe",
        text_config=dict(
            model_type="qwen3_5_moe_text", vocab_size=248320, hidden_size=2048, num_hidden_layers=40,
            num_attention_heads=16, num_key_value_heads=2, head_dim=256, linear_num_key_heads=16,
            linear_num_value_heads=32, linear_key_head_dim=128, linear_value_head_dim=128, num_experts=256,
            num_experts_per_tok=8, moe_intermediate_size=512, shared_expert_intermediate_size=512,
            max_position_embeddings=262144,
        ),
    ),
    "gpt-oss-20b": dict(
        model_type="gpt_oss", vocab_size=201088, hidden_size=2880, intermediate_size=2880, num_hidden_layers=24,
        num_attention_heads=64, num_key_value_heads=8, head_dim=64, num_local_experts=32, num_experts_per_tok=4,
        sliding_window=128, attention_bias=True, max_position_embeddings=131072,
        quantization_config=dict(
            quant_method="mxfp4",
            modules_to_not_convert=["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens",
                                    "lm_head"],
        ),
    ),
    "glm-4.5-air": dict(
        model_type="glm4_moe", vocab_size=151552, hidden_size=4096, num_hidden_layers=46, num_attention_heads=96,
        num_key_value_heads=8, head_dim=128, intermediate_size=10944, moe_intermediate_size=1408, n_routed_experts=128,
        n_shared_experts=1, num_experts_per_tok=8, first_k_dense_replace=1, n_group=1, topk_group=1,
        norm_topk_prob=True, attention_bias=True, use_qk_norm=False, num_nextn_predict_layers=1,
        max_position_embeddings=131072,
    ),
    "deepseek-v2-lite": dict(
        model_type="deepseek_v2", vocab_size=102400, hidden_size=2048, num_hidden_layers=27, num_attention_heads=16,
        num_key_value_heads=16, q_lora_rank=None, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64,
        v_head_dim=128, intermediate_size=10944, moe_intermediate_size=1408, n_routed_experts=64, n_shared_experts=2,
        num_experts_per_tok=6, first_k_dense_replace=1, topk_method="greedy", n_group=1, topk_group=1,
        norm_topk_prob=False, max_position_embeddings=163840,
    ),
    "olmoe-1b-7b": dict(
        model_type="olmoe", vocab_size=50304, hidden_size=2048, num_hidden_layers=16, num_attention_heads=16,
        num_key_value_heads=16, intermediate_size=1024, num_experts=64, num_experts_per_tok=8, norm_topk_prob=False,
        max_position_embeddings=4096,
    ),
    # Widths, heads and the attention blocks are confirmed by the number of parameters alone.
    "granite-4.0-h-small": dict(
        model_type="granitemoehybrid", vocab_size=100352, hidden_size=4096, num_hidden_layers=40,
        layer_types=["attention" if block in (5, 15, 25, 35) else "mamba" for block in range(40)],
        num_attention_heads=32, num_key_value_heads=8, intermediate_size=768, shared_intermediate_size=1536,
        num_local_experts=72, num_experts_per_tok=10, mamba_n_heads=128, mamba_d_head=64, mamba_d_state=128,
        mamba_n_groups=1, mamba_d_conv=4, mamba_expand=2, mamba_conv_bias=True, mamba_proj_bias=False,
        position_embedding_type="nope", tie_word_embeddings=True, logits_scaling=16.0, embedding_multiplier=12.0,
        residual_multiplier=0.22, attention_multiplier=0.0078125, max_position_embeddings=131072,
    ),
    "minimax-m2": dict(
        model_type="minimax_m2", vocab_size=200064, hidden_size=3072, num_hidden_layers=62, num_attention_heads=48,
        num_key_value_heads=8, head_dim=128, intermediate_size=1536, num_local_experts=256, num_experts_per_tok=8,
        max_position_embeddings=196608,
        quantization_config=dict(
            quant_method="fp8", fmt="float8_e4m3fn", activation_scheme="dynamic", weight_block_size=[128, 128],
            modules_to_not_convert=["gate", "e_score_correction_bias", "lm_head"],
        ),
    ),
    "mixtral-8x7b": dict(
        model_type="mixtral", vocab_size=32000, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=8, num_local_experts=8, num_experts_per_tok=2,
        max_position_embeddings=32768,
    ),
}  # fmt: skip

# Billions of parameters, from the models' cards and reports; Qwen3.6 with the vision tower that its config class gives
# it by default, 34.7 without.
BILLIONS = {
    "qwen3-30b-a3b": 30.5,
    "qwen3.6-35b-a3b": 35.1,
    "gpt-oss-20b": 20.9,
    "glm-4.5-air": 106.9,
    "deepseek-v2-lite": 15.7,
    "olmoe-1b-7b": 6.9,
    "granite-4.0-h-small": 32.2,
    "minimax-m2": 228.7,
    "mixtral-8x7b": 46.7,
}


def save_config(name: str, folder: Path) -> Path:
    """A directory that holds a model's config.json and nothing else."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIGS[name] | {"dtype": "bfloat16"}, indent=1))
    return folder
