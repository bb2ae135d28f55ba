"""Documents as windows of exactly `window_length` tokens."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoTokenizer

from eacmoe_lightning.text.sources import read_documents

POOL = 16  # random windows are drawn from the first POOL times as many as are asked for
MAX_CHARACTERS_PER_TOKEN = 16  # of ordinary text; more only cost another round of tokenizing


def token_windows(
    documents: Iterable[str],
    tokenizer,
    num_windows: int | None,
    window_length: int,
    seed: int | None = None,
    *,
    source: str = "the text",
    option: str = "--data.num_windows",
) -> Tensor:
    """Cuts documents into non-overlapping windows of token ids, int64 [S, T].

    Documents are concatenated with the tokenizer's end-of-sequence token between them; no other
    special token is added. What is left over at the end is dropped.

    Args:
        documents: texts, in the order of concatenation.
        tokenizer: a transformers tokenizer.
        num_windows: S; None takes every window there is.
        window_length: T, tokens per window.
        seed: takes S windows at random without replacement, in random order, with a generator of
            its own; None takes the first S. Of a text that holds more, only the first 16 S windows
            are tokenized and drawn from.
        source, option: what an error calls the text and the number of windows.

    Raises:
        ValueError: there are fewer than S windows, or not even one.
    """
    for name, number in ((option, num_windows), ("--data.window_length", window_length)):
        if number is not None and number < 1:
            raise ValueError(f"{name}={number} must be at least 1")
    limit = None  # tokens that are enough
    if num_windows is not None:
        limit = num_windows * window_length * (1 if seed is None else POOL)
    ids: list[int] = []
    for piece in _token_pieces(documents, tokenizer, limit):
        ids += piece
        if limit is not None and len(ids) >= limit:
            del ids[limit:]
            break
    found = len(ids) // window_length
    if found == 0:
        raise ValueError(
            f"{source} holds {len(ids)} tokens, one window needs {window_length} "
            "(--data.window_length); pass a longer text or a smaller --data.window_length"
        )
    if num_windows is not None and found < num_windows:
        raise ValueError(
            f"{source} holds {len(ids)} tokens, which make {found} windows of {window_length} "
            f"(--data.window_length), not {num_windows} ({option}); pass a longer text, "
            f"{option}={found} or a smaller --data.window_length"
        )
    windows = torch.tensor(ids[: found * window_length]).view(found, window_length)  # [all, T]
    if seed is not None:
        order = torch.randperm(found, generator=torch.Generator().manual_seed(seed))
        windows = windows[order[:num_windows]]
    return windows[:num_windows].clone()


def _token_pieces(documents: Iterable[str], tokenizer, limit: int | None) -> Iterator[list[int]]:
    """Token ids of one document after another; a document too long for `limit` comes in pieces."""
    # Any other document is tokenized whole: cutting it would change the tokens at the cut.
    most = None if limit is None else max(limit * MAX_CHARACTERS_PER_TOKEN, 1_000_000)
    for number, document in enumerate(documents):
        if number and tokenizer.eos_token_id is not None:
            yield [tokenizer.eos_token_id]
        for start in range(0, len(document), most or max(len(document), 1)):
            text = document[start : start + most] if most else document
            yield tokenizer(text, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]


def read_windows(
    source: str,
    tokenizer: Path,
    num_windows: int | None,
    window_length: int,
    seed: int | None = None,
    option: str = "--num_windows",
) -> Tensor:
    """Token ids [S, T] of the first windows of a source, or with a seed of random ones (`text.token_windows`).

    Raises:
        FileNotFoundError: there is no such text, or no tokenizer.
        ValueError: the text is too short.
    """
    if not any(tokenizer.glob("tokenizer*")):  # transformers would make an empty one
        raise FileNotFoundError(f"{tokenizer} (--model) holds no tokenizer: save the original's there")
    return token_windows(
        read_documents(source),
        AutoTokenizer.from_pretrained(tokenizer),
        num_windows,
        window_length,
        seed,
        source=source,
        option=option,
    )
