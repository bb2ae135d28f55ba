"""Models of real shapes, dense and packed, with random weights on the device; tiny ones in miniature."""

from __future__ import annotations

from block_cost import VOCABULARY, config_of
from inference_models import GROUP_SIZE, bf16_model, packed_model
from transformers import PreTrainedConfig, PreTrainedModel, Qwen3MoeConfig

from gpu_parts.device import Device


def config(device: Device, shape: str, num_blocks: int = 1) -> PreTrainedConfig:
    """Of Qwen3-30B-A3B (`qwen3`), Mixtral-8x7B (`mixtral`) or Qwen1.5-MoE (`qwen1.5`), with so many blocks."""
    if not device.is_miniature:
        return config_of(shape, num_blocks)
    return Qwen3MoeConfig(
        vocab_size=VOCABULARY, num_hidden_layers=num_blocks, max_position_embeddings=4096, hidden_size=64,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, intermediate_size=128, moe_intermediate_size=64,
        num_experts=8, num_experts_per_tok=2, tie_word_embeddings=False,
    )  # fmt: skip


def group_size(device: Device) -> int:
    return 32 if device.is_miniature else GROUP_SIZE


def dense(device: Device, config: PreTrainedConfig) -> PreTrainedModel:
    """In the device's dtype, its experts through `grouped_mm`."""
    model = bf16_model(config, device.device).to(device.dtype)
    model.config._experts_implementation = "grouped_mm"
    return model


def packed(device: Device, dense: PreTrainedModel, bits: int) -> PreTrainedModel:
    return packed_model(dense, bits, group_size(device)).to(device.dtype)
