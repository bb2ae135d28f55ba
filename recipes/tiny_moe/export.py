"""Write a trained twin as a Hugging Face directory that transformers loads offline."""

import json
import shutil
from pathlib import Path

import torch
from model import TinyMoE
from torch import Tensor
from transformers import (
    GenerationConfig,
    Glm4MoeConfig,
    Glm4MoeForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

ONLY_GLM = ("n_shared_experts", "first_k_dense_replace", "routed_scaling_factor", "intermediate_size")


def empty_model(model: TinyMoE, context: int, balance: float) -> PreTrainedModel:
    """The model of transformers with the twin's shape."""
    s = model.shape
    sizes = {key: value for key, value in s.as_dict().items() if key not in ("rope_theta", "sigmoid")}
    rotary = sizes.pop("partial_rotary_factor")
    shared = dict(
        rope_parameters={"rope_type": "default", "rope_theta": s.rope_theta},
        max_position_embeddings=context, tie_word_embeddings=True, attention_bias=False,
        bos_token_id=0, eos_token_id=0, pad_token_id=1,
    )  # fmt: skip
    if s.sigmoid:
        sizes["n_routed_experts"] = sizes.pop("num_experts")
        shared["rope_parameters"]["partial_rotary_factor"] = rotary
        glm = dict(use_qk_norm=True, n_group=1, topk_group=1, num_nextn_predict_layers=0)
        return Glm4MoeForCausalLM(Glm4MoeConfig(**sizes, **shared, **glm))
    sizes = {key: value for key, value in sizes.items() if key not in ONLY_GLM}
    return Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            **sizes,
            **shared,
            intermediate_size=s.moe_intermediate_size,
            decoder_sparse_step=1,
            router_aux_loss_coef=balance,
            use_sliding_window=False,
        )  # fmt: skip
    )


def to_transformers(model: TinyMoE, context: int, balance: float) -> PreTrainedModel:
    """Copy every weight of the twin; fails if one is left over on either side."""
    s, target = model.shape, empty_model(model, context, balance)
    heads, kv = s.num_attention_heads * s.head_dim, s.num_key_value_heads * s.head_dim
    state = {
        "model.embed_tokens.weight": model.embedding,
        "lm_head.weight": model.embedding,
        "model.norm.weight": model.norm,
    }
    for number, block in enumerate(model.blocks):
        q, k, v = block.qkv.split((heads, kv, kv))
        state |= {
            f"model.layers.{number}.{name}": value
            for name, value in {
                "self_attn.q_proj.weight": q, "self_attn.k_proj.weight": k, "self_attn.v_proj.weight": v,
                "self_attn.o_proj.weight": block.o, "self_attn.q_norm.weight": block.q_norm,
                "self_attn.k_norm.weight": block.k_norm, "input_layernorm.weight": block.input_norm,
                "post_attention_layernorm.weight": block.post_norm,
            }.items()
        }  # fmt: skip
        mlp = f"model.layers.{number}.mlp."
        if not block.is_dense:
            state |= {f"{mlp}gate.weight": block.router, f"{mlp}experts.gate_up_proj": block.gate_up}
            state |= {f"{mlp}experts.down_proj": block.down}
            state |= {f"{mlp}gate.e_score_correction_bias": block.correction} if s.sigmoid else {}
        if hasattr(block, "shared_down"):
            mlp += "" if block.is_dense else "shared_experts."
            gate, up = block.shared_gate_up.chunk(2)
            state |= {f"{mlp}gate_proj.weight": gate, f"{mlp}up_proj.weight": up}
            state |= {f"{mlp}down_proj.weight": block.shared_down}
    target.load_state_dict({name: value.detach() for name, value in state.items()}, strict=True)
    target.generation_config = GenerationConfig(
        bos_token_id=0, eos_token_id=0, pad_token_id=1, do_sample=True, temperature=0.8, top_p=0.95, max_new_tokens=64
    )
    return target.eval()


@torch.no_grad()
def check(model: TinyMoE, target: PreTrainedModel, tokens: Tensor) -> None:
    """Check that both give the same loss on tokens [B,T+1], up to the twin's bf16 matmuls."""
    twin_loss = model(tokens)[0].item()
    logits = target(tokens[:, :-1]).logits
    exported_loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).item()
    print(f"loss of the twin {twin_loss:.4f}, of the exported model {exported_loss:.4f}")
    if abs(twin_loss - exported_loss) > 0.01:
        raise ValueError(f"the exported model has loss {exported_loss:.4f}, but the twin has {twin_loss:.4f}")


def export(model: TinyMoE, tokenizer: Path, out: Path, context: int, balance: float, sample: Tensor) -> None:
    """Check on `sample`, then save in bf16 with the tokenizer; files move to `out` once all are written."""
    target = to_transformers(model, context, balance)
    check(model, target, sample)
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    target.to(torch.bfloat16).save_pretrained(partial)
    PreTrainedTokenizerFast.from_pretrained(tokenizer).save_pretrained(partial)
    settings = json.loads((partial / "tokenizer_config.json").read_text())
    for name in ("backend", "is_local", "local_files_only"):
        settings.pop(name, None)
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"  # a name that transformers 4 knows too
    (partial / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    (partial / "model.safetensors").chmod(0o644)
    out.mkdir(parents=True, exist_ok=True)
    for file in sorted(partial.iterdir()):
        file.replace(out / file.name)
    partial.rmdir()
