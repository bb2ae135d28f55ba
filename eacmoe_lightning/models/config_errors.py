"""What transformers' errors about a config.json say, with the option that is wrong where only its value is named."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any


def described(error: BaseException, options: Mapping[str, Any]) -> str:
    """An error as text, after the option whose value it does not know.

    transformers looks values up in tables, so that an unknown one is a KeyError with nothing but the value.

    Args:
        error: what transformers raised.
        options: the content of config.json.
    """
    if not isinstance(error, KeyError) or not error.args or not isinstance(error.args[0], str):
        return repr(error)
    named = [name for name, value in _flat(options) if value == error.args[0]]
    return f"it does not know {named[0]}={error.args[0]!r}" if named else f"it lacks {error.args[0]!r}"


def _flat(options: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Options and their values, nested ones as `text_config.hidden_act`."""
    for name, value in options.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
