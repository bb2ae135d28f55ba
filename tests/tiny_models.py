"""Tiny random models of each family, saved as Hugging Face directories for the tests to load.

They build in a second but have the structure of the real ones: experts wide enough for a quantization group of 64,
shared experts, a dense first block, a router that samples in train mode. A freshly initialised model routes almost
uniformly and barely changes its input, so weights here have a larger standard deviation, and the router's a still
larger one.

The caller's random state stays unchanged.
"""

import re
from pathlib import Path

import pytest
import torch
import transformers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MixtralConfig,
    PhimoeConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)

from eacmoe_lightning.models.deepseek import DeepseekConfig
from eacmoe_lightning.models.transformers_loader import TOWER_RETURNS_ROUTER_LOGITS

VOCABULARY = 4096  # size of the bundled tokenizer's vocabulary
ROUTER_SCALE = 6.0  # relative to the other weights; gives logits a standard deviation of about 4
ROUTER = re.compile(
    r"\.(gate|router|router_gate)(\.gate|\.wg|\.proj|\.layer|\.classifier|\.router_mlp\.out_proj)?\.weight$"
)
BIAS = re.compile(r"(?<!dt_)bias$|correction_bias")  # a state-space layer's time steps stay as they are initialised
CORRECTION = re.compile(r"correction_bias|expert_bias|balancing_bias")

COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "initializer_range": 0.08,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": None,
    "tie_word_embeddings": False,
}

MOE_FAMILIES = ("mixtral", "phimoe", "qwen2_moe", "deepseek", "qwen3_moe")
FAMILIES = (*MOE_FAMILIES, "llama")


def skip_without_router_logits(family: str) -> None:
    """Skips a test that compares with router logits that the model itself returns."""
    if family == "deepseek" and not TOWER_RETURNS_ROUTER_LOGITS:
        pytest.skip(f"deepseek: transformers {transformers.__version__} returns no router logits for it, 5.19 does")


def config_of(family: str) -> PreTrainedConfig:
    """The configuration of a family: 3 blocks, 8 experts of width 64, top-2 (deepseek: top-3)."""
    if family == "mixtral":
        return MixtralConfig(**COMMON, intermediate_size=64, num_local_experts=8, num_experts_per_tok=2)
    if family == "phimoe":
        return PhimoeConfig(
            **COMMON,
            intermediate_size=64,
            num_local_experts=8,
            num_experts_per_tok=2,
            attention_bias=True,  # like the real model, which also has a biased head
            lm_head_bias=True,
        )
    if family == "qwen2_moe":
        return Qwen2MoeConfig(
            **COMMON,
            intermediate_size=128,
            moe_intermediate_size=64,
            shared_expert_intermediate_size=128,
            num_experts=8,
            num_experts_per_tok=2,
        )
    if family == "deepseek":
        return DeepseekConfig(
            **{**COMMON, "num_key_value_heads": 4},
            intermediate_size=192,
            moe_intermediate_size=64,
            n_routed_experts=8,
            n_shared_experts=2,
            num_experts_per_tok=3,
            first_k_dense_replace=1,
        )
    if family == "qwen3_moe":  # the family of the bundled model, which has tied embeddings too
        return Qwen3MoeConfig(
            **{**COMMON, "tie_word_embeddings": True},
            head_dim=16,
            intermediate_size=128,
            moe_intermediate_size=64,
            num_experts=8,
            num_experts_per_tok=2,
            norm_topk_prob=True,
        )
    if family == "llama":
        return LlamaConfig(**COMMON, intermediate_size=128)
    raise ValueError(f"no tiny model of family {family!r}; there are {', '.join(FAMILIES)}")


def build(family: str, seed: int = 0) -> PreTrainedModel:
    """A random float32 model in eval mode, determined by the seed."""
    return build_random(config_of(family), seed)


def build_random(config: PreTrainedConfig, seed: int = 0) -> PreTrainedModel:
    """The same of any config. Biases, also those that correct a selection, differ from zero."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if ROUTER.search(name) and parameter.ndim == 2:
                    if not parameter.any():  # as AFMoE initialises it
                        parameter.normal_(std=config.initializer_range)
                    parameter *= ROUTER_SCALE
                elif BIAS.search(name):
                    parameter.normal_(std=0.1)  # initialised to zero, so a lost bias would go unnoticed
            for name, buffer in model.named_buffers():
                if CORRECTION.search(name):
                    buffer.normal_(std=0.1)
    return model.eval()


def save(family: str, folder: Path, tokenizer, seed: int = 0) -> Path:
    """Saves a tiny model and a tokenizer to `folder` for `from_pretrained`."""
    build(family, seed).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
