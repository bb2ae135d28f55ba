"""Questions for lm-eval's tasks that need no hub, made from text and arithmetic when a task is loaded.

The YAML files of `configs/tasks` name these functions as `custom_dataset`, and their arguments as `dataset_kwargs`. All
are deterministic. Each returns {"test": a data set}, whose columns the YAML refers to.
"""

from __future__ import annotations

import re
from itertools import product
from typing import Any

import torch
from datasets import Dataset

from eacmoe_lightning.evaluation.choice_task import make_questions
from eacmoe_lightning.text.documents import read_documents

WORD = re.compile(r"\s*\S+")  # a word with the white space before it
ANSWERED = re.compile(r"(Question: [^\n]+\nAnswer:) ([^\n]+)")


def continuation(
    source: str,
    num_questions: int = 200,
    context_words: int = 40,
    choice_words: int = 10,
    num_choices: int = 4,
    seed: int = 0,
    **_: Any,
) -> dict[str, Dataset]:
    """Which continuation follows the context? The wrong ones come from elsewhere in the same text.

    Args:
        source: a text, as for --data.heldout.
        num_questions: number of questions.
        context_words, choice_words: words of a context and of each continuation; white space is kept.
        num_choices: number of continuations, one of them true.
        seed: seed for all random choices.

    Returns:
        Columns `context`, `choices` and `answer`, the index of the true continuation.

    Raises:
        ValueError: the text is too short.
    """
    length = context_words + choice_words
    windows = [words[i : i + length] for words in _documents(source) for i in range(0, len(words) - length + 1, length)]
    if len(windows) < num_questions:
        raise ValueError(
            f"{source} has {len(windows)} passages of {length} words, but the task asks {num_questions} questions: "
            "lower num_questions, context_words or choice_words in its dataset_kwargs"
        )
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys(word for window in windows for word in window))}
    words = list(vocabulary)
    ids = torch.tensor([[vocabulary[word] for word in window] for window in windows])
    questions = make_questions(ids, num_questions, context_words, num_choices, seed, option="the length of the source")
    rows = []
    for choices, answer in zip(questions.input_ids.tolist(), questions.answers.tolist(), strict=True):
        texts = [["".join(words[i] for i in part) for part in (c[:context_words], c[context_words:])] for c in choices]
        rows.append({"context": texts[0][0].lstrip(), "choices": [text for _, text in texts], "answer": answer})
    return {"test": Dataset.from_list(rows)}


def last_word(source: str, num_questions: int = 200, context_words: int = 40, **_: Any) -> dict[str, Dataset]:
    """Which word comes next? Only words that occur in the context are asked for, as in LAMBADA.

    Args:
        source: a text, as for --data.heldout.
        num_questions: number of questions, evenly spaced in the text.
        context_words: words of a context.

    Returns:
        Columns `context` and `word`, which begins with a space.

    Raises:
        ValueError: the text is too short.
    """
    rows = []
    for words in _documents(source):
        end = context_words
        while end < len(words):
            before, word = words[end - context_words : end], re.match(r" [A-Za-z]{4,}", words[end])
            if word and word[0] in before:
                rows.append({"context": "".join(before).lstrip(), "word": word[0]})
                end += context_words
            end += 1
    return {"test": Dataset.from_list(_spaced(rows, num_questions, source))}


def answered(source: str, num_questions: int = 200, **_: Any) -> dict[str, Dataset]:
    """Questions of a text that has them as `Question: ...` and `Answer: ...` on two lines.

    Args:
        source: a text, as for --data.heldout.
        num_questions: number of questions, evenly spaced in the text.

    Returns:
        Columns `question`, which ends in `Answer:`, and `answer`.

    Raises:
        ValueError: the text has fewer questions.
    """
    text = "\n\n".join(_texts(source))
    rows = [{"question": question, "answer": answer} for question, answer in ANSWERED.findall(text)]
    return {"test": Dataset.from_list(_spaced(rows, num_questions, source))}


def one_digit_sums(**_: Any) -> dict[str, Dataset]:
    """The 55 sums and 55 differences of digits whose result is a digit.

    Returns:
        Columns `question` and `answer`.
    """
    rows = []
    for a, b in product(range(10), repeat=2):
        if a + b < 10:
            rows.append({"question": f"Question: What is {a} + {b}?\nAnswer:", "answer": a + b})
        if a >= b:
            rows.append({"question": f"Question: What is {a} - {b}?\nAnswer:", "answer": a - b})
    return {"test": Dataset.from_list(rows)}


def _documents(source: str) -> list[list[str]]:
    """The words of each document of a text."""
    return [WORD.findall(document) for document in _texts(source)]


def _texts(source: str) -> list[str]:
    """The documents of a text; conversations are left out."""
    return [document for document in read_documents(source) if isinstance(document, str)]


def _spaced(rows: list[dict[str, Any]], number: int, source: str) -> list[dict[str, Any]]:
    """That many rows, evenly spaced.

    Raises:
        ValueError: there are fewer.
    """
    if len(rows) < number:
        raise ValueError(
            f"{source} has {len(rows)} questions of this kind, but the task asks {number}: lower num_questions in its "
            "dataset_kwargs"
        )
    return [rows[i * len(rows) // number] for i in range(number)]
