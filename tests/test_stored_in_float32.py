"""What an original stores in float32 beside bfloat16 weights: it reaches every result and export as it is stored."""

import json
from pathlib import Path

import architectures
import gguf
import jobs
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_packed_loading import compress
from torch import Tensor
from transformers import AutoModelForCausalLM

from eacmoe_lightning import load
from eacmoe_lightning.commands.prune import prune
from eacmoe_lightning.exports.export import export
from eacmoe_lightning.models.checkpoint import Checkpoint
from eacmoe_lightning.pruning.rule import PruningRule

WIDE = ("e_score_correction_bias", ".gate.weight")  # transformers narrows both of MiniMax-M2's


@pytest.fixture
def original(tokenizer, tmp_path) -> Path:
    """A model in bfloat16 whose routers and biases are float32, and no numbers of bfloat16."""
    folder = tmp_path / "original"
    architectures.build("minimax_m2").bfloat16().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    tensors, file = load_file(folder / "model.safetensors"), folder / "model.safetensors"
    generator = torch.Generator().manual_seed(0)
    for name, tensor in tensors.items():
        if name.endswith(WIDE):
            start = 7 if "bias" in name else tensor.float()
            tensors[name] = start + 1e-3 * torch.randn(tensor.shape, generator=generator)
    save_file(tensors, file, {"format": "pt"})
    return folder


def wide_tensors(folder: Path) -> dict[str, Tensor]:
    tensors = {name: t for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}
    return {name: tensor for name, tensor in tensors.items() if name.endswith(WIDE)}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys() and expected
    for name, tensor in expected.items():
        assert found[name].dtype == torch.float32 and torch.equal(found[name], tensor), name


@torch.no_grad()
def test_a_compressed_model_and_its_exports_have_it(original, tokens, tmp_path):
    expected = wide_tensors(original)
    compressed = compress(original, tmp_path / "compressed")
    in_memory = {name.replace("block_sparse_moe", "mlp"): tensor for name, tensor in expected.items()}
    assert_same(wide_tensors(compressed), in_memory)
    for form in ("dense", "compressed-tensors"):
        export(str(compressed), str(tmp_path / form), form)
        assert_same(wide_tensors(tmp_path / form), expected)
    export(str(compressed), str(tmp_path / "gguf"), "gguf")
    biases = [t for t in gguf.GGUFReader(tmp_path / "gguf" / "model.gguf").tensors if "exp_probs_b" in t.name]
    for tensor, (_, bias) in zip(biases, [item for item in in_memory.items() if "bias" in item[0]], strict=True):
        assert torch.equal(torch.from_numpy(tensor.data.copy()), bias)
    # transformers narrows them in every form, as it does in the original
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert whole.get_submodule("model.layers.0.mlp.gate").weight.dtype == torch.bfloat16
    assert torch.equal(whole(tokens).logits, load(compressed, packed=False)(tokens).logits)


@torch.no_grad()
def test_a_pruned_model_has_that_of_the_experts_that_stay(original, tmp_path):
    compressed = compress(original, tmp_path / "compressed")
    options = dict(num_windows=4, window_length=64, batch_size=2, texts=[])
    prune(str(original), str(tmp_path / "once"), PruningRule(keep=6), **options)
    prune(str(compressed), str(tmp_path / "twice"), PruningRule(keep=6), **options)
    expected = {name.replace("block_sparse_moe", "mlp"): tensor for name, tensor in wide_tensors(original).items()}
    for run in ("once", "twice"):
        kept = load(tmp_path / run, packed=False).config.kept_experts
        rows = {name: tensor[kept[name.split(".")[2]]] for name, tensor in expected.items()}
        assert_same(wide_tensors(tmp_path / run / "compressed"), rows)


def test_a_calibrated_router_is_written_as_it_was_calibrated(original, tmp_path):
    run = jobs.fit(original, tmp_path / "run", model__quantizer="rtn", data__num_windows=4, data__num_heldout_windows=1)
    found, narrow = wide_tensors(run / "compressed"), load(run, packed=False).state_dict()
    for name, tensor in wide_tensors(original).items():
        name = name.replace("block_sparse_moe", "mlp")
        is_bias = name.endswith("bias")
        assert torch.equal(found[name], tensor) == is_bias and torch.equal(found[name].bfloat16(), narrow[name])
    kept = json.loads((run / "compressed" / "config.json").read_text())["original"]["float32"]
    assert kept == sorted(name for name in found if name.endswith("bias"))


def test_a_model_that_is_stored_in_float32_as_a_whole_is_narrowed_as_its_config_says(original, tmp_path):
    tensors = {name: tensor.float() for name, tensor in load_file(original / "model.safetensors").items()}
    save_file(tensors, original / "model.safetensors", {"format": "pt"})
    assert not Checkpoint(str(original)).in_float32
