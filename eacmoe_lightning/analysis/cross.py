"""Calibrated on A, evaluated on B, for every pair of texts: how much of a compression holds off its calibration text.

A row of the table is a whole `fit` that calibrates on one text and is evaluated on all of them. Each keeps its run
directory, so an interrupted table goes on where it was; a finished row is kept as `<text>.json` beside it.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from eacmoe_lightning.expert_shift import RATES
from eacmoe_lightning.store import write_json


def fit_rows(place: Path, fit_options: dict[str, Any], calibration: dict[str, str]) -> dict[str, dict[str, Any]]:
    """One `fit` for each calibration text; finished ones are read.

    Args:
        place: where the runs are kept, each in a directory named after its text.
        fit_options: of `fit`, without the calibration text and the run directory.
        calibration: text sources by name.

    Returns:
        By calibration text, its report's `perplexity` and `expert_shift.texts`.

    Raises:
        ValueError: `place` holds rows of other settings, or `fit` refuses them.
    """
    return {name: _row(place, name, fit_options | {"data.calibration": text}) for name, text in calibration.items()}


def _row(place: Path, name: str, options: dict[str, Any]) -> dict[str, Any]:
    from eacmoe_lightning.cli import CommandLine  # which knows the commands, this one among them

    run, finished = place / name, place / f"{name}.json"
    if finished.exists():
        row = json.loads(finished.read_text())
        held = row["options"]
        if different := sorted(key for key in held.keys() | options.keys() if held.get(key) != options.get(key)):
            key = different[0]
            raise ValueError(
                f"{finished} holds a row with other settings ({key} was {held.get(key)!r} and is now "
                f"{options.get(key)!r}): pass another --output, or the settings of that analysis"
            )
        return row
    words = [f"--{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in options.items()]
    resume = ["--ckpt_path=last"] if (run / "run.json").exists() else []
    print(f"calibrating on {name}: {run}", flush=True)
    CommandLine(["fit", *words, f"--trainer.default_root_dir={run}", *resume])
    report = json.loads((run / "report.json").read_text())
    row = {
        "options": options,
        "perplexity": report["perplexity"],
        "changed": {text: rates["after"] for text, rates in report["expert_shift"]["texts"].items()},
    }
    write_json(finished, row)
    return row


def cross_table(rows: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The rows as matrices [calibrated on][evaluated on].

    Returns:
        `calibrated_on`, `evaluated_on`; `perplexity`, `lost` (nats per token above the original), `changed.<rate>`
        (share of tokens with any, half, all selections changed, and of selections); `own` and `other`: the means of
        `lost` and `changed.any` where both texts are the same and where not (null where there is no such pair).
    """
    names = list(rows)
    evaluated = rows[names[0]]["perplexity"]
    texts = [name for name in names if name in evaluated] + sorted(evaluated.keys() - rows.keys())
    perplexity = [[row["perplexity"][text]["compressed"] for text in texts] for row in rows.values()]
    lost = [
        [math.log(row["perplexity"][t]["compressed"] / row["perplexity"][t]["original"]) for t in texts]
        for row in rows.values()
    ]
    changed = {
        rate: [[row["changed"][text][rate] for text in texts] for row in rows.values()]
        for rate in (*RATES, "selections")
    }
    result = {
        "calibrated_on": names,
        "evaluated_on": texts,
        "original": {text: next(iter(rows.values()))["perplexity"][text]["original"] for text in texts},
        "perplexity": perplexity,
        "lost": lost,
        "changed": changed,
    }
    pairs = [(i, j, name == text) for i, name in enumerate(names) for j, text in enumerate(texts)]
    for key, wanted in (("own", True), ("other", False)):
        cells = [(i, j) for i, j, same in pairs if same == wanted]
        result[key] = {
            "lost": _mean([lost[i][j] for i, j in cells]),
            "changed_any": _mean([changed["any"][i][j] for i, j in cells]),
        }
    return result


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None


def cross_summary(result: dict[str, Any]) -> str:
    """A few lines for the terminal."""
    texts, lines = result["evaluated_on"], []
    for title, matrix, form in (
        ("nats per token lost; calibrated on (rows), evaluated on (columns)", result["lost"], "{:10.4f}"),
        ("tokens with any selection changed", result["changed"]["any"], "{:10.2%}"),
    ):
        lines += [title, " " * 12 + "".join(f"{text[:9]:>10s}" for text in texts)]
        for name, row in zip(result["calibrated_on"], matrix, strict=True):
            lines.append(f"{name:12s}" + "".join(form.format(value) for value in row))
    own, other = result["own"], result["other"]
    if own["lost"] is not None and other["lost"] is not None:
        lines.append(
            f"lost on the text calibrated on {own['lost']:.4f}, on others {other['lost']:.4f}; "
            f"changed {own['changed_any']:.2%}, {other['changed_any']:.2%}"
        )
    return "\n".join(lines)
