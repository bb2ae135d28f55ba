"""Calibration text that a model writes itself: what it draws, from whom, and that a run keeps it."""

import json
import re
import shutil
from pathlib import Path

import architectures
import jobs
import pytest
import tiny_models
import torch
from completion_server import serving
from test_architectures import REFUSED
from test_chat import CHATML
from test_launchers import assert_same
from test_processes import launch
from tokenizers import processors
from transformers import AutoTokenizer

from eacmoe_lightning.job import sampling
from eacmoe_lightning.job.data import TextWindows
from eacmoe_lightning.models.checkpoint import Checkpoint
from eacmoe_lightning.models.moe import MoEModel
from eacmoe_lightning.models.sampling import batch_size, cache_bytes, sample
from eacmoe_lightning.models.streamed import StreamedModel
from eacmoe_lightning.models.tokenizer import load_tokenizer
from eacmoe_lightning.planning import checks
from eacmoe_lightning.run.directory import RunDirectory
from eacmoe_lightning.run.files import read_tensors
from eacmoe_lightning.run.ranks import Ranks
from eacmoe_lightning.text import server as server_module
from eacmoe_lightning.text.answers import enough, pack
from eacmoe_lightning.text.documents import documents
from eacmoe_lightning.text.languages import language_of, scripts
from eacmoe_lightning.text.openings import PROMPTS, Openings, openings
from eacmoe_lightning.text.sampled import SampledSource, sampled_source
from eacmoe_lightning.text.server import ServerError
from eacmoe_lightning.text.sources import name_sources, stored_source

pytestmark = pytest.mark.filterwarnings("ignore")
FEW = {"data__num_windows": 4, "data__heldout": "[]", "model__router_method": "none"}


TEMPLATE = (
    "{% for turn in messages %}[{{ turn.role }}]{{ turn.content }}{% if turn.role == 'assistant' %}{{ eos_token }}"
    "\n{% endif %}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)
SELECTS_TOKENS = {"dots3_note_text": 4}  # tokens that differ: with a cache, attention selects others where scores tie


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


# --- the source


@pytest.mark.parametrize(
    "source, num, model",
    [
        ("self", None, None),
        ("self:64", 64, None),
        ("self:runs/cheap", None, "runs/cheap"),
        ("self:64:runs/cheap", 64, "runs/cheap"),
        ("self:http://127.0.0.1:8000/v1", None, "http://127.0.0.1:8000/v1"),
        ("self:8:https://host/v1", 8, "https://host/v1"),
        ("self:./2024", None, "./2024"),
    ],
)
def test_the_parts_of_a_source(source, num, model):
    assert sampled_source(source) == SampledSource(num, model)
    assert name_sources([source, "bundled:prose"])["self"] == source


@pytest.mark.parametrize("source", ["bundled:prose", "selfie.txt", "./self", "selfish/data", "my:self"])
def test_other_sources_are_not_sampled(source):
    assert sampled_source(source) is None


@pytest.mark.parametrize("source", ["self:0", "self:-3", "self:", "self:8:", "self:0:runs/cheap"])
def test_bad_sources_are_named(source):
    with pytest.raises(ValueError, match=re.escape(f"--data.calibration: '{source}'")):
        TextWindows(calibration=source)


def test_a_run_stores_the_absolute_path_of_the_writer(tmp_path, monkeypatch):
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    assert stored_source("self:8:runs") == f"self:8:{tmp_path}/runs" and stored_source("self:runs") != "self:runs"
    for source in ("self", "self:8", "self:http://host:1/v1"):
        assert stored_source(source) == source


@pytest.mark.parametrize(
    "options, windows",
    [
        ({"calibration": "self"}, {"self": 12}),
        ({"calibration": "self:64"}, {"self": 64}),
        ({"calibration": ["bundled:prose", "self"]}, {"prose": 6, "self": 6}),
        ({"calibration": ["bundled:prose", "self:5"]}, {"prose": 12, "self": 5}),
        ({"calibration": ["self", "bundled:code"], "shares": {"self": 1, "code": 3}}, {"self": 3, "code": 9}),
        (
            {
                "calibration": ["bundled:prose", "bundled:code", "self:5"],
                "shares": {"prose": 1, "code": 2},
            },
            {"prose": 4, "code": 8, "self": 5},
        ),
        ({"calibration": {"a": "self:2", "b": "self:3:runs/x"}}, {"a": 2, "b": 3}),
    ],
)
def test_a_number_of_its_own_adds_windows_and_without_one_they_are_shared(options, windows):
    data = TextWindows(num_windows=12, **options)
    assert data.windows_by_text == windows and data.num_calibration_windows == sum(windows.values())
    assert data.calibration_sources.sum(1).tolist() == list(windows.values())


@pytest.mark.parametrize(
    "options, message",
    [
        ({"calibration": ["bundled:prose", "self:5"], "shares": {"prose": 1, "self": 1}}, "self:5 has its own number"),
        ({"calibration": ["self:1", "self:2"]}, "would both be called 'self'"),
        ({"heldout": "self:4"}, "--data.heldout: self:4 is written by the model"),
        ({"predict": "self"}, "--data.predict: self is written by the model"),
        ({"calibration": "self", "temperature": 0.0}, "--data.temperature=0.0 must be above 0"),
        ({"calibration": "self", "temperature": float("inf")}, "--data.temperature=inf must be above 0"),
        ({"calibration": "self", "sample_start": "bus"}, "--data.sample_start='bus' must be one of random, bos, chat"),
        ({"calibration": "self", "num_windows": 0}, "--data.num_windows=0 must be at least 1"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        TextWindows(**options)


def test_sampled_text_is_not_there_before_a_fit():
    with pytest.raises(ValueError, match="self:8 is sampled by the model when `fit` begins"):
        _ = TextWindows(calibration="self:8").calibration_windows


def test_commands_that_only_read_text_refuse_it():
    with pytest.raises(ValueError, match="self:8 is text that the model writes: only fit takes it"):
        next(documents("self:8"))


# --- drawing


def places(model, ids: torch.Tensor, temperature: float, num_ids: int) -> tuple[torch.Tensor, torch.Tensor]:
    """For each token but the first, where it begins and ends on the cumulative distribution [B, T - 1]."""
    with torch.no_grad():
        logits = model(ids, use_cache=False).logits[:, :-1, :num_ids].double() / temperature
    ends = logits.softmax(-1).cumsum(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
    return ends - logits.softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1), ends


@pytest.mark.parametrize("family", tiny_models.MOE_FAMILIES)
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_each_token_lies_where_its_number_is_on_the_distribution_of_a_full_pass(family, temperature):
    model, uniforms = tiny_models.build(family), torch.rand(3, 24, dtype=torch.float64, generator=generator())
    given = Openings([[[5]], [[6, 7, 8]], [[9]]])
    state = torch.get_rng_state()
    ids, chosen = sample(model, given, uniforms, temperature, 4000)
    assert torch.equal(state, torch.get_rng_state()) and ids.shape == (3, 24) and int(ids.max()) < 4000
    assert ids[:, 0].tolist() == [5, 6, 9] and ids[1, :3].tolist() == [6, 7, 8]
    assert chosen.sum(1).tolist() == [23, 21, 23] and not chosen[:, 0].any()
    starts, ends = places(model, ids, temperature, 4000)
    drawn, where = chosen[:, 1:], uniforms[:, 1:]
    assert (starts[drawn] < where[drawn] + 1e-4).all() and (where[drawn] < ends[drawn] + 1e-4).all()


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in architectures.ARCHITECTURES if name not in REFUSED])
def test_every_architecture_writes_what_a_full_pass_would(name):
    model = architectures.build(name)
    MoEModel(model)  # in the form in which a run has it
    uniforms = torch.rand(2, 40, dtype=torch.float64, generator=generator())
    ids, chosen = sample(model, Openings([[[5]], [[6, 7]]]), uniforms, 1.0, 4000)
    (starts, ends), drawn = places(model, ids, 1.0, 4000), chosen[:, 1:]
    away = torch.maximum(starts - uniforms[:, 1:], uniforms[:, 1:] - ends)[drawn]
    assert (away > 1e-3).sum() <= SELECTS_TOKENS.get(name, 0)


def test_a_window_does_not_depend_on_the_others_of_its_batch():
    model, uniforms = tiny_models.build("mixtral"), torch.rand(5, 16, dtype=torch.float64, generator=generator())
    given = Openings([[[token]] for token in range(10, 15)])
    ids, _ = sample(model, given, uniforms, 1.0, 4096)
    for rows in (slice(0, 2), slice(2, 5)):
        assert torch.equal(sample(model, given[rows], uniforms[rows], 1.0, 4096)[0], ids[rows])
    assert model.generation_config.eos_token_id == 0  # put back


def test_after_an_end_that_the_model_chose_a_window_gets_its_next_opening():
    model, uniforms = tiny_models.build("mixtral"), torch.rand(2, 60, dtype=torch.float64, generator=generator())
    ends = frozenset(range(0, 4096, 8))  # one token in eight
    given = Openings([[[16, 17], [32, 33, 40]], [[48]]], ends, (1, 2))
    ids, chosen = sample(model, given, uniforms, 1.0, 4096)
    for row, opened in enumerate(([16, 17], [48])):
        expected, number = list(opened), 0
        for place, token in enumerate(ids[row].tolist()):
            if expected:
                assert token == expected.pop(0) and not chosen[row, place]
                continue
            assert chosen[row, place]
            if token in ends:
                number += 1
                expected = [1, 2, *given.given[row][number % len(given.given[row])]]
        assert number > 2


def test_a_model_with_logits_that_are_no_numbers_is_refused():
    model = tiny_models.build("mixtral")
    model.lm_head.weight.data[7] = torch.nan
    with pytest.raises(ValueError, match="logits are NaN"):
        sample(model, Openings([[[5]]]), torch.rand(1, 4, dtype=torch.float64), 1.0, 4096)


def test_batches_are_even_and_fit():
    config = tiny_models.build("mixtral").config  # 3 layers, 2 key-value heads of 16
    assert cache_bytes(config, 4) == 3 * 2 * 2 * 16 * 4
    assert batch_size(config, 4, 249, 512, "cpu") == 249
    assert batch_size(config, 4, 600, 512, "cpu") == 300
    assert batch_size(config, 4, 5, 512, "cpu") == 5
    config.num_hidden_layers, config.num_key_value_heads, config.head_dim = 32, 8, 128
    assert batch_size(config, 2, 128, 2048, "cpu") == 7  # 268 MB a window and its logits, 2 GiB in all


# --- how windows begin


def test_random_windows_begin_with_ordinary_tokens(tokenizer):
    given = openings(tokenizer, "random", 500, 4000, generator())
    first = {given.tokens(row, 0)[0] for row in range(500)}
    assert len(first) > 400 and max(first) < 4000 and not first & {0, 1} and not given.ends
    again = openings(tokenizer, "random", 500, 4000, generator())
    assert again == given


def test_windows_begin_as_texts_do(tokenizer):
    assert openings(tokenizer, "bos", 2, 4096, generator()).given == [[[0]], [[0]]]


def test_a_chat_begins_with_a_prompt_and_goes_on_with_the_next(tokenizer, chatty):
    given = openings(chatty, "chat", 3, 4096, generator())
    texts = [chatty.decode(given.tokens(0, number)) for number in range(len(PROMPTS) + 1)]
    assert re.fullmatch(r"<\|im_start\|>user\n.*<\|im_end\|>\n<\|im_start\|>assistant\n", texts[0], re.S)
    assert texts[1].startswith("\n<|im_start|>user\n") and texts[-1] == "\n" + texts[0]
    assert len({text.strip() for text in texts}) == len(PROMPTS)
    assert chatty.convert_tokens_to_ids("<|im_end|>") in given.ends
    with pytest.raises(ValueError, match="--data.sample_start chat: the tokenizer has no chat template"):
        openings(tokenizer, "chat", 1, 4096, generator())


@pytest.fixture
def chatty(tiny_model_dir):
    """A tokenizer with a chat template whose turns end with a token of their own."""
    tokenizer = load_tokenizer(str(tiny_model_dir("mixtral")))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = CHATML
    return tokenizer


# --- languages


def test_languages_and_scripts():
    assert language_of("The end of the story is that it was not the end.") == "english"
    assert language_of("Der Hund und die Katze sind nicht mit dem Vogel auf dem Dach.") == "german"
    assert language_of("Il est dans la maison avec les enfants pour une heure.") == "french"
    assert language_of("x = [i * 2 for i in range(10)]") == "other" and language_of("") == "other"
    assert language_of("Solve w = 2*z + i for z. Let y be 4*o + w and z be y - i. What is z?") != "polish"
    assert scripts(["abcd", "où?"]) == {"latin": 1.0}
    assert scripts(["ab", "жы", "中文 12"]) == pytest.approx({"latin": 1 / 3, "cyrillic": 1 / 3, "cjk": 1 / 3})


# --- a run


def windows(run: Path, number: int = 0) -> torch.Tensor:
    return read_tensors(run / "sampled" / f"text_{number}" / "windows.safetensors")[0]["input_ids"]


def test_a_run_samples_once_and_tells_what(tiny_model_dir, tmp_path, capsys):
    model = tiny_model_dir("mixtral")
    run = jobs.fit(model, tmp_path / "run", data__calibration="[bundled:code, self:6]", **FEW)
    assert windows(run).shape == (6, 64) and [path.name for path in (run / "sampled").iterdir()] == ["text_0"]
    report = json.loads((run / "report.json").read_text())
    text = report["sampled"]["self"]
    assert (text["windows"], text["tokens"], text["chosen"]) == (6, 384, 378) and text["model"] == str(model)
    assert sum(text["languages"].values()) == pytest.approx(1) and report["cost"]["sample"]["seconds"] > 0
    assert report["coverage"]["self"]["windows"] == 6 and report["coverage"]["code"]["windows"] == 4
    assert "self: 384 tokens written by" in capsys.readouterr().out and "## Sampled" in (run / "report.md").read_text()
    config = json.loads((run / "run.json").read_text())
    assert (config["data.temperature"], config["data.sample_start"]) == (1.0, "random")
    again = jobs.fit(model, tmp_path / "again", data__calibration="[bundled:code, self:6]", **FEW)
    assert torch.equal(windows(again), windows(run))
    other = jobs.fit(model, tmp_path / "other", data__calibration="self:6", data__seed=1, **FEW)
    assert not torch.equal(windows(other), windows(run))


def test_a_run_goes_on_with_the_text_that_it_has(tiny_model_dir, tmp_path, monkeypatch, capfd):
    model, run = tiny_model_dir("mixtral"), tmp_path / "run"
    options = FEW | {"data__calibration": "self:6"}
    jobs.fit(model, run, trainer__max_epochs=1, **options)
    before = windows(run)
    for change, message in (
        ({"data__calibration": "self:7"}, "--data.calibration, self: source was 'self:6' and is now 'self:7'"),
        ({"data__temperature": 0.5}, "data.temperature was 1.0 and is now 0.5"),
    ):
        with pytest.raises(SystemExit):
            jobs.fit(model, run, "--ckpt_path", "auto", **options | change)
        assert message in capfd.readouterr().err
    monkeypatch.setattr(sampling, "sample", None)  # nothing is sampled again
    jobs.fit(model, run, "--ckpt_path", "auto", **options)
    assert torch.equal(windows(run), before) and (run / "report.json").exists()


def texts_of(model: Path, run: Path, calibration: str, **options) -> sampling.SampledTexts:
    """The sampling part of a fit: 5 windows of 16 tokens."""
    values = {"num_windows": 5, "window_length": 16, "tokenizer": str(model), "heldout": []}
    data = TextWindows(calibration=calibration, **values | options)
    moe = StreamedModel(Checkpoint(str(model), "float32"))
    return sampling.SampledTexts(data, RunDirectory(run), moe, Ranks(), str(model), "float32")


def written(texts: sampling.SampledTexts) -> torch.Tensor:
    texts.check()
    texts.prepare(False)
    texts.make()
    return texts.data.calibration_windows


def test_text_of_another_tokenizer_or_template_is_not_mixed_in(tiny_model_dir, tmp_path):
    """What tells windows apart is known before any is written, and so before the run knows its text."""
    model = tmp_path / "model"
    shutil.copytree(tiny_model_dir("mixtral"), model)
    held = texts_of(model, tmp_path / "run", "self")
    held.prepare(False)
    held.prepare(True)
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        "<|endoftext|> $A", special_tokens=[("<|endoftext|>", tokenizer.convert_tokens_to_ids("<|endoftext|>"))]
    )
    tokenizer.save_pretrained(model)
    with pytest.raises(ValueError, match=r"--data.calibration, self: tokenizer was '\w+' and is now"):
        texts_of(model, tmp_path / "run", "self").prepare(True)
    chats = {"sample_start": "chat", "chat_template": str(tmp_path / "t.jinja")}
    turns = "{% for m in messages %}<|endoftext|>{{ m.role }}: {{ m.content }}{% endfor %}"
    (tmp_path / "t.jinja").write_text(turns)
    texts_of(model, tmp_path / "chats", "self", **chats).prepare(False)
    (tmp_path / "t.jinja").write_text(turns.replace(":", " says"))
    with pytest.raises(ValueError, match=r"tokenizer was '\w+' and is now"):
        texts_of(model, tmp_path / "chats", "self", **chats).prepare(True)


def test_a_job_killed_while_it_samples_goes_on_with_the_next_batch(tiny_model_dir, tmp_path, monkeypatch):
    model = tiny_model_dir("mixtral")
    monkeypatch.setattr(sampling, "batch_size", lambda *_: 2)
    whole, calls = written(texts_of(model, tmp_path / "whole", "self")), []

    def dying(*args):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return sample(*args)

    monkeypatch.setattr(sampling, "sample", dying)
    with pytest.raises(KeyboardInterrupt):
        written(texts_of(model, tmp_path / "killed", "self"))
    assert torch.equal(written(texts_of(model, tmp_path / "killed", "self")), whole) and len(calls) == 4
    assert not list((tmp_path / "killed").rglob("part_*"))
    other = written(texts_of(model, tmp_path / "killed", "self", seed=1))  # no run has begun there
    assert not torch.equal(other, whole)


def test_two_processes_sample_what_one_does(tiny_model_dir, tmp_path, monkeypatch):
    model = tiny_model_dir("mixtral")
    monkeypatch.setattr(sampling, "batch_size", lambda *_: 2)
    monkeypatch.setattr(Ranks, "barrier", lambda self: None)
    whole = written(texts_of(model, tmp_path / "whole", "self"))
    ranks = [texts_of(model, tmp_path / "run", "self") for _ in range(2)]
    for number, texts in enumerate(ranks):
        texts.ranks = Ranks(number, 2)
    ranks[0].prepare(False)
    folder = tmp_path / "run" / "sampled" / "text_0"
    ranks[1]._write_parts("self", SampledSource(), folder)
    assert [path.name for path in folder.glob("part*")] == ["part_0001.safetensors"]
    for texts in ranks:
        texts.make()
        assert torch.equal(texts.data.calibration_windows, whole)


def test_what_counts_in_sampled_windows(tiny_model_dir, tmp_path):
    model = tiny_model_dir("mixtral")
    tokenizer = load_tokenizer(str(model))
    texts = texts_of(model, tmp_path / "answers", "self", answers_only=True)
    written(texts)
    assert texts.data.calibration_weights.sum(1).tolist() == [15] * 5  # all but the given token
    texts = texts_of(model, tmp_path / "separate", "self:40", documents="separate", temperature=3.0, window_length=64)
    ids = written(texts)
    for row, counts in zip(ids, texts.data.calibration_weights, strict=True):
        ends = [place for place, token in enumerate(row.tolist()) if token == tokenizer.eos_token_id and place]
        assert counts.sum() == (ends[0] + 1 if ends else 64) and counts[: int(counts.sum())].all()


@pytest.mark.slow
def test_a_run_killed_while_it_samples_ends_like_an_undisturbed_one(tiny_model_dir, tmp_path):
    model, more = tiny_model_dir("qwen3_moe"), {"data__calibration": "[bundled:code, self:6]", "data__heldout": "[]"}
    places = [
        ["call", "eacmoe_lightning.job.sampling.sample", 1],
        ["replace", "sampled/text_0/part_0000", 1],
        ["replace", "sampled/text_0/windows", 1],
        ["replace", "run.json", 1],  # sampled, but no run has begun
        ["phase", "1 experts", 1],
    ]
    jobs.attempts(model, tmp_path / "killed", places, more)
    jobs.attempts(model, tmp_path / "whole", [], more)
    for part in ("sampled", "blocks", "compressed"):
        assert jobs.contents(tmp_path / "killed" / part) == jobs.contents(tmp_path / "whole" / part)


@pytest.mark.slow
def test_two_processes_end_like_one(tiny_model_dir, tmp_path):
    model, options = tiny_model_dir("qwen2_moe"), FEW | {"data__calibration": "[bundled:code, self:3]"}
    alone = jobs.fit(model, tmp_path / "alone", model__joint_epochs=0, **options)
    status, output = launch(2, *jobs.options(model, tmp_path / "run", model__joint_epochs=0, **options))
    assert status == 0, output[-3000:]
    assert torch.equal(windows(tmp_path / "run"), windows(alone))
    assert output.count("self: 3 windows of 64 tokens are sampled") == 1
    assert_same(tmp_path / "run", alone, chooses=True)


def test_a_model_writes_chats(tiny_model_dir, tmp_path):
    (tmp_path / "chat.jinja").write_text(TEMPLATE)
    options = {"sample_start": "chat", "answers_only": True, "chat_template": str(tmp_path / "chat.jinja")}
    texts = texts_of(tiny_model_dir("mixtral"), tmp_path / "run", "self:3", window_length=100, **options)
    for ids, counts in zip(written(texts), texts.data.calibration_weights, strict=True):
        given = texts.data.tokens.decode(ids[: int((~counts).int().argmin())])
        assert given.startswith("[user]") and given.removeprefix("[user]").partition("[assistant]")[0] in PROMPTS
        assert given.endswith("[assistant]") and counts.any()


# --- from another model


def test_a_compressed_model_writes_for_its_original(tiny_model_dir, tmp_path, capfd):
    model = tiny_model_dir("qwen3_moe")
    cheap = jobs.fit(model, tmp_path / "cheap", model__joint_epochs=0, **FEW)
    run = jobs.fit(model, tmp_path / "run", data__calibration=f"self:3:{cheap}", **FEW)
    original = jobs.fit(model, tmp_path / "original", data__calibration="self:3", **FEW)
    text = json.loads((run / "report.json").read_text())["sampled"]["self"]
    assert text["model"] == str(cheap) and not torch.equal(windows(run), windows(original))
    moved = shutil.move(cheap, tmp_path / "moved")
    for place in (moved, cheap):  # the run has its text, and goes on wherever its writer is, if it is there at all
        assert jobs.fit(model, run, "--ckpt_path", "auto", data__calibration=f"self:3:{place}", **FEW)
    with pytest.raises(SystemExit):
        jobs.fit(model, run, "--ckpt_path", "auto", data__calibration=f"self:3:{original}", **FEW)
    assert "source was" in capfd.readouterr().err


def test_another_original_writes(tiny_model_dir, tmp_path):
    model = tiny_model_dir("mixtral")
    other = written(texts_of(model, tmp_path / "other", f"self:{tiny_model_dir('qwen2_moe')}"))
    itself = written(texts_of(model, tmp_path / "itself", f"self:{model}"))
    assert torch.equal(itself, written(texts_of(model, tmp_path / "run", "self"))) and not torch.equal(other, itself)


@pytest.mark.parametrize("rows", [4096, 4160])
@pytest.mark.parametrize("change", [None, "ids", "merges", "none"])
def test_a_writer_has_the_same_tokenizer_whatever_the_rows_of_its_embedding(tiny_model_dir, tmp_path, change, rows):
    model, other = tiny_model_dir("mixtral"), tmp_path / "other"
    shutil.copytree(model, other)
    config = json.loads((model / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"vocab_size": rows}))
    stored = json.loads((model / "tokenizer.json").read_text())
    words, message = stored["model"]["vocab"], None
    if change == "ids":
        words["e"], words["t"] = words["t"], words["e"]
        message = f"{other} does not write the tokens of {model}: .* has the id .* in {other}: sample from"
    elif change == "merges":
        stored["model"]["merges"], message = stored["model"]["merges"][:-1500], "it cuts text into other tokens: sample"
    (other / "tokenizer.json").write_text(json.dumps(stored))
    if change == "none":
        for path in other.glob("*token*"):
            path.unlink()
        message = None if rows == 4096 else "other has 4160 tokens and .* has 4096"
    texts = texts_of(model, tmp_path / "run", f"self:{other}")
    if message is None:
        texts.check()
    else:
        with pytest.raises(ValueError, match=message):
            texts.check()


def test_writers_that_cannot_are_refused_before_the_start(tiny_model_dir, tmp_path, monkeypatch):
    model = tiny_model_dir("mixtral")
    with pytest.raises(
        FileNotFoundError, match="--data.calibration: nothing can sample at '/no/model'.*pass self, self:NUM"
    ):
        texts_of(model, tmp_path, "self:/no/model").check()
    with pytest.raises(ValueError, match=r"http://127.0.0.1:9/v1/models does not answer.*start a server"):
        texts_of(model, tmp_path, "self:http://127.0.0.1:9").check()
    with pytest.raises(ValueError, match="no chat template"):
        texts_of(model, tmp_path, "self", sample_start="chat").check()
    config = json.loads((model / "config.json").read_text())
    other = shutil.copytree(model, tmp_path / "other")
    (other / "config.json").write_text(json.dumps(config | {"vocab_size": 3000}))
    with pytest.raises(ValueError, match="other has 3000 tokens and .* has 4096: sample from a model with the same"):
        texts_of(model, tmp_path / "run", f"self:{other}").check()
    monkeypatch.setattr(checks, "available_memory", lambda _: 1000)
    with pytest.raises(ValueError, match=r"the whole model is in memory: .* GB, but 0.0 GB .*self:RUN.*self:URL"):
        texts_of(model, tmp_path / "run", "self").check()
    assert not (tmp_path / "run").exists()


# --- from a server


@pytest.mark.parametrize("takes_ids", [True, False])
def test_a_server_writes(tiny_model_dir, tmp_path, takes_ids):
    model = tiny_model_dir("mixtral")
    tokenizer = load_tokenizer(str(model))
    with serving(model, takes_ids, stops_after=None if takes_ids else 6) as server:
        run = jobs.fit(model, tmp_path / "run", data__calibration=f"self:6:{server.url}", **FEW)
    ids = windows(run)
    assert ids.shape == (6, 64)
    asked = [request for request in server.requests if isinstance(request["prompt"], list) == takes_ids]
    assert len(asked) % 16 == 0 and {request["temperature"] for request in asked} == {1.0}
    assert len({request["seed"] for request in asked}) == len(asked)
    if takes_ids:  # texts of 64 tokens and their end
        prompts = {request["prompt"][0] for request in asked}
        stream = ids.flatten().tolist()
        assert all(stream[start] in prompts for start in range(0, 384, 65))
        assert all(stream[end] == tokenizer.eos_token_id for end in range(64, 384, 65))
    report = json.loads((run / "report.json").read_text())["sampled"]["self"]
    assert report["model"] == server.url and report["documents"] > 6


def test_a_run_outlives_an_overloaded_and_a_lost_server(tiny_model_dir, tmp_path, monkeypatch):
    model = tiny_model_dir("mixtral")
    monkeypatch.setattr(server_module.time, "sleep", lambda _: None)
    with serving(model, fails=(2, 7)) as server:
        whole = texts_of(model, tmp_path / "whole", f"self:60:{server.url}", window_length=16)
        expected = written(whole)
        assert len(server.requests) == 4 * 16 + 2  # 60 windows of 16 tokens are 57 texts of 17
    with serving(model, fails=tuple(range(20, 200))) as server:
        with pytest.raises(ValueError, match="503.*Finished answers are kept: the same command goes on"):
            written(texts_of(model, tmp_path / "lost", f"self:60:{server.url}", window_length=16))
        assert len(list((tmp_path / "lost").rglob("part_*"))) == 1
        server.fails, before = (), len(server.requests)
        again = written(texts_of(model, tmp_path / "lost", f"self:60:{server.url}", window_length=16))
        assert len(server.requests) - before == 3 * 16
    assert torch.equal(again, expected)


def test_answers_of_nothing_are_given_up():
    part = {"input_ids": torch.zeros(32), "chosen": torch.ones(32), "lengths": torch.full((16,), 2)}
    assert not enough([part] * 3, 10, 64, False)
    with pytest.raises(ServerError, match="64 answers have 128 tokens in all: pass another --data.sample_start"):
        enough([part] * 4, 10, 64, False)


def test_texts_are_joined_or_get_windows_of_their_own():
    part = {"input_ids": torch.tensor([5, 6, 0, 7, 0]), "chosen": torch.ones(5).bool(), "lengths": torch.tensor([3, 2])}
    assert pack([part], 2, 2, 9, False)["input_ids"].tolist() == [[5, 6], [0, 7]]
    assert pack([part], 2, 4, 9, True)["input_ids"].tolist() == [[5, 6, 0, 9], [7, 0, 9, 9]]
    assert pack([part], 2, 4, 9, True)["chosen"].tolist() == [[True, True, True, False], [True, True, False, False]]
    assert pack([part], 1, 2, 9, True)["input_ids"].tolist() == [[5, 6]]


def test_chats_of_a_server(tiny_model_dir, tmp_path):
    model = tiny_model_dir("mixtral")
    (tmp_path / "chat.jinja").write_text(TEMPLATE)
    options = {"sample_start": "chat", "answers_only": True, "chat_template": str(tmp_path / "chat.jinja")}
    with serving(model, stops_after=4) as server:
        texts = texts_of(model, tmp_path / "run", f"self:2:{server.url}", window_length=128, **options)
        ids = written(texts)
    turns = texts.data.tokens.decode(ids[0]).split("<|endoftext|>\n")
    assert len(turns) > 2 and all(re.match(r"\[user\].*\[assistant\]", turn, re.S) for turn in turns[:-1])
    assert turns[0].removeprefix("[user]").rpartition("[assistant]")[0] in PROMPTS
    counted = texts.data.calibration_weights[0, : len(texts.data.tokens(turns[0])["input_ids"]) + 1]
    assert counted.sum() == 5 and counted[-5:].all()  # four tokens and the end
