"""llama.cpp's blocks: bytes and values against its own decoder, and GPTQ on them against definitions."""

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from jobs import attempts, contents, fit
from tiny_models import COMMON, build_random
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

from eacmoe_lightning import load
from eacmoe_lightning.cli import main
from eacmoe_lightning.quantization import kquant_gptq
from eacmoe_lightning.quantization.kquant import BITS, TYPES, KQuant, type_of
from eacmoe_lightning.quantization.kquant_bytes import from_bytes, to_bytes


def random_weight(name: str, *rows: int, seed: int = 0) -> KQuant:
    """Any values that the type can hold, for 3 blocks a row."""
    kind, generator = TYPES[name], torch.Generator().manual_seed(seed)

    def integers(low: int, high: int, size: int) -> torch.Tensor:
        return torch.randint(low, high + 1, (*rows, size), generator=generator, dtype=torch.int16)

    columns = 3 * kind.block
    scale = torch.randn(*rows, 3, generator=generator).half()
    minimum = torch.rand(*rows, 3, generator=generator).half() * bool(kind.most_minimum)
    codes = integers(0, 2**kind.bits - 1, columns).to(torch.uint8)
    sub_scale = integers(*kind.sub_scales, columns // kind.group)
    return KQuant(codes, scale, minimum, sub_scale, integers(0, kind.most_minimum, columns // kind.group), name)


@pytest.mark.parametrize("name", TYPES)
def test_llama_cpp_s_decoder_reads_our_bytes(name: str):
    weight = random_weight(name, 2, 5)
    rows = to_bytes(weight)
    assert rows.shape[-1] * 8 == TYPES[name].true_bits * weight.codes.shape[-1]
    decoded = gguf.dequantize(rows.numpy(), gguf.GGMLQuantizationType[name])
    np.testing.assert_array_equal(decoded, weight.dequantize().numpy())


@pytest.mark.parametrize("name", TYPES)
def test_bytes_give_back_every_field(name: str):
    weight = random_weight(name, 4)
    back = from_bytes(to_bytes(weight), name)
    assert back.kind == name
    for field in KQuant.FIELDS:
        assert torch.equal(getattr(back, field), getattr(weight, field)), field


def test_a_type_for_every_row():
    names = {bits: (type_of(bits, 512).name, type_of(bits, 96).name) for bits in BITS}
    assert names == {
        2: ("Q2_K", "Q4_0"),
        3: ("Q3_K", "Q4_0"),
        4: ("Q4_K", "Q4_0"),
        5: ("Q5_K", "Q5_0"),
        6: ("Q6_K", "Q8_0"),
        8: ("Q8_0", "Q8_0"),
    }
    for bits, columns in [(7, 256), (4, 48)]:
        with pytest.raises(ValueError, match=r"7 bits|in_features=48"):
            type_of(bits, columns)
    for bits in BITS:  # the type can be found again from its own bits
        for columns in (256, 32):
            kind = type_of(bits, columns)
            assert type_of(kind.bits, columns) == kind


# --- GPTQ


def problem(rows: int = 24, columns: int = 512) -> tuple[torch.Tensor, torch.Tensor]:
    """Two weights [2, O, I], and Hessians of correlated inputs of different sizes."""
    generator = torch.Generator().manual_seed(0)
    mixed = 0.3 * torch.randn(2, columns, columns, generator=generator) + torch.eye(columns)
    x = torch.randn(2, 2 * columns, columns, generator=generator) @ mixed * torch.rand(columns, generator=generator)
    weight = torch.randn(2, rows, columns, generator=generator) * torch.rand(2, rows, 1, generator=generator)
    return weight, x.mT @ x / (2 * columns)


def loss(weight: torch.Tensor, quantized: KQuant, hessian: torch.Tensor) -> torch.Tensor:
    delta = (weight - quantized.dequantize()).double()
    return ((delta @ hessian.double()) * delta).sum((-2, -1))


@pytest.mark.parametrize("name", TYPES)
def test_every_step_of_the_solver_lowers_the_loss_that_it_reports(name: str):
    weight, hessian = problem()
    zero = ((weight.double() @ hessian.double()) * weight).sum((-2, -1))
    errors = []
    for options in (dict(), dict(search=True), dict(search=True, refine=1), dict(search=True, refine=3)):
        quantized, error = kquant_gptq.solve(weight, hessian, TYPES[name], act_order=True, **options)
        torch.testing.assert_close(error.double(), loss(weight, quantized, hessian) / zero, rtol=2e-3, atol=1e-7)
        back = from_bytes(to_bytes(quantized), name)  # every value is one that the type can hold
        assert torch.equal(back.dequantize(), quantized.dequantize())
        errors.append(error.mean())
    assert errors == sorted(errors, reverse=True)


def test_a_weight_that_the_type_can_hold_is_found_again():
    """Without correlations, a weight in Q4_K's blocks loses next to nothing in Q4_K."""
    weight = random_weight("Q4_K", 8).dequantize()[:, :512]
    hessian = torch.diag(torch.rand(512, generator=torch.Generator().manual_seed(1)) + 0.5)
    for name, most in (("Q4_K", 2e-3), ("Q5_K", 1e-3), ("Q8_0", 1e-4)):
        _, error = kquant_gptq.solve(weight, hessian, TYPES[name], search=True, refine=2)
        assert error < most, name


def test_dead_inputs_constant_rows_and_zeros_stay_finite():
    weight, hessian = problem(8, 256)
    weight[:, 0], weight[:, 1], weight[:, 2] = 0, 3, -3
    hessian[:, :, :16] = hessian[:, :16] = 0
    for kind in TYPES.values():
        for refine in (0, 2):
            quantized, error = kquant_gptq.solve(weight, hessian, kind, search=True, refine=refine, act_order=True)
            decoded = quantized.dequantize()
            assert decoded.isfinite().all() and error.isfinite().all(), kind.name
            assert not decoded[:, 0].any(), kind.name
            assert (decoded[:, 1, 16:] - 3).abs().max() < 0.6 and (decoded[:, 2, 16:] + 3).abs().max() < 0.6, kind.name


def test_training_a_scale_stretches_the_block_with_its_minimums():
    weight = random_weight("Q2_K", 4)
    scale = (weight.scale.float() * 1.5).half()
    stretched = weight.with_scale(scale)
    assert torch.equal(stretched.dequantize(), weight.dequantize(scale=scale.float()))
    torch.testing.assert_close(stretched.dequantize(), weight.dequantize() * 1.5, rtol=2e-3, atol=1e-2)
    position = weight.positions(weight.dequantize())
    assert torch.equal(weight.nearest(position).to(torch.uint8), weight.codes)


# --- jobs


@pytest.fixture(scope="module")
def wide_model(tmp_path_factory, tokenizer) -> Path:
    """Rows of 256 and of 512 inputs; the shared configuration's are too short for K-quants."""
    sizes = dict(hidden_size=256, head_dim=64, num_hidden_layers=2, intermediate_size=256, moe_intermediate_size=512)
    config = Qwen3MoeConfig(**{**COMMON, **sizes}, num_experts=4, num_experts_per_tok=2, norm_topk_prob=True)
    folder = tmp_path_factory.mktemp("wide")
    build_random(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_fit_for_llama_cpp_ends_in_its_blocks(wide_model, tmp_path):
    """Both stages train the blocks; the file holds exactly the model that the job measured."""
    options = dict(model__bits="[3, 2]", model__joint_code_lr=1e-4, model__overrides="{1: {experts.down_proj: 4}}")
    run = fit(wide_model, tmp_path / "run", model__target="llama.cpp", **options)
    main(["export", "--source", str(run), "--output", str(tmp_path / "out"), "--format", "gguf"])
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "out" / "model.gguf").tensors}
    names = ("0.attn_q", "0.ffn_gate_exps", "0.ffn_down_exps", "1.ffn_up_exps", "1.ffn_down_exps")
    types = [stored[f"blk.{name}.weight"].tensor_type.name for name in names]
    assert types == ["Q4_K", "Q3_K", "Q3_K", "Q2_K", "Q4_K"]
    state = load(run).state_dict()
    down = stored["blk.1.ffn_down_exps.weight"]
    decoded = gguf.dequantize(down.data, down.tensor_type)
    np.testing.assert_array_equal(decoded, state["model.layers.1.mlp.experts.down_proj"].numpy())
    main(["export", "--source", str(run), "--output", str(tmp_path / "dense"), "--format", "dense"])
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "dense").state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in state.items())


@pytest.mark.slow
def test_a_killed_job_ends_like_an_undisturbed_one(wide_model, tmp_path):
    options = dict(model__target="llama.cpp", model__bits=2, data__batch_size=2, checkpoint__every_n_train_steps=1)
    places = [
        ["call", "eacmoe_lightning.job.block_stage.BlockStage.window_losses", 3],
        ["phase", "1 experts", 1],
        ["call", "eacmoe_lightning.job.joint_stage.JointStage.losses", 1],
    ]
    for run, ends in (("killed", places), ("undisturbed", [])):
        attempts(wide_model, tmp_path / run, ends, options)
    for part in ("blocks", "compressed"):
        assert contents(tmp_path / "killed" / part) == contents(tmp_path / "undisturbed" / part)
