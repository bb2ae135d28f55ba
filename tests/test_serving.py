"""Compressed models in vLLM: what the plugin reads and how it is found. vLLM itself runs in `benchmarks/serve_check.py`
and, where it is installed, in the last test."""

import json
import os
import subprocess
import sys
import tomllib
from importlib import import_module
from importlib.util import find_spec

import jobs
import pytest
import tiny_models
import torch
from transformers import AutoConfig

from eacmoe_lightning.compressed.format import original_config, read_config
from eacmoe_lightning.compressed.loading import load
from eacmoe_lightning.models.moe import MoEModel
from eacmoe_lightning.models.original_files import OriginalFiles
from eacmoe_lightning.quantization.packing import unpack
from eacmoe_lightning.run.files import StoreError, read_tensors, write_tensors
from eacmoe_lightning.runtime.packed_modules import PackedExperts
from eacmoe_lightning.serving.packed_model import (
    PackedModel,
    check_router_options,
    check_servable,
    divisors,
    layer_number,
    shard_experts,
)

sys.path.append(str(jobs.ROOT / "benchmarks"))
import serve_check

GROUP_SIZE = 32
HAS_VLLM = find_spec("vllm") is not None


@pytest.fixture(scope="module")
def directories(tmp_path_factory, tokenizer):
    """Compressed directories of tiny models, made once: (family, case) -> path."""
    root, made = tmp_path_factory.mktemp("serving"), {}

    def make(family: str, case: str):
        if (family, case) not in made:
            original = root / f"{family}-original"
            if not original.exists():
                tiny_models.save(family, original, tokenizer)
            made[family, case] = serve_check.round_model(root / f"{family}-{case}", str(original), GROUP_SIZE, case)
        return made[family, case]

    return make


# --- the plugin


def test_the_entry_point_leads_to_a_function():
    points = tomllib.loads((jobs.ROOT / "pyproject.toml").read_text())["project"]["entry-points"][
        "vllm.general_plugins"
    ]
    module, _, function = points["eacmoe"].partition(":")
    assert callable(getattr(import_module(module), function))


@pytest.mark.skipif(HAS_VLLM, reason="vLLM is installed")
def test_without_vllm_the_error_says_what_to_install():
    from eacmoe_lightning.serving.vllm_plugin import register

    with pytest.raises(ImportError, match=r"vLLM plugin needs vLLM .*pip install"):
        register()


def test_nothing_imports_vllm_before_vllm_asks():
    code = (
        "import sys, eacmoe_lightning, eacmoe_lightning.serving.packed_model, eacmoe_lightning.serving.vllm_plugin; "
        "print(any(name.split('.')[0] == 'vllm' for name in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=jobs.ROOT, check=True)
    assert done.stdout.strip() == "False"


# --- a compressed directory as a checkpoint


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "deepseek", "qwen3_moe"])
def test_linears_and_others_have_the_names_and_values_of_the_original_checkpoint(family, directories):
    directory = directories(family, "3")
    model, experts = PackedModel(directory), {}
    tensors = dict(model.tensors(experts))
    decoded = MoEModel(load(directory, dtype="float32", packed=False)).model.state_dict()
    shapes = {
        name: stored.shape
        for name, stored in OriginalFiles(str(directory.parent / f"{family}-original")).stored.items()
    }
    read = {name for name in tensors if not name.endswith((".weight_packed", ".weight_scale", ".weight_zero_point"))}
    read |= {f"{name}.weight" for name in model.linears}
    assert read == {name for name in shapes if ".experts." not in name}
    for name, linear in model.linears.items():
        scale, zero_point = tensors[f"{name}.weight_scale"].float(), tensors[f"{name}.weight_zero_point"].float()
        codes = unpack(tensors[f"{name}.weight_packed"], linear.bits, shapes[f"{name}.weight"][1]).float()
        steps = codes.unflatten(-1, (-1, GROUP_SIZE)) - zero_point[..., None]
        weight = (steps * scale[..., None]).flatten(-2)
        assert torch.equal(weight, linear.rows.of(decoded[linear.weight]))
    assert experts.keys() == model.expert_blocks.keys()


@pytest.mark.parametrize("case", ["each", "pruned"])
def test_experts_are_those_of_load(case, directories):
    directory = directories("qwen3_moe", case)
    experts = {}
    list(PackedModel(directory).tensors(experts))
    loaded = load(directory, dtype="float32")
    assert [*experts] == [0, 1, 2]
    for number, own in experts.items():
        theirs = loaded.model.layers[number].mlp.experts
        for name, tensor in own.state_dict().items():
            assert torch.equal(tensor, theirs.state_dict()[name])
        x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
        ids = torch.tensor([[0, 1], [2, 3], [4, 5], [5, 0], [1, 1]])
        assert torch.equal(own(x, ids, torch.full(ids.shape, 0.5)), theirs(x, ids, torch.full(ids.shape, 0.5)))


def test_layer_numbers():
    assert layer_number("language_model.model.layers.12.mlp.experts") == 12
    with pytest.raises(ValueError, match="not in a numbered layer"):
        layer_number("lm_head")


# --- several processes


@pytest.mark.parametrize("case", ["3", "each"])
def test_outputs_of_the_processes_add_up(case, directories):
    def experts() -> PackedExperts:
        found = {}
        list(PackedModel(directories("mixtral", case)).tensors(found))
        return found[1]

    x = torch.randn(7, 64, generator=torch.Generator().manual_seed(0))
    ids, weights = torch.arange(14).view(7, 2) % 8, torch.full((7, 2), 0.5)
    whole = experts()(x, ids, weights)
    parts = [shard_experts(experts(), rank, 2)(x, ids, weights) for rank in range(2)]
    assert torch.allclose(sum(parts), whole, atol=1e-5)
    assert not torch.allclose(parts[0], whole, atol=1e-2)


def test_a_size_that_cuts_a_group_is_refused(directories):
    found = {}
    list(PackedModel(directories("mixtral", "3")).tensors(found))
    with pytest.raises(ValueError, match=r"size of 4 cuts .* groups of 32 .* use one of \[1, 2\]"):
        shard_experts(found[0], 0, 4)
    assert divisors(1408, 128) == [1, 11]


# --- what is refused


def test_what_no_server_runs_is_refused(directories):
    config = read_config(directories("mixtral", "pruned"))
    check_servable(config)
    kept = config["original"]["config"]["kept_experts"]
    kept["1"] = kept["1"][:-1]
    with pytest.raises(ValueError, match="5 to 6 experts .*--pruning.keep"):
        check_servable(config)
    config = read_config(directories("mixtral", "3"))
    config["quantization"]["lattice"] = ["model.layers.0.self_attn.q_proj.weight"]
    with pytest.raises(ValueError, match="lattice .*--format dense"):
        check_servable(config)
    with pytest.raises(ValueError, match="install a newer one"):
        check_servable({**config, "format_version": 99})


def test_a_missing_tensor_is_named(directories, tmp_path):
    directory = directories("mixtral", "3")
    for file in directory.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors, _ = read_tensors(tmp_path / "weights-block-001.safetensors")
    tensors.pop("model.layers.1.mlp.experts.down_proj.zero_point")
    write_tensors(tmp_path / "weights-block-001.safetensors", tensors)
    with pytest.raises(StoreError, match="down_proj.zero_point"):
        list(PackedModel(tmp_path).tensors({}))


def test_options_that_only_vllms_router_reads_are_asked_for():
    """Without them vLLM routes DeepSeek-V3 by softmax, without an error."""
    config = AutoConfig.for_model("deepseek_v3")
    with pytest.raises(ValueError, match=r'deepseek_v3 .* --hf-overrides .*"scoring_func": "sigmoid", "topk_method"'):
        check_router_options(config)
    config.scoring_func, config.topk_method = "sigmoid", "noaux_tc"
    check_router_options(config)
    check_router_options(AutoConfig.for_model("mixtral"))


def test_attention_without_names_in_vllm_is_served_decoded(directories):
    directory = directories("deepseek", "3")
    packed, experts = PackedModel(directory, "float32"), {}
    tensors, state = dict(packed.tensors(experts)), load(directory, packed=False).state_dict()
    attention = [name for name in state if "self_attn" in name]
    assert attention and all(torch.equal(tensors[name], state[name]) for name in attention)
    assert not [name for name in packed.linears if "self_attn" in name] and experts
    assert (packed.source.config.n_group, packed.source.config.topk_group) == (1, 1)


# --- vLLM itself


@pytest.mark.slow
@pytest.mark.skipif(not HAS_VLLM, reason="vLLM is not installed")
def test_vllm_generates_the_tokens_of_transformers(tmp_path):
    prompts = [[869, 376, 846], [857, 2422, 1976, 322, 569]]
    (tmp_path / "prompts.json").write_text(json.dumps(prompts))
    directory = serve_check.bundled(tmp_path / "each", "each")
    seen = serve_check.run_vllm(sys.executable, [directory], {"dtype": "float32"}, 8, tmp_path)
    compared = serve_check.compare(directory, "float32", prompts, seen["models"][str(directory)])
    assert compared["tokens"] == "16 of 16" and compared["logprobs"] < 1e-3


@pytest.mark.slow
@pytest.mark.skipif(not HAS_VLLM, reason="vLLM is not installed")
@pytest.mark.parametrize("family", ["deepseek_v2", "deepseek_v3"])
def test_vllm_rotates_latent_attention_as_transformers_does(family, tmp_path):
    """vLLM's own operator for CPUs does not: it gave log-probabilities that differ by .25."""
    prompts = [[869, 376, 846], [857, 2422, 1976, 322, 569]]
    (tmp_path / "prompts.json").write_text(json.dumps(prompts))
    directory = serve_check.random_model(tmp_path / family, family)
    seen = serve_check.run_vllm(sys.executable, [directory], {"dtype": "bfloat16"}, 8, tmp_path)
    compared = serve_check.compare(directory, "bfloat16", prompts, seen["models"][str(directory)])
    assert compared["logprobs"] < 4 * compared["yardstick"]


def test_vllm_builds_the_original_architecture_from_the_config(directories):
    """What vLLM reads of config.json: the original's type and architecture, and the quantization method."""
    code = (
        "import sys, eacmoe_lightning.serving.vllm_plugin; from transformers import AutoConfig; "
        "config = AutoConfig.from_pretrained(sys.argv[1]); "
        "print(config.model_type, config.architectures, config.quantization_config['quant_method'])"
    )
    directory = directories("mixtral", "3")
    env = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code, str(directory)], capture_output=True, text=True, cwd=jobs.ROOT, check=True, env=env
    )
    assert done.stdout.strip() == "mixtral ['MixtralForCausalLM'] eacmoe"
    assert original_config(read_config(directory)).model_type == "mixtral"
