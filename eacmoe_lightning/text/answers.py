"""Texts that a server wrote become windows: asked for a few at a time, then joined or each in a window of its own."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from eacmoe_lightning.text.openings import Openings
from eacmoe_lightning.text.server import Server, ServerError

REQUESTS = 16  # sent to a server at a time
FEWEST = 8  # mean tokens of an answer below which a server is given up
TRIES = 64  # answers after which it may be given up

Answers = dict[str, Tensor]  # ids and marks of all answers, one after another, and the length of each


def ask(
    server: Server,
    tokenizer: Any,
    given: Openings,
    ends: frozenset[int],
    length: int,
    temperature: float,
    generator: torch.Generator,
) -> Answers:
    """Texts of at most `length` tokens, and an end where the model has not written one.

    Args:
        server: writes them.
        tokenizer: of the model that it serves.
        given: what they begin with.
        ends: tokens that end a text.
        length: tokens of a text, at most, without its end.
        temperature: of the draws.
        generator: draws a seed for each request.

    Returns:
        `input_ids`, int32; `chosen`, which of them the model chose, bool; `lengths` [n].

    Raises:
        ServerError: see `Server`.
    """
    seeds = torch.randint(2**31, (len(given.given),), generator=generator).tolist()
    end = tokenizer.eos_token_id if tokenizer.eos_token_id in ends else min(ends, default=None)

    def one(row: int) -> tuple[list[int], list[bool]]:
        prompt = given.tokens(row, 0)[: length - 1]
        answer = server.complete(prompt, tokenizer.decode(prompt), length - len(prompt), temperature, seeds[row])
        ids = answer.token_ids
        if ids is None:
            ids = tokenizer(answer.text, add_special_tokens=False, verbose=False)["input_ids"]
        if end is not None and (not ids or ids[-1] not in ends):
            ids = [*ids, end]
        after = given.between
        return [*prompt, *ids, *after], [False] * len(prompt) + [True] * len(ids) + [False] * len(after)

    with ThreadPoolExecutor(REQUESTS) as threads:
        texts = list(threads.map(one, range(len(seeds))))
    return {
        "input_ids": torch.tensor([token for ids, _ in texts for token in ids], dtype=torch.int32),
        "chosen": torch.tensor([mark for _, marks in texts for mark in marks]),
        "lengths": torch.tensor([len(ids) for ids, _ in texts]),
    }


def enough(parts: list[Answers], num_windows: int, length: int, separate: bool) -> bool:
    """Whether answers make this many windows.

    Raises:
        ServerError: they are so short that more of them would not help.
    """
    texts, tokens = (sum(len(part[name]) for part in parts) for name in ("lengths", "input_ids"))
    if texts >= TRIES and tokens < FEWEST * texts:
        raise ServerError(f"{texts} answers have {tokens} tokens in all: pass another --data.sample_start")
    return texts >= num_windows if separate else tokens >= num_windows * length


def pack(parts: list[Answers], num_windows: int, length: int, filling: int, separate: bool) -> Answers:
    """Windows [S, T] of `input_ids` and `chosen`: texts joined, or each in its window and filled up."""
    joined = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    lengths = joined.pop("lengths").tolist()
    if not separate:
        return {name: values[: num_windows * length].view(num_windows, length) for name, values in joined.items()}
    rows = {}
    for name, values in joined.items():
        rows[name] = torch.full((num_windows, length), filling if name == "input_ids" else 0, dtype=values.dtype)
        for row, text in zip(rows[name], values.split(lengths), strict=False):
            row[: len(text)] = text[:length]
    return rows
