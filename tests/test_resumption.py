"""A pass that starts where attention ends gives what the whole pass gives, to the bit."""

import architectures
import pytest
import torch
from test_architectures import SUPPORTED
from torch.utils._pytree import tree_leaves

from eacmoe_lightning.calibration.streams import Streams
from eacmoe_lightning.models.moe import MoEModel
from eacmoe_lightning.run.directory import RunDirectory
from eacmoe_lightning.run.ranks import Ranks

# blocks that always run whole: their attention hands on more than hidden states (keys and values, the indices of the
# tokens that it sees), or they have none
WHOLE = {"gemma4_text": 2, "glm_moe_dsa": 3, "hy_v4": 3, "nemotron_h": 2, "nemotron_h-latent": 2}


def streams_of(name: str, folder) -> Streams:
    """Both streams of a tiny architecture, at the input of its first block."""
    windows = torch.randint(1, 4096, (5, 24), generator=torch.Generator().manual_seed(0))
    streams = Streams(MoEModel(architectures.build(name)), windows, 0, 2, RunDirectory(folder), Ranks())
    streams.embed()
    return streams


def tensors(passes: list) -> list[torch.Tensor]:
    """All tensors of several passes' states and routings."""
    leaves = tree_leaves([(state, routing and vars(routing)) for state, routing in passes])
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]


@torch.no_grad()
@pytest.mark.parametrize("name", SUPPORTED)
def test_blocks_go_on_from_their_attention(name, tmp_path):
    streams, resumed = streams_of(name, tmp_path), 0
    for block in streams.moe.blocks:
        whole = [block.forward(call) for call in streams.calls(block)]
        for linear, *others in block.input_groups(streams.first_call(block)):
            if block.linears[linear] == "attention" and not others:
                list(streams.keep_attention(block, linear, streams.inputs_of(block, block.linear(linear))))
        resumed += streams._resumed is not None
        again = [block.forward(call) for call in streams.calls(block)]
        for one, other in zip(tensors(again), tensors(whole), strict=True):
            assert torch.equal(one, other)
        streams.forget_attention()
        for stream in streams.names:
            streams.advance(block, stream)
        streams.step(block.index + 1)
    assert resumed == len(streams.moe.blocks) - WHOLE.get(name, 0)
