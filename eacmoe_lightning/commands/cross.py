"""The rows of `analyze --cross`: one `fit` for each calibration text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from eacmoe_lightning.commands.fit import CommandLine
from eacmoe_lightning.run.files import write_json


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
    return {name: _row(place, name, fit_options | {"data.calibration": text}) for name, text in calibration.items()}


def _row(place: Path, name: str, options: dict[str, Any]) -> dict[str, Any]:
    run, finished = place / name, place / f"{name}.json"
    if finished.exists():
        row = json.loads(finished.read_text())
        earlier = row["options"]
        if different := sorted(key for key in earlier.keys() | options.keys() if earlier.get(key) != options.get(key)):
            key = different[0]
            raise ValueError(
                f"{finished} holds a row with other settings ({key} was {earlier.get(key)!r} and is now "
                f"{options.get(key)!r}): pass another --output or the earlier settings"
            )
        return row
    words = [f"--{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in options.items()]
    print(f"calibrating on {name}: {run}", flush=True)
    CommandLine(["fit", *words, f"--trainer.default_root_dir={run}", "--ckpt_path=auto"])
    report = json.loads((run / "report.json").read_text())
    row = {
        "options": options,
        "perplexity": report["perplexity"],
        "changed": {text: rates["after"] for text, rates in report["expert_shift"]["texts"].items()},
    }
    write_json(finished, row)
    return row
