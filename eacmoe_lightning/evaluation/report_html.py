"""`report.html`: the report as one file without network, for readers who do not know this package.

The page is a Jinja template of `assets/report/`. Bars are CSS, so that they are readable on a phone. All text is
escaped.
"""

from __future__ import annotations

import math
from importlib.resources import files
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined

from eacmoe_lightning.evaluation.divergence_table import COLUMNS, divergence_rows
from eacmoe_lightning.evaluation.streams import NOISE_FLOOR

ASSETS = files("eacmoe_lightning") / "assets" / "report"
LABELS = 12  # block numbers under a chart


def render(template: str, **values: Any) -> str:
    """A page of `assets/report/`, with its style inside."""
    environment = Environment(
        loader=FunctionLoader(lambda name: (ASSETS / name).read_text("utf-8")),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
    )
    environment.filters |= {
        "bytes": as_bytes,
        "percent": as_percent,
        "nats": as_nats,
        "time": as_time,
        "width": as_width,
        "exp": math.exp,
    }
    style = (ASSETS / "style.css").read_text("utf-8")
    return environment.get_template(template).render(style=environment.filters["safe"](style), **values)


def html(report: dict[str, Any]) -> str:
    """The page of a report (`report.build`)."""
    divergence = report.get("divergence") or {}
    texts = [
        {"name": name, "ours": streams["compressed"], "floor": streams.get(NOISE_FLOOR)}
        for name, streams in divergence.get("texts", {}).items()
        if streams.get("compressed")
    ]
    cost, size, bits = report["cost"], report["size_bytes"], report["bits"]
    phases = [{"name": name, **row} for name, row in cost.items() if isinstance(row, dict)]
    confidence = _confidence([text["ours"] for text in texts])
    shifts, on_heldout = _shifts(report["expert_shift"]["blocks"])
    after = report["expert_shift"]["mean"].get("after", {})
    weighted_all = after.get("weighted") if on_heldout else None
    distances = divergence.get("blocks", [])
    return render(
        "report.html.jinja",
        name=report["model"]["name_or_path"],
        what=_what(report),
        bits={"original": None, "all": None} | bits,
        size=size,
        smaller=size["original"] / max(size["compressed"], 1),
        kl=divergence.get("mean", {}).get("compressed") or None,
        texts=texts,
        has_floor=any(text["floor"] for text in texts),
        most_kl=_most(text["ours"]["kl"]["mean"] for text in texts),
        confidence=confidence,
        most_confidence=_most(row["kl"] for row in confidence),
        distances=distances,
        most_distance=_most(row["compressed"] for row in distances),
        every=max(1, math.ceil(report["model"]["blocks"] / LABELS)),
        shifts=shifts,
        on_heldout=on_heldout,
        most_shift=_most(row["any"] for row in shifts),
        weighted=weighted_all / after["any"] if weighted_all and after["any"] else None,
        weighted_all=weighted_all,
        pruned=report.get("pruning"),
        seconds=cost["total_seconds"],
        phases=phases,
        most_seconds=_most(phase["seconds"] for phase in phases),
        peak=max((phase["peak_bytes"] for phase in phases), default=0),
        machine=report["machine"]["processor"],
        table={"columns": COLUMNS, "rows": divergence_rows(report)},
        provenance=_provenance(report),
    )


def as_bytes(size: float) -> str:
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= factor:
            return f"{size / factor:.{1 if size < 100 * factor else 0}f} {unit}"
    return f"{size:.0f} bytes"


def as_percent(share: float) -> str:
    return f"{100 * share:.{1 if share >= 0.01 else 2}f}\N{NO-BREAK SPACE}%"


def as_nats(value: float) -> str:
    return "0" if value == 0 else f"{value:.1e}" if abs(value) < 0.00005 else f"{value:.4f}"


def as_time(seconds: float) -> str:
    for unit, factor in (("h", 3600), ("min", 60)):
        if seconds >= 2 * factor:
            return f"{seconds / factor:.1f} {unit}"
    return f"{seconds:.{1 if seconds < 10 else 0}f} s"


def as_width(share: float) -> str:
    """A CSS length: the share of the whole, between 0 and 100 %."""
    return f"{100 * min(max(share, 0.0), 1.0):.2f}%"


def _most(values) -> float:
    return max(values, default=0.0) or 1.0


def _what(report: dict[str, Any]) -> str:
    removed = report.get("pruning", {}).get("removed", 0)
    pruned = f"{removed} of {report['pruning']['experts']} experts removed, " if removed else ""
    return f"{pruned}compressed to {report['bits']['true']:.2f} bits per quantized weight"


def _confidence(texts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """KL by the original's confidence over the tokens of all texts; bins without tokens are left out."""
    rows, total = [], sum(text["tokens"] for text in texts)
    for bins in zip(*(text["by_confidence"] for text in texts), strict=True):
        tokens = [text["tokens"] * row["share"] for text, row in zip(texts, bins, strict=True)]
        if sum(tokens):
            kl = sum(n * row["kl"] for n, row in zip(tokens, bins, strict=True) if row["kl"] is not None) / sum(tokens)
            rows.append({"from": bins[0]["from"], "to": bins[0]["to"], "share": sum(tokens) / total, "kl": kl})
    return rows


def _shifts(blocks: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], bool]:
    """Change rates after calibration by block, and whether they are those of held-out text."""
    on_heldout = all("heldout" in row for row in blocks) and bool(blocks)
    text = "heldout" if on_heldout else "calibration"
    return [row[text]["after"] | {"block": row["block"]} for row in blocks], on_heldout


def _asked(allocation: dict[str, Any]) -> str:
    asked = ", ".join(f"{name} {value:g}" for name, value in allocation["asked"].items())
    return f"{asked}: {allocation['bits']:.4f} bits a weight, predicted KL divergence {allocation['predicted']:.4f}"


def _provenance(report: dict[str, Any]) -> list[tuple[str, str]]:
    model, machine = report["model"], report["machine"]
    return [
        ("model", f"{model['name_or_path']} ({model['type']}): {model['blocks']} blocks, {model['experts']} experts, "
                  f"{model['top_k']} for each token"),
        ("command", report["command"]),
        *([("bits chosen for", _asked(report["allocation"]))] if "allocation" in report else []),
        ("router calibration", report["router"]["method"]),
        ("commit", report["commit"]),
        ("seed", str(report["seed"])),
        ("versions", ", ".join(f"{name} {number}" for name, number in report["versions"].items())),
        ("machine", f"{machine['processor']}, {machine['threads']} threads, {machine['processes']} processes"),
    ]  # fmt: skip
