"""`eacmoe report RUN RUN ...` compares finished runs of one model by size and divergence."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from eacmoe_lightning.evaluation.pareto import mark_best, page, point
from eacmoe_lightning.run.files import read_json, write_atomically


def report(words: Sequence[str]) -> None:
    """Compares finished runs of one model by size on disk and KL divergence from the original.

    Prints a table and writes it, with a plot, as one HTML file. Runs must have been evaluated on the same texts.

    Args:
        words: the command's words.

    Raises:
        FileNotFoundError: a directory holds no report.
        ValueError: a run has no divergence, or runs cannot be compared.
    """
    given = options().parse_args(words)
    if Path(given.output).is_dir():
        raise ValueError(f"{given.output} (--output) is a directory: pass the name of an HTML file to write")
    runs = {name: _read(Path(name)) for name in dict.fromkeys(given.runs)}
    first, (base, subject) = next(iter(runs.items()))
    for name, (other, divergence) in runs.items():
        for what, ours, theirs in (
            ("model", base["model"]["name_or_path"], other["model"]["name_or_path"]),
            ("texts and tokens", _tokens(subject), _tokens(divergence)),
        ):
            if ours != theirs:
                raise ValueError(
                    f"{first} and {name} cannot be compared: {what} {ours} and {theirs}. Evaluate both on the same "
                    "texts (`validate --data.heldout ... --data.num_heldout_windows ...`)"
                )
    names = [Path(name).name for name in runs]
    shown = names if len(set(names)) == len(names) else list(runs)
    points = mark_best([point(name, *run) for name, run in zip(shown, runs.values(), strict=True)])
    written = page(base["model"]["name_or_path"], list(subject["texts"]), points)
    write_atomically(Path(given.output), lambda partial: partial.write_text(written, "utf-8"))
    print(f"{'run':32s} {'MB':>10s} {'bits':>6s} {'KL':>9s} {'±':>8s} {'same top':>9s}")
    for row in points:
        print(
            f"{row['name']:32s} {row['size'] / 1e6:10.1f} {row['bits']:6.2f} {row['kl']:9.5f} {row['kl_error']:8.5f} "
            f"{row['same_top']:9.2%}{'' if row['best'] else '  (another is smaller and closer)'}"
        )
    print(f"{given.output}: the plot")


def options() -> argparse.ArgumentParser:
    """The command's options."""
    parser = argparse.ArgumentParser(f"{Path(sys.argv[0]).name} report", description=report.__doc__.split("\n\n")[0])
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run directories of fit or prune")
    parser.add_argument("--output", default="pareto.html", help="the HTML file to write (default: %(default)s)")
    return parser


def _read(run: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """A run's report and the divergence in it; or that of `validate`, if it is newer or alone has one."""
    path, again = run / "report.json", run / "validate.json"
    if not path.exists():
        raise FileNotFoundError(f"{run} has no report.json: pass run directories of finished runs of fit or prune")
    written = read_json(path)
    divergence = written.get("divergence") or {}
    if again.exists() and (not divergence or again.stat().st_mtime > path.stat().st_mtime):
        divergence = read_json(again).get("divergence") or divergence
    if not divergence.get("mean", {}).get("compressed"):
        raise ValueError(
            f"{path} has no divergence: it is of an older version, or no held-out text was evaluated. `validate` with "
            f"the run's config and --trainer.default_root_dir {run} adds it"
        )
    return written, divergence


def _tokens(divergence: dict[str, Any]) -> dict[str, int]:
    return {text: streams["compressed"].get("tokens", 0) for text, streams in divergence["texts"].items()}
