"""GGUF exports against the gguf package's decoder, llama.cpp's reordering, and transformers' GGUF reader."""

import itertools
import json
import shutil

import numpy as np
import pytest
import torch
import transformers
from packaging.version import Version
from test_exports import ASYMMETRIC, MIXED, SYMMETRIC, folder_of, tensors_of  # noqa: F401  (folder_of is a fixture)
from test_packed_loading import compress
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoTokenizer
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from eacmoe_lightning import load
from eacmoe_lightning.exports.export import export
from eacmoe_lightning.exports.ggml_blocks import exact_type, to_blocks
from eacmoe_lightning.exports.gguf_tokenizer import words_of
from eacmoe_lightning.models.originals import BUNDLED
from eacmoe_lightning.quantization.grid import Quantized
from eacmoe_lightning.text.documents import read_documents
from eacmoe_lightning.weight_grids import WeightGrid

gguf = pytest.importorskip("gguf")


def random_codes(bits: int, symmetric: bool, group_size: int, shape=(3, 8, 128)) -> Quantized:
    """Codes and zero points that reach the ends of their ranges, and scales of which some are subnormal in float16."""
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(2**bits, shape, generator=generator)
    groups = (*shape[:-1], shape[-1] // group_size)
    zero = torch.randint(2**bits, groups, generator=generator)
    zero[..., 0], zero[..., -1] = 0, 2**bits - 1
    if symmetric:
        zero = torch.full(groups, 2 ** (bits - 1))
    codes[..., 0], codes[..., -1] = 2**bits - 1, 0
    scale = torch.rand(groups, generator=generator) * torch.tensor(1e-2 if bits % 2 else 1e-5) + 1e-7
    return Quantized(codes.to(torch.uint8), scale.half(), zero.to(torch.uint8), bits)


def grid(bits: int, symmetric: bool, group_size: int = 32) -> WeightGrid:
    return WeightGrid("experts.down_proj", 0, "experts", (3, 8, 128), bits, group_size, symmetric)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", range(2, 9))
def test_blocks_decode_to_our_values_to_the_last_bit(bits, symmetric):
    quantized = random_codes(bits, symmetric, 32)
    name = exact_type([grid(bits, symmetric)])
    stored = to_blocks(quantized, name).view(torch.uint8).numpy()
    decoded = torch.from_numpy(gguf.dequantize(stored, gguf.GGMLQuantizationType[name]))
    expected = quantized.dequantize()
    assert torch.equal(decoded, expected if name != "F16" else expected.half().float())


def test_the_smallest_exact_type_is_taken():
    names = {(bits, middle): exact_type([grid(bits, middle)]) for bits in range(2, 9) for middle in (True, False)}
    assert names == {
        **{(2, True): "Q4_0", (2, False): "Q4_0", (3, True): "Q4_0", (3, False): "Q4_0", (4, True): "Q4_0"},
        **{(4, False): "Q5_0", (5, True): "Q5_0", (5, False): "Q8_0", (6, True): "Q8_0", (6, False): "Q8_0"},
        **{(7, True): "Q8_0", (7, False): "Q8_0", (8, True): "Q8_0", (8, False): "F16"},
    }
    assert exact_type([grid(4, True, group_size=24)]) == "F16"  # a block of 32 has one scale
    assert exact_type([grid(2, False), grid(6, False), grid(4, True)]) == "Q8_0"  # experts of one stack


@pytest.mark.parametrize(
    ("family", "setting"),
    [("mixtral", ASYMMETRIC), ("qwen2_moe", MIXED), ("deepseek", SYMMETRIC)],
)
def test_the_file_holds_every_weight_as_llama_cpp_orders_it(family, setting, folder_of, tmp_path):  # noqa: F811
    folder, out = folder_of(family, setting), tmp_path / "out"
    difference = export(str(folder), str(out), "gguf")
    assert difference.weights == 0 if setting is not MIXED else difference.weights < 1e-3  # 8 bit asymmetric: F16
    reader = gguf.GGUFReader(out / "model.gguf")
    stored = {t.name: gguf.dequantize(t.data, t.tensor_type).reshape(t.shape[::-1]) for t in reader.tensors}
    state = {name: tensor.numpy() for name, tensor in load(folder, packed=False).state_dict().items()}
    query = state["model.layers.1.self_attn.q_proj.weight"]
    if family in ("mixtral", "deepseek"):  # LlamaModel.permute of llama.cpp's conversion, 4 heads
        query = query.reshape(4, 2, len(query) // 8, query.shape[1]).swapaxes(1, 2).reshape(query.shape)
    np.testing.assert_array_equal(stored["blk.1.attn_q.weight"], query)
    gate, up = np.split(state["model.layers.1.mlp.experts.gate_up_proj"], 2, axis=1)
    np.testing.assert_array_equal(stored["blk.1.ffn_gate_exps.weight"], gate)
    np.testing.assert_array_equal(stored["blk.1.ffn_up_exps.weight"], up)
    np.testing.assert_array_equal(stored["blk.1.ffn_gate_inp.weight"], state["model.layers.1.mlp.gate.weight"])
    if family == "qwen2_moe":
        shared = state["model.layers.1.mlp.shared_expert_gate.weight"]
        np.testing.assert_array_equal(stored["blk.1.ffn_gate_inp_shexp.weight"], shared[0])
    if family == "deepseek":
        assert reader.fields["deepseek.leading_dense_block_count"].contents() == 1
        assert reader.fields["deepseek.expert_shared_count"].contents() == 2


def test_transformers_reads_the_same_model(folder_of, tmp_path):  # noqa: F811
    """transformers' GGUF reader is independent of ours: names, sizes and values must all be correct."""
    folder, out = folder_of("qwen3_moe", (2, False)), tmp_path / "out"
    export(str(folder), str(out), target="llama.cpp")
    ours = load(folder, packed=False)
    read = load_gguf_checkpoint(str(out / "model.gguf"), return_tensors=True, model_to_load=ours)
    sizes = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size", "head_dim")
    for name in (*sizes, "num_experts_per_tok", "max_position_embeddings", "rms_norm_eps"):
        assert read["config"][name] == pytest.approx(getattr(ours.config, name))
    state = ours.state_dict()
    assert read["tensors"].keys() == state.keys() - {"lm_head.weight"}
    assert all(torch.equal(tensor, state[name]) for name, tensor in read["tensors"].items())


def test_transformers_reads_the_same_tokenizer(folder_of, tmp_path):  # noqa: F811
    if Version(transformers.__version__).release < (5, 18):
        pytest.skip(f"transformers {transformers.__version__} splits words by the architecture, not by the file's rule")
    export(str(folder_of("qwen3_moe", (2, False))), str(tmp_path / "out"), target="llama.cpp")
    text = read_documents("bundled:calibration")[0][:3000]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out", gguf_file="model.gguf")
    assert tokenizer(text).input_ids == AutoTokenizer.from_pretrained(BUNDLED)(text).input_ids


@pytest.mark.parametrize(
    ("ends", "written", "left"),
    [
        (7, {"eos": 0, "eot": 7}, []),  # 0 is the tokenizer's
        ([0, 7], {"eos": 0, "eot": 7}, []),
        ([7, 9, 0, 11], {"eos": 0, "eot": 7, "eom": 9}, [11]),
        ([5000, 3], {"eos": 0, "eot": 3}, [5000]),  # beyond the embedding
    ],
)
def test_every_token_that_ends_a_generation_is_in_the_file_or_named(ends, written, left, folder_of, tmp_path, capsys):  # noqa: F811
    folder = shutil.copytree(folder_of("qwen3_moe", ASYMMETRIC), tmp_path / "in")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    export(str(folder), str(tmp_path / "out"), "gguf")
    fields = gguf.GGUFReader(tmp_path / "out" / "model.gguf").fields
    keys = {name: fields.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")}
    assert {name: field.contents() for name, field in keys.items() if field is not None} == written
    output = capsys.readouterr().out
    assert ("left out" in output) == bool(left) and all(f"{number} (" in output for number in left)


@pytest.mark.parametrize(
    ("expression", "words"),
    [(r"\p{N}| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+", None), (r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+", "qwen2")],
)
def test_the_closest_rule_for_words_is_chosen_by_trial(expression, words):
    tokenizer = Tokenizer(models.BPE())
    if words:
        expression = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|" + expression + r"[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    split = pre_tokenizers.Split(Regex(expression), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=1500, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(read_documents("bundled:calibration"), trainer)
    name, share = words_of(tokenizer)
    assert (name, share) == (words, 0) if words else share > 0


def sentencepiece_tokenizer() -> Tokenizer:
    """BPE with byte fallback and sentencepiece's spaces, like Llama's and Mixtral's."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=True)
    bytes_ = [f"<0x{i:02X}>" for i in range(256)]
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=1500, special_tokens=[*special, *bytes_], limit_alphabet=60, show_progress=False
    )
    tokenizer.train_from_iterator(read_documents("bundled:calibration"), trainer)
    stored = json.loads(tokenizer.to_str())
    stored["added_tokens"] = stored["added_tokens"][: len(special)]  # bytes are ordinary tokens
    stored["pre_tokenizer"] = None
    stored["normalizer"] = {
        "type": "Sequence",
        "normalizers": [
            {"type": "Prepend", "prepend": "\u2581"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"},
        ],
    }
    steps = [
        {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
        {"type": "Strip", "content": " ", "start": 1, "stop": 0},
    ]
    stored["decoder"] = {"type": "Sequence", "decoders": steps}
    return Tokenizer.from_str(json.dumps(stored))


def by_scores(text: str, tokens: list[str], scores: list[float]) -> list[int]:
    """llama.cpp's rule, by hand: join the neighbours whose union scores highest, the first of equals; then bytes."""
    number = {token: i for i, token in enumerate(tokens)}
    symbols = list("\u2581" + text.replace(" ", "\u2581"))
    while True:
        unions = [
            (scores[number[a + b]], -i) for i, (a, b) in enumerate(itertools.pairwise(symbols)) if a + b in number
        ]
        if not unions:
            break
        i = -max(unions)[1]
        symbols[i : i + 2] = [symbols[i] + symbols[i + 1]]
    spelled = [[s] if s in number else [f"<0x{byte:02X}>" for byte in s.encode()] for s in symbols]
    return [number[s] for parts in spelled for s in parts]


def test_sentencepiece_tokenizers_go_by_scores(folder_of, tmp_path):  # noqa: F811
    folder = shutil.copytree(folder_of("mixtral", ASYMMETRIC), tmp_path / "in")
    tokenizer = sentencepiece_tokenizer()
    tokenizer.save(str(folder / "tokenizer.json"))
    export(str(folder), str(tmp_path / "out"), "gguf")
    fields = gguf.GGUFReader(tmp_path / "out" / "model.gguf").fields
    keys = {name: fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "scores", "token_type", "model")}
    assert keys["model"] == "llama" and fields["tokenizer.ggml.add_space_prefix"].contents()
    text = read_documents("bundled:prose")[0][:600] + " \u4e2d\u6587 x"
    expected = tokenizer.encode(text, add_special_tokens=False).ids
    assert by_scores(text, keys["tokens"], keys["scores"]) == expected
    types = gguf.TokenType
    assert [keys["token_type"][i] for i in (1, 3, 258, 259)] == [types.CONTROL, types.BYTE, types.BYTE, types.NORMAL]


def test_experts_with_different_bits_keep_their_values(tiny_model_dir, tmp_path):
    folder = compress(tiny_model_dir("qwen3_moe"), tmp_path / "mixed", mixed=True, symmetric=True)
    assert export(str(folder), str(tmp_path / "out"), "gguf").weights == 0


def test_what_llama_cpp_computes_differently_is_refused(folder_of, tmp_path):  # noqa: F811
    with pytest.raises(ValueError, match="not phimoe.*another rule.*--format dense"):
        export(str(folder_of("phimoe", ASYMMETRIC)), str(tmp_path / "out"), "gguf")
    for change, option in (
        ({"norm_topk_prob": False}, "norm_topk_prob=False"),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}, "rope_type='linear'"),
    ):
        folder = shutil.copytree(folder_of("qwen3_moe", ASYMMETRIC), tmp_path / option.split("=")[0])
        config = json.loads((folder / "config.json").read_text())
        config["original"]["config"] |= change
        (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match=f"{option}.*--format dense"):
            export(str(folder), str(tmp_path / "out"), "gguf")
    folder = shutil.copytree(folder_of("mixtral", ASYMMETRIC), tmp_path / "unigram")
    stored = json.loads((folder / "tokenizer.json").read_text())
    stored["model"] = {"type": "Unigram", "vocab": [["<unk>", 0.0]], "unk_id": 0}
    (folder / "tokenizer.json").write_text(json.dumps(stored))
    with pytest.raises(ValueError, match="writes BPE tokenizers"):
        export(str(folder), str(tmp_path / "out"), "gguf")
    assert not (tmp_path / "out").exists()
