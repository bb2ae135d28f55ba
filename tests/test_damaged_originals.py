"""What is damaged or missing among an original's files, or is no model at all, is named before a run starts."""

import json
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import jobs
import pytest
import torch
from changed_models import Tensors, changed, refused
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from eacmoe_lightning import load
from eacmoe_lightning.cli import main
from eacmoe_lightning.exports.export import export
from eacmoe_lightning.models import tokenizer as tokenizer_module
from eacmoe_lightning.models.checkpoint import Checkpoint
from eacmoe_lightning.models.originals import BUNDLED
from eacmoe_lightning.models.streamed import StreamedModel
from eacmoe_lightning.run.files import StoreError


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


def senseless(message: str, **config) -> Callable[[Path], str]:
    """Values that transformers does not take, of which the message names config.json, the option and nothing else."""

    def write(folder: Path) -> str:
        options(**config)(folder)
        return rf"error: '[^']*' \(--model.name_or_path\): transformers does not understand its config.json \({message}"

    return write


def link(name: str) -> Callable[[Path], str]:
    def dangle(folder: Path) -> str:
        (folder / name).unlink()
        (folder / name).symlink_to("../../blobs/0123")
        return rf"{name} is a link to a missing file, ../../blobs/0123: download it again"

    return dangle


def folder_of_a_cache(folder: Path) -> str:
    snapshot = folder / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)
    for file in [file for file in folder.iterdir() if file.is_file()]:
        file.rename(snapshot / file.name)
    return rf"is a model's folder in the hub's cache: pass the snapshot in it, such as {snapshot}\."


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
        *(broken_config, a_list_as_config, generation_options, gguf),
        *(adapter_alone, adapter_beside, other_layout, training_job),
        *(options(hidden_act="foo"), options(dtype="float8"), options(quantization_config="fp8")),
        senseless(r"Field 'vocab_size' expected int, got str \(value: '4096'\)\): mend it", vocab_size="4096"),
        senseless("Field 'rms_norm_eps' expected float, got str", rms_norm_eps="1e-05"),
        senseless("Field 'sliding_window' with value 'all' doesn't match any type", sliding_window="all"),
        senseless(r"it does not know dtype='float8'\): mend it", dtype="float8"),
        senseless(r"TypeError\('its text_config holds no options'\)", text_config=3),
        *(link("model.safetensors"), link("config.json"), link("tokenizer.json"), folder_of_a_cache),
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


@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings")
def test_a_head_beside_a_config_that_ties_it_is_kept_as_in_transformers(tiny_model_dir, tmp_path):
    folder = changed(tiny_model_dir("mixtral"), tmp_path / "model", tie_word_embeddings=True)
    head = load_file(folder / "model.safetensors")["lm_head.weight"]
    run = jobs.fit(folder, tmp_path / "run", data__num_windows=4)
    for form in ("dense", "gptq_v2", "gguf"):
        export(run, tmp_path / form, form)
    config = json.loads((tmp_path / "gptq_v2" / "config.json").read_text())
    assert config["tie_word_embeddings"] is False
    for model in (load(run), AutoModelForCausalLM.from_pretrained(tmp_path / "dense")):
        assert torch.equal(model.get_output_embeddings().weight, head)
        assert not torch.equal(model.get_input_embeddings().weight, head)


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


@pytest.mark.parametrize(
    "file, package",
    [
        ("tokenizer.model", "sentencepiece"),
        ("tiktoken.model", "tiktoken"),
        ("qwen.tiktoken", "tiktoken"),
        ("tekken.json", "mistral_common"),
    ],
)
def test_a_tokenizer_that_an_absent_package_reads_names_the_package(
    file, package, tiny_model_dir, tmp_path, capsys, monkeypatch
):
    folder = shutil.copytree(tiny_model_dir("mixtral"), tmp_path / "model")
    (folder / "tokenizer.json").unlink()
    (folder / file).write_bytes(b"\n\x0e\n\x05<unk>\x15")
    monkeypatch.setattr(tokenizer_module, "find_spec", lambda name: None)
    message = refused(folder, tmp_path / "run", capsys)
    assert f"{file} is read by the package {package}: pip install {package}" in message
