"""Attention of a decode step where heads share keys gives what transformers' `sdpa` does."""

from types import SimpleNamespace

import architectures
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from eacmoe_lightning.runtime import kernels
from eacmoe_lightning.runtime.attention import MARK, attend, share_keys

pytestmark = pytest.mark.skipif(kernels.level() not in ("avx512", "amx"), reason="needs the C++ kernels and AVX512")
SHAPES = {  # batch, heads, heads of keys, tokens, width of keys, width of values
    "one short chunk": (1, 4, 2, 5, 64, 64),
    "whole chunks": (1, 8, 2, 512, 128, 128),
    "batch and a rest": (3, 32, 4, 1025, 128, 128),
    "odd group, narrow values": (1, 6, 1, 777, 80, 48),
    "three heads, wide keys": (2, 3, 1, 256, 192, 128),
    "seven heads": (1, 28, 4, 70, 64, 96),
}


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def inputs(shape: tuple[int, ...], dtype: torch.dtype, masked: bool = False) -> tuple[Tensor | None, ...]:
    """Queries, keys and values as a cache holds them, beginnings of larger tensors, and a mask of padding."""
    batch, heads, kv_heads, tokens, width, value_width = shape
    query = numbers(batch, 1, heads, width).to(dtype).transpose(1, 2)
    key = numbers(batch, kv_heads, tokens + 7, width, seed=1).to(dtype)[:, :, :tokens]
    value = numbers(batch, kv_heads, tokens + 9, value_width, seed=2).to(dtype)[:, :, :tokens]
    padding = torch.arange(batch)[:, None] * 2 + 1
    return query, key, value, (torch.arange(tokens) >= padding)[:, None, None] if masked else None


def module(query: Tensor, key: Tensor) -> SimpleNamespace:
    return SimpleNamespace(num_key_value_groups=query.shape[1] // key.shape[1], is_causal=True, **{MARK: True})


@torch.no_grad()
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_like_attention_in_float64(shape, dtype, masked):
    query, key, value, mask = inputs(shape, dtype, masked)
    out, weights = attend(module(query, key), query, key, value, mask, scaling=0.2)
    wide = (part.double().repeat_interleave(shape[1] // part.shape[1], 1) for part in (query, key, value))
    expected = F.scaled_dot_product_attention(*wide, attn_mask=mask, scale=0.2).transpose(1, 2)
    assert weights is None and out.dtype == dtype and out.shape == expected.shape and out.is_contiguous()
    error = (out - expected).abs().max() / expected.abs().max()
    assert error < (4e-3 if dtype == torch.bfloat16 else 2e-6)


@torch.no_grad()
def test_threads_do_not_change_a_bit():
    parts = inputs((2, 16, 4, 2000, 128, 128), torch.bfloat16)
    before, found = torch.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(attend(module(*parts[:2]), *parts)[0])
    torch.set_num_threads(before)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@torch.no_grad()
def test_extreme_scores_and_hidden_tokens():
    query, key, value, _ = inputs((1, 4, 2, 300, 64, 64), torch.float32)
    key[:, :, 299] = 100 * query[:, ::2, 0]  # far above all others
    out, _ = attend(module(query, key), query, key, value, None)
    torch.testing.assert_close(out[0, 0, ::2], value[0, :, 299])
    mask = torch.zeros(1, 1, 1, 300, dtype=torch.bool)
    mask[..., 17] = True
    out, _ = attend(module(query, key), query, key, value, mask)
    torch.testing.assert_close(out[0, 0, ::2], value[0, :, 17])
    assert not attend(module(query, key), query, key, value, torch.zeros_like(mask))[0].any()


LEFT = {
    "prefill": dict(tokens=4),
    "keys of their own": dict(shape=(1, 4, 4, 9, 64, 64)),
    "float16": dict(dtype=torch.float16),
    "narrow heads": dict(shape=(1, 4, 2, 9, 24, 24)),
    "added mask": dict(mask=numbers(1, 1, 1, 9)),
    "a mask for each head": dict(mask=numbers(1, 4, 1, 9) > 0),
    "positions": dict(options={"position_bias": numbers(1, 4, 1, 9)}),
}


@torch.no_grad()
@pytest.mark.parametrize("case", LEFT)
def test_the_rest_is_left_to_sdpa(case):
    given = LEFT[case]
    query, key, value, _ = inputs(given.get("shape", (1, 4, 2, 9, 64, 64)), given.get("dtype", torch.float32))
    query = query.expand(-1, -1, given.get("tokens", 1), -1)
    arguments = module(query, key), query, key, value, given.get("mask")
    out, _ = attend(*arguments, **given.get("options", {}))
    assert torch.equal(out, sdpa_attention_forward(*arguments, **given.get("options", {}))[0])


def test_gradients_are_left_to_sdpa():
    query, key, value, _ = inputs((1, 4, 2, 9, 64, 64), torch.float32)
    attend(module(query, key), query.requires_grad_(), key, value, None)[0].sum().backward()
    assert query.grad is not None


@torch.no_grad()
@pytest.mark.parametrize("cache", [None, "static"])
def test_a_model_that_generates(cache):
    config = architectures.config_of("qwen3_moe")
    config.update({"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16})
    model = architectures.build_from(config)
    ids = torch.randint(3, 100, (2, 9), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "attention_mask": (torch.arange(9) >= torch.tensor([[4], [0]])).long()}
    options = dict(max_new_tokens=8, min_new_tokens=8, do_sample=False, pad_token_id=0, cache_implementation=cache)

    def generated() -> tuple[Tensor, Tensor]:
        out = model.generate(**batch, **options, return_dict_in_generate=True, output_logits=True)
        return out.sequences, torch.stack(out.logits)

    expected, expected_logits = generated()
    assert share_keys(model) == 3 and model.config._attn_implementation == "sdpa"
    found, logits = generated()
    assert torch.equal(found, expected)
    torch.testing.assert_close(logits, expected_logits, rtol=1e-4, atol=1e-4)
    assert not torch.equal(logits, expected_logits)  # another kernel's rounding
    for part in model.modules():
        vars(part).pop(MARK, None)
    assert torch.equal(generated()[1], expected_logits)  # as for all other models of the process


@torch.no_grad()
def test_an_attention_of_the_user_is_left_alone(monkeypatch):
    monkeypatch.setitem(AttentionInterface._global_mapping, "sdpa", lambda *args, **kwargs: None)
    assert share_keys(architectures.build("qwen3_moe")) == 0
