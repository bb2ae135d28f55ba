"""The configs that come with the package: every option that takes a config also takes their names (`--config tiny`)."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from jsonargparse import ActionConfigFile, ArgumentParser, Namespace

SHIPPED = Path(__file__).resolve().parent.parent / "configs"
TEXT = re.compile(r"[:{\n]")  # marks text that is neither a file nor a name: YAML or a URL


def config_names() -> list[str]:
    """Names of the shipped configs."""
    return sorted(path.stem for path in SHIPPED.glob("*.yaml"))


def find_config(config: str, option: str = "--config") -> str:
    """The path of a config: `config` itself if it is a file, otherwise the shipped config of that name.

    Raises:
        FileNotFoundError: there is neither such a file nor such a shipped config.
    """
    if os.path.isfile(config) or TEXT.search(config):
        return config
    if config in config_names():
        return str(SHIPPED / f"{config}.yaml")
    raise FileNotFoundError(
        f"there is no config {config} ({option}): pass a file or the name of a config of the package: "
        f"{', '.join(config_names())}"
    )


class NamedConfig(ActionConfigFile):
    """`--config FILE` or `--config NAME`. It may not set what options before it have set."""

    def __init__(self, **kwargs: Any) -> None:
        names = ", ".join(config_names())
        super().__init__(**{**kwargs, "help": f"A YAML file, or the name of a config of the package: {names}."})

    def __call__(self, parser: ArgumentParser, cfg: Any, values: str, option_string: str | None = None) -> None:
        untouched = self.after if cfg.get(self.dest) else parser.get_defaults()
        given = {key: value for key, value in vars(cfg.as_flat()).items() if value != untouched.get(key)}
        super().__call__(parser, cfg, find_config(values), option_string)
        _refuse_overridden(given, cfg, values)
        self.after = cfg.clone()


def _refuse_overridden(given: dict[str, Any], cfg: Namespace, config: str) -> None:
    for key, value in given.items():
        if cfg.get(key) != value:
            raise ValueError(
                f"--{key} stands before --config {config}, which sets it again, to {cfg.get(key)!r}: put --config "
                "before the options that change it"
            )


class NamedConfigParser(ArgumentParser):
    """The argument parser of commands that are functions."""

    def add_argument(self, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("action") is ActionConfigFile:
            kwargs["action"] = NamedConfig
        return super().add_argument(*args, **kwargs)
