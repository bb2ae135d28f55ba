"""The tensors of an original's weight files under their ordinary keys, quantized ones decoded.

`checkpoint.Checkpoint` makes a model's parameters of these tensors.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from eacmoe_lightning.models.decoding.scheme import REMEDY, Scheme
from eacmoe_lightning.models.decoding.schemes import ACTIVATIONS, scheme_of
from eacmoe_lightning.models.originals import no_model, read_config, resolve_model
from eacmoe_lightning.models.unstacked import Stack
from eacmoe_lightning.models.weight_files import DamagedFile, OpenFile, Stored, opened, stored_tensors


class OriginalFiles:
    """An original's config, and the tensors of its weight files by ordinary key: quantized ones are decoded as read.

    Args:
        name_or_path, trust_remote_code: see `originals.read_config`.

    Attributes:
        config: the model's config, without `quantization_config`.
        stored: every tensor on disk.
        scheme: how the weights are quantized; None for a model that is not.
        keys: by ordinary key, the keys on disk that the tensor is made of; without the scales of activations.
        stacks: by ordinary key, the tensors of `keys` that were stacked to one (`stack`).

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
        self.stacks: dict[str, Stack] = {}

    def stack(self, stacks: Mapping[str, Stack]) -> None:
        """Makes one tensor with a new key of those in each stack, which have no keys of their own any more."""
        self.stacks |= stacks
        for name, stack in stacks.items():
            self.keys[name] = tuple(part for key in stack.keys for part in self.keys.pop(key))

    def members(self, key: str) -> list[str]:
        """The ordinary keys of the tensors, each decoded by itself, that the one with this key is made of."""
        return self.stacks[key].keys if key in self.stacks else [key]

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
        if key in self._files.stacks:
            stack = self._files.stacks[key]
            return _Stacked(key, stack, [self.lazy(member) for member in stack.keys])
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
            return self._scheme.checked(self._key, parts)[index]
        except (RuntimeError, LookupError, TypeError) as error:
            shapes = ", ".join(f"{kind} {tuple(part.shape)}" for kind, part in parts.items())
            raise ValueError(
                f"{self._key} cannot be decoded as {self._scheme.description}: its tensors ({shapes}) do not fit each "
                f"other ({error}). {REMEDY[0].upper()}{REMEDY[1:]}"
            ) from error


class _Stacked:
    """Linears of experts on disk as one parameter; reading it raises ValueError if they do not fit each other."""

    def __init__(self, key: str, stack: Stack, parts: list[Any]) -> None:
        self._key, self._stack, self._parts = key, stack, parts

    def __getitem__(self, index: Any) -> Tensor:
        try:
            return self._stack.of(part[...] for part in self._parts)[index]
        except RuntimeError as error:
            raise ValueError(
                f"{self._key} cannot be made of {len(self._parts)} tensors such as {self._stack.keys[0]}: {error}"
            ) from error
