"""A task with right answers that needs nothing but held-out text: which of four continuations is the text's own?

A question is a context and `num_choices` continuations of equal length: the one that follows in the text, and those of
other places of the same text. A model answers with the continuation it gives the highest likelihood. Unlike most
benchmarks this one has signal for models of a few million parameters. Pure functions; random only by the seed given.
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
        answers: int64 [Q], the choice that is the text's own.
        context_length: tokens of the context; the continuation is what is left of T.
    """

    input_ids: Tensor
    answers: Tensor
    context_length: int

    def __len__(self) -> int:
        return len(self.answers)


def make_questions(
    windows: Tensor, num_questions: int, context_length: int, num_choices: int = 4, seed: int = 0
) -> Questions:
    """Questions from windows of one text.

    Args:
        windows: int64 [S, T] token windows that do not overlap (`text.token_windows`).
        num_questions: Q, at most S; each has a window of its own.
        context_length: of T; the rest is the continuation.
        num_choices: C; the wrong ones are other windows' continuations, all different.
        seed: of the choice of windows, of the wrong continuations and of their order.

    Raises:
        ValueError: there are too few windows, or too few different continuations, or no continuation is left.
    """
    num_windows, length = windows.shape
    if not 0 < context_length < length:
        raise ValueError(f"context_length={context_length} must leave a continuation of windows of {length} tokens")
    if not 0 < num_questions <= num_windows:
        raise ValueError(f"num_questions={num_questions} needs as many windows of {length} tokens, not {num_windows}")
    generator = torch.Generator().manual_seed(seed)
    continuations = windows[:, context_length:]
    _, kind = continuations.unique(dim=0, return_inverse=True)  # windows of one kind continue alike
    if int(kind.max()) + 1 < num_choices:
        raise ValueError(
            f"{num_choices} choices need as many different continuations, and these {num_windows} windows have "
            f"{int(kind.max()) + 1}"
        )
    asked = torch.randperm(num_windows, generator=generator)[:num_questions]
    questions, answers = [], []
    for window in asked.tolist():
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
    """[Q*C, L] log-likelihoods of the continuations' tokens -> int64 [Q], the likeliest choice of each question."""
    return log_likelihood.double().sum(-1).view(-1, num_choices).argmax(-1)


def accuracy(chosen: Tensor, answers: Tensor) -> float:
    """The share of questions [Q] answered rightly; chance is one in the number of choices."""
    return float((chosen == answers).double().mean())


def answer(score: Callable[[Tensor], Tensor], questions: Questions, batch_size: int = 32) -> Tensor:
    """int64 [Q]: what a model chooses.

    Args:
        score: [B, T] token ids -> [B, T-1] log-likelihoods of all tokens but the first
            (`evaluate.token_log_likelihoods` of a model).
        questions: of which all choices are scored.
        batch_size: B, sequences at a time.
    """
    sequences = questions.input_ids.flatten(0, 1)  # [Q*C, T]
    first = questions.context_length - 1  # column in which the continuation's first token is predicted
    rows = torch.cat([score(batch)[:, first:].cpu() for batch in sequences.split(batch_size)])
    return choose(rows, questions.input_ids.shape[1])
