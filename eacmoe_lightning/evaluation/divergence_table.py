"""The figures of a report as the rows of a table, with llama.cpp's names; for `report.md` and `report.html`."""

from __future__ import annotations

import math
from typing import Any

from eacmoe_lightning.evaluation.streams import NOISE_FLOOR

COLUMNS = (  # after the text's
    *("PPL(base)", "PPL(Q)", "Mean ln(PPL(Q)/PPL(base))", "Mean KLD", "Median", "90%", "99%", "99.9%", "Maximum"),
    *("Same top p", "Mean Δp", "RMS Δp", "tokens"),
)
STREAMS = {"before": "before", "compressed": "compressed", NOISE_FLOOR: "noise floor"}


def divergence_rows(report: dict[str, Any]) -> list[list[str]]:
    """A row for each text and for the noise floor beside it: its name, and the cells of `COLUMNS`."""
    rows = []
    for text, streams in (report.get("divergence") or {}).get("texts", {}).items():
        perplexity = report["perplexity"][text]
        for stream, label in STREAMS.items():
            if not (figures := streams.get(stream)):
                continue
            name = text if stream == "compressed" else f"{text}, {label}"
            other = perplexity.get(stream)
            rows.append([name, *_cells(figures, perplexity["original"] if other is not None else None, other)])
    return rows


def _cells(figures: dict[str, Any], base: float | None, other: float | None) -> list[str]:
    kl = figures["kl"]
    return [
        "" if base is None else f"{base:.3f}",
        "" if other is None else f"{other:.3f}",
        _with_error(figures["log_ppl_ratio"], figures["log_ppl_ratio_error"]),
        _with_error(kl["mean"], kl["error"]),
        *(_digits(kl[name]) for name in ("median", "p90", "p99", "p99_9", "max")),
        _percent_with_error(figures["same_top"], figures["same_top_error"]),
        _percent_with_error(figures["mean_dp"], figures["mean_dp_error"]),
        _percent_with_error(figures["rms_dp"], figures["rms_dp_error"]),
        str(figures["tokens"]),
    ]


def _digits(value: float, significant: int = 3) -> str:
    """At least four decimals, and more where a value is small."""
    if not value or not math.isfinite(value):
        return "0" if not value else str(value)
    return f"{value:.{max(4, significant - 1 - math.floor(math.log10(abs(value))))}f}"


def _with_error(value: float, error: float) -> str:
    return f"{_digits(value)} ± {_digits(error, 1)}"


def _percent_with_error(share: float, error: float) -> str:
    return f"{100 * share:.3f} ± {100 * error:.3f} %"
