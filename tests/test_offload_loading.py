"""`load_offloaded` gives the same model without ever holding more than one block of experts; offloading with PESF."""

import copy
import pickle
import warnings
from pathlib import Path

import architectures
import pytest
import tiny_models
import torch
from test_packed_loading import compress
from transformers import AutoModelForCausalLM, GptOssConfig

from eacmoe_lightning import load, load_offloaded, offload_experts, pesf
from eacmoe_lightning.models.checkpoint import Checkpoint
from eacmoe_lightning.models.originals import load_original
from eacmoe_lightning.offload.model import STORE


@torch.no_grad()
@pytest.mark.parametrize("family", ["mixtral", "deepseek"])
def test_an_original_is_loaded_a_block_at_a_time(family, tiny_model_dir, tokens, tmp_path, monkeypatch):
    seen, read = [], Checkpoint.read

    def counted(self, names):
        tensors = read(self, list(names))
        seen.append({name.split(".")[2] for name in tensors if name.endswith("experts.down_proj")})
        return tensors

    monkeypatch.setattr(Checkpoint, "read", counted)
    folder = tiny_model_dir(family)
    expected = load_original(str(folder))(tokens).logits
    model = load_offloaded(folder, 0.5, directory=tmp_path)
    assert torch.equal(model(tokens).logits, expected) and not model.training
    experts = [blocks for blocks in seen if blocks]
    assert experts == [{"0"}, {"1"}, {"2"}][family == "deepseek" :]  # deepseek's first block is dense
    model.offload.close()

    written = (tmp_path / STORE).stat().st_mtime_ns
    again = load_offloaded(folder, 0.5, directory=tmp_path)  # reuses the store
    assert torch.equal(again(tokens).logits, expected)
    assert experts == [blocks for blocks in seen if blocks]  # no experts were read again
    assert (tmp_path / STORE).stat().st_mtime_ns == written
    again.offload.close()

    other = load_offloaded(folder, 0.5, "plain", directory=tmp_path)  # another codec: written again
    assert (tmp_path / STORE).stat().st_mtime_ns > written and other.offload.store.about["codec"] == "plain"
    other.offload.close()


@torch.no_grad()
@pytest.mark.parametrize(
    ("family", "mixed", "share"), [("qwen3_moe", False, 1.0), ("deepseek", False, 1.0), ("qwen2_moe", True, 0.5)]
)
def test_a_compressed_directory_is_loaded_packed(family, mixed, share, tiny_model_dir, tokens, tmp_path):
    """`mixed`: experts of a block differ in bits."""
    folder = compress(tiny_model_dir(family), tmp_path / "compressed", mixed)
    expected = load(folder)(tokens).logits
    model = load_offloaded(tmp_path, share, "packed-zstd:3:32", directory=tmp_path / "store")
    torch.testing.assert_close(model(tokens).logits, expected, rtol=1e-5, atol=1e-5)
    model.config.to_json_string()
    with pytest.raises(ValueError, match="save the model it was made from"):
        model.save_pretrained(tmp_path / "saved")
    assert {model.offload.store.header(key).codec for key in model.offload.store} == {"packed-zstd"}
    model.offload.close()


@torch.no_grad()
@pytest.mark.parametrize("share", [1.0, 0.4])
def test_experts_with_biases_in_another_layout(share, tokens, tmp_path):
    """gpt_oss: transposed, interleaved, clamped, with biases, which stay in the model."""
    config = GptOssConfig(
        **{**tiny_models.COMMON, "head_dim": 16, "intermediate_size": 64, "num_hidden_layers": 2},
        num_local_experts=8,
        num_experts_per_tok=2,
    )
    original = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for name, parameter in original.named_parameters():
        if name.endswith("bias"):
            parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(len(name)))
    original.set_experts_implementation("eager")
    original.save_pretrained(tmp_path / "model")
    model = load_offloaded(tmp_path / "model", share)
    model.set_experts_implementation("eager")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # at 0.4 the cache is smaller than a block
        assert torch.equal(model(tokens).logits, original(tokens).logits)
    model.offload.close()


@torch.no_grad()
@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("share", [0.2, 0.6, 1.0])
def test_packed_experts_keep_their_biases_whatever_their_slots(share, mixed, tokens, tmp_path, tokenizer):
    """A cache may have fewer slots than a block has experts, or more."""
    architectures.build("gpt_oss").save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    folder = compress(tmp_path / "model", tmp_path / "compressed", mixed)
    expected = load(folder)(tokens).logits
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # at 0.2 the cache is smaller than a block
        model = load_offloaded(folder, share)
        for _ in range(2):
            torch.testing.assert_close(model(tokens).logits, expected, rtol=1e-4, atol=1e-4)
    model.offload.close()


@torch.no_grad()
@pytest.mark.parametrize("name", ["inkling_text", "zaya", "nemotron_h-latent"])
def test_routers_that_nothing_is_predicted_of(name, tokens, tmp_path):
    """Their matrices have rows for more than the experts, or read something else than the experts."""
    architectures.build(name).save_pretrained(tmp_path)
    model = load_offloaded(tmp_path, 0.5)
    torch.testing.assert_close(model(tokens).logits, load_original(str(tmp_path))(tokens).logits)
    model.offload.close()


def test_copies_and_other_dtypes_are_refused(tmp_path):
    architectures.build("mixtral").save_pretrained(tmp_path)
    dense = load_offloaded(tmp_path, 0.5)
    with pytest.raises(ValueError, match="pass dtype= to load_offloaded"):
        dense.bfloat16()
    for refused in (copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="cannot be copied or pickled, .* call load_offloaded"):
            refused(dense)
    dense.to("cpu")
    dense.offload.close()


def test_a_missing_model_is_named(tmp_path):
    with pytest.raises((FileNotFoundError, OSError, ValueError), match="nothing"):
        load_offloaded(Path(tmp_path / "nothing"), 1.0)


@torch.no_grad()
@pytest.mark.parametrize("share", [1.0, 0.2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_four_experts_a_token_add_up_in_the_same_order(dtype, share, tokens):
    config = tiny_models.config_of("qwen3_moe")
    config.num_experts_per_tok = 4
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    expected = model(tokens).logits
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        handle = offload_experts(model, share)
        assert torch.equal(model(tokens).logits, expected)
    handle.close()


@torch.no_grad()
@pytest.mark.parametrize("length", [1, 40])
def test_the_bundled_model_in_bfloat16_gives_the_same_bits(length):
    """Blocks of 20 experts; the cache has room for 30 of 120, and 80 tokens need all of them in turn."""
    ids = torch.randint(0, 4096, (2, length), generator=torch.Generator().manual_seed(1))
    expected = load_original("bundled")(ids).logits
    model = load_offloaded("bundled", 0.25)
    assert model.dtype == torch.bfloat16 and torch.equal(model(ids).logits, expected)
    model.offload.close()


@torch.no_grad()
def test_pesf_decides_before_anything_is_fetched(tokens):
    """Experts that PESF skips for all sequences are not requested; the result is that of PESF alone."""
    prompt = tokens[:1]
    reference, model = tiny_models.build("qwen3_moe"), tiny_models.build("qwen3_moe")
    handle = offload_experts(model, 1.0, lookahead=0)
    model(prompt)
    without = handle.counters.requests
    handle.counters.reset()
    with pesf(model, alpha=1.0), pesf(reference, alpha=1.0) as report:
        assert torch.equal(model(prompt).logits, reference(prompt).logits)
    assert 0 < handle.counters.requests < without, report
    handle.close()
