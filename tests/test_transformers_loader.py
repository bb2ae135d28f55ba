"""What the package takes from inside transformers is the same in every version: these tests run on the oldest too."""

import copy

import pytest
import tiny_models
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    DeepseekV2Config,
    DeepseekV3Config,
    Dots1Config,
    Glm4MoeConfig,
    HunYuanMoEV1Config,
    JambaConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from eacmoe_lightning.models import transformers_loader as loader
from eacmoe_lightning.models import transformers_modules as modules
from eacmoe_lightning.models.block import Block
from eacmoe_lightning.models.moe import MoEModel

SMALL = {
    "vocab_size": 128,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "pad_token_id": 0,
    "initializer_range": 0.1,
}
LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}
SPARSE = {"moe_intermediate_size": 16, "n_routed_experts": 8, "num_experts_per_tok": 2, "first_k_dense_replace": 1}
CONFIGS: dict[str, PreTrainedConfig] = {  # whose experts were chosen beside the router before transformers 5.13
    "deepseek_v2": DeepseekV2Config(**SMALL | LATENT, **SPARSE, n_shared_experts=1, topk_method="greedy"),
    "deepseek_v3": DeepseekV3Config(**SMALL | LATENT, **SPARSE, n_group=2, topk_group=1),
    "dots1": Dots1Config(**SMALL, **SPARSE, n_shared_experts=1, n_group=1, topk_group=1),
    "glm4_moe": Glm4MoeConfig(**SMALL, **SPARSE, head_dim=8, n_group=1, topk_group=1),
    "hunyuan_v1_moe": HunYuanMoEV1Config(**SMALL, head_dim=8, num_experts=4, moe_topk=2),
    "jamba": JambaConfig(**SMALL, num_experts=4, num_experts_per_tok=2, expert_layer_period=2, expert_layer_offset=1,
                         attn_layer_period=2, attn_layer_offset=1, mamba_d_state=8, use_mamba_kernels=False),
}  # fmt: skip


def build(kind: str) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(CONFIGS[kind], dtype=torch.float32)
        for name, buffer in model.named_buffers():
            if "correction" in name:
                buffer.normal_(std=0.1)
    return model.eval()


@pytest.fixture(scope="module")
def ids() -> Tensor:
    return torch.randint(1, 128, (2, 24), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", CONFIGS)
@torch.no_grad()
def test_a_router_selects_the_experts_of_its_block(kind, ids):
    expected = build(kind)(ids, use_cache=False).logits  # of a model that the adapter has not seen
    model = build(kind)
    moe = MoEModel(model)
    assert torch.equal(model(ids, use_cache=False).logits, expected)
    assert torch.equal(moe.logits(ids), expected)
    block, seen = moe.moe_blocks[0], []
    handle = block.router.register_forward_hook(lambda module, args, output: seen.append((args[0], *output)))
    model(ids, use_cache=False)
    handle.remove()
    ((hidden, logits, weights, chosen),) = seen
    assert logits.shape == (48, block.num_experts) and weights.shape == chosen.shape == (48, moe.top_k)
    torch.testing.assert_close(block.router_logits(hidden.reshape(48, -1)), logits.float())
    routing = block.route(hidden.reshape(48, -1))
    assert torch.equal(routing.ids, chosen) and torch.equal(routing.weights, weights)


@pytest.mark.parametrize("kind", CONFIGS)
@torch.no_grad()
def test_what_a_hook_makes_of_the_selection_is_run(kind, ids):
    def run(block: Block, experts: list[int], model: PreTrainedModel) -> Tensor:
        def choose(module, args, output):
            logits, weights, _ = output
            return logits, torch.full_like(weights, 0.5), torch.tensor(experts).expand(len(logits), 2)

        handle = block.router.register_forward_hook(choose)
        logits = model(ids, use_cache=False).logits
        handle.remove()
        return logits

    model = build(kind)
    block = MoEModel(model).moe_blocks[0]
    first, other = run(block, [0, 1], model), run(block, [2, 3], model)
    assert not torch.equal(first, other)
    for name in block.experts.projections:  # the experts 2 and 3 become what 0 and 1 are
        weight = block.experts.weight(name)
        weight[2:4] = weight[0:2].clone()
    torch.testing.assert_close(run(block, [2, 3], model), first)


@pytest.mark.parametrize("kind", CONFIGS)
@torch.no_grad()
def test_a_copy_of_a_model_routes_by_its_own_weights(kind, ids):
    model = build(kind)
    MoEModel(model)
    before = model(ids, use_cache=False).logits
    changed = copy.deepcopy(model)
    for block in MoEModel(changed).moe_blocks:
        block.router_weight.neg_()
    assert torch.equal(model(ids, use_cache=False).logits, before)
    assert not torch.equal(changed(ids, use_cache=False).logits, before)


@pytest.mark.parametrize("skipped", [[], [(0, 1)], [(0, 0), (0, 1), (2, 0)], "all"])
@torch.no_grad()
def test_eager_experts_skip_pairs_with_the_id_behind_the_last(skipped):
    experts = MoEModel(tiny_models.build("mixtral")).moe_blocks[0].experts
    generator = torch.Generator().manual_seed(0)
    x, weights = torch.randn(3, 64, generator=generator), torch.rand(3, 2, generator=generator)
    ids = torch.tensor([[0, 5], [3, 1], [7, 5]])
    for token, choice in [(t, k) for t in range(3) for k in range(2)] if skipped == "all" else skipped:
        ids[token, choice] = 8
    expected = torch.zeros(3, 64)
    for token in range(3):
        for expert, weight in zip(ids[token].tolist(), weights[token], strict=True):
            if expert < 8:
                expected[token] += weight * experts.output(x[token : token + 1], expert)[0]
    got = modules.eager_experts(experts.module, x, ids, weights)
    torch.testing.assert_close(got, expected)
    for implementation in ("grouped_mm", "batched_mm"):
        got = modules.run_experts(implementation, experts.module, x, ids, weights)
        torch.testing.assert_close(got, expected)


@torch.no_grad()
def test_a_cache_is_known_by_both_its_names(ids):
    cache = tiny_models.build("mixtral")(ids)[modules.CACHE]
    assert cache.get_seq_length() == 24
    assert modules.cache_of({modules.CACHE: cache}) is cache
    assert modules.cache_of({"past_key_values": cache}) is cache
    assert modules.cache_of({modules.CACHE: None}) is None


@pytest.mark.parametrize("columns", [1, 3])
def test_a_stack_under_its_original_names_is_one_matrix_an_expert(columns):
    model = tiny_models.build("mixtral")
    stack = torch.arange(8 * 128 * columns).view(8, 128, columns)
    got = loader.original_names(model, {"model.layers.1.mlp.experts.gate_up_proj": stack})
    name = "model.layers.1.block_sparse_moe.experts.{}.{}.weight"
    assert got.keys() == {name.format(expert, w) for expert in range(8) for w in ("w1", "w3")}
    for expert in range(8):
        assert torch.equal(got[name.format(expert, "w1")], stack[expert, :64])
        assert torch.equal(got[name.format(expert, "w3")], stack[expert, 64:])
