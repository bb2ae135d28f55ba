"""What all ways of storing quantized weights have in common."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from eacmoe_lightning.models.weight_files import Stored

# root mean squares of weights: beyond these no model has any, and those that models have
SMALLEST, LARGEST, PLAUSIBLE = 1e-6, 30.0, (1e-4, 3.0)
# What an expert's `gate_proj` and `up_proj` are, if a program made them of a stack in which rows of both alternate: the
# halves of the stack's rows, or the rows of each.
Split = Literal["halves", "alternating"]
REMEDY = "the files or their config.json (--model.name_or_path) were changed: download them again"


class Scheme(ABC):
    """How one quantization method stores weights.

    Args:
        config: the `quantization_config` of the original's config.json.
        stored: every tensor on disk.

    Attributes:
        SCALES: which of a weight's tensors scale it.
        parts: by ordinary key of each quantized weight, the keys on disk that it is made of, by what they are.
        description: what the report says about the original.

    Raises:
        ValueError: the original uses a variant that cannot be decoded.
    """

    SCALES: tuple[str, ...] = ("scale", "scales")

    def __init__(self, config: Mapping[str, Any], stored: Mapping[str, Stored]) -> None:
        self.config = config
        self.parts: dict[str, dict[str, str]] = self.find(stored)
        self.description: str = self.describe()

    @property
    def split(self) -> Split | None:
        """How the program that quantized the model splits alternating rows; None: there is no telling."""
        return None

    @abstractmethod
    def find(self, stored: Mapping[str, Stored]) -> dict[str, dict[str, str]]:
        """The value of `parts`."""

    @abstractmethod
    def decode(self, key: str, parts: Mapping[str, Tensor]) -> Tensor:
        """The weight with this ordinary key, from its tensors by what they are."""

    def checked(self, key: str, parts: Mapping[str, Tensor]) -> Tensor:
        """The same, if it can be the weight of a model.

        Raises:
            ValueError: it holds NaN, its scales are zeros, or its size says that a scale is stored as its reciprocal.
        """
        weight = self.decode(key, parts)
        size = root_mean_square(weight)
        if not math.isfinite(size):
            raise ValueError(f"{key} decodes to NaN or infinite values as {self.description}: {REMEDY}")
        codes = parts.get("weight")
        if not size and codes is not None and codes.is_floating_point() and codes.float().any():
            raise ValueError(f"{key} decodes to zeros as {self.description}, because its scales are: {REMEDY}")
        if not size or SMALLEST < size < LARGEST:
            return weight
        for kind in self.SCALES:
            if kind in parts and parts[kind].is_floating_point():
                reciprocal = {kind: parts[kind].float().reciprocal()}
                other = root_mean_square(self.decode(key, {**parts, **reciprocal}))
                if PLAUSIBLE[0] < other < PLAUSIBLE[1]:
                    raise ValueError(
                        f"{key} decodes to weights of {size:.2g} (root mean square) as {self.description}, and to "
                        f"{other:.2g} if {self.parts[key][kind]} were the reciprocal of the scale: another program has "
                        "stored scales that divide, or has changed them. Pass a model with scales that multiply "
                        "(--model.name_or_path)"
                    )
        return weight

    @abstractmethod
    def describe(self) -> str:
        """The value of `description`."""


def root_mean_square(weight: Tensor) -> float:
    return float(torch.linalg.vector_norm(weight, dtype=torch.float32)) / math.sqrt(max(weight.numel(), 1))


def require(key: str, parts: Mapping[str, str], kinds: Iterable[str]) -> None:
    if missing := [kind for kind in kinds if kind not in parts]:
        raise ValueError(f"{key} has no {missing[0]} beside it: a file is missing, or it is of an unknown variant")
