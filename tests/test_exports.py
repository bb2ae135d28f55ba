"""Exports are read back by their own programs' rules: transformers for dense models, NumPy for GPTQ's words."""

import json
from pathlib import Path

import numpy as np
import pytest
import tiny_models
import torch
from safetensors.torch import load_file
from test_packed_loading import compress, folder_of, tokens  # noqa: F401  (fixtures)
from transformers import AutoModelForCausalLM

from eacmoe_lightning import load
from eacmoe_lightning.cli import main
from eacmoe_lightning.exports import export

families = pytest.mark.parametrize("family", tiny_models.MOE_FAMILIES)


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}


@families
@torch.no_grad()
def test_a_dense_export_is_the_decoded_model(family, folder_of, tiny_model_dir, tokens, tmp_path):  # noqa: F811
    folder = folder_of(family)
    main(["export", "--source", str(folder), "--output", str(tmp_path / "out"), "--format", "dense"])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(model(tokens).logits, load(folder, packed=False)(tokens).logits)
    assert tensors_of(tmp_path / "out").keys() == tensors_of(tiny_model_dir(family)).keys()


def test_gptq_words_hold_the_codes(folder_of, tmp_path):  # noqa: F811
    """v2: qweight [I / 32 * bits, O] int32 words, eight 4-bit codes each; true zero points; scales [G, O]."""
    folder = folder_of("mixtral")
    export(str(folder), str(tmp_path / "out"), "gptq_v2")
    stored, name = tensors_of(tmp_path / "out"), "model.layers.0.self_attn.q_proj"
    shifts = np.arange(0, 32, 4)
    words, zeros = (stored[f"{name}.{n}"].numpy().view(np.uint32) for n in ("qweight", "qzeros"))
    codes = (words[:, None, :] >> shifts[:, None] & 15).reshape(-1, words.shape[1]).astype(int)  # [I, O]
    zero = (zeros[:, :, None] >> shifts & 15).reshape(len(zeros), -1).astype(int)  # [G, O]
    group = stored[f"{name}.g_idx"].numpy()
    weight = (codes - zero[group]) * stored[f"{name}.scales"].numpy().astype(np.float32)[group]
    expected = load(folder, packed=False).state_dict()[f"{name}.weight"].numpy()
    np.testing.assert_allclose(weight.T, expected, rtol=1e-6)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "gptq"


@pytest.mark.parametrize("form", ["compressed-tensors", "gptq"])
def test_what_the_target_does_not_load_is_refused(form, folder_of, tmp_path):  # noqa: F811
    with pytest.raises(ValueError, match="asymmetric.*--model.symmetric true"):
        export(str(folder_of("mixtral")), str(tmp_path / "out"), form)
    assert not (tmp_path / "out").exists()


def test_bad_places_are_refused(folder_of, tmp_path, capsys):  # noqa: F811
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(ValueError, match="--output.*not empty"):
        export(str(folder_of("mixtral")), str(tmp_path / "full"), "dense")
    with pytest.raises(SystemExit):
        main(["export", "--source", str(tmp_path), "--output", str(tmp_path / "out"), "--format", "dense"])
    assert "(--source) is neither a run directory nor a compressed directory" in capsys.readouterr().err
