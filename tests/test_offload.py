"""Offloaded experts give the same tokens as experts in the model, or those of the decoded weights."""

import warnings

import pytest
import tiny_models
import torch
from offloading import EXPERT_BYTES, generate, same
from test_packed_loading import compress

from eacmoe_lightning import load
from eacmoe_lightning.models.moe import MoEModel
from eacmoe_lightning.offload import offload_experts
from eacmoe_lightning.offload.codecs import codec, decode
from eacmoe_lightning.offload.store import Key
from eacmoe_lightning.runtime.packed_modules import PackedExperts

families = pytest.mark.parametrize("family", tiny_models.MOE_FAMILIES)


@families
@pytest.mark.parametrize("share", [1.0, 0.3, 0.07])
def test_lossless_offload_gives_the_same_bits(family, share, offloaded, tokens, tmp_path):
    expected = generate(tiny_models.build(family), tokens)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # at 0.07 the cache holds one expert, which warns
        model, handle = offloaded(family, share, "lossless", directory=tmp_path if share == 0.3 else None)
        assert same(model, expected, tokens)
    counters = handle.counters
    assert counters.requests == counters.hits + counters.late + counters.misses > 0
    assert counters.bytes_moved > 0 and (counters.evictions > 0) == (share < 1)
    assert handle.cache_bytes <= share * handle.expert_bytes
    assert all(len(cache.entries) <= cache.capacity for cache in handle.caches)


@families
def test_no_expert_weights_stay_in_the_model(family, offloaded):
    model, handle = offloaded(family, 0.3)
    blocks = MoEModel(tiny_models.build(family)).moe_blocks
    experts = {f"{b.name}.{b.experts_name}.{p}" for b in blocks for p in b.experts.projections}
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    assert not experts & tensors.keys() and len(handle.store.places) == 8 * 2 * len(blocks)
    assert handle.expert_bytes == 8 * EXPERT_BYTES * len(blocks)
    assert len(MoEModel(model).moe_blocks) == len(blocks)  # routers can still be found


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_the_configured_implementation_runs(implementation, offloaded, tokens):
    reference = tiny_models.build("qwen3_moe")
    reference.set_experts_implementation(implementation)
    model, _ = offloaded("qwen3_moe", 1.0)
    model.set_experts_implementation(implementation)
    assert same(model, generate(reference, tokens), tokens)


@torch.no_grad()
@pytest.mark.parametrize("name", ["sz3:mean:0.2", "uniform:range:0.01", "entropy:mean:0.3", "packed-entropy:4:32"])
def test_lossy_offload_is_the_model_with_decoded_weights(name, offloaded, tokens):
    model, handle = offloaded("mixtral", 0.5, name, num_workers=0)
    reference = tiny_models.build("mixtral")
    for block in MoEModel(reference).moe_blocks:
        for projection in block.experts.projections:
            for expert in range(8):
                weight = block.experts.weight(projection)[expert]
                weight.copy_(decode(codec(name).encode(weight)))
    assert torch.equal(model(tokens).logits, reference(tokens).logits)
    assert handle.counters.bytes_saved > handle.counters.bytes_moved


@torch.no_grad()
def test_each_expert_may_have_its_own_codec(offloaded, tokens):
    reference = tiny_models.build("mixtral")
    codecs = {str(b): [f"sz3:mean:{0.1 * (1 + e + b):.1f}" for e in range(8)] for b in range(3)}  # as JSON has it
    for block in MoEModel(reference).moe_blocks:
        for projection in block.experts.projections:
            for expert in range(8):
                weight = block.experts.weight(projection)[expert]
                weight.copy_(decode(codec(codecs[str(block.index)][expert]).encode(weight)))
    model, handle = offloaded("mixtral", 0.5, codecs, num_workers=0)
    assert torch.equal(model(tokens).logits, reference(tokens).logits)
    assert handle.store.header(Key(1, 4, "down_proj")).bound["value"] == 0.6
    for wrong in ({0: codecs["0"]}, codecs | {"2": codecs["2"][:7]}):
        with pytest.raises(ValueError, match="codecs for block"):
            offload_experts(tiny_models.build("mixtral"), 0.5, wrong)


@families
@torch.no_grad()
@pytest.mark.parametrize("share", [1.0, 0.2])
def test_quantized_experts_stay_packed(family, share, tmp_path, tiny_model_dir, tokens):
    folder = compress(tiny_model_dir(family), tmp_path / "compressed")
    expected, model = load(folder)(tokens).logits, load(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        handle = offload_experts(model, share, "packed-entropy:3:32" if share == 1 else "packed-zstd:3:32")
        torch.testing.assert_close(model(tokens).logits, expected, rtol=1e-5, atol=1e-5)
        assert generate(model, tokens)[0].shape == (2, 18)
    assert not any(isinstance(module, PackedExperts) for module in model.modules())
    last = max(key.block for key in handle.store)
    assert handle.store.header(Key(0 if family != "deepseek" else 1, 0, "down_proj")).options["bits"] == 3
    assert handle.store.header(Key(last, 0, "down_proj")).options["bits"] == 2
    assert len(handle.caches) == 2  # one for each layout
    packed = 8 * 3 * 64 * (64 * 3 / 8 + 2 * 3)  # codes, and the scale and zero point of two groups in each row
    assert handle.caches[0].expert_bytes * 8 == packed
    handle.close()
