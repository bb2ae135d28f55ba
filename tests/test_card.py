"""The cards of compressed directories and exports: front matter for the hub, bits, quality, commands, and edits."""

import json
import shutil
import sys
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from eacmoe_lightning.compressed.card import NAME, QUALITY, bits_by_part, command_of, is_edited, section, write_card
from eacmoe_lightning.compressed.directory import CompressedWeights, save_compressed
from eacmoe_lightning.compressed.loading import load
from eacmoe_lightning.exports.export import export
from eacmoe_lightning.models.moe import MoEModel
from eacmoe_lightning.run.files import read_tensors
from eacmoe_lightning.run.provenance import origin, remember_command


@pytest.fixture
def run(fitted, tmp_path) -> Path:
    """A copy of a finished run."""
    return shutil.copytree(fitted("qwen3_moe"), tmp_path / "run")


def opened(directory: Path) -> MoEModel:
    return MoEModel(CompressedWeights(directory).skeleton())


def as_original(directory: Path, name: str) -> None:
    """Puts another name of the original into a compressed directory."""
    config = json.loads((directory / "config.json").read_text())
    config["original"]["name_or_path"] = name
    (directory / "config.json").write_text(json.dumps(config))


def test_a_run_leaves_a_card_with_its_figures(run):
    directory = run / "compressed"
    text, report = (directory / NAME).read_text(), json.loads((run / "report.json").read_text())
    assert not is_edited(directory / NAME)
    rows = [line.strip("| ").split(" | ") for line in section(directory / NAME, QUALITY).splitlines()[2:4]]
    for name, original, compressed, kl, same_top in rows:
        values, measured = report["perplexity"][name], report["divergence"]["texts"][name]["compressed"]
        assert (float(original), float(compressed)) == pytest.approx(
            (values["original"], values["compressed"]), abs=5e-4
        )
        assert float(kl) == pytest.approx(measured["kl"]["mean"], abs=5e-5)
        assert float(same_top.rstrip("%")) == pytest.approx(100 * measured["same_top"], abs=0.05)
    assert [row[0] for row in rows] == ["code", "prose"]
    data = ModelCard(text).data
    assert data.library_name == "transformers" and {"qwen3_moe", "quantized", "custom_code"} <= {*data.tags}
    assert data.base_model is None  # a directory is no name on the hub
    assert f"\n```bash\n{Path(report['command'].split()[0]).name}" in text


def test_the_command_of_a_card_says_nothing_of_where_and_that_it_went_on(monkeypatch):
    """So that the card of a resumed job has the bytes of an undisturbed one's; words of a shell stay whole."""
    remember_command(None)  # of an earlier test that ended with an error
    words = ["fit", "--trainer.precision", "32", "--model.bits", "3", "--data.heldout", "[bundled:prose, bundled:code]"]
    command = "eacmoe fit --trainer.precision 32 --model.bits 3 --data.heldout '[bundled:prose, bundled:code]'"
    places = (
        [],
        ["--ckpt_path", "auto", "--trainer.default_root_dir", "/runs/a b"],
        ["--trainer.default_root_dir=b", "--ckpt_path=runs/b/last.ckpt"],
        ["--checkpoint.every_n_train_steps", "1", "--trainer.callbacks", '[{"class_path": "a.B"}]'],
    )
    for place in places:
        monkeypatch.setattr(sys, "argv", ["/somewhere/train.py", *words, *place])
        assert command_of(origin({}, 0)) == command_of(None) == command
        monkeypatch.setattr(sys, "argv", ["/somewhere/train.py", words[0], *place, *words[1:]])
        assert command_of(None) == command
    remember_command([*words, "--ckpt_path", "last"])  # as `main([...])` from Python does
    monkeypatch.setattr(sys, "argv", ["notebook"])
    try:
        assert command_of(None) == command
    finally:
        remember_command(None)


def test_bits_are_those_of_the_files(run):
    directory = run / "compressed"
    moe = opened(directory)
    table = _table(directory, moe, directory)
    stored = [
        (name, tensor.nbytes)
        for file in directory.glob("*.safetensors")
        for name, tensor in read_tensors(file)[0].items()
    ]
    weights = {name: w for block in moe.blocks for name, (part, w) in block.weights().items() if part == "experts"}
    size = sum(nbytes for name, nbytes in stored if name.rpartition(".")[0] in weights)
    number = sum(weight.numel() for weight in weights.values())
    assert table["routed experts"] == [f"{number / 1e6:,.2f} million", "3", f"{8 * size / number:.2f}"]
    whole = sum(file.stat().st_size for file in directory.glob("*.safetensors"))
    assert table["all"][-1] == f"{8 * whole / sum(p.numel() for p in moe.model.parameters()):.2f}"
    assert _table(directory, moe, run)["routed experts"][-1] == ""  # an export stores its parts in its own way


def _table(source: Path, moe: MoEModel, directory: Path) -> dict[str, list[str]]:
    lines = [line for line in bits_by_part(source, moe, directory).splitlines()[2:] if line.startswith("|")]
    rows = [[cell.strip() for cell in line[1:-1].split("|")] for line in lines]
    return {row[0]: row[1:] for row in rows}


def test_what_the_base_models_card_says_is_passed_on(run, tmp_path):
    base, directory = tmp_path / "base", run / "compressed"
    base.mkdir()
    as_original(directory, str(base))
    write_card(directory, opened(directory))
    assert (
        ModelCard.load(directory / NAME).data.license is None and "no card was found" in (directory / NAME).read_text()
    )
    (base / NAME).write_text(
        "---\nlicense: other\nlicense_name: a-license\nlanguage: [en, de]\nmetrics: x\n---\n# Base\n"
    )
    write_card(directory, opened(directory))
    data = ModelCard.load(directory / NAME).data
    assert (data.license, data.license_name, data.language, data.metrics) == ("other", "a-license", ["en", "de"], None)
    as_original(directory, "somebody/base-7b")  # a hub that cannot be reached
    write_card(directory, opened(directory))
    data = ModelCard.load(directory / NAME).data.to_dict()
    assert (data["base_model"], data["base_model_relation"]) == ("somebody/base-7b", "quantized")


def test_how_it_loads_depends_on_its_weights(run):
    directory = run / "compressed"
    heading = "## How to load it"
    assert "packed in memory" in section(directory / NAME, heading)
    config = json.loads((directory / "config.json").read_text())
    config["quantization"]["lattice"] = []  # as if some were on one
    (directory / "config.json").write_text(json.dumps(config))
    write_card(directory, opened(directory))
    assert "Weights are decoded as they are loaded" in section(directory / NAME, heading)


def test_licenses_travel_with_the_model(run, tiny_model_dir, tmp_path):
    base = shutil.copytree(tiny_model_dir("qwen3_moe"), tmp_path / "base")
    (base / "LICENSE.txt").write_text("Do as you like.")
    weights = CompressedWeights(run / "compressed")
    blocks = [weights.quantized(index) for index in range(len(opened(run / "compressed").blocks))]
    moe = MoEModel(load(run / "compressed", packed=False))
    save_compressed(tmp_path / "again", moe, str(base), blocks, {"method": "rtn"})
    export(str(tmp_path / "again"), str(tmp_path / "exported"), "gptq_v2")
    for place in ("again", "exported"):
        assert (tmp_path / place / "LICENSE.txt").read_text() == "Do as you like."


def test_an_edited_card_stays(run, caplog):
    card = run / "compressed" / NAME
    edited = card.read_text().replace("# ", "# My ", 1)
    card.write_text(edited)
    assert is_edited(card)
    write_card(card.parent, opened(card.parent))
    assert card.read_text() == edited and f"{card} was edited" in caplog.text
    card.write_text("A card that somebody wrote.")
    write_card(card.parent, opened(card.parent))
    assert card.read_text() == "A card that somebody wrote."
    card.unlink()
    write_card(card.parent, opened(card.parent))
    assert not is_edited(card) and section(card, QUALITY) == ""


def test_an_export_has_a_card(run, tmp_path):
    export(str(run), str(tmp_path / "out"), "gptq_v2")
    shutil.copytree(run / "compressed", tmp_path / "elsewhere")  # without the run's report beside it
    export(str(tmp_path / "elsewhere"), str(tmp_path / "again"), "gptq_v2")
    quality = section(run / "compressed" / NAME, QUALITY)
    for place in ("out", "again"):
        card = tmp_path / place / NAME
        assert section(card, QUALITY) == quality != ""
        about = section(card, "## Format")
        assert about.startswith("`gptq_v2`. For gptqmodel: GPTQModel 7.7.0") and "Read back after writing: " in about
        assert ModelCard.load(card).data.library_name == "gptqmodel"
    assert not list((tmp_path / "out").glob("*.py"))  # of the compressed directory
