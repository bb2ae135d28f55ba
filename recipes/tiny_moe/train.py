"""Train the tiny MoE: `python train.py --name final --minutes 60`.

The schedule is a short warm-up, a constant rate, then a linear decay over the last third. It follows
wall-clock time, because throughput varies on a shared machine, or with `--million_tokens` what was read.
`--resume` continues a run from its checkpoint, with another budget if needed. Started by torchrun, several
processes share a run (see ranks.py), which is faster on a busy machine.
"""

import argparse
import json
import os
import time
from pathlib import Path

import numpy as np
import torch
from export import export
from model import Shape, TinyMoE
from optimizer import build
from ranks import average_gradients, start

MIX = {"prose": 0.24, "code": 0.22, "french": 0.15, "german": 0.11, "maths": 0.12, "dictionary": 0.09, "formal": 0.07}
CONTEXT = 512
DECAY_SHARE, FLOOR = 0.35, 0.03  # share of the budget in which the rate decays; final rate over peak rate


class Batches:
    """Random windows of CONTEXT+1 tokens, each of one domain drawn by MIX."""

    def __init__(self, tokens: Path, split: str, seed: int | tuple[int, ...]):
        self.arrays = {domain: np.load(tokens / f"{split}-{domain}.npy") for domain in MIX}
        self.random = np.random.default_rng(seed)

    def next(self, size: int) -> torch.Tensor:
        rows = []
        for domain in self.random.choice(list(MIX), size=size, p=list(MIX.values())):
            array = self.arrays[domain]
            start = self.random.integers(0, len(array) - CONTEXT - 1)
            rows.append(array[start : start + CONTEXT + 1])
        return torch.from_numpy(np.stack(rows).astype(np.int64))


@torch.no_grad()
def evaluate(model: TinyMoE, tokens: Path, sequences: int, batch: int) -> dict[str, float]:
    """Mean nats per token on held-out documents, by domain."""
    losses = {}
    for domain in MIX:
        array = np.load(tokens / f"heldout-{domain}.npy")
        starts = np.linspace(0, len(array) - CONTEXT - 1, sequences).astype(int)
        windows = torch.from_numpy(np.stack([array[s : s + CONTEXT + 1] for s in starts]).astype(np.int64))
        losses[domain] = sum(model(part)[0].item() for part in windows.split(batch)) * batch / sequences
    return losses


def rate(progress: float, steps: int) -> float:
    """Factor on the peak rate after a share `progress` of the budget."""
    warm = min(1.0, (steps + 1) / 60)
    return warm * min(1.0, FLOOR + (1 - FLOOR) * max(0.0, 1 - progress) / DECAY_SHARE)


def train(options: argparse.Namespace) -> None:
    rank, num_ranks = start()
    torch.manual_seed(options.seed)
    torch.set_num_threads(options.threads)
    folder = options.out / options.name
    folder.mkdir(parents=True, exist_ok=True)
    shape = Shape(
        hidden_size=options.hidden, num_attention_heads=options.heads, num_key_value_heads=options.heads // 2,
        num_hidden_layers=options.blocks, num_experts=options.experts, num_experts_per_tok=options.top_k,
        moe_intermediate_size=options.expert_width, norm_topk_prob=options.renormalise, sigmoid=options.sigmoid,
        n_shared_experts=options.shared, first_k_dense_replace=options.dense,
        partial_rotary_factor=options.rotary, routed_scaling_factor=options.scaling,
    )  # fmt: skip
    model = TinyMoE(shape, CONTEXT)
    optimizers = build(model, options.matrix_lr, options.adam_lr, options.router_lr)
    step, tokens, used = 0, 0, 0.0
    if options.resume:
        saved = torch.load(folder / "checkpoint.pt", weights_only=False)
        model.load_state_dict(saved["model"])
        for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        step, tokens, used = saved["step"], saved["tokens"], saved["used"]
    batches = Batches(options.tokens, "train", (options.seed, rank, step))
    log = open(folder / "log.jsonl", "a")
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters", shape, flush=True)
    budget, begin, last_save, mean = options.minutes * 60, time.time() - used, time.time(), []
    elapsed, since, tokens_then = used, time.time(), tokens

    def progress() -> float:
        return tokens / (options.million_tokens * 1e6) if options.million_tokens else elapsed / budget

    while progress() < 1:
        factor = rate(progress(), step)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * factor
        loss, balance, overlap, loads = model(batches.next(options.batch))
        (loss + options.balance * balance + options.diversity * overlap).backward()
        figures = [loss.item(), balance.item(), overlap.item(), time.time() - begin, *loads.flatten().tolist()]
        *figures, elapsed = (averages := average_gradients(model, figures))[:4]
        if options.sigmoid:
            model.correct(torch.tensor(averages[4:]).view_as(loads), options.correction * factor)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if options.router_norm:  # keeps routing weights flat: no router row is longer than this
            with torch.no_grad():
                for block in model.blocks:
                    length = block.router.norm(dim=1, keepdim=True)
                    block.router.mul_((options.router_norm / length).clamp(max=1.0))
        step, tokens = step + 1, tokens + num_ranks * options.batch * CONTEXT
        mean.append(figures)
        if step % 25 == 0 and rank == 0:
            speed = (tokens - tokens_then) / (time.time() - since)
            since, tokens_then = time.time(), tokens
            average = dict(zip(("loss", "balance", "overlap"), np.mean(mean, axis=0).round(4).tolist(), strict=True))
            record = {"step": step, "minutes": round(elapsed / 60, 2), "tokens": tokens, **average}
            record |= {"rate": round(factor, 3), "tokens_per_s": round(speed)}
            mean = []
            log.write(json.dumps(record) + "\n")
            log.flush()
            print(record, flush=True)
        if rank == 0 and time.time() - last_save > options.save_minutes * 60:
            last_save = time.time()
            state = {
                "model": model.state_dict(), "optimizers": [o.state_dict() for o in optimizers],
                "step": step, "tokens": tokens, "used": elapsed,
            }  # fmt: skip
            torch.save(state, folder / "checkpoint.pt.partial")
            os.replace(folder / "checkpoint.pt.partial", folder / "checkpoint.pt")
    if rank > 0:
        return
    heldout = evaluate(model, options.tokens, 32, options.batch)
    summary = {"tokens": tokens, "steps": step, "minutes": round(elapsed / 60, 1), "heldout": heldout,
               "mean": sum(MIX[d] * v for d, v in heldout.items()), "options": vars(options)}  # fmt: skip
    (folder / "summary.json").write_text(json.dumps(summary, indent=1, default=str))
    print(summary["tokens"], summary["mean"], heldout, flush=True)
    torch.save(model.state_dict(), folder / "final.pt")
    export(model, options.tokens / "tokenizer", folder / "hf", CONTEXT, options.balance, batches.next(options.batch))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--name", required=True)
    parser.add_argument("--tokens", type=Path, default=Path("work/tokens"))
    parser.add_argument("--out", type=Path, default=Path("work/runs"))
    parser.add_argument("--minutes", type=float, default=70.0)
    parser.add_argument("--million_tokens", type=float, help="train on so many tokens instead of for --minutes")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch", type=int, default=8, help="sequences of 512 tokens per step")
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--heads", type=int, default=4, help="query heads of 64; half as many key/value heads")
    parser.add_argument("--blocks", type=int, default=6)
    parser.add_argument("--experts", type=int, default=20)
    parser.add_argument("--top_k", type=int, default=2)
    parser.add_argument("--expert_width", type=int, default=128)
    parser.add_argument("--renormalise", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--sigmoid", action="store_true", help="GLM-4-MoE: sigmoid scores with a correction bias")
    parser.add_argument("--shared", type=int, default=0, help="shared experts, each as wide as a routed one")
    parser.add_argument("--dense", type=int, default=0, help="blocks at the start with a dense MLP of width 768")
    parser.add_argument("--rotary", type=float, default=1.0, help="share of a head that is rotated")
    parser.add_argument("--scaling", type=float, default=1.0, help="factor of the routed experts' output")
    parser.add_argument("--correction", type=float, default=1e-3, help="step of the correction bias at the peak rate")
    parser.add_argument("--balance", type=float, default=0.01, help="weight of the load-balancing loss")
    parser.add_argument("--diversity", type=float, default=0.0, help="weight of the overlap of a token's experts")
    parser.add_argument("--router_norm", type=float, default=0.08, help="largest norm of a router row; 0: no limit")
    parser.add_argument("--matrix_lr", type=float, default=0.02)
    parser.add_argument("--adam_lr", type=float, default=3e-3)
    parser.add_argument("--router_lr", type=float, default=2e-4)
    parser.add_argument("--save_minutes", type=float, default=4.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true")
    train(parser.parse_args())
