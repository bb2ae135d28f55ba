"""Modules whose weights stay packed: a linear layer, and the routed experts of a block.

They replace a model's modules under the same names: `q_proj.weight` becomes a `PackedWeight` with the buffers
`q_proj.weight.codes`, `.scale` and `.zero_point`, the names of the tensors on disk. An output head is such a linear
too. If the embedding is tied to it, the embedding holds the packed weight, looks its rows up there and decodes those
alone.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers.activations import ACT2CLS

from eacmoe_lightning.models.head import output_head
from eacmoe_lightning.models.transformers_loader import auto_class
from eacmoe_lightning.models.transformers_modules import has_default_gate, post_expert_norm
from eacmoe_lightning.quantization.grid import Bits, Quantized
from eacmoe_lightning.quantization.packing import expert_codes, packed, unpack
from eacmoe_lightning.runtime import kernels
from eacmoe_lightning.runtime.kernels import loop_over_experts

ACTIVATION_NAMES = {  # the kernels' names -> those of transformers
    "silu": ("silu", "swish"),
    "gelu": ("gelu", "gelu_python"),
    "gelu_tanh": ("gelu_new", "gelu_pytorch_tanh", "gelu_fast"),
    "relu": ("relu",),
}


class PackedWeight(nn.Module):
    """Codes, scales and zero points of one weight or of a stack of weights (`quantization.packing.packed`).

    Args:
        shape: shape [..., O, I] of the weight.
        bits: 2 to 8; or the bits of each expert of a stack [E, O, I], whose codes are then flat, one expert after
            another.
        group_size: number of input features that share a scale.
        dtype: of the weight that is packed, which some models ask their layers for.

    The buffers keep their dtypes under `.to(dtype)`, `.half()` and the like; `dtype` follows.
    """

    codes: Tensor  # [..., O, I / 8 * bits] or [sum over experts of O * I / 8 * bits], uint8
    scale: Tensor  # [..., O, I / group_size] float16
    zero_point: Tensor  # [..., O, I / group_size] uint8
    _is_hf_initialized = True  # transformers would draw values for the weight of an embedding

    def __init__(
        self,
        shape: torch.Size | tuple[int, ...],
        bits: Bits,
        group_size: int,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.shape, self.bits, self.group_size, self.dtype = torch.Size(shape), bits, group_size, dtype
        *rows, in_features = shape
        groups = in_features // group_size
        row = in_features // 8  # bytes of a row per bit of width
        packed = (*rows, row * bits) if isinstance(bits, int) else (rows[-1] * row * sum(bits),)
        self.register_buffer("codes", torch.empty(packed, dtype=torch.uint8))
        self.register_buffer("scale", torch.empty(*rows, groups, dtype=torch.float16))
        self.register_buffer("zero_point", torch.empty(*rows, groups, dtype=torch.uint8))

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The decoded weight [..., O, I], as `Quantized.dequantize` gives it."""
        return self.quantized().dequantize(dtype)

    def quantized(self) -> Quantized:
        return Quantized(unpack(self.codes, self.bits, self.shape[-1]), self.scale, self.zero_point, self.bits)

    def rows(self, ids: Tensor) -> Tensor:
        """Rows of a weight [O, I], decoded: ids [...] -> [..., I] in `dtype`."""
        codes, scale, zero_point = (part.index_select(0, ids.flatten()) for part in self.tensors)
        rows = Quantized(unpack(codes, self.bits, self.shape[-1]), scale, zero_point, self.bits).dequantize(self.dtype)
        return rows.view(*ids.shape, -1)

    def __getitem__(self, index: Any) -> Tensor:
        """Of a weight [O, I], decoded, as some models read their embedding's weight; one row is decoded alone."""
        first, *rest = index if isinstance(index, tuple) else (index,)
        if not isinstance(first, int):
            return self.dequantize(self.dtype)[index]
        return self.rows(torch.tensor(range(self.shape[0])[first], device=self.device))[tuple(rest)]

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        buffers = self._buffers  # at decode torch's way to an attribute takes longer than a small product
        return buffers["codes"], buffers["scale"], buffers["zero_point"]

    @property
    def widths(self) -> list[int]:
        """The bits: one number for all experts, or one per expert."""
        return [self.bits] if isinstance(self.bits, int) else list(self.bits)

    def expert(self, e: int) -> tuple[Tensor, Tensor, Tensor, int]:
        """Codes, scale, zero point and bits of one expert of a stack."""
        codes = expert_codes(self.codes, self.bits, e, self.shape[-1])
        return codes, self.scale[e], self.zero_point[e], self.bits if isinstance(self.bits, int) else self.bits[e]

    @property
    def device(self) -> torch.device:
        return self.codes.device

    def _apply(self, fn, recurse=True):
        def keep_dtype(tensor: Tensor) -> Tensor:  # fn may convert floats; as int16 the scale keeps its bits
            return fn(tensor.view(torch.int16)).view(torch.float16) if tensor.dtype == torch.float16 else fn(tensor)

        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.device)).dtype
        return super()._apply(keep_dtype, recurse)

    def extra_repr(self) -> str:
        return f"{tuple(self.shape)}, bits={self.bits}, group_size={self.group_size}"


class PackedLinear(nn.Module):
    """An `nn.Linear` whose weight is packed: [..., I] -> [..., O].

    Attributes:
        int8: whether activations are rounded to 8 bits per token and group; only CPUs with AVX2 or AVX512 do it.
    """

    int8 = False

    def __init__(self, linear: nn.Linear, bits: int, group_size: int) -> None:
        super().__init__()
        self.weight = PackedWeight(linear.weight.shape, bits, group_size, linear.weight.dtype)
        self.bias = linear.bias

    @property
    def in_features(self) -> int:
        return self.weight.shape[1]

    @property
    def out_features(self) -> int:
        return self.weight.shape[0]

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight
        return kernels.linear(x, *weight.tensors, self.bias, weight.bits, self.int8)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class TiedLinear(PackedLinear):
    """An output head whose packed weight is that of the embedding, which holds its buffers."""

    def __init__(self, linear: nn.Linear, weight: PackedWeight) -> None:
        nn.Module.__init__(self)
        self.of_embedding = (weight,)  # a tuple, so that state dicts have its buffers once
        self.bias = linear.bias

    @property
    def weight(self) -> PackedWeight:
        return self.of_embedding[0]


def packed_embedding(embedding: nn.Embedding, weight: PackedWeight) -> nn.Embedding:
    """A copy of an embedding that decodes the rows that it looks up: ids [...] -> [..., D].

    What its class does besides (a factor, a norm) stays. The embedding itself is left as it is.
    """
    packed = copy.copy(embedding)
    packed._buffers, packed._modules = dict(embedding._buffers), dict(embedding._modules)
    packed._parameters = {name: p for name, p in embedding._parameters.items() if name != "weight"}
    packed.weight = weight
    packed.forward = partial(_look_up, packed)
    return packed


def _look_up(embedding: nn.Embedding, ids: Tensor) -> Tensor:
    rows = embedding.weight.rows(ids)
    if type(embedding) is nn.Embedding:
        return rows
    looked_up = copy.copy(embedding)  # with a table of these rows alone
    vars(looked_up).update(weight=rows.reshape(-1, rows.shape[-1]), padding_idx=None)
    return type(embedding).forward(looked_up, torch.arange(ids.numel(), device=ids.device).view(ids.shape))


class PackedExperts(nn.Module):
    """The routed experts of a block, packed: (hidden [N, D], ids [N, K], weights [N, K]) -> [N, D].

    A pair of a token with the id num_experts is skipped at no cost.

    Args:
        experts: the transformers module that is replaced; its parameters are taken out of it. If it has gating that
            the kernels lack, that gating stays in use.
        grids: bits and group size by projection.
    """

    def __init__(self, experts: nn.Module, grids: dict[str, tuple[Bits, int]]) -> None:
        super().__init__()
        self.num_experts, self.int8 = len(experts.down_proj), False
        self.has_gate, self.has_bias, self.is_transposed = experts.has_gate, experts.has_bias, False
        self.up_name = "gate_up_proj" if self.has_gate else "up_proj"
        for name in (self.up_name, "down_proj"):
            weight = getattr(experts, name)
            shape = weight.transpose(1, 2).shape if experts.is_transposed else weight.shape
            setattr(self, name, PackedWeight(shape, *grids[name]))
        for name, parameter in list(experts.named_parameters(recurse=False)):
            if name not in grids:  # biases
                self.register_parameter(name, parameter)
            delattr(experts, name)
        self.original = (experts,)  # for its gating; a tuple, since transformers would initialise a submodule
        self.post_expert_norm = post_expert_norm(experts)
        self.activation = _activation_name(experts)

    def _bias(self, name: str) -> Tensor | None:
        return getattr(self, f"{name}_bias") if self.has_bias else None

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        x = hidden_states.reshape(-1, hidden_states.shape[-1])
        if self.activation is not None:
            up, down = getattr(self, self.up_name), self.down_proj
            up = *up.tensors, self._bias(self.up_name), up.widths
            down = *down.tensors, self._bias("down_proj"), down.widths
            options = self.has_gate, self.activation, self.int8
            out = kernels.experts(x, top_k_index, top_k_weights, *up, *down, *options)
        else:
            out = loop_over_experts(x, top_k_index, top_k_weights, self.num_experts, self._expert)
        return out.view(hidden_states.shape)

    def _expert(self, e: int, x: Tensor) -> Tensor:
        """One expert, with the gating and the norm of the original module: [n, D] -> [n, D]."""
        hidden = self._multiply(self.up_name, e, x)
        (experts,) = self.original
        hidden = experts._apply_gate(hidden) if self.has_gate else experts.act_fn(hidden)
        out = self._multiply("down_proj", e, hidden)
        return out if self.post_expert_norm is None else self.post_expert_norm(out)

    def _multiply(self, name: str, e: int, x: Tensor) -> Tensor:
        *tensors, bits = getattr(self, name).expert(e)
        bias = self._bias(name)
        return kernels.linear(x, *tensors, None if bias is None else bias[e], bits, self.int8)


def _activation_name(experts: nn.Module) -> str | None:
    """The kernels' name of the activation; None if they lack the activation, the gating or a norm that follows."""
    if (experts.has_gate and not has_default_gate(experts)) or post_expert_norm(experts) is not None:
        return None
    return activation_name(experts.act_fn)


def activation_name(function: nn.Module) -> str | None:
    """The kernels' name of an activation of transformers; None if they lack it."""
    for kernel_name, names in ACTIVATION_NAMES.items():
        for name in names:
            activation = ACT2CLS[name]  # a class, or a class with its arguments
            if type(function) is (activation[0] if isinstance(activation, tuple) else activation):
                return kernel_name
    return None


def pack_modules(model: nn.Module, bits: dict[str, int | list[int]], group_sizes: dict[str, int]) -> None:
    """Replaces the modules of the weights that `bits` names with packed modules, whose buffers are not filled yet.

    With the weight of an embedding, the output head that is tied to it is packed too.

    Args:
        model: on any device; on `meta` nothing is allocated.
        bits, group_sizes: by parameter name; a list holds the bits of each expert.

    Raises:
        ValueError: the model lacks a parameter, or has another number of experts.
    """
    stacks: dict[str, dict[str, tuple[Bits, int]]] = {}
    for name in bits:
        owner, _, parameter = name.rpartition(".")
        try:
            module = model.get_submodule(owner)
            getattr(module, parameter)
        except AttributeError as error:
            raise ValueError(
                f"{name} is listed as quantized, but {type(model).__name__} has no such parameter: a compressed "
                f"directory opens as its causal language model ({auto_class(model.config).__name__}, or "
                "eacmoe_lightning.load)"
            ) from error
        width = bits[name]
        if not isinstance(width, int):
            num_experts = 0 if isinstance(module, nn.Linear) else len(getattr(module, parameter))
            if num_experts != len(width):
                raise ValueError(f"{name} has bits for {len(width)} experts, but the model has {num_experts} there")
        grid = width if isinstance(width, int) else tuple(width), group_sizes[name]
        if isinstance(module, nn.Linear):
            with module.weight.device:
                model.set_submodule(owner, PackedLinear(module, *grid))
        elif isinstance(module, nn.Embedding):
            with module.weight.device:
                weight = PackedWeight(module.weight.shape, *grid, module.weight.dtype)
            head = output_head(model).module
            tied = TiedLinear(model.get_submodule(head), weight)
            model.set_submodule(owner, packed_embedding(module, weight))
            model.set_submodule(head, tied)
        else:
            stacks.setdefault(owner, {})[parameter] = grid
    for owner, grids in stacks.items():
        experts = model.get_submodule(owner)
        with experts.down_proj.device:
            model.set_submodule(owner, PackedExperts(experts, grids))


@contextmanager
def packed_in_place(model: nn.Module, quantized: dict[str, Quantized]) -> Iterator[None]:
    """Packs the modules of these weights, by parameter name, inside the `with` block."""
    bits = {
        name: weight.bits if isinstance(weight.bits, int) else list(weight.bits) for name, weight in quantized.items()
    }
    owners = {name.rpartition(".")[0] for name in quantized}
    if any(isinstance(model.get_submodule(owner), nn.Embedding) for owner in owners):
        owners.add(output_head(model).module)
    before = {owner: model.get_submodule(owner) for owner in owners}
    parameters = {owner: dict(module.named_parameters(recurse=False)) for owner, module in before.items()}
    try:
        pack_modules(model, bits, {name: weight.group_size for name, weight in quantized.items()})
        for name, weight in quantized.items():
            module = model.get_submodule(name)
            for kind, tensor in packed({name: weight}).items():
                getattr(module, kind.rpartition(".")[2]).copy_(tensor)
        yield
    finally:
        for owner, module in before.items():
            model.set_submodule(owner, module)
            for name, parameter in parameters[owner].items():  # packed experts take them out
                module.register_parameter(name, parameter)


def packed_weights(model: nn.Module) -> Iterator[tuple[str, PackedWeight]]:
    """Every packed weight with its parameter name."""
    for name, module in model.named_modules():
        if isinstance(module, PackedWeight):
            yield name, module


def set_activations(model: nn.Module, activations: Literal["exact", "int8"]) -> None:
    """Sets whether packed modules use their inputs unchanged or rounded to 8 bits per token and group.

    Raises:
        ValueError: `activations` is neither `exact` nor `int8`.
    """
    if activations not in ("exact", "int8"):
        raise ValueError(f"activations={activations!r} is neither 'exact' nor 'int8'")
    for module in model.modules():
        if isinstance(module, PackedLinear | PackedExperts):
            module.int8 = activations == "int8"
