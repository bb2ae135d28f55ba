"""The weights of tokens in the block stage: gradients of the whole model, however its windows are divided."""

import json

import jobs
import pytest
import torch

from eacmoe_lightning.calibration import token_weights
from eacmoe_lightning.calibration.streams import Streams
from eacmoe_lightning.models.checkpoint import Checkpoint
from eacmoe_lightning.models.streamed import StreamedModel
from eacmoe_lightning.run.directory import RunDirectory
from eacmoe_lightning.run.hidden import hidden_of
from eacmoe_lightning.run.ranks import Ranks


def streams_of(folder, directory, counts=None):
    windows = torch.randint(1, 4096, (5, 16), generator=torch.Generator().manual_seed(0))
    moe = StreamedModel(Checkpoint(str(folder)))
    return Streams(moe, windows, 0, 2, RunDirectory(directory), Ranks(), counts=counts)


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek"])
@pytest.mark.parametrize("counts", [None, torch.arange(80).view(5, 16) % 3 > 0], ids=["all", "some"])
def test_the_weights_are_gradients_of_the_whole_model(family, counts, tiny_model_dir, tmp_path):
    streams = streams_of(tiny_model_dir(family), tmp_path, counts)
    moe, windows = streams.moe, streams.windows
    found = torch.stack([token_weights.measure(streams, 2, 7).rows(b.index, torch.arange(5)) for b in moe.blocks], 1)
    assert all(p.is_meta for block in moe.blocks for p in block.layer.parameters())

    moe.load_all()
    expected = torch.zeros(found.shape)
    for number, window in enumerate(windows.split(1)):
        states, state = [], None
        for block in moe.blocks:
            call = moe.call(block.index, window, state)
            state, _ = block.forward(call.with_hidden(call.hidden.requires_grad_()) if block.index == 0 else call)
            states.append(hidden_of(state))
        logits = moe.head(state, window).float()
        drawn = token_weights.draw(logits.detach(), 7 + number)
        loss = -logits.log_softmax(-1).gather(-1, drawn).flatten()
        loss = loss.sum() if counts is None else loss[counts[number]].sum()
        for index, gradient in enumerate(torch.autograd.grad(loss, states)):
            expected[number, index] = gradient[0].square().mean(-1)
    counted = torch.ones(5, 16, dtype=torch.bool) if counts is None else counts
    for index in range(len(moe.blocks)):
        own = expected[:, index]
        torch.testing.assert_close(found[:, index], own / own[counted].mean(), rtol=1e-3, atol=1e-6)


def test_tokens_are_drawn_from_the_distribution():
    logits = torch.tensor([0.5, 0.25, 0.0, 0.25]).log().expand(1, 20_000, 4)
    counts = torch.bincount(token_weights.draw(logits, 0).flatten(), minlength=4) / 20_000
    torch.testing.assert_close(counts, torch.tensor([0.5, 0.25, 0.0, 0.25]), atol=0.02, rtol=0)


def test_windows_at_a_time_do_not_change_the_bits(tiny_model_dir, tmp_path, monkeypatch):
    results = []
    for name, size in (("all", 1 << 30), ("few", 1)):
        monkeypatch.setattr(token_weights, "BORDER_BYTES", size)
        streams = streams_of(tiny_model_dir("qwen3_moe"), tmp_path / name)
        assert token_weights.windows_together(streams.moe, 16, 2, 1e12) >= (2 if size == 1 else 5)
        results.append(token_weights.measure(streams, 2, 0).file[:])
    assert torch.equal(*results)


def test_a_finished_file_is_taken(tiny_model_dir, tmp_path, monkeypatch):
    streams = streams_of(tiny_model_dir("qwen3_moe"), tmp_path)
    first = token_weights.measure(streams, 2, 0)
    monkeypatch.setattr(token_weights, "_measured", None)
    assert torch.equal(token_weights.measure(streams, 2, 0).file[:], first.file[:])


def test_the_block_stage_uses_them(tiny_model_dir, tmp_path):
    runs = {}
    for weighted in (True, False):
        options = {
            "model__joint_epochs": 0,
            "data__heldout": "[]",
            "data__held_back": 0,
            "model__block_token_weights": weighted,
        }
        runs[weighted] = jobs.fit(tiny_model_dir("qwen3_moe"), tmp_path / str(weighted), **options)
    with_, without = (jobs.contents(run / "compressed") for run in runs.values())
    assert with_.keys() == without.keys() and with_ != without
    phases = [json.loads(line)["phase"] for line in (runs[True] / "costs.jsonl").read_text().splitlines()]
    assert phases.count("weights") == 1
