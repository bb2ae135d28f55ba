"""Objects that record their constructor arguments, so that a resumed run notices if they changed."""

from __future__ import annotations

import inspect
from typing import Any


class Configurable:
    """Base of all classes that a config instantiates by class path and that affect a run's result.

    Attributes:
        arguments: the constructor's arguments by name, including defaults.
    """

    arguments: dict[str, Any]

    def __new__(cls, *args: Any, **kwargs: Any) -> Configurable:
        instance = super().__new__(cls)
        try:
            bound = inspect.signature(cls.__init__).bind(instance, *args, **kwargs)
        except TypeError:  # a copy, which gets its attributes later; or wrong arguments, which __init__ reports
            return instance
        bound.apply_defaults()
        _, *names = bound.arguments
        instance.__dict__["arguments"] = {name: bound.arguments[name] for name in names}
        return instance

    def settings(self) -> dict[str, Any]:
        """Class path and arguments, as JSON values.

        Raises:
            ValueError: an argument does not consist of numbers, strings, lists, dictionaries and other configurables.
        """
        kind = type(self)
        arguments = {name: self._as_json(name, value) for name, value in self.arguments.items()}
        return {"class_path": f"{kind.__module__}.{kind.__qualname__}", "init_args": arguments}

    def _as_json(self, name: str, value: Any) -> Any:
        if isinstance(value, Configurable):
            return value.settings()
        if isinstance(value, list | tuple):
            return [self._as_json(name, item) for item in value]
        if isinstance(value, dict) and all(isinstance(key, str | int) for key in value):
            return {str(key): self._as_json(name, item) for key, item in value.items()}
        if value is None or isinstance(value, bool | int | float | str):
            return value
        raise ValueError(
            f"{type(self).__name__}: the argument {name} is a {type(value).__name__}, which a run cannot record and "
            "compare on resume: pass numbers, strings, lists or dictionaries"
        )
