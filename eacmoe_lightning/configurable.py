"""Objects that remember the arguments they were made with, so that a resumed run can tell whether they changed."""

from __future__ import annotations

import inspect
from typing import Any


class Configurable:
    """Base of everything that a config makes by its class path and that a run's result depends on.

    Attributes:
        arguments: of the constructor by name, defaults included.
    """

    arguments: dict[str, Any]

    def __new__(cls, *args: Any, **kwargs: Any) -> Configurable:
        made = super().__new__(cls)
        try:
            bound = inspect.signature(cls.__init__).bind(made, *args, **kwargs)
        except TypeError:  # a copy, which brings its attributes; or a mistake, of which __init__ complains
            return made
        bound.apply_defaults()
        _, *names = bound.arguments
        made.__dict__["arguments"] = {name: bound.arguments[name] for name in names}
        return made

    def settings(self) -> dict[str, Any]:
        """Class path and arguments, as JSON holds them.

        Raises:
            ValueError: an argument is not made of numbers, strings, lists, dictionaries and other configurables.
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
            f"{type(self).__name__}: the argument {name} is a {type(value).__name__}, which a run cannot record to "
            "compare it on resume: pass numbers, strings, lists or dictionaries"
        )
