"""A loss that is NaN or infinite ends a job before anything of it is stored, and is not waited for at every step."""

import math

import jobs
import pytest
import torch

from eacmoe_lightning.cli import main
from eacmoe_lightning.job.divergence import EVERY, LossWatch

pytestmark = pytest.mark.filterwarnings("ignore:LightningCLI's args", "ignore:.*deprecated")
SMALL = {"data__heldout": "[]", "data__num_windows": 8, "data__batch_size": 2, "model__quantizer": "rtn"}


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_the_first_bad_loss_is_kept_until_it_is_read(bad):
    watch = LossWatch()
    losses = [1.0, 2.0, bad, 3.0, 7 * bad, 4.0]
    assert all(watch.see(torch.tensor(loss), step) is None for step, loss in enumerate(losses))
    assert str(float(watch.bad())) == str(bad)
    assert float(LossWatch().see(torch.tensor(bad), 0)) != 0  # the first step is read at once
    assert str(float(watch.see(torch.tensor(5.0), EVERY))) == str(bad)
    assert watch.see(torch.tensor(5.0), 0) is None and watch.bad() is None  # another epoch


def test_steps_in_between_read_nothing_from_the_device():
    watch, unreadable = LossWatch(), torch.empty((), device="meta")  # `bool` of it is an error
    for step in (*range(1, EVERY), *range(EVERY + 1, 2 * EVERY)):
        assert watch.see(unreadable, step) is None
    for step in (0, EVERY, 2 * EVERY):
        with pytest.raises(RuntimeError, match="meta"):
            watch.see(unreadable, step)


@pytest.mark.parametrize(
    ("options", "stage", "rate"),
    [
        ({"model__router_method": "sgd", "model__router_lr": 1e38, "model__joint_epochs": 0}, "block 0", "router_lr"),
        ({"model__joint_router_lr": 1e38, "model__joint_epochs": 1}, "the joint stage", "joint_*_lr"),
    ],
)
def test_diverging_steps_store_nothing(options, stage, rate, tiny_model_dir, tmp_path, capsys):
    """They begin with the second step; the block, its checkpoint and the model would come at the epoch's end."""
    words = ["fit", *jobs.options(tiny_model_dir("mixtral"), tmp_path, **SMALL | options)]
    for resume in ([], ["--ckpt_path", "auto"]):
        with pytest.raises(SystemExit):
            main([*words, *resume])
        error = capsys.readouterr().err
        assert f"the loss of {stage} is " in error and f"(--model.{rate})" in error
        finished = list((tmp_path / "blocks").glob("block_???.safetensors"))
        assert len(finished) == (3 if stage == "the joint stage" else 0)
        assert not (tmp_path / "compressed").exists()
        for path in (tmp_path / "checkpoints").glob("*.ckpt"):
            assert stage == "the joint stage"
            weights = torch.load(path, weights_only=False)["state_dict"].values()
            assert all(weight.isfinite().all() for weight in weights)
