"""The models that `inference.py` times: real shapes, random weights, dense and packed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, MixtralConfig, PreTrainedConfig, PreTrainedModel, Qwen2MoeConfig

from eacmoe_lightning.compressed.directory import untied, write_weights
from eacmoe_lightning.compressed.format import METHOD, REST, SHARD
from eacmoe_lightning.models.moe import MoEModel
from eacmoe_lightning.run.files import write_json
from eacmoe_lightning.runtime.decode_step import speed_up_generation
from eacmoe_lightning.runtime.packed_modules import PackedLinear, pack_modules, packed_weights

VOCABULARY, GROUP_SIZE, ATTENTION_BITS = 512, 128, 4
COMMON = {"num_hidden_layers": 1, "vocab_size": VOCABULARY, "tie_word_embeddings": False}
SHAPES: dict[str, Any] = {
    "qwen1.5-moe": Qwen2MoeConfig(
        **COMMON,
        hidden_size=2048,
        moe_intermediate_size=1408,
        shared_expert_intermediate_size=5632,
        num_experts=60,
        num_experts_per_tok=4,
        num_attention_heads=16,
        num_key_value_heads=16,
    ),
    "mixtral": MixtralConfig(
        **COMMON,
        hidden_size=4096,
        intermediate_size=14336,
        num_local_experts=8,
        num_experts_per_tok=2,
        num_attention_heads=32,
        num_key_value_heads=8,
    ),
}


def bf16_model(config: Any, device: torch.device | str = "cpu") -> PreTrainedModel:
    """A model with random weights, the same for all experts of a block: drawing all of them would take minutes."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    rotary = type(model.model.rotary_emb)(config)
    model = model.to_empty(device=device).eval()
    model.model.rotary_emb = rotary.to(device)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            torch.nn.init.ones_(parameter)
        else:
            one = torch.empty(parameter.shape[-2:]).normal_(std=0.02, generator=torch.Generator().manual_seed(0))
            parameter.data.copy_(one.to(device).expand(parameter.shape))
    for seed, layer in enumerate(model.model.layers, 1):  # whose experts differ in nothing else
        gate = layer.mlp.gate.weight
        gate.data.copy_(torch.empty(gate.shape).normal_(std=0.02, generator=torch.Generator().manual_seed(seed)))
    return model


def packed_model(dense: PreTrainedModel, bits: int, group_size: int = GROUP_SIZE) -> PreTrainedModel:
    """A packed model with the architecture of `dense` and random codes, which do not affect the speed."""
    model = randomly_packed(dense.config, bits, group_size, dense.device)
    model.model.rotary_emb = dense.model.rotary_emb
    kept = dict(dense.named_parameters())
    for name, parameter in model.named_parameters():
        parameter.data = kept[name].data
    speed_up_generation(model, MoEModel(model).blocks)
    return model


def randomly_packed(config: Any, bits: int, group_size: int, device: torch.device | str) -> PreTrainedModel:
    """Random codes; what is not quantized is not set."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    weights = {name: part for block in MoEModel(model).blocks for name, (part, _) in block.weights().items()}
    by_part = {name: ATTENTION_BITS if part == "attention" else bits for name, part in weights.items()}
    pack_modules(model, by_part, dict.fromkeys(by_part, group_size))
    model = model.to_empty(device=device).eval()
    model.tie_weights()
    fill_randomly(model)
    return model


def fill_randomly(model: torch.nn.Module) -> None:
    """Gives packed weights random codes."""
    for _, weight in packed_weights(model):
        weight.codes.random_(0, 256)
        weight.scale.fill_(0.02 / 2**weight.bits)
        weight.zero_point.fill_(2 ** (weight.bits - 1))


def deep_config(shape: str, layers: int, vocabulary: int) -> PreTrainedConfig:
    values = {
        name: value for name, value in SHAPES[shape].to_dict().items() if name not in ("layer_types", "model_type")
    }
    return type(SHAPES[shape])(**values | {"num_hidden_layers": layers, "vocab_size": vocabulary})


def deep_model(shape: str, bits: int, layers: int, vocabulary: int) -> PreTrainedModel:
    """A packed model of many layers, which need not fit the memory in bf16; its head is in bf16."""
    config = deep_config(shape, layers, vocabulary)
    model = randomly_packed(config, bits, GROUP_SIZE, "cpu")
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    for seed, parameter in enumerate(model.parameters()):
        if parameter.ndim == 1:
            torch.nn.init.ones_(parameter)
        else:
            parameter.data.normal_(std=0.02, generator=torch.Generator().manual_seed(seed))
    speed_up_generation(model, MoEModel(model).blocks)
    return model


def heads_of(model: PreTrainedModel, widths: list[int]) -> dict[int, torch.nn.Module]:
    """The output head of a model in bf16 (16) or packed with random codes, by its bits."""
    heads = {bits: PackedLinear(model.lm_head, bits, GROUP_SIZE) for bits in widths if bits != 16}
    for head in heads.values():
        fill_randomly(head)
    return {bits: heads.get(bits, model.lm_head) for bits in widths}


def dense_in_float32(dense: PreTrainedModel) -> PreTrainedModel:
    """The same model in float32."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(dense.config, dtype=torch.float32)
    model = model.to_empty(device="cpu").eval()
    model.model.rotary_emb = dense.model.rotary_emb
    model.load_state_dict(dense.state_dict())
    return model


def bytes_of(module: torch.nn.Module) -> int:
    return sum(t.nbytes for t in (*module.parameters(), *module.buffers()))


def weights_of(model: PreTrainedModel, part: str) -> torch.nn.Module:
    return model.model.layers[0] if part == "layer" else model.model.layers[0].mlp


def used_bytes(model: PreTrainedModel, part: str, tokens: int) -> int:
    """Weight bytes that one pass reads at most, given how many routed experts its tokens select."""
    experts = model.model.layers[0].mlp.experts
    routed, count = bytes_of(experts), experts.num_experts
    selected = min(count, tokens * model.config.num_experts_per_tok)
    return bytes_of(weights_of(model, part)) - routed + routed * selected // count


def flops(config: Any, part: str, tokens: int) -> int:
    """Floating-point operations of the matrix products, without attention's scores."""
    hidden, heads = config.hidden_size, config.num_attention_heads
    attention = 2 * hidden * hidden * (1 + config.num_key_value_heads / heads) if part == "layer" else 0
    width = getattr(config, "moe_intermediate_size", None) or config.intermediate_size
    experts = 3 * hidden * (config.num_experts_per_tok * width + getattr(config, "shared_expert_intermediate_size", 0))
    return int(2 * tokens * (attention + experts))


def save_compressed(directory: Path, model: PreTrainedModel) -> None:
    """The directory that `fit` would leave for this packed model, without a tokenizer."""
    weights = dict(packed_weights(model))
    tensors = {name: tensor for name, tensor in untied(model).items() if tensor.numel()}
    layer = {name: tensor for name, tensor in tensors.items() if ".layers." in name}
    outside_layer = {name: tensor for name, tensor in tensors.items() if name not in layer}
    directory.mkdir()
    write_weights(directory, {SHARD.format(0): layer, REST: outside_layer}.items())
    config = {
        "model_type": METHOD,
        "format_version": 1,
        "original": {"name_or_path": "random", "config": model.config.to_dict()},
        "dtype": "bfloat16",
        "quantization": {
            "bits": {name: weight.bits for name, weight in weights.items()},
            "group_sizes": {name: weight.group_size for name, weight in weights.items()},
        },
    }
    write_json(directory / "config.json", config)
