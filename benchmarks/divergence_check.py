"""Our KL divergence beside llama.cpp's, on the same tokens: `llama-perplexity --kl-divergence` on exports of a run.

    python benchmarks/divergence_check.py runs/tiny-2.06 --llama-perplexity PATH/llama-perplexity

Three models go to llama.cpp as GGUF: the original in float32 (its base), the run's codes, and the run decoded in
float32, which shows what llama.cpp's arithmetic of codes adds. llama.cpp cuts the text into windows and writes their
tokens into its base file, from which we take them; it counts the second half of each window alone, and so do we here.
It stores the base's log-probabilities in 16 bits: our figures with that rounding stand beside ours. Its cache of keys
and values is in float32, as our models are.

`llama_programs.py` says how to build `llama-perplexity`.
"""

from __future__ import annotations

import argparse
import struct
from pathlib import Path

import numpy as np
import torch
from kept_rows import write_rows
from llama_programs import IN_FLOAT32, LINES, as_gguf, divergence, run, unquantized_gguf
from torch import Tensor

from eacmoe_lightning.compressed.opening import open_model
from eacmoe_lightning.evaluation.divergence import PerToken, joined, statistics
from eacmoe_lightning.evaluation.streams import run_batches
from eacmoe_lightning.models.streamed import StreamedModel
from eacmoe_lightning.text.documents import read_documents


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a finished run, in float32")
    parser.add_argument("--llama-perplexity", required=True, help="the program")
    parser.add_argument("--text", default="bundled:prose")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--work", type=Path, default=Path("runs/divergence_check"))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    work = args.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    subject = open_model(args.run)
    original = open_model(subject.original, "float32")
    models = {"original": original.streamed(), "decoded": subject.streamed()}
    exports = {name: unquantized_gguf(model, original.name, work / name) for name, model in models.items()}
    exports["codes"] = as_gguf(args.run, work / "codes")
    (work / "text.txt").write_text("\n".join(read_documents(args.text)))

    base = work / "base.kld"
    words = ["-f", str(work / "text.txt"), "-c", str(args.context), "-b", str(args.context)]
    words += ["--chunks", str(args.windows), "-t", "1", "--kl-divergence-base", str(base)]
    words += IN_FLOAT32
    run(args.llama_perplexity, "-m", str(exports["original"]), *words)
    tokens, first = tokens_of(base), args.context // 2
    ours = statistics(second_half(models["original"], models["decoded"], tokens, first))
    as_theirs = statistics(with_its_rounding(models["original"], models["decoded"], tokens, first))
    rows = {"ours": {name: value_of(ours, name) for name in LINES}}
    rows["ours, its rounding"] = {name: value_of(as_theirs, name) for name in LINES}
    for name in ("decoded", "codes"):
        rows[f"llama.cpp, {name}"] = divergence(args.llama_perplexity, "-m", str(exports[name]), *words)
    print(f"{args.text}: {len(tokens)} windows of {args.context} tokens, {ours['tokens']} tokens counted")
    print(f"{'':14s} " + " ".join(f"{name:>20s}" for name in rows))
    for name in LINES:
        print(f"{name:14s} " + " ".join(f"{row[name]:20.6f}" for row in rows.values()))
    write_rows(args.json, rows | {"tokens": ours["tokens"]})


def tokens_of(base: Path) -> Tensor:
    """The windows [S, T] in a base file of llama-perplexity."""
    with open(base, "rb") as file:
        assert file.read(8) == b"_logits_"
        length, _, windows = struct.unpack("<Iii", file.read(12))
        return (
            torch.from_numpy(np.frombuffer(file.read(4 * length * windows), dtype="<i4").copy()).long().view(-1, length)
        )


@torch.no_grad()
def second_half(original: StreamedModel, subject: StreamedModel, tokens: Tensor, first: int) -> PerToken:
    """The predictions at positions from `first` on."""
    seen: list[PerToken] = []
    run_batches(original, subject, tokens.split(4), on_tokens=lambda batch, name, part: seen.append(part))
    rows = (torch.cat(values).view(len(tokens), -1)[:, first:].flatten() for values in zip(*seen, strict=True))
    return PerToken(*rows)


@torch.no_grad()
def with_its_rounding(original: StreamedModel, subject: StreamedModel, tokens: Tensor, first: int) -> PerToken:
    """The same with the base's log-probabilities as llama-perplexity stores them and sums over them."""
    parts = []
    for window in tokens:
        base, other = (model.logits(window[None])[0, first:-1].float() for model in (original, subject))
        targets, top = window[first + 1 :, None], base.max(-1, keepdim=True).values
        lowest = torch.maximum(base.min(-1, keepdim=True).values, top - 16)  # what is less probable gets this
        step = (top - lowest) / 65535
        base_log = step * ((base - lowest) / step).round().clamp(min=0) + lowest - base.logsumexp(-1, keepdim=True)
        log = other.log_softmax(-1)
        kl = torch.where(base_log > -16, base_log.exp() * (base_log - log), 0.0).sum(-1)
        same_top = (base_log.argmax(-1) == log.argmax(-1)).float()
        nll = (-each.gather(-1, targets).squeeze(-1) for each in (base_log, log))
        parts.append(PerToken(*nll, kl, same_top, base_log.max(-1).values.exp()))
    return joined(parts)


def value_of(statistics: dict, name: str) -> float:
    group, _, key = name.rpartition(".")
    return statistics[group][key] if group else statistics[key]


if __name__ == "__main__":
    main()
