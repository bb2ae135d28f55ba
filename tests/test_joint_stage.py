"""The joint stage runs block by block: its losses and gradients are those of the whole model at once."""

from contextlib import contextmanager, nullcontext

import jobs
import pytest
import torch
from joint_trial import assert_equals_the_whole
from torch import nn

from eacmoe_lightning.planning import joint
from eacmoe_lightning.tuning.chain import Chain

# --- the chain


class Layer(nn.Module):
    """A step whose state is hidden states, whole numbers that it passes on, and what the first step computed."""

    def __init__(self, first: bool, at_once: int | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4))
        self.unused = nn.Parameter(torch.randn(2))
        self.first, self.at_once, self.is_loaded = first, at_once, False
        self.trained = [self.weight, self.unused]

    @contextmanager
    def loaded(self):
        self.is_loaded = True
        yield
        self.is_loaded = False

    def run(self, state, rows):
        assert self.is_loaded
        if self.first:
            state = (torch.arange(40.0).view(5, 2, 4)[rows] / 40, torch.arange(5)[rows], None)
        hidden, numbers, early = state
        hidden = torch.tanh(hidden @ self.weight) + (0 if early is None else early)
        return (hidden, numbers, hidden.sin() if early is None else early), hidden.square().sum(-1).flatten()


@pytest.mark.parametrize("keeps_activations", [False, True])
@pytest.mark.parametrize("at_once", [None, 1, 2])
def test_a_chain_has_the_losses_and_gradients_of_its_steps_at_once(at_once, keeps_activations):
    torch.manual_seed(0)
    steps = [Layer(True, None), Layer(False, at_once), Layer(False, 2), Layer(False, None)]
    losses = Chain(steps, 5, torch.device("cpu"), nullcontext, keeps_activations).losses()
    weights = torch.randn(10)
    (losses * weights).sum().backward()
    gradients = [step.weight.grad.clone() for step in steps]
    assert all(step.unused.grad is None or not step.unused.grad.any() for step in steps)

    state, total = None, 0
    for step in steps:
        step.weight.grad, step.is_loaded = None, True
        state, one = step.run(state, slice(0, 5))
        total = total + one
    torch.testing.assert_close(losses, total)
    (total * weights).sum().backward()
    for step, gradient in zip(steps, gradients, strict=True):
        torch.testing.assert_close(gradient, step.weight.grad)


# --- the stage


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek"])
def test_the_stage_is_the_whole_model_s_forward_and_backward_pass(family, tiny_model_dir, tmp_path):
    folder = tiny_model_dir(family)
    run = jobs.fit(folder, tmp_path / "run", model__joint_epochs=0, model__block_epochs=0, data__heldout="[]")
    assert_equals_the_whole(folder, run)


@pytest.mark.parametrize(
    "options",
    [
        {"model__joint_code_lr": 1e-3},
        {},
        {"model__joint_scale_lr": 0, "model__joint_code_lr": 1e-3, "pruning__keep": 3},
        {"data__micro_batch_size": 1},
    ],
    ids=["codes", "scales", "pruned", "micro-batches"],
)
def test_streamed_blocks_give_the_bits_of_resident_ones(options, tiny_model_dir, tmp_path, monkeypatch):
    options = {"model__joint_epochs": 2, "data__heldout": "[]", "data__batch_size": 4, **options}
    resident = jobs.fit(tiny_model_dir("qwen3_moe"), tmp_path / "resident", **options)
    monkeypatch.setattr(joint.JointMemory, "fits", lambda self, job, memory, host: host < float("inf"))
    streamed = jobs.fit(tiny_model_dir("qwen3_moe"), tmp_path / "streamed", **options)
    assert jobs.contents(streamed / "compressed") == jobs.contents(resident / "compressed")
