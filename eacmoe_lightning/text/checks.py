"""What is wrong with windows that were cut: tokens that a model does not know, too many of them, repeated text.

And with the tokenizer that cuts them.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping

import numpy as np
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from eacmoe_lightning.text.documents import read_documents
from eacmoe_lightning.text.sources import heldout_names

RUN = 32  # tokens that texts do not share by chance
BOILERPLATE = 0.1  # share of runs that unrelated texts may have in common; license headers make up to 6% of source code
CHUNK = 64  # calibration windows that are hashed at a time
log = logging.getLogger(__name__)


def check_tokens(windows: Tensor, num_rows: int, tokenizer, source: str) -> None:
    """Checks that the model's embedding has a row for every token.

    Args:
        windows: token ids [S, T].
        num_rows: rows of the embedding.
        tokenizer: names the token in the message.
        source: the text.

    Raises:
        ValueError: there is a token without a row.
    """
    if (token := int(windows.max())) >= num_rows:
        name = tokenizer.convert_ids_to_tokens(token)
        raise ValueError(
            f"{source} holds the token {name!r} with id {token}, but the model's embedding has only {num_rows} rows "
            f"(ids 0 to {num_rows - 1}): pass a text without this token, or a model with resized embeddings"
        )


def check_length(window_length: int, positions: int | None, option: str) -> None:
    """Warns of windows of more tokens than the positions that the model was made for, if its config names them."""
    if positions and window_length > positions:
        log.warning(
            "windows of %d tokens (%s) are longer than the %d positions that the model was made for "
            "(max_position_embeddings in its config.json); pass %s %d or less",
            *(window_length, option, positions, option, positions),
        )


def warn_of_repeated(windows: Tensor) -> None:
    """Warns of calibration windows [S, T] that repeat others."""
    num_windows, num_different = len(windows), len(windows.unique(dim=0))
    if num_different < num_windows:
        log.warning(
            "%d of the %d calibration windows repeat others: the text (--data.calibration) repeats itself",
            *(num_windows - num_different, num_windows),
        )


def warn_of_calibrated(heldout: Mapping[str, Tensor], calibration: Iterable[Tensor]) -> None:
    """Warns of held-out windows [S, T], by name of the text, that hold what the calibration windows hold.

    A text is compared by its runs of 32 tokens; in short windows they are half a window long, but at least 16 tokens or
    all. Held-out windows are cut into runs side by side, which may occur anywhere in a calibration window.
    """
    texts = [windows.numpy() for windows in calibration]
    for name, windows in heldout.items():
        width = windows.shape[1]
        length = min(width, max(RUN // 2, min(RUN, width // 2)))
        runs = windows[:, : width // length * length].reshape(-1, length).numpy()
        share = shared_runs(runs, texts)
        if share > BOILERPLATE:
            log.warning(
                "at least %.0f%% of the held-out text %s (--data.heldout) is in the calibration windows too (in runs "
                "of %d tokens), so it tests little: hold out other text, or calibrate on the part [:90%%] and hold out "
                "[90%%:]",
                *(100 * share, name, length),
            )


def shared_runs(runs: np.ndarray, texts: Iterable[np.ndarray]) -> float:
    """The share of runs of tokens [R, L] that occur anywhere in the windows [S, T] of texts, by hashes of 64 bits."""
    hashes, numbers = np.unique(_run_hashes(runs, runs.shape[1]), return_inverse=True)
    found = np.zeros(len(hashes), bool)
    for text in texts:
        for start in range(0, len(text), CHUNK):
            there = _run_hashes(text[start : start + CHUNK], runs.shape[1]).ravel()
            places = hashes.searchsorted(there).clip(max=len(hashes) - 1)
            found[places[hashes[places] == there]] = True
    return float(found[numbers.ravel()].mean())


def _run_hashes(windows: np.ndarray, length: int) -> np.ndarray:
    """uint64 [S, T - length + 1]: a hash of the `length` tokens from each position of windows [S, T]."""
    tokens = windows.astype(np.uint64) * np.uint64(0xD6E8FEB86659FD93)
    tokens ^= tokens >> np.uint64(32)
    number = windows.shape[1] - length + 1
    hashes = np.zeros((len(windows), max(number, 0)), np.uint64)
    for offset in range(length):  # a polynomial in an odd number, modulo 2^64
        hashes *= np.uint64(0x9E3779B97F4A7C15)
        hashes += tokens[:, offset : offset + number]
    return hashes


def refuse_other_tokenizer(given: PreTrainedTokenizerBase, own: PreTrainedTokenizerBase, model: str) -> None:
    """Raises ValueError if a tokenizer is not the one that a compressed model was made with.

    Args:
        given: the tokenizer of an evaluation, from `--model.name_or_path`.
        own: the one beside the compressed model.
        model: the compressed model, for the message.
    """
    if what := tokenizer_difference(given, own, "beside the compressed model"):
        raise ValueError(
            f"the original's tokenizer (--model.name_or_path) is not the one that {model} was made with: {what}. Pass "
            "a directory with the files that the tokenizer had then"
        )


def tokenizer_difference(
    given: PreTrainedTokenizerBase, own: PreTrainedTokenizerBase, place: str, num_ids: int | None = None
) -> str | None:
    """How a tokenizer differs from another; None if it has all of its tokens and cuts text into the same ones.

    Args:
        given: the tokenizer.
        own: the other.
        place: where that lies, for the message.
        num_ids: tokens from here on are not compared, nor those that are put around a text; None compares all.
    """
    ids, known = given.get_vocab(), own.get_vocab()
    others = (
        token for token, number in known.items() if ids.get(token) != number and (num_ids is None or number < num_ids)
    )
    token = min(others, key=known.__getitem__, default=None)
    if token is not None:
        return f"{token!r} has the id {ids.get(token)} there, and {known[token]} {place}"
    texts = [read_documents(f"bundled:{name}")[0][:5000] for name in heldout_names()]
    cut = [tokenizer(texts, add_special_tokens=num_ids is None)["input_ids"] for tokenizer in (given, own)]
    return None if cut[0] == cut[1] else "it cuts text into other tokens"
