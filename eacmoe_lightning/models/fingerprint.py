"""What tells one original from another: a digest of every byte that its results depend on."""

from __future__ import annotations

import hashlib
import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from huggingface_hub import constants

from eacmoe_lightning.models.originals import MODELOPT_FILE, local_directory
from eacmoe_lightning.models.remote_code import code_files
from eacmoe_lightning.run.files import StoreError, write_json

RANGE, CHUNK = 1 << 28, 1 << 22  # bytes of a file that one thread hashes, and that it reads at a time
SETTLED = 2.0  # seconds: the times of a file that has changed less long ago may not show the next change


def fingerprint(name_or_path: str) -> str:
    """SHA-256 over every byte of a model's weight files, its configs and its own Python files.

    All cores read, so a model of 90 GB takes about as long as its disk needs. The result is kept in the hub's cache
    (HF_HOME) and taken from there while no file's size, inode or times change.

    Args:
        name_or_path: `bundled`, a local directory or a hub id.

    Raises:
        FileNotFoundError: there is no such model.
    """
    directory = local_directory(name_or_path)
    configs = [directory / "config.json", *directory.glob(MODELOPT_FILE)]
    files = [*configs, *code_files(directory), *_weight_files(directory)]
    names = {file: file.relative_to(directory).as_posix() for file in files}
    status = {names[file]: file.stat() for file in files}
    stamps = {name: [s.st_size, s.st_ino, s.st_mtime_ns, s.st_ctime_ns] for name, s in status.items()}
    kept = Path(constants.HF_HOME, "eacmoe-lightning", "fingerprints", _sha(os.path.realpath(directory)) + ".json")
    try:
        stored = json.loads(kept.read_text())
        if stored["stamps"] == stamps:
            return stored["sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        pass  # not computed before, or not readable
    started = time.time()
    ranges = [(file, at) for file in files for at in range(0, max(status[names[file]].st_size, 1), RANGE)]
    with ThreadPoolExecutor(min(8, len(os.sched_getaffinity(0)))) as threads:
        parts = zip(ranges, threads.map(_sha_of_range, ranges), strict=True)
        sha256 = _sha("".join(f"{names[file]} {at} {sha}\n" for (file, at), sha in parts))
    last_change = max(max(s.st_mtime, s.st_ctime) for s in status.values())
    if last_change < started - SETTLED:  # a later change would show in the times
        try:
            write_json(kept, {"stamps": stamps, "sha256": sha256})
        except (OSError, StoreError):
            pass  # no such cache: compute it again next time
    return sha256


def _weight_files(directory: Path) -> list[Path]:
    """The files that a checkpoint is read from: those of an index, and the only one; with neither, all."""
    for suffix, only in (("safetensors", "model.safetensors"), ("bin", "pytorch_model.bin")):
        names = {name for index in directory.glob(f"*.{suffix}.index.json") for name in _indexed(index)} | {only}
        files = [directory / name for name in sorted(names) if (directory / name).is_file()]
        if files := files or sorted(directory.glob(f"*.{suffix}")):
            return files
    return []


def _indexed(index: Path) -> set[str]:
    try:
        return set(json.loads(index.read_text())["weight_map"].values())
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise FileNotFoundError(f"{index} is not an index of weight files ({error!r})") from error


def _sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _sha_of_range(part: tuple[Path, int]) -> str:
    file, start = part
    sha, left = hashlib.sha256(), RANGE
    with open(file, "rb", buffering=0) as stream:
        stream.seek(start)
        while left and (chunk := stream.read(min(left, CHUNK))):
            sha.update(chunk)
            left -= len(chunk)
    return sha.hexdigest()
