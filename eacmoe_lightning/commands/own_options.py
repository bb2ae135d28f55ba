"""What commands with options of their own share: errors that name these, and the directory that they write to."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from inspect import signature
from pathlib import Path
from typing import Any

from eacmoe_lightning.run.lock import LOCK

OF_FIT = {  # what errors about text say to users of `fit`, and what other commands have instead
    "with --data.column NAME or SOURCE#NAME": "as SOURCE#NAME",
    "with --data.column": "as SOURCE#COLUMN",
    "with --data.chat_template FILE": "as chat_template.jinja beside the tokenizer",
    "the chat template (--data.chat_template, or else the tokenizer's)": "the tokenizer's chat template",
    "--data.window_length": "--window_length",
}


@contextmanager
def text_of(option: str, **renamed: str) -> Iterator[None]:
    """Lets errors about a text begin with the option that named it, and name the options of the command.

    Args:
        option: it begins the message.
        renamed: by the name of an option of `--data`, what else the command calls it.
    """
    names = OF_FIT | {f"--data.{name}": f"--{own}" for name, own in renamed.items()}
    try:
        yield
    except (FileNotFoundError, ValueError) as error:
        message = str(error)
        for of_fit, own in names.items():
            message = message.replace(of_fit, own)
        kind = FileNotFoundError if isinstance(error, FileNotFoundError) else ValueError
        raise kind(f"{option}: {message}") from error


def changed(function: Callable, **options: Any) -> str | None:
    """The first of these arguments of a function that is not at its default."""
    parameters = signature(function).parameters
    return next((name for name, value in options.items() if value != parameters[name].default), None)


def check_least(**options: tuple[int | float | None, int]) -> None:
    """Raises ValueError for the first option that is below the least value beside it; None is not checked."""
    for option, (value, least) in options.items():
        if value is not None and not value >= least:
            raise ValueError(f"{option}={value} (--{option}) is below {least}")


def check_window_length(value: int) -> None:
    """Raises ValueError for windows that hold no token to predict."""
    if value < 2:
        raise ValueError(
            f"window_length={value} (--window_length) is below 2: a window's first token has no prediction"
        )


def refuse_others(output: Path, result: str) -> None:
    """Raises ValueError if `--output` holds something, but not `result`, the file that the command begins with."""
    if not output.is_dir() or (output / result).exists():
        return
    if names := sorted(p.name for p in output.iterdir() if p.name != LOCK and not p.name.startswith(".")):
        raise ValueError(
            f"{output} (--output) is not empty and holds no {result}: {names[:3]}. Pass an empty directory"
        )
