"""Attention of a decode step on a CPU with AVX512, for packed models: one new token of each sequence to all before it.

torch reads keys and values once for each query head. Where several heads share them (grouped queries), the kernel here
reads them once (`csrc/attention.h`). It takes what it can of the attention that transformers calls `sdpa`, and leaves
the rest to that: prefill, gradients, heads with keys of their own, other types and devices, `torch.compile`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from eacmoe_lightning.runtime import kernels

SDPA = "sdpa"  # transformers' name; some models decide by it what else they do, so it stays
MARK = "shares_keys"  # an attribute of attention modules that use the kernel
DTYPES = (torch.float32, torch.bfloat16)
LANES = 16  # heads are multiples of so many numbers
ALTERS = ("position_bias", "softcap", "s_aux", "output_attentions")  # options that change what is computed


def share_keys(model: nn.Module) -> int:
    """Has the attention of a model use the kernel where heads share keys, if the CPU has AVX512.

    transformers' `sdpa` becomes `attend`, which leaves the modules of all other models to it.

    Returns:
        The number of attention modules that do, while the model's attention is `sdpa`.
    """
    found = AttentionInterface().get(SDPA)
    if kernels.level() not in ("avx512", "amx") or found not in (sdpa_attention_forward, attend):  # or somebody else's
        return 0
    AttentionInterface.register(SDPA, attend)
    modules = [module for module in model.modules() if getattr(module, "num_key_value_groups", 1) > 1]
    for module in modules:
        setattr(module, MARK, True)
    return len(modules)


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers calls it.

    Args:
        module: the attention module.
        query, key, value: [B, H, Q, D], [B, H / G, T, D], [B, H / G, T, V].
        attention_mask: bool [B or 1, 1, Q, T], or what `sdpa` takes besides.
        scaling: factor of the scores; None: D^-1/2.

    Returns:
        [B, Q, H, V], and None for the weights.
    """
    takes = (
        hasattr(module, MARK)
        and not dropout
        and all((given := options.get(name)) is None or given is False for name in ALTERS)
    )
    if not takes or not kernels.goes_direct(query) or not _takes(query, key, value, attention_mask):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **options
        )
    (batch, heads, _, width), (_, kv_heads, length, value_width) = query.shape, value.shape
    out = query.new_empty(batch, 1, heads, value_width)
    tensors = query, key, value, attention_mask
    mask_batch = 0 if attention_mask is None or len(attention_mask) == 1 else attention_mask.stride(0)
    described = kernels.Attention(
        *(None if tensor is None else tensor.data_ptr() for tensor in tensors),
        *(batch, heads, kv_heads, length, width, value_width),
        *(*query.stride()[:2], *key.stride()[:3], *value.stride()[:3], mask_batch),
        width**-0.5 if scaling is None else scaling,
        kernels.DTYPES[query.dtype],
    )
    kernels.library().eacmoe_attention(described, out.data_ptr(), torch.get_num_threads())
    return out, None


def _takes(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> bool:
    """Whether the kernel takes these, and is faster."""
    same = query.dtype == key.dtype == value.dtype and query.dtype in DTYPES and query.shape[2] == 1
    dense = all(part.stride(-1) == 1 and part.shape[-1] % LANES == 0 for part in (query, key, value))
    batches = query.shape[0] == key.shape[0] == value.shape[0] and key.shape[:3] == value.shape[:3]
    grouped = query.shape[1] > key.shape[1] and query.shape[1] % key.shape[1] == 0 and query.shape[-1] == key.shape[-1]
    return same and dense and batches and grouped and (mask is None or _reads(mask, query.shape[0], key.shape[2]))


def _reads(mask: Tensor, batch: int, length: int) -> bool:
    """Whether the kernel reads this mask: a bool for each key, the same for all heads."""
    fits = mask.dtype == torch.bool and mask.ndim == 4 and mask.shape[1:] == (1, 1, length)
    return fits and mask.shape[0] in (1, batch) and mask.stride(-1) == 1
