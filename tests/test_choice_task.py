"""The continuation task: the structure of a question, and a model that knows the text answers all of them."""

from functools import partial

import pytest
import torch

from eacmoe_lightning.evaluation.choice_task import accuracy, answer, choose, make_questions
from eacmoe_lightning.evaluation.streams import token_log_likelihoods
from eacmoe_lightning.models.moe import MoEModel
from eacmoe_lightning.models.originals import BUNDLED, load_original
from eacmoe_lightning.text.documents import read_documents
from eacmoe_lightning.text.windows import token_windows


def windows_of(num: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 50, (num, length), generator=torch.Generator().manual_seed(seed))


def test_a_question_is_a_window_and_continuations_of_others():
    windows = windows_of(12, 10)
    questions = make_questions(windows, 8, context_length=6, seed=3)
    assert questions.input_ids.shape == (8, 4, 10)
    rows = {tuple(row) for row in windows.tolist()}
    continuations = {tuple(row[6:]) for row in windows.tolist()}
    asked = set()
    for choices, answer_index in zip(questions.input_ids.tolist(), questions.answers.tolist(), strict=True):
        assert [tuple(choice) in rows for choice in choices] == [i == answer_index for i in range(4)]
        assert len({tuple(choice[:6]) for choice in choices}) == 1  # one context
        assert {tuple(choice[6:]) for choice in choices} <= continuations
        assert len({tuple(choice[6:]) for choice in choices}) == 4  # all different
        asked.add(tuple(choices[answer_index]))
    assert len(asked) == 8  # no window asked twice


def test_the_answer_may_be_anywhere_and_the_seed_decides():
    windows = windows_of(200, 8)
    questions = make_questions(windows, 200, 4, seed=1)
    counts = torch.bincount(questions.answers, minlength=4)
    assert counts.min() > 30  # 50 expected, standard deviation 6
    again, other = make_questions(windows, 200, 4, seed=1), make_questions(windows, 200, 4, seed=2)
    assert torch.equal(questions.input_ids, again.input_ids) and torch.equal(questions.answers, again.answers)
    assert not torch.equal(questions.answers, other.answers)


def test_equal_continuations_are_never_two_choices():
    windows = windows_of(6, 6)
    windows[1:4, 3:] = windows[0, 3:]  # four windows have the same continuation: three are left
    questions = make_questions(windows, 6, 3, num_choices=3)
    for choices in questions.input_ids.tolist():
        assert len({tuple(choice[3:]) for choice in choices}) == 3
    for option in ("--num_windows", "4 x --num_questions"):
        message = f"4 choices need as many different continuations.* 6 windows have 3: raise {option},"
        with pytest.raises(ValueError, match=message):
            make_questions(windows, 6, 3, option=option)


def test_a_model_that_knows_the_text_is_always_right():
    """The model gives the text's next token a log-likelihood of -0.5 and every other token -5."""
    windows = torch.arange(160).view(16, 10)  # token t is always followed by t + 1
    questions = make_questions(windows, 16, 6, seed=5)

    def score(ids):
        return torch.where(ids[:, 1:] == ids[:, :-1] + 1, -0.5, -5.0)

    assert accuracy(answer(score, questions, batch_size=7), questions.answers) == 1.0
    inside = choose(torch.tensor([[-1.0, -2], [-1, -1], [-9, -9], [-3, 0.5]]), 4)
    assert inside.tolist() == [1]


@pytest.mark.parametrize(("num", "context"), [(13, 4), (0, 4), (4, 10), (4, 0)])
def test_impossible_questions_are_refused(num, context):
    with pytest.raises(ValueError, match="num_questions=|context_length="):
        make_questions(windows_of(12, 10), num, context)


def test_the_bundled_model_beats_chance(tokenizer):
    windows = token_windows(read_documents("bundled:code"), tokenizer, 100, 48)
    questions = make_questions(windows, 40, context_length=32)
    moe = MoEModel(load_original(str(BUNDLED), "float32"))
    right = accuracy(answer(partial(token_log_likelihoods, moe), questions), questions.answers)
    assert right > 0.25 + 3 * (0.25 * 0.75 / 40) ** 0.5  # three standard deviations above chance
