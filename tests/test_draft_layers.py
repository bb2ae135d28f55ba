"""Draft layers of an original are kept in what is written, and are no longer promised where they are lost."""

import json
import re
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from changed_models import Tensors, changed, float8
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Glm4MoeConfig

from eacmoe_lightning import load
from eacmoe_lightning.compressed.directory import save_compressed
from eacmoe_lightning.exports.export import export
from eacmoe_lightning.models.checkpoint import Checkpoint
from eacmoe_lightning.models.moe import MoEModel
from eacmoe_lightning.models.originals import BUNDLED
from eacmoe_lightning.models.streamed import StreamedModel
from eacmoe_lightning.quantization.grid import Grid, round_to_nearest


@pytest.fixture(scope="module")
def glm(tmp_path_factory) -> Path:
    config = Glm4MoeConfig(
        vocab_size=4096, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
        intermediate_size=128, moe_intermediate_size=64, n_routed_experts=8, num_experts_per_tok=2, n_group=1,
        topk_group=1, first_k_dense_replace=1, pad_token_id=None, eos_token_id=0,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    folder = tmp_path_factory.mktemp("glm")
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(BUNDLED).save_pretrained(folder)
    return folder


def numbered(tensors: Tensors) -> Tensors:
    """GLM-4.5 and DeepSeek-V3: the layer after the last one."""
    layer = {name.replace("layers.1.", "layers.2."): t.clone() for name, t in tensors.items() if ".layers.1." in name}
    return layer | {"model.layers.2.eh_proj.weight": torch.randn(64, 128).bfloat16()}


def named(tensors: Tensors) -> Tensors:
    """Qwen3-Next and 3.5."""
    layer = {name.replace("model.layers.1.", "mtp.layers.0."): t for name, t in tensors.items() if ".layers.1." in name}
    return layer | {"mtp.fc.weight": torch.randn(64, 128), "mtp.norm.weight": torch.ones(64)}


def with_draft(folder: Path, out: Path, layers: Callable[[Tensors], Tensors], **config) -> tuple[Path, Tensors]:
    draft = layers(load_file(folder / "model.safetensors"))
    return changed(folder, out, lambda tensors: tensors | draft, **config), draft


def compress(folder: Path, out: Path, remove: bool = False) -> Path:
    """A compressed directory, rounded to nearest in groups of 32, with or without the last two experts."""
    moe, blocks = MoEModel(AutoModelForCausalLM.from_pretrained(folder)), []
    if remove:
        from eacmoe_lightning.models.shrink import keep_experts

        for block in moe.moe_blocks:
            keep_experts(block, range(6))
    for block in moe.blocks:
        quantized = {n: round_to_nearest(w, Grid(4, 32, True)) for n, (_, w) in block.weights().items()}
        moe.put({name: block.as_parameter(name, q.dequantize()) for name, q in quantized.items()})
        blocks.append(quantized)
    save_compressed(out, moe, str(folder), blocks, {"method": "rtn"})
    return out


def tensors_of(folder: Path) -> Tensors:
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    return {key: tensor for file in set(index.values()) for key, tensor in load_file(folder / file).items()}


@pytest.mark.parametrize(
    ("layers", "option"), [(numbered, {"num_nextn_predict_layers": 1}), (named, {"mtp_num_hidden_layers": 1})]
)
def test_draft_layers_are_kept_bit_for_bit(layers, option, glm, tmp_path, recwarn):
    folder, draft = with_draft(glm, tmp_path / "model", layers, **option)
    compressed = compress(folder, tmp_path / "compressed")
    for form in ("dense", "gptq_v2", "compressed-tensors"):
        pytest.importorskip("compressed_tensors")
        export(str(compressed), str(tmp_path / form), form)
        written, config = tensors_of(tmp_path / form), json.loads((tmp_path / form / "config.json").read_text())
        for key, tensor in draft.items():
            assert written[key].dtype == tensor.dtype and torch.equal(written[key], tensor), (form, key)
        assert {key: config[key] for key in option} == option
        prefix = "mtp." if layers is named else "model.layers.2."
        if form == "gptq_v2":
            assert next(iter(config["quantization_config"]["dynamic"])) == f"-:{re.escape(prefix)}"
        elif form == "compressed-tensors":
            assert f"re:{re.escape(prefix)}.*" in config["quantization_config"]["ignore"]
    assert not [w for w in recwarn if "draft" in str(w.message) or "does not use" in str(w.message)]
    load(compressed).save_pretrained(tmp_path / "again")
    file = "weights-draft.safetensors"
    assert (tmp_path / "again" / file).read_bytes() == (compressed / file).read_bytes()


def test_draft_layers_go_with_removed_experts(glm, tmp_path):
    folder, draft = with_draft(glm, tmp_path / "model", numbered, num_nextn_predict_layers=1)
    with pytest.warns(UserWarning, match=f"draft layers.*and {len(draft) - 1} other tensors.*left out.*promises 0"):
        compressed = compress(folder, tmp_path / "compressed", remove=True)
    export(str(compressed), str(tmp_path / "dense"), "dense")
    assert json.loads((tmp_path / "dense" / "config.json").read_text())["num_nextn_predict_layers"] == 0
    assert not draft.keys() & tensors_of(tmp_path / "dense").keys()


def test_draft_layers_that_the_files_lack_are_no_longer_promised(glm, tmp_path):
    folder = changed(glm, tmp_path / "model", num_nextn_predict_layers=1, num_mtp_modules=3, use_mtp=True)
    with pytest.warns(UserWarning, match="files hold none of the draft layers.*promises 0"):
        compressed = compress(folder, tmp_path / "compressed")
    export(str(compressed), str(tmp_path / "dense"), "dense")
    config = json.loads((tmp_path / "dense" / "config.json").read_text())
    assert config["num_nextn_predict_layers"] == config["num_mtp_modules"] == 0 and config["use_mtp"] is False


@pytest.mark.parametrize("layers", [numbered, named])
@pytest.mark.parametrize("missing", ["experts.3.up_proj.weight", "experts.5."])
def test_draft_layers_of_which_a_part_is_missing_are_left_out(layers, missing, glm, tmp_path):
    def partly(tensors: Tensors) -> Tensors:
        return {name: tensor for name, tensor in layers(tensors).items() if missing not in name}

    folder, _ = with_draft(glm, tmp_path / "original", partly, num_nextn_predict_layers=1)
    with pytest.warns(UserWarning, match="or only a part of them: the config of the result promises 0 of them"):
        out = compress(folder, tmp_path / "out")
    assert json.loads((out / "config.json").read_text())["original"]["config"]["num_nextn_predict_layers"] == 0
    assert not list(out.glob("*draft*"))


def test_layers_beyond_the_config_that_no_option_promises_are_unused(glm, tmp_path):
    folder, draft = with_draft(glm, tmp_path / "model", numbered, num_nextn_predict_layers=0)
    with pytest.warns(UserWarning, match=f"{len(draft)} tensors that Glm4MoeForCausalLM does not use"):
        Checkpoint(str(folder))


def test_draft_layers_of_a_quantized_original_are_decoded(glm, tmp_path):
    folder, draft = with_draft(glm, tmp_path / "full", numbered, num_nextn_predict_layers=1)
    config = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    stored = changed(folder, tmp_path / "model", float8, quantization_config=config)
    moe = StreamedModel(Checkpoint(str(stored)))
    out = tmp_path / "compressed"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save_compressed(out, moe, str(stored), [{} for _ in moe.blocks], {"quantizer": "none"})
    written = load_file(out / "weights-draft.safetensors")
    assert written.keys() == draft.keys()
    for key, tensor in draft.items():
        torch.testing.assert_close(written[key].float(), tensor.float(), rtol=0.07, atol=1e-3)
