"""Constants in the place of removed experts (the idea of MoNE), beside removing them.

    python benchmarks/expert_constants.py --models bundled bundled:fine-moe --far far_texts --json constants.json

A removed expert takes its row of the router with it, so a token selects the next best one. With a constant the router
stays as it is: a token that selects the expert gets the mean of the outputs that the expert gave on calibration text,
with its weight. Nothing is quantized or trained. Experts are chosen by how often they are selected, by REAP's saliency,
or by how often they are selected times the variance of their weighted output, as MoNE does.

Rows: model, keep (experts of each block), criterion, removed or constants, and the mean KL divergence from the original
in nats per token on prose and code (in), German, and the texts of --far (a folder that far_texts.py has filled).
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from kept_rows import write_rows
from torch import Tensor

from eacmoe_lightning.evaluation.divergence import compare, joined
from eacmoe_lightning.job.data import TextWindows
from eacmoe_lightning.models.block import Block
from eacmoe_lightning.models.experts import run_by_expert
from eacmoe_lightning.models.moe import MoEModel
from eacmoe_lightning.models.originals import load_original, resolve_model
from eacmoe_lightning.models.routing import forward_replaced
from eacmoe_lightning.models.shrink import keep_experts
from eacmoe_lightning.pruning.scores import CRITERIA

BATCH, LENGTH = 4, 512
SHARES = (1 / 8, 1 / 4, 1 / 2)  # of the experts, removed


@dataclass
class Outputs:
    """Sums over the tokens that select each expert of a block, of its outputs f and router weights g."""

    tokens: Tensor  # [E]
    weights: Tensor  # [E], g^2
    norms: Tensor  # [E], g |f|
    total: Tensor  # [E, D], f
    squares: Tensor  # [E], |f|^2

    @classmethod
    def empty(cls, experts: int, width: int) -> Outputs:
        return cls(*(torch.zeros(experts) for _ in range(3)), torch.zeros(experts, width), torch.zeros(experts))

    def add(self, expert: int, output: Tensor, weight: Tensor) -> None:
        """Adds an expert's outputs [n, D] with their weights [n]."""
        self.tokens[expert] += len(output)
        self.weights[expert] += weight.square().sum()
        self.norms[expert] += (weight * output.norm(dim=1)).sum()
        self.total[expert] += output.sum(0)
        self.squares[expert] += output.square().sum()

    def mean(self) -> Tensor:
        return self.total / self.tokens.clamp(min=1).unsqueeze(1)

    def scores(self, criterion: str) -> Tensor:
        number = self.tokens.clamp(min=1)
        if criterion == "frequency":
            return self.tokens
        if criterion == "reap":
            return self.norms / number
        return self.weights * (self.squares / number - self.mean().square().sum(1))


def experts_run(block: Block, expert: Callable[[int, Tensor, Tensor], Tensor]) -> Callable:
    """A forward pass of the block's experts that calls `expert` with number, rows [n, D] and weights [n] of each."""

    def forward(hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        rows = hidden.reshape(-1, hidden.shape[-1])
        of_expert = torch.zeros(len(rows), block.num_experts).scatter_(1, ids, weights.float())
        selected = torch.zeros_like(of_expert, dtype=torch.bool).scatter_(1, ids, True)

        def run(number: int, x: Tensor) -> Tensor:
            return expert(number, x, of_expert[selected[:, number], number])

        return run_by_expert(rows, ids, weights, block.num_experts, run).view(hidden.shape)

    return forward


def with_experts(moe: MoEModel, expert_of: Callable[[Block], Callable[[int, Tensor, Tensor], Tensor]]) -> ExitStack:
    stack = ExitStack()
    for block in moe.moe_blocks:
        stack.enter_context(forward_replaced(block.experts.module, experts_run(block, expert_of(block))))
    return stack


def logits(moe: MoEModel, windows: Tensor) -> list[Tensor]:
    return [moe.model(input_ids=batch, use_cache=False).logits for batch in windows.split(BATCH)]


def divergence(moe: MoEModel, texts: dict[str, Tensor], base: dict[str, list[Tensor]]) -> dict[str, float]:
    """Mean KL divergence from the original by text."""
    result = {}
    for text, windows in texts.items():
        targets = [batch[:, 1:].flatten() for batch in windows.split(BATCH)]
        pairs = zip(base[text], logits(moe, windows), targets, strict=True)
        parts = [compare(*(x[:, :-1].flatten(0, 1) for x in both), target) for *both, target in pairs]
        result[text] = float(joined(parts).kl.double().mean())
    return result


@torch.no_grad()
def rows_of(name: str, args: argparse.Namespace) -> list[dict]:
    moe = MoEModel(load_original(name, "float32"))
    far = {path.stem: str(path) for path in sorted(args.far.glob("*.txt"))} if args.far else {}
    data = TextWindows(
        calibration="bundled:calibration",
        tokenizer=str(resolve_model(name)),
        num_windows=args.windows,
        window_length=LENGTH,
        num_heldout_windows=args.heldout_windows,
        heldout={"prose": "bundled:prose", "code": "bundled:code", "german": "bundled:german", **far},
    )
    outputs = {b.index: Outputs.empty(b.num_experts, moe.config.hidden_size) for b in moe.moe_blocks}

    def recorded(block: Block, number: int, x: Tensor, weight: Tensor) -> Tensor:
        output = block.experts.output(x, number)
        outputs[block.index].add(number, output, weight)
        return output

    with with_experts(moe, lambda block: partial(recorded, block)):
        logits(moe, data.calibration_windows)
    texts, rows = data.heldout_windows, []
    base = {text: logits(moe, windows) for text, windows in texts.items()}
    for share, criterion in itertools.product(SHARES, (*CRITERIA, "mone")):
        keep = round((1 - share) * moe.num_experts)
        kept = {index: top(one.scores(criterion), keep) for index, one in outputs.items()}

        def constant(block: Block, number: int, x: Tensor, weight: Tensor, kept=kept) -> Tensor:
            if number in kept[block.index]:
                return block.experts.output(x, number)
            return outputs[block.index].mean()[number].expand(len(x), -1)

        pruned = MoEModel(deepcopy(moe.model))
        for block in pruned.moe_blocks:
            keep_experts(block, kept[block.index])
        results = {"removed": divergence(pruned, texts, base)}
        with with_experts(moe, lambda block, constant=constant: partial(constant, block)):
            results["constants"] = divergence(moe, texts, base)
        for way, kl in results.items():
            row = {"model": name, "keep": keep, "criterion": criterion, "way": way}
            row |= {"in": (kl["prose"] + kl["code"]) / 2, "german": kl["german"]}
            row["far"] = sum(kl[text] for text in far) / len(far) if far else None
            rows.append(row)
            print(json.dumps(row), flush=True)
    return rows


def top(scores: Tensor, number: int) -> Sequence[int]:
    return sorted(scores.topk(number).indices.tolist())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["bundled", "bundled:fine-moe"])
    parser.add_argument("--windows", type=int, default=96, help="calibration windows")
    parser.add_argument("--heldout_windows", type=int, default=8, help="windows of each text")
    parser.add_argument("--far", type=Path, help="folder of texts of other kinds")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows = [row for name in args.models for row in rows_of(name, args)]
    write_rows(args.json, rows)


if __name__ == "__main__":
    main()
