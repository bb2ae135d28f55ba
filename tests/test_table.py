"""`eacmoe table`: its rows are ordinary runs of `fit`, and the table repeats what their reports say."""

import json
import math
import re

import jobs
import pytest
import yaml

from eacmoe_lightning.cli import main
from eacmoe_lightning.commands.table_file import TABLES, read_table, refuse_overridden
from eacmoe_lightning.text.sources import BUNDLED_TEXT

WITHOUT_CHOICES = {"trainer.default_root_dir", "model.bits"}


def base(model) -> list[str]:
    """Options of a small `fit` as words."""
    words = jobs.options(model, "unused", model__joint_epochs=0, model__block_epochs=0)
    pairs = zip(words[::2], words[1::2], strict=True)
    return [word for pair in pairs if pair[0][2:] not in WITHOUT_CHOICES for word in pair]


@pytest.mark.parametrize("name", sorted(path.stem for path in TABLES.glob("*.yaml")))
def test_tables_of_the_package_have_their_published_rows(name):
    plan = read_table(name)
    for rows in plan.get("published", {}).values():
        assert rows.keys() <= plan["rows"].keys() | {"original"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"rows": {"a": {"model.bits": 2}}}, "needs a title"),
        ({"title": "t", "rows": {}}, "needs a title"),
        ({"title": "t", "rows": {"a": {}}, "colums": []}, "colums is not a key"),
        ({"title": "t", "rows": {"a": {}, "b": {"data.num_windows": 2}}}, "--data.num_windows would be overridden by"),
        ({"title": "t", "rows": {"a": {}}, "options": {"data.heldout": "bundled:prose"}}, "(options)"),
        ({"title": "t", "rows": {"a": {"model.bits": 2}, "b": {"model.bits": 11}}}, "--model.bits"),
        ({"title": "t", "rows": {"a": {"model.bits": 2}, "b": {"model.bitz": 2}}}, "model.bitz"),
        ({"title": "t", "rows": {"a": {}, "b": ["--model.bits", 2]}}, "row 'b' must be options of fit by name"),
        ({"title": "t", "rows": {"a": {}}, "options": 3}, "options must be options of fit by name"),
        ({"title": "t", "rows": {"a": {2: 3}}}, "row 'a' must be options of fit by name"),
        ("title: t\nrows: {a: [\n", "cannot be read as YAML"),
        ({"title": "t", "rows": {"+ a": {}, "- a": {"model.bits": 2}}}, "would share the directory a"),
        ({"title": "t", "rows": {"+": {}}}, "'+' needs a name with letters"),
        ({"title": "t", "rows": {"a": {}, "b": {"pruning.keep": 99}}}, "keep=99 (--pruning.keep)"),
        ({"title": "t", "rows": {"a": {}, "b": {"data.documents": "packed", "data.column": "x"}}}, "--data.column=x"),
        ({"title": "t", "rows": {"a": {}, "b": {"data.seed": "x"}}}, "data.seed"),
        ({"title": "t", "rows": {"a": {}, "b": {"trainer.default_root_dir": "x"}}}, "(row 'b') has no effect beside"),
    ],
)
def test_a_bad_table_is_refused_before_any_row_is_run(content, message, tiny_model_dir, tmp_path, capsys):
    file = tmp_path / "table.yaml"
    file.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    with pytest.raises(SystemExit):
        main(["table", str(file), "--output", str(tmp_path / "out"), *base(tiny_model_dir("mixtral"))])
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("rows", "words", "message"),
    [
        ({"a": {"data.seed": 1}}, ["--seeds", "0"], "--data.seed (row 'a') has no effect beside --seeds"),
        ({"a": {}}, ["--data.seed=1", "--seeds", "0"], "--data.seed (the command) has no effect beside --seeds"),
        ({"a": {}}, ["--seeds", "0", "0"], "--seeds 0 0 names a seed twice"),
        ({"a": {}}, ["--trainer.default_root_dir", "x"], "--trainer.default_root_dir (the command) has no effect"),
    ],
)
def test_what_the_command_sets_itself_is_not_given_too(rows, words, message, tiny_model_dir, tmp_path, capsys):
    file = tmp_path / "table.yaml"
    file.write_text(yaml.safe_dump({"title": "t", "rows": rows}))
    with pytest.raises(SystemExit):
        main(["table", str(file), "--output", str(tmp_path / "out"), *base(tiny_model_dir("mixtral")), *words])
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ("[]", "--data.heldout is empty"),
        ("{KL: 'bundled:prose[:10%]'}", "a text cannot be called 'KL'"),
        ("['./no_such.txt']", "no_such.txt"),
    ],
)
def test_texts_are_checked_before_any_row_is_run(texts, message, tiny_model_dir, tmp_path, capsys):
    file = tmp_path / "table.yaml"
    file.write_text(f"title: t\noptions:\nrows:\n  2: {{model.bits: 2}}\n  base:\n  other: {{data.heldout: {texts}}}\n")
    assert list(read_table(str(file))["rows"].items())[:2] == [("2", {"model.bits": 2}), ("base", {})]
    words = base(tiny_model_dir("mixtral"))
    at = words.index("--data.heldout")
    words = words[:at] + words[at + 2 :]
    with pytest.raises(SystemExit):
        main(["table", str(file), "--output", str(tmp_path / "out"), *words])
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.filterwarnings("ignore:LightningCLI's args", "ignore:.*deprecated")
def test_rows_have_their_own_seeds_and_are_of_the_text_as_it_is_now(tiny_model_dir, tmp_path, capsys):
    file, text, out = tmp_path / "table.yaml", tmp_path / "text.txt", tmp_path / "out"
    written = (BUNDLED_TEXT / "calibration.txt").read_text()
    text.write_text(written[:40_000])
    plain = {"model.bits": 2, "model.router_method": "none", "data.calibration": str(text)}
    (heldout := tmp_path / "held.txt").write_text(written[40_000:50_000])
    rows = {"first": plain | {"data.seed": 1}, "second": plain | {"data.seed": 2}}
    file.write_text(yaml.safe_dump({"title": "t", "rows": rows}))
    more = iter(base(tiny_model_dir("mixtral")))
    pairs = [pair for pair in zip(more, more, strict=True) if pair[0] not in ("--data.calibration", "--data.heldout")]
    words = [word for pair in [*pairs, ("--data.heldout", str(heldout))] for word in pair]
    main(["table", str(file), "--output", str(out), *words])
    for seed, row in ((1, "first"), (2, "second")):
        report = json.loads((out / f"seed_{seed}" / row / "report.json").read_text())
        assert report["config"]["data.seed"] == seed
    table = json.loads((out / "table.json").read_text())
    assert table["rows"]["first"]["KL"] != table["rows"]["second"]["KL"] and table["seeds"] == [1, 2]
    assert "standard deviation" not in capsys.readouterr().out
    for changed, message in ((heldout, "the held-out text held .*"), (text, "the text of .*")):
        changed.write_text(written[-40_000:])
        with pytest.raises(SystemExit):
            main(["table", str(file), "--output", str(out), *words])
        assert re.search(rf"first.json holds a row, but {message}have changed since", capsys.readouterr().err)


def test_finished_rows_notice_that_a_config_has_changed(tiny_model_dir, tmp_path, capsys):
    file, config, out = tmp_path / "table.yaml", tmp_path / "own.yaml", tmp_path / "out"
    overrides = {0: {"experts": 3, "experts.1": 4}}
    file.write_text(yaml.safe_dump({"title": "t", "rows": {"first": {"model.bits": 2, "model.overrides": overrides}}}))
    config.write_text("model: {router_method: none, attention_bits: 4}\npruning: {keep: 3}")
    words = ["table", str(file), "--output", str(out), "--config", str(config), *base(tiny_model_dir("mixtral"))]
    main(words)
    main(words)  # nothing is made again
    made = (out / "seed_0" / "first.json").stat().st_mtime_ns
    for content, message in (
        (
            "model: {router_method: none, attention_bits: 3}\npruning: {keep: 3}",
            "model.attention_bits was 4 and is now 3",
        ),
        ("model: {router_method: none, attention_bits: 4}", "pruning."),
    ):
        config.write_text(content)
        with pytest.raises(SystemExit):
            main(words)
        assert f"first.json holds a row with other settings: {message}" in capsys.readouterr().err
    assert (out / "seed_0" / "first.json").stat().st_mtime_ns == made


@pytest.mark.parametrize(
    ("word", "key"),
    [
        ("--model.bits", "model.bits"),
        ("--model.bits=4", "model.bits"),
        ("--data.heldout+=bundled:code", "data.heldout"),
        ("--data.heldout.code=bundled:code", "data.heldout"),
        ("--model.router_loss=TopKMSE", "model.router_loss.init_args.k"),
        ("--model.router_loss.k=2", "model.router_loss.init_args.k"),
        ("--model.router_loss.init_args.width=2", None),
        ("--model.bits_more=2", None),
        ("--config=tiny", None),
        ("model.bits", None),  # a value
    ],
)
def test_an_option_that_the_table_sets_is_not_given_too(word, key):
    rows = {"a": {"model.router_loss.init_args.k": "K"}, "b": {"data.heldout": {"prose": "bundled:prose"}}}
    plan = {"options": {"model.bits": 2}, "rows": rows}
    if key is None:
        return refuse_overridden([word], plan, "mine.yaml")
    with pytest.raises(ValueError, match=f"would be overridden by {re.escape(key)} of the table mine.yaml"):
        refuse_overridden([word], plan, "mine.yaml")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:LightningCLI's args", "ignore:.*deprecated")
def test_a_table_repeats_the_reports_of_its_runs(tiny_model_dir, tmp_path, capsys):
    model, out = tiny_model_dir("mixtral"), tmp_path / "out"
    loss = {"model.router_loss.class_path": "eacmoe_lightning.routers.losses.TopKMSE", "model.router_method": "sgd"}
    rows = {
        "GPTQ": {"model.router_method": "none"},
        "K": loss | {"model.router_loss.init_args.k": "K"},
        "2 K": loss | {"model.router_loss.init_args.k": "2 K"},
        "9 K": loss | {"model.router_loss.init_args.k": "9 K"},  # 8 experts: E
        "E": loss | {"model.router_loss.init_args.k": "E"},  # so this is the row above again
    }
    published = {str(model): {"K": {"prose": 4.25}}}
    plan = {"title": "k", "split": True, "options": {"model.bits": 2}, "rows": rows, "published": published}
    file = tmp_path / "table.yaml"
    file.write_text(yaml.safe_dump(plan))
    words = ["table", str(file), "--output", str(out), "--seeds", "0", "1", *base(model)]
    main(words)
    table = json.loads((out / "table.json").read_text())
    assert table["rows"].keys() == {"original", "GPTQ", "K", "2 K", "9 K"}
    reports = [json.loads((out / f"seed_{seed}" / "2-K" / "report.json").read_text()) for seed in (0, 1)]
    assert [report["config"]["model.router_loss"]["init_args"]["k"] for report in reports] == [4, 4]
    row = table["rows"]["2 K"]
    for text in ("prose", "code"):
        values = [report["perplexity"][text] for report in reports]
        assert row[text]["values"] == [value["compressed"] for value in values]
        assert row[text]["mean"] == pytest.approx(sum(row[text]["values"]) / 2)
        assert row[text]["spread"] == pytest.approx(abs(row[text]["values"][0] - row[text]["values"][1]) / math.sqrt(2))
        assert table["rows"]["original"][text]["mean"] == values[0]["original"]
        assert row[f"{text}, weights"]["mean"] > 0
    assert row["KL"]["values"] == [report["divergence"]["mean"]["compressed"]["kl"] for report in reports]
    printed = capsys.readouterr().out
    assert "prose (paper)" in printed and "| 4.25 |" in printed and "±" in printed
    main(words)  # nothing is run again
    assert json.loads((out / "table.json").read_text()) == table
    assert ": runs" not in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main([*words, "--data.num_windows", "6"])
    assert "other settings" in capsys.readouterr().err
