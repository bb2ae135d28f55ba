"""Router losses: values computed by hand, limits of k, and gradient steps that lower the loss."""

import math

import pytest
import torch

from eacmoe_lightning.routers.losses import MSE, SelectionHinge, SelectionKL, TopKMSE

TEACHER = torch.tensor([[4.0, 3.0, 1.0, 0.0], [0.0, 1.0, 2.0, 5.0]])
STUDENT = torch.tensor([[3.0, 5.0, 1.5, 9.0], [7.0, 1.0, 2.5, 4.0]])
LOSSES = [TopKMSE(2), TopKMSE(3), TopKMSE(), MSE(), SelectionHinge(), SelectionKL(), SelectionKL(temperature=2.0)]


@pytest.mark.parametrize(
    "k, expected",
    [
        (2, [(1 + 4) / 2, (1 + 0.25) / 2]),  # token 0: experts 0, 1; token 1: experts 3, 2
        (3, [(1 + 4 + 0.25) / 3, (1 + 0.25 + 0) / 3]),
        (4, [(1 + 4 + 0.25 + 81) / 4, (49 + 0 + 0.25 + 1) / 4]),
    ],
)
def test_topk_mse_by_hand(k, expected):
    torch.testing.assert_close(TopKMSE(k)(STUDENT, TEACHER, 2), torch.tensor(expected))


def test_mse_by_hand_is_topk_mse_over_all_experts():
    assert MSE()(STUDENT, TEACHER, 2).tolist() == [86.25 / 4, 50.25 / 4]
    torch.testing.assert_close(MSE()(STUDENT, TEACHER, 2), TopKMSE(4)(STUDENT, TEACHER, 2))


def test_hinge_by_hand():
    # token 0 selects 0, 1: weakest of them 3, strongest other 9; token 1 selects 3, 2: 2.5 against 7
    assert SelectionHinge(margin=0.5)(STUDENT, TEACHER, 2).tolist() == [6.5, 5.0]
    # top 1: token 0: 3 against 9; token 1: 4 against 7
    assert SelectionHinge(margin=0.5)(STUDENT, TEACHER, 1).tolist() == [6.5, 3.5]


def test_hinge_is_zero_once_the_selection_leads_by_the_margin():
    # the original leads by 2 at its second place in token 0, by 1 in token 1
    assert SelectionHinge(margin=1.0)(TEACHER, TEACHER, 2).tolist() == [0.0, 0.0]
    assert SelectionHinge(margin=1.5)(TEACHER, TEACHER, 2).tolist() == [0.0, 0.5]
    assert SelectionHinge(margin=1.0)(100 * TEACHER, TEACHER, 2).tolist() == [0.0, 0.0]


def test_kl_by_hand():
    teacher, student = torch.tensor([[math.log(3.0), 0.0]]), torch.tensor([[0.0, 0.0]])  # (3/4, 1/4) and (1/2, 1/2)
    expected = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    torch.testing.assert_close(SelectionKL()(student, teacher, 1), torch.tensor([expected]))
    # temperature 1/2 squares the odds: (9/10, 1/10)
    expected = 0.9 * math.log(0.9 / 0.5) + 0.1 * math.log(0.1 / 0.5)
    torch.testing.assert_close(SelectionKL(temperature=0.5)(student, teacher, 1), torch.tensor([expected]))


def test_kl_ignores_a_constant():
    torch.testing.assert_close(SelectionKL()(STUDENT + 7, TEACHER - 3, 2), SelectionKL()(STUDENT, TEACHER, 2))


@pytest.mark.parametrize("num_experts, top_k", [(8, 2), (16, 2), (64, 6), (60, 4), (128, 8), (4, 1), (16, 12)])
def test_the_default_k_lies_between_top_k_and_all_experts(num_experts, top_k):
    k = TopKMSE().num_targets(num_experts, top_k)
    assert top_k <= k <= num_experts and (num_experts > 8 or k == num_experts)


def test_other_losses_target_every_expert():
    assert all(loss.num_targets(60, 4) == 60 for loss in (MSE(), SelectionHinge(), SelectionKL()))


@pytest.mark.parametrize("k", [-1, 0, 1, 5])
def test_k_out_of_range_is_named_with_both_limits(k):
    with pytest.raises(ValueError, match=rf"k={k} \(--model.router_loss.*top_k=2 and num_experts=4"):
        TopKMSE(k)(STUDENT, TEACHER, 2)
    with pytest.raises(ValueError, match="num_experts=4"):
        TopKMSE(k).num_targets(4, 2)


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: f"{type(loss).__name__}-{loss.__dict__.get('k')}")
def test_a_step_against_the_gradient_lowers_the_loss(loss):
    student = STUDENT.clone().requires_grad_()
    before = loss(student, TEACHER, 2)
    assert before.shape == (2,) and (before > 0).all()
    before.sum().backward()
    after = loss(STUDENT - 0.05 * student.grad, TEACHER, 2)
    assert (after < before).all()


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: f"{type(loss).__name__}-{loss.__dict__.get('k')}")
def test_an_equal_student_has_no_loss(loss):
    torch.testing.assert_close(loss(TEACHER, TEACHER, 2), torch.zeros(2), rtol=0, atol=1e-6)


def test_gradient_reaches_only_the_teacher_s_largest():
    student = STUDENT.clone().requires_grad_()
    TopKMSE(2)(student, TEACHER, 2).sum().backward()
    # d/ds of (s - t)^2 / 2 is s - t at experts 0, 1 and 3, 2, nothing elsewhere
    assert student.grad.tolist() == [[-1.0, 2.0, 0.0, 0.0], [0.0, 0.0, 0.5, -1.0]]
