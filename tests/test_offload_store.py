"""The file of offloaded experts: errors name the damage, and no damaged weight is used."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny_models
import torch

from eacmoe_lightning.models.moe import MoEModel
from eacmoe_lightning.offload import offload_experts
from eacmoe_lightning.offload.codecs import codec
from eacmoe_lightning.offload.model import STORE, attach
from eacmoe_lightning.offload.store import ExpertStore, Key, write
from eacmoe_lightning.run.files import StoreError


def damaged(tmp_path: Path, change: Callable[[bytearray], None]) -> Path:
    """A store of a tiny model's experts after `change`."""
    handle = offload_experts(tiny_models.build("mixtral"), 1.0, directory=tmp_path)
    handle.close()
    data = bytearray((tmp_path / STORE).read_bytes())
    change(data)
    (tmp_path / STORE).write_bytes(data)
    return tmp_path / STORE


def test_a_truncated_store_is_named(tmp_path):
    def cut(data: bytearray) -> None:
        del data[-1000:]

    path = damaged(tmp_path, cut)
    with pytest.raises(StoreError, match=f"{STORE} is truncated or altered"):
        ExpertStore.open(path)
    path.write_bytes(b"short")
    with pytest.raises(StoreError, match=f"{STORE} is truncated: it has 5 bytes"):
        ExpertStore.open(path)
    with pytest.raises(FileNotFoundError, match="no store of experts"):
        ExpertStore.open(tmp_path / "none")


def test_a_store_truncated_while_in_use_is_named(tmp_path, tokens):
    model = tiny_models.build("mixtral")
    handle = offload_experts(model, 0.5, directory=tmp_path)
    os.truncate(tmp_path / STORE, 5000)
    with pytest.raises(StoreError, match=f"{STORE} was truncated while it was in use: 5000 of"), torch.no_grad():
        model(tokens)
    handle.close()


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_flipped_bit_stops_the_pass_that_needs_it(num_workers, tmp_path, tokens):
    model = tiny_models.build("mixtral")
    handle = offload_experts(model, 0.5, directory=tmp_path, num_workers=num_workers)
    offset, length = handle.store.places[Key(1, 2, "down_proj")]
    with open(tmp_path / STORE, "r+b") as file:  # the store is open
        file.seek(offset + length // 2)
        byte = file.read(1)[0]
        file.seek(offset + length // 2)
        file.write(bytes([byte ^ 8]))
    with pytest.raises(StoreError, match=f"{STORE}: block 1, expert 2, down_proj.*checksum"), torch.no_grad():
        model(torch.arange(512).view(4, 128))  # selects every expert
    with pytest.raises(StoreError, match="block 1, expert 2, down_proj.*written again"):
        handle.store.verify()
    handle.close()


def test_every_bit_of_the_index_is_checked(tmp_path):
    path = tmp_path / "store"
    write(path, [(Key(0, 0, "down_proj"), codec("plain").encode(torch.ones(4, 4)))], {"a": 1})
    good = path.read_bytes()
    store = ExpertStore.open(path)
    store.verify()
    assert store.about == {"a": 1} and list(store) == [Key(0, 0, "down_proj")]
    first = sum(store.places[Key(0, 0, "down_proj")])
    for position in range(first + -first % 64, len(good)):
        broken = bytearray(good)
        broken[position] ^= 1
        path.write_bytes(broken)
        with pytest.raises(StoreError, match="truncated or altered"):
            ExpertStore.open(path)
    with pytest.raises(StoreError, match="block 0, expert 1, down_proj is missing"):
        store.record(Key(0, 1, "down_proj"))


def test_a_store_of_another_model_is_refused(tmp_path):
    handle = offload_experts(tiny_models.build("mixtral"), 1.0, directory=tmp_path)
    handle.close()
    moe = MoEModel(tiny_models.build("mixtral"))
    for block in moe.moe_blocks:
        block.experts.module.down_proj = torch.nn.Parameter(torch.zeros(8, 64, 32))
    message = "down_proj has shape .64, 64., in the model .64, 32.: it is from another model"
    with pytest.raises(StoreError, match=message):
        attach(moe, lambda: ExpertStore.open(tmp_path / STORE), 1.0)
