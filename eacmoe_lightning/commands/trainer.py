"""The trainer of `fit`: what Lightning must be told to run a job of blocks, for the command line and for Python."""

from __future__ import annotations

import logging
import os
import signal
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, ProgressBar
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.trainer.call import _call_callback_hooks, _call_lightning_module_hook
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_only

from eacmoe_lightning import callbacks
from eacmoe_lightning.commands.own_options import changed
from eacmoe_lightning.commands.tasks import rules_of, run_tasks
from eacmoe_lightning.evaluation.harness import Asking
from eacmoe_lightning.job.checkpoint_io import AtomicCheckpointIO
from eacmoe_lightning.job.trainer_options import NEVER, refuse_missing_accelerator
from eacmoe_lightning.run.directory import RunDirectory
from eacmoe_lightning.run.stopping import Stopping
from eacmoe_lightning.skipping.selection import Survivors

log = logging.getLogger(__name__)
RESTARTS = ("SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT")  # how often the job was started again
DEFAULTS = {
    "max_epochs": -1,  # the module knows how many epochs its blocks take
    "num_sanity_val_steps": 0,
    "check_val_every_n_epoch": NEVER,
    "log_every_n_steps": 1,
    "enable_model_summary": False,
}


class CalibrationTrainer(Trainer):
    """Lightning's Trainer, which knows whether `fit` continues a run and ends at once on SIGTERM, SIGINT and SIGHUP."""

    resumes = False

    def fit(self, *args: Any, ckpt_path: Any = None, **kwargs: Any) -> None:
        """Lightning's `fit` with one more value of `ckpt_path`.

        Args:
            ckpt_path: `auto` continues the run in the run directory and starts one where there is none; `last`
                continues; None starts. A job that SLURM has requeued or torchrun restarted takes None for `auto`.
        """
        if ckpt_path == "auto" or (ckpt_path is None and any(int(os.environ.get(name) or 0) for name in RESTARTS)):
            ckpt_path = "last" if RunDirectory(self.default_root_dir).manifest.exists() else None
        self.resumes = ckpt_path is not None
        with warnings.catch_warnings():  # a run that was killed before its first checkpoint starts from its beginning
            warnings.filterwarnings("ignore", ".*there is no last checkpoint available")
            super().fit(*args, ckpt_path=ckpt_path, **kwargs)

    def validate(self, *args: Any, ckpt_path: Any = None, **kwargs: Any) -> Any:
        return super().validate(*args, ckpt_path=_no_checkpoint("validate", ckpt_path), **kwargs)

    def test(
        self,
        model: Any = None,
        *args: Any,
        ckpt_path: Any = None,
        tasks: list[str] | str | None = None,
        include_path: str | None = None,
        num_fewshot: int | None = None,
        limit: float | None = None,
        task_batch_size: int = 8,
        apply_chat_template: bool = False,
        confirm_run_unsafe_code: bool = False,
        pesf: list[float] | float | None = None,
        survivors: Survivors = "keep",
        rescue: float | None = None,
        overwrite: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Lightning's `test`, or tasks of lm-eval-harness.

        Args:
            ckpt_path: None; an evaluation needs no checkpoint.
            tasks: Names of lm-eval's tasks, groups and tags, as `arc_easy,piqa` or a list: the original and the model
                answer them instead of being evaluated on held-out text. The package has `bundled` (needs no hub),
                `zero_shot` and `generated`.
            include_path: A folder with further tasks as lm-eval's YAML files.
            num_fewshot: Examples before each question; null takes what the task says.
            limit: Only so many questions of each task, or this share of them if below 1.
            task_batch_size: Sequences per batch.
            apply_chat_template: Whether prompts go through the tokenizer's chat template.
            confirm_run_unsafe_code: Whether code that the models write may run (HumanEval).
            pesf: One or more values of PESF's alpha; the model answers once for each, and 0 skips no expert. null takes
                the rule that the model is stored with.
            survivors: PESF's treatment of the other experts of a token when one is skipped.
            rescue: A share in [0, 1]: PESF runs a rare expert for a token that gives it at least this share of the
                token's largest weight. null rescues none, as in the paper.
            overwrite: Whether results of other options are replaced; otherwise they are refused.
        """
        ckpt_path = _no_checkpoint("test", ckpt_path)
        if tasks is None:
            if given := changed(
                CalibrationTrainer.test, include_path=include_path, num_fewshot=num_fewshot, limit=limit,
                task_batch_size=task_batch_size, apply_chat_template=apply_chat_template,
                confirm_run_unsafe_code=confirm_run_unsafe_code, pesf=pesf, survivors=survivors, rescue=rescue,
                overwrite=overwrite,
            ):  # fmt: skip
                raise ValueError(
                    f"--{given} needs --tasks, and has no effect on held-out text: pass --tasks too, or leave it out"
                )
            return super().test(model, *args, ckpt_path=ckpt_path, **kwargs)
        asking = Asking(num_fewshot, limit, apply_chat_template, confirm_run_unsafe_code)
        rules = rules_of(pesf, survivors, rescue)
        if self.world_size > 1:
            raise ValueError(f"--tasks runs in one process, not in {self.world_size}: pass --trainer.devices 1")
        run, device = RunDirectory(self.default_root_dir), self.strategy.root_device
        subject, original = model.find_models(run)
        return run_tasks(
            run.path, subject, original, tasks, asking, include_path, rules, task_batch_size, overwrite, device
        )

    def predict(self, *args: Any, ckpt_path: Any = None, **kwargs: Any) -> Any:
        return super().predict(*args, ckpt_path=_no_checkpoint("predict", ckpt_path), **kwargs)

    def save_checkpoint(self, filepath: Any, *args: Any, **kwargs: Any) -> None:
        """Lightning's, without the checkpoint that its handler of SLURM's signal writes before it requeues the job.

        That one may be taken in the middle of a step. The requeued job continues from the last whole one.
        """
        if not Path(filepath).name.startswith("hpc_ckpt_"):
            super().save_checkpoint(filepath, *args, **kwargs)

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        with Stopping(self._farewell, self._pass_on) as self._stopping, self._requeueing():
            try:
                return super()._run(*args, **kwargs)
            finally:
                self.lightning_module.free_run()

    @contextmanager
    def _requeueing(self) -> Iterator[None]:
        """Sets Lightning's handler of the signal on which it requeues a SLURM job.

        Lightning sets it once the model is set up, which may take hours. Until then the signal would end the job for
        good.
        """
        connector, environment = self._signal_connector, self._accelerator_connector.cluster_environment
        if not (isinstance(environment, SLURMEnvironment) and environment.auto_requeue):
            yield
            return
        signum = environment.requeue_signal
        before = signal.getsignal(signum)
        if not connector._has_already_handler(signum):
            connector._register_signal(signum, connector._slurm_sigusr_handler_fn)
        try:
            yield
        finally:
            connector._register_signal(signum, before)

    def _run_stage(self) -> Any:
        """Lightning leaves its loop at once if a resumed run has no epoch left; the hooks that end a run still run."""
        # Lightning's handler waits for the end of the batch, and broadcasts to processes that may wait for another call
        self._stopping.install()
        progress = self.fit_loop.epoch_progress.current
        is_after_last_epoch = self.training and progress.processed >= self.fit_loop.max_epochs
        results = super()._run_stage()
        if is_after_last_epoch:
            progress.completed = progress.processed
            for hook in ("on_train_start", "on_train_end"):
                _call_callback_hooks(self, hook)
                _call_lightning_module_hook(self, hook)
        return results

    def _farewell(self) -> str | None:
        if rank_zero_only.rank != 0:
            return None
        is_fit = self.state.fn == TrainerFn.FITTING
        return ": the same command with --ckpt_path auto goes on, and all finished work is kept" if is_fit else ""

    def _pass_on(self, signum: int) -> None:
        self._signal_connector.received_sigterm = True  # Lightning's loops end as well if somebody swallows `Stopped`
        if self.strategy.launcher is not None:
            self.strategy.launcher.kill(signum)


def _no_checkpoint(command: str, ckpt_path: Any) -> None:
    """Raises ValueError for the checkpoint of an evaluation; `auto`, which the config of a run may hold, is none."""
    if ckpt_path not in (None, "auto"):
        raise ValueError(
            f"{command} has no use for --ckpt_path {ckpt_path}: it evaluates the finished model of the run directory "
            "(--trainer.default_root_dir) or another (--model.evaluate), never a checkpoint. Leave the option out, or "
            "pass --ckpt_path null where a config sets it"
        )


def default_callbacks(progress_bar: bool = True, given: Iterable[Callback] = ()) -> list[Callback]:
    """The callbacks of `fit`, in the order in which they act at its end; a progress bar unless one is `given`."""
    chosen = [
        callbacks.LayerwiseQuantization(),
        callbacks.ExpertFrequency(),
        callbacks.CompressedModel(),
        callbacks.RoutingReport(),
        callbacks.PhaseCost(),
        callbacks.BoardLayout(),
        callbacks.TokenScores(),
    ]
    shows = progress_bar and not any(isinstance(callback, ProgressBar) for callback in given)
    return [*chosen, callbacks.BlockProgress()] if shows else chosen


def calibration_trainer(
    run: str | Path, extra_callbacks: Sequence[Callback] = (), progress_bar: bool = True, **options: Any
) -> CalibrationTrainer:
    """A trainer for `QESC` as the command line builds it: logs, checkpoints and results go to the run directory.

    Args:
        run: the run directory.
        extra_callbacks: after those of `fit`; a progress bar among them takes the place of `fit`'s.
        progress_bar: whether the terminal shows one.
        **options: of Lightning's Trainer (accelerator, devices, precision, ...).

    Raises:
        ValueError: this machine has no such accelerator.
    """
    refuse_missing_accelerator(options.get("accelerator", "auto"))
    run = Path(run)
    checkpoint = ModelCheckpoint(
        run / "checkpoints", "last", save_on_train_epoch_end=True, enable_version_counter=False
    )
    defaults = {
        "logger": TensorBoardLogger(run, name="", version="tensorboard"),
        "plugins": [AtomicCheckpointIO()],
        "enable_progress_bar": progress_bar,
    }
    return CalibrationTrainer(
        default_root_dir=run,
        callbacks=[*default_callbacks(progress_bar, extra_callbacks), *extra_callbacks, checkpoint],
        **DEFAULTS | defaults | options,
    )
