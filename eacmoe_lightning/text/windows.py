"""Documents as windows of exactly `window_length` tokens."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields, replace
from itertools import chain
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from eacmoe_lightning.models.tokenizer import tokenizer_of
from eacmoe_lightning.text.chat import conversation_tokens
from eacmoe_lightning.text.checks import check_length, check_tokens
from eacmoe_lightning.text.documents import documents
from eacmoe_lightning.text.packing import pack
from eacmoe_lightning.text.rows import Conversation, Document

SEEDS = range(-(2**63), 2**63)  # that torch takes
POOL = 16  # N random windows are drawn from the first POOL * N
Layout = Literal["joined", "separate", "packed"]  # how documents lie in windows, see `cut_windows`
MAX_CHARACTERS_PER_TOKEN = 16  # of ordinary text; with more, a long document is tokenized in more than one piece


@dataclass(frozen=True)
class Windows:
    """Windows of tokens, and which of the tokens count.

    Attributes:
        input_ids: int64 [S, T].
        counts: bool [S, T]; False for tokens that are only context of others, or fill up a window. None: all count.
        position_ids: int64 [S, T], where documents are packed: positions in the document, so 0 where one begins; what
            fills up a window goes on from its last document. None: each window is one document to the model.
        num_filling: int64 [S], how many tokens fill up each window. None: none do.
    """

    input_ids: Tensor
    counts: Tensor | None = None
    position_ids: Tensor | None = None
    num_filling: Tensor | None = None


def token_windows(
    documents: Iterable[Document],
    tokenizer,
    num_windows: int | None,
    window_length: int,
    seed: int | None = None,
    *,
    source: str = "the text",
    option: str = "--data.num_windows",
) -> Tensor:
    """The token ids of `cut_windows`, int64 [S, T], with all documents joined."""
    return cut_windows(documents, tokenizer, num_windows, window_length, seed, source=source, option=option).input_ids


def cut_windows(
    documents: Iterable[Document],
    tokenizer,
    num_windows: int | None,
    window_length: int,
    seed: int | None = None,
    *,
    answers_only: bool = False,
    layout: Layout = "joined",
    source: str = "the text",
    option: str = "--data.num_windows",
    share: float = 1.0,
) -> Windows:
    """Cuts documents into windows of T tokens that do not overlap.

    Joined documents are concatenated with the tokenizer's end-of-sequence token between them, and cut every T tokens;
    tokens left over at the end are dropped. Separate documents begin a window each, and packed documents share windows
    in which each has positions from 0 on, so that no token attends to another document: then documents longer than a
    window are cut, and the rest of a window is filled with tokens that do not count. Where attention is causal these
    change nothing.

    A document begins with the tokens that the tokenizer itself puts before a text (BOS, if it adds one), as the samples
    of AutoRound and llm-compressor and the one long text of GPTQ do; what begins inside a document has none. A
    conversation is what the chat template makes of it, with nothing added.

    Args:
        documents: texts and conversations, in the order of concatenation.
        tokenizer: a transformers tokenizer.
        num_windows: S; None takes all windows.
        window_length: T, tokens per window.
        seed: draws S windows (or the documents to pack) at random without replacement and in random order,
            independently of the global random state; None takes the first. Only the first 16 S windows of a text are
            tokenized and drawn from.
        answers_only: only tokens of the assistant's turns count, and windows (or packed documents) without any are left
            out.
        layout: how documents lie in windows.
        source, option: names of the text and of the number of windows in error messages.
        share: the part of the option's windows that are S; it has a remedy of its own.

    Raises:
        ValueError: there are fewer than S windows, or none; or a document is not what `answers_only` or the tokenizer's
            chat template needs.
    """
    for name, number in ((option, num_windows), ("--data.window_length", window_length)):
        if number is not None and number < 1:
            raise ValueError(f"{name}={number} must be at least 1")
    pool = None if num_windows is None else num_windows * (1 if seed is None else POOL)  # windows that suffice
    end = tokenizer.eos_token_id if layout == "joined" else None
    tokens = _Tokens(tokenizer, answers_only, end, source).pieces(documents, pool and pool * window_length)
    parts: list[Part] = []  # of the text: whole windows, or documents
    num_tokens = num_taken = 0
    for ids, marks in (_joined if layout == "joined" else _apart)(tokens, window_length):
        num_tokens += len(ids)
        if (layout != "joined" or len(ids) == window_length) and (not answers_only or any(marks)):
            parts.append((ids, marks))
            num_taken += len(ids) if layout == "packed" else window_length
            if pool is not None and num_taken >= pool * window_length:
                break
    if seed is not None:
        order = torch.randperm(len(parts), generator=torch.Generator().manual_seed(seed))
        parts = [parts[number] for number in order.tolist()]
    numbers = [[number] for number in range(len(parts))]
    if layout == "packed":
        numbers = pack([len(ids) for ids, _ in parts], window_length, num_windows)
    least = window_length if layout == "joined" else 1  # tokens that make a window
    _check_enough(len(numbers), num_windows, num_tokens, least, window_length, source, option, answers_only, share)
    filled = _filled(
        [[parts[number] for number in window] for window in numbers[:num_windows]], window_length, tokenizer
    )
    if layout != "packed":
        filled = replace(filled, position_ids=None)
    if layout == "joined":
        filled = replace(filled, counts=filled.counts if answers_only else None, num_filling=None)
    return filled


def _filled(windows: list[list[Part]], length: int, tokenizer) -> Windows:
    """Windows of these parts, filled up to `length` tokens."""
    size = len(windows), length
    filled = Windows(
        input_ids=torch.full(size, tokenizer.eos_token_id or 0),
        counts=torch.zeros(size, dtype=torch.bool),
        position_ids=torch.zeros(size, dtype=torch.int64),
        num_filling=torch.zeros(len(windows), dtype=torch.int64),
    )
    for row, parts in enumerate(windows):
        start = 0
        for ids, marks in parts:
            end = start + len(ids)
            filled.input_ids[row, start:end] = torch.tensor(ids)
            filled.counts[row, start:end] = torch.tensor(marks)
            filled.position_ids[row, start:] = torch.arange(length - start)
            start = end
        filled.num_filling[row] = length - start
    return filled


def split_windows(num_windows: int, texts: list[str], shares: dict[str, float] | None) -> dict[str, int]:
    """The number of windows of each text, in proportion to its share; rounded so that the sum is `num_windows`.

    Raises:
        ValueError: the shares are not positive or not those of the texts, or a text would get no window.
    """
    if num_windows < 1:
        raise ValueError(f"--data.num_windows={num_windows} must be at least 1")
    shares = dict.fromkeys(texts, 1.0) if shares is None else shares
    if set(shares) != set(texts) or not all(0 < share < math.inf for share in shares.values()):
        raise ValueError(f"--data.shares={shares} must give each of {', '.join(texts)} a finite share above 0")
    exact = {text: num_windows * shares[text] / sum(shares.values()) for text in texts}
    numbers = {text: int(number) for text, number in exact.items()}
    for text in sorted(texts, key=lambda text: numbers[text] - exact[text])[: num_windows - sum(numbers.values())]:
        numbers[text] += 1
    if 0 in numbers.values():
        none = ", ".join(text for text, number in numbers.items() if not number)
        raise ValueError(f"--data.num_windows={num_windows} leaves no window for {none}: pass more windows")
    return numbers


def join_windows(texts: list[Windows]) -> Windows:
    """The windows of several texts, one after another."""
    tensors: dict[str, Tensor | None] = {}
    for name in (field.name for field in fields(Windows)):
        parts = [getattr(text, name) for text in texts]
        if all(part is None for part in parts):
            continue
        tensors[name] = torch.cat([_neutral(t, name) if p is None else p for t, p in zip(texts, parts, strict=True)])
    return Windows(**tensors)


def _neutral(windows: Windows, name: str) -> Tensor:
    """What None stands for in a field of `Windows`."""
    number, length = windows.input_ids.shape
    match name:
        case "counts":
            return torch.ones(number, length, dtype=torch.bool)
        case "position_ids":
            return torch.arange(length).repeat(number, 1)
    return torch.zeros(number, dtype=torch.int64)


def _check_enough(
    available: int,
    num_windows: int | None,
    num_tokens: int,
    least: int,
    window_length: int,
    source: str,
    option: str,
    answers_only: bool,
    share: float,
) -> None:
    if available == 0 and answers_only and num_tokens >= least:
        raise ValueError(
            f"{source} holds {num_tokens} tokens, but no window of {window_length} with a token of an answer "
            "(--data.answers_only)"
        )
    if available == 0:
        raise ValueError(
            f"{source} holds {num_tokens} tokens, but one window needs {window_length} "
            "(--data.window_length); pass a longer text or a smaller --data.window_length"
        )
    if num_windows is not None and available < num_windows:
        wanted, fewer = option, f"{option}={available}"
        if share < 1:
            wanted = f"its share of {option}"
            fewer = f"{option}={int(available / share)}, a smaller share (--data.shares)"  # which give it `available`
        raise ValueError(
            f"{source} holds {num_tokens} tokens, which make {available} windows of {window_length} "
            f"(--data.window_length){' with answers' if answers_only else ''}, not {num_windows} ({wanted}); pass a "
            f"longer text, {fewer} or a smaller --data.window_length"
        )


# The tokens of a piece of a document, which of them count, and whether the piece begins a document.
Piece = tuple[list[int], list[bool], bool]
Part = tuple[list[int], list[bool]]  # tokens that one window takes, and which of them count


def _joined(pieces: Iterator[Piece], length: int) -> Iterator[Part]:
    """All documents in windows of `length` tokens, and at last what is left over."""
    ids: list[int] = []
    marks: list[bool] = []
    for piece, counts, _ in pieces:
        ids += piece
        marks += counts
        whole = len(ids) // length * length
        for start in range(0, whole, length):
            yield ids[start : start + length], marks[start : start + length]
        del ids[:whole], marks[:whole]
    yield ids, marks


def _apart(pieces: Iterator[Piece], length: int) -> Iterator[Part]:
    """Each document, cut every `length` tokens."""
    ids: list[int] = []
    marks: list[bool] = []
    for piece, counts, is_first in chain(pieces, [([], [], True)]):
        if is_first and ids:
            yield ids, marks
            ids, marks = [], []
        for part in _joined(iter([(ids + piece, marks + counts, is_first)]), length):
            if len(part[0]) == length:
                yield part
            else:
                ids, marks = part


class _Tokens:
    """Documents become tokens.

    Args:
        tokenizer: a transformers tokenizer.
        answers_only: only tokens of the assistant's turns count.
        end: the token between a text and the next document; None puts none there.
        source: name of the text in error messages.
    """

    def __init__(self, tokenizer, answers_only: bool, end: int | None, source: str) -> None:
        self.tokenizer, self.answers_only, self.end, self.source = tokenizer, answers_only, end, source
        self.beginning = beginning_tokens(tokenizer)

    def pieces(self, documents: Iterable[Document], limit: int | None) -> Iterator[Piece]:
        """Document by document; a text too long for `limit` tokens comes in pieces."""
        needs_end = False
        for document in documents:
            if needs_end:
                yield [self.end], [True], False
            needs_end = self.end is not None and isinstance(document, str)
            if isinstance(document, Conversation):
                yield *conversation_tokens(document, self.tokenizer, self.answers_only), True
                continue
            if self.answers_only:
                raise ValueError(
                    f"{self.source} holds plain text, in which no token belongs to an answer (--data.answers_only): "
                    "name the column of the turns with --data.column, or leave the option out"
                )
            yield from self._of_text(document, limit)

    def _of_text(self, document: str, limit: int | None) -> Iterator[Piece]:
        # Only texts that are too long are cut, because a cut changes the tokens beside it.
        step = max(len(document), 1) if limit is None else max(limit * MAX_CHARACTERS_PER_TOKEN, 1_000_000)
        for start in range(0, len(document), step):
            text = document[start : start + step]
            ids = self.tokenizer(text, add_special_tokens=False, return_attention_mask=False, verbose=False)
            ids = (self.beginning if start == 0 else []) + ids["input_ids"]
            yield ids, [True] * len(ids), start == 0


def beginning_tokens(tokenizer) -> list[int]:
    """The special tokens that a tokenizer puts before every text: BOS, several, or none."""
    if not getattr(tokenizer, "num_special_tokens_to_add", int)():
        return []
    options = {"return_attention_mask": False, "verbose": False}
    whole = tokenizer("a", **options)["input_ids"]
    alone = tokenizer("a", add_special_tokens=False, **options)["input_ids"]
    for start in range(len(whole) - len(alone) + 1):
        if whole[start : start + len(alone)] == alone:
            return list(whole[:start])
    return []


def read_sizes(model: Path) -> tuple[int | None, int | None]:
    """Rows of the embedding and `max_position_embeddings` of a model directory, where its config.json has them.

    That of a compressed directory has them in the original's config.
    """
    path = model / "config.json"
    config = json.loads(path.read_text()) if path.is_file() else {}
    config = (config.get("original") or {}).get("config") or config
    config |= config.get("text_config") or {}
    return config.get("vocab_size"), config.get("max_position_embeddings")


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
    trust_remote_code: bool = False,
) -> Tensor:
    """Token ids [S, T] of a source's first windows or, with a seed, of random ones (see `token_windows`).

    Args:
        tokenizer: a model directory, with its tokenizer and its config.json.
        trust_remote_code: whether Python code beside the tokenizer may run.

    Raises:
        FileNotFoundError: there is no such text, or no tokenizer.
        ValueError: the text is too short, or holds a token that the model has no embedding for.
    """
    loaded = tokenizer_of(str(tokenizer), "--model", trust_remote_code)
    windows = token_windows(documents(source), loaded, num_windows, window_length, seed, source=source, option=option)
    num_rows, positions = read_sizes(tokenizer)
    if num_rows is not None:
        check_tokens(windows, num_rows, loaded, source)
    check_length(window_length, positions, "--window_length")
    return windows
