"""The run directory: everything that a killed job needs to go on, each file written whole or not at all.

    run.json               what this run is (options and the original model's fingerprint)
    blocks/block_003.safetensors   the compressed block 3: codes, scales, zero points, router, statistics
    costs.jsonl            seconds, peak memory and disk traffic of each phase
    streams/rank_0_of_1/block_003.x, .x_hat   both hidden streams as block 3 receives them
    checkpoints/  tensorboard/  compressed/  report.json  report.md

A file is written beside its place, flushed to disk and renamed. Tensor files carry a digest of their content, so a
truncated or flipped one is named, not used.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from eacmoe_lightning.run.files import StoreError, write_json


def refuse_other_settings(holder: str, held: dict[str, Any], identity: dict[str, Any], remedy: str) -> None:
    """Raises ValueError where what `holder` holds was made with other settings; `remedy` is what to pass instead."""
    different = sorted(key for key in held.keys() | identity.keys() if held.get(key) != identity.get(key))
    if different:
        key, more = different[0], len(different) - 1
        raise ValueError(
            f"{holder} with other settings: {key} was {held.get(key)!r} and is now {identity.get(key)!r}"
            f"{f', and {more} more differ' if more else ''}. Nothing was changed: pass {remedy}"
        )


class RunDirectory:
    """Paths and files of one run.

    Args:
        path: `--trainer.default_root_dir`.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    @property
    def manifest(self) -> Path:
        return self.path / "run.json"

    @property
    def compressed(self) -> Path:
        return self.path / "compressed"

    @property
    def dense(self) -> Path:
        """Where nothing is quantized: the same as an ordinary model directory."""
        return self.path / "dense"

    def block(self, index: int) -> Path:
        return self.path / "blocks" / f"block_{index:03d}.safetensors"

    def streams(self, rank: int, world: int) -> Path:
        """The directory of one process's hidden states, files of `streaming.hidden`."""
        return self.path / "streams" / f"rank_{rank}_of_{world}"

    def scratch(self, rank: int) -> Path:
        """A directory for what an evaluation need not keep in memory; removed with other litter after a kill."""
        return self.path / f".evaluation_{rank}.partial"

    @property
    def costs(self) -> Path:
        return self.path / "costs.jsonl"

    def add_cost(self, block: int | None, phase: str, cost: dict[str, float]) -> None:
        """Appends a phase's cost (`memory.Watch.cost`): what was computed again after an interruption counts again."""
        row = {"block": block, "phase": phase, **cost}
        self.path.mkdir(parents=True, exist_ok=True)
        with open(self.costs, "ab+") as file:
            if file.tell():
                file.seek(-1, 2)
                if file.read(1) != b"\n":  # a kill cut the last line off
                    file.write(b"\n")
            file.write(json.dumps(row).encode() + b"\n")

    def read_costs(self) -> list[dict[str, Any]]:
        """All rows of `add_cost`; a last line cut off by a kill is left out."""
        rows = []
        for line in self.costs.read_text().splitlines() if self.costs.exists() else []:
            try:
                rows.append(json.loads(line))
            except ValueError:
                continue
        return rows

    def drop_streams(self) -> None:
        """Frees the disk once nothing is left to be computed."""
        shutil.rmtree(self.path / "streams", ignore_errors=True)

    def check(self, identity: dict[str, Any], resume: bool) -> None:
        """Raises where a run cannot start or go on here; writes nothing.

        Args:
            identity: what the result depends on, by option.
            resume: whether `--ckpt_path` was given.

        Raises:
            ValueError: the directory holds another run, or this one and `--ckpt_path` is missing, or none.
            StoreError: `run.json` cannot be read.
        """
        where = f"{self.path} (--trainer.default_root_dir)"
        if not self.manifest.exists():
            if resume:
                raise ValueError(f"there is no run to continue in {where}: leave out --ckpt_path to start one")
            known = ("checkpoints", "tensorboard", "config.yaml", "validate.json", "test.json", "scores_", ".")
            names = sorted(p.name for p in self.path.iterdir()) if self.path.exists() else []
            if strangers := [name for name in names if not name.startswith(known)]:
                raise ValueError(f"{where} is not empty and holds no run: {strangers[:3]}. Pass an empty directory")
            return
        try:
            held = json.loads(self.manifest.read_text())
        except ValueError as error:
            raise StoreError(
                f"{self.manifest} is corrupt ({error}); pass another --trainer.default_root_dir"
            ) from error
        identity = json.loads(json.dumps(identity))
        remedy = "another --trainer.default_root_dir, or the settings of that run"
        refuse_other_settings(f"{where} holds a run", held, identity, remedy)
        if not resume:
            raise ValueError(f"{where} already holds this run: add --ckpt_path last to continue it")

    def start(self, identity: dict[str, Any], resume: bool) -> None:
        """Claims the directory for a run, or checks that it holds this very run (see `check`)."""
        self.check(identity, resume)
        if not self.manifest.exists():
            write_json(self.manifest, identity)
        for litter in self.path.rglob(".*.partial"):  # of attempts that were killed
            shutil.rmtree(litter) if litter.is_dir() else litter.unlink(missing_ok=True)
