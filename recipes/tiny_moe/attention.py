"""Causal grouped-query attention whose backward is faster on CPU than PyTorch's.

The forward is PyTorch's flash kernel, whose backward takes a third of a training step. The backward
here goes over blocks of 128 queries, recomputes their softmax over the keys up to them, and does the
rest with batched bf16 matmuls.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

QUERIES = 128


@torch.compile(dynamic=False)
def score_gradients(scores: Tensor, d_p: Tensor, mask: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Scores and d_p [M,G*Q,L], mask [G*Q,L] -> probabilities and gradient of the scores, bf16."""
    p = (scores.float() * scale + mask).softmax(-1)
    d_p = d_p.float()
    d_scores = p * (d_p - (p * d_p).sum(-1, keepdim=True)) * scale
    return p.bfloat16(), d_scores.bfloat16()


class CausalAttention(torch.autograd.Function):
    """q [B,H,T,d], k and v [B,KV,T,d] -> [B,H,T,d], all bf16."""

    @staticmethod
    def forward(ctx, q, k, v):
        ctx.save_for_backward(q, k, v)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    @staticmethod
    def backward(ctx, grad):
        q, k, v = ctx.saved_tensors
        (batch, heads, length, width), kv = q.shape, k.shape[1]
        group = heads // kv
        q, grad = (z.reshape(batch * kv, group, length, width) for z in (q, grad))
        k, v = (z.reshape(batch * kv, length, width) for z in (k, v))
        d_q = torch.empty_like(q)
        d_k, d_v = torch.zeros(k.shape), torch.zeros(v.shape)
        for a in range(0, length, QUERIES):
            b = min(a + QUERIES, length)
            q_block, g_block = (z[:, :, a:b].reshape(batch * kv, -1, width) for z in (q, grad))
            keys, values = k[:, :b], v[:, :b]
            mask = torch.full((b - a, b), float("-inf")).triu(a + 1).repeat(group, 1)
            p, d_scores = score_gradients(q_block @ keys.mT, g_block @ values.mT, mask, width**-0.5)
            d_q[:, :, a:b] = (d_scores @ keys).unflatten(1, (group, -1))
            d_k[:, :b] += d_scores.mT @ q_block
            d_v[:, :b] += p.mT @ g_block
        shape = (batch, kv, length, width)
        return d_q.view(batch, heads, length, width), d_k.view(shape).bfloat16(), d_v.view(shape).bfloat16()
