"""`load`, and the registration that lets `AutoModelForCausalLM.from_pretrained` open a compressed directory.

Importing this module registers two things with transformers. Reading a config of model type `eacmoe` gives the
original's config with a quantization config, so transformers picks the original's model class. The quantization method
`eacmoe` inserts packed modules (`runtime/packed_modules.py`) before the weights are loaded, so packed bytes go from the
file straight into them. Weights on a lattice or in llama.cpp's blocks have no packed modules: `load` decodes them.

Without this package, transformers refuses the directory: it asks for `trust_remote_code=True`, and then for the package
(`format.CODE`). (With the original's model type and an unknown quantization method, it would only warn and leave the
weights random.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from eacmoe_lightning.compressed.directory import CompressedWeights, save_packed
from eacmoe_lightning.compressed.format import (
    INDEX,
    METHOD,
    check_format,
    is_compressed,
    original_config,
    read_config,
    runs_packed,
    trust_code,
)
from eacmoe_lightning.models.checkpoint import dtype_name
from eacmoe_lightning.models.find import find_blocks
from eacmoe_lightning.models.shrink import shrink_as_pruned
from eacmoe_lightning.models.streamed import StreamedModel
from eacmoe_lightning.models.transformers_loader import auto_class, untie
from eacmoe_lightning.run.files import StoreError, read_json, read_tensors
from eacmoe_lightning.runtime.decode_step import speed_up_generation
from eacmoe_lightning.runtime.packed_modules import PackedLinear, pack_modules, set_activations
from eacmoe_lightning.skipping.stored import restore_rule


def load(
    path: str | Path,
    dtype: str | torch.dtype = "auto",
    packed: bool = True,
    activations: str = "exact",
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """The compressed model as a transformers causal LM in eval mode.

    Args:
        path: a compressed directory, or a run directory that holds one.
        dtype: `auto` (the dtype of the calibration), `float32`, `bfloat16` or `float16`; by name or as torch has it.
        packed: whether quantized weights stay packed in memory; otherwise they are decoded to an ordinary model.
            Weights on a lattice or in llama.cpp's blocks (`--model.quantizer lattice`, `kquant`) are always decoded.
        activations: `exact`, or `int8` for faster products with rounded activations, at the loss in quality that
            docs/findings/int8-activations.md reports.
        trust_remote_code: whether Python code that came with the original may run.

    Raises:
        FileNotFoundError: `path` holds no compressed model.
        StoreError: a file or a tensor is missing, or a file is truncated or altered.
        ValueError: a newer version of this package wrote the model, or there is no such dtype.
    """
    path, dtype = Path(path), dtype_name(dtype)
    path = path / "compressed" if is_compressed(path / "compressed") else path
    config = read_config(path)
    if trust_remote_code:
        trust_code(path, config)
    original = original_config(config)
    torch_dtype = getattr(torch, config["dtype"] if dtype == "auto" else dtype)
    if packed and runs_packed(config):
        read_json(path / INDEX)  # transformers would not name it
        model = auto_class(original).from_pretrained(path, dtype=torch_dtype)
        set_activations(model, activations)
        return model
    moe = StreamedModel(CompressedWeights(path, dtype))
    moe.load_all()
    return moe.model.requires_grad_(True)


@register_quantization_config(METHOD)
class PackedConfig(QuantizationConfigMixin):
    """The quantization config that transformers sees: how a compressed model is stored and run.

    Args:
        bits, group_sizes: by parameter name; a list of bits if the experts of a stack differ.
        activations: `exact` or `int8`; see `packed_modules.set_activations`.
        directory_config: the config.json of the compressed directory, for `save_pretrained`.
        prepare: functions that are called with the packed model before its weights are read (offload/loading.py).
    """

    def __init__(
        self,
        bits: dict[str, int | list[int]] | None = None,
        group_sizes: dict[str, int] | None = None,
        activations: str = "exact",
        directory_config: dict[str, Any] | None = None,
        prepare: Sequence[Callable[[PreTrainedModel], None]] = (),
        **_: Any,
    ) -> None:
        self.quant_method = METHOD
        self.bits, self.group_sizes = bits or {}, group_sizes or {}
        self.activations, self.directory_config = activations, directory_config or {}
        self.prepare = prepare


class CompressedConfig(PreTrainedConfig):
    """The config.json of a compressed directory. Reading it gives the original's config with a `PackedConfig`."""

    model_type = METHOD

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        check_format(config_dict)
        config_class = type(original_config(config_dict))
        original = dict(config_dict["original"]["config"])
        kwargs.pop("_commit_hash", None)
        quantization = config_dict["quantization"]
        original |= {
            "dtype": config_dict["dtype"],
            "transformers_weights": INDEX,  # transformers does not look for this name by default
            "quantization_config": {
                "quant_method": METHOD,
                "bits": quantization["bits"],
                "group_sizes": quantization["group_sizes"],
                "directory_config": config_dict,
            },
        }
        return config_class.from_dict(original, **kwargs)


AutoConfig.register(METHOD, CompressedConfig)


@register_quantizer(METHOD)
class PackedQuantizer(HfQuantizer):
    """Loads packed modules. transformers refuses to quantize a model with it (`requires_calibration`); use `fit`."""

    requires_calibration = True

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        config: PackedConfig = self.quantization_config
        if not runs_packed(config.directory_config):
            raise ValueError(
                "this model's weights lie on a lattice or in llama.cpp's blocks, for which there are no packed "
                "modules: open it with eacmoe_lightning.load, which decodes them"
            )
        shrink_as_pruned(model.config.get_text_config(), find_blocks(model)[1])
        pack_modules(model, config.bits, config.group_sizes)
        for name in list(model.all_tied_weights_keys):
            if isinstance(model.get_submodule(name.rpartition(".")[0]), PackedLinear):
                untie(model, name)
        for prepare in config.prepare:
            prepare(model)
        files = [Path(file) for file in kwargs["checkpoint_files"]]
        # read_tensors compares the checksums
        stored = {name: tensor.shape for file in files for name, tensor in read_tensors(file)[0].items()}
        for name, tensor in model.state_dict().items():
            if name not in model.all_tied_weights_keys and stored.get(name) != tensor.shape:
                raise StoreError(
                    f"{files[0].parent} does not match its config: {name} should be {tuple(tensor.shape)} but is "
                    f"{tuple(stored[name]) if name in stored else 'missing'}"
                )

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        set_activations(model, self.quantization_config.activations)
        if self.quantization_config.bits:  # a model that is only pruned stays bit for bit what transformers computes
            speed_up_generation(model, find_blocks(model)[1])
        restore_rule(model, self.quantization_config.directory_config)
        model.save_pretrained = _Saver(model)
        if isinstance(model.get_output_embeddings(), PackedLinear):
            model.resize_token_embeddings = _refuse_resizing

    def update_weight_conversions(self, weight_conversions: list[Any], *_: Any) -> list[Any]:
        """None: the tensors have their names and shapes in memory, not those of the original's checkpoint."""
        return []

    def _dequantize(self, model: PreTrainedModel, *_: Any, **__: Any) -> PreTrainedModel:
        raise ValueError("a packed model is not decoded in place: eacmoe_lightning.load(path, packed=False) decodes it")

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False

    @property
    def is_compileable(self) -> bool:
        return True


def _refuse_resizing(*_: Any, **__: Any) -> None:
    raise ValueError(
        "resize_token_embeddings: the output head is quantized, and new tokens have no codes: "
        "eacmoe_lightning.load(path, packed=False) decodes the model"
    )


class _Saver:
    """`save_pretrained` of a packed model, which writes a compressed directory."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model

    def __call__(self, save_directory: str | Path, push_to_hub: bool = False, **_: Any) -> None:
        if push_to_hub:
            raise ValueError("push_to_hub: save the model, and upload the directory with `hf upload`")
        save_packed(save_directory, self.model)
