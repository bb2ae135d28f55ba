"""Compressed directories as packed models: `load`, `from_pretrained`, `save_pretrained`, `generate`, damage."""

import copy
import json
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import architectures
import pytest
import tiny_models
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    DeepseekV3Config,
    GenerationMixin,
    pipeline,
)

from eacmoe_lightning import load, load_offloaded
from eacmoe_lightning.compressed.directory import save_compressed
from eacmoe_lightning.models.moe import MoEModel
from eacmoe_lightning.models.originals import BUNDLED, load_original
from eacmoe_lightning.quantization.grid import Grid, Quantized, round_to_nearest
from eacmoe_lightning.run.files import StoreError, digest
from eacmoe_lightning.runtime.packed_modules import PackedExperts, PackedLinear, packed_weights, set_activations

families = pytest.mark.parametrize("family", [*tiny_models.MOE_FAMILIES, "mixed qwen2_moe"])
BITS = {"attention": 4, "shared": 5, "experts": 3}


def compress(model: Path, folder: Path, mixed: bool = False, symmetric: bool = False) -> Path:
    """A compressed directory made by rounding to nearest; the last block's experts have fewer bits.

    With `mixed`, experts differ in bits, and so do their projections.
    """
    moe = MoEModel(load_original(str(model)))
    blocks = []
    for block in moe.blocks:
        bits = BITS | ({"experts": 2} if block.index == len(moe.blocks) - 1 else {})
        quantized = {}
        for name, (part, weight) in block.weights().items():
            quantized[name] = round_to_nearest(weight, Grid(bits[part], 32, symmetric))
            if mixed and part == "experts":
                up, widths = name.endswith("gate_up_proj"), (2, 3, 4, 8)
                expert_bits = tuple(widths[(e + block.index + up) % 4] for e in range(len(weight)))
                stack = [round_to_nearest(w, Grid(b, 32, symmetric)) for w, b in zip(weight, expert_bits, strict=True)]
                fields = (torch.stack([getattr(q, f) for q in stack]) for f in ("codes", "scale", "zero_point"))
                quantized[name] = Quantized(*fields, expert_bits)
        moe.put({name: block.as_parameter(name, q.dequantize()) for name, q in quantized.items()})
        blocks.append(quantized)
    save_compressed(folder, moe, str(model), blocks, {"method": "rtn"})
    return folder


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory, tiny_model_dir) -> Callable[[str], Path]:
    folders: dict[str, Path] = {}

    def folder(family: str) -> Path:
        """The compressed directory of a family; in `mixed FAMILY` experts differ in bits."""
        if family not in folders:
            path, (*mixed, name) = tmp_path_factory.mktemp("compressed") / family, family.split()
            folders[family] = compress(tiny_model_dir(name), path, bool(mixed))
        return folders[family]

    return folder


@pytest.fixture(scope="module")
def tokens() -> Tensor:
    return torch.randint(0, tiny_models.VOCABULARY, (2, 48), generator=torch.Generator().manual_seed(0))


def damage(folder: Path, copy_to: Path, change: Callable[[dict[str, Tensor]], None], checksum: bool) -> Path:
    """A copy with changed tensors in the first shard; its checksum is updated if `checksum` is true."""
    copy_to.mkdir()
    for file in folder.iterdir():
        (copy_to / file.name).write_bytes(file.read_bytes())
    shard = copy_to / "weights-block-000.safetensors"
    with safe_open(shard, "pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    change(tensors)
    if checksum:
        note = json.loads(metadata["eacmoe"])["note"]
        metadata = {"eacmoe": json.dumps({"note": note, "sha256": digest(tensors, note)})}
    save_file(tensors, shard, metadata)
    return copy_to


# --- loading


@families
@torch.no_grad()
def test_a_packed_model_gives_the_logits_of_the_decoded_one(family, folder_of, tokens):
    folder = folder_of(family)
    packed, decoded = load(folder), load(folder, packed=False)
    assert packed.dtype == torch.float32 and not packed.training
    torch.testing.assert_close(packed(tokens).logits, decoded(tokens).logits, rtol=1e-4, atol=1e-4)
    same = AutoModelForCausalLM.from_pretrained(folder)
    assert type(same) is type(decoded) and torch.equal(same(tokens).logits, packed(tokens).logits)


def test_both_ways_keep_what_the_model_keeps_in_float32(tmp_path):
    """DeepSeek-V3's correction of its selection stays in float32 in a bfloat16 model."""
    config = DeepseekV3Config(
        vocab_size=tiny_models.VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, pad_token_id=0,
        num_key_value_heads=4, intermediate_size=64, moe_intermediate_size=32, n_routed_experts=8, n_group=2,
        topk_group=1, num_experts_per_tok=2, first_k_dense_replace=1, q_lora_rank=32, kv_lora_rank=32,
        qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8,
    )  # fmt: skip
    original = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    original.get_buffer(name).copy_(torch.linspace(-0.1, 0.1, 8))
    original.save_pretrained(tmp_path / "original")
    AutoTokenizer.from_pretrained(BUNDLED).save_pretrained(tmp_path / "original")
    folder = compress(tmp_path / "original", tmp_path / "compressed")
    packed, decoded = load(folder, "bfloat16").state_dict(), load(folder, "bfloat16", packed=False).state_dict()
    assert torch.equal(packed[name], torch.linspace(-0.1, 0.1, 8))
    for dense in packed.keys() & decoded.keys():
        assert packed[dense].dtype == decoded[dense].dtype and torch.equal(packed[dense], decoded[dense]), dense


@families
def test_nothing_quantized_is_dense_in_memory(family, folder_of):
    folder = folder_of(family)
    config = json.loads((folder / "config.json").read_text())
    model = load(folder)
    weights = dict(packed_weights(model))
    assert weights.keys() == config["quantization"]["bits"].keys()
    assert not weights.keys() & dict(model.named_parameters()).keys()
    assert {b for w in weights.values() for b in w.widths} >= {2, 3, 4}
    stored = sum(
        file.get_slice(name).get_shape() != [] and file.get_tensor(name).nbytes
        for path in folder.glob("*.safetensors")
        for file in [safe_open(path, "pt")]
        for name in file.keys()  # noqa: SIM118
    )
    resident = {t.data_ptr(): t.nbytes for t in (*model.parameters(), *weight_buffers(model))}
    assert sum(resident.values()) <= stored * 1.01


def weight_buffers(model) -> list[Tensor]:
    return [tensor for _, weight in packed_weights(model) for tensor in weight.tensors]


@families
def test_saving_again_gives_the_same_directory(family, folder_of, tokens, tmp_path):
    folder = folder_of(family)
    model = load(folder)
    model.save_pretrained(tmp_path / "again")
    before, after = (json.loads((f / "config.json").read_text()) for f in (folder, tmp_path / "again"))
    assert before == after
    for name in {f.name for f in folder.glob("*.safetensors")}:
        assert (folder / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    with torch.no_grad():
        assert torch.equal(load(tmp_path / "again")(tokens).logits, model(tokens).logits)


@torch.no_grad()
def test_dtypes_and_copies_do_not_touch_the_scales(folder_of, tokens):
    model = load(folder_of("mixtral"))
    wide = model(tokens).logits
    scales = {name: w.scale.clone() for name, w in packed_weights(model)}
    narrow = copy.deepcopy(model).to(torch.bfloat16)
    for name, weight in packed_weights(narrow):
        assert weight.scale.dtype == torch.float16 and torch.equal(weight.scale, scales[name])
    assert narrow.dtype == torch.bfloat16 and torch.isfinite(narrow(tokens).logits).all()
    loaded = load(folder_of("mixtral"), dtype="bfloat16")
    assert all(torch.equal(w.scale, scales[name]) for name, w in packed_weights(loaded))
    state = model.state_dict()
    torch.testing.assert_close(pickle.loads(pickle.dumps(model))(tokens).logits, wide, rtol=0, atol=0)
    for tensor in weight_buffers(model):
        tensor.zero_()
    model.load_state_dict({name: torch.as_tensor(t) for name, t in load(folder_of("mixtral")).state_dict().items()})
    assert state.keys() == model.state_dict().keys() and torch.equal(model(tokens).logits, wide)


@pytest.mark.parametrize("opened", [load, lambda path, dtype: load_offloaded(path, 0.5, dtype=dtype)])
def test_a_dtype_is_named_or_torchs_own(opened, folder_of):
    assert opened(folder_of("mixtral"), dtype=torch.bfloat16).dtype == torch.bfloat16
    for wrong in ("fp16", torch.float64, None):
        with pytest.raises(ValueError, match=r"dtype=.*: pass one of auto, float32, bfloat16, float16"):
            opened(folder_of("mixtral"), dtype=wrong)


def test_the_config_is_the_originals(folder_of, tiny_model_dir):
    ours, theirs = (
        AutoConfig.from_pretrained(folder_of("qwen2_moe")),
        AutoConfig.from_pretrained(tiny_model_dir("qwen2_moe")),
    )
    assert type(ours) is type(theirs) and ours.hidden_size == theirs.hidden_size


# --- using


@families
@torch.no_grad()
def test_greedy_tokens_are_those_of_the_decoded_model(family, folder_of, tokens):
    folder, prompt = (
        folder_of(family),
        {"input_ids": tokens[:, :8], "attention_mask": torch.ones(2, 8, dtype=torch.long)},
    )
    prompt["attention_mask"][0, :3] = 0  # left padding
    models: list[GenerationMixin] = [load(folder), load(folder, packed=False)]
    words = [m.generate(**prompt, max_new_tokens=12, do_sample=False, pad_token_id=0) for m in models]
    assert words[0].shape[1] > 8 and torch.equal(*words)
    sampled = models[0].generate(**prompt, max_new_tokens=4, do_sample=True, use_cache=False, pad_token_id=0)
    assert sampled.shape[0] == 2


def test_a_pipeline_opens_the_directory(folder_of):
    folder = folder_of("qwen3_moe")
    generate = pipeline(
        "text-generation", model=str(folder), tokenizer=AutoTokenizer.from_pretrained(folder), device="cpu"
    )
    assert any(isinstance(m, PackedExperts) for m in generate.model.modules())
    assert generate("The whale", max_new_tokens=4, do_sample=False)[0]["generated_text"].startswith("The whale")


@pytest.mark.parametrize("family", ["qwen3_moe", "mixed qwen2_moe"])
@torch.no_grad()
def test_a_compiled_model_gives_the_same(family, folder_of, tokens):
    model = load(folder_of(family))
    expected = model(tokens).logits
    torch.testing.assert_close(torch.compile(model, backend="aot_eager")(tokens).logits, expected)


@torch.no_grad()
@torch.no_grad()
@pytest.mark.filterwarnings("ignore")  # tracing is deprecated, and says what it takes for constants
def test_a_traced_linear(folder_of):
    """Tracing sees operators, and nothing that goes past them."""
    linear = load(folder_of("mixtral")).model.layers[0].self_attn.q_proj
    x = torch.randn(3, linear.in_features, generator=torch.Generator().manual_seed(0))
    traced = torch.jit.trace(linear, x)
    other = torch.randn(3, linear.in_features, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(traced(other), linear(other))


def test_int8_activations_are_near_and_can_be_switched(folder_of, tokens):
    model = load(folder_of("mixtral"), dtype="bfloat16", activations="int8")
    assert all(m.int8 for m in model.modules() if isinstance(m, PackedLinear | PackedExperts))
    rounded = model(tokens).logits.float()
    set_activations(model, "exact")
    exact = model(tokens).logits.float()
    assert torch.corrcoef(torch.stack([rounded.flatten(), exact.flatten()]))[0, 1] > 0.98
    with pytest.raises(ValueError, match="'exact' nor 'int8'"):
        set_activations(model, "int4")


# --- errors


LOAD = "from transformers import AutoModelForCausalLM as A; m = A.from_pretrained({!r}, trust_remote_code={})"


def in_a_process(program: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, stdin=subprocess.DEVNULL)


def test_without_the_package_transformers_asks_for_trust(folder_of):
    folder = folder_of("mixtral")
    done = in_a_process(LOAD.format(str(folder), None))
    assert done.returncode != 0 and "trust_remote_code=True" in done.stderr.splitlines()[-1]
    assert f"inspect the repository content at {folder}" in done.stderr
    code = next(folder.glob("*.py")).read_text()  # what a reader of that content finds
    assert "import eacmoe_lightning" in code.splitlines()[4]


def test_with_trust_transformers_needs_no_import(folder_of):
    folder = str(folder_of("mixtral"))
    done = in_a_process(f"{LOAD.format(folder, True)}; print(type(m.model.layers[0].mlp.experts).__name__)")
    assert done.stdout.split() == ["PackedExperts"], done.stderr


def test_a_flipped_bit_is_named(folder_of, tmp_path):
    def flip(tensors):
        next(t for n, t in tensors.items() if n.endswith(".codes")).view(-1)[5] ^= 4

    broken = damage(folder_of("mixtral"), tmp_path / "broken", flip, checksum=False)
    for opened in (load, AutoModelForCausalLM.from_pretrained):
        with pytest.raises(StoreError, match="weights-block-000.safetensors.*checksum"):
            opened(broken)


def test_a_truncated_shard_is_named(folder_of, tmp_path):
    broken = damage(folder_of("mixtral"), tmp_path / "broken", lambda _: None, checksum=True)
    shard = broken / "weights-block-001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises((StoreError, OSError), match="weights-block-001.safetensors"):
        load(broken)


def test_a_missing_tensor_is_named(folder_of, tmp_path):
    name = "model.layers.0.self_attn.q_proj.weight.scale"
    broken = damage(folder_of("mixtral"), tmp_path / "broken", lambda t: t.pop(name), checksum=True)
    with pytest.raises(StoreError, match=name):
        load(broken)


@pytest.mark.parametrize(
    "change, error, message",
    [
        (lambda c: c.update(format_version=99), ValueError, "format version 99"),
        (
            lambda c: c["quantization"]["bits"].update({"model.layers.0.nothing.weight": 3}),
            ValueError,
            "nothing.weight",
        ),
        (
            lambda c: [c["quantization"]["bits"].update({n: 4}) for n in list(c["quantization"]["bits"])],
            Exception,
            "codes",
        ),
    ],
)
def test_a_config_that_does_not_fit_is_an_error(change, error, message, folder_of, tmp_path):
    broken = damage(folder_of("mixtral"), tmp_path / "broken", lambda _: None, checksum=True)
    config = json.loads((broken / "config.json").read_text())
    change(config)
    (broken / "config.json").write_text(json.dumps(config))
    with pytest.raises(error, match=message):
        load(broken)


@pytest.mark.parametrize("name", ["glm4_moe", "mixtral"])
@torch.no_grad()
def test_packed_float16_is_as_close_to_float32_as_decoded_float16(name, tokenizer, tmp_path):
    """Rounding moves a few tokens to other experts. Where it does not, both stay within float16's rounding."""
    architectures.build(name).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    directory = compress(tmp_path / "model", tmp_path / "compressed")
    windows = torch.randint(0, tiny_models.VOCABULARY, (24, 48), generator=torch.Generator().manual_seed(0))

    def look(dtype: str, packed: bool) -> tuple[Tensor, Tensor]:
        """Nats of every token but the first [S, T-1], and the sorted experts of every token [S, T, all K]."""
        moe, ids = MoEModel(load(directory, dtype, packed=packed)), []
        for block in moe.moe_blocks:
            block.watch_router(lambda routing, _: ids.append(routing.ids.sort(-1).values))
        logits = moe.model(windows, use_cache=False).logits.float()
        nats = torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), windows[:, 1:].flatten(), reduction="none"
        )
        return nats.view(len(windows), -1), torch.cat(ids, -1).view(*windows.shape, -1)

    exact, experts = look("float32", False)
    torch.testing.assert_close(look("float32", True)[0], exact, rtol=1e-4, atol=1e-4)
    differences = {}
    for packed in (True, False):
        nats, ids = look("float16", packed)
        changed = (ids != experts).any(-1)
        assert changed.float().mean() < 0.02
        before_any = changed.cumsum(-1)[:, :-1] == 0  # no token up to this one has other experts
        assert before_any.float().mean() > 0.5
        differences[packed] = (nats - exact)[before_any].abs()
        assert differences[packed].max() < 0.03
    assert differences[True].median() < 1.5 * differences[False].median()
