"""What is wrong with an original's files is said at the start, by name; what the model does not use is not lost."""

import json
import os
import pickle
import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import jobs
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, Glm4MoeConfig

from eacmoe_lightning import load
from eacmoe_lightning.cli import main
from eacmoe_lightning.compressed.directory import save_compressed
from eacmoe_lightning.exports.export import export
from eacmoe_lightning.models import originals
from eacmoe_lightning.models.checkpoint import Checkpoint
from eacmoe_lightning.models.moe import MoEModel
from eacmoe_lightning.models.originals import BUNDLED, load_original, read_config, resolve_model, stored_name
from eacmoe_lightning.models.streamed import StreamedModel
from eacmoe_lightning.planning.shapes import load_shapes
from eacmoe_lightning.quantization.grid import Grid, round_to_nearest
from eacmoe_lightning.run.files import StoreError

Tensors = dict[str, Tensor]


def changed(folder: Path, out: Path, change: Callable[[Tensors], Tensors] = dict, **config) -> Path:
    """A copy of a model in one file with other tensors and other options in its config."""
    out.mkdir()
    for file in folder.iterdir():
        if file.is_file() and file.suffix != ".safetensors":
            (out / file.name).write_bytes(file.read_bytes())
    (out / "config.json").write_text(json.dumps(json.loads((folder / "config.json").read_text()) | config))
    save_file(change(load_file(folder / "model.safetensors")), out / "model.safetensors", {"format": "pt"})
    return out


def refused(folder: Path, run: Path, capsys) -> str:
    """The message with which `fit` refuses a model; it has claimed no run directory."""
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main(["fit", *jobs.options(folder, run)])
    assert not (run / "run.json").exists()
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error


# --- codes that would be taken for weights


def float8(tensors: Tensors) -> Tensors:
    """Experts in scaled float8."""
    out = {}
    for key, weight in tensors.items():
        out[key] = weight
        if ".experts." in key:
            scale = weight.abs().max() / 448
            out |= {key: (weight / scale).to(torch.float8_e4m3fn), f"{key}_scale_inv": scale.reshape(1, 1)}
    return out


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


# --- damaged files


def sharded(folder: Path, out: Path) -> Path:
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(out, max_shard_size="500KB")
    AutoTokenizer.from_pretrained(BUNDLED).save_pretrained(out)
    return out


def pointer(folder: Path) -> str:
    shard = sorted(folder.glob("model-*.safetensors"))[1]
    shard.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 480000\n")
    return f"{shard} is a pointer of git-lfs.*git lfs pull"


def config_pointer(folder: Path) -> str:
    (folder / "config.json").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 900\n")
    return f"{folder / 'config.json'} is a pointer of git-lfs.*git lfs pull"


def truncated(folder: Path) -> str:
    shard = sorted(folder.glob("model-*.safetensors"))[2]
    shard.write_bytes(shard.read_bytes()[:-100])
    return f"{shard} is truncated"


def only_header(folder: Path) -> str:
    shard = sorted(folder.glob("model-*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes()[:40])
    return f"{shard} is damaged"


def empty(folder: Path) -> str:
    shard = sorted(folder.glob("model-*.safetensors"))[0]
    shard.write_bytes(b"")
    return f"{shard} is damaged"


def a_web_page(folder: Path) -> str:
    shard = sorted(folder.glob("model-*.safetensors"))[0]
    shard.write_text("<!doctype html><title>404 Not Found</title>" * 100)
    return f"{shard} is damaged"


def missing(folder: Path) -> str:
    shard = sorted(folder.glob("model-*.safetensors"))[3]
    shard.unlink()
    return f"{shard.parent} lacks {shard.name}: download"


def two_missing(folder: Path) -> str:
    shards = sorted(folder.glob("model-*.safetensors"))[2:4]
    for shard in shards:
        shard.unlink()
    return f"{folder} lacks {shards[0].name} and 1 other file: download"


def no_index(folder: Path) -> str:
    (folder / "model.safetensors.index.json").unlink()
    return "no model.safetensors.index.json"


def damaged_index(folder: Path) -> str:
    index = folder / "model.safetensors.index.json"
    index.write_text(index.read_text()[:200])
    return "the index of the weight files.*is damaged"


def test_plan_needs_no_weights(tiny_model_dir, tmp_path, capsys):
    """A clone whose weights git-lfs has not fetched can be planned."""
    folder = changed(tiny_model_dir("mixtral"), tmp_path / "model")
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 4\n")
    main(["plan", *jobs.options(folder, tmp_path / "run")])
    assert "3 blocks" in capsys.readouterr().out


@pytest.mark.parametrize(
    "damage",
    [pointer, config_pointer, truncated, only_header, empty, a_web_page, missing, two_missing, no_index, damaged_index],
)
def test_a_damaged_file_is_named(damage, tiny_model_dir, tmp_path, capsys):
    folder = sharded(tiny_model_dir("mixtral"), tmp_path / "model")
    message = damage(folder)
    with pytest.raises(FileNotFoundError, match=message):
        Checkpoint(str(folder))
    assert re.search(message, refused(folder, tmp_path / "run", capsys))


def no_tokenizer(folder: Path) -> str:
    for file in folder.glob("tokenizer*"):
        file.unlink()
    return "has no tokenizer, or a damaged one: put the files there.*tokenizer.json"


def damaged_tokenizer(folder: Path) -> str:
    (folder / "tokenizer.json").write_text("{")
    return "has no tokenizer, or a damaged one: put the files there.*tokenizer.json"


def no_config(folder: Path) -> str:
    (folder / "config.json").unlink()
    (folder / "tokenizer.json").unlink()
    return r"no causal language model can be loaded from.*There is no config.json"


def moved(folder: Path) -> str:
    folder.rename(folder.with_name("elsewhere"))
    return r"no causal language model can be loaded from.*There is no such directory\."


def broken_config(folder: Path) -> str:
    (folder / "config.json").write_text("{")
    return r"config.json is missing, truncated or corrupt \(Expecting property name.*download it again"


def a_list_as_config(folder: Path) -> str:
    (folder / "config.json").write_text("[]")
    return "config.json does not hold what was written, but a list: download it again"


def options(**config) -> Callable[[Path], str]:
    def write(folder: Path) -> str:
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | config))
        return "transformers (cannot build|does not understand).*config.json"

    return write


def gguf(folder: Path) -> str:
    (folder / "model.safetensors").rename(folder / "model-Q4_K_M.gguf")
    return "holds GGUF files, which are not read: pass the model that they were made of"


def adapter_alone(folder: Path) -> str:
    (folder / "config.json").unlink()
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    return r"holds an adapter \(adapter_config.json\): merge it into its base model"


def adapter_beside(folder: Path) -> str:
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    return r"\(--model.name_or_path\) holds an adapter \(adapter_config.json\) beside the model.*: merge it into"


def other_layout(folder: Path) -> str:
    (folder / "model.safetensors").rename(folder / "consolidated.safetensors")
    return "holds consolidated.safetensors, but neither model.safetensors nor an index: convert it"


def training_job(folder: Path) -> str:
    torch.save({"model": load_file(folder / "model.safetensors"), "step": 3}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    return "pytorch_model.bin holds 'model', which is no tensor but dict: it is of a training job"


def generation_options(folder: Path) -> str:
    (folder / "generation_config.json").write_text('{"max_new_tokens": "many"}')
    return r"\(--model.name_or_path\): transformers does not understand its generation_config.json"


@pytest.mark.parametrize(
    "damage",
    [
        *(
            generation_options,
            broken_config,
            a_list_as_config,
            gguf,
            adapter_alone,
            adapter_beside,
            other_layout,
            training_job,
        ),
        *(options(hidden_act="foo"), options(dtype="float8"), options(quantization_config="fp8")),
        options(rope_parameters={"rope_type": "foo", "rope_theta": 10000.0}),
    ],
)
def test_what_is_no_model_is_refused_with_what_it_is(damage, tiny_model_dir, tmp_path, capsys):
    folder = changed(tiny_model_dir("mixtral"), tmp_path / "model")
    assert re.search(damage(folder), refused(folder, tmp_path / "run", capsys))


@pytest.mark.parametrize(("name", "message"), [("model.safetensors", "pass the directory"), ("a.gguf", "a GGUF file")])
def test_a_file_in_the_place_of_a_directory(name, message, tiny_model_dir, tmp_path, capsys):
    folder = changed(tiny_model_dir("mixtral"), tmp_path / "model")
    (folder / "a.gguf").write_bytes(b"GGUF")
    assert message in refused(folder / name, tmp_path / "run", capsys)


@pytest.mark.parametrize("top_k", [0, 9])
def test_more_or_fewer_experts_a_token_than_there_are(top_k, tiny_model_dir, tmp_path, capsys):
    folder = changed(tiny_model_dir("mixtral"), tmp_path / "model", num_experts_per_tok=top_k)
    assert f"each token selects {top_k} of 8 experts" in refused(folder, tmp_path / "run", capsys)


def test_without_a_dtype_in_the_config_the_first_tensor_has_it_as_in_transformers(tiny_model_dir, tmp_path):
    def mixed(tensors: Tensors) -> Tensors:
        return {key: t if "norm" in key else t.bfloat16() for key, t in tensors.items()}

    folder = changed(tiny_model_dir("mixtral"), tmp_path / "model", mixed, dtype=None)
    own = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").dtype
    assert Checkpoint(str(folder)).dtype == own == torch.bfloat16


def test_tied_weights_that_are_stored_under_the_name_of_the_head(tiny_model_dir, tmp_path):
    """Then the embedding is the head's, as in transformers, and neither is lost from the result."""
    folder = changed(
        tiny_model_dir("mixtral"), tmp_path / "model", lost("embed_tokens.weight"), tie_word_embeddings=True
    )
    head = load_file(folder / "model.safetensors")["lm_head.weight"]
    run = jobs.fit(folder, tmp_path / "run", data__num_windows=4)
    model = load(run)
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert torch.equal(model.get_input_embeddings().weight, head)
    export(run, tmp_path / "dense", "dense")
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "dense").get_input_embeddings().weight, head)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])  # of the second transformers makes an empty tokenizer
@pytest.mark.parametrize("damage", [no_tokenizer, damaged_tokenizer, no_config, moved])
def test_a_model_is_not_taken_for_its_tokenizer(damage, family, tiny_model_dir, tmp_path, capsys):
    """Nor the other way round: what is missing is named, by every command with its option."""
    folder = changed(tiny_model_dir(family), tmp_path / "model")
    message = damage(folder)
    error = refused(folder, tmp_path / "run", capsys)
    assert re.search(message, error) and f"{str(folder)!r} (--model.name_or_path)" in error
    assert "--data.tokenizer" not in error  # which is no option
    if damage is not no_config:
        with pytest.raises(SystemExit):
            main(["analyze", "--model", str(folder), "--output", str(tmp_path / "out")])
        error = capsys.readouterr().err
        assert re.search(message, error) and f"{str(folder)!r} (--model)" in error and "Traceback" not in error


def test_an_original_that_has_moved_is_named_where_a_run_goes_on(tiny_model_dir, tmp_path, capsys):
    folder = changed(tiny_model_dir("mixtral"), tmp_path / "model")
    small = {"data__num_windows": 4, "model__joint_epochs": 0, "trainer__max_epochs": 1}
    run = jobs.fit(folder, tmp_path / "run", **small)
    message = moved(folder)
    for words in (jobs.options(folder, run, **small), ["--config", str(run / "tensorboard" / "config.yaml")]):
        capsys.readouterr()
        with pytest.raises(SystemExit):
            main(["fit", *words, "--ckpt_path", "auto"])
        error = capsys.readouterr().err
        assert re.search(message, error) and "(--model.name_or_path)" in error and "tokenizer" not in error


def lost(end: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {key: tensor for key, tensor in tensors.items() if not key.endswith(end)}


def halved(end: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {
        key: t[: len(t) // 2].contiguous() if key.endswith(end) else t for key, t in tensors.items()
    }


EXPERT = "model.layers.1.block_sparse_moe.experts"


@pytest.mark.parametrize(
    ("change", "config", "message"),
    [
        (dict, {"vocab_size": 5000}, "embed_tokens.weight has the shape 4096 x 64 in the files and 5000 x 64 in the"),
        (
            dict,
            {"intermediate_size": 128},
            "model.layers.0.mlp.experts.gate_up_proj, which is made of 16 tensors such as "
            "model.layers.0.block_sparse_moe.experts.0.w1.weight, has the shape 8 x 128 x 64 in the files and "
            "8 x 256 x 64 in the model",
        ),
        (halved("norm.weight"), {}, "norm.weight has the shape 32 in the files and 64 in the model"),
        (
            halved("1.block_sparse_moe.experts.3.w1.weight"),
            {},
            f"{EXPERT}.3.w1.weight has the shape 32 x 64, and the others that "
            "model.layers.1.mlp.experts.gate_up_proj is made of have 64 x 64",
        ),
        (
            lost("1.block_sparse_moe.experts.3.w1.weight"),
            {},
            f"gate_up_proj cannot be made of 7 tensors like {EXPERT}.0.w1.weight and 8 tensors like "
            f"{EXPERT}.0.w3.weight",
        ),
    ],
)
def test_tensors_of_another_shape_are_named_with_both_shapes(change, config, message, tiny_model_dir, tmp_path):
    folder = changed(tiny_model_dir("mixtral"), tmp_path / "model", change, **config)
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        StreamedModel(Checkpoint(str(folder))).load_all()
    assert f"{str(folder)!r} (--model.name_or_path) do not fit its config.json" in str(error.value)
    assert "download" in str(error.value) and "torch.Size" not in str(error.value)


def test_missing_weights_are_counted(tiny_model_dir, tmp_path):
    one = changed(tiny_model_dir("mixtral"), tmp_path / "one", lost("model.norm.weight"))
    with pytest.raises(StoreError, match="lack model.norm.weight: they do not fit its config.json"):
        StreamedModel(Checkpoint(str(one)))
    two = changed(tiny_model_dir("mixtral"), tmp_path / "two", lost("layers.2.self_attn.q_proj.weight"))
    two = changed(two, tmp_path / "both", lost("layers.2.self_attn.k_proj.weight"))
    with pytest.raises(StoreError, match="lack model.layers.2.self_attn.k_proj.weight and 1 other weight: they"):
        StreamedModel(Checkpoint(str(two))).load_all()


def test_a_missing_head_may_be_the_embedding(tiny_model_dir, tmp_path):
    folder = changed(tiny_model_dir("mixtral"), tmp_path / "model", lost("lm_head.weight"))
    with pytest.raises(StoreError, match='lack lm_head.weight: .*write "tie_word_embeddings": true there'):
        StreamedModel(Checkpoint(str(folder)))


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


class Evil:
    def __reduce__(self):
        return exec, ("open('ran', 'w').close()",)


def test_a_pickle_that_runs_code_is_not_opened(tiny_model_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tiny_model_dir("mixtral")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    torch.save(load_file(folder / "model.safetensors") | {"evil": Evil()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model.bin holds Python objects besides tensors.*safetensors"):
        Checkpoint(str(tmp_path))
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps({"evil": Evil()}))
    with pytest.raises((ValueError, FileNotFoundError), match="pytorch_model.bin"):
        Checkpoint(str(tmp_path))
    assert not (tmp_path / "ran").exists()


def test_a_pickle_of_before_torch_16_is_read(tiny_model_dir, tmp_path):
    folder = tiny_model_dir("mixtral")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    weights = load_file(folder / "model.safetensors")
    torch.save(weights, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    key = "model.layers.2.self_attn.o_proj.weight"
    assert torch.equal(Checkpoint(str(tmp_path)).read([key])[key], weights[key])


# --- draft layers


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


# --- code that comes with a model

CODE = """
from transformers import MixtralConfig, MixtralForCausalLM

open("ran", "w").close()

class OwnConfig(MixtralConfig):
    model_type = "own_moe"

class OwnForCausalLM(MixtralForCausalLM):
    config_class = OwnConfig
"""
AUTO_MAP = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"}
SCRIPT = """
import sys
from eacmoe_lightning import load
from eacmoe_lightning.cli import main
{setup}
main(sys.argv[1:])
"""
REGISTERS = """
from transformers import AutoConfig, AutoModelForCausalLM
from own import OwnConfig, OwnForCausalLM
AutoConfig.register("own_moe", OwnConfig)
AutoModelForCausalLM.register(OwnConfig, OwnForCausalLM)
"""


def own(out: Path, tiny: Path) -> Path:
    """A model of a type that only code beside it knows, with stacked experts on disk."""
    stacked = dict(AutoModelForCausalLM.from_pretrained(tiny).state_dict())
    changed(tiny, out, lambda _: stacked, model_type="own_moe", auto_map=AUTO_MAP)
    (out / "own.py").write_text(CODE)
    return out


def run(folder: Path, words: list[str], setup: str = "", **environment: str) -> str:
    """The output of a command in its own process, started in `folder`, which answers no question."""
    (folder / "script.py").write_text(SCRIPT.format(setup=setup))
    path = os.pathsep.join([str(jobs.ROOT), str(folder)])
    done = subprocess.run(
        [sys.executable, "script.py", *words],
        cwd=folder, env={**os.environ, "PYTHONPATH": path, "HF_MODULES_CACHE": str(folder / "modules")},
        stdin=subprocess.DEVNULL, capture_output=True, text=True,
    )  # fmt: skip
    return done.stdout + done.stderr


def test_code_of_a_model_runs_only_on_the_users_word(tiny_model_dir, tmp_path):
    folder = own(tmp_path / "model", tiny_model_dir("mixtral"))
    small = {"model__joint_epochs": 0, "data__num_windows": 4, "data__num_heldout_windows": 1}
    words = ["fit", *jobs.options(folder, tmp_path / "run", **small)]
    output = run(tmp_path, words)
    assert "--model.trust_remote_code true" in output and "auto_map" in output, output
    assert "Traceback" not in output and "y/N" not in output and not (tmp_path / "ran").exists()

    output = run(tmp_path, [*words, "--model.trust_remote_code", "true"])
    assert "perplexity" in output and (tmp_path / "run" / "report.json").exists(), output
    assert (tmp_path / "ran").exists()


def test_classes_that_are_registered_first_need_no_trust(tiny_model_dir, tmp_path):
    folder = own(tmp_path / "model", tiny_model_dir("mixtral"))
    (tmp_path / "own.py").write_text(CODE)
    output = run(tmp_path, ["plan", *jobs.options(folder, tmp_path / "run")], REGISTERS)
    assert "3 blocks" in output, output


# --- models of this project


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
