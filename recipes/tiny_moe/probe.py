"""Measure a MoE directory as a testbed: `python probe.py assets/tiny-moe --text assets/text`.

1. Loss per domain on held-out text, and how the experts specialise (cosine similarity of selection
   frequencies between domains, against that between the halves of one domain).
2. The split of EAC-MoE's Table 1 with experts of 2 and 3 bits (attention of 4): damage S of the
   quantized model's selections with original weights, damage W of quantized weights with the
   original's selections, total damage T; and the share of selections that changed.

Quantization is round-to-nearest between each group's minimum and maximum: this probes the model, not
a method.
"""

import argparse
import copy
import json
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

CONTEXT = 512
DOMAINS = ("prose", "code", "maths", "french", "german")


def windows(text: Path, tokenizer, count: int) -> Tensor:
    """The first `count` windows of CONTEXT+1 tokens of a file."""
    ids = tokenizer(text.read_text(encoding="utf-8"), return_tensors="pt", verbose=False).input_ids[0]
    count = min(count, (len(ids) - 1) // CONTEXT)
    return torch.stack([ids[i * CONTEXT : (i + 1) * CONTEXT + 1] for i in range(count)])


def round_to_nearest(weight: Tensor, bits: int, group_size: int) -> Tensor:
    """Asymmetric min/max quantization in groups along the last (input) dimension, dequantized."""
    group_size = min(group_size, weight.shape[-1])
    groups = weight.float().unflatten(-1, (-1, group_size))
    low, high = groups.amin(-1, keepdim=True).clamp(max=0), groups.amax(-1, keepdim=True).clamp(min=0)
    scale = ((high - low) / (2**bits - 1)).clamp(min=1e-8)
    zero_point = (-low / scale).round()
    codes = ((groups / scale).round() + zero_point).clamp(0, 2**bits - 1)
    return ((codes - zero_point) * scale).flatten(-2).to(weight.dtype)


def quantized(model, expert_bits: int, attention_bits: int, group_size: int):
    """A copy with experts and attention quantized; routers, norms and embedding stay."""
    model = copy.deepcopy(model)  # of a model without hooks
    for name, parameter in model.named_parameters():
        if ".experts." in name:
            parameter.data = round_to_nearest(parameter.data, expert_bits, group_size)
        elif ".self_attn." in name and name.endswith("proj.weight"):
            parameter.data = round_to_nearest(parameter.data, attention_bits, group_size)
    return model


class Selections:
    """Records each block's expert ids [blocks][N,K], or imposes recorded ones."""

    def __init__(self, model):
        self.routers = [layer.mlp.gate for layer in model.model.layers]
        self.ids: list[Tensor] = []
        self.forced: list[Tensor] | None = None
        for number, router in enumerate(self.routers):
            router.register_forward_hook(lambda _, __, out, number=number: self.hook(number, out))
        self.renormalise = model.config.norm_topk_prob

    def hook(self, number: int, out: tuple) -> tuple | None:
        logits, scores, ids = out
        if self.forced is None:
            self.ids.append(ids)
            return None
        scores = logits.float().softmax(-1).gather(-1, self.forced[number])
        if self.renormalise:
            scores = scores / scores.sum(-1, keepdim=True)
        return logits, scores.to(out[1].dtype), self.forced[number]


@torch.no_grad()
def run(model, selections: Selections, tokens: Tensor, forced: list[list[Tensor]] | None = None):
    """Mean nats per token, and the expert ids of every batch of 4 windows."""
    total, ids = 0.0, []
    for number, part in enumerate(tokens.split(4)):
        selections.ids, selections.forced = [], forced[number] if forced else None
        logits = model(part[:, :-1]).logits.float()
        total += torch.nn.functional.cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten()).item() * len(part)
        ids.append(selections.ids)
    return total / len(tokens), ids


def change_rates(original: list[list[Tensor]], changed: list[list[Tensor]]) -> tuple[float, float]:
    """Share of selections that changed, and share of (token, block) pairs with at least one change."""
    a = torch.cat([block for batch in original for block in batch])
    b = torch.cat([block for batch in changed for block in batch])
    lost = ~(a.unsqueeze(-1) == b.unsqueeze(-2)).any(-1)
    return lost.float().mean().item(), lost.any(-1).float().mean().item()


def frequencies(ids: list[list[Tensor]], num_experts: int) -> Tensor:
    """Selection frequency of every expert of every block, flattened (EAC-MoE, section 4.3)."""
    blocks = [torch.cat(block).flatten().bincount(minlength=num_experts) for block in zip(*ids, strict=True)]
    return torch.cat([load / load.sum() for load in blocks])


def probe(folder: Path, text: Path, count: int, group_size: int, bits: list[int]) -> dict:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    untouched, num_experts = copy.deepcopy(model), model.config.num_experts
    selections = Selections(model)
    data = {domain: windows(text / "heldout" / f"{domain}.txt", tokenizer, count) for domain in DOMAINS}
    base = {domain: run(model, selections, tokens) for domain, tokens in data.items()}
    report: dict = {"loss": {domain: round(loss, 4) for domain, (loss, _) in base.items()}}
    report["mean_loss"] = round(sum(report["loss"].values()) / len(data), 4)
    load = {domain: frequencies(ids, num_experts) for domain, (_, ids) in base.items()}
    halves = [
        torch.cosine_similarity(frequencies(ids[0::2], num_experts), frequencies(ids[1::2], num_experts), dim=0)
        for _, ids in base.values()
    ]
    report["cosine_within"] = [round(float(half), 3) for half in halves]
    report["cosine_across"] = {
        f"{a}/{b}": round(torch.cosine_similarity(load[a], load[b], dim=0).item(), 3)
        for number, a in enumerate(DOMAINS)
        for b in DOMAINS[number + 1 :]
    }
    mean_frequency = sum(load.values()) / len(load)
    report["load_max_over_mean"] = round((mean_frequency * num_experts).max().item(), 2)
    report["rare_share"] = {d: round((f * num_experts < 0.3).float().mean().item(), 3) for d, f in load.items()}
    for expert_bits in bits:
        quantized_model = quantized(untouched, expert_bits, 4, group_size)
        quantized_selections = Selections(quantized_model)
        damage: dict[str, dict[str, float]] = {}
        for domain, tokens in data.items():
            loss, ids = base[domain]
            total, quantized_ids = run(quantized_model, quantized_selections, tokens)
            changed, any_changed = change_rates(ids, quantized_ids)
            damage[domain] = {
                "T": total - loss,
                "S": run(model, selections, tokens, forced=quantized_ids)[0] - loss,
                "W": run(quantized_model, quantized_selections, tokens, forced=ids)[0] - loss,
                "changed": changed,
                "any_changed": any_changed,
            }
        mean = {
            key: sum(d[key] for d in damage.values()) / len(damage) for key in ("T", "S", "W", "changed", "any_changed")
        }
        mean |= {"S/T": mean["S"] / mean["T"], "1-W/T": 1 - mean["W"] / mean["T"]}
        report[f"{expert_bits} bit"] = {key: round(value, 4) for key, value in mean.items()}
        report[f"{expert_bits} bit by domain"] = {
            d: {key: round(value, 4) for key, value in values.items()} for d, values in damage.items()
        }
    return report


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", type=Path, default=Path("eacmoe_lightning/assets/text"))
    parser.add_argument("--windows", type=int, default=16, help="windows of 512 tokens per domain")
    parser.add_argument("--group_size", type=int, default=128)
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 3])
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(json.dumps(probe(options.model, options.text, options.windows, options.group_size, options.bits), indent=1))
