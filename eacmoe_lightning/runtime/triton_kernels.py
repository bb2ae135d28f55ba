"""Products with packed weights on GPUs: one Triton kernel for linears and for all routed experts of a block.

The (token, choice) pairs are sorted by expert on the device and cut into blocks of one expert each; a program
multiplies one block by some outputs of its expert, whose codes it unpacks on the way. So a skipped pair is in no block,
and an expert without tokens is not read. Codes less zero points are small integers, exact in bfloat16 and float16:
products are exact, sums in float32, scales are applied per group. Nothing waits for the GPU.

What is proven, and how, stands in tests/test_triton.py: results under Triton's interpreter, and compilation for sm_80
and sm_90. Imported only where Triton is.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from eacmoe_lightning.quantization.grid import Bits

BLOCK_N = 64  # outputs of a program
FEW, MANY = 16, 64  # pairs of a program: the least that matrix instructions take; from MANY pairs an expert on


@triton.jit(do_not_specialize=["num_pairs"])  # else compiled anew for numbers of tokens that are multiples of 16
def multiply(
    x,  # [N, I]
    codes,
    scale,  # [E, O, I / GROUP] float16
    zero,  # [E, O, I / GROUP] uint8
    bias,  # [E, O] float32, if HAS_BIAS
    weights,  # [pairs] float32, if WEIGHTED
    out,  # [pairs, O]
    pairs,  # [blocks * BLOCK_M] int64, num_pairs where a block is not full
    block_expert,  # [blocks], E behind the last block
    widths,  # [E] bits, if BITS is 0
    places,  # [E] int64 where the codes of each begin, if BITS is 0
    num_pairs,
    top_k,
    num_experts,
    O: tl.constexpr,  # noqa: E741
    I: tl.constexpr,  # noqa: E741
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    WEIGHTED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,  # divides GROUP
):
    """out[pair] = x[pair // top_k] times its expert's weight."""
    block = tl.program_id(0)
    expert = tl.load(block_expert + block).to(tl.int64)
    if expert >= num_experts:
        return
    if BITS == 0:
        bits = tl.load(widths + expert).to(tl.int32)
        codes += tl.load(places + expert)
    else:
        bits = BITS
        codes += expert * (O * (I // 8) * BITS)
    m = tl.load(pairs + block * BLOCK_M + tl.arange(0, BLOCK_M))
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    here, there = m < num_pairs, n < O
    x_rows = x + (m // top_k)[:, None] * I
    code_rows = codes + n.to(tl.int64)[None, :] * (I // 8 * bits)
    groups = (expert * O + n) * (I // GROUP)
    sums = tl.full((BLOCK_M, BLOCK_N), 0.0, tl.float32)
    for start in range(0, I, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        tokens = tl.load(x_rows + k[None, :], mask=here[:, None], other=0.0)  # [M, K]
        bit = k * bits
        shift = (bit & 7)[:, None]
        at = code_rows + (bit >> 3)[:, None]
        word = tl.load(at, mask=there[None, :], other=0).to(tl.int32)  # [K, N]
        if BITS != 2 and BITS != 4 and BITS != 8:  # a code may reach into the next byte
            word |= tl.load(at + 1, mask=there[None, :] & (shift + bits > 8), other=0).to(tl.int32) << 8
        code = (word >> shift) & ((1 << bits) - 1)
        group = groups + start // GROUP
        steps = code - tl.load(zero + group, mask=there, other=0).to(tl.int32)[None, :]
        product = tl.dot(tokens, steps.to(tokens.dtype), input_precision="ieee")
        sums += product * tl.load(scale + group, mask=there, other=0.0).to(tl.float32)[None, :]
    if HAS_BIAS:
        sums += tl.load(bias + expert * O + n, mask=there, other=0.0)[None, :]
    if WEIGHTED:
        sums *= tl.load(weights + m, mask=here, other=0.0)[:, None]
    place = out + m[:, None] * O + n[None, :]
    tl.store(place, sums.to(out.dtype.element_ty), mask=here[:, None] & there[None, :])


def takes(x: Tensor, *weights: tuple[Tensor, Tensor, int, Bits]) -> bool:
    """Whether the kernel takes these activations and weights (codes, scale, in_features, bits): groups of 16 n."""
    groups = (in_features // scale.shape[-1] for _, scale, in_features, _ in weights)
    return x.dtype in (torch.float32, torch.bfloat16, torch.float16) and all(group % 16 == 0 for group in groups)


class Schedule:
    """(token, choice) pairs in blocks of one expert each, made on the device.

    Args:
        ids: [N, K]; one outside 0 .. num_experts - 1 skips its pair.
        block: pairs of a block.
    """

    def __init__(self, ids: Tensor, num_experts: int, block: int) -> None:
        flat = ids.flatten().long()
        self.block, self.num_pairs, self.num_experts = block, len(flat), num_experts
        flat = torch.where((flat < 0) | (flat >= num_experts), num_experts, flat)  # skipped ones come last
        order = flat.argsort(stable=True)
        load = torch.zeros(num_experts + 1, dtype=torch.int64, device=ids.device)
        load.scatter_add_(0, flat, torch.ones_like(flat))
        ends = ((load[:-1] + block - 1) // block).cumsum(0)  # [E] in blocks
        begin = torch.nn.functional.pad(ends, (1, 0)) * block  # [E + 1] where each one's pairs begin
        expert = flat[order]
        place = begin[expert] + torch.arange(len(flat), device=ids.device) - (load.cumsum(0) - load)[expert]
        self.num_blocks = len(flat) // block + min(num_experts, len(flat))  # at most; known without waiting
        self.pairs = torch.full((self.num_blocks * block + len(flat),), len(flat), device=ids.device)
        self.pairs[place] = order
        self.expert = torch.searchsorted(ends, torch.arange(self.num_blocks, device=ids.device), right=True)


def grouped(
    x: Tensor,
    schedule: Schedule,
    top_k: int,
    weight: tuple[Tensor, Tensor, Tensor],
    bias: Tensor | None,
    bits: Bits,
    out: Tensor,
    weights: Tensor | None = None,
) -> Tensor:
    """Fills out [pairs, O], where not skipped, with x[pair // top_k] times the expert's weight.

    Args:
        weight: codes, scale and zero point of a stack of experts.
        weights: [pairs], by which results are multiplied.
    """
    codes, scale, zero_point = weight
    num_experts, rows, groups = scale.shape
    in_features = x.shape[-1]
    group = in_features // groups
    if isinstance(bits, int):
        widths = places = schedule.expert  # not read
    else:
        widths, places = widths_and_places(bits, rows * in_features // 8, x.device)
    multiply[(schedule.num_blocks, triton.cdiv(rows, BLOCK_N))](
        *(x, codes, scale, zero_point, scale if bias is None else bias, scale if weights is None else weights, out),
        *(schedule.pairs, schedule.expert, widths, places, schedule.num_pairs, top_k, num_experts),
        O=rows,
        I=in_features,
        BITS=bits if isinstance(bits, int) else 0,
        GROUP=group,
        HAS_BIAS=bias is not None,
        WEIGHTED=weights is not None,
        BLOCK_M=schedule.block,
        BLOCK_N=BLOCK_N,
        BLOCK_K=min(group & -group, 64 if x.element_size() == 2 else 16),
        num_warps=8,  # of this and of BLOCK_K more or fewer spill out of the registers
    )
    return out


@cache
def widths_and_places(bits: tuple[int, ...], bytes_per_bit: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """On the device, [E] int64: bits of each expert, and where its codes begin. Copying them there waits for the GPU,
    so it is done once."""
    widths = torch.tensor(bits, device=device)
    return widths, (widths.cumsum(0) - widths) * bytes_per_bit


def linear(x: Tensor, codes: Tensor, scale: Tensor, zero_point: Tensor, bias: Tensor | None, bits: int) -> Tensor:
    """[..., I] -> [..., O], as `torch.ops.eacmoe.linear`."""
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    out = rows.new_empty(len(rows), len(scale))
    if len(rows):
        schedule = Schedule(torch.zeros(len(rows), 1, device=x.device), 1, MANY if len(rows) >= MANY else FEW)
        weight = codes[None], scale[None], zero_point[None]
        grouped(rows, schedule, 1, weight, None if bias is None else bias.float(), bits, out)
    return out.view(*x.shape[:-1], len(scale))


def experts(x: Tensor, ids: Tensor, weights: Tensor, up: tuple, down: tuple, activate) -> Tensor:
    """All routed experts: [N, D] -> [N, D], as `torch.ops.eacmoe.experts`.

    Args:
        up, down: codes, scale, zero point, bias and bits of a stack.
        activate: [pairs, 2F or F] -> [pairs, F].
    """
    x, (num_tokens, top_k), num_experts = x.contiguous(), ids.shape, len(up[1])
    if not num_tokens:
        return torch.empty_like(x)
    block = MANY if ids.numel() >= MANY * num_experts else FEW
    schedule = Schedule(ids, num_experts, block)
    biases = (None if bias is None else bias.float().contiguous() for *_, bias, _ in (up, down))
    hidden = x.new_empty(ids.numel(), up[1].shape[1])
    hidden = activate(grouped(x, schedule, top_k, up[:3], next(biases), up[4], hidden)).contiguous()
    out = torch.zeros(ids.numel(), x.shape[-1], dtype=torch.float32, device=x.device)  # of skipped pairs
    pair_weights = weights.float().contiguous().flatten()
    grouped(hidden, schedule, 1, down[:3], next(biases), down[4], out, pair_weights)
    return out.view(num_tokens, top_k, -1).sum(1).to(x.dtype)
