"""What sampled windows open with: a random token, the token that begins a text, or a prompt in the chat template."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from eacmoe_lightning.text.chat import rendered
from eacmoe_lightning.text.rows import Conversation
from eacmoe_lightning.text.windows import beginning_tokens

Start = Literal["random", "bos", "chat"]
PROMPTS = (  # openings of chats: short, of many kinds and languages
    "Write a short story about a lighthouse keeper.",
    "Explain how vaccines work.",
    "Write a Python function that merges two sorted lists.",
    "What is 17 * 24? Show your work.",
    "Erkläre mir den Unterschied zwischen Wetter und Klima.",
    "Summarize the causes of the French Revolution.",
    "Écris une recette simple de soupe à l'oignon.",
    "Give me a table of five planets with their diameters and distances from the sun.",
    "请介绍一下唐代的诗歌。",
    "Write a polite email that asks for a refund.",
    "What does this shell command do: find . -name '*.log' -mtime +7 -delete",
    "¿Cómo funciona un motor de combustión?",
    "Prove that the square root of 2 is irrational.",
    "Translate into German: The early bird catches the worm.",
    "List ten ideas for a rainy weekend.",
    "Напиши короткое стихотворение о зиме.",
    "How do I undo the last commit in git?",
    "Write a SQL query that finds duplicate rows in a table.",
    "日本の四季について教えてください。",
    "Compare TCP and UDP.",
    "Write a dialogue between a doctor and a patient.",
    "Quali sono i monumenti più famosi di Roma?",
    "Solve the equation 3x + 7 = 22.",
    "Write the JSON of a customer with two orders.",
    "اشرح لي كيف تتكون الغيوم.",
    "What are the side effects of caffeine?",
    "Write a C program that counts words in a file.",
    "Descreva a floresta amazônica em um parágrafo.",
    "Which is heavier, a kilogram of iron or a kilogram of feathers? Think step by step.",
    "한국의 전통 음식을 소개해 주세요.",
    "Draft a contract clause about late payment.",
    "Hello! Who are you?",
)


@dataclass(frozen=True)
class Openings:
    """What windows are given; the model writes the rest.

    Attributes:
        given: by window, its openings, lists of token ids. The first begins the window.
        ends: tokens that end an answer. After one of them the window is given its next opening, or its first again.
        between: tokens that follow such an end before the next opening.
    """

    given: list[list[list[int]]]
    ends: frozenset[int] = field(default_factory=frozenset)
    between: tuple[int, ...] = ()

    def __getitem__(self, rows: slice) -> Openings:
        return Openings(self.given[rows], self.ends, self.between)

    def tokens(self, row: int, number: int) -> list[int]:
        """The window's opening with this number, from 0."""
        openings = self.given[row]
        return [*(self.between if number else ()), *openings[number % len(openings)]]


def openings(tokenizer: Any, start: Start, num_windows: int, num_ids: int, generator: torch.Generator) -> Openings:
    """What `num_windows` windows open with.

    Args:
        tokenizer: a transformers tokenizer.
        start: `random`, a token drawn from the vocabulary without special tokens, after what the tokenizer puts before
            every text; `bos`, the token that begins a text, or the one that ends the text before; `chat`, one of
            `PROMPTS` in the chat template.
        num_windows: S.
        num_ids: token ids that the model can take.
        generator: draws tokens and prompts.

    Raises:
        ValueError: the tokenizer has no such token, or no chat template.
    """
    if start == "chat":
        return _chats(tokenizer, num_windows, generator)
    beginning = beginning_tokens(tokenizer)
    if start == "bos":
        ends = (tokenizer.bos_token_id, tokenizer.eos_token_id)
        beginning = beginning or [token for token in ends if token is not None][:1]
        if not beginning:
            raise ValueError(
                "the tokenizer has no token that begins or ends a text (--data.sample_start bos): pass "
                "--data.sample_start random"
            )
        return Openings([[beginning]] * num_windows)
    special = _special(tokenizer)
    ordinary = torch.tensor(sorted(i for i in tokenizer.get_vocab().values() if i not in special and i < num_ids))
    drawn = ordinary[torch.randint(len(ordinary), (num_windows,), generator=generator)]
    return Openings([[[*beginning, token]] for token in drawn.tolist()])


def _special(tokenizer: Any) -> set[int]:
    """Tokens that do not come of ordinary text."""
    return {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}


def _chats(tokenizer: Any, num_windows: int, generator: torch.Generator) -> Openings:
    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]

    prompts = [chat(prompt) for prompt in PROMPTS]
    texts = [rendered(prompt, tokenizer, add_generation_prompt=True) for prompt in prompts]
    answer = "An answer."
    whole = rendered(chat(PROMPTS[0], answer), tokenizer)
    after = ids(whole.rpartition(answer)[2])  # what the template puts after an answer
    ends = {tokenizer.eos_token_id, *(token for token in after[:1] if token in _special(tokenizer))} - {None}
    if not ends:
        raise ValueError("the chat template ends answers with no token (--data.sample_start chat): pass another start")
    first = torch.randint(len(PROMPTS), (num_windows,), generator=generator).tolist()
    tokens = [ids(text) for text in texts]
    return Openings(
        [tokens[i:] + tokens[:i] for i in first],
        frozenset(ends),
        tuple(after[1:]) if ends.intersection(after[:1]) else (),
    )


def chat(prompt: str, answer: str | None = None) -> Conversation:
    """A conversation of one question, with or without its answer."""
    turns = [{"role": "user", "content": prompt}]
    turns += [] if answer is None else [{"role": "assistant", "content": answer}]
    return Conversation(turns, where="--data.sample_start chat")
