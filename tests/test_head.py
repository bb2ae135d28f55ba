"""`--model.head_bits`: the output head on the grid, and an embedding that is tied to it, from `fit` to every use."""

import copy
import json
import pickle
import shutil
from pathlib import Path

import architectures
import gguf
import jobs
import pytest
import tiny_models
import torch
from joint_trial import assert_equals_the_whole, stage_of
from safetensors.torch import load_file, save_file
from test_architectures import REFUSED
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from eacmoe_lightning import load
from eacmoe_lightning.calibration.head import check_head, embedding_of, quantize_head
from eacmoe_lightning.calibration.recipe import Recipe, num_quantized
from eacmoe_lightning.calibration.streams import Streams
from eacmoe_lightning.cli import main
from eacmoe_lightning.compressed import format as formats
from eacmoe_lightning.compressed.directory import CompressedWeights, save_compressed
from eacmoe_lightning.compressed.format import read_config
from eacmoe_lightning.exports.export import export
from eacmoe_lightning.models.checkpoint import Checkpoint
from eacmoe_lightning.models.head import output_head
from eacmoe_lightning.models.moe import MoEModel
from eacmoe_lightning.models.originals import load_original
from eacmoe_lightning.models.self_check import check_parts
from eacmoe_lightning.models.streamed import StreamedModel
from eacmoe_lightning.planning.shapes import load_shapes
from eacmoe_lightning.planning.sizes import Job, disk_use
from eacmoe_lightning.quantization.grid import Grid, round_to_nearest
from eacmoe_lightning.quantization.packing import pack
from eacmoe_lightning.run.block_file import read_head
from eacmoe_lightning.run.directory import RunDirectory
from eacmoe_lightning.run.ranks import Ranks
from eacmoe_lightning.runtime.packed_modules import PackedLinear, PackedWeight, TiedLinear
from eacmoe_lightning.serving.packed_model import PackedModel

pytestmark = pytest.mark.filterwarnings("ignore:LightningCLI's args", "ignore:.*deprecated")
NAMES = {"qwen2_moe": "lm_head.weight", "phimoe": "lm_head.weight", "qwen3_moe": "model.embed_tokens.weight"}  # tied
families = pytest.mark.parametrize("family", NAMES)
QUICK = {"model__router_method": "none", "data__heldout": "[]"}


@pytest.fixture(scope="module")
def tokens() -> Tensor:
    return torch.randint(1, tiny_models.VOCABULARY, (2, 40), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def run_of(fitted):
    """`run_of(family)`: a finished run of all stages with a head of 6 bits."""
    return lambda family: fitted(family, model__head_bits=6)


def rest_of(run: Path) -> dict[str, Tensor]:
    return load_file(run / "compressed" / formats.REST)


# --- the stored head


@families
def test_the_head_is_the_original_rounded_to_nearest(family, run_of, tiny_model_dir):
    name, run = NAMES[family], run_of(family)
    expected = round_to_nearest(load_original(str(tiny_model_dir(family))).lm_head.weight.detach(), Grid(6, 32))
    stored = rest_of(run)
    assert torch.equal(stored[f"{name}.codes"], pack(expected.codes, 6))
    assert torch.equal(stored[f"{name}.scale"], expected.scale)
    assert torch.equal(stored[f"{name}.zero_point"], expected.zero_point)
    assert not stored.keys() & {"lm_head.weight", name}, "the weight is stored twice"
    config = read_config(run / "compressed")
    assert config["format_version"] == 5 and config["quantization"]["bits"][name] == 6
    report = json.loads((run / "report.json").read_text())
    assert report["bits"]["head"] == 6 + 24 / 32
    assert "bits per weight of the output head" in (run / "report.md").read_text()
    assert "| output head | 0.26 million | 6 | 6.75 |" in (run / "compressed" / "README.md").read_text()


def test_without_the_option_nothing_is_recorded(fitted):
    run = fitted("qwen2_moe")
    config = read_config(run / "compressed")
    assert config["format_version"] == 1 and "head_bits" not in config["quantization"]
    assert "model.head_bits" not in json.loads((run / "run.json").read_text())
    assert not (run / "head.safetensors").exists() and "lm_head.weight" in rest_of(run)


def test_an_older_version_refuses_the_directory(run_of, monkeypatch):
    monkeypatch.setattr(formats, "FORMAT_VERSION", 4)
    for packed in (True, False):
        with pytest.raises(ValueError, match="format version 5, but this .* reads up to 4: install a newer one"):
            load(run_of("qwen2_moe"), packed=packed)


@pytest.mark.parametrize("is_equal", [True, False])
@torch.no_grad()
def test_a_tied_original_whose_files_hold_a_head_besides(is_equal, tiny_model_dir, tokens, tmp_path):
    """transformers ties the two if they are equal, and otherwise keeps both."""
    model = Path(shutil.copytree(tiny_model_dir("qwen3_moe"), tmp_path / "model"))
    tensors = load_file(model / "model.safetensors")
    embedding = tensors["model.embed_tokens.weight"]
    tensors["lm_head.weight"] = embedding.clone() if is_equal else embedding.flip(0).clone()
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    run = jobs.fit(model, tmp_path / "run", **QUICK, model__head_bits=8)
    own = "model.embed_tokens.weight" if is_equal else "lm_head.weight"
    stored = {name for name in rest_of(run) if "norm" not in name}
    others = set() if is_equal else {"model.embed_tokens.weight"}
    assert stored == others | {f"{own}.{kind}" for kind in ("codes", "scale", "zero_point")}
    packed, decoded, original = load(run), load(run, packed=False), load_original(str(model))
    torch.testing.assert_close(packed(tokens).logits, decoded(tokens).logits, rtol=1e-4, atol=1e-4)
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        got, expected = decoded.state_dict()[name], original.state_dict()[name]
        is_quantized = is_equal or name == own
        assert torch.equal(got, expected) != is_quantized and (got - expected).abs().max() < 5e-3


# --- packed modules


@pytest.mark.parametrize("bits", range(2, 9))
def test_a_packed_weight_decodes_the_rows_that_are_asked_for(bits):
    quantized = round_to_nearest(torch.randn(50, 64, generator=torch.Generator().manual_seed(0)), Grid(bits, 16))
    weight = PackedWeight((50, 64), bits, 16)
    weight.codes, weight.scale, weight.zero_point = pack(quantized.codes, bits), quantized.scale, quantized.zero_point
    decoded, ids = quantized.dequantize(), torch.tensor([[3, 49, 3], [0, 7, 21]])
    assert torch.equal(weight.rows(ids), decoded[ids])
    assert torch.equal(weight[7], decoded[7]) and torch.equal(weight[7, :], decoded[7, :])
    assert torch.equal(weight[None, 2:4, :], decoded[None, 2:4, :]) and torch.equal(weight[-1], decoded[-1])
    assert torch.equal(weight.rows(torch.tensor(7)), decoded[7])
    for beyond in (-1, 50):  # as torch's embedding has it: an id that stands for no token is an error
        with pytest.raises(IndexError):
            weight.rows(torch.tensor([3, beyond]))


def test_one_weight_serves_the_embedding_and_the_head(run_of):
    model = load(run_of("qwen3_moe"))
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert type(head) is TiedLinear and head.weight is embedding.weight and isinstance(head.weight, PackedWeight)
    of_vocabulary = [name for name, tensor in model.state_dict().items() if len(tensor) == tiny_models.VOCABULARY]
    assert sorted(of_vocabulary) == [f"model.embed_tokens.weight.{k}" for k in ("codes", "scale", "zero_point")]
    assert not [p for p in model.parameters() if p.ndim == 2 and len(p) == tiny_models.VOCABULARY]
    model.tie_weights()
    assert head.weight is model.get_input_embeddings().weight


@families
@torch.no_grad()
def test_a_packed_head_gives_what_the_decoded_one_gives(family, run_of, tokens):
    packed, decoded = load(run_of(family)), load(run_of(family), packed=False)
    assert isinstance(packed.lm_head, PackedLinear) and type(decoded.lm_head) is nn.Linear
    torch.testing.assert_close(packed(tokens).logits, decoded(tokens).logits, rtol=1e-4, atol=1e-4)
    same = AutoModelForCausalLM.from_pretrained(run_of(family) / "compressed")
    assert torch.equal(same(tokens).logits, packed(tokens).logits)
    for model in (copy.deepcopy(packed), pickle.loads(pickle.dumps(packed))):
        assert torch.equal(model(tokens).logits, packed(tokens).logits)
    narrow = copy.deepcopy(packed).to(torch.bfloat16)(tokens).logits
    assert narrow.dtype == torch.bfloat16 and narrow.isfinite().all()
    compiled = torch.compile(packed, backend="aot_eager")
    torch.testing.assert_close(compiled(tokens).logits, packed(tokens).logits)
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones(2, 8).long()}
    assert torch.equal(*(model.generate(tokens[:, :8], **options) for model in (packed, decoded)))


def test_a_packed_head_cannot_be_resized(run_of):
    with pytest.raises(ValueError, match="resize_token_embeddings: the output head is quantized.*packed=False"):
        load(run_of("qwen3_moe")).resize_token_embeddings(tiny_models.VOCABULARY + 8)


@families
def test_saving_a_packed_model_again_gives_the_same_files(family, run_of, tmp_path):
    load(run_of(family)).save_pretrained(tmp_path / "again")
    for file in (run_of(family) / "compressed").glob("*.safetensors"):
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes()
    assert read_config(tmp_path / "again") == read_config(run_of(family) / "compressed")


def each_architecture() -> pytest.MarkDecorator:
    quick = ("deepseek_v4", "gemma4_text", "granitemoe", "inkling2_text", "phimoe", "qwen3_moe")
    names = [name for name in architectures.ARCHITECTURES if name not in REFUSED]
    rows = [pytest.param(name, marks=[] if name in quick else [pytest.mark.slow]) for name in names]
    return pytest.mark.parametrize("name", rows)


def with_a_head(name: str, folder: Path, tokenizer) -> tuple[Path, PreTrainedModel]:
    """A compressed directory whose head has 5 bits and whose blocks are the original's; and the original."""
    original = architectures.build(name)
    original.save_pretrained(folder / "original")
    tokenizer.save_pretrained(folder / "original")
    moe, window = MoEModel(load_original(str(folder / "original"))), torch.arange(1, 65)[None]
    head = quantize_head(moe, Recipe(head_bits=5, group_size=32))
    check_head(moe, head, window, check_parts(moe, window))
    moe.put({name: weight.dequantize() for name, weight in head.items()})
    about = {"method": "none", "quantizer": "none"}
    save_compressed(folder / "compressed", moe, str(folder / "original"), [{}] * len(moe.blocks), about, head=head)
    return folder / "compressed", original


@each_architecture()
@torch.no_grad()
def test_every_architecture_runs_with_a_packed_head(name, tokenizer, tokens, tmp_path):
    """With its scaled or normed embeddings, biases, soft caps, scaled logits and padded vocabulary."""
    folder, original = with_a_head(name, tmp_path, tokenizer)
    packed, decoded = load(folder), load(folder, packed=False)
    assert isinstance(packed.get_output_embeddings(), PackedLinear)
    got, expected = packed(tokens, use_cache=False).logits, decoded(tokens, use_cache=False).logits
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    distance = (got - original(tokens, use_cache=False).logits).norm() / got.norm()
    assert 0 < distance < 0.5


# --- what the calibration sees


@pytest.mark.parametrize("family, quantizer", [("qwen3_moe", "gptq"), ("qwen3_moe", "kquant"), ("qwen2_moe", "kquant")])
@torch.no_grad()
def test_the_compressed_stream_begins_with_the_decoded_embedding(family, quantizer, tiny_model_dir, tmp_path):
    moe = StreamedModel(Checkpoint(str(tiny_model_dir(family))))
    head = quantize_head(moe, Recipe(head_bits=4, group_size=32, quantizer=quantizer))
    decoded = head["model.embed_tokens.weight"].dequantize()
    table, ids = moe.model.get_input_embeddings().weight.clone(), torch.arange(1, 97).view(4, 24)
    streams = Streams(moe, ids, 0, 2, RunDirectory(tmp_path), Ranks(), embedding=embedding_of(moe, head))
    streams.embed()
    assert torch.equal(streams.x[:], table[ids]) and torch.equal(streams.x_hat[:], decoded[ids])
    assert torch.equal(streams.first_call(moe.blocks[0]).hidden, decoded[ids[:2]])
    assert torch.equal(moe.model.get_input_embeddings().weight, table), "the original has changed"


@pytest.mark.parametrize("family", ["qwen2_moe", "qwen3_moe"])
@torch.no_grad()
def test_the_joint_stage_trains_with_the_quantized_head_towards_the_original_one(family, tiny_model_dir, tmp_path):
    folder = tiny_model_dir(family)
    run = jobs.fit(folder, tmp_path / "run", **QUICK, model__head_bits=4, model__quantizer="rtn")
    with torch.enable_grad():
        assert_equals_the_whole(folder, run)
    (decoded,) = (weight.dequantize() for weight in read_head(RunDirectory(run)).values())
    original = load_original(str(folder))
    with stage_of(folder, run, True) as (stage, _):
        student, teacher = stage.compressed.model, stage.parts.moe.model
        assert torch.equal(student.lm_head.weight, decoded)
        assert torch.equal(teacher.lm_head.weight, original.lm_head.weight)
        embedding = decoded if family == "qwen3_moe" else original.model.embed_tokens.weight
        assert torch.equal(student.model.embed_tokens.weight, embedding)


# --- resume


KILLED = [
    ["call", "eacmoe_lightning.job.start.check_head", 1],  # before the run directory exists
    ["replace", "head.safetensors", 1],  # while the head is written
    ["phase", "0 attention", 1],
    ["call", "eacmoe_lightning.job.block_stage.BlockStage.window_losses", 3],
    ["phase", "2 replay", 1],
    ["call", "eacmoe_lightning.job.joint_stage.JointStage.losses", 1],
    ["replace", ".compressed.partial/weights-rest", 1],
]


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen2_moe", "qwen3_moe"])
def test_a_killed_job_ends_with_the_same_bytes(family, run_of, tiny_model_dir, tmp_path):
    jobs.attempts(tiny_model_dir(family), tmp_path / "run", KILLED, {"model__head_bits": 6})
    whole = run_of(family)
    for part in ("blocks", "compressed"):
        assert jobs.contents(tmp_path / "run" / part) == jobs.contents(whole / part)
    assert (tmp_path / "run" / "head.safetensors").read_bytes() == (whole / "head.safetensors").read_bytes()


@pytest.mark.slow
def test_a_head_that_was_deleted_is_made_again(run_of, tiny_model_dir, tmp_path):
    run = Path(shutil.copytree(run_of("qwen3_moe"), tmp_path / "run"))
    (run / "head.safetensors").unlink()
    jobs.fit(tiny_model_dir("qwen3_moe"), run, "--ckpt_path", "auto", model__head_bits=6)
    for part in ("head.safetensors", "compressed/" + formats.REST):
        assert (run / part).read_bytes() == (run_of("qwen3_moe") / part).read_bytes()


# --- the other quantizers, sizes, pruning, exports, servers


@pytest.mark.slow
@pytest.mark.parametrize("quantizer", ["lattice", "rtn"])
@torch.no_grad()
def test_the_head_lies_on_the_grid_beside_every_quantizer(quantizer, tiny_model_dir, tokens, tmp_path):
    run = jobs.fit(tiny_model_dir("qwen3_moe"), tmp_path / "run", **QUICK, model__quantizer=quantizer,
                   model__head_bits=8)  # fmt: skip
    assert rest_of(run)["model.embed_tokens.weight.codes"].shape == (tiny_models.VOCABULARY, 64)
    (head,) = read_head(RunDirectory(run)).values()
    model = load(run)
    assert torch.equal(load(run, packed=False).lm_head.weight, head.dequantize())
    assert model(tokens).logits.isfinite().all()


@pytest.mark.parametrize("family", ["qwen2_moe", "qwen3_moe"])
@torch.no_grad()
def test_for_llama_cpp_the_embedding_has_blocks_too(family, tiny_model_dir, tmp_path):
    """All stages see both decoded; the file holds their blocks, and `export` compares what it decodes to."""
    run = jobs.fit(tiny_model_dir(family), tmp_path / "run", **QUICK, model__target="llama.cpp", model__head_bits=6)
    head, state = read_head(RunDirectory(run)), load(run).state_dict()
    in_file = {"model.embed_tokens.weight": "token_embd.weight", "lm_head.weight": "output.weight"}
    assert list(head) == ([*sorted(in_file)] if family == "qwen2_moe" else ["model.embed_tokens.weight"])
    assert all(torch.equal(state[name], weight.dequantize()) for name, weight in head.items())
    for form in ("gguf", "dense"):
        export(str(run), str(tmp_path / form), form)
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "gguf" / "model.gguf").tensors}
    for name, weight in head.items():
        tensor = stored[in_file[name]]
        assert tensor.tensor_type.name == weight.kind == "Q8_0"  # rows of 64 have no K-quants
        assert torch.equal(torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type)), weight.dequantize())
    assert ("output.weight" in stored) == (family == "qwen2_moe")


@torch.no_grad()
def test_rows_of_256_get_k_quants():
    moe = StreamedModel(Checkpoint("bundled"))
    for bits, most in ((4, 0.09), (6, 0.02)):
        ((name, weight),) = quantize_head(moe, Recipe(head_bits=bits, quantizer="kquant")).items()
        original = moe.model.get_parameter(name).float()
        assert weight.kind == f"Q{bits}_K" and (weight.dequantize() - original).norm() / original.norm() < most


@pytest.mark.parametrize("family", ["qwen2_moe", "qwen3_moe"])
@torch.no_grad()
def test_exports_and_servers_get_the_decoded_head(family, run_of, tmp_path):
    decoded = load(run_of(family), packed=False)
    for form in ("dense", "gptq_v2", "gguf"):
        export(str(run_of(family)), str(tmp_path / form), form)  # compares every weight and the logits
    name, written = NAMES[family], {}
    for file in (tmp_path / "gptq_v2").glob("*.safetensors"):
        written |= load_file(file)
    assert torch.equal(written[name], decoded.state_dict()[name])
    served = dict(PackedModel(run_of(family) / "compressed").tensors({}))
    assert torch.equal(served[name], decoded.state_dict()[name])


@pytest.mark.slow
def test_a_size_in_gigabytes_counts_the_quantized_head(tiny_model_dir, tmp_path):
    options = QUICK | {"model__head_bits": 4, "data__heldout": "[]"}
    moe = load_shapes(str(tiny_model_dir("qwen3_moe")), "auto")
    dense = 4 * tiny_models.VOCABULARY * 64
    run = jobs.fit(tiny_model_dir("qwen3_moe"), tmp_path / "free", **options, model__target_bits=3.3)
    wanted = sum(file.stat().st_size for file in (run / "compressed").iterdir()) * 1.02 / 1e9
    assert wanted * 1e9 < dense + num_quantized(moe), "the size has room for the original's head"
    run = jobs.fit(tiny_model_dir("qwen3_moe"), tmp_path / "run", **options, model__target_gb=wanted)
    assert 0.97 * wanted < sum(file.stat().st_size for file in (run / "compressed").iterdir()) / 1e9 <= wanted


def test_plan_counts_the_bytes_of_the_head(tiny_model_dir, capsys, tmp_path):
    job, numbers = Job(6, 64, 4, 0, "ridge", 1, 4, 0, 4), tiny_models.VOCABULARY * 64
    for family in ("qwen2_moe", "qwen3_moe"):
        moe = load_shapes(str(tiny_model_dir(family)), "bfloat16")
        without, quantized = (disk_use(moe, Recipe(group_size=32, head_bits=bits), job) for bits in (None, 8))
        packed = numbers * (8 + 24 / 32) / 8
        assert without["compressed model"] - quantized["compressed model"] == 2 * numbers - packed
        assert quantized["finished blocks"] - without["finished blocks"] == packed
        recipe = Recipe(quantizer="kquant", head_bits=6)
        blocks = disk_use(moe, recipe, job)["compressed model"]
        without = disk_use(moe, Recipe(quantizer="kquant"), job)["compressed model"]
        assert without - blocks == len(recipe.outside(moe)) * numbers * (2 - 8.5 / 8)
    main(["plan", *jobs.options(tiny_model_dir("qwen3_moe"), tmp_path / "run", model__head_bits=8),
          "--available.memory", "1e12"])  # fmt: skip
    assert "compressed model" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen2_moe", "qwen3_moe"])
def test_pruning_during_and_after_a_run_keeps_the_head(family, run_of, tiny_model_dir, tmp_path):
    during = jobs.fit(tiny_model_dir(family), tmp_path / "during", **QUICK, model__head_bits=6, pruning__keep=5)
    command = ["prune", "--model", str(run_of(family)), "--output", str(tmp_path / "after"), "--pruning.keep", "5"]
    main([*command, "--num_windows", "4", "--window_length", "64", "--num_heldout_windows", "1"])
    expected = rest_of(run_of(family))
    for run in (during, tmp_path / "after"):
        rest = rest_of(run)
        for kind in ("codes", "scale", "zero_point"):
            assert torch.equal(rest[f"{NAMES[family]}.{kind}"], expected[f"{NAMES[family]}.{kind}"])
        assert read_config(run / "compressed")["format_version"] == 5
    before, after = (json.loads((run / "report.json").read_text()) for run in (run_of(family), tmp_path / "after"))
    assert after["bits"]["head"] == before["bits"]["head"] and after["bits"]["nominal"] < 4


# --- what is refused


@pytest.mark.parametrize(
    "options, message",
    [
        ({"head_bits": 3}, "head_bits=3 .--model.head_bits. is not a whole number from 4 to 8"),
        ({"head_bits": 9}, "head_bits=9 .--model.head_bits. is not a whole number from 4 to 8"),
        ({"head_bits": 7, "quantizer": "kquant"}, "head_bits=7 .--model.head_bits. is not among the bits of kquant"),
        ({"head_bits": 8, "quantizer": "none"}, "quantizer=none .--model.quantizer. leaves all weights as they are"),
    ],
)
def test_bad_options(options, message, tiny_model_dir, tmp_path, capsys):
    with pytest.raises(ValueError, match=message):
        Recipe(**options)
    words = {f"model__{name}": value for name, value in options.items()}
    with pytest.raises(SystemExit):
        jobs.fit(tiny_model_dir("qwen2_moe"), tmp_path / "run", **words)
    assert "--model.head_bits" in capsys.readouterr().err and not (tmp_path / "run" / "run.json").exists()


def test_a_head_of_another_width_needs_groups_that_fit(tiny_model_dir):
    moe = load_shapes(str(tiny_model_dir("qwen2_moe")), "auto")
    with pytest.raises(
        ValueError, match=r"lm_head.weight: in_features=64 is not a multiple of 128 \(--model.group_size\)"
    ):
        Recipe(head_bits=8).check(moe)


def test_a_model_whose_head_cannot_be_quantized_is_refused(tiny_model_dir):
    model = load_original(str(tiny_model_dir("qwen2_moe")))
    model.lm_head = None
    with pytest.raises(ValueError, match="qwen2_moe .--model.head_bits. has no output head"):
        output_head(model)
    model = load_original(str(tiny_model_dir("qwen2_moe")))
    model.model.other = nn.Linear(64, tiny_models.VOCABULARY)
    model.model.other.weight = model.lm_head.weight
    with pytest.raises(ValueError, match="shares its weight with model.other.weight"):
        output_head(model)


class Reads(nn.Linear):
    """A head whose model reads its weight."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight) * 2


def test_a_head_that_is_more_than_a_linear_is_refused(tiny_model_dir):
    model = load_original(str(tiny_model_dir("qwen2_moe")))
    model.lm_head.__class__ = Reads
    moe = MoEModel(model)
    head, window = quantize_head(moe, Recipe(head_bits=8, group_size=32)), torch.arange(1, 33)[None]
    with pytest.raises(ValueError, match="qwen2_moe computes other logits with a packed output head"):
        check_head(moe, head, window, moe.embed(window))
    assert type(model.lm_head) is Reads, "the model is not put back"
    model.lm_head.__class__ = nn.Linear
    check_head(moe, head, window, moe.embed(window))


def test_every_evaluation_takes_the_directory(run_of, tiny_model_dir, tmp_path):
    run = Path(shutil.copytree(run_of("qwen3_moe"), tmp_path / "run"))
    options = jobs.options(tiny_model_dir("qwen3_moe"), run, model__head_bits=6)
    main(["test", *options])
    main(["validate", *options])
    tested = json.loads((run / "test.json").read_text())
    report = json.loads((run / "report.json").read_text())
    assert tested["perplexity"]["prose"]["compressed"] == pytest.approx(
        report["perplexity"]["prose"]["compressed"], rel=1e-6
    )
    assert CompressedWeights(run / "compressed").head.keys() == {NAMES["qwen3_moe"]}
