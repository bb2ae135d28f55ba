"""Rows of a table, each a `fit` of its own; finished ones are read from their files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from eacmoe_lightning.commands.fit import CommandLine, parse_fit
from eacmoe_lightning.evaluation.evaluate import digests
from eacmoe_lightning.job.data import TextWindows
from eacmoe_lightning.job.qesc import QESC
from eacmoe_lightning.job.settings import options_of
from eacmoe_lightning.job.start import check_options
from eacmoe_lightning.planning.shapes import load_shapes
from eacmoe_lightning.run.directory import CONTENTS, refuse_other_settings
from eacmoe_lightning.run.files import read_json, write_json

OF_TEXTS = ("model.name_or_path", "model.trust_remote_code")  # options of the model that windows depend on
NOT_OF_TEXTS = ("model", "pruning", "trainer", "checkpoint")
OF_OPTIONS = ("model.", "data.", "pruning.")  # begin the options that `options_of` gives


def words_of(options: dict[str, Any]) -> list[str]:
    """Options of the command line from values by name."""
    return [f"--{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in options.items()]


class Rows:
    """Runs of `fit` that a table compares.

    Args:
        words: options of all rows as words of the command line; those of a row override them.
        split: whether `test --model.split_damage` follows each `fit`.
    """

    def __init__(self, words: Sequence[str] = (), split: bool = False) -> None:
        self.words, self.split = list(words), split
        self._texts: dict[str, TextWindows] = {}  # by the options that they depend on, since reading takes long

    def check(self, options: dict[str, Any]) -> TextWindows:
        """Refuses what `fit` would refuse, as far as the options, the texts and the model's config.json show it.

        Returns:
            The texts.

        Raises:
            ValueError, FileNotFoundError: as in `fit`.
        """
        module, data = self._parsed(options)
        moe = load_shapes(module.name_or_path, module.dtype_name, module.trust_remote_code)
        data.setup("fit")
        check_options(module, moe)
        return data

    def run(self, place: Path, name: str, options: dict[str, Any]) -> dict[str, Any]:
        """Runs `fit` in `place / name`; an interrupted row resumes.

        The result is kept in `<name>.json` beside the run directory, and taken from there the next time.

        Args:
            options: options of `fit`, without the run directory.

        Returns:
            `options`, `report` (the run's), and with `split` also `test`.

        Raises:
            ValueError: the finished row has other options, its model or its text has changed since, or `fit` refuses
                the options.
        """
        run = place / name
        if (row := self.finished(place, name, options)) is not None:
            return row
        words = [*self.words, *words_of(options), f"--trainer.default_root_dir={run}"]
        print(f"{name}: {run}", flush=True)
        CommandLine(["fit", *words, "--ckpt_path=auto"])
        row = {"options": self._settings(options), "report": read_json(run / "report.json")}
        if self.split:
            CommandLine(["test", *words, "--model.split_damage=true"])
            row["test"] = read_json(run / "test.json")
        write_json(_file(place, name), row)
        return row

    def finished(self, place: Path, name: str, options: dict[str, Any]) -> dict[str, Any] | None:
        """What `run` has made before; None if it has not.

        Raises:
            ValueError: it has other options, or its model or its text has changed since.
        """
        file = _file(place, name)
        if not file.exists():
            return None
        row = read_json(file)
        self._refuse_other(file, row, options)
        return row

    def _settings(self, options: dict[str, Any]) -> dict[str, Any]:
        """As the row's file holds them."""
        return json.loads(json.dumps(options | ({"words": self.words} if self.words else {})))

    def _parsed(self, options: dict[str, Any]) -> tuple[QESC, TextWindows]:
        module, data, _ = parse_fit([*self.words, *words_of(options)])
        key = {k: v for k, v in options.items() if k in OF_TEXTS or k.partition(".")[0] not in NOT_OF_TEXTS}
        return module, self._texts.setdefault(json.dumps(key, sort_keys=True), data)

    def _refuse_other(self, finished: Path, row: dict[str, Any], options: dict[str, Any]) -> None:
        """Raises ValueError if a finished row is of other options, of another model or of another text."""
        earlier, settings = row["options"], self._settings(options)
        if different := sorted(
            key for key in earlier.keys() | settings.keys() if earlier.get(key) != settings.get(key)
        ):
            key = different[0]
            raise ValueError(
                f"{finished} holds a row with other settings ({key} was {earlier.get(key)!r} and is now "
                f"{settings.get(key)!r}): pass another --output or the earlier settings"
            )
        module, data = self._parsed(options)  # with what a --config holds now
        now = json.loads(json.dumps(options_of(module, data))) | {"model.fingerprint": module.fingerprint}
        if not data.sampled_texts:
            now["data.calibration_digest"] = data.calibration_digest
        held = row["report"]["config"]
        unknown = {digest for digest in CONTENTS.values() if (digest in held) != (digest in now)}
        held, now = (
            {key: value for key, value in side.items() if key.startswith(OF_OPTIONS) and key not in unknown}
            for side in (held, now)
        )
        refuse_other_settings(f"{finished} holds a row", held, now, "another --output")
        judged, texts = row["report"].get("heldout_digest", {}), digests(data.heldout_windows)
        if changed := [text for text in judged if judged[text] != texts.get(text)]:
            raise ValueError(
                f"{finished} holds a row, but the held-out text {changed[0]} (--data.heldout) or its tokens have "
                "changed since. Nothing was changed: put back what it was judged on, or pass another --output"
            )


def _file(place: Path, name: str) -> Path:
    return place / f"{name}.json"
