"""Vision-language models: the language model inside is compressed, and everything else stays as it is, bit for bit."""

import json
from pathlib import Path

import jobs
import pytest
import torch
import transformers
from changed_models import refused
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from test_packed_loading import compress
from torch import Tensor
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForImageTextToText,
    AutoTokenizer,
    Ernie4_5_VLMoeConfig,
    Gemma4Config,
    Glm4vMoeConfig,
    Llama4Config,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3_5MoeConfig,
    Qwen3VLMoeConfig,
)

from eacmoe_lightning import load
from eacmoe_lightning.calibration.head import check_head, quantize_head
from eacmoe_lightning.calibration.recipe import Recipe
from eacmoe_lightning.compressed.directory import save_compressed
from eacmoe_lightning.exports.export import export
from eacmoe_lightning.models.checkpoint import Checkpoint
from eacmoe_lightning.models.moe import MoEModel
from eacmoe_lightning.models.originals import BUNDLED, load_original
from eacmoe_lightning.models.self_check import check_parts
from eacmoe_lightning.models.streamed import StreamedModel
from eacmoe_lightning.models.transformers_loader import auto_class
from eacmoe_lightning.quantization.grid import Grid, round_to_nearest
from eacmoe_lightning.runtime.packed_modules import PackedLinear

TEXT = {
    "vocab_size": 4096, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 16, "max_position_embeddings": 4096, "initializer_range": 0.08, "bos_token_id": None, "eos_token_id": 0,
    "pad_token_id": None,
}  # fmt: skip
SPARSE = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
VISION = {
    "depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2,
    "temporal_patch_size": 2, "out_hidden_size": 64,
}  # fmt: skip
IMAGES = {"image_token_id": 4090, "video_token_id": 4091}
CONFIGS: dict[str, PreTrainedConfig] = {  # as many layers in the vision tower as in the language model, or more
    "qwen3_vl_moe": Qwen3VLMoeConfig(
        text_config=TEXT | SPARSE | {"intermediate_size": 128, "rope_parameters": {
            "rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2], "mrope_interleaved": True}},
        vision_config=VISION | {"num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
        vision_start_token_id=4092, vision_end_token_id=4093, **IMAGES,
    ),
    "qwen3_5_moe": Qwen3_5MoeConfig(
        text_config=TEXT | SPARSE | {
            "shared_expert_intermediate_size": 64, "layer_types": ["linear_attention", "full_attention"],
            "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16,
            "linear_value_head_dim": 16, "rope_parameters": {
                "rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1], "mrope_interleaved": True,
                "partial_rotary_factor": 0.5}},
        vision_config=VISION | {"num_position_embeddings": 16},
        vision_start_token_id=4092, vision_end_token_id=4093, **IMAGES,
    ),
    "glm4v_moe": Glm4vMoeConfig(
        text_config=TEXT | {
            "intermediate_size": 128, "moe_intermediate_size": 64, "n_routed_experts": 8, "num_experts_per_tok": 2,
            "n_shared_experts": 1, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "rope_parameters": {
                "rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1], "partial_rotary_factor": 0.5}},
        vision_config=VISION | {"depth": 3, "image_size": 16}, **IMAGES,
    ),
    "gemma4": Gemma4Config(
        text_config=TEXT | {"intermediate_size": 64, "moe_intermediate_size": 64, "num_experts": 8, "top_k_experts": 2,
                            "enable_moe_block": True, "global_head_dim": 16, "hidden_size_per_layer_input": 0,
                            "pad_token_id": 0},
        vision_config={
            "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2,
            "intermediate_size": 64, "head_dim": 16, "patch_size": 4},
        audio_config=None,
    ),
    "llama4": Llama4Config(
        text_config=TEXT | {"intermediate_size": 64, "intermediate_size_mlp": 128, "num_local_experts": 8,
                            "num_experts_per_tok": 1},
        vision_config={
            "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128,
            "image_size": 16, "patch_size": 4, "vision_output_dim": 32, "projector_input_dim": 32,
            "projector_output_dim": 32},
        image_token_index=4090,
    ),
    "ernie4_5_vl_moe": Ernie4_5_VLMoeConfig(  # each block has experts for text and others for images
        text_config=TEXT | {"intermediate_size": 128, "moe_intermediate_size": [64, 32], "moe_num_experts": 8,
                            "moe_k": 2, "moe_num_shared_experts": 1, "pad_token_id": 0, "bos_token_id": 1,
                            "eos_token_id": 2, "rope_parameters": {
                                "rope_type": "default", "rope_theta": 1e4, "mrope_section": [3, 3, 2]}},
        vision_config={
            "depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "patch_size": 4,
            "spatial_merge_size": 2, "temporal_merge_size": 2, "text_hidden_size": 64},
        image_start_token_id=4088, image_end_token_id=4089, video_start_token_id=4086, video_end_token_id=4087,
        **IMAGES,
    ),
}  # fmt: skip
if "muse_spark" in CONFIG_MAPPING:  # from 5.24 on
    CONFIGS["muse_spark"] = CONFIG_MAPPING["muse_spark"](
        text_config=TEXT | {"intermediate_size": 128, "moe_hidden_size": 32, "moe_intermediate_size": 64,
                            "num_local_experts": 8, "num_experts_per_tok": 2, "output_multiplier": 0.5,
                            "sliding_window": 24},
        vision_config={"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64,
                       "patch_size": 4, "out_hidden_size": 64},
        audio_config={"hidden_sizes": [2, 4, 8, 16], "hidden_size": 32, "out_hidden_size": 64,
                      "intermediate_size": 32, "num_attention_heads": 2},
        out_hidden_size=64, projector_hidden_size=32, image_token_id=4090, video_token_id=4091, audio_token_id=4092,
    )  # fmt: skip
PROCESSOR = {"image_processor_type": "Qwen2VLImageProcessor", "patch_size": 4}
kinds = pytest.mark.parametrize("kind", CONFIGS)


@pytest.fixture(scope="module")
def wrapper(tmp_path_factory):
    """`wrapper(kind)`: the directory of a tiny vision-language model with a tokenizer and a processor's file."""
    folders: dict[str, Path] = {}

    def build(kind: str) -> Path:
        if kind not in folders:
            folder = tmp_path_factory.mktemp(kind)
            model = write(kind, folder)
            try:
                model(torch.tensor([[1, 2]]))
            except AttributeError as error:  # Llama 4 with 5.24: its text half returns no `image_outputs`
                pytest.skip(f"{kind}: transformers {transformers.__version__} cannot run it on text ({error})")
            folders[kind] = folder
        return folders[kind]

    return build


def write(kind: str, folder: Path) -> PreTrainedModel:
    """The model, written into a directory."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForImageTextToText.from_config(CONFIGS[kind], dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("gate.weight", "router.weight")):
                parameter *= 6  # a fresh router selects nearly uniformly
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(BUNDLED).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    return model


def outside(weights: dict[str, Tensor], blocks: list) -> dict[str, Tensor]:
    """Everything but the blocks of the language model."""
    names = tuple(f"{block.name}." for block in blocks)
    return {name: tensor for name, tensor in weights.items() if not name.startswith(names)}


@kinds
@torch.no_grad()
def test_a_wrapper_is_streamed_as_it_is_loaded(kind, wrapper, tokens):
    whole = AutoModelForImageTextToText.from_pretrained(wrapper(kind)).eval()
    streamed = StreamedModel(Checkpoint(str(wrapper(kind))))
    assert type(streamed.model) is type(whole) and len(streamed.blocks) == 2
    tied = whole.all_tied_weights_keys if getattr(whole.config, "tie_word_embeddings", False) else ()
    state = {name: tensor for name, tensor in whole.state_dict().items() if name not in tied}
    read = streamed.read(state)
    assert all(torch.equal(read[name], tensor) for name, tensor in state.items())
    expected = whole(tokens, use_cache=False).logits
    torch.testing.assert_close(streamed.logits(tokens), expected, rtol=1e-5, atol=1e-5)


@kinds
@torch.no_grad()
def test_a_compressed_wrapper_loads_and_exports_as_the_wrapper(kind, wrapper, tokens, tmp_path):
    folder, compressed, dense = wrapper(kind), tmp_path / "compressed", tmp_path / "dense"
    moe, blocks = MoEModel(load_original(str(folder))), []
    for block in moe.blocks:
        quantized = {
            n: round_to_nearest(w, Grid(8, 16, symmetric=True))
            for n, (_, w) in block.weights().items() if w.shape[-1] % 16 == 0
        }  # fmt: skip
        moe.put({name: block.as_parameter(name, q.dequantize()) for name, q in quantized.items()})
        blocks.append(quantized)
    save_compressed(compressed, moe, str(folder), blocks, {"method": "rtn"})
    export(str(compressed), str(dense), "dense")

    original = AutoModelForImageTextToText.from_pretrained(folder)
    logits = moe.model(tokens, use_cache=False).logits
    for model in (load(compressed), load(compressed, packed=False), AutoModelForImageTextToText.from_pretrained(dense)):
        assert type(model) is type(original)
        torch.testing.assert_close(model.eval()(tokens, use_cache=False).logits, logits, rtol=1e-4, atol=1e-4)
        loaded = outside(model.state_dict(), moe.blocks)
        for name, tensor in outside(original.state_dict(), moe.blocks).items():
            assert torch.equal(loaded[name], tensor), name
    card = (compressed / "README.md").read_text()
    assert "`AutoModelForImageTextToText.from_pretrained`" in card and "vLLM" not in card
    assert ModelCard(card).data.pipeline_tag == "image-text-to-text"
    for directory in (compressed, dense):
        assert json.loads((directory / "preprocessor_config.json").read_text()) == PROCESSOR
    config = json.loads((dense / "config.json").read_text())
    assert config["architectures"] == [type(original).__name__] and config["vision_config"]
    stored = {name for file in dense.glob("*.safetensors") for name in load_file(file)}
    assert stored == {name for file in folder.glob("*.safetensors") for name in load_file(file)}


@kinds
@torch.no_grad()
def test_a_wrapper_runs_with_a_packed_head(kind, wrapper, tokens, tmp_path):
    """Gemma 4's is tied to an embedding that scales what it looks up."""
    folder, compressed, dense = wrapper(kind), tmp_path / "compressed", tmp_path / "dense"
    moe = MoEModel(load_original(str(folder)))
    head = quantize_head(moe, Recipe(head_bits=6, group_size=32))
    check_head(moe, head, tokens, check_parts(moe, tokens))
    moe.put({name: weight.dequantize() for name, weight in head.items()})
    save_compressed(compressed, moe, str(folder), [{}] * 2, {"method": "none", "quantizer": "none"}, head=head)
    export(str(compressed), str(dense), "dense")
    expected = moe.model(tokens, use_cache=False).logits
    packed = load(compressed)
    assert isinstance(packed.get_output_embeddings(), PackedLinear)
    for model in (packed, load(compressed, packed=False), AutoModelForImageTextToText.from_pretrained(dense)):
        torch.testing.assert_close(model.eval()(tokens, use_cache=False).logits, expected, rtol=1e-4, atol=1e-4)


def test_gguf_holds_the_language_model_of_a_wrapper(wrapper, tmp_path):
    """It is what the language model alone gives, and the rest is what a warning names."""
    gguf = pytest.importorskip("gguf")
    compress(wrapper("qwen3_5_moe"), tmp_path / "compressed", symmetric=True)
    with pytest.warns(UserWarning, match=r"only, without model\.visual\..* and \d+ other tensors: .*--mmproj"):
        export(str(tmp_path / "compressed"), str(tmp_path / "gguf"), "gguf")
    stored = {t.name: t for t in gguf.GGUFReader(tmp_path / "gguf" / "model.gguf").tensors}
    state = load(tmp_path / "compressed", packed=False).state_dict()
    for name, parameter in {
        "token_embd.weight": "model.language_model.embed_tokens.weight",
        "blk.1.attn_q.weight": "model.language_model.layers.1.self_attn.q_proj.weight",
        "blk.0.ffn_down_exps.weight": "model.language_model.layers.0.mlp.experts.down_proj",
    }.items():
        decoded = gguf.dequantize(stored[name].data, stored[name].tensor_type).reshape(state[parameter].shape)
        assert (decoded == state[parameter].numpy()).all(), name
    assert {name.split(".")[0] for name in stored} == {"token_embd", "blk", "output_norm", "output"}


def test_what_a_config_names_is_built(wrapper):
    """A config of both kinds builds the language model alone only if it says so."""
    config = AutoConfig.from_pretrained(wrapper("qwen3_5_moe"))
    assert auto_class(config) is AutoModelForImageTextToText
    config.architectures = None
    assert auto_class(config) is AutoModelForImageTextToText
    config.architectures = ["Qwen3_5MoeForCausalLM"]
    assert auto_class(config).__name__ == "AutoModelForCausalLM"


def test_a_type_without_a_language_model_is_refused_by_one_message(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit", "architectures": ["ViTModel"]}))
    with pytest.raises((FileNotFoundError, ValueError), match="transformers has no language model for the type 'vit'"):
        load_original(str(tmp_path))


@pytest.mark.slow
@pytest.mark.skipif(not transformers.__version__.startswith("5.24."), reason="the fault of another version")
def test_a_model_that_this_transformers_cannot_run_is_refused_by_one_sentence(tmp_path, capsys):
    write("llama4", tmp_path / "model")
    message = refused(tmp_path / "model", tmp_path / "run", capsys)
    assert "Llama4ForConditionalGeneration of transformers 5.24" in message and "try another version" in message


def test_a_wrapper_is_fitted(wrapper, tmp_path):
    folder = wrapper("qwen3_vl_moe")
    run = jobs.fit(folder, tmp_path / "run", model__joint_epochs=1, data__num_windows=4, data__batch_size=2)
    model = load(run)
    original = AutoModelForImageTextToText.from_pretrained(folder).state_dict()
    loaded = model.state_dict()
    vision = [name for name in original if "visual" in name]
    assert len(vision) > 30 and all(torch.equal(loaded[name], original[name]) for name in vision)
    export(str(run), str(tmp_path / "dense"), "dense")
