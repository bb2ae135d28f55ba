"""Cost and saving of skipping experts on this machine: PESF in prefill and decode, and truncation, EES and ODP.

    python benchmarks/pesf.py --json pesf.json
    python benchmarks/pesf.py --parts prefill --models qwen1.5-moe --rounds 5
    python benchmarks/pesf.py --compressed runs/tiny --models bundled
    python benchmarks/pesf.py --parts prefill --models mixtral --dtypes float32 --rounds 3

Everything runs on one thread and is timed in CPU seconds of this process, because load on a shared machine disturbs
these less than the wall clock (`--clock wall`).

Models: `bundled` is the package's model (with --compressed RUN also its packed form), on held-out text. `qwen1.5-moe`
and `mixtral` have one layer of real shape with random weights and a routing like Zipf's law: tokens belong to topics,
and each topic selects experts with frequencies 1, 1/2^z, 1/3^z, ... in its own order, with noise of unit variance on
the logits. The exponents z (`--zipf`) are chosen so that about as much is skipped as in the bundled model. Random
routers alone are nearly uniform, so no expert would be rare. The dense path is the fastest of `--dtypes` with `eager`
and `grouped_mm`, chosen by one or two calls each, and the packed model has its dtype. Mixtral's layer takes 2.8 GB in
bfloat16, 5.6 GB in float32.

Parts:
    prefill   1x512 and 4x512 tokens at alpha 0, 0.3 and 0.7, which take turns; medians. `limit` is the remaining
              arithmetic (products of attention, router, shared and routed experts) as a share of that without
              skipping. `time` is the same for measured time; if both are equal, all saved work saves time. `reached`
              is the saved time as a share of the saved arithmetic.
    quality   held-out perplexity of the bundled model for every treatment of survivors, and for the baselines.
    decode    one sequence, token by token: tokens/s, and `limit`, the share of weights that remain to be read. For the
              bundled model also the perplexity of held-out continuations decoded token by token, and the original
              model's perplexity of continuations that the model with the rule sampled.
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from inference_models import SHAPES, bf16_model, dense_in_float32, packed_model
from kept_rows import write_rows
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel

import eacmoe_lightning
from eacmoe_lightning.analysis.skipping_sweep import effective_experts, measure
from eacmoe_lightning.evaluation.streams import next_token_nll
from eacmoe_lightning.models.moe import MoEModel
from eacmoe_lightning.models.originals import BUNDLED, load_original
from eacmoe_lightning.runtime.packed_modules import packed_weights
from eacmoe_lightning.skipping import EES, ODP, PESF, Demand, Rule, Truncation, skipping
from eacmoe_lightning.skipping.baselines import median_ratios
from eacmoe_lightning.text.documents import read_documents
from eacmoe_lightning.text.sources import heldout_names
from eacmoe_lightning.text.windows import token_windows

WORK = {"1x512": (1, 512), "4x512": (4, 512)}
ALPHAS = (0.0, 0.3, 0.7)
CLOCKS = {"cpu": time.process_time, "wall": time.perf_counter}
TOPICS, PROMPT, BITS = 4, 192, 3
DTYPES = ("float32", "bfloat16")
ZIPF = {"qwen1.5-moe": 0.8, "mixtral": 1.0}  # exponents


# --- models -----------------------------------------------------------------------------------------------------------


def give_topics(model: PreTrainedModel, zipf: float) -> Callable[[int, int], Tensor]:
    """Makes a one-layer model route like Zipf's law, by its embedding and router; returns what draws tokens [B, T].

    Row b is about topic b: its tokens share a direction, which adds -zipf * log(rank) to the router's logits, where the
    ranks are the topic's order of experts. The other directions of a token's embedding give the noise on its logits.
    """
    generator = torch.Generator().manual_seed(0)
    embedding, router = model.get_input_embeddings().weight, MoEModel(model).moe_blocks[0].router_weight
    (vocabulary, hidden), num_experts = embedding.shape, len(router)
    directions = torch.linalg.qr(torch.randn(hidden, TOPICS, generator=generator)).Q.T  # [topics, D]
    tokens = torch.randn(vocabulary, hidden, generator=generator) / math.sqrt(hidden)
    tokens -= tokens @ directions.T @ directions
    per_topic = vocabulary // TOPICS
    for topic in range(TOPICS):
        tokens[topic * per_topic : (topic + 1) * per_topic] += directions[topic]
    rows = torch.randn(num_experts, hidden, generator=generator) * (2 / hidden) ** 0.5  # times a norm of sqrt(D): 1
    rows -= rows @ directions.T @ directions
    ranks = torch.stack([torch.randperm(num_experts, generator=generator) for _ in range(TOPICS)]) + 1.0
    rows -= zipf * ranks.log().T @ directions * (2 / hidden) ** 0.5
    embedding.data.copy_(tokens)
    router.data.copy_(rows)
    outputs = [p.data for n, p in model.named_parameters() if n.endswith("o_proj.weight")]
    outputs += [weight.scale for n, weight in packed_weights(model) if n.endswith("o_proj.weight")]
    for output in outputs:
        output.zero_()  # dense and packed attention differ, and must not lead to different selections

    def draw(batch: int, length: int) -> Tensor:
        generator = torch.Generator().manual_seed(1)
        within = torch.randint(per_topic, (batch, length), generator=generator)
        return within + per_topic * (torch.arange(batch) % TOPICS).unsqueeze(1)

    return draw


def use(model: PreTrainedModel, experts: str) -> PreTrainedModel:
    model.config._experts_implementation = experts
    return model


def strongest(models: dict[str, PreTrainedModel], ids: Tensor) -> tuple[str, str]:
    """The fastest (dtype, experts implementation), by the better of two calls each, or one call if it is far slower."""
    paths = list(itertools.product(models, ("grouped_mm", "eager")))
    seconds = dict.fromkeys(paths, math.inf)
    for (dtype, experts), _ in itertools.product(paths, range(2)):
        if seconds[dtype, experts] < math.inf and seconds[dtype, experts] > 2 * min(seconds.values()):
            continue
        elapsed = timed(use(models[dtype], experts), ids, time.process_time)
        seconds[dtype, experts] = min(elapsed, seconds[dtype, experts])
    for (dtype, experts), elapsed in seconds.items():
        print(f"  full precision, {dtype} {experts}: {1e3 * elapsed:.0f} ms", flush=True)
    return min(seconds, key=seconds.get)


def prepare(name: str, args: argparse.Namespace) -> tuple[dict[str, PreTrainedModel], Callable[[int, int], Tensor]]:
    """Backends by name, the fastest dense one and a packed one of its dtype, and a function that draws tokens."""
    if name == "bundled":
        dense = {dtype: load_original("bundled", dtype) for dtype in args.dtypes}
        windows = torch.cat([text_windows[:4] for text_windows in heldout(4, 512).values()])

        def draw(batch: int, length: int) -> Tensor:
            return windows[:: len(windows) // batch][:batch, :length]  # of different texts

        packed = eacmoe_lightning.load(args.compressed, dtype="float32") if args.compressed else None
    else:
        zipf = ZIPF[name] if args.zipf is None else args.zipf
        model = bf16_model(SHAPES[name])
        packed = packed_model(model, BITS)
        draw = give_topics(model, zipf)
        give_topics(packed, zipf)
        dense = {"bfloat16": model} if "bfloat16" in args.dtypes else {}
        if "float32" in args.dtypes:  # converted in place if bfloat16 is not measured, to save memory
            dense = {"float32": dense_in_float32(model) if dense else model.float()} | dense
    print(name, flush=True)
    dtype, experts = strongest(dense, draw(1, 512))
    backends = {f"{dtype} {experts}": use(dense[dtype], experts)}
    return backends | ({f"packed {dtype}": packed.to(getattr(torch, dtype))} if packed is not None else {}), draw


def heldout(num_windows: int, length: int) -> dict[str, Tensor]:
    tokenizer = AutoTokenizer.from_pretrained(BUNDLED)
    texts = {name: read_documents(f"bundled:{name}") for name in heldout_names()}
    return {name: token_windows(documents, tokenizer, num_windows, length) for name, documents in texts.items()}


# --- remaining arithmetic ---------------------------------------------------------------------------------------------


def weights_per_token(model: PreTrainedModel, context: int) -> tuple[int, int]:
    """Multiplications per token outside the routed experts, and per (token, expert) pair, over all blocks.

    Attention's scores are counted for a mean of `context` keys per token. The head runs once per sequence and is not
    counted.
    """
    config, moe = model.config, MoEModel(model)
    hidden, heads = config.hidden_size, config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or hidden // heads
    attention = 2 * hidden * head_dim * (heads + config.num_key_value_heads) + 2 * heads * head_dim * context
    shared = 3 * hidden * (getattr(config, "shared_expert_intermediate_size", 0) or 0)
    width = getattr(config, "moe_intermediate_size", None) or config.intermediate_size
    blocks = len(moe.moe_blocks)
    return blocks * (attention + shared + hidden * moe.num_experts), blocks * 3 * hidden * width


def limit(model: PreTrainedModel, dropped: float, context: int) -> float:
    """The share of the arithmetic that remains if a share of the pairs is dropped."""
    other, pair = weights_per_token(model, context)
    routed = pair * MoEModel(model).top_k
    return (other + routed * (1 - dropped)) / (other + routed)


def timed(model: PreTrainedModel, ids: Tensor, clock: Callable[[], float]) -> float:
    start = clock()
    model(ids, use_cache=False, logits_to_keep=1)
    if ids.is_cuda:
        torch.cuda.synchronize(ids.device)
    return clock() - start


def under(model: PreTrainedModel, rule: Rule | None):
    return skipping(model, rule) if rule is not None else nullcontext()


# --- parts ------------------------------------------------------------------------------------------------------------


def prefill(name: str, backends: dict[str, PreTrainedModel], draw: Any, args: argparse.Namespace) -> Iterator[dict]:
    for work in args.work:
        ids = draw(*WORK[work]).to(next(iter(backends.values())).device)
        times: dict[tuple[str, float], list[float]] = {(b, a): [] for b in backends for a in ALPHAS}
        shares: dict[tuple[str, float], dict[str, float]] = {}
        num_warm = int(work == args.work[0])
        for turn in range(args.rounds + num_warm):
            for backend, alpha in times:
                with under(backends[backend], PESF(alpha) if alpha else None) as report:
                    seconds = timed(backends[backend], ids, CLOCKS[args.clock])
                    if turn >= num_warm:
                        times[backend, alpha].append(seconds)
                    shares[backend, alpha] = report.summary() if report else {}
        dense = statistics.median(times[next(iter(backends)), 0.0])
        for (backend, alpha), own_times in times.items():
            share, base = shares[backend, alpha], times[backend, 0.0]
            ratio = statistics.median(a / b for a, b in zip(own_times, base, strict=True))
            left = limit(backends[backend], share.get("pairs_dropped", 0.0), WORK[work][1] // 2)
            row = {
                "part": "prefill",
                "model": name,
                "work": work,
                "backend": backend,
                "alpha": alpha,
                "median_s": statistics.median(own_times),
                "time": ratio,
                "limit": left,
                "reached": (1 - ratio) / (1 - left) if left < 1 else None,
                "speedup_over_full_precision": dense / statistics.median(own_times),
                "pairs_dropped": share.get("pairs_dropped", 0.0),
                "experts_skipped": share.get("experts_skipped", 0.0),
                "experts_untouched": share.get("experts_untouched", 0.0),
            }
            yield row


def quality(backends: dict[str, PreTrainedModel], args: argparse.Namespace) -> list[dict]:
    texts = heldout(args.windows, 512)
    calibration = token_windows(
        read_documents("bundled:calibration"), AutoTokenizer.from_pretrained(BUNDLED), 16, 512, seed=0
    )
    rows = []
    for backend, model in backends.items():
        rules: dict[str, Rule | None] = {"none": None}
        for alpha in (0.3, 0.7):
            rules |= {f"pesf {alpha} {s}": PESF(alpha, s) for s in ("keep", "renormalize", "reroute")}
            rules |= {f"pesf {alpha} keep, rescue 1": PESF(alpha, rescue=1.0)}
        rules |= {"pesf 1.0 keep, rescue 1": PESF(1.0, rescue=1.0), "top-1 of 2": Truncation(1)}
        ratios = median_ratios(model, calibration)
        rules |= {"ees": EES(ratios), "ees keep": EES(ratios, "keep"), "odp": ODP(ratios)}
        spread = effective_experts(model, texts, 8)
        for row in measure(model, texts, rules, 8, {}):
            perplexities = row["perplexity"].values()
            row |= {"part": "quality", "model": "bundled", "backend": backend, "effective_experts": spread}
            row["mean_perplexity"] = math.exp(sum(map(math.log, perplexities)) / len(perplexities))
            rows.append(row)
            show(row)
    return rows


def decode(name: str, backends: dict[str, PreTrainedModel], draw: Any, args: argparse.Namespace) -> list[dict]:
    top_k = MoEModel(next(iter(backends.values()))).top_k
    truncated = Truncation(max(1, math.ceil(2 * top_k / 3)) if top_k > 2 else 1)
    rules: dict[str, Rule | None] = {"full": None, f"top-{truncated.top_k} of {top_k}": truncated}
    rules |= {f"pesf-decode {a}": PESF(a, rescue=1.0, decode=Demand()) for a in (0.3, 0.7, 1.0)}
    rows = []
    for backend, model in backends.items():
        rules_of_backend = dict(rules)
        if name == "bundled":
            rules_of_backend["ees"] = EES(median_ratios(model, draw(4, 512)))
        ids = draw(1, PROMPT + args.steps)
        times: dict[str, list[float]] = {rule: [] for rule in rules_of_backend}
        shares: dict[str, float] = {}
        for turn in range(args.rounds + 1):
            for rule, value in rules_of_backend.items():
                with under(model, value) as report:
                    seconds = step_seconds(model, ids, CLOCKS[args.clock])
                    if turn:
                        times[rule].append(seconds)
                    shares[rule] = report.summary("decode")["pairs_dropped"] if report else 0.0
        quality_of_rule = continuations(model, rules_of_backend, args) if name == "bundled" else {}
        for rule in rules_of_backend:
            row = {
                "part": "decode",
                "model": name,
                "backend": backend,
                "rule": rule,
                "tokens_per_s": args.steps / statistics.median(times[rule]),
                "time": statistics.median(a / b for a, b in zip(times[rule], times["full"], strict=True)),
                "limit": limit(model, shares[rule], 0),
                "pairs_dropped": shares[rule],
            } | quality_of_rule.get(rule, {})
            rows.append(row)
            show(row)
    return rows


def step_seconds(model: PreTrainedModel, ids: Tensor, clock: Callable[[], float]) -> float:
    """Seconds of the steps after the prompt, given [1, T] tokens."""
    out = model(ids[:, :PROMPT], use_cache=True, logits_to_keep=1)
    start = clock()
    for t in range(PROMPT, ids.shape[1]):
        out = model(ids[:, t : t + 1], past_key_values=out.past_key_values, use_cache=True)
    return clock() - start


def continuations(model: PreTrainedModel, rules: dict[str, Rule | None], args: argparse.Namespace) -> dict[str, dict]:
    """By rule: perplexity of held-out continuations, and the original model's perplexity of sampled continuations."""
    original = load_original("bundled", "float32")
    windows = torch.cat(list(heldout(args.windows, PROMPT + args.continuation).values()))
    prompts = windows[:, :PROMPT]
    results = {}
    for name, rule in rules.items():
        with under(model, rule) as report:
            out = model(prompts, use_cache=True)
            logits = [out.logits[:, -1:]]
            for t in range(PROMPT, windows.shape[1] - 1):
                out = model(windows[:, t : t + 1], past_key_values=out.past_key_values, use_cache=True)
                logits.append(out.logits)
            forced = next_token_nll(torch.cat([*logits, logits[-1]], 1), windows[:, PROMPT - 1 :])
            dropped = report.summary("decode")["pairs_dropped"] if report else 0.0
            torch.manual_seed(0)
            options = {"max_new_tokens": args.continuation, "min_new_tokens": args.continuation, "top_k": 0}
            sampled = model.generate(prompts, attention_mask=torch.ones_like(prompts), do_sample=True, **options)
        nll = next_token_nll(original(sampled, use_cache=False).logits, sampled)[:, PROMPT - 1 :]
        results[name] = {
            "heldout_perplexity": float(forced.mean().exp()),
            "sampled_perplexity": float(nll.mean().exp()),
            "sampled_error": float(nll.mean(1).std() / len(nll) ** 0.5),  # of the mean in nats
            "pairs_dropped_on_text": dropped,
        }
    return results


def show(row: dict[str, Any]) -> None:
    head = f"{row['part']:8s} {row['model']:12s} {row['backend']:20s}"
    if row["part"] == "prefill":
        suffix = "" if row["reached"] is None else f" (reached {row['reached']:.0%})"
        print(
            f"{head} {row['work']} alpha {row['alpha']:.1f} {1e3 * row['median_s']:8.1f} ms  time {row['time']:.3f}  "
            f"limit {row['limit']:.3f}{suffix}  dropped {row['pairs_dropped']:.1%}  "
            f"skipped {row['experts_skipped']:.1%}  untouched {row['experts_untouched']:.1%}  "
            f"x{row['speedup_over_full_precision']:.2f}",
            flush=True,
        )
    elif row["part"] == "quality":
        texts = " ".join(f"{text} {value:.3f}" for text, value in row["perplexity"].items())
        print(
            f"{head} {row['name']:24s} mean {row['mean_perplexity']:.3f}  dropped {row['pairs_dropped']:.1%}  "
            f"time {row['latency']:.3f}  {texts}",
            flush=True,
        )
    else:
        suffix = ""
        if "heldout_perplexity" in row:
            suffix = (
                f"  held-out {row['heldout_perplexity']:.3f} (dropped {row['pairs_dropped_on_text']:.1%})  sampled "
                f"{row['sampled_perplexity']:.2f} (+-{row['sampled_error']:.3f} nats)"
            )
        print(
            f"{head} {row['rule']:16s} {row['tokens_per_s']:8.1f} tokens/s  time {row['time']:.3f}  "
            f"limit {row['limit']:.3f}  dropped {row['pairs_dropped']:.1%}{suffix}",
            flush=True,
        )


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=["bundled", *ZIPF], default=["bundled", "qwen1.5-moe"])
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES), help="dtypes of the dense path")
    parser.add_argument("--zipf", type=float, help=f"exponent of the routing of real shapes (default: {ZIPF})")
    parser.add_argument("--parts", nargs="+", choices=["prefill", "quality", "decode"], default=None)
    parser.add_argument("--work", nargs="+", choices=list(WORK), default=list(WORK))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=48, help="timed decoding steps")
    parser.add_argument("--windows", type=int, default=8, help="windows of each held-out text")
    parser.add_argument(
        "--continuation", type=int, default=64, help="tokens after each prompt whose quality is measured"
    )
    parser.add_argument("--compressed", type=Path, help="a run or compressed directory of the bundled model")
    parser.add_argument("--clock", choices=list(CLOCKS), default="cpu")
    parser.add_argument("--json", type=Path, help="file for the rows")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    for name in args.models:
        backends, draw = prepare(name, args)
        for part in args.parts or ("prefill", "quality", "decode"):
            if part == "prefill":
                for row in prefill(name, backends, draw, args):
                    rows.append(row)
                    show(row)
            elif part == "decode":
                rows += decode(name, backends, draw, args)
            elif name == "bundled":
                rows += quality(backends, args)
            write_rows(args.json, rows)


if __name__ == "__main__":
    main()
