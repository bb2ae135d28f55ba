"""The built-in DeepSeek-MoE against the published model: key names, and a forward pass written out."""

import json
import math

import pytest
import tiny_models
import torch
import torch.nn.functional as F
from safetensors import safe_open
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from eacmoe_lightning.models.deepseek import DeepseekConfig, DeepseekForCausalLM

# config.json of deepseek-ai/deepseek-moe-16b-base, with the fields that affect the computation
REAL_CONFIG = {
    "architectures": ["DeepseekForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "auto_map": {
        "AutoConfig": "configuration_deepseek.DeepseekConfig",
        "AutoModel": "modeling_deepseek.DeepseekModel",
        "AutoModelForCausalLM": "modeling_deepseek.DeepseekForCausalLM",
    },
    "aux_loss_alpha": 0.001,
    "bos_token_id": 100000,
    "eos_token_id": 100001,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 10944,
    "max_position_embeddings": 4096,
    "model_type": "deepseek",
    "moe_intermediate_size": 1408,
    "moe_layer_freq": 1,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "norm_topk_prob": False,
    "num_attention_heads": 16,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 28,
    "num_key_value_heads": 16,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 10000,
    "scoring_func": "softmax",
    "seq_aux": True,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": 102400,
}
EXPERT_KEYS = [
    f"model.layers.{block}.mlp.experts.{expert}.{projection}_proj.weight"
    for block in (1, 2)
    for expert in range(8)
    for projection in ("gate", "up", "down")
]


def checkpoint(folder) -> dict[str, Tensor]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}


def reference(weights: dict[str, Tensor], config: DeepseekConfig, ids: Tensor) -> Tensor:
    """DeepSeek-MoE's logits [T, V] for ids [T], from the checkpoint; experts run one token at a time."""

    def norm(x: Tensor, key: str) -> Tensor:
        mean = x.pow(2).mean(-1, keepdim=True)
        return x * (mean + config.rms_norm_eps).rsqrt() * weights[f"{key}.weight"]

    def mlp(x: Tensor, key: str) -> Tensor:
        gate, up, down = (weights[f"{key}.{part}_proj.weight"] for part in ("gate", "up", "down"))
        return (F.silu(x @ gate.T) * (x @ up.T)) @ down.T

    length, heads = len(ids), config.num_attention_heads
    width = config.hidden_size // heads
    angles = torch.outer(torch.arange(length), 10000.0 ** (-torch.arange(0, width, 2) / width))  # [T, width/2]
    rotation = torch.polar(torch.ones_like(angles), angles)[:, None]  # [T, 1, width/2]

    def rotate(x: Tensor) -> Tensor:  # [T, heads, width], the pairs are (i, i + width/2)
        turned = torch.complex(*x.chunk(2, dim=-1)) * rotation
        return torch.cat([turned.real, turned.imag], dim=-1)

    x = weights["model.embed_tokens.weight"][ids]  # [T, D]
    for block in range(config.num_hidden_layers):
        prefix = f"model.layers.{block}"
        h = norm(x, f"{prefix}.input_layernorm")
        q, k, v = (
            (h @ weights[f"{prefix}.self_attn.{part}_proj.weight"].T).view(length, heads, width) for part in "qkv"
        )
        scores = torch.einsum("qhd,khd->hqk", rotate(q), rotate(k)) / math.sqrt(width)
        future = torch.ones(length, length).triu(1).bool()
        mixed = torch.einsum("hqk,khd->qhd", scores.masked_fill(future, -1e9).softmax(-1), v)
        x = x + mixed.reshape(length, -1) @ weights[f"{prefix}.self_attn.o_proj.weight"].T
        h = norm(x, f"{prefix}.post_attention_layernorm")
        if block < config.first_k_dense_replace:
            x = x + mlp(h, f"{prefix}.mlp")
            continue
        shares = (h @ weights[f"{prefix}.mlp.gate.weight"].T).softmax(-1)  # [T, E]
        routed = torch.zeros_like(h)
        for token in range(length):
            for share, expert in zip(*shares[token].topk(config.num_experts_per_tok), strict=True):
                routed[token] += share * mlp(h[token], f"{prefix}.mlp.experts.{expert}")
        x = x + routed + mlp(h, f"{prefix}.mlp.shared_experts")
    return norm(x, "model.norm") @ weights["lm_head.weight"].T


def test_logits_equal_a_forward_pass_written_out(tiny_model_dir):
    folder = tiny_model_dir("deepseek")
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert type(model) is DeepseekForCausalLM
    ids = torch.randint(0, 4096, (1, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        output = model(ids, labels=ids)
        last = model(ids, logits_to_keep=1).logits
    expected = reference(checkpoint(folder), model.config, ids[0])
    torch.testing.assert_close(output.logits[0], expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(last, output.logits[:, -1:])
    torch.testing.assert_close(output.loss, F.cross_entropy(output.logits[0, :-1], ids[0, 1:]))


def test_router_logits_are_those_of_the_sparse_blocks(tiny_model_dir):
    tiny_models.skip_without_router_logits("deepseek")
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir("deepseek"))
    with torch.no_grad():
        output = model(torch.arange(24)[None], output_router_logits=True)
    assert [logits.shape for logits in output.router_logits] == [(24, 8), (24, 8)]


def test_save_keeps_the_original_key_names_and_the_weights(tiny_model_dir, tmp_path):
    folder = tiny_model_dir("deepseek")
    before = checkpoint(folder)
    assert set(EXPERT_KEYS) <= before.keys()
    assert "model.layers.0.mlp.gate_proj.weight" in before  # the dense first block
    assert before["model.layers.1.mlp.shared_experts.up_proj.weight"].shape == (128, 64)
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(tmp_path)
    after = checkpoint(tmp_path)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_original_config_is_read_by_local_code(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(REAL_CONFIG))
    config = AutoConfig.from_pretrained(tmp_path)
    assert type(config) is DeepseekConfig
    assert config.mlp_layer_types == ["dense"] + ["sparse"] * 27
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    embeddings, attention, norms = 2 * 102400 * 2048, 28 * 4 * 2048**2, 57 * 2048
    dense, sparse = 3 * 2048 * 10944, 27 * (64 * 2048 + (64 + 2) * 3 * 2048 * 1408)
    assert embeddings + attention + norms + dense + sparse == 16_375_728_128  # "16B"
    assert sum(parameter.numel() for parameter in model.parameters()) == 16_375_728_128


def test_byte_level_tokenizer_under_a_llama_class_name(tmp_path):
    """DeepSeek's tokenizer_config.json says LlamaTokenizerFast, but its tokenizer.json is byte-level."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text(json.dumps(REAL_CONFIG))
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizerFast"}')
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    ids = tokenizer("one two é", add_special_tokens=False)["input_ids"]
    assert len(ids) == len("one two é".encode()) and tokenizer.decode(ids) == "one two é"


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("norm_topk_prob", True, "norm_topk_prob=True in config.json"),
        ("scoring_func", "sigmoid", "scoring_func='sigmoid' in config.json"),
        ("n_shared_experts", 0, "n_shared_experts=0 in config.json"),
    ],
)
def test_what_cannot_be_computed_is_refused(tmp_path, field, value, message):
    (tmp_path / "config.json").write_text(json.dumps({**REAL_CONFIG, field: value}))
    with pytest.raises(ValueError) as error:
        AutoConfig.from_pretrained(tmp_path)
    assert message in str(error.value)


def test_generate_with_and_without_cache_agree(tiny_model_dir):
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir("deepseek"))
    prompt = torch.arange(10, 20)[None]
    mask = torch.ones_like(prompt)
    cached, plain = (
        model.generate(prompt, attention_mask=mask, max_new_tokens=8, do_sample=False, use_cache=cache)
        for cache in (True, False)
    )
    assert cached.shape == (1, 18) and torch.equal(cached, plain)


def test_building_leaves_the_random_state_alone():
    state = torch.get_rng_state()
    first, repeated, other = (tiny_models.build("deepseek", seed) for seed in (3, 3, 4))
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(first.lm_head.weight, repeated.lm_head.weight)
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)
