"""A study's measurements so far, in one file that is complete at any moment: `cells.json` in the output directory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from eacmoe_lightning.run.directory import refuse_other_settings
from eacmoe_lightning.run.files import StoreError, write_json


class Results:
    """Finished measurements by key.

    Args:
        path: the file; the first `add` creates it.
        identity: what the measurements depend on besides their keys: model, texts, windows.

    Raises:
        ValueError: the file holds measurements of another model or other texts.
        StoreError: the file cannot be read.
    """

    def __init__(self, path: Path, identity: dict[str, Any]) -> None:
        self.path, self.identity = path, json.loads(json.dumps(identity))
        self.rows: dict[str, dict[str, Any]] = {}
        if not path.exists():
            return
        try:
            stored = json.loads(path.read_text())
            stored_identity, self.rows = stored["identity"], stored["rows"]
        except (ValueError, KeyError, TypeError) as error:
            raise StoreError(f"{path} is damaged ({error!r}): restore it, or delete it to measure again") from error
        remedy = "another --output, or the settings of that study"
        refuse_other_settings(f"{path} holds measurements", stored_identity, self.identity, remedy)

    def __contains__(self, key: str) -> bool:
        return key in self.rows

    def __getitem__(self, key: str) -> dict[str, Any]:
        return self.rows[key]

    def add(self, key: str, row: dict[str, Any]) -> None:
        """Keeps a measurement; it is on disk before this returns."""
        self.rows[key] = json.loads(json.dumps(row))
        write_json(self.path, {"identity": self.identity, "rows": self.rows})
