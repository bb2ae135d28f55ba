"""The evaluation half of the LightningModule: `validate`, `test` and `predict`."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from eacmoe_lightning.compressed.format import read_config
from eacmoe_lightning.compressed.opening import OpenedModel, open_model
from eacmoe_lightning.evaluation.board import heldout_scalars
from eacmoe_lightning.evaluation.evaluate import Evaluation, digests
from eacmoe_lightning.evaluation.report_text import evaluation_summary
from eacmoe_lightning.evaluation.streams import run_batches
from eacmoe_lightning.job.trainer_options import refuse_unsuitable
from eacmoe_lightning.models.originals import stored_name
from eacmoe_lightning.models.streamed import StreamedModel
from eacmoe_lightning.run.directory import RunDirectory
from eacmoe_lightning.run.files import write_json
from eacmoe_lightning.run.ranks import Ranks
from eacmoe_lightning.text.checks import refuse_other_tokenizer


@dataclass
class Compared:
    """The models of an evaluation and its results so far, kept out of the module tree and of checkpoints.

    Attributes:
        subject: the model that is evaluated.
        original: the model it is compared with; None if the subject is itself an original.
        size_bytes: size on disk, keyed by `original` and `compressed`.
        reference: `name_or_path` and `fingerprint` of the original, as results store them; None if there is none.
        evaluation: gathers the batches of `validate` and `test`.
        nll: results of `predict`: [B, T-1] nats, keyed by data loader index and batch index.
    """

    subject: StreamedModel
    original: StreamedModel | None
    size_bytes: dict[str, int]
    reference: dict[str, str | None] | None = None
    evaluation: Evaluation | None = None
    nll: dict[tuple[int, int], Tensor] = field(default_factory=dict)


class Comparison(LightningModule):
    """Compares a compressed model with its original on held-out text.

    Args:
        name_or_path: the original model.
        dtype: dtype to load the models in.
        evaluate: the model to evaluate: a run directory, a compressed directory or an original model. None takes the
            trainer's run directory.
        split_damage: whether `test` splits the damage into that of the weights and that of the selections.
        trust_remote_code: whether Python code beside the original may run.
    """

    def __init__(
        self, name_or_path: str, dtype: str, evaluate: str | None, split_damage: bool, trust_remote_code: bool = False
    ) -> None:
        super().__init__()
        self.trust_remote_code = trust_remote_code
        self.name_or_path, self.dtype_name = stored_name(name_or_path), dtype
        self.evaluate, self.split_damage = evaluate, split_damage
        self.compared: Compared | None = None

    @property
    def run(self) -> RunDirectory:
        return RunDirectory(self.trainer.default_root_dir)

    @property
    def ranks(self) -> Ranks:
        return Ranks(self.global_rank, self.trainer.world_size, self.trainer.strategy.root_device)

    def setup(self, stage: str) -> None:
        refuse_unsuitable(self.trainer, stage)
        if self.compared is None:
            self.compared = self._open_models()
            self.trainer.datamodule.check_model(self.compared.subject, stage)
            if self.split_damage and self.compared.original is not None and self.compared.subject.is_pruned:
                raise ValueError(
                    "--model.split_damage forces the original's selections on the compressed model, but some of the "
                    "selected experts were removed from it: leave the option out"
                )

    def _open_models(self) -> Compared:
        device = self.trainer.strategy.root_device
        subject, original = self.find_models(self.run, self.trainer.is_global_zero)
        if original is None:
            return Compared(subject.streamed(device), None, {"original": subject.size_bytes})
        if (own := subject.tokenizer) is not None:
            refuse_other_tokenizer(self.trainer.datamodule.tokens, own, str(subject))
        size_bytes = {"original": original.size_bytes, "compressed": subject.size_bytes}
        made_from = read_config(subject.directory)["original"].get("fingerprint")  # `find_models` has compared them
        reference = {"name_or_path": stored_name(original.name), "fingerprint": made_from}
        return Compared(subject.streamed(device), original.streamed(device), size_bytes, reference)

    def find_models(self, run: RunDirectory, is_checked: bool = True) -> tuple[OpenedModel, OpenedModel | None]:
        """The model to evaluate, and the original to compare it with; None if it is itself one.

        Args:
            run: the run directory.
            is_checked: whether the original's weights are compared with those that the model was made from.

        Raises:
            FileNotFoundError: there is no model to evaluate, or its original is missing.
            ValueError: the model was made from other weights.
        """
        if self.evaluate is None and not (run.manifest.exists() or run.compressed.exists()):
            raise FileNotFoundError(
                f"there is no run in {run.path} (--trainer.default_root_dir): run `fit` first, or pass a run "
                "directory, a compressed directory or an original model with --model.evaluate"
            )
        subject = open_model(self.evaluate or run.path, self.dtype_name, "--model.evaluate", self.trust_remote_code)
        return subject, self._original_of(subject, is_checked) if subject.is_compressed else None

    def _original_of(self, subject: OpenedModel, is_checked: bool) -> OpenedModel:
        """The original named by `--model.name_or_path`, or else by the subject's config, in the subject's dtype.

        Raises:
            FileNotFoundError: there is no such model.
            ValueError: the subject was made from other weights.
        """
        name = subject.original if self.name_or_path == "bundled" else self.name_or_path
        dtype = str(subject.weights.dtype).rpartition(".")[2]
        original = open_model(name, dtype, "--model.name_or_path", self.trust_remote_code)
        if is_checked:
            subject.refuse_other_original(original)
        return original

    def _start_evaluation(self, split: bool) -> None:
        scratch = self.run.scratch(self.global_rank)
        floor = self.trainer.datamodule.noise_floor
        self.compared.evaluation = Evaluation(
            self.compared.original, self.compared.subject, split, scratch, self.ranks, floor
        )

    def on_validation_epoch_start(self) -> None:
        self._start_evaluation(split=False)

    def on_test_epoch_start(self) -> None:
        self._start_evaluation(split=self.split_damage)

    def _evaluation_step(self, batch: dict[str, Tensor], dataloader_idx: int, names: list[str]) -> None:
        """Only gathers: at the end all batches of all texts run through each block together."""
        if len(batch["input_ids"]):
            self.compared.evaluation.add(names[dataloader_idx], batch["input_ids"], int(batch["index"][0]))

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        self._evaluation_step(batch, dataloader_idx, self.trainer.datamodule.heldout_names)

    def test_step(self, batch: dict[str, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        self._evaluation_step(batch, dataloader_idx, self.trainer.datamodule.heldout_names)

    def _finish_evaluation(self, stage: str) -> None:
        """Logs the result, prints it as a table and writes it to `<stage>.json` in the run directory."""
        result = self.compared.evaluation.compute(self.trainer.datamodule.heldout_names)
        # `step` is the points' place in TensorBoard; without it Lightning adds its epoch to that of `fit`
        self.log_dict(heldout_scalars(result, stage) | {"step": 0.0}, sync_dist=True)
        if self.trainer.is_global_zero:
            about = {"size_bytes": self.compared.size_bytes, "original": self.compared.reference}
            about["heldout_digest"] = digests(self.trainer.datamodule.heldout_windows)
            about["evaluate"] = None if self.evaluate is None else stored_name(self.evaluate)
            write_json(self.run.path / f"{stage}.json", result | about)
            print(evaluation_summary(result, self.compared.size_bytes))

    def on_validation_start(self) -> None:
        self.trainer.validate_loop.verbose = False  # Lightning's table repeats every value for every text

    def on_test_start(self) -> None:
        self.trainer.test_loop.verbose = False

    def on_validation_epoch_end(self) -> None:
        self._finish_evaluation("validate")

    def on_test_epoch_end(self) -> None:
        self._finish_evaluation("test")

    def on_predict_start(self) -> None:
        """Scores all windows of this process, block by block; `predict_step` returns the scores."""
        loaders = self.trainer.predict_dataloaders
        loaders = loaders if isinstance(loaders, list) else [loaders]
        all_batches = {(n, j): batch["input_ids"] for n, loader in enumerate(loaders) for j, batch in enumerate(loader)}
        batches = {key: ids for key, ids in all_batches.items() if len(ids)}
        nll = run_batches(None, self.compared.subject, list(batches.values()))
        self.compared.nll = {key: streams["original"] for key, streams in zip(batches, nll, strict=True)}

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int, dataloader_idx: int = 0) -> dict[str, Tensor]:
        """Log-likelihoods [B, T-1] in nats of every token but the first, with the windows' global indices."""
        no_windows = torch.empty(0, batch["input_ids"].shape[1] - 1)  # other processes have one batch more
        return {
            "index": batch["index"],
            "log_likelihood": -self.compared.nll.get((dataloader_idx, batch_idx), no_windows),
        }
