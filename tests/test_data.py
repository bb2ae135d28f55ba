"""The data module: the windows of each rank, the batches of a resumed run, and errors for bad options."""

import json
import re
from pathlib import Path

import jobs
import lightning as L
import pytest
import tiny_models
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch.callbacks import ModelCheckpoint
from transformers import AutoTokenizer

from eacmoe_lightning.job.data import TextWindows
from eacmoe_lightning.models.moe import MoEModel
from eacmoe_lightning.text.batches import WindowLoader, calibration_batches, heldout_batches, shard
from eacmoe_lightning.text.checks import shared_runs
from eacmoe_lightning.text.documents import read_documents
from eacmoe_lightning.text.sources import heldout_names, name_sources

sizes = st.integers(1, 40)
worlds = st.integers(1, 6)


# --- the windows of each rank


@given(sizes, worlds)
def test_shards_are_contiguous_disjoint_and_complete(num, world_size):
    shards = [shard(num, rank, world_size) for rank in range(world_size)]
    assert [index for owned in shards for index in owned] == list(range(num))
    assert max(map(len, shards)) - min(map(len, shards)) <= 1


@given(sizes, st.integers(1, 9), st.integers(0, 1000), worlds)
def test_ranks_together_get_the_global_batches_of_one_process(num, batch_size, seed, world_size):
    alone = calibration_batches(num, batch_size, seed, 0, 1)
    assert sorted(torch.cat([index for index, _ in alone]).tolist()) == list(range(num))
    ranks = [calibration_batches(num, batch_size, seed, r, world_size) for r in range(world_size)]
    for (expected, size), *parts in zip(alone, *ranks, strict=True):
        assert size == len(expected) and {part_size for _, part_size in parts} == {size}
        together = [index for part, _ in parts for index in part.tolist()]
        assert sorted(together) == sorted(expected.tolist())
        for rank, (part, _) in enumerate(parts):
            assert all(index in shard(num, rank, world_size) for index in part.tolist())


def test_the_mean_over_a_global_batch_does_not_depend_on_the_number_of_ranks():
    losses = torch.rand(10, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = [losses[index].mean() for index, _ in calibration_batches(10, 4, 7, 0, 1)]
    ranks = [calibration_batches(10, 4, 7, rank, 3) for rank in range(3)]
    for step, mean in enumerate(expected):
        parts = [losses[batches[step][0]].sum() / batches[step][1] for batches in ranks]
        torch.testing.assert_close(sum(parts), mean)


@given(sizes, st.integers(1, 9), worlds)
def test_heldout_windows_are_dealt_once_in_equally_many_batches(num, batch_size, world_size):
    ranks = [heldout_batches(num, batch_size, rank, world_size) for rank in range(world_size)]
    seen = [index for batches in ranks for part, _ in batches for index in part.tolist()]
    assert seen == list(range(num))
    for step in zip(*ranks, strict=True):  # strict: all ranks have the same number of batches
        assert {size for _, size in step} == {sum(len(part) for part, _ in step)}
        assert all(len(part) <= batch_size for part, _ in step)


def test_loader_yields_the_windows_it_names():
    windows = torch.arange(30).view(10, 3)
    loader = WindowLoader(windows, 4, shuffle=True, seed=1, rank=1, world_size=2)
    batches = list(loader)
    assert len(batches) == len(loader) == 3
    assert [batch["global_size"] for batch in batches] == [4, 4, 2]
    for batch in batches:
        assert torch.equal(batch["input_ids"], windows[batch["index"]])
    assert sorted(torch.cat([batch["index"] for batch in batches]).tolist()) == [5, 6, 7, 8, 9]


def test_epochs_are_shuffled_differently_without_the_global_generator():
    windows, epoch = torch.arange(20).view(20, 1), [0]
    loader = WindowLoader(windows, 4, shuffle=True, seed=3, epoch=lambda: epoch[0])

    def order() -> list[int]:
        return torch.cat([batch["index"] for batch in loader]).tolist()

    state = torch.get_rng_state()
    first, again = order(), order()
    epoch[0] = 1
    second = order()
    assert first == again != second
    assert torch.equal(state, torch.get_rng_state())


# --- the batches of a resumed run


class Killed(Exception):
    pass


class Recorder(L.LightningModule):
    """Records every training batch; raises `Killed` before the batch of step `dies_at`."""

    def __init__(self, dies_at: int | None = None):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))
        self.dies_at = dies_at
        self.seen: list[tuple] = []
        self.validated: list[tuple] = []

    def training_step(self, batch, batch_idx):
        if self.global_step == self.dies_at:
            raise Killed
        self.seen.append((self.current_epoch, batch_idx, *batch["index"].tolist()))
        return self.weight * batch["input_ids"].float().mean()

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        self.validated.append((dataloader_idx, *batch["index"].tolist()))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


@pytest.fixture
def text_data(tiny_model_dir):
    def make(**options) -> TextWindows:
        defaults = {
            "heldout": ["bundled:prose", "bundled:code"],
            "num_windows": 10,
            "window_length": 16,
            "batch_size": 3,
            "num_heldout_windows": 5,
            "heldout_batch_size": 2,
            "tokenizer": str(tiny_model_dir("mixtral")),
        }
        return TextWindows(**{**defaults, **options})

    return make


def fit(folder, data, dies_at=None, every=None, resume=False, **options) -> Recorder:
    """Three epochs of four batches, with a checkpoint per step or (every=None) per epoch."""
    checkpoint = ModelCheckpoint(
        folder, every_n_train_steps=every, save_on_train_epoch_end=every is None, save_last=True
    )
    trainer = L.Trainer(
        max_epochs=3,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        callbacks=[checkpoint],
        **options,
    )
    module = Recorder(dies_at)
    try:
        trainer.fit(module, data, ckpt_path=f"{folder}/last.ckpt" if resume else None)
    except Killed:
        return module
    assert type(trainer.train_dataloader) is WindowLoader  # not replaced, not wrapped
    assert [type(loader) for loader in trainer.val_dataloaders] == [WindowLoader] * 2
    return module


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "dies_at, every, options, saved",
    [
        (1, 1, {}, 1),  # after the first batch
        (6, 1, {}, 6),  # in the middle of the second epoch
        (8, 1, {}, 8),  # between two epochs
        (6, 1, {"val_check_interval": 2}, 6),  # right after a validation
        (7, 2, {}, 6),  # the last checkpoint is older than the last batch
        (6, None, {}, 4),  # checkpoints at the end of epochs only
        (5, None, {"limit_train_batches": 3}, 3),  # at the end of shortened epochs
        (5, 1, {"limit_train_batches": 3}, 5),
        (6, 1, {"max_steps": 11}, 6),
    ],
)
def test_resumed_run_sees_exactly_the_remaining_batches(tmp_path, text_data, dies_at, every, options, saved):
    data = text_data()  # read once; every trainer requests new loaders
    whole = fit(tmp_path / "whole", data, **options).seen
    killed = fit(tmp_path / "killed", data, dies_at=dies_at, every=every, **options).seen
    resumed = fit(tmp_path / "killed", data, every=every, resume=True, **options).seen
    assert killed == whole[:dies_at]
    assert resumed == whole[saved:]


@pytest.mark.filterwarnings("ignore")
def test_validation_visits_every_held_out_text_in_order(tmp_path, text_data):
    validated = fit(tmp_path, text_data(), every=1, limit_train_batches=1).validated
    one_epoch = [(text, *batch) for text in (0, 1) for batch in ((0, 1), (2, 3), (4,))]
    assert validated == one_epoch * 3


# --- the data module


def test_windows_come_from_the_texts(text_data, tokenizer):
    data = text_data()
    data.setup("fit")
    assert data.calibration_windows.shape == (10, 16)
    assert data.heldout_names == ["prose", "code"]
    for name, windows in data.heldout_windows.items():
        ids = tokenizer(read_documents(f"bundled:{name}")[0], add_special_tokens=False)["input_ids"]
        assert windows.flatten().tolist() == ids[: 5 * 16]
    assert len(data.train_dataloader()) == 4 and len(data.val_dataloader()) == 2


def test_the_seed_determines_the_windows(text_data):
    first, again, other = (text_data(seed=seed).calibration_windows for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_the_digest_follows_the_content_of_the_text_not_its_path(text_data, tmp_path):
    text = "".join(f"Sentence {i} of a text of my own.\n" for i in range(100))

    def digest(name: str, content: str, **options) -> str:
        (tmp_path / name).write_text(content)
        return text_data(calibration=str(tmp_path / name), **options).calibration_digest

    first = digest("a.txt", text)
    assert len(first) == 64 and digest("b.txt", text) == first
    assert digest("a.txt", text.replace("own", "new")) != first
    assert digest("a.txt", text, seed=1) != first
    assert digest("a.txt", text, num_windows=5, window_length=32) != digest("a.txt", text, num_windows=10)


def test_predict_reads_the_whole_of_its_source(text_data, tmp_path):
    (tmp_path / "mine.txt").write_text("One line of text that is my own, and no one else's. " * 50)
    data = text_data(predict=str(tmp_path / "mine.txt"))
    data.setup("predict")
    (loader,) = data.predict_dataloader()
    assert len(loader.windows) == len(data.predict_windows) > 5
    assert len(text_data().predict_dataloader()) == 2  # by default the held-out texts


def test_held_out_sources_get_names(tmp_path):
    assert list(name_sources(None)) == heldout_names()
    assert name_sources([]) == {}
    assert name_sources("bundled:prose") == {"prose": "bundled:prose"}
    assert name_sources(["/a/b/wiki.txt"]) == {"wiki": "/a/b/wiki.txt"}
    assert name_sources({"x": "bundled:code"}) == {"x": "bundled:code"}
    assert name_sources(["."]) == {Path.cwd().name: "."}
    for name in ("a/b", "../x", "..", "", " ", "a\\b"):
        for option in ("calibration", "heldout"):
            with pytest.raises(ValueError, match=re.escape(f"--data.{option}: a text cannot be called {name!r}")):
                TextWindows(**{option: {"prose": "bundled:prose", name: "bundled:code"}})
    with pytest.raises(ValueError, match="/a/wiki.txt and /b/wiki.md would both be called 'wiki'"):
        name_sources(["/a/wiki.txt", "/b/wiki.md"])


@pytest.mark.parametrize(
    "options, kind, message",
    [
        ({"calibration": "bundled:x"}, FileNotFoundError, "--data.calibration: there is no bundl"),
        ({"heldout": ["/no/x.txt"]}, FileNotFoundError, "--data.heldout: /no/x.txt does not exist"),
        ({"num_windows": 10**6}, ValueError, "not 1000000 (--data.num_windows)"),
        ({"num_heldout_windows": 10**6}, ValueError, "not 1000000 (--data.num_heldout_windows)"),
        ({"window_length": 10**6}, ValueError, "one window needs 1000000 (--data.window_length)"),
        ({"tokenizer": "/no/model"}, FileNotFoundError, "no causal language model can be loaded from '/no/mod"),
    ],
)
def test_bad_options_are_reported_on_setup_by_name(text_data, options, kind, message):
    with pytest.raises(kind) as error:
        text_data(**options).setup("fit")
    assert message in str(error.value)


# --- the texts and the model


@pytest.fixture
def moe() -> MoEModel:
    """A model with 4096 rows in its embedding, made for 4096 positions."""
    return MoEModel(tiny_models.build("mixtral"))


def test_a_token_beyond_the_embedding_is_named_before_the_start(text_data, moe, tiny_model_dir, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir("mixtral"))
    tokenizer.add_tokens(["<|tool|>"])
    tokenizer.save_pretrained(tmp_path)
    for name, content in (("tool", "call <|tool|> now. " * 40), ("plain", "call it now. " * 80)):
        (tmp_path / f"{name}.txt").write_text(content)
    tool, plain = (str(tmp_path / f"{name}.txt") for name in ("tool", "plain"))
    options = {"tokenizer": str(tmp_path), "num_windows": 2, "num_heldout_windows": 2}
    text_data(calibration=plain, heldout=[plain], **options).check_model(moe, "fit")
    message = f"{tool} holds the token '<|tool|>' with id 4096, but the model's embedding has only 4096 rows"
    for option, texts, stage in (
        ("calibration", {"calibration": tool, "heldout": [plain]}, "fit"),
        ("heldout", {"calibration": plain, "heldout": [tool]}, "fit"),
        ("heldout", {"heldout": [plain, tool]}, "validate"),
        ("predict", {"heldout": [plain], "predict": tool}, "predict"),
    ):
        with pytest.raises(ValueError, match=re.escape(f"--data.{option}: {message}")):
            text_data(**texts, **options).check_model(moe, stage)


def test_windows_longer_than_the_model_was_made_for(text_data, moe, caplog):
    text_data().check_model(moe, "fit")
    assert not caplog.text
    moe.config.max_position_embeddings = 12
    text_data().check_model(moe, "fit")
    assert "windows of 16 tokens (--data.window_length) are longer than the 12 positions" in caplog.text


@pytest.mark.filterwarnings("ignore")
def test_a_run_without_held_out_text_has_a_report_without_evaluation(tiny_model_dir, tmp_path, capsys):
    few = {"data__num_windows": 2, "data__heldout": "[]", "model__router_method": "none"}
    run = jobs.fit(tiny_model_dir("mixtral"), tmp_path / "run", **few)
    report = json.loads((run / "report.json").read_text())
    assert report["perplexity"] == {} and report["expert_shift"]["calibration"]["after"]["any"] > 0
    text = (run / "report.md").read_text()
    assert "## Perplexity on held-out text\n\nNone: no held-out text was evaluated.\n\n## " in text
    assert "| text | original |" not in text and "| heldout |" not in text and "| calibration |" in text
    assert "no held-out text was evaluated; changed selections are those on the calibration" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore")
def test_the_report_says_what_each_calibration_text_reaches(tiny_model_dir, tmp_path, capsys, caplog):
    texts = {
        "data__calibration": "{code: 'bundled:code', words: 'bundled:french'}",
        "data__shares": "{code: 3, words: 1}",
    }
    few = {
        "data__num_windows": 8,
        "data__heldout": "[]",
        "model__router_method": "none",
        "model__min_expert_tokens": 130,
    }
    run = jobs.fit(tiny_model_dir("mixtral"), tmp_path / "run", **texts, **few)
    report = json.loads((run / "report.json").read_text())
    code, words = report["coverage"]["code"], report["coverage"]["words"]
    assert (code["windows"], words["windows"]) == (6, 2)
    assert (code["selections"], words["selections"]) == (3 * 6 * 64 * 2, 3 * 2 * 64 * 2)
    loads = json.loads((run / "expert_frequency.json").read_text())
    for block, load in loads.items():
        together = [a + b for a, b in zip(code["blocks"][block], words["blocks"][block], strict=True)]
        assert together == load["original"]
    assert words["experts"] == 24 and words["reached"] == sum(n > 0 for row in words["blocks"].values() for n in row)
    assert f"calibrated on words: 2 windows, which reach {words['reached']} of 24 experts" in capsys.readouterr().out
    starved = [str(e) for e, n in enumerate(loads["0"]["original"]) if n < 130]
    assert f"select each of {len(starved)} of the 8 experts: {', '.join(starved)}" in caplog.text


def test_several_texts_share_the_windows(text_data):
    alone = {name: text_data(calibration=f"bundled:{name}", num_windows=n) for name, n in (("prose", 7), ("code", 3))}
    windows = torch.cat([data.calibration_windows for data in alone.values()])
    both = text_data(calibration=["bundled:prose", "bundled:code"], shares={"prose": 2, "code": 1})
    assert torch.equal(both.calibration_windows, windows) and both.windows_by_text == {"prose": 7, "code": 3}
    assert both.calibration_sources.tolist() == [[True] * 7 + [False] * 3, [False] * 7 + [True] * 3]
    assert text_data(calibration={"a": "bundled:prose", "b": "bundled:code"}).windows_by_text == {"a": 5, "b": 5}
    one = text_data(calibration=["bundled:prose"], num_windows=7)
    assert torch.equal(one.calibration_windows, alone["prose"].calibration_windows)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"calibration": []}, "--data.calibration is empty"),
        (
            {"calibration": ["bundled:prose", "bundled:prose"]},
            "--data.calibration: bundled:prose and bundled:prose would",
        ),
        ({"calibration": ["bundled:prose", "bundled:code"], "num_windows": 1}, "leaves no window for code"),
        (
            {"calibration": ["bundled:prose"], "shares": {"code": 1}},
            "--data.shares={'code': 1} must give each of prose",
        ),
        ({"calibration": ["bundled:prose"], "shares": {"prose": 0}}, "a finite share above 0"),
        ({"calibration": ["bundled:prose"], "shares": {"prose": float("nan")}}, "--data.shares={'prose': nan} must"),
        ({"calibration": ["bundled:prose"], "shares": {"prose": float("inf")}}, "--data.shares={'prose': inf} must"),
    ],
)
def test_bad_shares(text_data, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        text_data(**options)


@pytest.mark.parametrize("shares", [None, {"big": 3, "small": 1}, {"big": 1, "small": 1.7}])
def test_what_a_mixture_needs_less_of_is_its_total_or_a_share(text_data, tmp_path, shares):
    (tmp_path / "small.txt").write_text("one two three four five six seven eight nine ten. " * 8)
    options = {"calibration": {"big": "bundled:prose", "small": str(tmp_path / "small.txt")}, "shares": shares}
    with pytest.raises(
        ValueError, match=r"its share of --data.num_windows.*a smaller share \(--data.shares\)"
    ) as error:
        text_data(num_windows=100, **options).setup("fit")
    available, total = map(
        int, re.search(r"make (\d+) windows .* --data.num_windows=(\d+),", str(error.value)).groups()
    )
    data = text_data(num_windows=total, **options)
    data.setup("fit")
    assert available - 1 <= data.windows_by_text["small"] <= available


def test_no_calibration_text_is_not_the_held_out_ones():
    with pytest.raises(ValueError, match="--data.calibration is null: pass one or more sources"):
        TextWindows(calibration=None)


@pytest.mark.parametrize("sources", [{"a": 3}, [3], 3, {"a": None}, ["bundled:prose", ["bundled:code"]]])
def test_sources_that_are_no_strings_are_refused(sources):
    for option in ("calibration", "heldout"):
        with pytest.raises(ValueError, match=f"--data.{option}: a source is a string, but .* is (int|NoneType|list)"):
            TextWindows(**{option: sources})


def test_windows_that_repeat_are_counted(text_data, moe, tmp_path, caplog):
    (tmp_path / "again.txt").write_text("All work and no play makes Jack a dull boy. " * 200)
    text_data(calibration=str(tmp_path / "again.txt"), num_windows=100).check_model(moe, "fit")
    assert re.search(r"\d+ of the 100 calibration windows repeat others", caplog.text)


@pytest.mark.parametrize("layout", ["joined", "separate", "packed"])
@pytest.mark.parametrize("part", ["", "[:100%]"])
def test_rows_beside_many_blank_ones_are_joined_where_documents_are(text_data, tmp_path, caplog, layout, part):
    rows = [{"text": f"document number {i}" if i % 6 else ""} for i in range(60)]
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = f"{tmp_path}/x.jsonl{part}"
    data = text_data(calibration=source, num_windows=2, window_length=32, documents=layout, heldout=[])
    text = data.tokens.decode(data.calibration_windows[0])
    assert ("\n\n" in text) == (layout == "joined")
    warning = f"{tmp_path}/x.jsonl: 10 of the first 60 rows are blank, so all rows are joined into one"
    assert (warning in caplog.text) == (layout == "joined")


@pytest.mark.parametrize("option", ["calibration", "heldout", "predict"])
@pytest.mark.parametrize("source, message", [("", "names no source, but ''"), ("bundled:prose[60%:50%]", "60% to 50%")])
def test_what_names_no_text_is_named_with_its_option(option, source, message):
    with pytest.raises(ValueError, match=f"--data.{option}.*{message}"):
        TextWindows(**{option: source})


@pytest.mark.parametrize("source", ["[bundled:prose[:5%], bundled:code[:5%]]", "{prose: bundled:prose[:5%]}"])
def test_lists_that_are_taken_for_one_source_are_refused(source, tiny_model_dir, tmp_path, capsys):
    """YAML takes a bracket inside of a list for another list."""
    for option, message in (
        ("calibration", "is one text and no list: put quotes around each source that has brackets"),
        ("heldout", "is one text and no list: put quotes around each source that has brackets"),
        ("predict", "must be one source, not several and not {name: source}"),
    ):
        with pytest.raises(SystemExit):
            jobs.fit(tiny_model_dir("mixtral"), tmp_path / "run", **{f"data__{option}": source})
        error = capsys.readouterr().err
        assert f"--data.{option}" in error and source in error and message in error
    with pytest.raises(ValueError, match="--data.predict={'a': 'bundled:prose'} must be one source"):
        TextWindows(predict={"a": "bundled:prose"})


def test_a_pattern_of_brackets_alone_is_a_pattern(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("text")
    monkeypatch.chdir(tmp_path)
    assert name_sources("[ab].tx[t]") and read_documents("[ab].tx[t]") == ["text"]
    (tmp_path / ":").write_text("colon")
    assert name_sources("[,:]") and read_documents("[,:]") == ["colon"]


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_an_evaluation_without_text_is_refused(text_data, stage):
    with pytest.raises(ValueError, match=f"--data.heldout is empty, so {stage} has no text"):
        text_data(heldout=[]).setup(stage)
    text_data(heldout=[]).setup("fit")


@pytest.mark.parametrize("option", ["batch_size", "heldout_batch_size", "num_windows", "num_heldout_windows"])
def test_numbers_of_windows_must_be_positive(option):
    with pytest.raises(ValueError, match=f"--data.{option}=0 must be at least 1"):
        TextWindows(**{option: 0})


def test_heldout_text_that_is_calibrated_on_is_counted(tiny_model_dir, tmp_path, caplog):
    """However its windows lie beside those of the calibration; parts that share nothing, and the defaults, do not."""
    text = read_documents("bundled:code[:6%]")[0]
    (tmp_path / "end.txt").write_text(text[len(text) // 2 + 7 :])
    (tmp_path / "all.txt").write_text(text)
    model, moe = tiny_model_dir("mixtral"), MoEModel(tiny_models.build("mixtral"))
    num_tokens = len(AutoTokenizer.from_pretrained(model)(text)["input_ids"])
    for calibration, heldout, least in (
        (tmp_path / "all.txt", {"code": tmp_path / "all.txt"}, 95),
        (tmp_path / "all.txt", {"code": tmp_path / "end.txt"}, 40),
        ("bundled:code[:50%]", {"code": "bundled:code[50%:]"}, None),
        ("bundled:calibration", None, None),
    ):
        for length in (32, 64, 200):
            data = TextWindows(
                str(calibration),
                heldout and {name: str(source) for name, source in heldout.items()},
                tokenizer=str(model),
                window_length=length,
                num_windows=num_tokens // length,
            )
            caplog.clear()
            data.setup("fit")
            data.check_model(moe, "fit")
            found = re.search(r"(\d+)% of the held-out text code \(--data.heldout\) is in the calibration", caplog.text)
            assert (found is None) == (least is None) and (found is None or int(found[1]) >= least)


@pytest.mark.parametrize("length", [1, 5, 32])
def test_shared_runs_are_those_that_a_search_finds(length):
    """Runs of few different tokens, some of them copied, in windows of which some are shorter than a run."""
    draw = torch.Generator().manual_seed(length)
    runs = torch.randint(3, (150, length), generator=draw)
    texts = [torch.randint(3, (shape), generator=draw) for shape in ((90, 40), (1, 33), (70, length), (4, 1))]
    texts[0][70:, 3 : 3 + length] = runs[:20]
    texts[2][:10] = runs[30:40]
    there = {tuple(row[start : start + length]) for text in texts for row in text.tolist() for start in range(len(row))}
    expected = sum(tuple(run) in there for run in runs.tolist()) / len(runs)
    assert shared_runs(runs.numpy(), [text.numpy() for text in texts]) == expected >= 0.2
