"""The data module: windows of calibration text and of held-out text."""

from __future__ import annotations

from functools import cached_property

import lightning as L
from torch import Tensor

from eacmoe_lightning.models.originals import UntrustedCode, load_tokenizer
from eacmoe_lightning.models.weight_files import DamagedFile
from eacmoe_lightning.text.batches import WindowLoader
from eacmoe_lightning.text.sources import name_sources, read_documents
from eacmoe_lightning.text.windows import token_windows


class TextWindows(L.LightningDataModule):
    """Calibration and held-out text as windows of tokens.

    A source names a text: `bundled:NAME`, a local file or directory, or a data set such as
    `wikitext/wikitext-2-raw-v1:train` (text/sources.py has the grammar).

    Args:
        calibration: Source of the calibration text.
        heldout: Sources of the held-out texts: one source, a list, or {name: source}. None takes every held-out text
            that is bundled with the package.
        predict: Source of the text that `predict` scores; None takes the held-out texts.
        num_windows: Number of calibration windows, drawn at random (128 in the EAC-MoE paper).
        window_length: Tokens per window (2048 in the paper).
        batch_size: Calibration windows per step, over all processes.
        num_heldout_windows: Number of windows from the start of each held-out text; None takes all.
        heldout_batch_size: Held-out windows per step and process.
        tokenizer: Name or path of the tokenizer; `bundled` is that of the bundled model.
        seed: Seed for the choice of the calibration windows and their order.
        trust_remote_code: Whether Python code beside the tokenizer may run; set by `--model.trust_remote_code`.

    Raises:
        ValueError, FileNotFoundError: in `setup`, naming the option: see `read_documents` and `token_windows`.
    """

    def __init__(
        self,
        calibration: str = "bundled:calibration",
        heldout: dict[str, str] | list[str] | str | None = None,
        predict: str | None = None,
        num_windows: int = 128,
        window_length: int = 2048,
        batch_size: int = 4,
        num_heldout_windows: int | None = None,
        heldout_batch_size: int = 8,
        tokenizer: str = "bundled",
        seed: int = 0,
        trust_remote_code: bool = False,
    ):
        super().__init__()
        for option, value in (
            ("batch_size", batch_size),
            ("heldout_batch_size", heldout_batch_size),
        ):
            if value < 1:
                raise ValueError(f"--data.{option}={value} must be at least 1")
        self.calibration = calibration
        self.heldout = name_sources(heldout)
        self.predict = predict
        self.num_windows = num_windows
        self.window_length = window_length
        self.batch_size = batch_size
        self.num_heldout_windows = num_heldout_windows
        self.heldout_batch_size = heldout_batch_size
        self.tokenizer = tokenizer
        self.seed = seed
        self.trust_remote_code = trust_remote_code

    @property
    def heldout_names(self) -> list[str]:
        """Names of the held-out texts, in the order of their data loaders."""
        return list(self.heldout)

    @cached_property
    def calibration_windows(self) -> Tensor:
        """Token ids [S, T] of the calibration text, the same on every rank."""
        return self._windows("calibration", self.calibration, "num_windows", self.num_windows, self.seed)

    @cached_property
    def heldout_windows(self) -> dict[str, Tensor]:
        """Token ids [S_i, T] of each held-out text, from its start."""
        limit = self.num_heldout_windows
        return {
            name: self._windows("heldout", source, "num_heldout_windows", limit)
            for name, source in self.heldout.items()
        }

    @cached_property
    def predict_windows(self) -> Tensor:
        """Token ids [S, T] of the text that `predict` names."""
        return self._windows("predict", self.predict, "num_heldout_windows", None)

    def setup(self, stage: str) -> None:
        """Reads the texts of the stage, so that a bad source is reported before any work starts."""
        if stage == "fit":
            _ = self.calibration_windows
        if stage == "predict" and self.predict is not None:
            _ = self.predict_windows
        else:
            _ = self.heldout_windows

    def train_dataloader(self) -> WindowLoader:
        return WindowLoader(
            self.calibration_windows,
            self.batch_size,
            shuffle=True,
            seed=self.seed,
            epoch=lambda: self.trainer.current_epoch if self.trainer else 0,
            **self._ranks(),
        )

    def val_dataloader(self) -> list[WindowLoader]:
        return [self._in_order(windows) for windows in self.heldout_windows.values()]

    def test_dataloader(self) -> list[WindowLoader]:
        return self.val_dataloader()

    def predict_dataloader(self) -> list[WindowLoader]:
        if self.predict is None:
            return self.val_dataloader()
        return [self._in_order(self.predict_windows)]

    def _in_order(self, windows: Tensor) -> WindowLoader:
        return WindowLoader(windows, self.heldout_batch_size, shuffle=False, **self._ranks())

    def _ranks(self) -> dict[str, int]:
        if self.trainer is None:
            return {"rank": 0, "world_size": 1}
        return {"rank": self.trainer.global_rank, "world_size": self.trainer.world_size}

    @cached_property
    def _tokenizer(self):
        try:
            return load_tokenizer(self.tokenizer, self.trust_remote_code)
        except (DamagedFile, UntrustedCode):
            raise
        except (OSError, ValueError) as error:
            raise FileNotFoundError(
                f"no tokenizer can be loaded from {self.tokenizer!r} (--data.tokenizer, by default "
                f"--model.name_or_path): pass `bundled` or a directory that holds a tokenizer. {error}"
            ) from error

    def _windows(self, option: str, source: str, number: str, num: int | None, seed: int | None = None) -> Tensor:
        """Windows [S, T] of one source; errors name the option that the source came from."""
        tokenizer = self._tokenizer
        try:
            return token_windows(
                read_documents(source),
                tokenizer,
                num,
                self.window_length,
                seed,
                source=source,
                option=f"--data.{number}",
            )
        except FileNotFoundError as error:
            raise FileNotFoundError(f"--data.{option}: {error}") from error
        except ValueError as error:
            raise ValueError(f"--data.{option}: {error}") from error
