"""The arithmetic of training codes: positions on the axis of codes, straight-through rounding, losses."""

from itertools import pairwise

import pytest
import torch

from eacmoe_lightning.quantization.grid import Grid, Quantized, round_to_nearest
from eacmoe_lightning.routers.losses import MSE
from eacmoe_lightning.tuning.codes import codes_of, in_training, movable, start_positions
from eacmoe_lightning.tuning.losses import distillation, reconstruction, selection


@pytest.fixture
def weight() -> torch.Tensor:
    return torch.randn(3, 16, 64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("bits", [2, 3, 8])
def test_positions_round_to_the_codes_and_decode_to_the_weights(weight, bits):
    quantized = round_to_nearest(weight, Grid(bits, 32, clip_search=False))
    position = start_positions(weight, quantized)
    assert torch.equal(quantized.nearest(position).to(torch.uint8), quantized.codes)
    steps = (
        position - quantized.zero_point.repeat_interleave(32, -1).float()
    ) * quantized.scale.float().repeat_interleave(32, -1)
    inside = (position - quantized.codes).abs() < 0.49  # not clamped, so the position decodes to the weight
    assert inside.float().mean() > 0.9
    torch.testing.assert_close(steps[inside], weight[inside], rtol=1e-4, atol=1e-4)


def test_a_code_that_was_moved_starts_on_its_weight_s_side(weight):
    quantized = round_to_nearest(weight, Grid(3, 32))
    moved = quantized.codes.clone()
    moved[0, 0, 0] = (int(moved[0, 0, 0]) + 3) % 8
    side = torch.sign(quantized.codes[0, 0, 0].float() - moved[0, 0, 0].float())
    quantized.codes = moved
    assert start_positions(weight, quantized)[0, 0, 0] == moved[0, 0, 0] + side * 0.499


def test_codes_stay_within_each_expert_s_range():
    quantized = Quantized(
        torch.zeros(2, 1, 8, dtype=torch.uint8), torch.ones(2, 1, 1).half(), torch.zeros(2, 1, 1).byte(), (2, 3)
    )
    position = torch.tensor([[[9.0, -3, 1.4, 2.6, 3.6, 0, 0, 0]]]).expand(2, 1, 8)
    assert quantized.nearest(position)[:, 0, :5].tolist() == [[3, 0, 1, 3, 3], [7, 0, 1, 3, 4]]


def test_gradients_pass_the_rounding_of_codes_and_scales(weight):
    quantized = round_to_nearest(weight, Grid(3, 32))
    scale = quantized.scale.float().requires_grad_()
    moved = movable(weight, quantized, 0.5)
    moved.position.requires_grad_()
    decoded = torch.stack([part.decode(torch.float32) for part in in_training(quantized, scale, moved)])
    assert torch.equal(decoded, quantized.dequantize())
    gradient = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    (decoded * gradient).sum().backward()
    expected = gradient * quantized.scale.float().repeat_interleave(32, -1)
    places = moved.place.long().split([b - a for a, b in pairwise(moved.starts)])
    expected = torch.cat([expected[e].flatten()[place] for e, place in enumerate(places)])
    torch.testing.assert_close(moved.position.grad, expected)
    steps = quantized.codes.float() - quantized.zero_point.float().repeat_interleave(32, -1)
    torch.testing.assert_close(scale.grad, (gradient * steps).unflatten(-1, (2, 32)).sum(-1))
    assert torch.equal(in_training(quantized, None, None)[1].decode(torch.float32), quantized.dequantize()[1])


@pytest.mark.parametrize("reach", [0.01, 0.2])
@pytest.mark.parametrize("bits", [2, (2, 3, 4)])
def test_exactly_the_codes_within_reach_can_be_moved(weight, bits, reach):
    quantized = round_to_nearest(weight, Grid(2, 32))
    quantized.bits = bits
    moved = movable(weight, quantized, reach)
    position = start_positions(weight, quantized)
    neighbour = quantized.nearest(position + (position - quantized.codes).sign() * reach)
    for e in range(len(weight)):
        place = moved.place[moved.starts[e] : moved.starts[e + 1]].long()
        assert torch.equal(place, (neighbour != quantized.codes)[e].flatten().nonzero().squeeze(1))
    assert 0 < len(moved.place) < weight.numel()
    assert torch.equal(codes_of(quantized, moved), quantized.codes)  # nothing has moved
    moved.position += (moved.position - moved.position.round()).sign() * reach
    assert torch.equal(codes_of(quantized, moved).float(), neighbour)
    assert torch.equal(
        in_training(quantized, None, moved)[2].decode(torch.float32), quantized.dequantize(codes=neighbour)[2]
    )


def test_a_matrix_is_trained_like_an_expert(weight):
    stack, matrix = (round_to_nearest(w, Grid(3, 32)) for w in (weight[:1], weight[0]))
    of_stack, of_matrix = movable(weight[:1], stack, 0.1), movable(weight[0], matrix, 0.1)
    assert torch.equal(of_stack.position, of_matrix.position) and torch.equal(of_stack.place, of_matrix.place)
    of_stack.position += 0.1
    of_matrix.position += 0.1
    assert torch.equal(codes_of(stack, of_stack)[0], codes_of(matrix, of_matrix))


def test_losses_by_hand():
    output = torch.arange(8.0).view(1, 2, 4)
    assert reconstruction(output, output + 3, 2.0).tolist() == [[4.5, 4.5]]
    assert reconstruction(output.view(1, 2, 2, 2), output.view(1, 2, 2, 2) + 3, 2.0).tolist() == [[4.5, 4.5]]
    target = torch.tensor([[0.5, 0.25, 0.25]]).log()
    logits = torch.tensor([[0.25, 0.25, 0.5]]).log() + 3  # a constant does not matter
    by_hand = 0.5 * torch.tensor(2.0).log() - 0.25 * torch.tensor(2.0).log()
    torch.testing.assert_close(distillation(logits, target), by_hand[None])
    teachers = {0: torch.tensor([[0.0, 2.0]]), 4: torch.tensor([[0.0, 20.0]])}  # spreads 1 and 10
    students = {0: torch.tensor([[1.0, 2.0]]), 4: torch.tensor([[0.0, 20.0]])}
    losses = [selection(students[i], teacher, MSE(), 1) for i, teacher in teachers.items()]
    torch.testing.assert_close(torch.stack(losses).mean(0), torch.tensor([0.25]))  # (1/2 + 0) / 2
