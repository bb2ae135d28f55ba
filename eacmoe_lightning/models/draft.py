"""Draft layers: layers after the last block that engines use to guess several tokens ahead (MTP, next-n prediction).

transformers runs without them, so they are no part of the model that is compressed. They are carried along unchanged
where the result has the shapes that they were trained for, or left out, and then the config no longer promises them.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from eacmoe_lightning.models.original_files import OriginalFiles
from eacmoe_lightning.models.transformers_loader import source_keys

NUMBER = re.compile(r"(nextn|mtp)")  # options like num_nextn_predict_layers, mtp_num_hidden_layers, num_mtp_modules
COUNTS = ("num", "layers", "modules")
LAYER = re.compile(r"^((?:\w+\.)*?layers)\.(\d+)\.")
EXPERT = re.compile(r"^(.*\.experts)\.(\d+)\.(.*)$")
NAMED = re.compile(r"(^|\.)(mtp|nextn)(_\w+)?\.")
ELSEWHERE = re.compile(r"vis|audio|image|encoder|tower|talker")


def draft_keys(config: PreTrainedConfig, keys: Iterable[str]) -> list[str]:
    """The tensors of the draft layers among the keys of a checkpoint.

    These are layers numbered from `num_hidden_layers` on, as many as the config promises, and everything that is named
    after the method.
    """
    text = config.get_text_config()
    first, promised = text.num_hidden_layers, promised_layers(config)
    drafts = []
    for key in keys:
        layer = LAYER.match(key)
        beyond = layer and first <= int(layer[2]) < first + promised and not ELSEWHERE.search(layer[1])
        if beyond or NAMED.search(key):
            drafts.append(key)
    return drafts


def is_whole(keys: Iterable[str]) -> bool:
    """Whether every expert of the draft layers with these tensors has what the others of its layer have."""
    layers: dict[str, dict[int, set[str]]] = {}
    for key in keys:
        if expert := EXPERT.match(key):
            layers.setdefault(expert[1], {}).setdefault(int(expert[2]), set()).add(expert[3])
    return all(
        sorted(experts) == list(range(len(experts))) and len({frozenset(parts) for parts in experts.values()}) == 1
        for experts in layers.values()
    )


def draft_prefixes(keys: Iterable[str]) -> list[str]:
    """What the names of draft layers begin with, such as `model.layers.61.` or `mtp.`, sorted."""
    prefixes = set()
    for key in keys:
        named = NAMED.search(key)
        prefixes.add(key[: named.end()] if named else LAYER.match(key)[0])
    return sorted(prefixes)


def read_draft(files: OriginalFiles, model: PreTrainedModel) -> dict[str, Tensor]:
    """The tensors of an original's draft layers by key, as they are stored; quantized ones in the config's dtype.

    Those that the model itself has are not among them. Draft layers of which a part is missing have none.
    """
    dtype, tensors, known = files.config.get_text_config().dtype, {}, model.state_dict()
    sources, _ = source_keys(model, draft_keys(files.config, files.keys))
    wanted = [key for name, keys in sources.items() if name not in known for key in keys]
    if not is_whole(wanted):
        return {}
    with files.reading() as reader:
        for key in wanted:
            tensor = reader.lazy(key)[...]
            is_decoded = files.scheme is not None and key in files.scheme.parts
            tensors[key] = tensor.to(dtype) if is_decoded and dtype is not None else tensor
    return tensors


def promised_layers(config: PreTrainedConfig) -> int:
    """The number of draft layers that a config promises."""
    return max((value for _, _, value in _options(config)), default=0)


def without_draft(config: PreTrainedConfig) -> PreTrainedConfig:
    """The config with a promise of 0 draft layers; the same object if it promises none."""
    if not promised_layers(config):
        return config
    config = copy.deepcopy(config)
    for owner, name, value in list(_options(config, switches=True)):
        if isinstance(owner, dict):
            owner[name] = type(value)(0)
        else:
            setattr(owner, name, type(value)(0))
    return config


def _options(config: PreTrainedConfig, switches: bool = False) -> Iterator[tuple[Any, str, int]]:
    """Every option that promises draft layers: who holds it, its name and its value, which is positive.

    With `switches`, also options like `use_mtp` that are True.
    """
    for part in {id(part): part for part in (config, config.get_text_config())}.values():
        holders = [part, *(v for n, v in vars(part).items() if isinstance(v, dict) and NUMBER.search(n))]
        for holder in holders:
            for name, value in list((holder if isinstance(holder, dict) else vars(holder)).items()):
                if not NUMBER.search(name) or value in (None, 0, False):
                    continue
                is_number = type(value) is int and any(word in name for word in COUNTS)
                if is_number or (switches and value is True and name.startswith("use")):
                    yield holder, name, value
