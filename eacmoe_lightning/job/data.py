"""The data module: windows of calibration text and of held-out text."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any, get_args

import lightning as L
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from eacmoe_lightning.models.documents import most_telling
from eacmoe_lightning.models.moe import MoEModel
from eacmoe_lightning.models.tokenizer import tokenizer_of
from eacmoe_lightning.text.batches import ON_HOST, WindowLoader
from eacmoe_lightning.text.chat import read_template
from eacmoe_lightning.text.checks import check_length, check_tokens, warn_of_calibrated, warn_of_repeated
from eacmoe_lightning.text.documents import documents
from eacmoe_lightning.text.openings import Start
from eacmoe_lightning.text.sampled import SampledSource, sampled_source
from eacmoe_lightning.text.sources import check_source, is_unread_list, may_have_rows, name_sources
from eacmoe_lightning.text.windows import (
    SEEDS,
    Layout,
    Windows,
    cut_windows,
    digest,
    join_windows,
    split_windows,
)


class TextWindows(L.LightningDataModule):
    """Calibration and held-out text as windows of tokens.

    A source names a text: `bundled:NAME`, a local file or directory, or a data set such as
    `wikitext/wikitext-2-raw-v1:train` (text/sources.py has the grammar). `SOURCE#COLUMN` names a column of it.
    Calibration text may also be `self`: windows that the original writes itself (text/sampled.py).

    Args:
        calibration: Source of the calibration text; or several, as a list or {name: source}, each of which gives its
            share of the windows.
        heldout: Sources of the held-out texts: one source, a list, or {name: source}. None takes every held-out text
            that is bundled with the package; [] takes none, and the report of fit is then without an evaluation.
        predict: Source of the text that `predict` scores; None takes the held-out texts.
        num_windows: Number of calibration windows, drawn at random (128 in the EAC-MoE paper). Sources with a number of
            their own (`self:64`) add theirs.
        window_length: Tokens per window (2048 in the paper).
        batch_size: Calibration windows per step, over all processes.
        micro_batch_size: Windows that a step of the block or the joint stage runs through a block at a time, to save
            memory; the step's gradients are summed. None runs a process's whole batch at once, without running it
            forward twice.
        num_heldout_windows: Number of windows from the start of each held-out text; None takes all.
        heldout_batch_size: Held-out windows per step and process.
        noise_floor: Windows of each held-out text on which the evaluation measures the noise floor: the divergence of
            the original, with its activations rounded to bfloat16, from itself. 0 leaves it out.
        tokenizer: The model whose tokenizer is taken, by name or path; set by `--model.name_or_path`.
        seed: Seed for the choice of the calibration windows and their order.
        trust_remote_code: Whether Python code beside the tokenizer may run; set by `--model.trust_remote_code`.
        column: Column of the rows of a table that holds the text or the turns of a chat, or two as QUESTION,ANSWER.
            None takes `text`, or else `messages`, `conversations` or a pair such as `prompt` and `response`.
        chat_template: File with the Jinja template that renders conversations; None takes the tokenizer's.
        answers_only: Let only the tokens of the assistant's turns count in the calibration; the others are their
            context.
        shares: By name of a calibration text, its share of the windows, in any unit; None gives all the same.
        held_back: Share of the calibration windows that the block stage does not train on; they tell whether a pass
            was an improvement. It is at least one window; 0 holds none back.
        temperature: Temperature at which `self` is sampled.
        sample_start: What sampled windows begin with: random (a random token), bos (the token that begins a text) or
            chat (a short prompt in the chat template, for chat models).
        documents: How the documents of the calibration text lie in windows: joined end to end; separate, each
            beginning a window, the rest of which does not count; or packed, several in a window without attention
            between them, which not every model can (that is checked before a run starts).
        separate: Was replaced by `documents`.

    Raises:
        ValueError, FileNotFoundError: in `setup`, naming the option: see `documents` and `cut_windows`.
    """

    def __init__(
        self,
        calibration: dict[str, str] | list[str] | str = "bundled:calibration",
        heldout: dict[str, str] | list[str] | str | None = None,
        predict: str | None = None,
        num_windows: int = 128,
        window_length: int = 2048,
        batch_size: int = 4,
        micro_batch_size: int | None = None,
        num_heldout_windows: int | None = None,
        heldout_batch_size: int = 8,
        noise_floor: int = 4,
        tokenizer: str = "bundled",
        seed: int = 0,
        trust_remote_code: bool = False,
        column: str | None = None,
        chat_template: str | None = None,
        answers_only: bool = False,
        shares: dict[str, float] | None = None,
        held_back: float = 0.05,
        temperature: float = 1.0,
        sample_start: Start = "random",
        documents: Layout = "joined",
        separate: bool | None = None,
    ):
        super().__init__()
        if calibration is None:  # of held-out texts None means all that are bundled
            raise ValueError(
                "--data.calibration is null: pass one or more sources, or leave it out (bundled:calibration)"
            )
        if separate is not None:
            raise ValueError(
                f"--data.separate={separate} was replaced: pass --data.documents {'separate' if separate else 'joined'}"
            )
        self.calibration, self.calibration_texts = calibration, name_sources(calibration, "--data.calibration")
        self.heldout, self.predict = name_sources(heldout), predict
        self.num_windows, self.window_length = num_windows, window_length
        self.batch_size, self.micro_batch_size = batch_size, micro_batch_size
        self.num_heldout_windows, self.heldout_batch_size = num_heldout_windows, heldout_batch_size
        self.noise_floor = noise_floor
        self.tokenizer, self.trust_remote_code = tokenizer, trust_remote_code
        self.seed = seed
        self.column, self.chat_template, self.answers_only = column, chat_template, answers_only
        self.held_back, self.documents = held_back, documents
        self.temperature, self.sample_start = temperature, sample_start
        self._check_options()
        self.sampled_texts: dict[str, SampledSource] = {}
        for name, source in self.calibration_texts.items():
            if (sampled := sampled_source(source)) is not None:
                self.sampled_texts[name] = sampled
        self.share_by_text, self.windows_by_text = self._numbers(shares)
        self.holds_back: Callable[[int], bool] = lambda epoch: False  # which epochs leave them out; the module says it
        self._sampled: dict[str, Windows] = {}

    def _check_options(self) -> None:
        """Raises ValueError if an option is out of its range."""
        for option in ("batch_size", "micro_batch_size", "heldout_batch_size", "num_heldout_windows"):
            if (value := getattr(self, option)) is not None and value < 1:
                raise ValueError(f"--data.{option}={value} must be at least 1")
        if self.seed not in SEEDS:
            raise ValueError(f"--data.seed={self.seed} must be from -2^63 to 2^63 - 1")
        if self.window_length < 2:
            raise ValueError(
                f"--data.window_length={self.window_length} must be at least 2: a window's first token has no "
                "prediction"
            )
        if not 0 <= self.held_back < 1:
            raise ValueError(
                f"--data.held_back={self.held_back} is a share of the windows: pass at least 0 and less than 1"
            )
        if self.documents not in get_args(Layout):
            raise ValueError(f"--data.documents={self.documents} must be one of {', '.join(get_args(Layout))}")
        if self.sample_start not in get_args(Start):
            raise ValueError(f"--data.sample_start={self.sample_start!r} must be one of {', '.join(get_args(Start))}")
        if self.noise_floor < 0:
            raise ValueError(f"--data.noise_floor={self.noise_floor} is a number of windows: pass 0 or more")
        if not 0 < self.temperature < float("inf"):
            raise ValueError(f"--data.temperature={self.temperature} must be above 0")
        if self.predict is not None:
            if not isinstance(self.predict, str) or is_unread_list(self.predict):
                raise ValueError(
                    f"--data.predict={self.predict} must be one source, not several and not {{name: source}}; without "
                    "it the held-out texts (--data.heldout) are scored"
                )
            check_source(self.predict, "--data.predict")
        for option, sources in (("heldout", self.heldout.values()), ("predict", [self.predict or ""])):
            if written := next(filter(sampled_source, sources), None):
                raise ValueError(f"--data.{option}: {written} is written by the model: it only calibrates")
        texts = [*self.calibration_texts.values(), *self.heldout.values(), *([self.predict] if self.predict else [])]
        if self.column is not None and not any(map(may_have_rows, texts)):
            raise ValueError(
                f"--data.column={self.column} is a column of tables, and no text is one (--data.calibration, "
                "--data.heldout): leave it out"
            )
        if not self.calibration_texts:
            raise ValueError("--data.calibration is empty: pass one or more sources")

    @property
    def heldout_names(self) -> list[str]:
        """Names of the held-out texts, in the order of their data loaders."""
        return list(self.heldout)

    def _numbers(self, shares: dict[str, float] | None) -> tuple[dict[str, float], dict[str, int]]:
        """The share of each calibration text that has no number of its own, and the number of windows of each."""
        fixed = {name: source.num for name, source in self.sampled_texts.items() if source.num is not None}
        if both := fixed.keys() & (shares or {}):
            name = min(both)
            raise ValueError(
                f"{self.calibration_texts[name]} has its own number of windows: leave {name} out of --data.shares, or "
                "leave the number out"
            )
        sharing = [name for name in self.calibration_texts if name not in fixed]
        shared = split_windows(self.num_windows, sharing, shares) if sharing or shares else {}
        shares = shares or dict.fromkeys(sharing, 1.0)
        parts = {name: shares[name] / sum(shares.values()) for name in sharing}
        return parts, {name: (fixed | shared)[name] for name in self.calibration_texts}

    @property
    def num_calibration_windows(self) -> int:
        """Windows of all calibration texts together."""
        return sum(self.windows_by_text.values())

    @cached_property
    def _read(self) -> dict[str, Windows]:
        """The calibration texts that are read, not sampled."""
        return {
            name: self._windows(
                "calibration", source, "num_windows", self.windows_by_text[name], self.seed,
                answers_only=self.answers_only, layout=self.documents, share=self.share_by_text[name],
            )
            for name, source in self.calibration_texts.items() if name not in self.sampled_texts
        }  # fmt: skip

    @property
    def reads_text(self) -> bool:
        """Whether any calibration text is read; if not, the model writes all of it."""
        return bool(self._read)

    def put_sampled(self, name: str, windows: Windows) -> None:
        """Takes the windows of a sampled calibration text."""
        self._sampled[name] = windows
        warn_of_repeated(windows.input_ids)

    @cached_property
    def _calibration(self) -> Windows:
        texts = self._read | self._sampled
        if missing := [self.calibration_texts[name] for name in self.calibration_texts if name not in texts]:
            raise ValueError(
                f"--data.calibration: {missing[0]} is sampled by the model when `fit` begins, and not before"
            )
        return join_windows([texts[name] for name in self.calibration_texts])

    @property
    def calibration_sources(self) -> Tensor:
        """bool [C, S]: the calibration windows of each calibration text, in the order of `calibration_texts`."""
        numbers = torch.tensor(list(self.windows_by_text.values()))
        text = torch.arange(len(numbers)).repeat_interleave(numbers)
        return text == torch.arange(len(numbers)).unsqueeze(1)

    @property
    def calibration_windows(self) -> Tensor:
        """Token ids [S, T] of the calibration text, the same on every rank."""
        return self._calibration.input_ids

    @property
    def calibration_weights(self) -> Tensor | None:
        """bool [S, T]: the tokens of the calibration windows that count; None: all count."""
        return self._calibration.counts

    @property
    def calibration_positions(self) -> Tensor | None:
        """int64 [S, T]: positions of the tokens in their packed documents; None: no window holds several."""
        return self._calibration.position_ids

    @cached_property
    def held_back_windows(self) -> Tensor:
        """bool [S]: the calibration windows that are held back, drawn at random with `seed`."""
        number = len(self.calibration_windows)
        mask = torch.zeros(number, dtype=torch.bool)
        order = torch.randperm(number, generator=torch.Generator().manual_seed(self.seed))
        if self.held_back and number > 1:
            mask[order[: max(1, round(self.held_back * number))]] = True
        return mask

    @cached_property
    def calibration_digest(self) -> str:
        """SHA-256 over the token ids of the calibration windows, which of them count and where documents begin.

        The same text, tokenizer and options give the same digest, wherever the text lies.
        """
        parts = self.calibration_windows, self.calibration_weights, self.calibration_positions
        return digest(*(part for part in parts if part is not None))

    @property
    def fullness(self) -> dict[str, float]:
        """By calibration text, the share of its windows' tokens that are its own; the others fill the windows up.

        Empty if documents are joined, because they leave nothing to fill.
        """
        filling = {name: text.num_filling for name, text in self._read.items() if text.num_filling is not None}
        return {name: 1 - float(tokens.double().mean()) / self.window_length for name, tokens in filling.items()}

    def checked_window(self, num_ids: int) -> tuple[Tensor, Tensor | None]:
        """Token ids [1, T] and positions of the window that the model is checked on before a run starts.

        It is one of calibration text, or random tokens below `num_ids` if all of the text is sampled.
        """
        if not self._read:
            generator = torch.Generator().manual_seed(self.seed)
            return torch.randint(num_ids, (1, self.window_length), generator=generator), None
        read = join_windows(list(self._read.values()))
        if read.position_ids is None:
            return read.input_ids[:1], None
        row = most_telling(read.position_ids)
        return read.input_ids[row : row + 1], read.position_ids[row : row + 1]

    @cached_property
    def heldout_windows(self) -> dict[str, Tensor]:
        """Token ids [S_i, T] of each held-out text, from its start."""
        limit = self.num_heldout_windows
        return {
            name: self._windows("heldout", source, "num_heldout_windows", limit).input_ids
            for name, source in self.heldout.items()
        }

    @cached_property
    def predict_windows(self) -> Tensor:
        """Token ids [S, T] of the text that `predict` names."""
        return self._windows("predict", self.predict, "num_heldout_windows", None).input_ids

    def setup(self, stage: str) -> None:
        """Reads the texts of the stage, so that a bad source is reported before any work starts."""
        if stage != "fit" and not self.heldout and (stage != "predict" or self.predict is None):
            raise ValueError(f"--data.heldout is empty, so {stage} has no text: pass one or more sources")
        if stage == "fit":
            _ = self._read
        if stage == "predict" and self.predict is not None:
            _ = self.predict_windows
        else:
            _ = self.heldout_windows

    def check_model(self, moe: MoEModel, stage: str) -> None:
        """Checks that the windows of a stage fit the model, before any work starts.

        Warns of windows that are longer than what the model was trained on, and of held-out text that is in the
        calibration windows too.

        Raises:
            ValueError: a text holds a token that the model's embedding has no row for.
        """
        texts = {}
        if stage == "fit":
            texts = {("calibration", self.calibration_texts[name]): text.input_ids for name, text in self._read.items()}
        if stage == "predict" and self.predict is not None:
            texts["predict", self.predict] = self.predict_windows
        else:
            texts |= {("heldout", self.heldout[name]): windows for name, windows in self.heldout_windows.items()}
        if stage == "fit" and self._read:
            warn_of_calibrated(self.heldout_windows, (text.input_ids for text in self._read.values()))
        num_rows = len(moe.model.get_input_embeddings().weight)
        for (option, source), windows in texts.items():
            check_tokens(windows, num_rows, self.tokens, f"--data.{option}: {source}")
        if stage == "fit" and self._read:
            warn_of_repeated(join_windows(list(self._read.values())).input_ids)
        check_length(self.window_length, getattr(moe.config, "max_position_embeddings", None), "--data.window_length")

    def train_dataloader(self) -> WindowLoader:
        return WindowLoader(
            self.calibration_windows,
            self.batch_size,
            shuffle=True,
            seed=self.seed,
            weights=self.calibration_weights,
            position_ids=self.calibration_positions,
            epoch=lambda: self.trainer.current_epoch if self.trainer else 0,
            held_back=self._held_back,
            **self._ranks(),
        )

    def _held_back(self, epoch: int) -> Tensor | None:
        """The windows that an epoch leaves out, if it leaves out some."""
        return self.held_back_windows if self.holds_back(epoch) else None

    def val_dataloader(self) -> list[WindowLoader]:
        return [self._in_order(windows) for windows in self.heldout_windows.values()]

    def test_dataloader(self) -> list[WindowLoader]:
        return self.val_dataloader()

    def predict_dataloader(self) -> list[WindowLoader]:
        if self.predict is None:
            return self.val_dataloader()
        return [self._in_order(self.predict_windows)]

    def transfer_batch_to_device(self, batch: dict[str, Any], device: torch.device, dataloader_idx: int) -> Any:
        """Lightning's, for all but what the host reads of a batch."""
        moved = {name: value for name, value in batch.items() if name not in ON_HOST}
        return batch | super().transfer_batch_to_device(moved, device, dataloader_idx)

    def _in_order(self, windows: Tensor) -> WindowLoader:
        return WindowLoader(windows, self.heldout_batch_size, shuffle=False, **self._ranks())

    def _ranks(self) -> dict[str, int]:
        if self.trainer is None:
            return {"rank": 0, "world_size": 1}
        return {"rank": self.trainer.global_rank, "world_size": self.trainer.world_size}

    @cached_property
    def tokens(self) -> PreTrainedTokenizerBase:
        """The tokenizer."""
        tokenizer = tokenizer_of(self.tokenizer, trust_remote_code=self.trust_remote_code)
        if self.chat_template is not None:
            tokenizer.chat_template = read_template(Path(self.chat_template).expanduser(), "--data.chat_template")
        return tokenizer

    def _windows(
        self, option: str, source: str, number: str, num: int | None, seed: int | None = None, **options: Any
    ) -> Windows:
        """Windows of one source; errors name the option that the source came from."""
        tokenizer = self.tokens
        names = {"source": source, "option": f"--data.{number}"}
        try:
            read = documents(source, self.column, joins_lines=options.get("layout", "joined") == "joined")
            return cut_windows(read, tokenizer, num, self.window_length, seed, **names, **options)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"--data.{option}: {error}") from error
        except ValueError as error:
            raise ValueError(f"--data.{option}: {error}") from error
