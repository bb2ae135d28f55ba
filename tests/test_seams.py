"""Extensions from outside the package: a router loss and two quantizers in users' files, selected by config."""

import json

import jobs
import pytest
import torch
from safetensors import safe_open

from eacmoe_lightning import load
from eacmoe_lightning.cli import main
from eacmoe_lightning.configurable import Configurable
from eacmoe_lightning.run.block_file import read_block
from eacmoe_lightning.run.directory import RunDirectory

LOSS = '''
"""A router loss: squared differences weighted by the teacher's softmax, with extra weight for chosen experts."""

import torch
from eacmoe_lightning.routers.losses import RouterLoss


class WeightedMSE(RouterLoss):
    def __init__(self, kind: str = "softmax", favourites: list[int] | None = None, extra: float = 1.0) -> None:
        super().__init__()
        if kind not in ("softmax", "flat"):
            raise ValueError(f"kind={kind!r} (--model.router_loss.init_args.kind) is neither softmax nor flat")
        self.kind, self.favourites, self.extra = kind, favourites or [], extra

    def forward(self, student, teacher, top_k):
        weight = teacher.softmax(-1) if self.kind == "softmax" else torch.ones_like(teacher)
        weight = weight.clone()
        weight[:, self.favourites] *= self.extra
        return ((student - teacher).square() * weight).sum(-1)
'''

QUANTIZER = '''
"""A quantizer: plain rounding on the grid, with minimum-maximum ranges."""

import torch
from eacmoe_lightning.quantization.grid import Quantized, round_to_nearest
from eacmoe_lightning.quantization.quantizers import Arithmetic, Quantizer
from dataclasses import replace


class PlainRounding(Quantizer):
    needs = "nothing"

    def __init__(self, shrink: float = 1.0, notes: tuple[str, ...] = ()) -> None:
        self.shrink = shrink

    def solve(self, weight, statistics, grid):
        assert statistics is None
        rounded = round_to_nearest(weight.float() * self.shrink, replace(grid, clip_search=False))
        delta = weight.float() - rounded.dequantize()
        return rounded, delta.square().sum((-2, -1)) / weight.float().square().sum((-2, -1)).clamp(min=1e-30)

    def arithmetic(self, rows, columns, grid):
        return Arithmetic(loop_bytes=20 * rows * columns)


class SmallestInputsFirst(Quantizer):
    """Rounds with the mean square of each input as importance."""

    needs = "inputs"

    def solve(self, weight, statistics, grid):
        importance = torch.stack([x.square().mean(0) if len(x) else x.new_zeros(x.shape[1]) for x in statistics])
        rounded = round_to_nearest(weight, grid, importance)
        lost = (weight.float() - rounded.dequantize()).square() * importance[:, None]
        whole = weight.float().square() * importance[:, None]
        return rounded, lost.sum((-2, -1)) / whole.sum((-2, -1)).clamp(min=1e-30)
'''


@pytest.fixture
def outside(tmp_path, monkeypatch):
    """Puts a directory with both modules on the import path."""
    for name, text in (("my_loss", LOSS), ("my_quantizer", QUANTIZER)):
        assert len(text.splitlines()) < 60
        (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)


def fit(model, run, **options):
    return jobs.fit(model, run, model__block_epochs=0, model__joint_epochs=0, **options)


def test_a_router_loss_from_outside(outside, tiny_model_dir, tmp_path, capsys):
    options = {
        "model__router_method": "sgd",
        "model__router_loss": "my_loss.WeightedMSE",
        "model__router_loss__favourites": "[1, 2]",
        "model__router_loss__extra": 2.0,
    }
    run = fit(tiny_model_dir("mixtral"), tmp_path / "run", **options)
    settings = json.loads((run / "run.json").read_text())["model.router_loss"]
    arguments = {"kind": "softmax", "favourites": [1, 2], "extra": 2.0}
    assert settings == {"class_path": "my_loss.WeightedMSE", "init_args": arguments}
    # strings and lists are part of the run's identity: a run does not resume with other ones
    for other in ({"model__router_loss__kind": "flat"}, {"model__router_loss__favourites": "[1, 3]"}):
        with pytest.raises(SystemExit):
            words = jobs.options(
                tiny_model_dir("mixtral"), run, model__block_epochs=0, model__joint_epochs=0, **options | other
            )
            main(["fit", *words, "--ckpt_path", "last"])
        assert "model.router_loss was" in capsys.readouterr().err


def test_a_quantizer_from_outside(outside, tiny_model_dir, tmp_path):
    options = {"model__quantizer": "my_quantizer.PlainRounding", "model__quantizer__shrink": 0.5}
    run = fit(tiny_model_dir("qwen2_moe"), tmp_path / "run", model__bits=4, **options)
    quantized, _, stats = read_block(RunDirectory(run), 0)
    original = load_original_block(tiny_model_dir("qwen2_moe"))
    name = "model.layers.0.self_attn.q_proj.weight"
    target = 0.5 * original[name]
    step = quantized[name].scale.float().repeat_interleave(32, -1)
    assert ((quantized[name].dequantize() - target).abs() <= step * 0.51 + 1e-6).all()
    assert stats.error[name] == pytest.approx(0.25, abs=0.02)  # half of the weight is missing
    report = json.loads((run / "report.json").read_text())
    assert report["config"]["model.quantizer"]["class_path"] == "my_quantizer.PlainRounding"
    assert load(run)(torch.tensor([[1, 2, 3]])).logits.isfinite().all()
    main(["plan", *jobs.options(tiny_model_dir("qwen2_moe"), tmp_path / "other", **options)])


def load_original_block(path):
    with safe_open(path / "model.safetensors", "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def test_a_quantizer_that_needs_inputs(outside, tiny_model_dir, tmp_path):
    options = {"model__quantizer": "my_quantizer.SmallestInputsFirst"}
    run = fit(tiny_model_dir("mixtral"), tmp_path / "run", **options)
    errors = [value for i in range(3) for value in read_block(RunDirectory(run), i)[2].error.values()]
    assert len(errors) == 3 * 6 and all(0 < error < 0.2 for error in errors)


class Marked(Configurable):
    def __init__(self, a: int, *, b: object = None) -> None:
        self.a = a


def test_arguments_are_recorded_or_refused():
    assert Marked(1, b=[1, {"x": (2.5, None)}]).settings()["init_args"] == {"a": 1, "b": [1, {"x": [2.5, None]}]}
    assert Marked(1, b=Marked(2)).settings()["init_args"]["b"]["init_args"] == {"a": 2, "b": None}
    with pytest.raises(ValueError, match="the argument b is a Tensor"):
        Marked(1, b=torch.ones(2)).settings()
