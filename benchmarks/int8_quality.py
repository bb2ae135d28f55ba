"""The effect of 8-bit activations on a packed model: perplexity on each bundled held-out text.

    python benchmarks/int8_quality.py runs/tiny runs/tiny-2.54 runs/tiny-2.06 --json int8_quality.json

Each run or compressed directory is loaded packed in float32 and bfloat16, and runs with exact and with int8
activations. Rows: model, text, dtype, activations, perplexity, and nats, the difference per token from float32 with
exact activations.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
from kept_rows import write_rows
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel

from eacmoe_lightning import load
from eacmoe_lightning.models.originals import BUNDLED
from eacmoe_lightning.runtime import kernels
from eacmoe_lightning.runtime.packed_modules import set_activations
from eacmoe_lightning.text.sources import heldout_names, read_documents
from eacmoe_lightning.text.windows import token_windows


@torch.inference_mode()
def nats_per_token(model: PreTrainedModel, windows: Tensor) -> float:
    """Mean negative log-likelihood of windows [W, T], one at a time."""
    losses = [model(row[None], labels=row[None], use_cache=False).loss.double() for row in windows]
    return float(torch.stack(losses).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--windows", type=int, default=16, help="windows of each text")
    parser.add_argument("--length", type=int, default=256, help="tokens per window")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    print(f"CPU kernels: {kernels.level()}; {args.windows} windows of {args.length} tokens a text")
    tokenizer = AutoTokenizer.from_pretrained(BUNDLED)
    texts = {name: read_documents(f"bundled:{name}") for name in heldout_names()}
    windows = {
        name: token_windows(documents, tokenizer, args.windows, args.length) for name, documents in texts.items()
    }
    rows = []
    for path in args.models:
        exact: dict[str, float] = {}
        for dtype in ("float32", "bfloat16"):
            model = load(path, dtype=dtype)
            for activations in ("exact", "int8"):
                set_activations(model, activations)
                nats_by_text = {text: nats_per_token(model, batch) for text, batch in windows.items()}
                exact = exact or nats_by_text
                for text, nats in nats_by_text.items():
                    row = {"model": str(path), "text": text, "dtype": dtype, "activations": activations}
                    rows.append(row | {"perplexity": math.exp(nats), "nats": nats - exact[text]})
                summary = ", ".join(
                    f"{text} {math.exp(n):.3f} ({n - exact[text]:+.4f})" for text, n in nats_by_text.items()
                )
                print(f"{path} {dtype} {activations}: {summary}", flush=True)
    write_rows(args.json, rows)


if __name__ == "__main__":
    main()
