"""Products with packed weights through `humming-kernels` (PyPI), where that is installed: CUDA, float16 and bfloat16.

Humming compiles a kernel for each shape when it is first used and has a layout of its own for codes, so a weight is
brought into that layout at its first product and the copy is kept as long as the weight: such a model holds its codes
twice. Weights whose codes change in place (slots of offloaded experts), and single experts cut out of a stack, are
left to Triton. The pairs of a block are sorted by expert; a skipped pair lies behind the last expert's rows and an
expert without tokens has none, so neither costs anything.

Scales become the type of the activations, as Humming wants: exact in float16, rounded in bfloat16 (2^-9), which is what
weights decoded to bfloat16 lose too. What is proven, and how, stands in tests/test_humming.py: nothing ran on a GPU.
"""

from __future__ import annotations

import torch
from humming.dtypes import DataType
from humming.forward import humming_forward
from humming.schema import HummingWeightSchema
from humming.transform import prepare_and_transform_humming_tensors
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from eacmoe_lightning.quantization.grid import Bits
from eacmoe_lightning.quantization.packing import pack

ROWS, COLS = 128, 64  # of which a weight must be multiples: tiles of the kernels for SM90
GROUPS = (32, 64, 128, 256)  # inputs that share a scale

_copies = WeakTensorKeyDictionary()  # codes -> (their version, {(rows' shape and dtype): what humming_forward takes})


def takes(x: Tensor, *weights: tuple[Tensor, Tensor, int, Bits]) -> bool:
    """Whether Humming multiplies these activations by weights of these (codes, scale, in_features, bits)."""
    return x.dtype in (torch.bfloat16, torch.float16) and all(_takes_weight(*weight) for weight in weights)


def _takes_weight(codes: Tensor, scale: Tensor, in_features: int, bits: Bits) -> bool:
    is_whole = codes.nbytes == codes.untyped_storage().nbytes()
    fits = scale.shape[-2] % ROWS == 0 and in_features % COLS == 0 and in_features // scale.shape[-1] in GROUPS
    return isinstance(bits, int) and is_whole and fits and _version_when_copied(codes) == _version(codes)


def _version(codes: Tensor) -> int:
    return 0 if codes.is_inference() else codes._version  # inference tensors do not count their changes


def _version_when_copied(codes: Tensor) -> int:
    return _copies[codes][0] if codes in _copies else _version(codes)


def humming_tensors(codes: Tensor, scale: Tensor, zero_point: Tensor, bits: int, dtype: torch.dtype) -> dict:
    """A weight [..., O, I] as Humming reads it before it brings it into its own layout (`HummingWeightSchema`).

    Returns:
        weight: int32 [..., O, I * bits / 32], our codes as they are.
        weight_scale: dtype [..., O, G].
        zero_point: int32 [..., O * bits / 32, G], packed along the outputs.
    """
    zeros = pack(zero_point.transpose(-1, -2).contiguous(), bits).view(torch.int32)
    return {
        "weight": codes.view(torch.int32),
        "weight_scale": scale.to(dtype),
        "zero_point": zeros.transpose(-1, -2).contiguous(),
    }


def _copy(codes: Tensor, scale: Tensor, zero_point: Tensor, bits: int, dtype: torch.dtype) -> dict:
    """What `humming_forward` takes of a weight, made at the first call."""
    _, made = _copies.setdefault(codes, (_version(codes), {}))
    if dtype not in made:
        *experts, rows, groups = scale.shape
        in_features = codes.shape[-1] * 8 // bits
        schema = HummingWeightSchema(
            b_dtype=DataType.from_str(f"uint{bits}"),
            bs_dtype=DataType.from_torch_dtype(dtype),
            weight_scale_group_size=in_features // groups,
            has_zero_point=True,
        )
        config, tensors = prepare_and_transform_humming_tensors(
            humming_tensors(codes, scale, zero_point, bits, dtype),
            shape_n=rows,
            shape_k=in_features,
            weight_schema=schema,
            num_experts=experts[0] if experts else None,
            torch_dtype=dtype,
            device=codes.device,
        )
        locks = torch.zeros(2048, dtype=torch.int32, device=codes.device)  # of its split sums, as in HummingLayer
        made[dtype] = {"config": config, "locks": locks, **tensors}
    return made[dtype]


def linear(x: Tensor, codes: Tensor, scale: Tensor, zero_point: Tensor, bias: Tensor | None, bits: int) -> Tensor:
    """[..., I] -> [..., O], as `torch.ops.eacmoe.linear`."""
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    out = rows.new_empty(len(rows), len(scale))
    if len(rows):
        weight = _copy(codes, scale, zero_point, bits, x.dtype)
        out = humming_forward(inputs=rows, outputs=out, compute_config={"gemm_type": "dense"}, **weight)
        out = out if bias is None else out + bias.to(out.dtype)
    return out.view(*x.shape[:-1], len(scale))


def experts(x: Tensor, ids: Tensor, weights: Tensor, up: tuple, down: tuple, activate) -> Tensor:
    """All routed experts: [N, D] -> [N, D], as `torch.ops.eacmoe.experts`.

    Args:
        up, down: codes, scale, zero point, bias and bits of a stack.
        activate: [pairs, 2F or F] -> [pairs, F].
    """
    (num_tokens, top_k), num_experts = ids.shape, len(up[1])
    if not num_tokens:
        return torch.empty_like(x)
    flat = ids.flatten().long()
    flat = torch.where((flat < 0) | (flat >= num_experts), num_experts, flat)  # skipped ones come last
    order = flat.argsort(stable=True)
    expert = flat[order]
    load = torch.zeros(num_experts + 1, dtype=torch.int64, device=ids.device)
    load.scatter_add_(0, flat, torch.ones_like(flat))
    layout = torch.nn.functional.pad(load[:-1].cumsum(0), (1, 0))  # [E + 1] where the rows of each expert begin

    def multiply(rows: Tensor, codes: Tensor, scale: Tensor, zero_point: Tensor, bias: Tensor | None, bits: int):
        out = rows.new_empty(len(rows), scale.shape[-2])
        weight = _copy(codes, scale, zero_point, bits, x.dtype)
        compute = {"gemm_type": "grouped_contiguous"}
        out = humming_forward(inputs=rows, outputs=out, expert_layout=layout, compute_config=compute, **weight)
        return out if bias is None else out + bias.to(out.dtype)[expert.clamp(max=num_experts - 1)]

    hidden = activate(multiply(x[order // top_k], *up)).contiguous()
    products = multiply(hidden, *down).float() * weights.flatten()[order, None].float()
    products.masked_fill_((expert == num_experts)[:, None], 0)  # nothing was written there
    out = torch.empty_like(products).index_copy_(0, order, products)
    return out.view(num_tokens, top_k, -1).sum(1).to(x.dtype)
