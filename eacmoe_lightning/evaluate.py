"""What compression did: perplexity, expert-shift and the split of the damage, original beside compressed.

Both models run block by block on the same text, so that one pass gives four streams (EAC-MoE, table 1):

    original          full precision
    compressed        as it would be served
    selection_damage  original weights, but the experts that the compressed model selected
    weight_damage     compressed weights, but the experts that the original selected
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics.aggregation import SumMetric

from eacmoe_lightning import compressed as compressed_format
from eacmoe_lightning.adapter import MoEModel, load_original, local_directory
from eacmoe_lightning.data import shard
from eacmoe_lightning.expert_shift import ExpertShift, mean_rates
from eacmoe_lightning.ranks import Ranks
from eacmoe_lightning.store import RunDirectory


@dataclass
class Streams:
    """What one batch of windows gave: negative log-likelihoods in nats and selections."""

    nll: dict[str, Tensor]  # by stream: [B, T-1]
    original_ids: list[Tensor]  # per MoE block [N, K]
    compressed_ids: list[Tensor]


@torch.no_grad()
def run_streams(original: MoEModel | None, subject: MoEModel, input_ids: Tensor, split: bool = False) -> Streams:
    """Runs [B, T] tokens through the original and the subject side by side.

    Without an original, the subject is itself one: only its own stream runs, under the name `original`.
    """
    reference, other = (original, subject) if original is not None else (subject, None)
    x, kwargs = reference.embed(input_ids)
    streams = {"original": x}
    if other is not None:
        streams["compressed"], other_kwargs = other.embed(input_ids)
        if split:
            streams |= {"selection_damage": x, "weight_damage": streams["compressed"]}
    original_ids: list[Tensor] = []
    compressed_ids: list[Tensor] = []
    for i, block in enumerate(reference.blocks):
        streams["original"], routing = block.forward(streams["original"], kwargs[i])
        if routing is not None:
            original_ids.append(routing.ids)
        if other is None:
            continue
        twin = other.blocks[i]
        streams["compressed"], twin_routing = twin.forward(streams["compressed"], other_kwargs[i])
        if routing is not None:
            compressed_ids.append(twin_routing.ids)
        if split:
            forced = (None, None) if routing is None else (twin_routing.ids, routing.ids)
            streams["selection_damage"], _ = block.forward(streams["selection_damage"], kwargs[i], forced[0])
            streams["weight_damage"], _ = twin.forward(streams["weight_damage"], other_kwargs[i], forced[1])
    heads = {"original": reference, "selection_damage": reference, "compressed": other, "weight_damage": other}
    nll = {name: next_token_nll(heads[name].head(hidden), input_ids) for name, hidden in streams.items()}
    return Streams(nll, original_ids, compressed_ids)


def next_token_nll(logits: Tensor, input_ids: Tensor) -> Tensor:
    """[B, T, V], [B, T] -> [B, T-1] nats, float32."""
    return nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(), input_ids[:, 1:].flatten(), reduction="none"
    ).view(len(input_ids), -1)


@torch.no_grad()
def token_log_likelihoods(model: MoEModel, input_ids: Tensor) -> Tensor:
    """[B, T] -> [B, T-1] nats."""
    return -next_token_nll(model.model(input_ids=input_ids, use_cache=False).logits, input_ids)


class Evaluation:
    """Gathers `Streams` over texts, batches and processes.

    Args:
        original: the reference, or None where the subject is an original model.
        subject: what is evaluated.
        split: whether `run_streams` is asked for the split of the damage.
    """

    def __init__(self, original: MoEModel | None, subject: MoEModel, split: bool) -> None:
        self.original, self.subject, self.split = original, subject, split
        self.names = ["original"] + (["compressed"] if original else [])
        self.names += ["selection_damage", "weight_damage"] if original and split else []
        self.nll: dict[str, dict[str, SumMetric]] = {}  # text -> stream, and `tokens`
        self.shift: dict[str, ExpertShift] = {}  # text

    def _open(self, text: str) -> None:
        if text in self.nll:
            return
        device = self.subject.device
        self.nll[text] = {name: SumMetric().set_dtype(torch.float64).to(device) for name in [*self.names, "tokens"]}
        if self.original is not None:
            self.shift[text] = ExpertShift(len(self.subject.moe_blocks), self.subject.top_k).to(device)

    def update(self, text: str, streams: Streams) -> None:
        self._open(text)
        for name in self.names:
            self.nll[text][name].update(streams.nll[name].double().sum())
        self.nll[text]["tokens"].update(streams.nll["original"].numel())
        if self.original is not None:
            self.shift[text].update(streams.original_ids, streams.compressed_ids)

    def compute(self, texts: list[str]) -> dict[str, Any]:
        """`perplexity.<text>.<stream>`, `tokens.<text>`, and `expert_shift` with `mean`, `texts` and `blocks`.

        Every process calls it with the same texts, whether or not it saw a batch of each.
        """
        for text in texts:
            self._open(text)
        tokens = {text: float(self.nll[text]["tokens"].compute()) for text in texts}
        perplexity = {
            text: {name: math.exp(float(self.nll[text][name].compute()) / max(tokens[text], 1)) for name in self.names}
            for text in texts
        }
        result: dict[str, Any] = {
            "perplexity": perplexity,
            "tokens": {k: int(v) for k, v in tokens.items()},
            "expert_shift": {},
        }
        if self.original is not None:
            by_text = {text: self.shift[text].compute() for text in texts}
            blocks = [mean_rates([by_text[text][i] for text in texts]) for i in range(len(self.subject.moe_blocks))]
            result["expert_shift"] = {
                "mean": mean_rates(blocks),
                "texts": {text: mean_rates(rates) for text, rates in by_text.items()},
                "blocks": [
                    {"block": b.index, **rates} for b, rates in zip(self.subject.moe_blocks, blocks, strict=True)
                ],
            }
        return result


@torch.no_grad()
def evaluate(
    original: MoEModel | None,
    subject: MoEModel,
    texts: dict[str, Tensor],
    batch_size: int,
    split: bool = False,
    ranks: Ranks | None = None,
) -> dict[str, Any]:
    """`Evaluation.compute` over named windows [S, T], divided among the processes."""
    ranks = ranks or Ranks()
    evaluation = Evaluation(original, subject, split)
    for text, windows in texts.items():
        own = shard(len(windows), ranks.rank, ranks.world)
        for start in range(own.start, own.stop, batch_size):
            batch = windows[start : min(start + batch_size, own.stop)].to(subject.device)
            evaluation.update(text, run_streams(original, subject, batch, split))
    return evaluation.compute(list(texts))


def compressed_directory(path: Path, option: str = "--model.evaluate") -> Path | None:
    """The compressed directory that a run directory holds or that `path` itself is; None where it is neither.

    Raises:
        FileNotFoundError: the run is not finished.
    """
    if (path / "run.json").exists() and not (path / "compressed" / "config.json").exists():
        raise FileNotFoundError(
            f"the run in {path} has no compressed model yet: finish it with `fit --ckpt_path last`, or pass another "
            f"directory with {option}"
        )
    return next((p for p in (path / "compressed", path) if compressed_format.is_compressed(p)), None)


def load_subject(name_or_path: str, dtype: str, path: str | None, run: RunDirectory) -> dict[str, Any]:
    """The model to evaluate and the original to compare it with.

    Args:
        name_or_path: the original, used where a compressed model does not know its own.
        dtype: of both.
        path: a run directory, a compressed directory or an original model; None: `run`.

    Returns:
        `subject`, `original` (None where the subject is itself an original) and the `size_bytes` of each.

    Raises:
        FileNotFoundError: `path` is none of the three, or the run is not finished.
    """
    place = compressed_directory(Path(path) if path is not None else run.path)
    if place is not None:
        subject = compressed_format.load(place, dtype, packed=False)
        recorded = compressed_format.read_config(place)["original"]["name_or_path"]
        source = recorded if name_or_path == "bundled" else name_or_path
        original = load_original(source, str(subject.dtype).rpartition(".")[2])
        size = {
            "original": compressed_format.size_of(local_directory(source)),
            "compressed": compressed_format.size_of(place),
        }
        return {"subject": MoEModel(subject), "original": MoEModel(original), "size_bytes": size}
    if path is None:
        raise FileNotFoundError(
            f"there is no run in {run.path} (--trainer.default_root_dir): run `fit` first, or say with "
            "--model.evaluate which run directory, compressed directory or original model to look at"
        )
    size = {"original": compressed_format.size_of(local_directory(path))}
    return {"subject": MoEModel(load_original(path, dtype)), "original": None, "size_bytes": size}
