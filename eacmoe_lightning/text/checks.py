"""What is wrong with windows that were cut: tokens that a model does not know, too many of them, repeated windows.

And with the tokenizer that cuts them.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from eacmoe_lightning.text.sources import heldout_names, read_documents

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
    """Warns of held-out windows [S, T], by name of the text, that are calibration windows too."""
    calibrated = {row.numpy().tobytes() for windows in calibration for row in windows.long()}
    for name, windows in heldout.items():
        if same := sum(row.numpy().tobytes() in calibrated for row in windows.long()):
            log.warning(
                "%d of the %d windows of the held-out text %s (--data.heldout) are calibration windows too, so "
                "they test nothing: hold out other text, or calibrate on the part [:90%%] and hold out [90%%:]",
                *(same, len(windows), name),
            )


def refuse_other_tokenizer(given: PreTrainedTokenizerBase, own: PreTrainedTokenizerBase, model: str) -> None:
    """Raises ValueError if a tokenizer is not the one that a compressed model was made with.

    Args:
        given: the tokenizer of an evaluation, from `--model.name_or_path`.
        own: the one beside the compressed model.
        model: the compressed model, for the message.
    """
    ids, known = given.get_vocab(), own.get_vocab()
    token = min((token for token in known if ids.get(token) != known[token]), key=known.__getitem__, default=None)
    if token is not None:
        what = f"{token!r} has the id {ids.get(token)} there, and {known[token]} beside the compressed model"
    else:
        texts = [read_documents(f"bundled:{name}")[0][:5000] for name in heldout_names()]
        if given(texts)["input_ids"] == own(texts)["input_ids"]:
            return
        what = "it cuts text into other tokens"
    raise ValueError(
        f"the original's tokenizer (--model.name_or_path) is not the one that {model} was made with: {what}. Pass a "
        "directory with the files that the tokenizer had then"
    )
