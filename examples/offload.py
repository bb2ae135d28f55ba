"""Run a model whose experts do not fit into the accelerator's memory.

    python examples/offload.py runs/example                       # a compressed model
    python examples/offload.py bundled --codec sz3:mean:0.1       # an original; the error of every weight is bounded

The experts rest compressed in one file. A cache of bounded size holds decoded ones, and the router of the next block
prefetches what it is likely to select. `--cache 0.25` keeps a quarter of the experts decoded; whole numbers are bytes.
Codecs: lossless, sz3:mean:0.1, and for compressed models packed-entropy:3:128 (bits, group size). docs/offloading.md
has all of them.
"""

import argparse
import time

import torch
from transformers import AutoTokenizer

import eacmoe_lightning

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("model", help="a run directory, a compressed directory or an original")
parser.add_argument("--cache", default="0.25", help="share of the experts, or bytes")
parser.add_argument("--codec", default="lossless", help="how experts are stored")
parser.add_argument("--store", help="directory to keep the store in, for the next start; default: in memory")
parser.add_argument("--prompt", default="The whale")
parser.add_argument("--max_new_tokens", type=int, default=40)
parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
options = parser.parse_args()

cache_bytes = int(options.cache) if options.cache.isdigit() else float(options.cache)
model = eacmoe_lightning.load_offloaded(
    options.model, cache_bytes, options.codec, directory=options.store, device=options.device
)
offload = model.offload
tokenizer = AutoTokenizer.from_pretrained(model.name_or_path)
inputs = tokenizer(options.prompt, return_tensors="pt").to(options.device)

start = time.perf_counter()
output = model.generate(**inputs, max_new_tokens=options.max_new_tokens, do_sample=False)
seconds = time.perf_counter() - start
print(tokenizer.decode(output[0], skip_special_tokens=True))

num_tokens = output.shape[1] - inputs["input_ids"].shape[1]
print(f"\n{num_tokens} tokens, {num_tokens / seconds:.1f} a second")
print(f"{offload.expert_bytes / 1e6:.1f} MB of experts, {offload.cache_bytes / 1e6:.1f} MB of them in a full cache")
for name, value in offload.counters.to_dict().items():
    print(f"{name:20s} {value:.3f}" if isinstance(value, float) else f"{name:20s} {value}")
offload.close()  # ends the threads or processes that decode
