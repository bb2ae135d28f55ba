"""A multiple-choice task made from held-out text alone: which continuation follows the context?

A question is a context and `num_choices` continuations of equal length: the true one, and others from elsewhere in the
same text. The model's answer is the continuation to which it gives the highest likelihood. Unlike most benchmarks, this
task has signal for models of a few million parameters. All functions are pure, and the seed determines all random
choices.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Questions:
    """Q questions with C choices each.

    Attributes:
        input_ids: int64 [Q, C, T], a context followed by one of its continuations.
        answers: int64 [Q], the index of the true continuation.
        context_length: number of tokens of the context; the continuation is the rest of T.
    """

    input_ids: Tensor
    answers: Tensor
    context_length: int

    def __len__(self) -> int:
        return len(self.answers)


def make_questions(
    windows: Tensor,
    num_questions: int,
    context_length: int,
    num_choices: int = 4,
    seed: int = 0,
    option: str = "--num_windows",
) -> Questions:
    """Questions from windows of one text.

    Args:
        windows: int64 [S, T] token windows that do not overlap (`text.token_windows`).
        num_questions: Q, at most S; no two questions share a window.
        context_length: number of tokens of the context, less than T.
        num_choices: C; the wrong ones are other windows' continuations, all different.
        seed: seed for the choice of windows, the choice of wrong continuations and their order.
        option: what an error names as the way to more windows.

    Raises:
        ValueError: there are too few windows or too few different continuations, or the context takes all of T.
    """
    num_windows, length = windows.shape
    if not 0 < context_length < length:
        raise ValueError(f"context_length={context_length} is not between 1 and {length - 1} (window length - 1)")
    if not 0 < num_questions <= num_windows:
        raise ValueError(
            f"num_questions={num_questions} (--num_questions) is not between 1 and {num_windows}, the number of "
            f"windows ({option})"
        )
    generator = torch.Generator().manual_seed(seed)
    continuations = windows[:, context_length:]
    _, kind = continuations.unique(dim=0, return_inverse=True)  # windows of one kind have the same continuation
    if int(kind.max()) + 1 < num_choices:
        raise ValueError(
            f"{num_choices} choices need as many different continuations, and these {num_windows} windows have "
            f"{int(kind.max()) + 1}: raise {option}, or take a text that repeats itself less"
        )
    question_windows = torch.randperm(num_windows, generator=generator)[:num_questions]
    questions, answers = [], []
    for window in question_windows.tolist():
        chosen, kinds = [window], {int(kind[window])}
        for other in torch.randperm(num_windows, generator=generator).tolist():
            if len(chosen) == num_choices:
                break
            if int(kind[other]) not in kinds:
                chosen.append(other)
                kinds.add(int(kind[other]))
        order = torch.randperm(num_choices, generator=generator)
        context = windows[window, :context_length].expand(num_choices, -1)
        questions.append(torch.cat([context, continuations[torch.tensor(chosen)[order]]], 1))
        answers.append(int((order == 0).nonzero()))
    return Questions(torch.stack(questions), torch.tensor(answers), context_length)


def choose(log_likelihood: Tensor, num_choices: int) -> Tensor:
    """[Q*C, L] log-likelihoods of the continuations' tokens -> int64 [Q], the most likely choice of each question."""
    return log_likelihood.double().sum(-1).view(-1, num_choices).argmax(-1)


def accuracy(chosen: Tensor, answers: Tensor) -> float:
    """The share of the Q questions that are answered correctly; guessing gives 1 / C."""
    return float((chosen == answers).double().mean())


def answer(score: Callable[[Tensor], Tensor], questions: Questions, batch_size: int = 32) -> Tensor:
    """The model's answers, int64 [Q].

    Args:
        score: [B, T] token ids -> [B, T-1] log-likelihoods of all tokens but the first
            (`evaluate.token_log_likelihoods` of a model).
        questions: the questions; all their choices are scored.
        batch_size: B, sequences per call of `score`.
    """
    sequences = questions.input_ids.flatten(0, 1)  # [Q*C, T]
    first = questions.context_length - 1  # column of the continuation's first token
    rows = torch.cat([score(batch)[:, first:].cpu() for batch in sequences.split(batch_size)])
    return choose(rows, questions.input_ids.shape[1])
