"""A model taken apart must be the model: what the check at the start of a job refuses, and forms from outside."""

from types import SimpleNamespace

import pytest
import tiny_models
import torch
from torch import Tensor, nn

from eacmoe_lightning.evaluation.evaluate import evaluate
from eacmoe_lightning.models import forms
from eacmoe_lightning.models.moe import MoEModel
from eacmoe_lightning.models.self_check import check_parts
from eacmoe_lightning.planning.checks import check_original, leave_unpackable

IDS = torch.randint(0, tiny_models.VOCABULARY, (1, 24), generator=torch.Generator().manual_seed(0))
families = pytest.mark.parametrize("family", tiny_models.MOE_FAMILIES)


@families
def test_models_in_the_common_form_pass(family):
    model = tiny_models.build(family)
    expected = model(IDS, use_cache=False).logits
    check_parts(MoEModel(model), IDS)
    assert torch.equal(model(IDS, use_cache=False).logits, expected)  # nothing stays replaced


@families
def test_a_config_that_asks_for_more_outputs_changes_nothing(family):
    """Fine-tuned models often ask for their routers' logits, which blocks that are replaced do not record."""
    model = tiny_models.build(family)
    expected = model(IDS, use_cache=False).logits
    asked = {"output_router_logits": True, "output_hidden_states": True, "return_dict": False}
    for name, value in asked.items():
        setattr(model.config, name, value)
    moe = MoEModel(model)
    check_parts(moe, IDS)
    assert torch.equal(moe.logits(IDS), expected)
    assert {name: getattr(model.config, name) for name in asked} == asked  # a user's model stays as it was


def test_a_head_that_does_more_is_part_of_the_model():
    model = tiny_models.build("mixtral")
    forward = type(model).forward

    def scaled(*args, **kwargs):
        output = forward(model, *args, **kwargs)
        output.logits = output.logits / 6
        return output

    model.forward = scaled
    moe = MoEModel(model)
    check_parts(moe, IDS)
    with torch.no_grad():
        assert torch.equal(moe.logits(IDS), model(IDS, use_cache=False).logits)


def test_a_loop_that_keeps_more_than_blocks_hand_over_is_refused():
    """The model adds the output of block 0 to what block 2 receives, which no block hands over."""
    model, seen = tiny_models.build("mixtral"), {}
    layers = model.model.layers
    layers[1].register_forward_pre_hook(lambda layer, args: seen.update(hidden=args[0]))
    layers[2].register_forward_pre_hook(lambda layer, args: (args[0] + seen["hidden"], *args[1:]))
    with pytest.raises(ValueError, match=r"model\.layers\.2: its .* differs from the model's own forward pass by"):
        check_parts(MoEModel(model), IDS)


def test_experts_that_are_misread_are_refused():
    model = tiny_models.build("mixtral")
    experts = model.model.layers[1].mlp.experts
    forward = type(experts).forward
    experts.forward = lambda hidden, ids, weights: 2 * forward(experts, hidden, ids, weights)
    type_forward = type(experts).forward
    try:
        type(experts).forward = lambda self, *args: 2 * type_forward(self, *args)
        del experts.forward
        with pytest.raises(ValueError, match=r"model\.layers\.0: its experts, one by one"):
            check_parts(MoEModel(model), IDS)
    finally:
        type(experts).forward = type_forward


@pytest.mark.parametrize("of_run", [1, 2])  # the model's own, and that as a part
def test_a_difference_that_does_not_come_again_is_a_warning(of_run, caplog):
    model = tiny_models.build("mixtral")
    runs = []

    def disturb(module: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
        runs.append(module)
        return output * 1.0001 if len(runs) == of_run else None

    model.model.layers[1].mlp.register_forward_hook(disturb)
    check_original(MoEModel(model), IDS)
    assert "the model agrees with its own forward pass only when both run again" in caplog.text
    assert "model.layers.1: its output differs" in caplog.text


def test_what_all_blocks_are_given_is_computed_again_too(caplog):
    model = tiny_models.build("mixtral")
    runs = []

    def disturb(module: nn.Module, args: tuple, output: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor] | None:
        runs.append(module)
        return tuple(1.01 * part for part in output) if len(runs) == 1 else None

    model.model.rotary_emb.register_forward_hook(disturb)
    check_original(MoEModel(model), IDS)
    assert "model.layers.0: its output differs" in caplog.text


class OtherMoE(nn.Module):
    """Mixtral's MoE block with a router that gives (ids, weights) and experts that are called with them swapped."""

    def __init__(self, moe: nn.Module) -> None:
        super().__init__()
        self.gate, self.experts = moe.gate, moe.experts
        self.scale = 1.0

    def forward(self, hidden: Tensor) -> Tensor:
        flat = hidden.reshape(-1, hidden.shape[-1])
        values, ids = nn.functional.linear(flat, self.gate.weight).softmax(-1).topk(2)
        return self.experts(flat, ids, values).view(hidden.shape)


def other_model() -> nn.Module:
    model = tiny_models.build("mixtral")
    for layer in model.model.layers:
        layer.mlp = OtherMoE(layer.mlp)
    return model


def form_of(scale: float):
    def form(moe: nn.Module) -> None:
        def router(hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            logits = nn.functional.linear(hidden, moe.gate.weight)
            values, ids = logits.softmax(-1).topk(2)
            return logits, values * scale, ids

        def forward(hidden: Tensor) -> Tensor:
            flat = hidden.reshape(-1, hidden.shape[-1])
            _, values, ids = moe.gate(flat)
            return moe.experts(flat, ids, values).view(hidden.shape)

        moe.gate.forward, moe.forward = router, forward

    return form


@pytest.fixture
def plugin(monkeypatch):
    """`plugin(form)`: an installed package that registers the form for `OtherMoE` when it is imported."""

    def install(form) -> None:
        entry = SimpleNamespace(load=lambda: forms.register_form("OtherMoE")(form))
        monkeypatch.setattr(forms, "entry_points", lambda group: [entry] if group == "eacmoe_lightning.models" else [])
        forms.load_plugins.cache_clear()

    yield install
    forms.FORMS.pop("OtherMoE", None)
    forms.load_plugins.cache_clear()


def test_a_form_from_outside_brings_a_model_in(plugin):
    with pytest.raises(ValueError, match="the block does not call its router"):
        check_parts(MoEModel(other_model()), IDS)
    plugin(form_of(1.0))
    model = other_model()
    moe = MoEModel(model)
    check_parts(moe, IDS)
    with torch.no_grad():
        assert torch.equal(moe.logits(IDS), model(IDS, use_cache=False).logits)


def test_a_form_that_changes_the_model_is_refused(plugin):
    plugin(form_of(1.1))
    with pytest.raises(ValueError, match=r"model\.layers\.0: its output differs .*CONTRIBUTING.md says how"):
        check_parts(MoEModel(other_model()), IDS)


def test_a_layer_whose_weight_is_read_stays_unquantized():
    """The attention of block 1 computes with the weight of a layer outside of that layer."""
    model = tiny_models.build("mixtral")
    attention = model.model.layers[1].self_attn

    def reads(*args, **kwargs):
        out, weights = type(attention).forward(attention, *args, **kwargs)
        return out + 0 * attention.q_proj.weight.square().sum(), weights

    attention.forward = reads
    moe = MoEModel(model)
    check_parts(moe, IDS, after=leave_unpackable)
    reason = "the model's code reads its weight, which a packed layer does not have"
    assert moe.unquantized == {"model.layers.1.self_attn.q_proj.weight": reason}
    assert "self_attn.q_proj" not in moe.blocks[1].linears and "self_attn.q_proj" in moe.blocks[0].linears
    assert type(attention.q_proj) is nn.Linear  # nothing stays packed


def test_blocks_may_differ_in_how_many_experts_a_token_selects():
    def build() -> MoEModel:
        model = tiny_models.build("mixtral")
        model.model.layers[1].mlp.gate.top_k = 1
        return MoEModel(model)

    moe = build()
    assert [block.top_k for block in moe.blocks] == [2, 1, 2] and moe.top_k == 2
    check_parts(moe, IDS)
    other = build()
    with torch.no_grad():
        other.blocks[1].router_weight.copy_(other.blocks[1].router_weight.flip(0))
    rates = [row["selections"] for row in evaluate(moe, other, {"text": IDS}, 1)["expert_shift"]["blocks"]]
    assert rates[0] == 0 and rates[1] > 0.9  # of one selection per token
