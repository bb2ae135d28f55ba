"""Tensors that an original stores in float32 where its config says a narrower dtype: they stay as they are stored.

Biases of the selection, routers and decays of state spaces are often wider than the other weights. transformers narrows
most of them as it loads, so that is what calibration and evaluation run. Other engines keep them, so a compressed
directory and its exports do too. A tensor that the calibration changed is written as it was changed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from eacmoe_lightning.models.moe import MoEModel
from eacmoe_lightning.models.shrink import kept_part
from eacmoe_lightning.models.streamed import Weights

KEY = "float32"  # of `original` in the config of a compressed directory: their names


@dataclass(frozen=True)
class StoredInFloat32:
    """These tensors of an original, by parameter name.

    Attributes:
        names: theirs.
        weights: reads them in float32.
    """

    names: frozenset[str]
    weights: Weights

    def put_back(self, tensors: dict[str, Tensor], moe: MoEModel) -> dict[str, Tensor]:
        """Those among the tensors of a compressed model that rounding alone has changed, in float32."""
        stored = self.weights.read([name for name in tensors if name in self.names])
        stored = {name: kept_part(moe.moe_blocks, name, tensor, tensors[name].shape) for name, tensor in stored.items()}
        return {n: tensor for n, tensor in stored.items() if torch.equal(tensor.to(tensors[n].dtype), tensors[n])}
