"""Writes docs/models.md: what works with each causal MoE type of transformers, from a run of a tiny model of each.

python docs/models.py             # about four minutes on two cores
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import re
import sys
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from architecture_trial import Trial

PAGE = Path(__file__).with_name("models.md")
HEADER = """\
# Architectures

Routers, experts and attention are recognised by their structure. Here is what works with each causal MoE type of
transformers {version}, from a run of a tiny random model of each (`python docs/models.py` writes this page, and
`tests/test_architectures.py` checks it). The models have 3 or 4 blocks, 8 experts and every kind of layer of their
type, but real ones can have settings that these do not have: `eacmoe plan` and the first seconds of `eacmoe fit` tell.

"refused" says that `fit` ends with one message before it computes anything.

| column | "yes" says |
|---|---|
| fit | the job ran to its end at 8 bit, and both perplexities of its report are those of transformers' forward pass |
| load | packed weights give the logits of decoded ones |
| generate | so do the greedy tokens after a left-padded prompt |
| PESF | skipping rarely selected experts equals giving them the weight 0 |
| dense | the export reloads in plain transformers with equal logits, under the family's tensor names |
| gptq_v2 | {engine} loads the type's experts packed, and the export decodes to the same weights and logits |
| GGUF | llama.cpp computes it alike, with [these exceptions](exports.md#gguf-by-architecture) |

The last two are empty for types that the engine does not load, and the export is refused.

Routers, norms and biases are never quantized, the head and an embedding that is tied to it only with
`--model.head_bits`, which every type that can be fitted takes. What else stays as it is stands in the last column, by
its name in a block, with the reason.

"""
COLUMNS = {"fit": "fit", "load": "load", "generate": "generate", "pesf": "PESF", "dense": "dense"}
EXPORTS = {"gptq_v2": "gptq_v2", "gguf": "GGUF"}


@dataclass(frozen=True)
class Row:
    """What a trial gave.

    Attributes:
        name: of the architecture.
        errors: what a step raised, by step; empty where it passed. A step that was not reached is missing.
        is_refused: whether `fit` refused it before it computed anything.
        exports: the steps of `EXPORTS` that passed.
        left: why a matrix of a block is not quantized, by its name in the block.
    """

    name: str
    errors: dict[str, str]
    is_refused: bool
    exports: tuple[str, ...]
    left: dict[str, str]


def row(trial: Trial) -> Row:
    """Runs what of a trial did not run yet."""
    errors = {}
    for step in COLUMNS:
        error = trial.passes(step)
        errors[step] = "" if error is None else f"{type(error).__name__}: {error}"
        if step == "fit" and not trial.is_compressed:
            return Row(trial.name, errors, trial.is_refused, (), {})
    exports = tuple(step for step in EXPORTS if trial.passes(step) is None)
    return Row(trial.name, errors, False, exports, trial.left())


def page(rows: list[Row], version: str) -> str:
    """The page as Markdown."""
    names = " | ".join([*COLUMNS.values(), *EXPORTS.values()])
    from eacmoe_lightning.gptqmodel import VERSION

    lines = [HEADER.format(version=version, engine=VERSION) + f"| type | {names} | left unquantized |"]
    lines.append("|---" * (len(COLUMNS) + len(EXPORTS) + 2) + "|")
    for r in rows:
        no = "refused" if r.is_refused else "no"
        cells = [{None: "", "": "yes"}.get(r.errors.get(step), no) for step in COLUMNS]
        cells += ["yes" if step in r.exports else "" for step in EXPORTS]
        lines.append(f"| {r.name} | {' | '.join(cells)} | {left(r)} |")
    failed = [(r.name, COLUMNS[step], error) for r in rows for step, error in r.errors.items() if error]
    if failed:
        lines += ["", "## What does not work", ""]
        lines += [f"- `{name}`, {column}: {shortened(error)}" for name, column, error in failed]
    return "\n".join(lines) + "\n"


def left(r: Row) -> str:
    """What is left unquantized, by reason."""
    by_reason: dict[str, list[str]] = {}
    for name, reason in r.left.items():
        by_reason.setdefault(reason, []).append(f"`{name.removesuffix('.weight')}`")
    return "; ".join(f"{', '.join(names)} ({reason})" for reason, names in by_reason.items())


def shortened(error: str, length: int = 240) -> str:
    """In one line, with neither Markdown's signs nor paths."""
    text = re.sub(r"\s+", " ", re.sub(r"/\S+/", "", error)).replace("<", "&lt;").replace("|", "\\|")
    return text if len(text) <= length else f"{text[:length].rpartition(' ')[0]} ..."


def run_all() -> list[Row]:
    """A trial of every architecture."""
    from architecture_trial import Trial
    from architectures import ARCHITECTURES
    from transformers import AutoTokenizer

    from eacmoe_lightning.models.originals import BUNDLED

    tokenizer, rows = AutoTokenizer.from_pretrained(BUNDLED), []
    for name in ARCHITECTURES:
        print(name, file=sys.stderr, flush=True)
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
            with contextlib.redirect_stderr(io.StringIO()):
                rows.append(row(Trial(name, Path(folder), tokenizer)))
    return rows


if __name__ == "__main__":
    root = PAGE.parent.parent
    sys.path[:0] = [str(root), str(root / "tests")]  # this checkout, whatever is installed
    os.environ["HF_HUB_OFFLINE"] = "1"
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    import transformers

    PAGE.write_text(page(run_all(), transformers.__version__))
    print(f"{PAGE}: written")
