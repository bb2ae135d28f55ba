"""Writes the result of `predict`: the log-likelihood of every token of a text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import BasePredictionWriter

from eacmoe_lightning.job.qesc import QESC
from eacmoe_lightning.run.files import write_tensors


class TokenScores(BasePredictionWriter):
    """Writes one `scores_NAME.safetensors` per text to the run directory.

    It holds `index` [S], the windows' positions in the text, and `log_likelihood` [S, T-1] in nats. With several
    processes, each writes the windows that it scored to `scores_NAME_rank_R.safetensors`.
    """

    def __init__(self) -> None:
        super().__init__(write_interval="epoch")

    def write_on_epoch_end(
        self, trainer: Trainer, module: QESC, predictions: Sequence[Any], batch_indices: Sequence[Any]
    ) -> None:
        data = trainer.datamodule
        names = [Path(data.predict).stem] if data.predict is not None else data.heldout_names
        by_text = [predictions] if len(names) == 1 else predictions
        suffix = f"_rank_{trainer.global_rank}" if trainer.world_size > 1 else ""
        for name, batches in zip(names, by_text, strict=True):
            scores = {field: torch.cat([batch[field] for batch in batches]) for field in ("index", "log_likelihood")}
            path = Path(trainer.default_root_dir) / f"scores_{name}{suffix}.safetensors"
            write_tensors(path, scores, {"text": name})
            print(f"{name:12s} {scores['log_likelihood'].mean():8.4f} nats per token, written to {path}")
