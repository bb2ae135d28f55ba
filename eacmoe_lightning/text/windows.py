"""Documents as windows of exactly `window_length` tokens."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoTokenizer

from eacmoe_lightning.text.sources import read_documents

POOL = 16  # N random windows are drawn from the first POOL * N
MAX_CHARACTERS_PER_TOKEN = 16  # of ordinary text; with more, a long document is tokenized in more than one piece


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
    special token is added. Tokens left over at the end are dropped.

    Args:
        documents: texts, in the order of concatenation.
        tokenizer: a transformers tokenizer.
        num_windows: S; None takes all windows.
        window_length: T, tokens per window.
        seed: draws S windows at random without replacement and in random order, independently of the
            global random state; None takes the first S. Only the first 16 S windows of a text are
            tokenized and drawn from.
        source, option: names of the text and of the number of windows in error messages.

    Raises:
        ValueError: there are fewer than S windows, or none.
    """
    for name, number in ((option, num_windows), ("--data.window_length", window_length)):
        if number is not None and number < 1:
            raise ValueError(f"{name}={number} must be at least 1")
    limit = None  # number of tokens that suffice
    if num_windows is not None:
        limit = num_windows * window_length * (1 if seed is None else POOL)
    ids: list[int] = []
    for piece in _token_pieces(documents, tokenizer, limit):
        ids += piece
        if limit is not None and len(ids) >= limit:
            del ids[limit:]
            break
    available = len(ids) // window_length
    if available == 0:
        raise ValueError(
            f"{source} holds {len(ids)} tokens, but one window needs {window_length} "
            "(--data.window_length); pass a longer text or a smaller --data.window_length"
        )
    if num_windows is not None and available < num_windows:
        raise ValueError(
            f"{source} holds {len(ids)} tokens, which make {available} windows of {window_length} "
            f"(--data.window_length), not {num_windows} ({option}); pass a longer text, "
            f"{option}={available} or a smaller --data.window_length"
        )
    windows = torch.tensor(ids[: available * window_length]).view(available, window_length)  # [all, T]
    if seed is not None:
        order = torch.randperm(available, generator=torch.Generator().manual_seed(seed))
        windows = windows[order[:num_windows]]
    return windows[:num_windows].clone()


def _token_pieces(documents: Iterable[str], tokenizer, limit: int | None) -> Iterator[list[int]]:
    """Token ids, document by document; a document too long for `limit` comes in pieces."""
    # Other documents are tokenized whole, because splitting changes the tokens at the split.
    max_characters = None if limit is None else max(limit * MAX_CHARACTERS_PER_TOKEN, 1_000_000)
    for number, document in enumerate(documents):
        if number and tokenizer.eos_token_id is not None:
            yield [tokenizer.eos_token_id]
        for start in range(0, len(document), max_characters or max(len(document), 1)):
            text = document[start : start + max_characters] if max_characters else document
            yield tokenizer(text, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]


def digest(*tensors: Tensor) -> str:
    """SHA-256, in hexadecimal, of the tensors' shapes and values as int64 or float64."""
    sha = hashlib.sha256()
    for tensor in tensors:
        wide = tensor.double() if tensor.is_floating_point() else tensor.long()
        sha.update(f"{wide.dtype} {list(wide.shape)}".encode())
        sha.update(wide.contiguous().numpy().tobytes())
    return sha.hexdigest()


def read_windows(
    source: str,
    tokenizer: Path,
    num_windows: int | None,
    window_length: int,
    seed: int | None = None,
    option: str = "--num_windows",
) -> Tensor:
    """Token ids [S, T] of a source's first windows or, with a seed, of random ones (see `token_windows`).

    Raises:
        FileNotFoundError: there is no such text, or no tokenizer.
        ValueError: the text is too short.
    """
    if not any(tokenizer.glob("tokenizer*")):  # transformers would make an empty one
        raise FileNotFoundError(f"{tokenizer} (--model) has no tokenizer: save the original's tokenizer there")
    return token_windows(
        read_documents(source),
        AutoTokenizer.from_pretrained(tokenizer),
        num_windows,
        window_length,
        seed,
        source=source,
        option=option,
    )
