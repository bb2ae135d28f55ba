"""`fit --model.quantizer lattice`: the run is calibrated, entropy-coded, loaded, offloaded, exported and pruned."""

import json

import jobs
import pytest
import torch
from transformers import AutoModelForCausalLM

from eacmoe_lightning import load, load_offloaded
from eacmoe_lightning.cli import main
from eacmoe_lightning.exports.export import export
from eacmoe_lightning.offload.codecs.entropy import Entropy
from eacmoe_lightning.quantization.lattice import Lattice, solve, stored_bits
from eacmoe_lightning.quantization.packing import STORED
from eacmoe_lightning.run.block_file import read_block
from eacmoe_lightning.run.directory import RunDirectory
from eacmoe_lightning.run.files import read_tensors

OPTIONS = {"model__quantizer": "lattice", "model__bits": 2.75, "model__attention_bits": 4.5}


@pytest.fixture
def run(fitted):
    return fitted("qwen2_moe", model__joint_epochs=2, **OPTIONS)


def test_stored_weights_take_the_requested_bits(run):
    bits = {}
    for index in range(3):
        quantized, _, stats = read_block(RunDirectory(run), index)
        tensors, _ = read_tensors(RunDirectory(run).block(index))
        for name, weight in quantized.items():
            assert isinstance(weight, Lattice) and stats.error[name] < 0.35
            size = sum(tensors[f"{name}{kind}"].nbytes for kind in STORED if f"{name}{kind}" in tensors)
            bits[name] = 8 * size / weight.codes.numel()
    for name, value in bits.items():
        # matrices are 64 x 64: offsets and shapes, 8 bytes each, add 0.05 bit per weight here, nothing in real models
        assert value == pytest.approx(2.75 if "experts" in name or "mlp" in name else 4.5, abs=0.12), name
    report = json.loads((run / "report.json").read_text())
    assert report["bits"]["nominal"] < report["bits"]["true"] < report["bits"]["nominal"] + 0.1


@torch.no_grad()
def test_it_loads_decoded_and_offloaded_with_its_codes(run, tokens, tmp_path):
    model = load(run)
    logits = model(tokens).logits
    assert torch.equal(load(run, packed=False)(tokens).logits, logits)
    with pytest.raises(ValueError, match="open it with eacmoe_lightning.load"):
        AutoModelForCausalLM.from_pretrained(run / "compressed")
    for codec, name in (("packed-entropy:2:32", Entropy.name), ("lossless", "lossless")):
        offloaded = load_offloaded(run, 0.5, codec, directory=tmp_path / name)
        torch.testing.assert_close(offloaded(tokens).logits, logits, rtol=1e-5, atol=1e-5)
        assert {offloaded.offload.store.header(key).codec for key in offloaded.offload.store} == {name}
        offloaded.offload.close()
    stored = {name: sum(f.stat().st_size for f in (tmp_path / name).iterdir()) for name in (Entropy.name, "lossless")}
    assert stored[Entropy.name] < 0.5 * stored["lossless"]  # headers weigh a lot here


def test_only_dense_exports_accept_it(run, tmp_path):
    assert export(str(run), str(tmp_path / "dense"), "dense").weights == 0
    for target in ("gptq_v2", "gguf"):
        with pytest.raises(ValueError, match="is on a lattice"):
            export(str(run), str(tmp_path / target), target)


def test_a_finished_lattice_model_can_be_pruned(run, tmp_path, capsys):
    words = {"model": run, "output": tmp_path / "pruned", "pruning.keep": 6, "num_windows": 4, "window_length": 64}
    words |= {"texts": "bundled:prose", "num_heldout_windows": 2}
    main(["prune", *(word for name, value in words.items() for word in (f"--{name}", str(value)))])
    before, after = (
        read_tensors(d / "compressed" / "weights-block-000.safetensors")[0] for d in (run, tmp_path / "pruned")
    )
    name = "model.layers.0.mlp.experts.down_proj"
    assert len(before[f"{name}.ends"]) == 8 and len(after[f"{name}.ends"]) == 6
    assert load(tmp_path / "pruned")(torch.tensor([[1, 2, 3]])).logits.isfinite().all()


def test_the_solver_meets_a_rate_and_beats_rounding_at_it():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(3, 96, 128, generator=generator) * torch.tensor([1.0, 1e-3, 30.0])[:, None, None]
    x = torch.randn(3, 512, 128, generator=generator) @ (torch.randn(3, 128, 128, generator=generator) + 1)
    solved, error = solve(weight, x.mT @ x, 2.5)
    assert stored_bits(solved).tolist() == pytest.approx([2.5] * 3, abs=0.01)
    nearest = Lattice((weight / solved.scale.float()).round().to(torch.int16), solved.scale)
    delta = weight - nearest.dequantize()
    rounding = ((delta @ x.mT).square().sum((-2, -1))) / (weight @ x.mT).square().sum((-2, -1))
    assert (error < 0.5 * rounding).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model__bits": 0.5}, "is not from 1 to 8 stored bits per weight"),
        ({"model__bits": 2.5, "model__quantizer": "gptq"}, "(--model.bits) is not a whole number from 2 to 8"),
        ({"model__target": "vllm"}, "is on a lattice"),
    ],
)
def test_bad_options(options, message, tiny_model_dir, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["fit", *jobs.options(tiny_model_dir("qwen2_moe"), tmp_path / "run", **OPTIONS | options)])
    assert message in capsys.readouterr().err
