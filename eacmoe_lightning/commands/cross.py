"""The rows of `analyze --cross`: one `fit` for each calibration text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from eacmoe_lightning.commands.rows import Rows


class CrossRows:
    """One `fit` for each calibration text.

    Args:
        place: the directory that holds the runs, each in a directory named after its text.
        fit_options: options of `fit`, without the calibration text and the run directory.
        calibration: text sources by name.

    Raises:
        ValueError, FileNotFoundError: `place` holds rows of other settings, or `fit` refuses these.
    """

    def __init__(self, place: Path, fit_options: dict[str, Any], calibration: dict[str, str]) -> None:
        self.place, self.rows = place, Rows()
        self.options = {name: fit_options | {"data.calibration": text} for name, text in calibration.items()}
        for name, options in self.options.items():
            self.rows.check(options)
            self.rows.finished(place, name, options)

    def fit(self) -> dict[str, dict[str, Any]]:
        """Runs `fit` once for each calibration text; results of finished runs are read from their files.

        Returns:
            By calibration text: the `options`, the report's `perplexity`, and `changed`, the change rates per text.
        """
        return {name: self._figures(self.rows.run(self.place, name, of)) for name, of in self.options.items()}

    @staticmethod
    def _figures(row: dict[str, Any]) -> dict[str, Any]:
        report = row["report"]
        return {
            "options": row["options"],
            "perplexity": report["perplexity"],
            "changed": {text: rates["after"] for text, rates in report["expert_shift"]["texts"].items()},
        }
