"""Models as blocks, for every family: blocks run one by one are the model, and forced experts are those that run."""

import architectures
import pytest
import tiny_models
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, GptOssConfig

from eacmoe_lightning.job.trained import TrainedParts
from eacmoe_lightning.models.block import Block
from eacmoe_lightning.models.checkpoint import Checkpoint
from eacmoe_lightning.models.moe import MoEModel
from eacmoe_lightning.models.originals import BUNDLED, load_original
from eacmoe_lightning.models.streamed import StreamedModel
from eacmoe_lightning.planning.checks import check_original, warn_of_guessing
from eacmoe_lightning.routers.router_weights import forced_weights
from eacmoe_lightning.run.directory import RunDirectory
from eacmoe_lightning.text.windows import read_windows

ATTENTION = {f"self_attn.{name}_proj" for name in "qkvo"}
SHARED = {  # by family and block
    "qwen2_moe": [{f"mlp.shared_expert.{name}_proj" for name in ("gate", "up", "down")}] * 3,
    "deepseek": [{f"mlp.{name}_proj" for name in ("gate", "up", "down")}]  # the dense first block
    + [{f"mlp.shared_experts.{name}_proj" for name in ("gate", "up", "down")}] * 2,
}
ROUTERS = {"phimoe": "mlp.router"}  # mlp.gate elsewhere
TOP_K = {"deepseek": 3}  # 2 elsewhere

families = pytest.mark.parametrize("family", tiny_models.MOE_FAMILIES)


@pytest.fixture(scope="module")
def ids() -> Tensor:
    return torch.randint(0, tiny_models.VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(0))


def other_experts(selected: Tensor, num_experts: int) -> Tensor:
    """[N, K] distinct random experts, which for most tokens are not the selected ones."""
    scores = torch.rand(len(selected), num_experts, generator=torch.Generator().manual_seed(1))
    return scores.topk(selected.shape[1]).indices


@families
@torch.no_grad()
def test_block_by_block_gives_the_logits_of_the_model(family, ids):
    model = tiny_models.build(family)
    moe = MoEModel(model)
    state = None
    for block in moe.blocks:
        state, routing = block.forward(moe.call(block.index, ids, state))
        assert (routing is None) == (not block.is_moe)
    assert torch.equal(moe.head(state, ids), model(ids, use_cache=False).logits)
    assert torch.equal(model(ids, use_cache=False).logits, tiny_models.build(family)(ids).logits)  # no hook stays


@families
@torch.no_grad()
def test_routing_is_what_the_model_reports(family, ids):
    tiny_models.skip_without_router_logits(family)
    model = tiny_models.build(family)
    moe = MoEModel(model)
    state = None
    reported = list(model(ids, output_router_logits=True, use_cache=False).router_logits)
    for block in moe.blocks:
        call = moe.call(block.index, ids, state)
        output, routing = block.forward(call)
        if block.is_moe:
            x = block.router_input(call)
            assert x.shape == (48, 64) and routing.logits.dtype == torch.float32
            logits = reported.pop(0)
            torch.testing.assert_close(routing.logits, logits.float(), rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(block.router_logits(x), logits.float(), rtol=1e-5, atol=1e-5)
            repeated = block.route(x)
            assert torch.equal(repeated.ids, routing.ids) and torch.equal(repeated.weights, routing.weights)
            expected = logits.topk(TOP_K.get(family, 2)).indices
            assert torch.equal(routing.ids.sort().values, expected.sort().values)
        state = output
    assert not reported


@families
def test_router_logits_take_another_weight(family, ids):
    block = MoEModel(tiny_models.build(family)).moe_blocks[0]
    x, weight = torch.randn(5, 64), torch.randn(8, 64)
    torch.testing.assert_close(block.router_logits(x, weight), x @ weight.T)
    assert block.router_weight.shape == (8, 64)


@families
@torch.no_grad()
def test_forcing_the_choice_of_the_router_changes_nothing(family, ids):
    moe = MoEModel(tiny_models.build(family))
    state = None
    for block in moe.blocks:
        call = moe.call(block.index, ids, state)
        output, routing = block.forward(call)
        if block.is_moe:
            forced, same = block.forward(call, routing.ids)
            torch.testing.assert_close(forced, output, rtol=0, atol=1e-5)
            torch.testing.assert_close(same.weights, routing.weights, rtol=0, atol=1e-5)
        state = output


def by_hand(block: Block, x: Tensor, forced: Tensor, weights: Tensor) -> Tensor:
    """The routed experts' output [N, D], one token and one expert at a time."""
    experts, result = block.experts.module, torch.zeros_like(x)
    for token in range(len(x)):
        for expert, weight in zip(forced[token].tolist(), weights[token], strict=True):
            gate, up = (experts.gate_up_proj[expert] @ x[token]).chunk(2)
            result[token] += weight * (experts.down_proj[expert] @ (F.silu(gate) * up))
    return result


@pytest.mark.parametrize(
    "family, normalised",
    [("qwen3_moe", True), ("qwen3_moe", False), ("mixtral", True), ("qwen2_moe", False), ("deepseek", False)],
)
@torch.no_grad()
def test_forced_experts_are_run_with_the_weights_that_the_router_s_scores_give_them(family, normalised, ids):
    moe = MoEModel(tiny_models.build(family))
    block = moe.blocks[1]
    call = moe.call(1, ids, moe.embed(ids))
    if family == "qwen3_moe":
        block.router.norm_topk_prob = normalised
    plain, routing = block.forward(call)
    forced = other_experts(routing.ids, 8)
    x = block.router_input(call)
    scores = (x @ block.router_weight.T).softmax(-1)
    before, after = scores.gather(1, routing.ids), scores.gather(1, forced)
    if normalised:
        before, after = before / before.sum(-1, keepdim=True), after / after.sum(-1, keepdim=True)
    torch.testing.assert_close(routing.weights, before, rtol=1e-4, atol=1e-6)
    output, forced_routing = block.forward(call, forced)
    assert torch.equal(forced_routing.ids, forced)
    torch.testing.assert_close(forced_routing.weights, after, rtol=1e-4, atol=1e-6)
    # all other parts of the block are equal
    difference = by_hand(block, x, forced, after) - by_hand(block, x, routing.ids, before)
    torch.testing.assert_close(output - plain, difference.view_as(plain), rtol=1e-3, atol=2e-5)
    assert difference.abs().mean() > 1e-3


@torch.no_grad()
def test_phimoe_forced_to_its_second_choice_first(ids):
    """PhiMoE's weights depend on the order: each is a softmax over the near-maximal logits of the remaining experts."""
    moe = MoEModel(tiny_models.build("phimoe"))
    block = moe.blocks[0]
    logits = torch.tensor([[2.0, 1.99, 0.5, 0, 0, 0, 0, 0]])
    block.router.weight.copy_(torch.eye(8, 64))
    x = torch.cat([logits, torch.zeros(1, 56)], 1)
    routing = block.route(x)
    near = torch.tensor([2.0, 1.99]).softmax(0)
    torch.testing.assert_close(routing.weights, torch.tensor([[near[0], 1.0]]))

    def forced(*experts: int) -> Tensor:
        return forced_weights(block.router, routing.logits, routing.weights, routing.ids, torch.tensor([experts]))

    torch.testing.assert_close(forced(0, 1), routing.weights)
    torch.testing.assert_close(forced(1, 0), torch.tensor([[near[1], 1.0]]))
    # expert 2 is far from the maximum of the remaining experts, 1.99, but counts because it is forced
    torch.testing.assert_close(forced(0, 2)[0, 1], torch.tensor([1.99, 0.5]).softmax(0)[1])


@torch.no_grad()
@pytest.mark.parametrize("name", ["deepseek_v4", "gemma4_text"])
def test_routers_with_weights_of_their_own_kind_can_be_forced(name, ids):
    """DeepSeek-V4: normalised square roots of softplus. Gemma 4: a softmax, times a factor of each expert."""
    moe = MoEModel(architectures.build(name))
    block, state = moe.moe_blocks[0], None
    if name == "gemma4_text":
        block.router.per_expert_scale.copy_(torch.linspace(0.5, 2, 8))
    _, routing = block.forward(moe.call(block.index, ids, state))
    logits, forced = routing.logits.float(), (routing.ids + 1) % 8
    weights = forced_weights(block.router, logits, routing.weights, routing.ids, forced)
    if name == "gemma4_text":
        expected = logits.gather(1, forced).softmax(-1) * block.router.per_expert_scale[forced]
    else:
        scores = torch.nn.functional.softplus(logits).sqrt().gather(1, forced)
        expected = scores / scores.sum(-1, keepdim=True) * block.router.routed_scaling_factor
    torch.testing.assert_close(weights.float(), expected, rtol=1e-4, atol=1e-6)


@families
def test_parts_are_recognized(family):
    moe = MoEModel(tiny_models.build(family))
    assert moe.top_k == TOP_K.get(family, 2) and moe.num_experts == 8
    assert [block.is_moe for block in moe.blocks] == [family != "deepseek", True, True]
    for block in moe.blocks:
        assert block.name == f"model.layers.{block.index}"
        assert {name for name, part in block.linears.items() if part == "attention"} == ATTENTION
        shared = {name for name, part in block.linears.items() if part == "shared"}
        assert shared == SHARED.get(family, [set()] * 3)[block.index]
        if block.is_moe:
            assert (block.router_name, block.experts_name) == (ROUTERS.get(family, "mlp.gate"), "mlp.experts")
            assert block.router_parameter_name == f"{block.name}.{ROUTERS.get(family, 'mlp.gate')}.weight"


@families
def test_all_that_is_not_quantized_is_embedding_router_norm_or_bias(family):
    moe = MoEModel(tiny_models.build(family))
    quantized = {name for block in moe.blocks for name in block.weights()}
    parameters = dict(moe.model.named_parameters())
    assert quantized <= parameters.keys()
    left = {name for name, p in parameters.items() if name not in quantized and p.ndim > 1}
    routers = {block.router_parameter_name for block in moe.moe_blocks}
    shared_gates = (
        {f"model.layers.{i}.mlp.shared_expert_gate.weight" for i in range(3)} if family == "qwen2_moe" else set()
    )
    head = set() if family == "qwen3_moe" else {"lm_head.weight"}  # tied
    assert left == routers | shared_gates | head | {"model.embed_tokens.weight"}
    norms = {name for name, _ in moe.norms()}
    assert norms == {name for name, p in parameters.items() if p.ndim == 1 and "norm" in name}


def test_what_norms_add_to_their_weights():
    moe = MoEModel(architectures.build("qwen3_next"))
    offsets = {name: moe.norm_offset(name) for name, _ in moe.norms()}
    gated = [name for name in offsets if ".linear_attn.norm." in name]  # reads a gate, and has its weight alone
    assert gated and all(offsets[name] == 0 for name in gated)
    assert all(offset == pytest.approx(1, rel=1e-3) for name, offset in offsets.items() if name not in gated)
    for family in ("qwen3_moe", "phimoe", "cohere2_moe"):  # plain, with biases, with a mean
        moe = MoEModel(architectures.build(family))
        assert {moe.norm_offset(name) for name, _ in moe.norms()} == {0.0}


def test_the_unit_of_a_norms_rate_is_what_it_multiplies_by(tmp_path):
    model = architectures.build("qwen3_next")
    name = "model.layers.0.input_layernorm.weight"
    model.get_parameter(name).data.zero_()  # as models of this kind begin
    model.save_pretrained(tmp_path / "model")
    parts = TrainedParts(StreamedModel(Checkpoint(str(tmp_path / "model"))), RunDirectory(tmp_path / "run"), True)
    units = {group["name"]: group["rms"] for group in parts.optimizer_groups()}
    assert units[f"norm {name}"] == pytest.approx(1, rel=1e-3)
    gated = model.get_parameter("model.layers.0.linear_attn.norm.weight")
    assert units["norm model.layers.0.linear_attn.norm.weight"] == pytest.approx(
        float(gated.data.square().mean().sqrt())
    )


@families
@torch.no_grad()
def test_linears_that_share_their_input_are_grouped_in_the_order_of_the_run(family, ids):
    moe = MoEModel(tiny_models.build(family))
    state = None
    for block in moe.blocks:
        call = moe.call(block.index, ids, state)
        groups = block.input_groups(call)
        assert [sorted(group) for group in groups[:2]] == [
            sorted(ATTENTION - {"self_attn.o_proj"}),
            ["self_attn.o_proj"],
        ]
        shared = SHARED.get(family, [set()] * 3)[block.index]
        shared_groups = [sorted(name for name in group) for group in groups[2:]]
        down = {name for name in shared if "down" in name}
        assert shared_groups == ([sorted(shared - down), sorted(down)] if shared else [])
        state = block.forward(call)[0]


@pytest.mark.parametrize("family", SHARED)
@torch.no_grad()
def test_inputs_of_shared_experts_do_not_depend_on_routed_ones(family, ids):
    moe = MoEModel(tiny_models.build(family))
    block = moe.blocks[-1]
    call = moe.call(block.index, ids, moe.embed(ids))
    for name in SHARED[family][-1]:
        assert not block.depends_on_experts(block.linear(name), call)
    ran = []
    handle = block.experts.module.register_forward_hook(lambda *_: ran.append(1))
    expected = block.input_of(block.linear(name), call)
    assert len(ran) == (family == "deepseek")  # its routed experts run first
    with block.without_experts():
        assert torch.equal(block.input_of(block.linear(name), call), expected)
    handle.remove()
    assert block.forward(call)[0].isfinite().all() and "forward" not in vars(block.experts.module)


@torch.no_grad()
def test_a_shared_expert_after_the_routed_ones_is_noticed(ids):
    moe, outputs = MoEModel(tiny_models.build("deepseek")), []
    block = moe.blocks[-1]
    call = moe.call(block.index, ids, moe.embed(ids))
    block.experts.module.register_forward_hook(lambda module, args, output: outputs.append(output))
    shared = block.layer.mlp.shared_experts
    shared.register_forward_pre_hook(lambda module, args: (args[0] + outputs[-1].view_as(args[0]),))
    assert block.depends_on_experts(shared.up_proj, call)


@pytest.mark.parametrize("family", [*tiny_models.MOE_FAMILIES, "gpt_oss"])
@torch.no_grad()
def test_expert_views_and_intermediate_are_what_the_experts_compute(family, ids):
    """`intermediate`, then `down_proj`, for single experts; gpt_oss stores transposed weights and biases."""
    if family == "gpt_oss":
        config = GptOssConfig(
            vocab_size=4096, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
            head_dim=16, num_key_value_heads=2, num_local_experts=8, num_experts_per_tok=2,
            layer_types=["full_attention"] * 2,
        )  # fmt: skip
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    else:
        model = tiny_models.build(family)
    block = MoEModel(model).moe_blocks[0]
    x = torch.randn(6, 64, generator=torch.Generator().manual_seed(2))
    up, down = block.experts.projections
    assert block.experts.weight(down).shape == (8, 64, 96 if family == "gpt_oss" else 64)
    for expert in (0, 7):
        chosen, weights = torch.full((6, 1), expert), torch.ones(6, 1)
        inner = block.experts.intermediate(x, expert)
        ours = F.linear(inner, block.experts.weight(down)[expert], block.experts.bias(down, expert))
        torch.testing.assert_close(ours, block.experts.module(x, chosen, weights), rtol=1e-4, atol=1e-5)
    before = block.experts.module.down_proj.clone()
    block.experts.weight(down)[3] = 0  # a view: it writes through
    after = block.experts.module.down_proj
    assert (after[3] == 0).all() and torch.equal(after[2], before[2])


def test_a_dense_model_is_refused():
    with pytest.raises(ValueError, match="'llama' has no routed experts in any of its 3 blocks.*--model.name_or_path"):
        MoEModel(tiny_models.build("llama"))


@families
def test_a_damaged_weight_is_named(family, ids, tmp_path):
    model = tiny_models.build(family)
    model.save_pretrained(tmp_path)
    check_original(StreamedModel(Checkpoint(str(tmp_path))), ids)
    name, parameter = list(model.named_parameters())[4]
    parameter.data.view(-1)[7] = float("nan")
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError) as error:
        check_original(StreamedModel(Checkpoint(str(tmp_path))), ids)
    assert name in str(error.value) and "NaN" in str(error.value)


def test_a_model_that_predicts_worse_than_guessing_is_warned_of(caplog):
    moe = StreamedModel(Checkpoint(str(BUNDLED)))
    window = read_windows("bundled:calibration", BUNDLED, 1, 128)
    warn_of_guessing(moe, window, check_original(moe, window))
    assert not caplog.records
    other = (window + 1) % moe.config.vocab_size  # as a tokenizer that begins elsewhere would number them
    warn_of_guessing(moe, other, check_original(moe, other))
    assert "worse than by guessing" in caplog.text


def test_load_original_gives_eval_mode_and_the_requested_dtype(tiny_model_dir):
    model = load_original(str(tiny_model_dir("phimoe")), "bfloat16")
    assert not model.training and model.dtype == torch.bfloat16
    assert load_original(str(tiny_model_dir("phimoe"))).dtype == torch.float32  # as stored


def test_a_model_that_cannot_be_loaded_is_named_with_its_option(tmp_path):
    for path in (tmp_path, "/no/such/model", "nobody/nothing"):
        with pytest.raises(FileNotFoundError) as error:
            load_original(str(path))
        assert repr(str(path)) in str(error.value) and "--model.name_or_path" in str(error.value)
