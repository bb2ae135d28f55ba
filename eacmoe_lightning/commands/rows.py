"""Rows of a table, each a `fit` of its own; finished ones are read from their files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from eacmoe_lightning.commands.fit import CommandLine
from eacmoe_lightning.run.files import read_json, write_json


def words_of(options: dict[str, Any]) -> list[str]:
    """Options of the command line from values by name."""
    return [f"--{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in options.items()]


def fit_row(
    place: Path, name: str, options: dict[str, Any], words: Sequence[str] = (), split: bool = False
) -> dict[str, Any]:
    """Runs `fit`, and with `split` `test --model.split_damage`, in `place / name`; an interrupted row resumes.

    The result is kept in `<name>.json` beside the run directory, and taken from there the next time.

    Args:
        options: options of `fit`, without the run directory.
        words: further options as words of the command line; `options` override them.

    Returns:
        `options`, `report` (the run's), and with `split` also `test`.

    Raises:
        ValueError: the finished row has other options, or `fit` refuses them.
    """
    run, finished = place / name, place / f"{name}.json"
    settings = options | ({"words": list(words)} if words else {})
    if finished.exists():
        row = read_json(finished)
        earlier = row["options"]
        if different := sorted(
            key for key in earlier.keys() | settings.keys() if earlier.get(key) != settings.get(key)
        ):
            key = different[0]
            raise ValueError(
                f"{finished} holds a row with other settings ({key} was {earlier.get(key)!r} and is now "
                f"{settings.get(key)!r}): pass another --output or the earlier settings"
            )
        return row
    words = [*words, *words_of(options), f"--trainer.default_root_dir={run}"]
    print(f"{name}: {run}", flush=True)
    CommandLine(["fit", *words, "--ckpt_path=auto"])
    row = {"options": settings, "report": read_json(run / "report.json")}
    if split:
        CommandLine(["test", *words, "--model.split_damage=true"])
        row["test"] = read_json(run / "test.json")
    write_json(finished, row)
    return row
