"""Exports for GPTQModel, loaded into modules as GPTQModel 7.7.0 and defuser 0.0.28 build them.

`benchmarks/export_check.py --engines gptqmodel` runs GPTQModel itself on the same models.
"""

import json
import re
from functools import partial
from pathlib import Path

import architectures
import pytest
import torch
import transformers
from safetensors.torch import load_file
from test_decoding import assert_decoded
from test_wrappers import CONFIGS
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from eacmoe_lightning import gptqmodel, load
from eacmoe_lightning.cli import main
from eacmoe_lightning.compressed.directory import save_compressed
from eacmoe_lightning.exports.export import export
from eacmoe_lightning.exports.gptq import decode
from eacmoe_lightning.models.moe import MoEModel
from eacmoe_lightning.models.originals import load_original
from eacmoe_lightning.models.transformers_loader import auto_class
from eacmoe_lightning.quantization.grid import Grid, round_to_nearest

QUICK = ("gpt_oss", "llama4", "llama4_text", "qwen3_next")
TOKENS = torch.randint(1, 4096, (2, 40), generator=torch.Generator().manual_seed(0))
WRAPPERS = [kind for kind in (*CONFIGS, "minimax_m3_vl") if kind in gptqmodel.PACKED and kind in CONFIG_MAPPING_NAMES]
LOADED = [name for name in architectures.ARCHITECTURES if name in gptqmodel.PACKED] + WRAPPERS


def config_of(name: str) -> PreTrainedConfig:
    if name == "minimax_m3_vl":
        vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
        vision |= {"image_size": 28, "patch_size": 14}
        text = architectures.config_of("minimax_m3_vl_text").to_dict()
        sizes = {"projector_hidden_size": 64, "merged_hidden_size": 256}
        images = {"image_token_index": 4090, "video_token_index": 4091}
        return AutoConfig.for_model(name, text_config=text, vision_config=vision, **sizes, **images)
    return CONFIGS[name] if name in WRAPPERS else architectures.config_of(name)


def build(name: str) -> PreTrainedModel:
    """A random model, of whose wrappers only the routers are not as they are initialised."""
    if name not in WRAPPERS:
        return architectures.build(name)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = empty(name)
        for key, parameter in model.named_parameters():
            if key.endswith(("gate.weight", "router.weight")):
                parameter *= 6  # a fresh router selects nearly uniformly
    return model


def empty(name: str) -> PreTrainedModel:
    config = config_of(name)
    return auto_class(config).from_config(config, dtype=torch.float32).eval()


def compressed(name: str, folder: Path, tokenizer, group_size: int = 32) -> Path:
    """A compressed directory, rounded to nearest; linears that groups do not divide stay as they are."""
    grid = Grid(4, group_size, symmetric=False)
    build(name).save_pretrained(folder / "original")
    tokenizer.save_pretrained(folder / "original")
    moe, blocks, left = MoEModel(load_original(str(folder / "original"))), [], {}
    for block in moe.blocks:
        weights = {n: w for n, (_, w) in block.weights().items()}
        odd = [n for n, w in weights.items() if w.shape[-1] % grid.group_size]
        left |= dict.fromkeys(odd, "its inputs are no multiple of the group size")
        blocks.append({n: round_to_nearest(w, grid) for n, w in weights.items() if n not in left})
        moe.put({n: block.as_parameter(n, q.dequantize()) for n, q in blocks[-1].items()})
    about = {"method": "rtn"} | ({"unquantized": left} if left else {})
    save_compressed(folder / "compressed", moe, str(folder / "original"), blocks, about)
    return folder / "compressed"


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {name: t for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}


def split_model(name: str) -> PreTrainedModel:
    """Transformers' modules, with every stack of experts in halves of its rows: numbered modules with linears."""
    model = empty(name)
    for experts in list(model.modules()):
        stacks = {n: p for n, p in experts.named_parameters(recurse=False) if p.ndim == 3 and n.endswith("_proj")}
        if "down_proj" not in stacks:
            continue
        first = next(iter(stacks.values()))
        is_transposed = getattr(experts, "is_transposed", first.shape[1] < first.shape[2])  # Llama 4 does not say
        for stack, parameter in stacks.items():
            projections = ("gate_proj", "up_proj") if stack == "gate_up_proj" else (stack,)
            num_experts, out_features, in_features = (parameter.mT if is_transposed else parameter).shape
            bias = hasattr(experts, f"{stack}_bias")
            for e in range(num_experts):
                if str(e) not in experts._modules:
                    experts.add_module(str(e), nn.Module())
                for projection in projections:
                    linear = nn.Linear(in_features, out_features // len(projections), bias)
                    experts.get_submodule(str(e)).add_module(projection, linear)
            delattr(experts, stack)
            if bias:
                delattr(experts, f"{stack}_bias")
        experts.forward = partial(run_experts, experts, num_experts)
    return model


def run_experts(experts: nn.Module, num_experts: int, x: Tensor, ids: Tensor | None = None, weights=None) -> Tensor:
    """One expert after another; without ids (Llama 4) the tokens of the experts lie one after another in x."""

    def run(e: int, x: Tensor) -> Tensor:
        expert = experts.get_submodule(str(e))
        gate, up = expert.gate_proj(x), expert.up_proj(x)
        has_rule = hasattr(experts, "_apply_gate")
        return expert.down_proj(
            experts._apply_gate(torch.cat([gate, up], -1)) if has_rule else experts.act_fn(gate) * up
        )

    if ids is None:
        return torch.cat([run(e, chunk) for e, chunk in enumerate(x.view(num_experts, -1, x.shape[-1]))])
    out = torch.zeros_like(x)
    for e in range(num_experts):
        rows, k = torch.where(ids == e)
        out.index_add_(0, rows, run(e, x[rows]) * weights[rows, k, None])
    return out


def taken_for_packed(module: str, model_type: str, dynamic: dict) -> bool:
    """Whether GPTQModel replaces a linear by a packed one."""
    if any(pattern.startswith("-:") and re.match(pattern[2:], module) for pattern in dynamic):
        return False
    return gptqmodel.PACKED[model_type].fullmatch(module) is not None


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in LOADED]
)
@torch.no_grad()
def test_every_tensor_has_its_place_in_split_modules(name, tokenizer, tmp_path):
    """Names, shapes and biases fit, what the engine takes for packed is packed, and the logits are our model's."""
    try:
        empty(name)(TOKENS)
    except AttributeError as error:  # Llama 4 with 5.24: its text half returns no `image_outputs`
        pytest.skip(f"{name}: transformers {transformers.__version__} cannot run it on text ({error})")
    source = compressed(name, tmp_path, tokenizer)
    export(str(source), str(tmp_path / "out"), "gptq_v2", "gptqmodel")
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    model, stored = split_model(name), tensors_of(tmp_path / "out")
    packed = {key.removesuffix(".qweight") for key in stored if key.endswith(".qweight")}
    linears = [module for module, kind in model.named_modules() if isinstance(kind, nn.Linear)]
    assert packed == {m for m in linears if taken_for_packed(m, architectures.model_type(name), config["dynamic"])}
    missing, unexpected = model.load_state_dict(decode(stored, config), strict=False)
    assert not unexpected and set(missing) <= set(model.all_tied_weights_keys)
    expected = load(source, packed=False)(TOKENS, use_cache=False).logits
    torch.testing.assert_close(model(TOKENS, use_cache=False).logits, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_gates_and_biases_of_gpt_oss_are_halves_of_interleaved_rows(tokenizer, tmp_path):
    """`gate_proj` is what defuser 0.0.28 makes of `gate_up_proj` [E, D, 2F]: the first F columns, gate and up mixed."""
    source = compressed("gpt_oss", tmp_path, tokenizer)
    export(str(source), str(tmp_path / "out"), "gptq_v2")
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    stored, state = decode(tensors_of(tmp_path / "out"), config), load(source, packed=False).state_dict()
    experts = "model.layers.1.mlp.experts"
    for projection, half in (("gate_proj", slice(0, 64)), ("up_proj", slice(64, 128))):
        assert torch.equal(stored[f"{experts}.5.{projection}.weight"], state[f"{experts}.gate_up_proj"][5][:, half].T)
        assert torch.equal(stored[f"{experts}.5.{projection}.bias"], state[f"{experts}.gate_up_proj_bias"][5][half])
    assert torch.equal(stored[f"{experts}.5.down_proj.weight"], state[f"{experts}.down_proj"][5].T)
    assert torch.equal(stored[f"{experts}.5.down_proj.bias"], state[f"{experts}.down_proj_bias"][5])


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "llama4_text", "deepseek_v4"])
def test_an_export_can_be_the_original_of_another_run(name, tokenizer, tmp_path):
    """GPTQModel's names of experts are not those of the originals, which transformers' conversions read."""
    source = compressed(name, tmp_path, tokenizer)
    export(str(source), str(tmp_path / "out"), "gptq_v2")
    state = load(source, packed=False).float().state_dict()
    assert_decoded(tmp_path / "out", {key: tensor for key, tensor in state.items() if ".experts." in key}, "float32")


def test_what_the_engine_does_not_pack_is_written_decoded_and_named(tokenizer, tmp_path, capsys):
    """Both linears that GPTQModel's definition leaves out and linears that groups do not divide."""
    source = compressed("qwen3_next", tmp_path, tokenizer)
    export(str(source), str(tmp_path / "out"), "gptq_v2")
    stored = tensors_of(tmp_path / "out")
    assert {"model.layers.0.mlp.gate_proj.weight", "model.layers.1.mlp.experts.7.up_proj.qweight"} <= stored.keys()
    assert "linears that gptqmodel does not load packed are decoded" in capsys.readouterr().out
    latent = compressed("deepseek_v3", tmp_path / "latent", tokenizer, group_size=64)  # rank 32
    export(str(latent), str(tmp_path / "latent" / "out"), "gptq_v2")
    config = json.loads((tmp_path / "latent" / "out" / "config.json").read_text())["quantization_config"]
    module = "model.layers.1.self_attn.kv_b_proj"
    assert f"{module}.weight" in tensors_of(tmp_path / "latent" / "out")
    assert not taken_for_packed(module, "deepseek_v3", config["dynamic"])


def test_a_model_that_the_engine_loads_but_does_not_run_is_warned_of(tokenizer, tmp_path, capsys):
    export(str(compressed("glm4_moe", tmp_path, tokenizer)), str(tmp_path / "out"), "gptq_v2")
    assert "warning: GPTQModel 7.7.0 loads this model, but its forward pass fails" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "target", "message"),
    [
        ("granitemoe", "gptqmodel", "GPTQModel 7.7.0 does not load packed experts of the model type 'granitemoe'"),
        ("exaone_moe", "gptqmodel", "export with --format dense or --format compressed-tensors"),
        ("gpt_oss", "vllm", "the original gpt_oss keeps the experts of a block in one tensor (model.layers.0.mlp."),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_fit_refuses_types_that_the_target_does_not_load(name, target, message, tokenizer, tmp_path, capsys):
    architectures.build(name).save_pretrained(tmp_path / "original")
    tokenizer.save_pretrained(tmp_path / "original")
    with pytest.raises(SystemExit):
        main(
            ["fit", f"--model.name_or_path={tmp_path / 'original'}", f"--model.target={target}", "--model.bits=4"]
            + [f"--trainer.default_root_dir={tmp_path / 'run'}", "--trainer.accelerator=cpu", "--data.num_windows=2"]
            + ["--data.window_length=32", "--trainer.enable_progress_bar=false", "--model.group_size=32"]
        )
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run" / "run.json").exists()
