"""Averaged weights: which steps count, and that a stage ends with their mean."""

import jobs
import pytest
import torch

from eacmoe_lightning.job.averaging import Averaging
from eacmoe_lightning.job.qesc import QESC


def trained(share: float, steps: int = 8, resumes_after: int = 0) -> list[torch.Tensor]:
    """Two tensors whose value is the number of the step, after all steps."""
    tensors, averaging = [torch.zeros(3), torch.zeros(2, 2, dtype=torch.float64)], Averaging()
    for step in range(1, steps + 1):
        for tensor in tensors:
            tensor.fill_(step)
        averaging.step(tensors, step / steps, share, step == steps)
        if step == resumes_after:
            state, averaging = averaging.state(), Averaging()
            averaging.load_state(state)
    assert averaging.number == 0 and not averaging.means
    return tensors


@pytest.mark.parametrize(("share", "mean"), [(0, 8), (0.1, 8), (0.25, 7.5), (0.5, 6.5), (1, 4.5)])
def test_the_last_steps_are_averaged(share, mean):
    for tensor in trained(share):
        assert torch.allclose(tensor, torch.full_like(tensor, mean))


@pytest.mark.parametrize("resumes_after", [2, 5, 7])
def test_a_resumed_average_has_the_same_bits(resumes_after):
    for whole, resumed in zip(trained(0.7), trained(0.7, resumes_after=resumes_after), strict=True):
        assert torch.equal(whole, resumed)


def test_a_share_of_steps_lies_between_0_and_1():
    for value in (-0.1, 1.5):
        with pytest.raises(ValueError, match="--model.block_averaging"):
            QESC(block_averaging=value)


@pytest.mark.slow
@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_block_ends_with_the_mean_of_its_last_steps(tiny_model_dir, tmp_path, monkeypatch, accumulate):
    """Each block's router at the end of its stage, beside what the steps of the last pass have left."""
    seen: list[list[torch.Tensor]] = [[]]
    ended: list[torch.Tensor] = []
    step = Averaging.step

    def watched_step(self, tensors, done, share, is_last):
        if share and done > 1 - share:
            seen[-1].append(tensors[0].detach().clone())
        step(self, tensors, done, share, is_last)
        if share and is_last:
            ended.append(tensors[0].detach().clone())
            seen.append([])

    monkeypatch.setattr(Averaging, "step", watched_step)
    more = {"data__batch_size": 1, "trainer__accumulate_grad_batches": accumulate, "model__joint_epochs": 0}
    jobs.fit(tiny_model_dir("mixtral"), tmp_path / "run", **more)
    assert len(ended) == len(seen) - 1 > 1
    for mean, steps in zip(ended, seen, strict=False):
        assert len(steps) > 1
        assert torch.allclose(mean, torch.stack(steps).mean(0), atol=1e-6)
        assert not torch.equal(mean, steps[-1])
