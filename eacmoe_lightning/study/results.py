"""What a study has measured so far, in one file that is whole at any moment: `cells.json` in its output directory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from eacmoe_lightning.run.directory import refuse_other_settings
from eacmoe_lightning.run.files import StoreError, write_json


class Results:
    """Finished measurements by key.

    Args:
        path: the file; it is made by the first `add`.
        identity: what the measurements depend on beside their keys: model, texts, windows.

    Raises:
        ValueError: the file holds those of another model or other texts.
        StoreError: the file cannot be read.
    """

    def __init__(self, path: Path, identity: dict[str, Any]) -> None:
        self.path, self.identity = path, json.loads(json.dumps(identity))
        self.rows: dict[str, dict[str, Any]] = {}
        if not path.exists():
            return
        try:
            held = json.loads(path.read_text())
            held_identity, self.rows = held["identity"], held["rows"]
        except (ValueError, KeyError, TypeError) as error:
            raise StoreError(
                f"{path} is not what was written ({error!r}): restore it, or delete it to measure again"
            ) from error
        remedy = "another --output, or the settings of that study"
        refuse_other_settings(f"{path} holds measurements", held_identity, self.identity, remedy)

    def __contains__(self, key: str) -> bool:
        return key in self.rows

    def __getitem__(self, key: str) -> dict[str, Any]:
        return self.rows[key]

    def add(self, key: str, row: dict[str, Any]) -> None:
        """Keeps a measurement, on disk before this returns."""
        self.rows[key] = json.loads(json.dumps(row))
        write_json(self.path, {"identity": self.identity, "rows": self.rows})
