"""What transformers' errors about a config.json say, with the option that is wrong where only its value is named."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from huggingface_hub.errors import StrictDataclassError


def described(error: BaseException, options: Mapping[str, Any]) -> str:
    """An error as text, after the option whose value it does not know.

    transformers looks values up in tables and in modules, so that an unknown one is a KeyError or an AttributeError
    with nothing but the value. A value of the wrong type is named in the last line of an error.

    Args:
        error: what transformers raised.
        options: the content of config.json.
    """
    if isinstance(error, StrictDataclassError):
        what = str(error).rpartition("\n")[2].strip()
        return re.sub(r"^\w+: ", "", what.partition(". Errors:")[0])  # which follow for each type that it could have
    value = error.name if isinstance(error, AttributeError) else (*error.args, None)[0]
    if not isinstance(error, KeyError | AttributeError) or not isinstance(value, str):
        return repr(error)
    named = [name for name, other in _flat(options) if other == value]
    if isinstance(error, AttributeError) and not named:
        return repr(error)
    return f"it does not know {named[0]}={value!r}" if named else f"it lacks {value!r}"


def _flat(options: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Options and their values, nested ones as `text_config.hidden_act`."""
    for name, value in options.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
