"""Codes that would be taken for weights are refused, unused tensors are listed, and testbeds go by name."""

from pathlib import Path

import jobs
import pytest
import torch
from changed_models import Tensors, changed, float8, refused
from transformers import AutoModelForCausalLM

from eacmoe_lightning.cli import main
from eacmoe_lightning.models import originals
from eacmoe_lightning.models.checkpoint import Checkpoint
from eacmoe_lightning.models.moe import MoEModel
from eacmoe_lightning.models.originals import BUNDLED, load_original, read_config, resolve_model, stored_name
from eacmoe_lightning.models.streamed import StreamedModel
from eacmoe_lightning.planning.shapes import load_shapes

# --- codes that would be taken for weights


def without_scales(tensors: Tensors) -> Tensors:
    return {key: weight for key, weight in float8(tensors).items() if not key.endswith("_scale_inv")}


def stray_scales(tensors: Tensors) -> Tensors:
    """Scales beside weights in float32, as if the weights had been cast without them."""
    return {key: t.float() if t.dtype == torch.float8_e4m3fn else t for key, t in float8(tensors).items()}


def int8(tensors: Tensors) -> Tensors:
    """Codes alone."""
    return {key: (t * 100).to(torch.int8) if "q_proj" in key else t for key, t in tensors.items()}


def words(tensors: Tensors) -> Tensors:
    """GPTQ whose config is lost."""
    out = dict(tensors)
    for key in [key for key in tensors if "q_proj" in key]:
        name = key.removesuffix(".weight")
        del out[key]
        out |= {f"{name}.qweight": torch.zeros(8, 64, dtype=torch.int32), f"{name}.scales": torch.ones(2, 64)}
    return out


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (float8, "72 weights in float8_e4m3fn, such as model.layers.0.block_sparse_moe.experts.0.w1.weight"),
        (without_scales, "72 weights in float8_e4m3fn"),
        (stray_scales, "72 tensors like model.layers.0.block_sparse_moe.experts.0.w1.weight_scale_inv"),
        (int8, "3 weights in int8, such as model.layers.0.self_attn.q_proj.weight"),
        (words, "6 tensors like model.layers.0.self_attn.q_proj.qweight"),
    ],
)
def test_codes_without_a_quantization_config_are_refused(change, named, tiny_model_dir, tmp_path, capsys):
    error = refused(changed(tiny_model_dir("mixtral"), tmp_path / "model", change), tmp_path / "run", capsys)
    assert named in error and "--model.name_or_path" in error and "no `quantization_config`" in error
    if change is float8:
        with pytest.raises(SystemExit):
            main(["plan", *jobs.options(tmp_path / "model", tmp_path / "run")])
        assert named in capsys.readouterr().err


def test_codes_that_the_quantization_config_does_not_decode_are_refused(tiny_model_dir, tmp_path, capsys):
    folder = changed(
        tiny_model_dir("mixtral"), tmp_path / "model", without_scales, quantization_config={"quant_method": "fp8"}
    )
    error = refused(folder, tmp_path / "run", capsys)
    assert "72 weights in float8_e4m3fn" in error and "does not say how" in error


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"quant_method": "bitsandbytes", "load_in_4bit": True},
            "is quantized by bitsandbytes.*only fp8.*modelopt can be",
        ),
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "AWQ of version 'gemv'"),
        ({"quant_method": "compressed-tensors", "transform_config": {"a": 1}}, "rotated"),
    ],
)
def test_an_unknown_scheme_is_refused(config, message, tiny_model_dir, tmp_path):
    folder = changed(tiny_model_dir("mixtral"), tmp_path / "model", quantization_config=config)
    with pytest.raises(ValueError, match=f"--model.name_or_path.*{message}"):
        Checkpoint(str(folder))


# --- tensors that nothing uses


def test_unused_tensors_are_listed(tiny_model_dir, tmp_path):
    extra = {f"model.layers.{i}.adapter.weight": torch.ones(2, 2) for i in range(3)} | {"other.bias": torch.ones(3)}
    folder = changed(tiny_model_dir("mixtral"), tmp_path / "model", lambda tensors: tensors | extra)
    with pytest.warns(UserWarning, match="4 tensors that MixtralForCausalLM does not use.*layers.0.adapter.weight"):
        Checkpoint(str(folder))


def test_what_is_computed_or_ignored_by_transformers_is_no_fault(tiny_model_dir, tmp_path, recwarn):
    extra = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(8) for i in range(3)}
    folder = changed(tiny_model_dir("mixtral"), tmp_path / "model", lambda tensors: tensors | extra)
    Checkpoint(str(folder))
    assert not [w for w in recwarn if "does not use" in str(w.message)]


# --- models of this project


def test_float64_runs_in_float32(tiny_model_dir, tmp_path, tokens):
    def double(tensors: Tensors) -> Tensors:
        return {key: tensor.double() for key, tensor in tensors.items()}

    folder = changed(tiny_model_dir("mixtral"), tmp_path / "model", double, dtype="float64")
    with torch.no_grad():
        own = AutoModelForCausalLM.from_pretrained(tiny_model_dir("mixtral"))(tokens, use_cache=False).logits
        assert torch.equal(StreamedModel(Checkpoint(str(folder))).logits(tokens), own)
    assert load_shapes(str(folder), "auto").model.dtype == torch.float32


def test_a_config_that_asks_for_attentions_runs(tiny_model_dir, tmp_path, tokens):
    folder = changed(tiny_model_dir("mixtral"), tmp_path / "model", output_attentions=True)
    moe = StreamedModel(Checkpoint(str(folder)))
    with torch.no_grad():
        own = AutoModelForCausalLM.from_pretrained(tiny_model_dir("mixtral"))(tokens, use_cache=False).logits
        assert torch.equal(moe.logits(tokens), own)
    assert moe.model.config.output_attentions


def test_testbeds_of_a_checkout_go_by_name(tmp_path, monkeypatch):
    """`bundled:NAME` is a directory of `testbeds/`; an installed package has none and says so."""
    assert resolve_model("bundled") == str(BUNDLED)
    directory = Path(resolve_model("bundled:fine-moe"))
    assert read_config("bundled:fine-moe")[0].model_type == "glm4_moe"
    assert stored_name("bundled:fine-moe") == "bundled:fine-moe" and stored_name(str(directory)) == str(directory)
    with pytest.raises(FileNotFoundError, match="no model bundled:fine: there are bundled and bundled:fine-moe"):
        resolve_model("bundled:fine")
    monkeypatch.setattr(originals, "TESTBEDS", tmp_path / "testbeds")
    with pytest.raises(FileNotFoundError, match="in a checkout of the repository"):
        resolve_model("bundled:fine-moe")


def test_the_second_testbed_runs_with_every_block_taken_apart():
    """Its habits: a dense first block, sigmoid scores with a correction, a shared expert, weights not renormalised."""
    moe = MoEModel(load_original("bundled:fine-moe", "float32"))
    assert [block.is_moe for block in moe.blocks] == [False, True, True, True, True]
    assert (moe.num_experts, moe.top_k) == (16, 4)
    ids = torch.randint(4096, (1, 24), generator=torch.Generator().manual_seed(0))
    state = None
    for index, block in enumerate(moe.blocks):
        state, routing = block.forward(moe.call(index, ids, state))
        if routing is not None:
            weights = routing.logits.sigmoid().gather(-1, routing.ids)
            torch.testing.assert_close(routing.weights, weights)
    torch.testing.assert_close(moe.head(state, ids), moe.model(ids).logits)
