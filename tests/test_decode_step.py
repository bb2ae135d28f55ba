"""The short forward passes of a decode step give what the modules themselves give, in every architecture."""

import copy
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import architectures
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Glm4MoeConfig, PreTrainedModel

from eacmoe_lightning import load
from eacmoe_lightning.models.find import find_blocks
from eacmoe_lightning.quantization.grid import Grid, round_to_nearest
from eacmoe_lightning.runtime import kernels
from eacmoe_lightning.runtime.decode_step import FEW, shorten_decode_step
from eacmoe_lightning.runtime.packed_modules import packed_in_place, set_activations

pytestmark = pytest.mark.skipif(kernels.library() is None, reason="needs the C++ kernels")

# routers that the kernel takes: not those with groups of experts or with more inputs than hidden states
ROUTERS = (
    "aria_text", "cohere2_moe", "deepseek", "ernie4_5_moe", "flex_olmo", "gpt_oss", "granitemoe", "granitemoehybrid",
    "hunyuan_v1_moe", "jamba", "laguna", "llama4_text", "minimax", "mixtral", "olmoe", "qwen2_moe", "qwen3_5_moe_text",
    "qwen3_moe", "qwen3_next",
)  # fmt: skip
GLM = dict(
    vocab_size=4096, hidden_size=64, intermediate_size=128, moe_intermediate_size=64, num_hidden_layers=2, head_dim=16,
    num_attention_heads=4, num_key_value_heads=2, n_routed_experts=8, num_experts_per_tok=3, n_shared_experts=1,
    n_group=1, topk_group=1, routed_scaling_factor=2.5, first_k_dense_replace=0, norm_topk_prob=True,
)  # fmt: skip


def tokens(count: int) -> Tensor:
    return torch.randint(3, 4000, (1, count), generator=torch.Generator().manual_seed(0))


@contextmanager
def as_it_was(model: nn.Module) -> Iterator[None]:
    """The modules' own forward passes inside the `with` block."""
    replaced = {module: vars(module).pop("forward") for module in model.modules() if "forward" in vars(module)}
    yield
    for module, forward in replaced.items():
        module.forward = forward


def shortened(model: PreTrainedModel) -> tuple[PreTrainedModel, dict[str, int]]:
    return model, shorten_decode_step(model, find_blocks(model)[1])


def error(model: PreTrainedModel, ids: Tensor) -> float:
    """Relative difference of the logits from those of the modules' own forward passes."""
    with torch.no_grad():
        found = model(ids, use_cache=False).logits.float()
        with as_it_was(model):
            expected = model(ids, use_cache=False).logits.float()
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("name", architectures.ARCHITECTURES)
def test_every_architecture(name):
    try:
        model, found = shortened(architectures.build(name).eval())
    except ValueError as refused:
        pytest.skip(str(refused))
    assert (found["routers"] > 0) >= (name in ROUTERS)
    assert error(model, tokens(FEW)) < 2e-5


@pytest.mark.parametrize("normalised", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sigmoid_scores_with_a_correction_and_a_scale(dtype, normalised):
    torch.manual_seed(0)
    config = Glm4MoeConfig(**GLM | {"norm_topk_prob": normalised})
    model = AutoModelForCausalLM.from_config(config).eval()
    router = model.model.layers[0].mlp.gate
    for layer in model.model.layers:
        layer.mlp.gate.weight.data.normal_(std=0.5)
        layer.mlp.gate.e_score_correction_bias.uniform_(-0.3, 0.3)
    model, found = shortened(model.to(dtype))
    assert found["routers"] == 2
    x = torch.randn(FEW, 64, generator=torch.Generator().manual_seed(1)).to(dtype)
    with torch.no_grad():
        logits, weights, ids = router(x)
        with as_it_was(model):
            own_logits, own_weights, own_ids = router(x)
    assert (logits.dtype, weights.dtype) == (own_logits.dtype, own_weights.dtype)
    assert torch.equal(ids.sort(-1).values, own_ids.sort(-1).values)
    order, own_order = ids.argsort(-1), own_ids.argsort(-1)
    torch.testing.assert_close(weights.gather(1, order), own_weights.gather(1, own_order), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(logits, own_logits, rtol=1e-4, atol=1e-5)


def test_equal_logits_go_to_the_lower_id():
    torch.manual_seed(0)
    model = architectures.build("mixtral").eval()
    router = model.model.layers[0].mlp.gate
    shortened(model)
    router.weight.data[:] = router.weight.data[:1]
    with torch.no_grad():
        _, weights, ids = router(torch.randn(2, router.weight.shape[1]))
    assert ids.tolist() == [[0, 1]] * 2
    torch.testing.assert_close(weights, torch.full((2, 2), 0.5))


@pytest.mark.parametrize("change", [{"top_k": 1}, {"norm_topk_prob": False}, {"norm_topk_prob": False, "top_k": 4}])
def test_a_router_whose_options_change_later_follows_them(change):
    model, found = shortened(architectures.build("qwen3_moe").eval())
    assert found["routers"]
    with torch.no_grad():
        before = model(tokens(FEW), use_cache=False).logits
    for layer in model.model.layers:
        for name, value in change.items():
            assert getattr(layer.mlp.gate, name) != value
            setattr(layer.mlp.gate, name, value)
    assert error(model, tokens(FEW)) < 2e-5
    with torch.no_grad():
        assert (model(tokens(FEW), use_cache=False).logits - before).abs().max() > 1e-2


@torch.no_grad()
def test_another_dtype_than_the_one_of_loading():
    """The roundings that were found for bfloat16 are not those of float32."""
    model, found = shortened(architectures.build("qwen3_moe").to(torch.bfloat16).eval())
    assert found["routers"]
    assert error(model.float(), tokens(FEW)) < 2e-5


def test_a_packed_model(fitted):
    """Loading does it; the model copies and pickles, and its gradients and long texts go the modules' own way."""
    model = load(fitted("qwen2_moe"))
    kinds = {module.forward.args[2].__name__ for module in model.modules() if "forward" in vars(module)}
    assert {"_norm", "_route"} <= kinds
    assert error(model, tokens(FEW)) < 2e-5
    assert error(model, tokens(FEW + 1)) < 2e-5
    twin = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    with torch.no_grad():
        torch.testing.assert_close(twin(tokens(3)).logits, model(tokens(3)).logits, rtol=1e-5, atol=1e-5)
    assert all(module.forward.args[0] is module for module in twin.modules() if "forward" in vars(module))
    norm = next(module for module in model.modules() if type(module).__name__.endswith("RMSNorm"))
    x = torch.randn(1, 2, len(norm.weight), requires_grad=True)
    norm(x).sum().backward()
    assert x.grad is not None and x.grad.any()
    with torch.no_grad():  # however it is called
        torch.testing.assert_close(norm(hidden_states=x), norm(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("int8", [True, False])
def test_a_gated_mlp_in_one_call(dtype, int8):
    """Against its three linears one after another; a watched linear is not skipped."""
    torch.manual_seed(0)
    model = architectures.build("qwen2_moe").eval().to(dtype)
    blocks = find_blocks(model)[1]
    weights = {
        f"{block.name}.{name}.weight": round_to_nearest(block.linear(name).weight.data.float(), Grid(3, 32))
        for block in blocks
        for name, part in block.linears.items()
        if part == "shared"
    }
    with packed_in_place(model, weights):
        set_activations(model, "int8" if int8 else "exact")
        found = shorten_decode_step(model, blocks)
        assert found["MLPs"] == 3
        mlp = model.model.layers[0].mlp.shared_expert
        x = torch.randn(3, 64, generator=torch.Generator().manual_seed(1)).to(dtype)
        with torch.no_grad():
            short, seen = mlp(x), []
            handle = mlp.up_proj.register_forward_hook(lambda *_: seen.append(1))
            expected = mlp(x)
            handle.remove()
        assert seen
        tolerance = 0.02 if dtype == torch.bfloat16 or int8 else 1e-5
        assert float((short.float() - expected.float()).norm() / expected.float().norm()) < tolerance


class Wrapper(nn.Module):
    """An adapter around a linear, with the attributes of one."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base

    @property
    def weight(self) -> nn.Module:
        return self.base.weight

    def forward(self, x: Tensor) -> Tensor:
        return 2 * self.base(x)


@torch.no_grad()
@pytest.mark.parametrize("watched", ["wrapper", "forward", "hook of the activation", "hook of all"])
def test_a_changed_child_of_a_gated_mlp_is_heard(watched, fitted):
    model = load(fitted("qwen2_moe"))
    mlp = model.model.layers[0].mlp.shared_expert
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(1))
    before, up = mlp(x), mlp.up_proj
    match watched:
        case "wrapper":
            model.set_submodule("model.layers.0.mlp.shared_expert.up_proj", Wrapper(up))
        case "forward":
            up.forward = lambda x: 2 * type(up).forward(up, x)
        case "hook of the activation":
            handle = mlp.act_fn.register_forward_hook(lambda module, args, output: 2 * output)
        case _:
            double = lambda module, args, output: 2 * output if module is up else None  # noqa: E731
            handle = torch.nn.modules.module.register_module_forward_hook(double)
    torch.testing.assert_close(mlp(x), 2 * before, rtol=1e-4, atol=1e-5)
    if watched.startswith("hook"):
        handle.remove()
        torch.testing.assert_close(mlp(x), before)


class Limited(nn.Module):
    """A gated MLP with a limit that small inputs do not reach."""

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj, self.act_fn = (
            mlp.gate_proj,
            mlp.up_proj,
            mlp.down_proj,
            mlp.act_fn,
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)).clamp(max=7.0) * self.up_proj(x))


def test_what_only_large_inputs_show_is_seen(fitted):
    """A limit of an MLP, a soft cap of a router's logits, one norm of several that is none."""
    model = load(fitted("qwen2_moe"))
    blocks = find_blocks(model)[1]
    with as_it_was(model):
        first, second = (layer.mlp for layer in model.model.layers[:2])
        first.shared_expert = Limited(first.shared_expert)
        plain, norm = type(second.gate).forward, model.model.layers[0].input_layernorm
        second.gate.forward = lambda hidden: (
            20 * torch.tanh(plain(second.gate, hidden)[0] / 20),
            *plain(second.gate, hidden)[1:],
        )
        norm.forward = lambda x: type(norm).forward(norm, x).clamp(max=3.0)
        found = shorten_decode_step(model, blocks)
        for module in (first.shared_expert, second.gate, norm):
            assert not isinstance(vars(module).get("forward"), partial)
        assert (
            found["MLPs"] == len(blocks) - 1
            and found["routers"] == len(blocks) - 1
            and found["norms"] == 2 * len(blocks)
        )
