"""benchmarks/gptq_quality.py: how results are checked and counted, and that it goes on where it was ended."""

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from jobs import ROOT
from safetensors.torch import load_file

from eacmoe_lightning.budget.allocation import Allocator
from eacmoe_lightning.calibration.recipe import Recipe
from eacmoe_lightning.models.moe import MoEModel
from eacmoe_lightning.models.originals import load_original

BENCHMARKS = ROOT / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

from allocation import OVERHEAD_BITS, units_of  # noqa: E402
from dense_check import inspect, look_at, true_bits  # noqa: E402
from far_texts import compare  # noqa: E402
from gptq_quality import read, table, written  # noqa: E402
from gptq_tools import block_bits  # noqa: E402
from kept_rows import KeptRows  # noqa: E402

GROUP = 16


def weight(bits: int, middle: bool, seed: int = 0) -> torch.Tensor:
    """[4, 32] on a grid in groups of 16."""
    g = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (4, 2, GROUP), generator=g)
    codes[..., 0], codes[..., 1] = 0, 2**bits - 1
    zero_point = torch.full((4, 2, 1), 2 ** (bits - 1)) if middle else torch.zeros(4, 2, 1, dtype=torch.long)
    scale = (0.1 + torch.rand(4, 2, 1, generator=g)).half().float()
    return ((codes - zero_point) * scale).flatten(-2)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("middle", [False, True])
def test_a_weight_on_a_grid_is_recognized_with_its_zero_point(bits, middle):
    on = weight(bits, middle)
    assert look_at(on, bits, GROUP) == (True, middle)
    assert look_at(-on, bits, GROUP) == (True, middle)  # negative scales, as AutoRound's symmetric grids have
    assert look_at(on, bits - 1, GROUP)[0] is False  # twice as many values as that allows
    assert (
        look_at(on + 0.05 * torch.randn(on.shape, generator=torch.Generator().manual_seed(1)), bits, GROUP)[0] is False
    )


def test_few_values_at_unequal_distances_are_not_a_grid():
    values = torch.tensor([-0.31, 0.02, 0.27, 0.9])
    assert look_at(values.repeat(4).view(1, GROUP), 2, GROUP)[0] is False
    assert look_at((values + 1).repeat(4).view(1, GROUP), 3, GROUP)[0] is False
    shifted = torch.tensor([1.0, 2.0, 3.0, 4.0])  # equal distances, but zero is no value of the grid
    assert look_at(shifted.repeat(4).view(1, GROUP), 2, GROUP)[0] is False
    assert look_at((shifted + 1).repeat(4).view(1, GROUP), 3, GROUP) == (True, False)


def test_groups_of_one_value_or_zeros_are_on_every_grid():
    assert look_at(torch.zeros(2, GROUP), 2, GROUP) == (True, True)
    assert look_at(torch.full((2, GROUP), 0.37), 2, GROUP) == (True, True)


def test_a_list_of_bits_is_spread_over_the_blocks_as_fit_does(tmp_path):
    (tmp_path / "config.json").write_text('{"num_hidden_layers": 5}')
    assert read("3,2") == [3, 2] and written([3, 2]) == "3,2" and read("4") == 4
    recipe = Recipe(bits=[3, 2])
    of_fit = [recipe.grid(block, 5, "experts").bits for block in range(5)]
    assert block_bits(tmp_path, [3, 2]) == of_fit == [3, 3, 3, 2, 2]
    assert block_bits(tmp_path, 4) == [4] * 5


def test_true_bits_count_a_scale_and_a_zero_point_for_every_group():
    assert true_bits(1280, 2, 128, zero_point_bits=2) == 1280 * 2 + 10 * (16 + 2)
    assert true_bits(1280, 2, 128, zero_point_bits=0) == 1280 * 2 + 10 * 16


def rounded(trained: str | None = None) -> MoEModel:
    """The bundled model with every weight on a grid of 4 bits in groups of 128, by rounding to the nearest value."""
    moe = MoEModel(load_original("bundled", "float32"))
    with torch.no_grad():
        for block in moe.blocks:
            for _, w in block.weights().values():
                groups = w.unflatten(-1, (-1, 128))
                scale = groups.abs().amax(-1, keepdim=True) / 7
                w.copy_(((groups / scale).round() * scale).flatten(-2))
        if trained:
            moe.model.get_parameter(trained).mul_(1.01)
    return moe


@cache
def original() -> MoEModel:
    return MoEModel(load_original("bundled", "float32"))


def inspected(moe: MoEModel, trains: bool, bits: int = 4, zero_point_bits: int | None = 0) -> dict:
    return inspect(moe, original(), lambda block, part: bits, 128, zero_point_bits, trains)


def test_a_result_is_inspected():
    assert inspected(rounded(), trains=False) == {
        "true_bits": 4 + 16 / 128,
        "zeroed_expert_matrices": 0,
        "changed_routers": 0,
        "changed_norms": 0,
        "changed_others": 0,
    }
    assert inspected(rounded(), trains=False, zero_point_bits=None)["true_bits"] == 4 + 20 / 128
    with pytest.raises(RuntimeError, match="not on a grid of 3 bits"):
        inspected(rounded(), trains=False, bits=3)
    beside = rounded()
    with torch.no_grad():
        next(iter(beside.blocks[0].weights().values()))[1][:, :128] = torch.arange(128) % 16
    assert inspected(beside, trains=False, zero_point_bits=None)["true_bits"] == 4 + 20 / 128
    with pytest.raises(RuntimeError, match="not on a symmetric grid of 4 bits"):
        inspected(beside, trains=False)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("model.layers.2.mlp.gate.weight", "routers"),
        ("model.layers.1.input_layernorm.weight", "norms"),
        ("model.embed_tokens.weight", None),
    ],
)
def test_what_a_tool_must_not_change_is_the_original(name, kind):
    with pytest.raises(RuntimeError, match=name):
        inspected(rounded(name), trains=False)
    if kind is not None:  # what ours trains
        assert inspected(rounded(name), trains=True)[f"changed_{kind}"] == 1
        return
    with pytest.raises(RuntimeError, match=name):
        inspected(rounded(name), trains=True)


class Fixed(torch.nn.Module):
    """Predicts the same distribution for every token."""

    def __init__(self, probabilities: list[float]) -> None:
        super().__init__()
        self.logits = torch.tensor(probabilities).log()

    def forward(self, ids):
        return type("Output", (), {"logits": self.logits.expand(*ids.shape, -1)})


def test_loss_and_divergence_of_known_distributions():
    figures = compare({"even": Fixed([0.5, 0.5])}, Fixed([0.8, 0.2]), torch.tensor([[0, 0, 1], [1, 0, 0]]))["even"]
    p, q = torch.tensor([0.8, 0.2]), torch.tensor([0.5, 0.5])
    assert figures["kl"] == pytest.approx(float((p * (p / q).log()).sum()), rel=1e-5)
    own = -(3 * p[0].log() + p[1].log()) / 4  # the next tokens are 0, 1, 0, 0
    assert figures["original"] == pytest.approx(float(own), rel=1e-5)
    assert figures["lost"] == pytest.approx(float(-q[0].log() - own), rel=1e-4)


def test_the_table_has_means_over_seeds_and_texts():
    def row(seed, lost, tool="ours"):
        figures = {
            "lost": {"prose": lost, "code": lost + 0.02, "german": 3 * lost},
            "kl": {"prose": 0.5, "german": 1.0},
        }
        cost = {"seconds": 60, "processor_seconds": 90, "tree_peak_bytes": 5e8, "expert_shift": {"any": 0.125}}
        return {"tool": tool, "setting": "default", "bits": 2, "seed": seed, "true_bits": 2.5, **figures, **cost}

    lines = table([row(0, 0.1), row(1, 0.2), row(0, 0.3, "autoround"), {"bits": 2, "error": "failed"}]).splitlines()
    assert len(lines) == 4
    titles, ours, peer = ([cell.strip() for cell in lines[i].strip("|").split("|")] for i in (0, 2, 3))
    ours, peer = dict(zip(titles, ours, strict=True)), dict(zip(titles, peer, strict=True))
    assert ours["seeds"] == "2" and ours["true bits"] == "2.500"
    assert ours["lost, in"] == "0.1600 ± 0.0707" and ours["lost, german"] == "0.4500 ± 0.2121"
    assert peer["lost, in"] == "0.3100" and peer["KL, in"] == "0.5000" and peer["KL, far"] == ""
    assert peer["other experts, %"] == "12.5" and peer["seconds"] == "60" and peer["peak MB"] == "500"


def test_rows_are_kept_as_they_are_made_but_for_errors(tmp_path):
    path = tmp_path / "new" / "rows.json"
    rows = KeptRows(path)
    rows.add({"tool": "ours", "bits": [3, 2], "kl": 0.5})
    rows.add({"tool": "peer", "bits": 2, "error": "failed"})
    assert json.loads(path.read_text()) == rows.rows and [file.name for file in path.parent.iterdir()] == ["rows.json"]
    again = KeptRows(path, {"self_windows": 0})
    assert list(again) == [{"self_windows": 0, "tool": "ours", "bits": [3, 2], "kl": 0.5}]
    assert again.of({"bits": [3, 2], "self_windows": 0}) is again.rows[0]
    assert again.of({"bits": [3, 2], "self_windows": 1}) is None and again.of({"tool": "peer"}) is None


@pytest.mark.slow
def test_the_benchmark_goes_on_where_it_was_ended(tmp_path):
    words = ["--tools", "ours", "--bits", "4", "--windows", "2", "--heldout-windows", "1", "--work", str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "2"}

    def run(*more: str) -> str:
        command = [sys.executable, str(BENCHMARKS / "gptq_quality.py"), *words, "--settings", *more]
        return subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=True).stdout

    first = run("rtn")
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [row["setting"] for row in rows] == ["rtn"] and "error" not in rows[0]
    report = json.loads(next(tmp_path.glob("results/ours-4-rtn-2-0/scratch/run/report.json")).read_text())
    assert rows[0]["true_bits"] == pytest.approx(report["bits"]["true"])
    made = (tmp_path / "results").stat().st_mtime_ns
    assert run("rtn") == first and (tmp_path / "results").stat().st_mtime_ns == made
    assert "| ours | rtn |" in first and Path(tmp_path / "results").is_dir()
    run("rtn", "--self-windows", "1")  # the tool itself refuses other windows than those in the file
    assert [row["self_windows"] for row in json.loads((tmp_path / "rows.json").read_text())] == [0, 1]
    real, drawn = (load_file(tmp_path / f"windows-2-0{name}.safetensors")["input_ids"] for name in ("", "-self-1"))
    assert real.shape == drawn.shape and not (real == drawn[1]).all(1).any()


def test_widths_of_linears_become_widths_of_units_and_the_larger_one_counts():
    layer = "model.layers.12"
    bits = {f"{layer}.self_attn.{name}_proj": 4 for name in "qkvo"} | {
        f"{layer}.mlp.experts.7.gate_proj": 2,
        f"{layer}.mlp.experts.7.up_proj": 3,
        f"{layer}.mlp.experts.7.down_proj": 2,
        f"{layer}.mlp.shared_expert.up_proj": 8,
    }
    assert units_of(bits) == {
        (12, "attention"): 4, (12, "experts.7.gate_up_proj"): 3, (12, "experts.7.down_proj"): 2, (12, "shared"): 8,
    }  # fmt: skip


def test_the_size_that_an_allocator_without_scales_gets_is_ours():
    moe = MoEModel(load_original("bundled", "float32"))
    allocator = Allocator(Recipe(group_size=128), moe, None)
    mixed = allocator.of(lambda key: 8 if key[1] == "attention" else 3 if key[0] < 3 else 2)
    sizes = [(key, sum(weight.numel() for part, weight in moe.blocks[0].weights().values() if part == key))
             for key in ("attention", "experts")]  # fmt: skip
    nominal = sum(n * {"attention": 8, "experts": 2.5}[key] for key, n in sizes) / sum(n for _, n in sizes)
    assert mixed.bits - OVERHEAD_BITS / 128 == pytest.approx(nominal)
