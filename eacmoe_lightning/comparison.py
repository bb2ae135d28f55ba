"""The evaluation half of the job: `validate`, `test` and `predict`, original beside compressed."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from eacmoe_lightning.evaluate import Evaluation, load_subject, run_batches
from eacmoe_lightning.report import evaluation_summary
from eacmoe_lightning.store import RunDirectory, write_json
from eacmoe_lightning.streaming import StreamedModel


class Comparison(LightningModule):
    """Compares what a run produced with its original, on held-out text.

    Args:
        name_or_path: the original.
        dtype: of both models.
        evaluate: a run directory, a compressed directory or an original model; None: the trainer's run directory.
        split_damage: whether `test` splits the damage into weights and selections.
    """

    def __init__(self, name_or_path: str, dtype: str, evaluate: str | None, split_damage: bool) -> None:
        super().__init__()
        self.name_or_path, self.dtype_name = name_or_path, dtype
        self.evaluate, self.split_damage = evaluate, split_damage
        self._outside: dict[str, Any] = {}  # models: not in the module tree, not in checkpoints

    @property
    def run(self) -> RunDirectory:
        return RunDirectory(self.trainer.default_root_dir)

    def setup(self, stage: str) -> None:
        if "subject" not in self._outside:
            found = load_subject(self.name_or_path, self.dtype_name, self.evaluate, self.run)
            device = self.trainer.strategy.root_device
            for name in ("original", "subject"):
                found[name] = StreamedModel(found[name], device) if found[name] is not None else None
            if self.split_damage and found["original"] is not None and found["subject"].is_pruned:
                raise ValueError(
                    "--model.split_damage forces the original's selections on the compressed model, and some of these "
                    "experts were removed from it: leave the option out"
                )
            self._outside |= found

    def _start_evaluation(self, split: bool) -> None:
        original, subject = self._outside["original"], self._outside["subject"]
        scratch = self.run.scratch(self.global_rank)
        self._outside["evaluation"] = Evaluation(original, subject, split, scratch)

    def on_validation_epoch_start(self) -> None:
        self._start_evaluation(split=False)

    def on_test_epoch_start(self) -> None:
        self._start_evaluation(split=self.split_damage)

    def _evaluation_step(self, batch: dict[str, Tensor], dataloader_idx: int, names: list[str]) -> None:
        """Only gathers: all batches of all texts go through the model together, a block at a time."""
        if len(batch["input_ids"]):
            self._outside["evaluation"].add(names[dataloader_idx], batch["input_ids"])

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        self._evaluation_step(batch, dataloader_idx, self.trainer.datamodule.heldout_names)

    def test_step(self, batch: dict[str, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        self._evaluation_step(batch, dataloader_idx, self.trainer.datamodule.heldout_names)

    def _finish_evaluation(self, stage: str) -> None:
        """Logs the result, prints it as a table and writes it to `<stage>.json` in the run directory."""
        result = self._outside["evaluation"].compute(self.trainer.datamodule.heldout_names)
        for text, values in result["perplexity"].items():
            self.log_dict({f"perplexity/{text}/{stream}": value for stream, value in values.items()})
        if shift := result["expert_shift"]:
            self.log_dict({f"expert_shift/{rate}": value for rate, value in shift["mean"].items()})
        if self.trainer.is_global_zero:
            write_json(self.run.path / f"{stage}.json", result | {"size_bytes": self._outside["size_bytes"]})
            print(evaluation_summary(result, self._outside["size_bytes"]))

    def on_validation_start(self) -> None:
        self.trainer.validate_loop.verbose = False  # Lightning's table repeats everything for every text

    def on_test_start(self) -> None:
        self.trainer.test_loop.verbose = False

    def on_validation_epoch_end(self) -> None:
        self._finish_evaluation("validate")

    def on_test_epoch_end(self) -> None:
        self._finish_evaluation("test")

    def on_predict_start(self) -> None:
        """Runs all windows of this process block by block; `predict_step` hands their scores out."""
        loaders = self.trainer.predict_dataloaders
        loaders = loaders if isinstance(loaders, list) else [loaders]
        dealt = {(n, j): batch["input_ids"] for n, loader in enumerate(loaders) for j, batch in enumerate(loader)}
        batches = {key: ids for key, ids in dealt.items() if len(ids)}
        nll = run_batches(None, self._outside["subject"], list(batches.values()))
        self._outside["nll"] = {key: streams["original"] for key, streams in zip(batches, nll, strict=True)}

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int, dataloader_idx: int = 0) -> dict[str, Tensor]:
        """Log-likelihoods in nats of each token but the first, [b, T-1], by global window index."""
        nothing = torch.empty(0, batch["input_ids"].shape[1] - 1)  # other processes had more windows
        return {
            "index": batch["index"],
            "log_likelihood": -self._outside["nll"].get((dataloader_idx, batch_idx), nothing),
        }
