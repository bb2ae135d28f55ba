"""The Lightning command line: subcommands, defaults of a run directory, launchers, and errors for people."""

from __future__ import annotations

import os
import sys
import traceback
import warnings
from typing import Any

import torch.distributed
from jsonargparse import Namespace
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.trainer.call import _call_callback_hooks, _call_lightning_module_hook

from eacmoe_lightning import analysis, callbacks, exports, planning, study
from eacmoe_lightning.checkpoint_io import AtomicCheckpointIO
from eacmoe_lightning.data import TextWindows
from eacmoe_lightning.pruning import command as pruning_command
from eacmoe_lightning.qesc import QESC
from eacmoe_lightning.store import StoreError

COMMANDS = {  # by their first word; these need no trainer
    "analyze": analysis.command.main,
    "export": exports.command.main,
    "plan": planning.command.main,
    "prune": pruning_command.main,
    "study": study.command.main,
}
NEVER = 10**9  # epochs between validations inside fit: nothing can be validated before the last block


class CalibrationTrainer(Trainer):
    """Lightning's Trainer, remembering whether `fit` was asked to continue a run."""

    resumes = False

    def fit(self, *args: Any, ckpt_path: Any = None, **kwargs: Any) -> None:
        self.resumes = ckpt_path is not None
        super().fit(*args, ckpt_path=ckpt_path, **kwargs)

    def _run_stage(self) -> Any:
        """Lightning leaves its loop at once when a resumed run has no epoch left: what ends a run is still owed."""
        progress = self.fit_loop.epoch_progress.current
        is_behind_last_epoch = self.training and progress.processed >= self.fit_loop.max_epochs
        results = super()._run_stage()
        if is_behind_last_epoch:
            progress.completed = progress.processed
            for hook in ("on_train_start", "on_train_end"):
                _call_callback_hooks(self, hook)
                _call_lightning_module_hook(self, hook)
        return results


class SaveRunConfig(SaveConfigCallback):
    """The config of `fit` beside its TensorBoard logs; evaluations do not replace it."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Nothing yet: the module may still refuse the run directory."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().setup(trainer, pl_module, "fit")


class CommandLine(LightningCLI):
    def __init__(self, args: ArgsType = None) -> None:
        super().__init__(
            QESC,
            TextWindows,
            trainer_class=CalibrationTrainer,
            save_config_callback=SaveRunConfig,
            save_config_kwargs={"overwrite": True},
            trainer_defaults={
                "max_epochs": -1,  # the module knows how many epochs its blocks take
                "num_sanity_val_steps": 0,
                "check_val_every_n_epoch": NEVER,
                "log_every_n_steps": 1,
                "enable_model_summary": False,
            },
            parser_kwargs={"allow_abbrev": False},
            auto_configure_optimizers=False,
            seed_everything_default=False,
            args=args,
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.link_arguments("model.name_or_path", "data.tokenizer")
        parser.add_lightning_class_args(ModelCheckpoint, "checkpoint")
        parser.add_lightning_class_args(callbacks.ExpertPruning, "pruning")
        parser.set_defaults(  # one file, replaced by the next: save_top_k=0, save_last=True writes none
            {
                "checkpoint.filename": "last",
                "checkpoint.enable_version_counter": False,
                "checkpoint.save_on_train_epoch_end": True,
            }
        )

    def before_instantiate_classes(self) -> None:
        config = self.config[self.subcommand]
        trainer = config["trainer"]
        trainer["default_root_dir"] = str(trainer.get("default_root_dir") or "runs/default")
        if config["checkpoint"].get("dirpath") is None:
            config["checkpoint"]["dirpath"] = os.path.join(trainer["default_root_dir"], "checkpoints")
        if trainer.get("logger") in (None, True):
            trainer["logger"] = Namespace(
                class_path=f"{TensorBoardLogger.__module__}.{TensorBoardLogger.__name__}",
                init_args=Namespace(save_dir=trainer["default_root_dir"], name="", version="tensorboard"),
            )
        follow_launcher(trainer)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        own = [
            callbacks.LayerwiseQuantization(),
            callbacks.ExpertFrequency(),
            callbacks.CompressedModel(),
            callbacks.RoutingReport(),
            callbacks.PhaseCost(),
            callbacks.TokenScores(),
        ]
        if self.config[self.subcommand]["trainer"].get("enable_progress_bar") is not False:
            own.append(callbacks.BlockProgress())
        self.trainer_defaults["callbacks"] = own
        if self.config_init[self.subcommand]["trainer"].get("plugins") is None:
            kwargs["plugins"] = [AtomicCheckpointIO()]
        return super().instantiate_trainer(**kwargs)


class ParsedOnly(CommandLine):
    """The options of `fit` as a module and a data module, without a trainer and without a run."""

    def instantiate_trainer(self, **kwargs: Any) -> None:
        return None

    def _run_subcommand(self, subcommand: str) -> None: ...


def parse_fit(words: list[str]) -> tuple[QESC, TextWindows, str]:
    """The module, the data module and the run directory that `fit` would have with these options."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "LightningCLI's args")  # meant for scripts that pass both
        parsed = ParsedOnly(["fit", *words])
    parsed.model.pruning = parsed.config_init["fit"]["pruning"].rule
    return parsed.model, parsed.datamodule, parsed.config["fit"]["trainer"]["default_root_dir"]


def follow_launcher(trainer: Namespace) -> None:
    """Takes over devices, nodes, accelerator, strategy and precision from torchrun or `fabric run`.

    LightningCLI ignores what these launchers set, and every process would silently run the whole job by itself.

    Raises:
        ValueError: the config or command line says something else.
    """
    if not torch.distributed.is_torchelastic_launched():
        return
    local, world = int(os.environ["LOCAL_WORLD_SIZE"]), int(os.environ["WORLD_SIZE"])
    if (
        world > 1
        and trainer.get("strategy") in (None, "auto")
        and os.environ.get("LT_STRATEGY") in (None, "auto", "ddp")
    ):
        _settle(trainer, "strategy", "ddp_find_unused_parameters_true", "auto")  # each block trains one router only
    _settle(trainer, "devices", local, "auto")
    _settle(trainer, "num_nodes", world // local, 1)
    for option, default in (("accelerator", "auto"), ("strategy", "auto"), ("precision", None)):
        value = os.environ.get(f"LT_{option.upper()}")
        if value is not None and not (option == "strategy" and value in ("auto", "ddp")):
            _settle(trainer, option, value, default)


def _settle(trainer: Namespace, option: str, value: Any, default: Any) -> None:
    said = trainer.get(option)
    if said not in (None, default) and str(said) != str(value):
        raise ValueError(f"the launcher says {option}={value}, --trainer.{option} says {said}: leave one of them out")
    trainer[option] = value


def main(args: ArgsType = None) -> None:
    """Runs the command line; errors of the user's making end in one message and exit code 1.

    With EACMOE_DEBUG=1 in the environment they come with their traceback.
    """
    words = sys.argv[1:] if args is None else args
    try:
        if words and words[0] in COMMANDS:
            COMMANDS[words[0]](words[1:])
        else:
            CommandLine(args)
    except (ValueError, FileNotFoundError, StoreError) as error:
        if os.environ.get("EACMOE_DEBUG") == "1":
            raise
        frame = traceback.extract_tb(error.__traceback__)[-1]
        print(
            f"error: {error}\n({frame.name} in {os.path.basename(frame.filename)}; EACMOE_DEBUG=1 shows more)",
            file=sys.stderr,
        )
        sys.exit(1)
