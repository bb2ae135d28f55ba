"""Where an original model's files are, what its config says, and the tensors of its files under their ordinary keys.

`checkpoint.Checkpoint` makes a model's parameters of these tensors.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import constants
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import cached_file

from eacmoe_lightning.models.decoding import ACTIVATIONS, Scheme, scheme_of
from eacmoe_lightning.models.transformers_loader import UNBUILDABLE, auto_class, knows_config, register_remote_code
from eacmoe_lightning.models.weight_files import (
    DamagedFile,
    OpenFile,
    Stored,
    check_fetched,
    check_no_adapter,
    check_option_files,
    found_instead,
    opened,
    stored_tensors,
)
from eacmoe_lightning.run.files import StoreError, write_json

RANGE, CHUNK = 1 << 28, 1 << 22  # bytes of a file that one thread hashes, and that it reads at a time
PROBE = "Any text has tokens: 1, 2, 3."
SETTLED = 2.0  # seconds: the times of a file that has changed less long ago may not show the next change
BUNDLED = Path(__file__).parent.parent / "assets" / "tiny-moe"
TESTBEDS = Path(__file__).parent.parent.parent / "testbeds"  # in a checkout only: too large for the wheel
QUANTIZATION = "quantization_config"
PROCESSOR_FILES = (
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "chat_template.json",
)
LICENSE_FILES = ("LICENSE*", "NOTICE*", "USE_POLICY*")


def resolve_model(name_or_path: str) -> str:
    """The directory of the bundled MoE for `bundled`, of another testbed for `bundled:NAME`; all else unchanged.

    Raises:
        FileNotFoundError: there is no such testbed, or this is no checkout.
    """
    name = str(name_or_path)
    if not is_bundled(name):
        return name
    directory = TESTBEDS / name.removeprefix("bundled:") if ":" in name else BUNDLED
    if not directory.is_dir():
        known = sorted(path.name for path in TESTBEDS.glob("*") if path.is_dir())
        there = (
            f"there are bundled and {', '.join(f'bundled:{one}' for one in known)}"
            if known
            else ("models other than `bundled` are in a checkout of the repository, not in the installed package")
        )
        raise FileNotFoundError(f"there is no model {name}: {there}")
    return str(directory)


def is_bundled(name_or_path: str) -> bool:
    """Whether a name stands for a model of this project: `bundled` or `bundled:NAME`."""
    return name_or_path == "bundled" or name_or_path.startswith("bundled:")


def no_model(name_or_path: str, reason: object, option: str = "--model.name_or_path") -> FileNotFoundError:
    """The error of a model that cannot be loaded.

    Args:
        name_or_path: as the user gave it.
        reason: what went wrong, as the last sentence.
        option: with which it was given.
    """
    path = Path(resolve_model(name_or_path)).expanduser()
    looks_like_a_path = name_or_path.count("/") > 1 or name_or_path.startswith((".", "/", "~"))
    if path.is_file():
        is_gguf = path.suffix == ".gguf"
        remedy = "which is not read: pass the model that it was made of" if is_gguf else "pass the directory it lies in"
        reason = f"That is a {'GGUF file, ' if is_gguf else 'file: '}{remedy}."
    elif looks_like_a_path and not path.is_dir():
        reason = "There is no such directory."  # whatever the hub says of such a name
    elif path.is_dir():
        reason = f"{reason} {found_instead(path)}".strip()
    return FileNotFoundError(
        f"no causal language model can be loaded from {name_or_path!r} ({option}): pass `bundled`, a local Hugging "
        f"Face directory or the id of a hub model that this machine can reach. {reason}"
    )


def local_directory(name_or_path: str, option: str = "--model.name_or_path") -> Path:
    """The directory with a model's files: the given one, or the snapshot in the hub's cache.

    Args:
        name_or_path: `bundled`, a local directory or a hub id.
        option: that errors name.

    Raises:
        FileNotFoundError: there is no such directory, and the hub has no such model or cannot be reached.
    """
    path = resolve_model(name_or_path)
    if Path(path).is_dir():
        return Path(path)
    try:
        return Path(cached_file(path, "config.json")).parent
    except (OSError, ValueError) as error:
        raise no_model(name_or_path, error, option) from error


def read_config(name_or_path: str, trust_remote_code: bool = False) -> tuple[PreTrainedConfig, dict[str, Any] | None]:
    """An original's config as if it were not quantized, and its `quantization_config`.

    Args:
        name_or_path: `bundled`, a local directory or a hub id (`--model.name_or_path`).
        trust_remote_code: whether Python code beside the model may run (`--model.trust_remote_code`). Where
            transformers has a class of its own, or one was registered, that one is taken.

    Raises:
        FileNotFoundError: there is no config, it is damaged or not understood, or its model type is unknown.
        ValueError: the model needs code that came with it, and that is not trusted; or an adapter lies beside it.
    """
    path = resolve_model(name_or_path)
    check_fetched(path, weights=False)
    check_option_files(path)
    check_no_adapter(path)
    try:
        stored, _ = PreTrainedConfig.get_config_dict(path)
        if {"original", "format_version"} <= stored.keys():
            raise ValueError(f"It is a compressed model of this package: pass its original, {_original_of(stored)!r}.")
        if "AutoConfig" in stored.get("auto_map", {}) and not knows_config(stored.get("model_type")):
            if not trust_remote_code:
                raise UntrustedCode(name_or_path, "`auto_map` in its config.json")
            register_remote_code(path, stored["model_type"], stored["auto_map"])
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    except UntrustedCode:
        raise
    except (OSError, ValueError) as error:
        raise no_model(name_or_path, error) from error
    except UNBUILDABLE as error:
        raise no_model(name_or_path, f"transformers does not understand its config.json ({error!r}).") from error
    quantization = None
    for part in {id(part): part for part in (config, config.get_text_config())}.values():
        if (found := getattr(part, QUANTIZATION, None)) is not None:
            quantization = quantization or (found if isinstance(found, dict) else found.to_dict())
        if QUANTIZATION in vars(part):
            delattr(part, QUANTIZATION)
    return config, quantization


def _original_of(compressed: dict[str, Any]) -> str | None:
    return (compressed["original"] or {}).get("name_or_path")


class UntrustedCode(ValueError):
    """A model needs Python code that came with it, and the user has not said that it may run."""

    def __init__(self, name_or_path: str, what: str) -> None:
        super().__init__(
            f"{name_or_path!r} (--model.name_or_path) needs Python code that came with it ({what}): read that code and "
            "pass --model.trust_remote_code true to run it, or register its classes with transformers before you start"
        )


def processor_files(name_or_path: str) -> list[Path]:
    """The files by which a model's images, sound and chats are prepared, as far as it has any."""
    found = []
    for name in PROCESSOR_FILES:
        try:
            found.append(Path(cached_file(resolve_model(name_or_path), name)))
        except OSError:
            continue  # the model has no such file
    return found


def license_files(name_or_path: str) -> list[Path]:
    """The license and the notices beside a model that is on this machine."""
    return sorted(file for name in LICENSE_FILES for file in local_directory(name_or_path).glob(name) if file.is_file())


def load_tokenizer(name_or_path: str, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """A model's tokenizer.

    Args:
        name_or_path, trust_remote_code: see `read_config`.

    Raises:
        OSError: there is none, or one of its files is damaged.
        ValueError: it needs code that came with it, and that is not trusted.
    """
    path = resolve_model(name_or_path)
    check_fetched(path, weights=False)
    check_option_files(path)
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except ValueError as error:
        if trust_remote_code or "trust_remote_code" not in str(error):
            raise
        raise UntrustedCode(name_or_path, "`auto_map` in its tokenizer_config.json or config.json") from error


def tokenizer_of(
    name_or_path: str, option: str = "--model.name_or_path", trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """`load_tokenizer` for a command: what it raises names the option that the model came from.

    Raises:
        FileNotFoundError: there is no such model; or it has no tokenizer, an empty or a damaged one.
        ValueError: it needs code that came with it, and that is not trusted.
    """
    try:
        tokenizer = load_tokenizer(name_or_path, trust_remote_code)
        problem = "" if tokenizer(PROBE)["input_ids"] else "it makes no token of any text"
    except (DamagedFile, UntrustedCode):
        raise
    except UNBUILDABLE as error:  # most classes read config.json too
        reason = f"transformers does not understand its config.json or the tokenizer's files ({error!r})."
        raise no_model(name_or_path, reason, option) from error
    except (OSError, ValueError) as error:
        if not (local_directory(name_or_path, option) / "config.json").is_file():  # no model at all
            raise no_model(name_or_path, "There is no config.json.", option) from error
        problem = str(error)
    if problem:  # some classes make an empty tokenizer where its files are missing
        raise FileNotFoundError(
            f"{name_or_path!r} ({option}) has no tokenizer, or a damaged one: put the files there that the model was "
            f"published with (tokenizer.json, tokenizer_config.json). {problem}"
        )
    return tokenizer


class OriginalFiles:
    """An original's config, and the tensors of its weight files by ordinary key: quantized ones are decoded as read.

    Args:
        name_or_path, trust_remote_code: see `read_config`.

    Attributes:
        config: the model's config, without `quantization_config`.
        stored: every tensor on disk.
        scheme: how the weights are quantized; None for a model that is not.
        keys: by ordinary key, the keys on disk that the tensor is made of; without the scales of activations.

    Raises:
        FileNotFoundError: there is no such model, or one of its files is missing, truncated or damaged.
        ValueError: the model is quantized by an unknown scheme, or needs code that is not trusted.
    """

    def __init__(self, name_or_path: str, trust_remote_code: bool = False) -> None:
        self.name_or_path, self.path = name_or_path, resolve_model(name_or_path)
        self.config, quantization = read_config(name_or_path, trust_remote_code)
        try:
            self.stored: dict[str, Stored] = stored_tensors(self.path)
        except DamagedFile:
            raise
        except OSError as error:
            raise no_model(name_or_path, error) from error
        self.scheme: Scheme | None = None
        if quantization is not None:
            try:
                self.scheme = scheme_of(quantization, self.stored)
            except ValueError as error:
                raise ValueError(f"{name_or_path!r} (--model.name_or_path) cannot be read: {error}") from error
            except (LookupError, TypeError, AttributeError) as error:
                raise ValueError(
                    f"{name_or_path!r} (--model.name_or_path) cannot be read: the `quantization_config` in its "
                    f"config.json is not complete ({error!r}). Restore the one that was published"
                ) from error
        parts = self.scheme.parts if self.scheme else {}
        decoded = {key for sources in parts.values() for key in sources.values()}
        self.keys: dict[str, tuple[str, ...]] = {key: tuple(sources.values()) for key, sources in parts.items()}
        for key in self.stored.keys() - decoded:
            if not (self.scheme and ACTIVATIONS.search(key)):
                self.keys[key] = (key,)

    @property
    def size_bytes(self) -> int:
        """Total size of the weight files."""
        return sum(Path(file).stat().st_size for file in {tensor.file for tensor in self.stored.values()})

    @property
    def description(self) -> str:
        """How the weights are stored: the scheme of a quantized model, or a dtype."""
        if self.scheme is not None and self.scheme.parts:
            return self.scheme.description
        sizes: dict[str, int] = {}
        for tensor in self.stored.values():
            name = str(tensor.dtype).rpartition(".")[2]
            sizes[name] = sizes.get(name, 0) + tensor.num_bytes
        return max(sizes, key=sizes.get, default="")

    def num_bytes(self, keys: Iterable[str]) -> int:
        """Bytes on disk of these tensors, by ordinary key."""
        return sum(self.stored[part].num_bytes for key in keys for part in self.keys[key])

    @contextmanager
    def reading(self) -> Iterator[Reader]:
        """Opens files as they are needed, and closes them at the end.

        Raises:
            OSError, SafetensorError: a file cannot be read.
        """
        with ExitStack() as stack:
            yield Reader(self, stack)


class Reader:
    """Reads tensors by ordinary key; see `OriginalFiles.reading`."""

    def __init__(self, files: OriginalFiles, stack: ExitStack) -> None:
        self._files, self._stack = files, stack
        self._open: dict[str, OpenFile] = {}

    def lazy(self, key: str) -> Any:
        """The tensor with this ordinary key, which `[...]` reads and decodes."""
        scheme = self._files.scheme
        if scheme is not None and key in scheme.parts:
            return _Decoded(scheme, key, {kind: self._slice(part) for kind, part in scheme.parts[key].items()})
        return self._slice(key)

    def _slice(self, key: str) -> Any:
        file = self._files.stored[key].file
        if file not in self._open:
            self._open[file] = self._stack.enter_context(opened(file))
        return self._open[file].lazy(key)


class _Decoded:
    """A quantized weight on disk; reading it raises ValueError if its tensors do not fit each other."""

    def __init__(self, scheme: Scheme, key: str, parts: dict[str, Any]) -> None:
        self._scheme, self._key, self._parts = scheme, key, parts

    def __getitem__(self, index: Any) -> Tensor:
        parts = {kind: part[...] for kind, part in self._parts.items()}
        try:
            return self._scheme.decode(self._key, parts)[index]
        except (RuntimeError, LookupError, TypeError) as error:
            shapes = ", ".join(f"{kind} {tuple(part.shape)}" for kind, part in parts.items())
            raise ValueError(
                f"{self._key} cannot be decoded as {self._scheme.description}: its tensors ({shapes}) do not fit each "
                f"other ({error}). The files or their config.json were changed: download them again"
            ) from error


def load_original(name_or_path: str, dtype: str = "auto", trust_remote_code: bool = False) -> PreTrainedModel:
    """Loads a full-precision causal LM in eval mode, because PhiMoE's router samples in train mode.

    Args:
        name_or_path: `bundled`, a local directory or a hub id (`--model.name_or_path`).
        dtype: `auto` (as stored), `float32`, `bfloat16` or `float16` (`--model.dtype`).
        trust_remote_code: see `read_config`.

    Raises:
        FileNotFoundError: no model can be loaded from there.
        ValueError: the model is quantized (`streamed.StreamedModel.load_all` brings such a one into memory).
    """
    path = resolve_model(name_or_path)
    config, quantization = read_config(name_or_path, trust_remote_code)
    if quantization is not None:
        raise ValueError(f"{name_or_path!r} is quantized: open it as StreamedModel(Checkpoint(...))")
    try:
        model = auto_class(config).from_pretrained(path, config=config, dtype=dtype)
    except (OSError, ValueError) as error:
        raise no_model(name_or_path, error) from error
    return model.eval()


def stored_name(name_or_path: str) -> str:
    """A model's name as runs and compressed directories store it: of a local directory, the absolute path."""
    path = Path(name_or_path).expanduser()
    return os.path.abspath(path) if not is_bundled(name_or_path) and path.is_dir() else str(name_or_path)


def fingerprint(name_or_path: str) -> str:
    """SHA-256 over every byte of a model's weight files, its config.json and its own Python files.

    All cores read, so a model of 90 GB takes about as long as its disk needs. The result is kept in the hub's cache
    (HF_HOME) and taken from there while no file's size, inode or times change.

    Args:
        name_or_path: `bundled`, a local directory or a hub id.

    Raises:
        FileNotFoundError: there is no such model.
    """
    directory = local_directory(name_or_path)
    files = [directory / "config.json", *sorted(directory.glob("*.py")), *_weight_files(directory)]
    status = {file.name: file.stat() for file in files}
    stamps = {name: [s.st_size, s.st_ino, s.st_mtime_ns, s.st_ctime_ns] for name, s in status.items()}
    kept = Path(constants.HF_HOME, "eacmoe-lightning", "fingerprints", _sha(os.path.realpath(directory)) + ".json")
    try:
        stored = json.loads(kept.read_text())
        if stored["stamps"] == stamps:
            return stored["sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        pass  # not computed before, or not readable
    started = time.time()
    ranges = [(file, at) for file in files for at in range(0, max(status[file.name].st_size, 1), RANGE)]
    with ThreadPoolExecutor(min(8, len(os.sched_getaffinity(0)))) as threads:
        parts = zip(ranges, threads.map(_sha_of_range, ranges), strict=True)
        sha256 = _sha("".join(f"{file.name} {at} {sha}\n" for (file, at), sha in parts))
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
