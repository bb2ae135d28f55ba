"""A block's routed experts, fetched when a token needs them: (hidden [N, D], ids [N, K], weights [N, K]) -> [N, D].

They replace transformers' experts module, or `PackedExperts`, and run that module's computation on weights from the
cache. Dense experts give the same bits as without offloading. Packed experts are summed in the order of their slots,
which may change the last bits. An id of num_experts skips its pair; experts that only skipped pairs select are never
fetched.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from eacmoe_lightning.models.transformers_modules import (
    eager_experts,
    experts_implementation,
    post_expert_norm,
    run_experts,
)
from eacmoe_lightning.offload.cache import ExpertCache, Weights, Window, slot_table
from eacmoe_lightning.offload.jobs import PACKED_NAMES
from eacmoe_lightning.runtime.kernels import loop_over_experts
from eacmoe_lightning.runtime.packed_modules import PackedExperts

Predict = Callable[[int, Tensor], None]  # prefetches for the block after this one, given this one's hidden states


class OffloadedExperts(nn.Module):
    """Experts of one block in the cache.

    Args:
        experts: the module to replace; its stacked weights are removed, its biases stay.
        projections: names of its weights.
        block: index of the decoder block.
        cache: holds experts of these shapes.
        predict: called with the block's index and hidden states [N, D] once the fetches of its experts have started.
    """

    def __init__(
        self, experts: nn.Module, projections: tuple[str, ...], block: int, cache: ExpertCache, predict: Predict
    ) -> None:
        super().__init__()
        self.num_experts = experts.num_experts
        self.has_gate, self.has_bias, self.is_transposed = experts.has_gate, experts.has_bias, experts.is_transposed
        self.block, self.projections = block, projections
        self.has_warned = False
        self.stack_shape, self.dtype = tuple(experts.down_proj.shape), experts.down_proj.dtype
        for projection in projections:
            delattr(experts, projection)
        for name, bias in list(experts.named_parameters(recurse=False)):
            self.register_parameter(name, bias)
        self.unregistered = (experts, cache, predict)  # a tuple, so that nn.Module neither saves nor moves them

    @property
    def inner(self) -> nn.Module:
        return self.unregistered[0]

    @property
    def cache(self) -> ExpertCache:
        return self.unregistered[1]

    @property
    def down_proj(self) -> Tensor:
        """A meta tensor of the stack's shape: `MoEModel` recognizes experts by it."""
        return torch.empty(self.stack_shape, device="meta")

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise TypeError(
            "an offloaded model cannot be copied or pickled, because its experts are in a store on disk: call "
            "load_offloaded once more for another one"
        )

    def _apply(self, convert: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        """nn.Module's, for biases; experts in the store keep the dtype in which they were loaded.

        Raises:
            ValueError: `convert` changes their dtype.
        """
        converted = convert(torch.empty(0, dtype=self.dtype)).dtype
        if converted != self.dtype and not isinstance(self.inner, PackedExperts):
            raise ValueError(
                f"experts in the store are {self.dtype} and do not become {converted}: pass dtype= to load_offloaded"
            )
        return super()._apply(convert, recurse)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        _, cache, predict = self.unregistered
        rows, needed = hidden_states.reshape(-1, hidden_states.shape[-1]), self.needed(top_k_index)
        with cache.fetcher.lock, cache.window(self.block, needed) as window:
            predict(self.block, rows)
            out = self.compute(window, rows, top_k_index, top_k_weights)
        return out.view(hidden_states.shape)

    def needed(self, ids: Tensor) -> list[int]:
        """The experts that at least one pair runs, by index; warns once if the cache cannot hold them all."""
        needed = [expert for expert in ids.unique().tolist() if 0 <= expert < self.num_experts]
        cache = self.cache
        if len(needed) > cache.capacity:
            cache.counters.passes += 1
            if not self.has_warned:
                self.has_warned = True
                warnings.warn(
                    f"block {self.block} needs {len(needed)} experts at once, but the cache holds {cache.capacity}: "
                    "it runs them in several passes and decodes them again each time, which is slower. All experts of "
                    f"a block take {cache.expert_bytes * self.num_experts} bytes (cache_bytes)",
                    stacklevel=2,
                )
        return needed

    def compute(self, window: Window, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """Runs the experts implementation that the config names, or one that gives the same bits as `grouped_mm`.

        On CPU, `grouped_mm` spends time on every slot, whether or not a token needs it.
        """
        experts, cache = self.inner, window.cache
        experts._parameters.update(self._parameters)  # biases may have been loaded or moved since
        implementation = experts_implementation(experts)
        if implementation == "eager" or self.has_bias:
            for projection in self.projections:
                self._set(projection, Weights(window, projection))
            return eager_experts(experts, x, ids, weights)
        if not window.fits or (implementation == "grouped_mm" and x.device.type == "cpu"):
            return self._one_by_one(window, x, ids, weights)
        table = slot_table(window, self.num_experts, x.device)
        for projection in self.projections:
            self._set(projection, *cache.slots.stack(projection))
        experts.num_experts = cache.capacity  # the id S is skipped
        try:
            return run_experts(implementation, experts, x, table[ids], weights)
        finally:
            experts.num_experts = self.num_experts

    def _one_by_one(self, window: Window, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """Runs one expert after another, then sums over each token's pairs, as `grouped_mm` does."""
        experts = self.inner
        sorted_ids, order = torch.sort(ids.reshape(-1))  # [N * K], an expert's tokens in the order of `grouped_mm`
        up, down = (Weights(window, projection) for projection in self.projections)
        pairs = x.new_zeros(len(sorted_ids), x.shape[-1])  # a skipped pair stays zero
        for expert in window.experts:
            selected = order[sorted_ids == expert]
            hidden = x[selected // ids.shape[-1]] @ self._as_matrix(up[expert])
            hidden = experts._apply_gate(hidden) if self.has_gate else experts.act_fn(hidden)
            pairs[selected] = hidden @ self._as_matrix(down[expert])
        if (norm := post_expert_norm(experts)) is not None:
            pairs = norm(pairs)
        weighted = pairs * weights.reshape(-1, 1)
        return weighted.view(len(x), ids.shape[-1], -1).sum(1).to(x.dtype)

    def _as_matrix(self, weight: Tensor) -> Tensor:
        """The weight as [I, O]."""
        return weight if self.is_transposed else weight.t()

    def _set(self, projection: str, weight: Any) -> None:
        self.inner.__dict__[projection] = weight  # past nn.Module, which would register it: the cache owns it

    def extra_repr(self) -> str:
        return f"block={self.block}, num_experts={self.num_experts}, slots={self.cache.capacity}"


class OffloadedPackedExperts(OffloadedExperts):
    """The same for `PackedExperts`: codes stay packed in the cache, and the kernels run on them there."""

    def __init__(
        self, experts: PackedExperts, projections: tuple[str, ...], block: int, cache: ExpertCache, predict: Predict
    ) -> None:
        weights = {projection: getattr(experts, projection) for projection in projections}
        super().__init__(experts, projections, block, cache, predict)
        self.expert_bits: dict[str, tuple[int, ...]] = {}  # for projections whose experts differ in bits
        for projection, weight in weights.items():
            tensors = cache.slots.stack(projection)
            if not isinstance(weight.bits, int):
                self.expert_bits[projection] = weight.bits
                self._set(projection, MixedStack(tensors, weight.shape[-1]))
                continue
            stack = copy.copy(weight)
            stack._buffers = dict(zip(PACKED_NAMES, tensors, strict=True))
            stack.shape = torch.Size((cache.capacity, *weight.shape[1:]))
            self._set(projection, stack)
        experts.num_experts = cache.capacity

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        _, cache, predict = self.unregistered
        rows, needed = hidden_states.reshape(-1, hidden_states.shape[-1]), self.needed(top_k_index)
        out = None
        for start in range(0, max(len(needed), 1), cache.capacity):
            with cache.fetcher.lock, cache.window(self.block, needed[start : start + cache.capacity]) as window:
                if start + cache.capacity >= len(needed):
                    predict(self.block, rows)
                ids = slot_table(window, self.num_experts, rows.device)[top_k_index]
                part = self._run(window, rows, ids, top_k_weights)
            out = part if out is None else out.float() + part.float()
        return out.to(rows.dtype).view(hidden_states.shape)

    def _run(self, window: Window, x: Tensor, slots: Tensor, weights: Tensor) -> Tensor:
        if self.has_bias:
            held = torch.zeros(window.cache.capacity, dtype=torch.long)  # the expert of each slot
            held[torch.tensor(window.slots(), dtype=torch.long)] = torch.tensor(window.experts, dtype=torch.long)
            held = held.to(x.device)
            self.inner._parameters.update({name: bias[held] for name, bias in self._parameters.items()})
        if not self.expert_bits:
            return self.inner(x, slots, weights)
        for projection, bits in self.expert_bits.items():
            for expert, slot in zip(window.experts, window.slots(), strict=True):
                getattr(self.inner, projection).bits[slot] = bits[expert]
        return loop_over_experts(x, slots, weights, window.cache.capacity, self.inner._expert)


class MixedStack:
    """Stands in for a `PackedWeight` whose slots hold experts of different bits; each has room for the widest."""

    def __init__(self, tensors: tuple[Tensor, Tensor, Tensor], in_features: int) -> None:
        self.codes, self.scale, self.zero_point = tensors  # [S, bytes], [S, O, G], [S, O, G]
        self.in_features, self.bits = in_features, {}  # bits of each slot's expert

    def expert(self, slot: int) -> tuple[Tensor, Tensor, Tensor, int]:
        """Codes, scale, zero point and bits of a slot."""
        bits, rows = self.bits[slot], self.scale.shape[1]
        codes = self.codes[slot, : rows * self.in_features // 8 * bits].view(rows, -1)
        return codes, self.scale[slot], self.zero_point[slot], bits
