"""Writes a compressed directory and reads its weights back decoded."""

from __future__ import annotations

import re
import shutil
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

from eacmoe_lightning.compressed import card, float32
from eacmoe_lightning.compressed.format import (
    CODE_DIGEST,
    DRAFT,
    INDEX,
    KQUANTS,
    LATTICE,
    METHOD,
    REST,
    SHARD,
    is_compressed,
    original_config,
    read_config,
    size_of,
    write_config,
)
from eacmoe_lightning.models.block import Block
from eacmoe_lightning.models.checkpoint import Checkpoint
from eacmoe_lightning.models.draft import read_draft, without_draft
from eacmoe_lightning.models.moe import MoEModel
from eacmoe_lightning.models.original_files import OriginalFiles
from eacmoe_lightning.models.originals import license_files, local_directory, processor_files, resolve_model
from eacmoe_lightning.models.originals import read_config as read_original_config
from eacmoe_lightning.models.pruned_config import pruned_config
from eacmoe_lightning.models.remote_code import code_files, registered_code
from eacmoe_lightning.models.tokenizer import load_tokenizer
from eacmoe_lightning.models.transformers_loader import empty_model
from eacmoe_lightning.quantization.grid import Quantized
from eacmoe_lightning.quantization.kquant import KQuant
from eacmoe_lightning.quantization.lattice import Lattice
from eacmoe_lightning.quantization.packing import packed, quantized_names, take_quantized
from eacmoe_lightning.quantization.quantizers import QuantizedWeight
from eacmoe_lightning.run.files import (
    StoreError,
    copy_files,
    first_of,
    read_json,
    read_tensors,
    whole_directory,
    write_json,
    write_tensors,
)
from eacmoe_lightning.skipping import stored

# options of a config that transformers sets when it loads a model
SET_BY_LOADING = ("_name_or_path", "dtype", "transformers_weights", "transformers_version", "quantization_config")


def save_compressed(
    path: str | Path,
    moe: MoEModel,
    name_or_path: str,
    quantized_blocks: Iterable[dict[str, QuantizedWeight]],
    description: dict[str, Any],
    fingerprint: str | None = None,
    trust_remote_code: bool = False,
    head: dict[str, Quantized] | None = None,
) -> None:
    """Writes a compressed directory, whole or not at all.

    Args:
        path: the directory; an existing one is replaced.
        moe: the compressed model (dequantized, calibrated), in memory or streamed.
        name_or_path: the original, which gives the tokenizer and the dtype; or, for a pruned compressed model, the
            compressed directory that was pruned, which also gives the original's name and the skipping settings.
        quantized_blocks: per block, the quantized weights by parameter name.
        description: stored in the config under `quantization`.
        fingerprint: of the original (`models.fingerprint`), by which evaluations recognize it; a pruned compressed
            model takes that of the directory that was pruned.
        trust_remote_code: whether Python code beside the original may run; it is copied then.
        head: the quantized output head by parameter name; empty or None: it is stored as it is.

    Raises:
        StoreError: a weight is not quantized.
    """
    source, head = resolve_model(name_or_path), head or {}
    source_config = read_config(source) if is_compressed(source) else {}
    draft = _draft(source, bool(source_config), moe.model)
    config = original_config(source_config) if source_config else read_original_config(source, trust_remote_code)[0]
    code = registered_code(config.model_type)
    about = source_config.get("original", {"name_or_path": name_or_path, "fingerprint": fingerprint})
    config, draft = _with_draft(pruned_config(config, moe), draft, moe)
    _untie_if_the_head_differs(config, moe.model)
    stored_dtype = getattr(config.get_text_config(), "dtype", None) or moe.model.dtype
    tied = _tied_names(moe.model)
    names = [name for name in moe.model.state_dict() if name not in tied]
    weights: dict[str, dict[str, Any]] = {}  # by name, what `_described` says
    wide, in_float32 = _stored_in_float32(source, source_config, trust_remote_code), []

    def unquantized(names: list[str]) -> dict[str, Tensor]:
        tensors = moe.read(names)
        unchanged = wide.put_back(tensors, moe)
        in_float32.extend(unchanged)
        return {name: _narrowed(tensor, stored_dtype) for name, tensor in tensors.items()} | unchanged

    def shards() -> Iterator[tuple[str, dict[str, Tensor]]]:
        for block, quantized in zip(moe.blocks, quantized_blocks, strict=True):
            missing = block.weights().keys() - quantized.keys() - description.get("unquantized", {}).keys()
            if missing and description.get("quantizer") != "none":
                raise StoreError(f"{sorted(missing)[0]} was not quantized, so no model is written")
            weights.update({name: _described(weight) for name, weight in quantized.items()})
            block_names = [name for name in names if name.startswith(f"{block.name}.") and name not in quantized]
            yield SHARD.format(block.index), packed(quantized) | unquantized(block_names)
        weights.update({name: _described(weight) for name, weight in head.items()})
        in_blocks = tuple(f"{block.name}." for block in moe.blocks)
        rest = [name for name in names if not name.startswith(in_blocks) and name not in head]
        yield REST, packed(head) | unquantized(rest)

    with whole_directory(path) as partial:
        write_weights(partial, shards())
        if draft:
            write_tensors(partial / DRAFT, draft)
        load_tokenizer(source, trust_remote_code).save_pretrained(partial)
        for file in (*processor_files(source), *license_files(source)):
            shutil.copyfile(file, partial / file.name)
        if trust_remote_code:
            original = local_directory(source)
            copy_files(code_files(original), original, partial)
        if moe.model.can_generate():
            moe.model.generation_config.save_pretrained(partial)
        write_config(
            partial,
            {
                "model_type": METHOD,
                "format_version": _format_version(moe, weights, bool(head)),
                "original": {
                    **about,
                    **({CODE_DIGEST: code} if code else {}),
                    **({float32.KEY: sorted(in_float32)} if in_float32 else {}),
                    "config": config.to_dict(),
                },
                "dtype": str(moe.model.dtype).rpartition(".")[2],
                "quantization": description | _quantization(weights),
            }
            | {key: value for key, value in source_config.items() if key == stored.KEY},
        )
        if card.is_edited(Path(path) / card.NAME):
            shutil.copyfile(Path(path) / card.NAME, partial / card.NAME)
        card.write_card(partial, moe)


def _stored_in_float32(source: str, source_config: dict[str, Any], trust_remote_code: bool) -> float32.StoredInFloat32:
    """Of an original, or of a compressed directory with this config."""
    if source_config:
        names = frozenset(source_config["original"].get(float32.KEY, ()))
        return float32.StoredInFloat32(names, CompressedWeights(source, "float32"))
    original = Checkpoint(source, "float32", trust_remote_code)
    return float32.StoredInFloat32(original.in_float32, original)


def _draft(source: str, is_compressed: bool, model: PreTrainedModel) -> dict[str, Tensor]:
    """The tensors of the draft layers of an original or of a compressed directory."""
    if not is_compressed:
        return read_draft(OriginalFiles(source), model)
    file = Path(source) / DRAFT
    return read_tensors(file)[0] if file.exists() else {}


def _with_draft(
    config: PreTrainedConfig, draft: dict[str, Tensor], moe: MoEModel
) -> tuple[PreTrainedConfig, dict[str, Tensor]]:
    """The config and the draft layers of the result: both are dropped together, with a warning."""
    if draft and not moe.is_pruned:
        return config, draft
    without = without_draft(config)
    if draft:
        warnings.warn(
            f"the draft layers ({first_of(sorted(draft), 'tensor')}) are left out, because they have the "
            "experts that were removed elsewhere: the config of the result promises 0 of them",
            stacklevel=3,
        )
    elif without is not config:
        warnings.warn(
            "the original's files hold none of the draft layers that its config promises, or only a part of them: the "
            "config of the result promises 0 of them",
            stacklevel=3,
        )
    return without, {}


def _untie_if_the_head_differs(config: PreTrainedConfig, model: PreTrainedModel) -> None:
    """Corrects a config that ties the output head to the embedding, where the files held another head.

    transformers takes the head then, with a warning; other programs would take the embedding.
    """
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or head.weight is embedding.weight or not getattr(config, "tie_word_embeddings", False):
        return
    config.tie_word_embeddings = False
    warnings.warn(
        "the original's config ties the output head to the embedding (tie_word_embeddings), but its files hold another "
        "head, which is kept: the config of the result says false",
        stacklevel=3,
    )


def _described(weight: QuantizedWeight) -> dict[str, Any]:
    return {
        "bits": weight.bits,
        "group_size": weight.group_size,
        LATTICE: isinstance(weight, Lattice),
        KQUANTS: weight.kind if isinstance(weight, KQuant) else None,
    }


def _quantization(weights: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What the config says of the quantized weights, from what `_described` says of each."""
    optional = {
        LATTICE: [name for name, weight in weights.items() if weight[LATTICE]],
        KQUANTS: {name: weight[KQUANTS] for name, weight in weights.items() if weight[KQUANTS]},
    }
    return {
        "bits": {name: weight["bits"] for name, weight in weights.items()},
        "group_sizes": {name: weight["group_size"] for name, weight in weights.items()},
        **{key: value for key, value in optional.items() if value},
    }


def _format_version(moe: MoEModel, weights: dict[str, dict[str, Any]], has_head: bool) -> int:
    """The lowest format version that can hold these weights: see `format.FORMAT_VERSION`."""
    if has_head:
        return 5
    if any(weight[KQUANTS] for weight in weights.values()):
        return 4
    if any(weight[LATTICE] for weight in weights.values()):
        return 3
    return 2 if moe.is_pruned or any(not isinstance(weight["bits"], int) for weight in weights.values()) else 1


def save_packed(path: str | Path, model: PreTrainedModel) -> None:
    """Writes a packed model that `load` returned, as it is in memory; the tokenizer is not written.

    Raises:
        ValueError: its vocabulary was resized, which the original's config in the directory would not know.
    """
    config = {k: v for k, v in model.hf_quantizer.quantization_config.directory_config.items() if k != stored.KEY}
    configs = original_config(config), model.config
    before, now = (own.get_text_config().vocab_size for own in configs)
    if before != now:
        raise ValueError(
            f"the vocabulary was resized from {before} to {now} tokens, but a compressed directory has those of the "
            "original. Resize the original and run fit on that, or load(path, packed=False), resize and save that"
        )
    original = config["original"]
    options = _with_changes(original["config"], *(own.to_dict() for own in configs))
    config |= {"original": original | {"config": options}}
    shards: dict[str, dict[str, Tensor]] = {}
    for name, tensor in untied(model).items():
        layer = re.match(r"[^0-9]*\.(\d+)\.", name)
        shards.setdefault(SHARD.format(int(layer[1])) if layer else REST, {})[name] = tensor
    with whole_directory(path) as partial:
        write_weights(partial, shards.items())
        if (draft := Path(model.name_or_path) / DRAFT).exists():
            shutil.copyfile(draft, partial / DRAFT)
        model.generation_config.save_pretrained(partial)
        dtype = str(model.dtype).rpartition(".")[2]
        write_config(partial, config | {"dtype": dtype} | stored.stored_rule(model))


def _with_changes(held: dict[str, Any], before: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """The original's config as a directory holds it, with the options that have been changed since it was loaded."""
    changed = {name: value for name, value in now.items() if name not in SET_BY_LOADING and value != before.get(name)}
    for name, value in changed.items():
        if name.endswith("_config") and isinstance(value, dict) and isinstance(before.get(name), dict):
            changed[name] = _with_changes(held.get(name) or {}, before[name], value)
    return held | changed


def write_weights(directory: Path, shards: Iterable[tuple[str, dict[str, Tensor]]]) -> None:
    """Writes the shards and the index, in which transformers looks up the shard of each tensor."""
    shard_of: dict[str, str] = {}
    for file, tensors in shards:
        write_tensors(directory / file, tensors)
        shard_of |= dict.fromkeys(tensors, file)
    write_json(directory / INDEX, {"metadata": {"total_size": size_of(directory)}, "weight_map": shard_of})


class CompressedWeights:
    """A compressed directory's weights, decoded as they are read (a `models.streamed.Weights`).

    Args:
        path: the compressed directory.
        dtype: dtype of the decoded weights: `auto` (that of the calibration), `float32`, `bfloat16` or `float16`.

    Raises:
        FileNotFoundError: `path` is not a compressed directory.
        StoreError: when a missing, truncated or altered file is read.
        ValueError: a newer version of this package wrote the directory.
    """

    def __init__(self, path: str | Path, dtype: str = "auto") -> None:
        self.path = Path(path)
        config = self._directory_config = read_config(path)
        self.dtype: torch.dtype = getattr(torch, config["dtype"] if dtype == "auto" else dtype)
        self._config = original_config(config)
        self._config.dtype = self.dtype
        self._bits = config["quantization"]["bits"]
        self.unquantized: dict[str, str] = config["quantization"].get("unquantized", {})
        moe = MoEModel(self.skeleton())
        self._blocks = moe.blocks
        self._owners = {name: block for block in moe.blocks for name in block.weights()}
        self._files = {name: SHARD.format(b.index) for b in moe.blocks for name in _names(b)}
        state = moe.model.state_dict()
        self._dtypes = {name: tensor.dtype for name, tensor in state.items()}
        self._head = {name: state[name].shape[-1] for name in self._bits.keys() & state.keys() - self._owners.keys()}

    def __str__(self) -> str:
        return str(self.path)

    def skeleton(self) -> PreTrainedModel:
        model = empty_model(self._config, self.dtype)
        if (generation := self.path / "generation_config.json").exists():
            read_json(generation)
            model.generation_config = GenerationConfig.from_pretrained(self.path)
        model.config.name_or_path = str(self.path)
        stored.restore_rule(model, self._directory_config)
        return model

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        names, weights = set(names), {}
        for file in sorted({self._files.get(name, REST) for name in names}):
            tensors, _ = read_tensors(self.path / file)
            for name in names & quantized_names(tensors):
                block = self._owners.get(name)
                columns = block.weights()[name][1].shape[-1] if block else self._head[name]
                quantized = take_quantized(tensors, name, self._bits[name], columns)
                decoded = quantized.dequantize(self._dtypes[name])
                weights[name] = block.as_parameter(name, decoded).contiguous() if block else decoded
            for name in names & tensors.keys():
                tensor = tensors[name]
                weights[name] = tensor.to(self._dtypes[name]) if tensor.is_floating_point() else tensor
        return weights

    def quantized(self, index: int) -> dict[str, QuantizedWeight]:
        """A block's quantized weights (codes, scales and zero points) by parameter name."""
        tensors, _ = read_tensors(self.path / SHARD.format(index))
        weights = {n: weight for n, (_, weight) in self._blocks[index].weights().items() if n in self._bits}
        return {n: take_quantized(tensors, n, self._bits[n], weight.shape[-1]) for n, weight in weights.items()}

    @property
    def head(self) -> dict[str, Quantized]:
        """The quantized output head by parameter name; empty if it is not quantized."""
        tensors = read_tensors(self.path / REST)[0] if self._head else {}
        return {name: take_quantized(tensors, name, self._bits[name], n) for name, n in self._head.items()}

    def prefetch(self, names: Iterable[str]) -> None:
        """Does nothing: packed blocks are small, so they are read when they are needed."""


def _names(block: Block) -> list[str]:
    return [f"{block.name}.{name}" for name in block.layer.state_dict()]


def untied(model: PreTrainedModel) -> dict[str, Tensor]:
    """The model's tensors by name, without the names that only repeat another tensor."""
    tied = _tied_names(model)
    return {name: tensor for name, tensor in model.state_dict().items() if name not in tied}


def _tied_names(model: PreTrainedModel) -> set[str]:
    """Names that only repeat another tensor, such as a tied output embedding."""
    seen: dict[int, str] = {}
    repeated = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if seen.setdefault(id(tensor), name) != name:
            repeated.add(name)
    return repeated


def _narrowed(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in `dtype` if that loses nothing, otherwise unchanged."""
    if tensor.is_floating_point() and torch.equal(tensor.to(dtype).to(tensor.dtype), tensor):
        return tensor.to(dtype)
    return tensor
