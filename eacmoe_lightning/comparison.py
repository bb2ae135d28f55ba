"""The evaluation half of the job: `validate`, `test` and `predict`, original beside compressed."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule
from torch import Tensor

from eacmoe_lightning.evaluate import Evaluation, load_subject, run_streams, token_log_likelihoods
from eacmoe_lightning.report import evaluation_summary
from eacmoe_lightning.store import RunDirectory, write_json


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
            self._outside |= load_subject(self.name_or_path, self.dtype_name, self.evaluate, self.run)
            for model in (self._outside["original"], self._outside["subject"]):
                if model is not None:
                    model.model.to(self.trainer.strategy.root_device)

    def _start_evaluation(self, split: bool) -> None:
        original, subject = self._outside["original"], self._outside["subject"]
        self._outside["evaluation"] = Evaluation(original, subject, split)

    def on_validation_epoch_start(self) -> None:
        self._start_evaluation(split=False)

    def on_test_epoch_start(self) -> None:
        self._start_evaluation(split=self.split_damage)

    def _evaluation_step(self, batch: dict[str, Tensor], dataloader_idx: int, names: list[str]) -> None:
        if len(batch["input_ids"]):
            evaluation: Evaluation = self._outside["evaluation"]
            streams = run_streams(evaluation.original, evaluation.subject, batch["input_ids"], evaluation.split)
            evaluation.update(names[dataloader_idx], streams)

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

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int, dataloader_idx: int = 0) -> dict[str, Tensor]:
        """Log-likelihoods in nats of each token but the first, [b, T-1], by global window index."""
        return {
            "index": batch["index"],
            "log_likelihood": token_log_likelihoods(self._outside["subject"], batch["input_ids"]),
        }
