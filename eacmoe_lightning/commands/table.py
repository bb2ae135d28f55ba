"""`eacmoe table NAME` runs the jobs of a table and writes it: those of EAC-MoE (arXiv 2508.01625), or your own.

A table is a YAML file (`configs/tables/`) with a `title`, `rows` of options of `fit` by name, and if need be `options`
for every row, `split` (whether `test --model.split_damage` follows) and `published` figures by model and row.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from eacmoe_lightning.commands.fit import parse_fit
from eacmoe_lightning.commands.rows import Rows, words_of
from eacmoe_lightning.commands.table_file import (
    TABLES,
    folders_of,
    numbers,
    read_table,
    refuse_overridden,
    refuse_own,
    without_repeats,
)
from eacmoe_lightning.job.data import TextWindows
from eacmoe_lightning.planning.shapes import load_shapes
from eacmoe_lightning.run.files import write_atomically, write_json

FORMATS = {"bits": "{:.2f}", "changed": "{:.2%}", "seconds": "{:.0f}", "lost": "{:.4f}", "KL": "{:.4f}"}  # of figures


def table(words: Sequence[str]) -> None:
    """Runs the jobs of one of the paper's tables, or of your own, and writes the table.

    All other options are those of `fit` and apply to every row. One that the table sets too is refused, but a --config
    may hold it: the table then overrides it. Each row is a `fit` in a directory of its own, so the same command goes on
    after an interruption, and finished rows are not made again. They are refused once their model or their text has
    changed. `table.json` and `table.md` hold the result.

    Args:
        words: the command's words.

    Raises:
        FileNotFoundError: there is no such table, config or model.
        ValueError: the file is no table, it sets an option that was given too, or `fit` refuses one of its rows, whose
            texts are read for that; before any row is run.
    """
    given, more = options().parse_known_args(words)
    plan = read_table(given.table)
    refuse_overridden(more, plan, given.table)
    refuse_own(more, plan, given.seeds)
    if given.seeds and len(set(given.seeds)) < len(given.seeds):
        raise ValueError(f"--seeds {' '.join(map(str, given.seeds))} names a seed twice: pass different ones")
    rows = {name: plan["options"] | row for name, row in plan["rows"].items()}
    module, _, _ = parse_fit([*more, *words_of(numbers(next(iter(rows.values())), 1, 1))])
    moe = load_shapes(module.name_or_path, module.dtype_name, module.trust_remote_code)
    rows = without_repeats({name: numbers(row, moe.top_k, moe.num_experts) for name, row in rows.items()})
    folders, fits, seeds = folders_of(rows), Rows(more, bool(plan.get("split"))), {}
    for name, row in rows.items():
        data = fits.check(row)
        _check_texts(data)
        for seed in seeds.setdefault(name, given.seeds or [data.seed]):
            fits.finished(given.output / f"seed_{seed}", folders[name], row | {"data.seed": seed})  # or raises now
    made: dict[str, list[dict[str, Any]]] = {name: [] for name in rows}
    for name, row in rows.items():
        for seed in seeds[name]:
            fitted = fits.run(given.output / f"seed_{seed}", folders[name], row | {"data.seed": seed})
            made[name].append(figures(fitted))
    result = {key: plan[key] for key in ("title", "source") if key in plan}
    result |= {"model": module.name_or_path, "options": list(more)}
    result["seeds"] = list(dict.fromkeys(seed for of_row in seeds.values() for seed in of_row))
    result["rows"] = {"original": _original(made)} | {name: _over_seeds(runs) for name, runs in made.items()}
    result["published"] = _published(plan, module.name_or_path)
    write_json(given.output / "table.json", result)
    written = markdown(result)
    write_atomically(given.output / "table.md", lambda partial: partial.write_text(written, "utf-8"))
    print(written)
    print(f"{given.output}: table.md, table.json, and a run directory for each row")


def options() -> argparse.ArgumentParser:
    """The command's own options."""
    parser = argparse.ArgumentParser(
        f"{Path(sys.argv[0]).name} table", description=table.__doc__.split("\n\n")[0], allow_abbrev=False
    )
    names = ", ".join(sorted(path.stem for path in TABLES.glob("*.yaml")))
    parser.add_argument("table", metavar="TABLE", help=f"a YAML file, or a table of the package: {names}")
    parser.add_argument("--output", type=Path, required=True, help="directory of the table and its runs")
    parser.add_argument("--seeds", type=int, nargs="+", help="run every row with each seed; gives mean and spread")
    return parser


def _check_texts(data: TextWindows) -> None:
    """Raises ValueError if a table of these held-out texts has no columns, or two of one name."""
    if not data.heldout:
        raise ValueError("--data.heldout is empty, so a table has nothing to show: pass one or more sources")
    if taken := [name for name in data.heldout if name in FORMATS]:
        raise ValueError(
            f"--data.heldout: a text cannot be called {taken[0]!r}, as a column of figures has this name: pass "
            "{name: source} with another name"
        )


def figures(made: dict[str, Any]) -> dict[str, Any]:
    """What the table shows of a row: true `bits`; by text the perplexity; over the texts the mean of the nats `lost`
    per token and of the divergence `KL`; the share of `changed` selections; the `seconds` of calibration."""
    report = made["report"]
    perplexity = report["perplexity"]
    row: dict[str, Any] = {"bits": report["bits"]["true"]}
    row |= {text: values["compressed"] for text, values in perplexity.items()}
    for stream, title in (("selection_damage", "selections"), ("weight_damage", "weights")):
        if "test" in made:
            split = made["test"]["perplexity"]
            row |= {f"{text}, {title}": values[stream] for text, values in split.items()}
    row["lost"] = mean(math.log(values["compressed"] / values["original"]) for values in perplexity.values())
    row["KL"] = report["divergence"]["mean"]["compressed"]["kl"]
    row["changed"] = report["expert_shift"]["mean"]["after"]["selections"]
    row["seconds"] = report["cost"]["total_seconds"] - report["cost"].get("evaluate", {}).get("seconds", 0.0)
    row["originals"] = {text: values["original"] for text, values in perplexity.items()}
    return row


def _original(made: dict[str, list[dict[str, Any]]]) -> dict[str, dict[str, float]]:
    """The row of the original."""
    first = next(iter(made.values()))[0]
    return {text: {"mean": value} for text, value in first["originals"].items()}


def _over_seeds(runs: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Mean and standard deviation of each figure; of one run the figure alone."""
    row = {}
    for key in runs[0]:
        if key != "originals":
            values = [run[key] for run in runs]
            row[key] = {"mean": mean(values)} | ({"spread": stdev(values), "values": values} if len(values) > 1 else {})
    return row


def _published(plan: dict[str, Any], name: str) -> dict[str, Any]:
    """The published figures of this model, by row; empty if there are none."""
    return plan["published"].get(name, {})


def markdown(result: dict[str, Any]) -> str:
    """The table for readers."""
    rows, published = result["rows"], result["published"]
    columns = list(next(row for name, row in rows.items() if name != "original"))
    papers = list(dict.fromkeys(key for row in published.values() for key in row))
    lines = [f"# {result['title']}", ""]
    source = f", after {result['source']}" if "source" in result else ""
    has_spread = any("spread" in figure for row in rows.values() for figure in row.values())
    seeds = ", ".join(map(str, result["seeds"]))
    spread = f"; mean and standard deviation over the seeds {seeds}" if has_spread else ""
    lines += [f"{result['model']}{source}. Perplexity by text{spread}.", ""]
    lines += ["| | " + " | ".join([*columns, *(f"{key} (paper)" for key in papers)]) + " |"]
    lines += ["|---" * (1 + len(columns) + len(papers)) + "|"]
    for name, row in rows.items():
        cells = [_cell(key, row.get(key)) for key in columns]
        cells += [str(published.get(name, {}).get(key, "")) for key in papers]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, ""])


def _cell(key: str, value: dict[str, float] | None) -> str:
    if value is None:
        return ""
    form = FORMATS.get(key, "{:.3f}")
    return form.format(value["mean"]) + (f" ± {form.format(value['spread'])}" if "spread" in value else "")
