"""vLLM's quantization config and the layers that run packed weights with this package's kernels."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.utils import set_weight_attrs

from eacmoe_lightning.compressed.format import METHOD
from eacmoe_lightning.runtime.packed_modules import PackedExperts
from eacmoe_lightning.serving.packed_model import (
    UNNAMED,
    PackedModel,
    PackedRows,
    check_router_options,
    check_servable,
    divisors,
    layer_number,
)
from eacmoe_lightning.skipping.stored import KEY as SKIPPING

log = logging.getLogger(__name__)

FUSED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}


class EacmoeConfig(QuantizationConfig):
    """How the layers of a compressed model are stored, for vLLM.

    Args:
        directory_config: the config.json of the compressed directory.

    Raises:
        ValueError: a server cannot run the model (`packed_model.check_servable`).
    """

    def __init__(self, directory_config: dict[str, Any]) -> None:
        super().__init__()
        check_servable(directory_config)
        if directory_config.get(SKIPPING):
            log.warning("vLLM runs every selected expert: the model's rule for skipping experts is not used")
        self.directory: Path | None = None
        self._model: PackedModel | None = None
        self._renamed: dict[str, PackedRows] | None = None
        self._mappers: list[Any] = []

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_model": None, "_renamed": None}  # each process opens the files itself

    @classmethod
    def get_name(cls) -> str:
        return METHOD

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 75

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> EacmoeConfig:
        return cls(config["directory_config"])

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        self.directory = local_directory(model_name, revision)
        if hf_config is not None:
            check_router_options(hf_config.get_text_config())

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        self._mappers.append(hf_to_vllm_mapper)
        self._renamed = None

    @property
    def model(self) -> PackedModel:
        if self._model is None:
            self._model = PackedModel(self.directory)
        return self._model

    @property
    def linears(self) -> dict[str, PackedRows]:
        """The quantized linears by vLLM's names, before it fuses them."""
        if self._renamed is None:
            self._renamed = {self._rename(name): linear for name, linear in self.model.linears.items()}
        return self._renamed

    def _rename(self, module: str) -> str:
        for mapper in self._mappers:
            module = (mapper.map_name(f"{module}.weight") or module).removesuffix(".weight")
        return module

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        if isinstance(layer, RoutedExperts):
            number = layer_number(prefix)
            return PackedExpertsMethod(layer.moe_config) if number in self.model.expert_blocks else None
        if not isinstance(layer, LinearBase):
            return None
        if not prefix:
            if self.model.source.moe.config.model_type in UNNAMED:
                return UnquantizedLinearMethod()
            raise ValueError("vLLM's model gives one of its linears no name, so it cannot be said which weight it has")
        parts = self._parts(prefix)
        quantized = [self.linears[part] for part in parts if part in self.linears]
        if not quantized:
            return UnquantizedLinearMethod()
        if len(quantized) < len(parts):
            left = next(part for part in parts if part not in self.linears)
            raise ValueError(f"vLLM fuses {', '.join(parts)} to {prefix}, but {left} is not quantized and others are")
        return PackedLinearMethod(prefix, quantized)

    def _parts(self, prefix: str) -> list[str]:
        """The linears that vLLM fuses into this one."""
        owner, _, name = prefix.rpartition(".")
        names = {**FUSED, **self.packed_modules_mapping}.get(name)
        return [f"{owner}.{part}" for part in names] if names and prefix not in self.linears else [prefix]


def local_directory(model: str, revision: str | None = None) -> Path:
    """A compressed directory: the given one, or the snapshot of a model on the hub."""
    if Path(model).is_dir():
        return Path(model)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(model, revision=revision))


class PackedLinearMethod(LinearMethodBase):
    """A linear, or several that vLLM fuses, whose weights stay packed.

    Until all weights are loaded, the rows of codes of fused linears that differ in bits are padded to the widest.
    """

    def __init__(self, prefix: str, linears: list[PackedRows]) -> None:
        self.prefix, self.linears = prefix, linears

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        for linear in self.linears:
            if input_size_per_partition % linear.group_size:
                raise ValueError(
                    f"the tensor parallel size cuts the {input_size} inputs of {self.prefix} within groups of "
                    f"{linear.group_size} that share a scale: use one of {divisors(input_size, linear.group_size)}"
                )
        layer.input_size_per_partition = input_size_per_partition
        layer.output_partition_sizes = output_partition_sizes
        out_features = sum(output_partition_sizes)
        row = input_size_per_partition // 8 * max(linear.bits for linear in self.linears)
        groups = input_size_per_partition // min(linear.group_size for linear in self.linears)
        loader = extra_weight_attrs["weight_loader"]
        for name, columns, dtype in (
            ("weight_packed", row, torch.uint8),
            ("weight_scale", groups, torch.float16),
            ("weight_zero_point", groups, torch.uint8),
        ):
            parameter = nn.Parameter(torch.empty(out_features, columns, dtype=dtype), requires_grad=False)
            is_padded = len({(linear.bits, linear.group_size) for linear in self.linears}) > 1
            attributes = {"output_dim": 0, "input_dim": 1, "weight_loader": _padded(loader) if is_padded else loader}
            set_weight_attrs(parameter, attributes)
            layer.register_parameter(name, parameter)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        in_features, rows = layer.input_size_per_partition, layer.output_partition_sizes
        layer.packed_parts = []
        if len({(linear.bits, linear.group_size) for linear in self.linears}) == 1:
            return
        start = 0
        for linear, height in zip(self.linears, rows, strict=True):
            codes, scale, zero_point = (
                getattr(layer, name)[start : start + height]
                for name in ("weight_packed", "weight_scale", "weight_zero_point")
            )
            groups = in_features // linear.group_size
            part = codes[:, : in_features // 8 * linear.bits], scale[:, :groups], zero_point[:, :groups]
            layer.packed_parts.append((*(tensor.contiguous() for tensor in part), linear.bits))
            start += height
        layer.weight_packed = nn.Parameter(layer.weight_packed[:0].clone(), requires_grad=False)
        layer.weight_scale = nn.Parameter(layer.weight_scale[:0].clone(), requires_grad=False)
        layer.weight_zero_point = nn.Parameter(layer.weight_zero_point[:0].clone(), requires_grad=False)

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        if not layer.packed_parts:
            tensors = layer.weight_packed, layer.weight_scale, layer.weight_zero_point
            return torch.ops.eacmoe.linear(x, *tensors, bias, self.linears[0].bits, False)
        outputs = [torch.ops.eacmoe.linear(x, *part[:-1], None, part[-1], False) for part in layer.packed_parts]
        out = torch.cat(outputs, -1)
        return out if bias is None else out + bias


def _padded(loader: Callable[..., None]) -> Callable[..., None]:
    """A weight loader of vLLM's that takes rows that are shorter than the parameter's."""

    def load(parameter: Tensor, loaded: Tensor, *shard: Any) -> None:
        loader(parameter, nn.functional.pad(loaded, (0, parameter.shape[1] - loaded.shape[1])), *shard)

    return load


class PackedExpertsMethod(FusedMoEMethodBase):
    """The routed experts of a block, packed. `vllm_loader.py` gives the layer its `packed_experts`."""

    def create_weights(
        self,
        layer: RoutedExperts,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        if layer.use_ep:
            raise ValueError("packed experts are not spread over processes: serve without --enable-expert-parallel")
        if layer.apply_router_weight_on_input and layer.top_k != 1:
            raise ValueError("vLLM scales the experts' input by several routing weights, which packed experts cannot")

    def get_fused_moe_quant_config(self, layer: RoutedExperts) -> None:
        return None

    def apply(
        self,
        layer: RoutedExperts,
        x: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        shared_experts: Any,
        shared_experts_input: Tensor | None,
    ) -> Tensor:
        if layer.apply_router_weight_on_input:
            x, topk_weights = x * topk_weights.to(x.dtype), torch.ones_like(topk_weights)
        experts: PackedExperts = layer.packed_experts
        if experts.activation is not None:
            return experts(x, topk_ids, topk_weights)
        return torch.ops.eacmoe_serving.experts(x, topk_ids, topk_weights, layer.layer_name)


# Gating of the model's own runs expert by expert, which torch.compile cannot trace: to it, this is one operator.
OWN_GATING: dict[str, PackedExperts] = {}  # by layer name


@torch.library.custom_op("eacmoe_serving::experts", mutates_args=())
def _own_gating(x: Tensor, ids: Tensor, weights: Tensor, layer_name: str) -> Tensor:
    return OWN_GATING[layer_name](x, ids, weights)


@_own_gating.register_fake
def _(x: Tensor, ids: Tensor, weights: Tensor, layer_name: str) -> Tensor:
    return torch.empty_like(x)
