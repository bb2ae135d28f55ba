"""The run directory: everything that a killed job needs to continue. Each file is complete or absent.

    run.json               what this run is (options and the original model's fingerprint)
    head.safetensors       the quantized output head, if the run quantizes it
    blocks/block_003.safetensors   the compressed block 3: codes, scales, zero points, router, statistics
    sampled/text_0/windows.safetensors   windows that the original wrote, if `self` calibrates
    sensitivity/, allocation.json   what bits were chosen from, and which, if a size was given
    costs.jsonl            seconds, peak memory and disk traffic of each phase
    streams/rank_0_of_1/block_003.x, .x_hat   both hidden streams as block 3 receives them
    checkpoints/  tensorboard/  compressed/  report.json  report.md

A file is written under a temporary name, flushed to disk and renamed. Tensor files carry a checksum, so that a damaged
one is reported and never used.
"""

from __future__ import annotations

import glob
import json
import os
import shutil
import socket
from collections.abc import Collection
from pathlib import Path
from typing import Any

from eacmoe_lightning.run.files import StoreError, read_json, write_json
from eacmoe_lightning.run.lock import LOCK

# By the key of a path, the key of the digest of what it leads to. The content decides whether it is the same run.
CONTENTS = {
    "model.name_or_path": "model.fingerprint",
    "data.calibration": "data.calibration_digest",
    "model": "fingerprint",  # from here on of `prune` and `study`
    "calibration": "calibration_digest",
    "texts": "texts_digest",
}
CHANGED = {  # what to say if another content is under the same path
    "model.name_or_path": "the weights or the config.json in {} (--model.name_or_path) have changed",
    "data.calibration": "the text of {} (--data.calibration) or its tokens (the model's tokenizer) have changed",
    "model": "the weights or the config.json of {} (--model) have changed",
    "calibration": "the text of {} (--calibration) or its tokens have changed",
    "texts": "one of the texts {} or its tokens have changed",
}


def refuse_other_settings(holder: str, held: dict[str, Any], identity: dict[str, Any], remedy: str) -> None:
    """Raises ValueError if the settings `held` by something existing differ from those of this run, `identity`.

    Args:
        holder: begins the message: what holds the settings, such as "out (--output) holds a model".
        remedy: completes "pass ..." in the message.
    """
    different = sorted(key for key in held.keys() | identity.keys() if held.get(key) != identity.get(key))
    contents = [path for path, content in CONTENTS.items() if content in different]
    different = [key for key in different if key not in CONTENTS and key not in CONTENTS.values()]
    if different:
        key, more = different[0], len(different) - 1
        raise ValueError(
            f"{holder} with other settings: {key} was {held.get(key)!r} and is now {identity.get(key)!r}"
            f"{f', and {more} more differ' if more else ''}. Nothing was changed: pass {remedy}"
        )
    if contents:
        path = contents[0]
        was, now = held.get(path), identity.get(path)
        if was == now:
            raise ValueError(
                f"{holder}, but {CHANGED[path].format(now)} since it began. Nothing was changed: put back what it "
                f"began with, or pass {remedy}"
            )
        raise ValueError(
            f"{holder} with other settings: {path} was {was!r} and is now {now!r}, which holds something else. "
            f"Nothing was changed: pass {remedy}"
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
        """The result if nothing is quantized: an ordinary model directory."""
        return self.path / "dense"

    @property
    def unquantized(self) -> Path:
        """The linears that the run leaves as they are, with reasons."""
        return self.path / "unquantized.json"

    @property
    def head(self) -> Path:
        """The quantized output head (`block_file.write_head`); it is there before the first block, if at all."""
        return self.path / "head.safetensors"

    @property
    def sampled(self) -> Path:
        """Calibration text that a model wrote (`job.sampling`)."""
        return self.path / "sampled"

    def block(self, index: int) -> Path:
        return self.path / "blocks" / f"block_{index:03d}.safetensors"

    def solved(self, index: int) -> Path:
        """What the solver made of a block that the block stage is still training."""
        return self.path / "blocks" / f"block_{index:03d}.solved.safetensors"

    def streams(self, rank: int, world: int) -> Path:
        """The directory of one process's hidden states (`run.hidden`)."""
        return self.path / "streams" / f"rank_{rank}_of_{world}"

    def scratch(self, rank: int) -> Path:
        """A directory where this process's evaluation stores tensors instead of in memory.

        What killed evaluations on this machine left behind is removed; others may be at work in the same run.
        """
        begin = f".evaluation_{socket.gethostname()}_"
        for left in self.path.glob(f"{glob.escape(begin)}*.partial"):
            if not _is_running(int(left.name.removeprefix(begin).partition("_")[0])):
                shutil.rmtree(left, ignore_errors=True)
        return self.path / f"{begin}{os.getpid()}_{rank}.partial"

    @property
    def costs(self) -> Path:
        return self.path / "costs.jsonl"

    def add_cost(self, block: int | None, phase: str, cost: dict[str, float]) -> None:
        """Appends a phase's cost (`memory.Watch.cost`); work repeated after an interruption is counted again."""
        row = {"block": block, "phase": phase, **cost}
        self.path.mkdir(parents=True, exist_ok=True)
        with open(self.costs, "ab+") as file:
            if file.tell():
                file.seek(-1, 2)
                if file.read(1) != b"\n":  # a kill has truncated the last line
                    file.write(b"\n")
            file.write(json.dumps(row).encode() + b"\n")

    def read_costs(self) -> list[dict[str, Any]]:
        """All rows of `add_cost`, without lines truncated by a kill."""
        rows = []
        for line in self.costs.read_text().splitlines() if self.costs.exists() else []:
            try:
                rows.append(json.loads(line))
            except ValueError:
                continue
        return rows

    def drop_streams(self) -> None:
        """Deletes the hidden states of a finished run."""
        shutil.rmtree(self.path / "streams", ignore_errors=True)

    def check(self, identity: dict[str, Any], resume: bool, others: Collection[str] = ()) -> None:
        """Raises if the run cannot start or continue in this directory; writes nothing.

        Args:
            identity: everything the result depends on, by option. Digests of contents (`CONTENTS`) may be left out;
                `start` compares them.
            resume: whether the job continues a run.
            others: what else may be in the directory, by name, such as the folders of loggers.

        Raises:
            ValueError: the directory holds a run with other settings; or this run, without `resume`; or no run, with
                `resume`; or files that are not of a run.
            StoreError: `run.json` cannot be read.
        """
        where = f"{self.path} (--trainer.default_root_dir)"
        if not self.manifest.exists():
            if resume:
                raise ValueError(
                    f"there is no run to continue in {where}: leave out --ckpt_path to start one, or pass "
                    "--ckpt_path auto, which starts or continues"
                )
            known = ("checkpoints", "tensorboard", "config.yaml", "validate.json", "test.json", "scores_", ".", LOCK)
            known += (self.unquantized.name, self.sampled.name)
            names = sorted(p.name for p in self.path.iterdir()) if self.path.exists() else []
            if strangers := [name for name in names if not name.startswith(known) and name not in others]:
                raise ValueError(f"{where} is not empty and holds no run: {strangers[:3]}. Pass an empty directory")
            return
        try:
            held = read_json(self.manifest)
        except StoreError as error:
            raise StoreError(f"{error}, or pass another --trainer.default_root_dir") from error
        identity = json.loads(json.dumps(identity))
        identity |= {key: held[key] for key in CONTENTS.values() if key in held and key not in identity}
        remedy = "another --trainer.default_root_dir, or the settings of that run"
        refuse_other_settings(f"{where} holds a run", held, identity, remedy)
        if not resume:
            raise ValueError(f"{where} already holds this run: add --ckpt_path auto to continue it")

    def start(self, identity: dict[str, Any], resume: bool, others: Collection[str] = ()) -> None:
        """Claims an empty directory for the run, or checks that it holds the same run (see `check`)."""
        self.check(identity, resume, others)
        if not self.manifest.exists():
            write_json(self.manifest, identity)
        for partial in self.path.rglob(".*.partial"):  # left by killed attempts
            shutil.rmtree(partial) if partial.is_dir() else partial.unlink(missing_ok=True)


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # somebody else's
    return True
