"""vLLM's loader for the load format `auto`, which also reads compressed directories."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from vllm.distributed import get_pp_group, get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbeddingBase
from vllm.model_executor.model_loader import DefaultModelLoader
from vllm.platforms import current_platform

from eacmoe_lightning.compressed.format import METHOD
from eacmoe_lightning.run.files import StoreError, first_of
from eacmoe_lightning.runtime.packed_modules import PackedExperts
from eacmoe_lightning.serving.packed_model import PackedModel, layer_number, shard_experts
from eacmoe_lightning.serving.vllm_layers import OWN_GATING, PackedExpertsMethod, PackedLinearMethod, local_directory


class EacmoeLoader(DefaultModelLoader):
    """vLLM's own loader for every other model; a compressed directory is given to the model as its original's."""

    def download_model(self, model_config: Any) -> None:
        if model_config.quantization == METHOD:
            local_directory(model_config.model, model_config.revision)
        else:
            super().download_model(model_config)

    def load_weights(self, model: nn.Module, model_config: Any) -> None:
        """Loads all weights.

        Raises:
            StoreError: a tensor is missing, or a file is truncated or altered.
            ValueError: the tensor parallel size cuts a group, or vLLM's model has no place for a quantized weight.
        """
        self._experts: dict[int, PackedExperts] = {}
        if model_config.quantization != METHOD:
            super().load_weights(model, model_config)
            return
        missing = _Unfilled(model)
        super().load_weights(model, model_config)
        missing.check()
        for layer in model.modules():
            if isinstance(layer, RoutedExperts) and isinstance(layer.quant_method, PackedExpertsMethod):
                self._fill(layer)
        if self._experts and get_pp_group().world_size == 1:
            raise ValueError(f"{type(model).__name__} of vLLM has no routed experts in the layers {[*self._experts]}")
        if model_config.use_mla and current_platform.is_cpu():
            _rotate_in_torch(model)

    def get_all_weights(self, model_config: Any, model: nn.Module) -> Iterable[tuple[str, Tensor]]:
        if model_config.quantization != METHOD:
            return super().get_all_weights(model_config, model)
        self.counter_before_loading_weights = time.perf_counter()
        directory = local_directory(model_config.model, model_config.revision)
        dtype = str(model_config.dtype).removeprefix("torch.")
        return PackedModel(directory, dtype).tensors(self._experts)

    def _fill(self, layer: RoutedExperts) -> None:
        """Gives a layer its experts."""
        experts = self._experts.pop(layer_number(layer.layer_name))
        if experts.num_experts != layer.local_num_experts:
            raise ValueError(
                f"{layer.layer_name} has {layer.local_num_experts} experts in vLLM, and {experts.num_experts} in the "
                "compressed directory"
            )
        rank, size = get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()
        device = torch.get_default_device()  # vLLM loads within its device's context
        layer.packed_experts = shard_experts(experts, rank, size).to(device)
        OWN_GATING[layer.layer_name] = layer.packed_experts


def _rotate_in_torch(model: nn.Module) -> None:
    """Has rotations computed by torch, as they are when vLLM compiles the model.

    With --enforce-eager vLLM 0.32 uses its operator for CPUs, which rotates queries [T, heads, D] wrongly; those of
    latent attention have that shape.
    """
    for module in model.modules():
        if isinstance(module, RotaryEmbeddingBase):
            module._forward_method = module.forward_native


class _Unfilled:
    """Which packed linears of a model the loader has not filled."""

    def __init__(self, model: nn.Module) -> None:
        self.rows: dict[str, int] = {}
        for name, layer in model.named_modules():
            if isinstance(getattr(layer, "quant_method", None), PackedLinearMethod):
                for kind, parameter in layer.named_parameters(recurse=False):
                    if kind.startswith("weight_"):
                        self._watch(f"{name}.{kind}", parameter)

    def _watch(self, name: str, parameter: nn.Parameter) -> None:
        self.rows[name] = len(parameter)
        loader = parameter.weight_loader

        def load(target: Tensor, loaded: Tensor, *shard: Any) -> None:
            loader(target, loaded, *shard)
            self.rows[name] -= len(loaded)

        parameter.weight_loader = load

    def check(self) -> None:
        """Raises StoreError if a parameter lacks rows; with several processes each of them has a part of the rows."""
        if missing := [name for name, rows in self.rows.items() if rows > 0]:
            raise StoreError(f"the compressed directory has no tensors for {first_of(missing, 'parameter')}")
