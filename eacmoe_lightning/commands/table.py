"""`eacmoe table NAME` runs the jobs of a table and writes it: those of EAC-MoE (arXiv 2508.01625), or your own.

A table is a YAML file (`configs/tables/`) with a `title`, `rows` of options of `fit` by name, and if need be `options`
for every row, `split` (whether `test --model.split_damage` follows) and `published` figures by model and row.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import yaml

from eacmoe_lightning.commands.configs import SHIPPED
from eacmoe_lightning.commands.fit import parse_fit
from eacmoe_lightning.commands.rows import fit_row, words_of
from eacmoe_lightning.planning.shapes import load_shapes
from eacmoe_lightning.run.files import write_atomically, write_json

TABLES = SHIPPED / "tables"
KEYS = {"title", "source", "split", "options", "rows", "published"}
SYMBOL = re.compile(r"(?:(\d+) )?([KE])")  # a multiple of the model's top_k or of its number of experts
FORMATS = {"bits": "{:.2f}", "changed": "{:.2%}", "seconds": "{:.0f}", "lost": "{:.4f}", "KL": "{:.4f}"}


def table(words: Sequence[str]) -> None:
    """Runs the jobs of one of the paper's tables, or of your own, and writes the table.

    All other options are those of `fit` and apply to every row. One that the table sets too is refused, but a --config
    may hold it: the table then overrides it. Each row is a `fit` in a directory of its own, so the same command goes on
    after an interruption, and finished rows are not made again. `table.json` and `table.md` hold the result.

    Args:
        words: the command's words.

    Raises:
        FileNotFoundError: there is no such table, config or model.
        ValueError: the file is no table, it sets an option that was given too, or `fit` refuses one of its rows; before
            any row is run.
    """
    given, more = options().parse_known_args(words)
    plan = read_table(given.table)
    refuse_overridden(more, plan, given.table)
    rows = {name: plan.get("options", {}) | row for name, row in plan["rows"].items()}
    module, data, _ = parse_fit([*more, *words_of(_numbers(next(iter(rows.values())), 1, 1))])
    moe = load_shapes(module.name_or_path, module.dtype_name, module.trust_remote_code)
    rows = {name: _numbers(row, moe.top_k, moe.num_experts) for name, row in rows.items()}
    rows = _without_repeats(rows)
    for row in rows.values():
        parse_fit([*more, *words_of(row)])[0].recipe.check(moe)
    seeds = given.seeds or [data.seed]
    made = {name: [_fitted(given.output, name, row, seed, more, plan) for seed in seeds] for name, row in rows.items()}
    result = {key: plan[key] for key in ("title", "source") if key in plan}
    result |= {"model": module.name_or_path, "options": list(more), "seeds": seeds}
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


def read_table(name: str) -> dict[str, Any]:
    """The contents of a table's file.

    Raises:
        FileNotFoundError: it is neither a file nor a table of the package.
        ValueError: it is no table.
    """
    shipped = TABLES / f"{name}.yaml"
    path = Path(name) if Path(name).is_file() else shipped
    if not path.is_file():
        names = ", ".join(sorted(path.stem for path in TABLES.glob("*.yaml")))
        raise FileNotFoundError(f"there is no table {name}: pass a YAML file, or one of {names}")
    plan = yaml.safe_load(path.read_text())
    if not isinstance(plan, dict) or not isinstance(plan.get("rows"), dict) or not plan["rows"] or "title" not in plan:
        raise ValueError(f"{path} is no table: it needs a title, and rows of options of fit by name")
    if unknown := sorted(plan.keys() - KEYS):
        raise ValueError(f"{path}: {unknown[0]} is not a key of a table: {', '.join(sorted(KEYS))}")
    return plan


def refuse_overridden(words: Sequence[str], plan: dict[str, Any], table: str) -> None:
    """Raises ValueError if a word is an option that the table sets too, as a whole or in part, and so overrides."""
    places = {f"row {name!r}": row for name, row in plan["rows"].items()}
    sets = [(where, key) for where, row in ({"options": plan.get("options", {})} | places).items() for key in row]
    for word in words:
        option = word.partition("=")[0].removesuffix("+")
        if not option.startswith("--") or "." not in option:  # a value, or --config, --model FILE
            continue
        for where, key in sets:
            if _overlap(option.removeprefix("--"), key):
                elsewhere = "" if where == "options" else ". For rows that do not set it, put it into a --config"
                raise ValueError(
                    f"{option} would be overridden by {key} of the table {table} ({where}): leave it out, or change it "
                    f"there{elsewhere}"
                )


def _overlap(one: str, other: str) -> bool:
    """Whether two options are the same or one holds the other; arguments of classes go with and without `init_args`."""
    one, other = (f"{name.replace('.init_args.', '.')}." for name in (one, other))
    return one.startswith(other) or other.startswith(one)


def _numbers(row: dict[str, Any], top_k: int, experts: int) -> dict[str, Any]:
    """The row with the numbers that symbols such as `2 K` and `E` stand for; no more than all experts."""

    def number(value: Any) -> Any:
        match = SYMBOL.fullmatch(value) if isinstance(value, str) else None
        return min(int(match[1] or 1) * {"K": top_k, "E": experts}[match[2]], experts) if match else value

    return {key: number(value) for key, value in row.items()}


def _without_repeats(rows: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The rows without those whose options another row has too, on a model of few experts."""
    kept: dict[str, dict[str, Any]] = {}
    for name, row in rows.items():
        if row not in kept.values():
            kept[name] = row
    return kept


def _fitted(
    output: Path, name: str, row: dict[str, Any], seed: int, more: Sequence[str], plan: dict[str, Any]
) -> dict[str, Any]:
    """The figures of one row with one seed."""
    folder = re.sub(r"[^\w.]+", "-", name).strip("-")
    made = fit_row(output / f"seed_{seed}", folder, row | {"data.seed": seed}, more, bool(plan.get("split")))
    return figures(made)


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
    return plan.get("published", {}).get(name, {})


def markdown(result: dict[str, Any]) -> str:
    """The table for readers."""
    rows, published = result["rows"], result["published"]
    columns = list(next(row for name, row in rows.items() if name != "original"))
    papers = list(dict.fromkeys(key for row in published.values() for key in row))
    lines = [f"# {result['title']}", ""]
    source = f", after {result['source']}" if "source" in result else ""
    seeds = result["seeds"]
    spread = f"; mean and standard deviation over the seeds {', '.join(map(str, seeds))}" if len(seeds) > 1 else ""
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
