"""`eacmoe report RUN RUN ...` compares finished runs of one model by size and divergence."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eacmoe_lightning.evaluation.pareto import mark_best, page, point
from eacmoe_lightning.run.files import read_json, write_atomically


def report(words: Sequence[str]) -> None:
    """Compares finished runs of one model by size on disk and KL divergence from the original.

    Prints a table and writes it, with a plot, as one HTML file. Runs must have been evaluated on the same texts.
    `prune` measures the divergence from the model that it was given; `validate` adds that from the original.

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
    first, *others = runs.values()
    for other in others:
        _refuse_incomparable(first, other)
    names = [Path(name).name for name in runs]
    shown = names if len(set(names)) == len(names) else list(runs)
    points = [point(name, run.report, run.divergence) for name, run in zip(shown, runs.values(), strict=True)]
    points = mark_best(points)
    written = page(first.reference, list(first.divergence["texts"]), points)
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


@dataclass(frozen=True)
class Evaluated:
    """A finished run and what it lost.

    Attributes:
        name: as it was given.
        report: `report.json`.
        divergence: of the report; or that of `validate`, if it is newer or alone has one.
        reference: name of the model from which the divergence was measured.
        fingerprint: of this model; None if it is not known.
        digests: of the windows of each text; empty if they are not known.
    """

    name: str
    report: dict[str, Any]
    divergence: dict[str, Any]
    reference: str
    fingerprint: str | None
    digests: dict[str, str]

    @property
    def is_of_prune(self) -> bool:
        return self.report.get("config", {}).keys() >= {"model", "pruning"}

    @property
    def tokens(self) -> dict[str, int]:
        """Number of tokens of each text."""
        return {text: streams["compressed"].get("tokens", 0) for text, streams in self.divergence["texts"].items()}


def _read(run: Path) -> Evaluated:
    path, again = run / "report.json", run / "validate.json"
    if not path.exists():
        raise FileNotFoundError(f"{run} has no report.json: pass run directories of finished runs of fit or prune")
    written = read_json(path)
    config = written.get("config", {})  # of fit, or of prune
    reference = written["model"]["name_or_path"], config.get("model.fingerprint", config.get("fingerprint"))
    divergence, digests = written.get("divergence") or {}, written.get("heldout_digest", {})
    if again.exists() and (not divergence or again.stat().st_mtime > path.stat().st_mtime):
        validated = read_json(again)
        is_of_run = not validated.get("evaluate")  # or of the model that --model.evaluate named
        if is_of_run and validated.get("divergence"):
            divergence, digests = validated["divergence"], validated.get("heldout_digest", {})
            if original := validated.get("original"):
                reference = original["name_or_path"], original["fingerprint"]
    if not divergence.get("mean", {}).get("compressed"):
        raise ValueError(
            f"{path} has no divergence: it is of an older version, or no held-out text was evaluated. `validate` with "
            f"the run's config and --trainer.default_root_dir {run} adds it"
        )
    return Evaluated(str(run), written, divergence, *reference, digests)


def _refuse_incomparable(one: Evaluated, other: Evaluated) -> None:
    """Raises ValueError if two divergences are from different models or on different texts."""
    both = f"{one.name} and {other.name} cannot be compared"
    is_known = one.fingerprint is not None and other.fingerprint is not None
    is_same = one.fingerprint == other.fingerprint if is_known else one.reference == other.reference
    if not is_same:
        pruned = [run.name for run in (other, one) if run.is_of_prune]
        remedy = "Pass runs of one model"
        if pruned:
            remedy = (
                "`prune` measures from the model that it was given. `validate` with the config of `fit` and "
                f"--trainer.default_root_dir {pruned[0]} measures from the original"
            )
        raise ValueError(
            f"{both}: the divergence of {one.name} is from {one.reference}, that of {other.name} is from "
            f"{other.reference}. {remedy}"
        )
    if one.tokens != other.tokens:
        raise ValueError(
            f"{both}: texts and tokens {one.tokens} and {other.tokens}. Evaluate both on the same texts (`validate "
            "--data.heldout ... --data.num_heldout_windows ...`)"
        )
    both_known = one.digests.keys() & other.digests.keys()
    if changed := [text for text in sorted(both_known) if one.digests[text] != other.digests[text]]:
        raise ValueError(
            f"{both}: the windows of the text {changed[0]} are others, though as many tokens. Evaluate both on "
            "the same text (`validate --data.heldout ... --data.window_length ...`)"
        )
