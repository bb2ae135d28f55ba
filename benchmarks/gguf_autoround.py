"""AutoRound's GGUF file of an MoE, for `gguf_quality.py --also`: experts Q2_K or Q3_K, attention Q4_K, head as it is.

Runs in an environment with auto-round (`environments.py` makes one) and without this package. LLAMA is a source tree of
llama.cpp, whose converter AutoRound needs:

    LLAMA_CPP_ROOT=LLAMA PYTHONPATH=LLAMA/gguf-py python benchmarks/gguf_autoround.py --model DIRECTORY \\
        --tokens windows.safetensors --bits 2 --output out

Of the testbeds it converts the bundled model; with `bundled:fine-moe` AutoRound 0.16.1 ends in an error of its own.
Rows that are no multiple of 256 get Q5_0 (AutoRound's choice); `--model.overrides` with 5 bits gives ours the same.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from auto_round import AutoRound
from auto_round.export.export_to_gguf import export as gguf_export
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

BATCH_SIZE = 4
WORDS = "gpt-2"  # llama.cpp's rule that splits like the testbeds' tokenizer, which its converter does not know


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="directory of the original")
    parser.add_argument("--tokens", type=Path, required=True, help="calibration windows: `input_ids` [S, T]")
    parser.add_argument("--bits", type=int, choices=(2, 3, 4), default=2, help="of everything but the attention")
    parser.add_argument("--iters", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", required=True)
    args = parser.parse_args()
    gguf_export.get_conversion = with_words(gguf_export.get_conversion)
    input_ids = load_file(args.tokens)["input_ids"].long()
    network = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    linears = [name for name, module in network.named_modules() if isinstance(module, torch.nn.Linear)]
    types = {name: "GGUF:Q4_K_S" for name in linears if ".self_attn." in name}
    tuning = AutoRound(
        network,
        AutoTokenizer.from_pretrained(args.model),
        scheme=f"GGUF:Q{args.bits}_K_S",
        layer_config=types | {name: "BF16" for name in ("model.embed_tokens", "lm_head")},
        dataset=torch.utils.data.DataLoader(input_ids, batch_size=BATCH_SIZE),
        nsamples=len(input_ids),
        seqlen=input_ids.shape[1],
        batch_size=BATCH_SIZE,
        seed=args.seed,
        iters=args.iters,
        device_map="cpu",
        amp=False,
    )
    tuning.quantize_and_save(args.output, format=f"gguf:q{args.bits}_k_s")


def with_words(get_conversion):
    """AutoRound imports the converter anew for each export."""

    def get(*args, **options):
        context = get_conversion(*args, **options)
        sys.modules["conversion.base"].TextModel.get_vocab_base_pre = lambda self, tokenizer: WORDS
        return context

    return get


if __name__ == "__main__":
    main()
