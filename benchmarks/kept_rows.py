"""Rows of a benchmark in a JSON file: written as they are made, so that a run that was ended goes on with the next."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from eacmoe_lightning.run.files import write_atomically

Row = dict[str, Any]


class KeptRows:
    """The rows of a file.

    Args:
        path: of the file. Rows in it that have an `error` are made again.
        lacking: values of rows that were written before their columns were added.
    """

    def __init__(self, path: Path, lacking: Mapping[str, Any] | None = None) -> None:
        self.path = path
        made = json.loads(path.read_text()) if path.exists() else []
        self.rows: list[Row] = [{**(lacking or {}), **row} for row in made if "error" not in row]

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def of(self, about: Row) -> Row | None:
        """The row that has these values; None if it was not made."""
        return next((row for row in self.rows if about.items() <= row.items()), None)

    def add(self, row: Row) -> None:
        self.rows.append(row)
        write_rows(self.path, self.rows)


def write_rows(path: Path | None, rows: Any) -> None:
    """Writes the file whole, or leaves what was there; None: there is no file."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(rows, indent=1) + "\n"
        write_atomically(path, lambda partial: partial.write_text(text))
