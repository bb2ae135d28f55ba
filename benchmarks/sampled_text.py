"""What of the text that a model writes itself matters: temperature, what a window begins with, shares, amounts, passes.

    pip install django==5.2.9 && python benchmarks/far_texts.py far_texts
    python benchmarks/sampled_text.py --far far_texts
    python benchmarks/sampled_text.py --far far_texts --groups shares --seeds 0 1 2

Each row is a `fit` of --model with --config on other calibration text, all else equal; the table shows the divergence
KL(original || compressed) in the calibrated domains, in German, and on the texts of --far, in nats per token. Groups:

    temperature    125 windows that the model writes at .7, 1 and 1.3, and from the token that begins a text (bos)
    shares         125 windows, of which 0 to 3 quarters are the bundled text and the others written (all: temperature)
    amount         125 windows of the bundled text, and beside them 125 to 3907 (two million tokens) written (0: shares)
    passes         block stage: two and four passes over 125 real and 125 written windows, one over 125 and 375 to 3907
    joint          all stages on 125 real and 125 written windows, of which the joint stage trains on all, on the real
                   or on the written ones, in equally many and equally large batches

`temperature`, `shares` and `amount` are GPTQ alone: the text's effect on the stages is in docs/findings/text.md. Rows
are kept in --work/rows.json and not made again. The run directory of a row, --work/runs/GROUP-ROW-SEED, goes on if it
is unfinished: the rows of `joint` may begin as copies of one run that --trainer.max_epochs 18 ends after its blocks.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from allocation import add, evaluate
from kept_rows import KeptRows
from lightning.pytorch import Callback, Trainer
from torch import Tensor

from eacmoe_lightning.job.qesc import QESC

REAL, BLOCK_ONLY = "bundled:calibration", ("--model.joint_epochs", "0")
GPTQ_ONLY = (*BLOCK_ONLY, "--model.router_method", "none")
ONE_PASS = ("--model.block_epochs", "1")


def text(real: int, written: int, *more: str) -> list[str]:
    """Options of `fit` for so many windows of each kind."""
    sources = {"text": REAL} if real else {}
    sources |= {"self": f"self:{written}"} if written else {}
    number = ("--data.num_windows", str(real)) if real else ()  # `self:NUM` counts on top of them
    return ["--data.calibration", json.dumps(sources), *number, *more]


class JointWindows(Callback):
    """Lets the joint stage train on the windows of one calibration text; for runs in one process.

    An epoch keeps its number of batches and their size: the text's windows come in one random order after another.

    Args:
        text: name of the calibration text.
    """

    def __init__(self, text: str) -> None:
        self.text = text

    def on_train_start(self, trainer: Trainer, module: QESC) -> None:
        data, loader, first = trainer.datamodule, trainer.train_dataloader, module.epochs.of_blocks
        numbers = data.calibration_sources[list(data.calibration_texts).index(self.text)].nonzero().squeeze(1)
        batches_of_all = loader.batches

        def batches(epoch: int) -> list[tuple[Tensor, int]]:
            if epoch < first:
                return batches_of_all(epoch)
            generator, number = torch.Generator().manual_seed(data.seed + epoch), len(loader.windows)
            orders = [torch.randperm(len(numbers), generator=generator) for _ in range(0, number, len(numbers))]
            drawn = numbers[torch.cat(orders)[:number]]
            return [(index, len(index)) for index in drawn.split(data.batch_size)]

        loader.batches = batches


def joint_on(name: str) -> list[str]:
    """Options of `fit` that let the joint stage train on the windows of this calibration text."""
    return ["--trainer.callbacks+", f"{Path(__file__).stem}.JointWindows", "--trainer.callbacks.text", name]


GROUPS: dict[str, dict[str, Sequence[str]]] = {  # group -> row -> options of `fit`
    "temperature": {
        **{f"T {t:g}": [*text(0, 125, "--data.temperature", str(t)), *GPTQ_ONLY] for t in (0.7, 1.0, 1.3)},
        "T 1, bos": [*text(0, 125, "--data.sample_start", "bos"), *GPTQ_ONLY],
    },
    "shares": {f"{real} + {125 - real}": [*text(real, 125 - real), *GPTQ_ONLY] for real in (125, 94, 62, 31)},
    "amount": {f"125 + {written}": [*text(125, written), *GPTQ_ONLY] for written in (125, 375, 875, 3907)},
    "passes": {
        "125 + 125, 2 passes": [*text(125, 125), *BLOCK_ONLY],
        "125 + 125, 4 passes": [*text(125, 125, "--model.block_epochs", "4"), *BLOCK_ONLY],
        **{f"125 + {written}, 1 pass": [*text(125, written, *ONE_PASS), *BLOCK_ONLY] for written in (375, 875, 3907)},
    },
    "joint": {
        "all": text(125, 125),
        "real": [*text(125, 125), *joint_on("text")],
        "written": [*text(125, 125), *joint_on("self")],
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="bundled")
    parser.add_argument("--config", default="tiny-2.06")
    parser.add_argument("--groups", nargs="+", choices=list(GROUPS), default=list(GROUPS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--heldout", nargs="+", default=["prose", "code", "maths", "french", "german"])
    parser.add_argument("--heldout-windows", type=int, default=16)
    parser.add_argument("--far", type=Path, help="folder of texts that far_texts.py has written")
    parser.add_argument("--work", type=Path, default=Path("runs/sampled_text"))
    args = parser.parse_args()
    rows = KeptRows(args.work / "rows.json")
    for seed in args.seeds:
        for group in args.groups:
            for row, options in GROUPS[group].items():
                about = {"group": group, "row": row, "seed": seed}
                if rows.of(about) is not None:
                    continue
                words = ["--config", args.config, "--model.name_or_path", args.model, "--data.seed", str(seed)]
                name = f"{group}-{row}-{seed}".replace(" ", "").replace(",", "-")
                add(rows, about | evaluate(args, [*words, *options], name))
    print(table(rows.rows))


def table(rows: list[dict]) -> str:
    lines = ["| group | windows | seed | in | German | far | seconds |", "|---" * 7 + "|"]
    for row in rows:
        figures = [f"{row[kind]:.4f}" if row[kind] is not None else "" for kind in ("in", "german", "far")]
        cells = [row["group"], row["row"], str(row["seed"]), *figures, f"{row['seconds']:.0f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
