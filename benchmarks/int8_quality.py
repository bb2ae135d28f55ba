"""The effect of 8-bit activations on packed models: divergence from the original and perplexity on each held-out text.

    python benchmarks/int8_quality.py runs/tiny runs/tiny-2.54 runs/tiny-2.06 --json int8_quality.json

Each run or compressed directory is loaded packed in float32 and bfloat16, and runs with exact and with int8
activations. Its original in bfloat16 beside itself in float32 is the noise floor. Rows: model, text, dtype,
activations (`original` for the noise floor), and the means per token kl, nll (both in nats) and same_top.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import torch
from kept_rows import write_rows
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel

from eacmoe_lightning import load
from eacmoe_lightning.compressed.opening import open_model
from eacmoe_lightning.evaluation.divergence import compare, joined
from eacmoe_lightning.models.originals import load_original, resolve_model
from eacmoe_lightning.runtime import kernels
from eacmoe_lightning.text.documents import read_documents
from eacmoe_lightning.text.sources import heldout_names
from eacmoe_lightning.text.windows import token_windows


@torch.inference_mode()
def logits_of(model: PreTrainedModel, windows: Tensor) -> Iterator[Tensor]:
    """The logits [T - 1, V] that predict the tokens of each of windows [W, T] after its first."""
    for window in windows:
        yield model(window[None], use_cache=False).logits[0, :-1].float()


def means(base: list[Tensor], model: PreTrainedModel, windows: Tensor) -> dict[str, float]:
    """Mean divergence of a model from base logits, its negative log-likelihood and its share of equal top tokens."""
    logits = logits_of(model, windows)
    tokens = joined([compare(one, other, ids[1:]) for one, other, ids in zip(base, logits, windows, strict=True)])
    return {name: float(getattr(tokens, name).double().mean()) for name in ("kl", "nll", "same_top")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--windows", type=int, default=16, help="windows of each text")
    parser.add_argument("--length", type=int, default=256, help="tokens per window")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    print(f"CPU kernels: {kernels.level()}; {args.windows} windows of {args.length} tokens a text")
    rows = []
    for path in args.models:
        original = open_model(path).original
        tokenizer = AutoTokenizer.from_pretrained(resolve_model(original))
        variants = {"original": {"bfloat16": load_original(original, "bfloat16")}, "exact": {}, "int8": {}}
        for activations in ("exact", "int8"):
            for dtype in ("float32", "bfloat16"):
                variants[activations][dtype] = load(path, dtype=dtype, activations=activations)
        reference = load_original(original, "float32")
        for text in heldout_names():
            windows = token_windows(read_documents(f"bundled:{text}"), tokenizer, args.windows, args.length)
            base = list(logits_of(reference, windows))
            for activations, models in variants.items():
                for dtype, model in models.items():
                    row = {"model": str(path), "text": text, "dtype": dtype, "activations": activations}
                    rows.append(row | means(base, model, windows))
                    figures = " ".join(f"{name} {rows[-1][name]:.5f}" for name in ("kl", "nll", "same_top"))
                    print(f"{path} {text} {dtype} {activations}: {figures}", flush=True)
        write_rows(args.json, rows)


if __name__ == "__main__":
    main()
