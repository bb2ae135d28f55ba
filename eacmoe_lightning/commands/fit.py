"""`fit`, `validate`, `test` and `predict`: the Lightning command line and the defaults of a run directory."""

from __future__ import annotations

import os
import sys
import warnings
from typing import Any

import lightning
from jsonargparse import Namespace
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from eacmoe_lightning import callbacks
from eacmoe_lightning.commands.configs import NamedConfig
from eacmoe_lightning.commands.launchers import follow_launcher
from eacmoe_lightning.commands.trainer import DEFAULTS, CalibrationTrainer, default_callbacks
from eacmoe_lightning.compressed.opening import open_model
from eacmoe_lightning.job.checkpoint_io import AtomicCheckpointIO
from eacmoe_lightning.job.data import TextWindows
from eacmoe_lightning.job.qesc import QESC
from eacmoe_lightning.job.trainer_options import refuse_directory, refuse_missing_accelerator
from eacmoe_lightning.models.originals import stored_name
from eacmoe_lightning.text.sources import stored_sources


class SaveRunConfig(SaveConfigCallback):
    """The config of `fit` beside its TensorBoard logs; evaluations do not replace it."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Nothing yet: the module may still refuse the run directory."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().setup(trainer, pl_module, "fit")


class CommandLine(LightningCLI):
    """Lightning's command line with the defaults of a run directory."""

    def __init__(self, args: ArgsType = None) -> None:
        self._words = sys.argv[1:] if args is None else args
        super().__init__(
            QESC,
            TextWindows,
            trainer_class=CalibrationTrainer,
            save_config_callback=SaveRunConfig,
            save_config_kwargs={"overwrite": True},
            trainer_defaults=dict(DEFAULTS),
            parser_kwargs={"allow_abbrev": False},
            auto_configure_optimizers=False,
            seed_everything_default=False,
            args=args,
        )

    def subcommands(self) -> dict[str, set[str]]:
        """Lightning's commands; only the one that the first word names, since building all four parsers takes long."""
        every = LightningCLI.subcommands()
        named = next(iter(self._words), None) if isinstance(self._words, list) else None
        return {named: every[named]} if named in every else every

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """Lightning's, with a `--config` that also takes names."""
        kwargs.setdefault("dump_header", [f"lightning.pytorch=={lightning.__version__}"])
        parser = LightningArgumentParser(**kwargs)
        parser.add_argument("-c", "--config", action=NamedConfig)
        return parser

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.link_arguments("model.name_or_path", "data.tokenizer")
        parser.link_arguments("model.trust_remote_code", "data.trust_remote_code")
        parser.add_lightning_class_args(ModelCheckpoint, "checkpoint")
        parser.add_lightning_class_args(callbacks.ExpertPruning, "pruning")
        parser.link_arguments("pruning", "model.pruning", lambda callback: callback.rule, apply_on="instantiate")
        parser.set_defaults(  # one file, replaced by the next: save_top_k=0, save_last=True writes none
            {
                "checkpoint.filename": "last",
                "checkpoint.enable_version_counter": False,
                "checkpoint.save_on_train_epoch_end": True,
            }
        )

    def _parse_ckpt_path(self) -> None:
        """Lightning's, which opens a given file before anything of ours can say what is wrong with it."""
        try:
            super()._parse_ckpt_path()
        except Exception as error:  # whatever unpickling a file of any kind raises
            path = self.config[self.config.subcommand].get("ckpt_path")
            raise ValueError(
                f"{path} (--ckpt_path) is not a checkpoint ({type(error).__name__}: {error}): pass auto, last, or a "
                ".ckpt file of this run"
            ) from error

    def _set_seed(self) -> None:
        """Lightning's, with the option in its errors."""
        try:
            super()._set_seed()
        except ValueError as error:
            seed = self.config[self.subcommand]["seed_everything"]
            raise ValueError(f"--seed_everything {seed}: {error}") from error

    def before_instantiate_classes(self) -> None:
        config = self.config[self.subcommand]
        trainer = config["trainer"]
        trainer["default_root_dir"] = str(trainer.get("default_root_dir") or "runs/default")
        refuse_directory(trainer["default_root_dir"])
        if self.subcommand != "fit" and config["model"]["name_or_path"] == "bundled":
            _take_tokenizer_of_subject(config)
        _store_absolute_paths(config)
        if config["checkpoint"].get("dirpath") is None:
            config["checkpoint"]["dirpath"] = os.path.join(trainer["default_root_dir"], "checkpoints")
        if trainer.get("logger") in (None, True):
            trainer["logger"] = Namespace(
                class_path=f"{TensorBoardLogger.__module__}.{TensorBoardLogger.__name__}",
                init_args=Namespace(save_dir=trainer["default_root_dir"], name="", version="tensorboard"),
            )
        follow_launcher(trainer)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        refuse_missing_accelerator(self.config[self.subcommand]["trainer"]["accelerator"])
        has_progress_bar = self.config[self.subcommand]["trainer"].get("enable_progress_bar") is not False
        given = self.config_init[self.subcommand]["trainer"].get("callbacks") or []
        given = given if isinstance(given, list) else [given]
        self.trainer_defaults["callbacks"] = default_callbacks(has_progress_bar, given)
        if self.config_init[self.subcommand]["trainer"].get("plugins") is None:
            kwargs["plugins"] = [AtomicCheckpointIO()]
        try:
            return super().instantiate_trainer(**kwargs)
        except (TypeError, ValueError, ImportError, MisconfigurationException) as error:
            raise ValueError(f"Lightning's Trainer does not take these options (--trainer.*): {error}") from error


def _take_tokenizer_of_subject(config: Namespace) -> None:
    """Without `--model.name_or_path`, an evaluation tokenizes with the tokenizer beside the model that it evaluates."""
    evaluate = config["model"].get("evaluate")
    try:
        subject = open_model(evaluate or config["trainer"]["default_root_dir"], option="--model.evaluate")
    except (FileNotFoundError, ValueError):
        if evaluate and os.path.isdir(evaluate):
            raise
        return  # `setup` says what is wrong
    config["data"]["tokenizer"] = str(subject.directory)


def _store_absolute_paths(config: Namespace) -> None:
    """Makes local paths absolute, so that the config that the run keeps is good in every working directory."""
    trainer, model, data = config["trainer"], config["model"], config["data"]
    trainer["default_root_dir"] = os.path.abspath(os.path.expanduser(trainer["default_root_dir"]))
    for section, option in ((model, "name_or_path"), (model, "evaluate"), (data, "tokenizer")):
        if section.get(option) is not None:
            section[option] = stored_name(section[option])
    if data.get("chat_template") is not None:
        data["chat_template"] = os.path.abspath(os.path.expanduser(data["chat_template"]))
    if model.get("sensitivity") is not None:
        model["sensitivity"] = os.path.abspath(os.path.expanduser(model["sensitivity"]))
    for option in ("calibration", "heldout", "predict"):
        data[option] = stored_sources(data.get(option))


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
    return parsed.model, parsed.datamodule, parsed.config["fit"]["trainer"]["default_root_dir"]
