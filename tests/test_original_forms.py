"""Originals whose files or configs have an unusual form, or those of other programs: read as meant, or refused."""

import json
from collections.abc import Callable

import jobs
import pytest
import tiny_models
import torch
from architectures import build_from, config_of
from changed_models import Tensors, changed, refused
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForImageTextToText
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from eacmoe_lightning.cli import main
from eacmoe_lightning.compressed.opening import open_model
from eacmoe_lightning.models.checkpoint import Checkpoint
from eacmoe_lightning.models.moe import MoEModel
from eacmoe_lightning.models.originals import load_original
from eacmoe_lightning.models.self_check import check_parts
from eacmoe_lightning.models.streamed import StreamedModel
from eacmoe_lightning.models.tokenizer import tokenizer_of
from eacmoe_lightning.run.files import StoreError

ROPE = {
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 1024},
    "dynamic": {"factor": 2.0},
    "longrope": {"original_max_position_embeddings": 8, "short_factor": [1.0] * 8, "long_factor": [4.0] * 8},
}


@pytest.mark.parametrize("kind", ROPE)
def test_a_config_without_head_dim_takes_every_kind_of_rope(kind, tiny_model_dir, tmp_path, tokens):
    """transformers multiplies by a `head_dim` of null, which is what Mixtral's config has."""
    rope = {"rope_type": kind, "rope_theta": 1e4, **ROPE[kind]}
    logits = []
    for head_dim in (None, 16):
        folder = tmp_path / str(head_dim)
        changed(tiny_model_dir("mixtral"), folder, rope_parameters=rope, head_dim=head_dim)
        moe = StreamedModel(Checkpoint(str(folder)))
        check_parts(moe, tokens)
        logits.append(moe.logits(tokens))
        assert len(tokenizer_of(str(folder))) == tiny_models.VOCABULARY  # transformers reads the config for it as well
    assert torch.equal(*logits)


def test_a_config_that_asks_for_tuples_runs(tiny_model_dir, tmp_path, tokens):
    folder = changed(tiny_model_dir("mixtral"), tmp_path / "model", return_dict=False)
    moe = StreamedModel(Checkpoint(str(folder)))
    moe.load_all()
    assert torch.equal(moe.model(tokens, use_cache=False).logits, moe.logits(tokens))


def renamed(old: str, new: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {key.replace(old, new, 1): tensor for key, tensor in tensors.items()}


def with_adapter(tensors: Tensors) -> Tensors:
    lora = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
    return tensors | {f"{lora}A.weight": torch.ones(4, 64), f"{lora}B.weight": torch.ones(64, 4)}


@pytest.mark.parametrize(
    "change, messages",
    [
        (renamed("", "_orig_mod."), ["`_orig_mod.`, of torch.compile", "rename the tensors to lm_head.weight"]),
        (renamed("", "module."), ["`module.`, of Distributed", "save the unwrapped model"]),
        (renamed("layers.1.", "layers.1._checkpoint_wrapped_module."), ["activation checkpointing", "model.layers.1."]),
        (renamed("", "model.language_model."), ["`model.language_model.`, of a model of images", "to lm_head.weight"]),
        (renamed("", "language_model."), ["`language_model.`, of a model of images", "to lm_head.weight"]),
        (renamed("", "transformer."), ["`transformer.`, of another program", "to lm_head.weight"]),
        (with_adapter, ["holds 2 tensors of an adapter such as base_model.model.", "merge it into its base model"]),
    ],
)
def test_weights_of_wrapped_models_and_of_adapters_are_refused(change, messages, tiny_model_dir, tmp_path, capsys):
    folder = changed(tiny_model_dir("mixtral"), tmp_path / "model", change)
    error = refused(folder, tmp_path / "run", capsys)
    assert all(message in error for message in [*messages, "--model.name_or_path"]), error


def test_no_command_runs_a_model_that_lacks_weights(tiny_model_dir, tmp_path):
    """transformers' own loader draws them at random and goes on."""
    folder = changed(tiny_model_dir("mixtral"), tmp_path / "model", renamed("lm_head", "head"))
    with pytest.warns(UserWarning, match="head.weight"), pytest.raises(StoreError, match=r"lack lm_head\.weight"):
        open_model(str(folder)).in_memory()
    with pytest.raises(FileNotFoundError, match=r"lack lm_head\.weight"):
        load_original(str(folder))


@pytest.mark.parametrize(
    "config, message",
    [
        ({"hidden_act": "swoosh"}, "it does not know hidden_act='swoosh'"),
        (
            {"rope_parameters": {"rope_type": "su", "rope_theta": 1e4}},
            "it does not know rope_parameters.rope_type='su'",
        ),
        ({"pad_token_id": 4096}, "Padding_idx must be within num_embeddings"),
    ],
)
def test_options_that_transformers_does_not_take_are_named(config, message, tiny_model_dir, tmp_path):
    folder = changed(tiny_model_dir("mixtral"), tmp_path / "model", **config)
    with pytest.raises(FileNotFoundError) as error:
        Checkpoint(str(folder))
    assert message in str(error.value) and "its config.json" in str(error.value)


def test_a_model_that_runs_blocks_several_times_is_refused(tokens):
    model = tiny_models.build("mixtral")
    moe = MoEModel(model)
    model.model.layers = torch.nn.ModuleList([*model.model.layers, model.model.layers[1]])
    model.config.num_hidden_layers = 4
    with pytest.raises(ValueError, match="runs model.layers.1 more than once"):
        check_parts(moe, tokens)


@pytest.mark.parametrize("stored", [True, False])
def test_shared_experts_of_no_width_are_none(stored, tmp_path, tokens, tokenizer):
    """transformers makes empty matrices of `n_shared_experts: 0`, which not every checkpoint holds."""
    folder = tmp_path / "model"
    model = build_from(config_of("glm4_moe", n_shared_experts=0))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if not stored:
        weights = load_file(folder / "model.safetensors")
        save_file({k: t for k, t in weights.items() if t.numel()}, folder / "model.safetensors", {"format": "pt"})
    moe = StreamedModel(Checkpoint(str(folder)))
    check_parts(moe, tokens)
    with torch.no_grad():
        assert torch.equal(moe.logits(tokens), model(tokens, use_cache=False).logits)
    if stored:
        run = jobs.fit(folder, tmp_path / "run", model__block_epochs=0, model__joint_epochs=0)
        main(["export", "--source", str(run), "--output", str(tmp_path / "dense"), "--format", "dense"])
        with pytest.raises(SystemExit):
            main(["export", "--source", str(run), "--output", str(tmp_path / "gguf"), "--format", "gguf"])


@pytest.mark.skipif("step3p7" not in CONFIG_MAPPING_NAMES, reason="transformers 5.24 has it")
def test_step_has_experts_without_the_usual_marks(tmp_path, tokens):
    """Some of its experts clamp the activated gate."""
    text = {
        **{**tiny_models.COMMON, "pad_token_id": 1, "head_dim": 16, "intermediate_size": 128, "share_expert_dim": 64},
        **{"n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "sliding_window": 8},
        "mlp_layer_types": ["dense", "sparse", "sparse"],
        "layer_types": ["full_attention", "sliding_attention", "full_attention"],
        "rope_parameters": dict.fromkeys(
            ("full_attention", "sliding_attention"), {"rope_type": "default", "rope_theta": 1e4}
        ),
        **{"swiglu_limits": [0.0, 0.5, 0.0], "swiglu_limits_shared": [0.0, 0.4, 0.0], "num_sliding_attention_heads": 2},
    }
    vision = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    config = AutoConfig.for_model("step3p7", text_config=text, vision_config=vision)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32).eval()
    model.save_pretrained(tmp_path)
    moe = StreamedModel(Checkpoint(str(tmp_path)))
    check_parts(moe, tokens)
    assert len(moe.moe_blocks) == 2
    with torch.no_grad():
        assert torch.equal(moe.logits(tokens), model(tokens, use_cache=False).logits)


@pytest.mark.parametrize("factor", [1, 2])
def test_a_tensor_in_two_files_must_be_the_same_in_both(factor, tiny_model_dir, tmp_path):
    """The index names one of them, and transformers takes that in the last file."""
    folder = changed(tiny_model_dir("mixtral"), tmp_path / "model")
    tensors, key = load_file(folder / "model.safetensors"), "model.norm.weight"
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    save_file({key: factor * tensors.pop(key)}, folder / "model-00002-of-00002.safetensors", {"format": "pt"})
    files = dict.fromkeys(tensors, "model-00001-of-00002.safetensors") | {key: "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    if factor == 1:
        Checkpoint(str(folder))
        return
    with pytest.raises(ValueError, match=r"holds model.norm.weight twice .* in model-00001-of-00002.safetensors and"):
        Checkpoint(str(folder))


def test_a_tokenizer_with_dropout_repeats_itself(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    content["model"]["dropout"] = 0.5
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    text = "It was the best of times, it was the worst of times. " * 9
    assert tokenizer_of(str(tmp_path))(text)["input_ids"] == tokenizer(text)["input_ids"]
