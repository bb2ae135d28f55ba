"""A cache that grows in place: the same numbers as transformers' own, without a new tensor for each token."""

import copy

import architectures
import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from eacmoe_lightning.models.growing_cache import (
    LEAST_SPARE,
    GrowingLayer,
    GrowingWindowLayer,
    _adopt,
    grow_in_place,
    with_room,
)

# grouped queries; values of another width than keys; sliding windows; layers with a state of another kind
MODELS = ("qwen3_moe", "deepseek_v3", "gpt_oss", "qwen3_next")
WAYS = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "assisted": {"prompt_lookup_num_tokens": 3},  # writes tokens that are rejected, and crops the cache
    "static": {"cache_implementation": "static"},
}


def prompt(*lengths: int) -> dict[str, Tensor]:
    """Texts of these lengths, padded on the left."""
    ids = torch.randint(3, 100, (len(lengths), max(lengths)), generator=torch.Generator().manual_seed(0))
    places = torch.arange(max(lengths))
    mask = torch.stack([places >= max(lengths) - length for length in lengths])
    return {"input_ids": ids, "attention_mask": mask.long()}


def generated(model: PreTrainedModel, inputs: dict[str, Tensor], **options) -> Tensor:
    tokens = {"max_new_tokens": 24, "min_new_tokens": 24, "do_sample": False, "pad_token_id": 0}
    out = model.generate(**inputs, **tokens, **options, return_dict_in_generate=True, output_scores=True)
    assert out.sequences.shape[1] == inputs["input_ids"].shape[1] + 24
    return torch.cat([out.sequences.flatten().float(), torch.stack(out.scores).flatten()])


@pytest.mark.parametrize("name", MODELS)
def test_generation_is_the_same_to_the_bit(name):
    model = architectures.build(name)
    batch = prompt(5, 9)
    expected = generated(model, batch)
    growing = grow_in_place(model)
    assert torch.equal(generated(model, batch), expected)
    growing.remove()
    assert torch.equal(generated(model, batch), expected)


@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_generate(way):
    model = architectures.build("qwen3_moe")
    batch = prompt(9) if way == "assisted" else prompt(5, 9)
    expected = generated(model, batch, **WAYS[way])
    grow_in_place(model)
    assert torch.equal(generated(model, batch, **WAYS[way]), expected)


def keys(tokens: int, first: float = 0.0, batch: int = 2) -> Tensor:
    return first + torch.arange(batch * 3 * tokens * 4).view(batch, 3, tokens, 4).float()


@torch.no_grad()
def test_tokens_are_written_where_there_is_room():
    layer, held = GrowingLayer(), keys(5)
    layer.update(held, held)
    place = layer.keys.data_ptr()
    for step in range(LEAST_SPARE):
        new = keys(1, float(step))
        held = torch.cat([held, new], -2)
        got = layer.update(new, new)
        assert torch.equal(got[0], held) and torch.equal(got[1], held)
        assert layer.keys.data_ptr() == place
    assert layer.rooms[0].tensor.shape[-2] == with_room(5) == 5 + LEAST_SPARE
    layer.update(keys(1), keys(1))
    assert layer.keys.data_ptr() != place and torch.equal(layer.keys[..., :-1, :], held)


@torch.no_grad()
def test_a_window_moves_on_in_its_room():
    growing, own, places = GrowingWindowLayer(sliding_window=6), DynamicSlidingWindowLayer(sliding_window=6), set()
    for step, tokens in enumerate([9, 1, 2, *[1] * 2 * LEAST_SPARE]):
        new = keys(tokens, float(step))
        got, expected = growing.update(new, new + 1), own.update(new, new + 1)
        assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])
        assert torch.equal(growing.keys, own.keys) and growing.get_mask_sizes(1) == own.get_mask_sizes(1)
        if step:
            places.add(growing.rooms[0].tensor.data_ptr())
            assert growing.rooms[0].tensor.shape[-2] <= with_room(8)  # and not the prompt's
    assert 1 < len(places) <= 4
    for layer in (growing, own) if hasattr(own, "activate_past_recording") else ():
        layer.activate_past_recording()
        layer.update(keys(3), keys(3))
        layer.crop(-2)
    assert torch.equal(growing.update(keys(1), keys(1))[0], own.update(keys(1), keys(1))[0])


@torch.no_grad()
def test_what_changes_the_tensors_elsewhere_is_followed():
    layer = GrowingLayer()
    layer.update(keys(6), keys(6))
    other = copy.deepcopy(layer)
    layer.crop(-2)
    layer.update(keys(1, 7.0), keys(1, 7.0))
    assert torch.equal(layer.keys, torch.cat([keys(6)[..., :4, :], keys(1, 7.0)], -2))
    other.update(keys(1, 9.0), keys(1, 9.0))
    assert torch.equal(other.keys, torch.cat([keys(6), keys(1, 9.0)], -2))
    layer.reorder_cache(torch.tensor([1, 1]))
    layer.update(keys(1), keys(1))
    assert torch.equal(layer.keys[0, :, :4], keys(6)[1, :, :4]) and torch.equal(layer.keys[..., 5:, :], keys(1))
    layer.batch_select_indices(torch.tensor([0]))
    layer.update(keys(1, batch=1), keys(1, batch=1))
    assert layer.keys.shape == (1, 3, 7, 4)
    layer.reset()
    assert torch.equal(layer.update(keys(2), keys(2))[0], keys(2))


@torch.no_grad()
def test_what_others_hold_is_not_written():
    """Shallow copies go on from one text in two ways, and keys that were taken stay what they were."""
    layer = GrowingLayer()
    layer.update(keys(4), keys(4))
    fork = copy.copy(layer)
    for branch, first in ((layer, 7.0), (fork, 9.0), (layer, 7.0), (fork, 9.0)):
        branch.update(keys(1, first), keys(1, first))
    for branch, first in ((layer, 7.0), (fork, 9.0)):
        assert torch.equal(branch.keys, torch.cat([keys(4), keys(1, first), keys(1, first)], -2))
    taken, before = layer.keys, layer.keys.clone()
    layer.crop(-2)
    layer.update(keys(1), keys(1))
    assert torch.equal(taken, before)


@torch.no_grad()
@pytest.mark.parametrize("rows", [slice(0, 1), slice(1, 2), [1]])
def test_rows_that_are_cut_out_by_hand(rows):
    layer = GrowingLayer()
    layer.update(keys(4), keys(4))
    layer.keys, layer.values = layer.keys[rows], layer.values[rows]
    new = keys(1, 5.0, batch=1)
    got, _ = layer.update(new, new)
    assert torch.equal(got, torch.cat([keys(4)[rows], new], -2))


def test_inference_mode_and_gradients():
    layer = GrowingLayer()
    with torch.inference_mode():
        layer.update(keys(3), keys(3))
    with torch.no_grad():  # may not write to tensors of inference mode
        layer.update(keys(1), keys(1))
    assert not layer.keys.is_inference()
    new = keys(1).requires_grad_()
    layer.update(new, new)
    (layer.keys.square().sum() + layer.values.sum()).backward()
    assert torch.equal(new.grad, 2 * keys(1) + 1)
    assert torch.equal(layer.keys.detach(), torch.cat([keys(3), keys(1), keys(1)], -2))


@pytest.mark.parametrize("is_offloaded", [False, True])
def test_offloaded_caches_are_left_alone(is_offloaded):
    model = architectures.build("qwen3_moe")
    cache = DynamicCache(config=model.config)
    cache.offloading = is_offloaded
    _adopt(model, (prompt(4)["input_ids"],), {"cache": cache})
    assert {type(layer) for layer in cache.layers} == {DynamicLayer if is_offloaded else GrowingLayer}
