"""What compression did: perplexity, expert-shift and the split of the damage, original beside compressed.

Both models run block by block on the same text, one block of each in memory at a time, and one pass gives four streams
(EAC-MoE, table 1):

    original          full precision
    compressed        as it would be served
    selection_damage  original weights, but the experts that the compressed model selected
    weight_damage     compressed weights, but the experts that the original selected
"""

from __future__ import annotations

import math
from collections.abc import Callable, MutableMapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics.aggregation import SumMetric

from eacmoe_lightning import compressed as compressed_format
from eacmoe_lightning.adapter import Block, MoEModel
from eacmoe_lightning.data import shard
from eacmoe_lightning.expert_shift import ExpertShift, mean_rates
from eacmoe_lightning.originals import local_directory
from eacmoe_lightning.ranks import Ranks
from eacmoe_lightning.store import RunDirectory
from eacmoe_lightning.streaming import Checkpoint
from eacmoe_lightning.streaming.hidden import Shelf


@dataclass
class Streams:
    """What one batch of windows gave: negative log-likelihoods in nats and selections."""

    nll: dict[str, Tensor]  # by stream: [B, T-1]
    original_ids: list[Tensor]  # per MoE block [N, K]
    compressed_ids: list[Tensor]


def run_streams(original: MoEModel | None, subject: MoEModel, input_ids: Tensor, split: bool = False) -> Streams:
    """`run_batches` of one batch [B, T], with all selections kept."""
    streams = Streams({}, [], [])

    def keep(batch: int, block: int, ids: Tensor, compressed_ids: Tensor | None) -> None:
        streams.original_ids.append(ids)
        if compressed_ids is not None:
            streams.compressed_ids.append(compressed_ids)

    streams.nll = run_batches(original, subject, [input_ids], split, keep)[0]
    return streams


# batch, MoE block, the original's ids [N, K] and, where there is one beside it, the compressed model's
OnSelections = Callable[[int, int, Tensor, Tensor | None], None]


@torch.no_grad()
def run_batches(
    original: MoEModel | None,
    subject: MoEModel,
    batches: Sequence[Tensor],
    split: bool = False,
    on_selections: OnSelections | None = None,
    hidden: MutableMapping[tuple[int, str], Tensor] | None = None,
) -> list[dict[str, Tensor]]:
    """Runs batches of tokens [B, T] through the original and the subject side by side, all of them block by block.

    Each block is in memory once, whatever the number of batches. Without an original, the subject is itself one: only
    its own stream runs, under the name `original`. Hidden states rest in `hidden` between blocks, by batch and stream:
    in memory, or on a `streaming.hidden.Shelf`.

    Returns:
        Per batch, by stream: negative log-likelihoods [B, T-1] in nats.
    """
    reference, other = (original, subject) if original is not None else (subject, None)
    names = ["original"] + (["compressed"] if other is not None else [])
    names += ["selection_damage", "weight_damage"] if other is not None and split else []
    embedded = _Embedded(reference, batches), _Embedded(other, batches) if other is not None else None
    hidden = {} if hidden is None else hidden
    for j in range(len(batches)):
        hidden.update({(j, name): embedded[name in OF_SUBJECT].embed(j) for name in names})
    moe_block = 0
    for i in range(len(reference.blocks)):
        with reference.loaded(i) as block, other.loaded(i) if other is not None else nullcontext() as twin:
            for j in range(len(batches)):
                kwargs = [e.kwargs(j, i) if e is not None else {} for e in embedded]
                streams = {name: hidden[j, name].to(reference.device) for name in names}
                selected = _through_block(block, twin, streams, kwargs, split)
                hidden.update({(j, name): stream for name, stream in streams.items()})
                if block.is_moe and on_selections is not None:
                    on_selections(j, moe_block, *selected)
        moe_block += block.is_moe

    def nll(j: int, name: str) -> Tensor:
        head = (other if name in OF_SUBJECT else reference).head
        windows = zip(hidden[j, name].to(reference.device).split(1), batches[j].split(1), strict=True)
        return torch.cat([next_token_nll(head(h), ids) for h, ids in windows])  # logits of one window at a time

    return [{name: nll(j, name) for name in names} for j in range(len(batches))]


OF_SUBJECT = ("compressed", "weight_damage")  # streams that run through the subject's weights


class _Embedded:
    """Hidden states [B, T, D] before block 0, and each block's keyword arguments, which depend on the shape only."""

    def __init__(self, moe: MoEModel, batches: Sequence[Tensor]) -> None:
        self.moe, self.batches = moe, batches
        self._shapes = [tuple(batch.shape) for batch in batches]
        self._kwargs: dict[tuple[int, ...], list[dict]] = {}

    def embed(self, batch: int) -> Tensor:
        hidden, kwargs = self.moe.embed(self.batches[batch].to(self.moe.device))
        self._kwargs.setdefault(self._shapes[batch], kwargs)
        return hidden

    def kwargs(self, batch: int, block: int) -> dict:
        return self._kwargs[self._shapes[batch]][block]


def _through_block(
    block: Block, twin: Block | None, streams: dict[str, Tensor], kwargs: list[dict], split: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Takes one batch's streams through a block of the original and its twin; what experts the two selected."""
    streams["original"], routing = block.forward(streams["original"], kwargs[0])
    ids = routing.ids if routing is not None else None
    if twin is None:
        return ids, None
    streams["compressed"], twin_routing = twin.forward(streams["compressed"], kwargs[1])
    twin_ids = twin.original_ids(twin_routing.ids) if twin_routing is not None else None
    if split:
        streams["selection_damage"], _ = block.forward(streams["selection_damage"], kwargs[0], twin_ids)
        streams["weight_damage"], _ = twin.forward(streams["weight_damage"], kwargs[1], ids)
    return ids, twin_ids


def next_token_nll(logits: Tensor, input_ids: Tensor) -> Tensor:
    """[B, T, V], [B, T] -> [B, T-1] nats, float32."""
    targets = input_ids[:, 1:].flatten().to(logits.device)
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), targets, reduction="none").view(
        len(input_ids), -1
    )


def token_log_likelihoods(model: MoEModel, input_ids: Tensor) -> Tensor:
    """[B, T] -> [B, T-1] nats."""
    return -run_batches(None, model, [input_ids])[0]["original"]


class Evaluation:
    """Gathers batches of texts, runs them all block by block, and sums up over batches and processes.

    Args:
        original: the reference, or None where the subject is an original model.
        subject: what is evaluated.
        split: whether `run_batches` is asked for the split of the damage.
        scratch: a directory for hidden states while they are not in use; None: they stay in memory.
    """

    def __init__(
        self, original: MoEModel | None, subject: MoEModel, split: bool = False, scratch: Path | None = None
    ) -> None:
        self.original, self.subject, self.split, self.scratch = original, subject, split, scratch
        self.names = ["original"] + (["compressed"] if original else [])
        self.names += ["selection_damage", "weight_damage"] if original and split else []
        self.batches: list[tuple[str, Tensor]] = []  # text, token ids [B, T]
        self.nll: dict[str, dict[str, SumMetric]] = {}  # text -> stream, and `tokens`
        self.shift: dict[str, ExpertShift] = {}  # text

    def _open(self, text: str) -> None:
        if text in self.nll:
            return
        device = self.subject.device
        self.nll[text] = {name: SumMetric().set_dtype(torch.float64).to(device) for name in [*self.names, "tokens"]}
        if self.original is not None:
            self.shift[text] = ExpertShift(len(self.subject.moe_blocks), self.subject.top_k).to(device)

    def add(self, text: str, input_ids: Tensor) -> None:
        """A batch of windows [B, T] that `compute` is to run."""
        self._open(text)
        self.batches.append((text, input_ids))

    def _run(self) -> None:
        def count(batch: int, block: int, original: Tensor, ids: Tensor | None) -> None:
            if ids is not None:
                self.shift[self.batches[batch][0]].update([original], [ids], first=block)

        batches = [ids for _, ids in self.batches]
        with Shelf.opened(self.scratch) if self.scratch is not None else nullcontext({}) as hidden:
            all_nll = run_batches(self.original, self.subject, batches, self.split, count, hidden)
        for (text, _), nll in zip(self.batches, all_nll, strict=True):
            for name in self.names:
                self.nll[text][name].update(nll[name].double().sum())
            self.nll[text]["tokens"].update(nll["original"].numel())
        self.batches.clear()

    def compute(self, texts: list[str]) -> dict[str, Any]:
        """`perplexity.<text>.<stream>`, `tokens.<text>`, and `expert_shift` with `mean`, `texts` and `blocks`.

        Every process calls it with the same texts, whether or not it saw a batch of each.
        """
        for text in texts:
            self._open(text)
        if self.batches:
            self._run()
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
    scratch: Path | None = None,
) -> dict[str, Any]:
    """`Evaluation.compute` over named windows [S, T], divided among the processes."""
    ranks = ranks or Ranks()
    evaluation = Evaluation(original, subject, split, scratch)
    for text, windows in texts.items():
        own = shard(len(windows), ranks.rank, ranks.world)
        for start in range(own.start, own.stop, batch_size):
            evaluation.add(text, windows[start : min(start + batch_size, own.stop)])
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
    """The weights of the model to evaluate and of the original to compare it with.

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
        subject = compressed_format.CompressedWeights(place, dtype)
        recorded = compressed_format.read_config(place)["original"]["name_or_path"]
        source = recorded if name_or_path == "bundled" else name_or_path
        original = Checkpoint(source, str(subject.dtype).rpartition(".")[2])
        size = {
            "original": compressed_format.size_of(local_directory(source)),
            "compressed": compressed_format.size_of(place),
        }
        return {"subject": subject, "original": original, "size_bytes": size}
    if path is None:
        raise FileNotFoundError(
            f"there is no run in {run.path} (--trainer.default_root_dir): run `fit` first, or say with "
            "--model.evaluate which run directory, compressed directory or original model to look at"
        )
    size = {"original": compressed_format.size_of(local_directory(path))}
    return {"subject": Checkpoint(path, dtype), "original": None, "size_bytes": size}
