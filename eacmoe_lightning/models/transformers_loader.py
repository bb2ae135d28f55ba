"""All that this package takes from inside transformers, and all that differs between versions of transformers.

transformers documents neither its loader nor its experts, and both change. Their names are used in this file and in
`transformers_modules.py` and nowhere else, so a new version means work in two files. `docs/findings/versions.md` says
which versions were tested.

| transformers | what changed | here |
| --- | --- | --- |
| 5.10 | brings the text tower of DeepSeek-OCR-2, of which DeepSeek-MoE is built (`deepseek.py`) | the lowest version |
| 5.13 | routers select the experts; before, the module around a router did (Jamba's until 5.20) | `select_in_router` |
| 5.16 | `convert_and_load_state_dict_in_model` loses the argument `tp_plan` | `load_tensors` |
| 5.18 | eager experts skip pairs with the id E; before, such an id was an error | `eager_experts`, `is_eager` |
| 5.18 | other experts skip them only if `_is_expert_parallel` is set; before, always | `SKIPS_PAIRS` |
| 5.19 | the text tower of DeepSeek-OCR-2 returns router logits | `TOWER_RETURNS_ROUTER_LOGITS` |
| 5.20 | experts may end with a norm | `post_expert_norm` |
| 5.22 | `tokenizer.json` decides what a tokenizer does; before, the class beside it did | `trust_tokenizer_file` |
| 5.23 | a stack of matrices with one column is split into such matrices; before, into vectors | `original_names` |
| 5.24 | `past_key_values` is called `cache` in arguments and outputs | `CACHE`, `cache_of` |

Three undocumented names stay where they are used, because all these versions have them: a quantizer's
`checkpoint_files` and the config's `transformers_weights` (`compressed/loading.py`), and the config's
`_attn_implementation` (`skipping/session.py`). So do the names of transformers' own server and
chat (`serving/transformers_server.py`), and those for code that comes with a model (`remote_code.py`).

Nothing depends on the version of torch.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    get_model_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    build_glob_alternation,
    convert_and_load_state_dict_in_model,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)
from transformers.modeling_utils import LoadStateDictConfig, _get_resolved_checkpoint_files
from transformers.models.auto import tokenization_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.deepseek_ocr2.modeling_deepseek_ocr2 import DeepseekOcr2TextModel
from transformers.utils.chat_template_utils import _compile_jinja_template

from eacmoe_lightning.models.config_errors import described

TOWER_RETURNS_ROUTER_LOGITS = "router_logits" in DeepseekOcr2TextModel._can_record_outputs

# what transformers raises beside OSError and ValueError where a config's options are missing or make no sense
UNBUILDABLE = (
    TypeError, LookupError, AttributeError, ArithmeticError, ImportError, RuntimeError, AssertionError,
    StrictDataclassError,
)  # fmt: skip

_TEXT_HEADS = (AutoModelForImageTextToText, AutoModelForCausalLM)
_TAKES_TP_PLAN = "tp_plan" in inspect.signature(convert_and_load_state_dict_in_model).parameters

# --- reading a checkpoint ------------------------------------------------------------------------------------


def checkpoint_files(path: str) -> list[str]:
    """The weight files of a local directory or a hub id.

    Raises:
        OSError: there are none.
    """
    files, _ = _get_resolved_checkpoint_files(path, None, None, None, None, False)
    return [str(file) for file in files or []]


def source_keys(model: PreTrainedModel, keys: Iterable[str]) -> tuple[dict[str, list[str]], dict[str, str]]:
    """Which keys on disk each parameter is made of.

    Args:
        model: on any device.
        keys: of its checkpoint.

    Returns:
        The keys by parameter name, in the order in which they are stacked. Parameters that are made together are
        listed under the first of them; the second dict leads from each of the others to that one.
    """
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    known, prefix = model.state_dict(), model.base_model_prefix
    sources: dict[str, list[str]] = {}
    made_with: dict[str, str] = {}
    for key in sorted(keys, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, prefix, known)
        if name not in known and key in known:
            name, pattern = rename_source_key(key, [], [], prefix, known)
        sources.setdefault(name, []).append(key)
        for converter in converters if pattern is not None else ():
            if pattern in converter.source_patterns:
                first, *others = converter.target_patterns
                made_with |= {name.replace(first, other): name for other in others}
    return sources, made_with


@dataclass(frozen=True)
class Misfit:
    """A parameter that cannot be made of its tensors on disk.

    Attributes:
        name: of the parameter.
        found, wanted: its shape by the files and in the model; None if the tensors do not even fit together.
        reason: what transformers says then.
    """

    name: str
    found: tuple[int, ...] | None = None
    wanted: tuple[int, ...] | None = None
    reason: str = ""


def load_tensors(model: PreTrainedModel, tensors: dict[str, Any], dtype: torch.dtype) -> tuple[set[str], list[Misfit]]:
    """Puts tensors of a checkpoint into a model, as `from_pretrained` does.

    Args:
        model: its parameters may be on the meta device.
        tensors: or lazy slices of them, by their keys on disk.
        dtype: of the result, except where the model keeps float32.

    Returns:
        The names of parameters and buffers that got nothing, and those whose tensors do not fit.
    """
    config = LoadStateDictConfig(
        weight_mapping=get_model_conversion_mapping(model),
        dtype=dtype,
        dtype_plan=model._get_dtype_plan(dtype),
        device_map={"": torch.device("cpu")},
    )
    options = {"tp_plan": None} if _TAKES_TP_PLAN else {}
    info, _ = convert_and_load_state_dict_in_model(model, tensors, config, **options)
    misfits = [Misfit(name, reason=text.splitlines()[-1]) for name, text in (info.conversion_errors or {}).items()]
    misfits += [Misfit(name, tuple(found), tuple(wanted)) for name, found, wanted in info.mismatched_keys or ()]
    return set(info.missing_keys), misfits


def original_names(model: PreTrainedModel, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by their names in memory -> the same as the original's checkpoint has them, as for `save_pretrained`."""
    narrow = {name: tensor for name, tensor in tensors.items() if tensor.ndim == 3 and tensor.shape[-1] == 1}
    original = revert_weight_conversion(model, {name: tensor for name, tensor in tensors.items() if name not in narrow})
    # two columns, of which one is taken: a single one would not survive the split
    double = {name: tensor.expand(*tensor.shape[:-1], 2) for name, tensor in narrow.items()}
    return original | {key: part[..., :1] for key, part in revert_weight_conversion(model, double).items()}


def made_together(model: PreTrainedModel, name: str) -> dict[str, Tensor]:
    """Other parameters that are made of the same keys on disk as this one, such as ERNIE 4.5 VL's vision experts."""
    converters = (entry for entry in get_model_conversion_mapping(model) if isinstance(entry, WeightConverter))
    patterns = next((c.target_patterns for c in converters if any(own in name for own in c.target_patterns)), [])
    if len(patterns) < 2:
        return {}
    own = next(pattern for pattern in patterns if pattern in name)
    known, others = model.state_dict(), (name.replace(own, other) for other in patterns if other != own)
    return {other: known[other] for other in others if other in known}


def knows_config(model_type: str | None) -> bool:
    """Whether transformers has a config class for a model type, its own or a registered one."""
    return model_type in CONFIG_MAPPING


def share_conversion(model_type: str, other: str) -> None:
    """Checkpoints of `model_type` are read and written as those of `other`."""
    register_checkpoint_conversion_mapping(model_type, get_checkpoint_conversion_mapping(other), overwrite=True)


def trust_tokenizer_file(model_type: str) -> None:
    """Takes a tokenizer from `tokenizer.json` as it is, whatever class the `tokenizer_config.json` beside it names.

    Until 5.21 `LlamaTokenizerFast`, which DeepSeek-MoE's names, drops the spaces that a byte-level file keeps.
    """
    tokenization_auto.TOKENIZER_MAPPING_NAMES.setdefault(model_type, "TokenizersBackend")
    tokenization_auto.MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS.add(model_type)


def check_template(template: str) -> None:
    """Raises TemplateSyntaxError for a broken chat template."""
    _compile_jinja_template(template)


@contextmanager
def dated(template: str, date: datetime) -> Iterator[None]:
    """Inside the `with` block a chat template that asks for the date (`strftime_now`) gets this one.

    Raises:
        TemplateSyntaxError: the template is broken.
    """
    known = _compile_jinja_template(template).globals  # transformers compiles a template once
    today, known["strftime_now"] = known["strftime_now"], date.strftime
    try:
        yield
    finally:
        known["strftime_now"] = today


# --- a model without weights ---------------------------------------------------------------------------------


def auto_class(config: PreTrainedConfig) -> type[AutoModelForCausalLM] | type[AutoModelForImageTextToText]:
    """The auto class that builds a model with its head for text: a causal LM, or a wrapper with a causal LM inside.

    A config that fits both builds what its `architectures` names, or else the wrapper.

    Raises:
        ValueError: there is no such class.
    """
    classes = {auto: auto._model_mapping[type(config)] for auto in _TEXT_HEADS if type(config) in auto._model_mapping}
    if not classes:
        raise ValueError(
            f"transformers has no language model for the type {config.model_type!r}, neither a causal one nor one with "
            "images"
        )
    named = (config.architectures or [None])[0]
    for auto, classes_of in classes.items():
        if named in [cls.__name__ for cls in (classes_of if isinstance(classes_of, tuple) else (classes_of,))]:
            return auto
    is_wrapper = config.get_text_config() is not config
    return (list(classes) if is_wrapper else list(classes)[::-1])[0]


def empty_model(config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """A model with a head for text, its parameters on the meta device, its buffers as `from_pretrained` makes them.

    Both have the dtypes of `from_pretrained(dtype=dtype)`, which keeps some in float32.

    Raises:
        ValueError: transformers has no such model, or cannot build it from this config.
    """
    try:
        with torch.device("meta"):
            model = auto_class(config).from_config(config, dtype=dtype)
    except UNBUILDABLE as error:
        raise ValueError(
            f"transformers cannot build {config.model_type!r} from the options in its config.json "
            f"({described(error, config.to_dict())}). Mend the config, or restore the one that was published."
        ) from error
    persistent = model.state_dict().keys() & dict(model.named_buffers()).keys()
    model._move_missing_keys_from_meta_to_device(persistent, None, None, None)
    for parameter in model.parameters():  # values for them would be drawn, which takes longer than all the rest
        parameter._is_hf_initialized = True
    model._initialize_missing_keys(False)
    _keep_pinned_dtypes(model, dtype)
    return model.eval().requires_grad_(False)


def _keep_pinned_dtypes(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Converts the parameters and persistent buffers that the model's classes keep in float32 by their names."""
    if plan := model._get_dtype_plan(dtype):
        pattern, kinds, _ = build_glob_alternation(list(plan))
        for name, tensor in model.state_dict(keep_vars=True).items():
            if match := pattern.search(name):
                tensor.data = tensor.data.to(plan[kinds[match.lastgroup]])


def tie(model: PreTrainedModel, missing: Iterable[str]) -> None:
    """Ties weights as `from_pretrained` does, knowing that a checkpoint has none of the `missing` ones."""
    model.tie_weights(missing_keys=set(missing), recompute_mapping=False)


def untie(model: PreTrainedModel, name: str) -> None:
    """Makes transformers forget that the parameter `name` repeats another one, as it is no parameter any more."""
    for path, part in model.named_modules():
        prefix = f"{path}." if path else ""
        if isinstance(part, PreTrainedModel) and name.startswith(prefix):
            inside = name.removeprefix(prefix)
            part._tied_weights_keys = {k: v for k, v in (part._tied_weights_keys or {}).items() if k != inside}
            part.all_tied_weights_keys.pop(inside, None)


def is_ignored(model: PreTrainedModel, *names: str) -> bool:
    """Whether transformers passes over a tensor that the model does not have, by its key on disk or its new name."""
    patterns = model._keys_to_ignore_on_load_unexpected or ()
    return any(re.search(pattern, name) for pattern in patterns for name in names)


def ignore_unexpected(model: PreTrainedModel, pattern: str) -> None:
    """Keys on disk that match are passed over without a warning."""
    model._keys_to_ignore_on_load_unexpected = {*(model._keys_to_ignore_on_load_unexpected or ()), pattern}
