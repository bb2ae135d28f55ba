"""What an original's files hold and the model does not use: refused if it shows that weights would be read wrong."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping, Sequence

import torch
from transformers import PreTrainedModel

from eacmoe_lightning.models.decoding.schemes import QUANTIZED
from eacmoe_lightning.models.draft import draft_keys
from eacmoe_lightning.models.original_files import OriginalFiles
from eacmoe_lightning.models.transformers_loader import is_ignored, source_keys
from eacmoe_lightning.models.weight_files import MERGE

UNQUANTIZED = (torch.float64, torch.float32, torch.float16, torch.bfloat16)  # dtypes of ordinary weights
ADAPTER = re.compile(
    r"\.(lora_[AB]|lora_embedding_[AB]|lora_magnitude_vector|vera_lambda_[bd]|ia3_l|hada_w[12]_[ab]|oft_[rR]|"
    r"base_layer|modules_to_save|original_module)\."
)
WRAPPERS = {  # what other programs put into the names of parameters, and which ones
    "_orig_mod.": "torch.compile",
    "_fsdp_wrapped_module.": "FSDP",
    "_checkpoint_wrapped_module.": "activation checkpointing",
    "_forward_module.": "Lightning or DeepSpeed",
    "base_model.model.": "peft",
    "module.": "DistributedDataParallel or DeepSpeed",
    "state_dict.": "a training checkpoint",
    "model.language_model.": "a model of images and text",
    "language_model.": "a model of images and text",
    "transformer.": "another program",
}
HARMLESS = re.compile(r"(^|\.)(inv_freq|position_ids)$")  # computed from the config


def check_used(files: OriginalFiles, model: PreTrainedModel, sources: Mapping[str, Sequence[str]]) -> None:
    """Warns of tensors that the model does not use, without those that transformers ignores and draft layers.

    Args:
        files: the original's files.
        model: its skeleton.
        sources: the keys of each parameter, as `source_keys` returns them; other names are of unused tensors.

    Raises:
        ValueError: weights are stored as codes, and what decodes them is missing; or an adapter is among the tensors,
            or they have the names of a wrapped model.
    """
    known = model.state_dict()
    decoded = files.scheme.parts if files.scheme else {}
    codes = [
        key
        for name in sources.keys() & known.keys()
        for whole in sources[name]
        for key in files.members(whole)
        if known[name].is_floating_point() and key not in decoded and files.stored[key].dtype not in UNQUANTIZED
    ]
    unused = {key: name for name, keys in sources.items() if name not in known for key in keys}
    for key in draft_keys(files.config, unused):
        del unused[key]
    unused = {k: n for k, n in unused.items() if not (HARMLESS.search(k) or is_ignored(model, k, n))}
    scales = [key for key in unused if QUANTIZED.search(key)]
    if codes or scales:
        dtypes = ", ".join(sorted({str(files.stored[key].dtype).rpartition(".")[2] for key in codes}))
        what = [f"{len(codes)} weights in {dtypes}, such as {min(codes)}"] if codes else []
        what += [f"{len(scales)} tensors like {min(scales)}, which nothing uses"] if scales else []
        remedy = (
            f"the {files.scheme.description} of its config.json does not say how: a file is missing, or another "
            "program has changed the model"
            if files.scheme
            else "its config.json has no `quantization_config` that says how: restore the one that was published"
        )
        raise ValueError(
            f"{files.name_or_path!r} (--model.name_or_path) is quantized: it holds {' and '.join(what)}. They must be "
            f"decoded, and {remedy}. Otherwise codes would be taken for weights"
        )
    _refuse_adapter(files, unused)
    _refuse_wrapped(files, model, unused)
    if files.scheme is not None and not decoded:
        warnings.warn(
            f"the config.json of {files.name_or_path!r} (--model.name_or_path) has a `quantization_config`, but none "
            "of its tensors is quantized: they are read as they are",
            stacklevel=2,
        )
    if unused:
        names = ", ".join(sorted(unused)[:3])
        warnings.warn(
            f"{files.name_or_path!r} (--model.name_or_path) holds {len(unused)} tensors that "
            f"{type(model).__name__} does not use, and the result will not have them: {names}"
            f"{' and so on' if len(unused) > 3 else ''}",
            stacklevel=2,
        )


def _refuse_adapter(files: OriginalFiles, unused: Iterable[str]) -> None:
    """Raises ValueError if an adapter is among the tensors, since the model would be another one without it."""
    if adapter := sorted(key for key in unused if ADAPTER.search(key)):
        raise ValueError(
            f"{files.name_or_path!r} (--model.name_or_path) holds {len(adapter)} tensors of an adapter such as "
            f"{adapter[0]}, which would not take part: {MERGE}"
        )


def _refuse_wrapped(files: OriginalFiles, model: PreTrainedModel, unused: Iterable[str]) -> None:
    """Raises ValueError if the model's own weights are there, but under the names that they have inside a wrapper."""
    for part, program in WRAPPERS.items():
        wrapped = {key.replace(part, ""): key for key in unused if key.startswith(part) or f".{part}" in key}
        known = model.state_dict().keys() if wrapped else ()
        own = {key for name, keys in source_keys(model, wrapped)[0].items() if name in known for key in keys}
        if own := sorted(own - files.keys.keys()):
            raise ValueError(
                f"{files.name_or_path!r} (--model.name_or_path) holds {len(own)} weights under names that they have in "
                f"a wrapper (`{part}`, of {program}), such as {wrapped[own[0]]}, and transformers would not find them: "
                f"save the unwrapped model with `save_pretrained`, or rename the tensors to {own[0]} and so on"
            )
