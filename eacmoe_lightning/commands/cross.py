"""The rows of `analyze --cross`: one `fit` for each calibration text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from eacmoe_lightning.commands.rows import Rows


def fit_rows(place: Path, fit_options: dict[str, Any], calibration: dict[str, str]) -> dict[str, dict[str, Any]]:
    """Runs `fit` once for each calibration text; results of finished runs are read from their files.

    Args:
        place: the directory that holds the runs, each in a directory named after its text.
        fit_options: options of `fit`, without the calibration text and the run directory.
        calibration: text sources by name.

    Returns:
        By calibration text: the `options`, the report's `perplexity`, and `changed`, the change rates per text.

    Raises:
        ValueError: `place` holds rows of other settings, or `fit` refuses them.
    """
    rows, runs = {}, Rows()
    for name, text in calibration.items():
        row = runs.run(place, name, fit_options | {"data.calibration": text})
        report = row["report"]
        rows[name] = {
            "options": row["options"],
            "perplexity": report["perplexity"],
            "changed": {text: rates["after"] for text, rates in report["expert_shift"]["texts"].items()},
        }
    return rows
