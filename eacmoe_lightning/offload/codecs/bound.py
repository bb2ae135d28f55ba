"""How far a decoded weight may be from the original: |w - w'| <= bound, for every weight.

A bound is absolute, relative to the tensor's range, or relative to its mean |w| (the alpha of MoE-Compression,
arXiv 2509.07727, section 3); each is turned into one absolute number per tensor. It holds for the weight in its own
dtype. Rounding a decoded float32 to bfloat16 or float16 adds an error, so the compressor gets a smaller bound:
`before_cast`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

Mode = Literal["absolute", "range", "mean"]


@dataclass(frozen=True)
class Bound:
    """An error bound.

    Attributes:
        mode: `absolute` (weight units), `range` (times max - min of the tensor) or `mean` (times its mean |w|).
        value: positive.
    """

    mode: Mode
    value: float

    def __post_init__(self) -> None:
        if self.mode not in get_args(Mode):
            raise ValueError(f"bound mode {self.mode!r} is not one of {', '.join(get_args(Mode))}")
        if not 0 < self.value < float("inf"):
            raise ValueError(f"bound {self.value} is not a positive number")

    def absolute(self, weight: Tensor) -> float:
        """The bound in weight units; 0 if a relative bound leaves no room (a constant tensor, all zeros).

        Raises:
            ValueError: the tensor holds NaN or infinite values.
        """
        check_finite(weight)
        if self.mode == "absolute" or not weight.numel():
            return self.value
        if self.mode == "range":
            low, high = weight.aminmax()
            return self.value * (high.item() - low.item())
        return self.value * weight.abs().mean(dtype=torch.float64).item()


def check_finite(weight: Tensor) -> None:
    """Raises ValueError if the tensor has values for which no bound can hold."""
    if not torch.isfinite(weight).all():
        raise ValueError(
            "the tensor holds NaN or infinite values, for which no error bound can hold: repair it, load it in float32 "
            "if it overflowed, or use the lossless codec"
        )


def before_cast(weight: Tensor, absolute: float) -> float:
    """The largest bound on the float32 error that keeps the error within `absolute` after rounding to the dtype.

    Weights and decoded weights lie on the grid of their dtype, whose step u doubles with every power of two. The error
    after rounding is a multiple n of u, and n u <= absolute holds if the error before was below
    (floor(absolute / u) + 1/2) u. The result is the smallest of these over all u among the weights, at most `absolute`.
    (A decoded weight may lie one power of two higher, where u is twice as large. So codecs also measure what they
    write.)
    """
    if weight.dtype == torch.float32 or not weight.numel():
        return absolute
    info = torch.finfo(weight.dtype)
    exponents = torch.frexp(weight.float()).exponent.unique() - 1  # |w| in [2^e, 2^(e+1)); 0 gives -1
    steps = (torch.exp2(exponents.double()) * info.eps).clamp(min=info.smallest_normal * info.eps)
    return min(absolute, ((torch.floor(absolute / steps) + 0.5) * steps).min().item())


def max_error(weight: Tensor, decoded: Tensor) -> float:
    """max |w - w'| in float64; infinite if a decoded weight is not finite."""
    if not weight.numel():
        return 0.0
    error = (weight.double() - decoded.double()).abs_().max().item()
    return error if error == error else float("inf")
