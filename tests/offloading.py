"""Comparing the output of models with offloaded experts, and the size of a tiny model's expert."""

import torch
from torch import Tensor
from transformers import PreTrainedModel

EXPERT_BYTES = 3 * 64 * 64 * 4  # gate, up and down of a tiny expert in float32


def generate(model: PreTrainedModel, tokens: Tensor, new: int = 6) -> tuple[Tensor, Tensor]:
    """Greedy tokens and all their logits, for a batch with left padding."""
    mask = torch.ones_like(tokens)
    mask[0, :3] = 0
    options = {"max_new_tokens": new, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    out = model.generate(tokens, attention_mask=mask, **options, output_logits=True, return_dict_in_generate=True)
    return out.sequences, torch.stack(out.logits)


def same(model: PreTrainedModel, expected: tuple[Tensor, Tensor], tokens: Tensor) -> bool:
    return all(torch.equal(a, b) for a, b in zip(generate(model, tokens), expected, strict=True))
