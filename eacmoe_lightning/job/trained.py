"""The trained parameters: routers and norms of the original, scales and positions of its quantized weights.

`routers/joint.py` defines positions. Shapes are fixed before the first block, when it is not yet known which experts
stay: routers, scales and positions have rows for all of the original's experts, and the rows of removed experts are
unused.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from eacmoe_lightning.calibration.recipe import Recipe
from eacmoe_lightning.compressed.finished import FinishedBlocks
from eacmoe_lightning.models.block import Block
from eacmoe_lightning.models.streamed import StreamedModel
from eacmoe_lightning.quantization.quantizers import QuantizedWeight
from eacmoe_lightning.routers.joint import decode, start_positions
from eacmoe_lightning.run.block_file import read_block
from eacmoe_lightning.run.directory import RunDirectory


class TrainedParts(nn.Module):
    """The trained parameters and the compressed model that they give.

    A router's key names its block (`block_003`). Every other key is the name of the model's parameter, with `/` in
    place of dots. The LightningModule registers the four dictionaries under their names here, which are therefore the
    prefixes of the keys in checkpoints.

    Args:
        moe: the original model.
        run: the run whose block files hold the solver's codes and scales.
        recipe: gives the grid of every weight.
        joint: what the joint stage trains besides routers: any of norm, scale, code.
    """

    def __init__(self, moe: StreamedModel, run: RunDirectory, recipe: Recipe, joint: Collection[str]) -> None:
        super().__init__()
        self.moe, self.run = moe, run
        self.routers, self.norms = nn.ParameterDict(), nn.ParameterDict()  # [E, D]; [D]
        self.scales, self.positions = nn.ParameterDict(), nn.ParameterDict()  # in the shape of the scales; [..., O, I]
        routers = moe.read(block.router_parameter_name for block in moe.calibrated_blocks)
        for block in moe.calibrated_blocks:
            router = routers[block.router_parameter_name].float().clone()
            self.routers[router_key(block)] = nn.Parameter(router)
        if not self.routers:  # an optimizer needs a parameter, though none of these routers can be calibrated
            self.routers["none"] = nn.Parameter(torch.zeros(1))
        if "norm" in joint:
            for name, weight in moe.read(name for name, _ in moe.norms()).items():
                self.norms[_key(name)] = nn.Parameter(weight.float().clone())
        for block in moe.blocks if recipe.quantizes else ():  # start_joint sets their values
            for name, (part, weight) in block.weights().items():
                grid = recipe.grid(block.index, len(moe.blocks), part)
                if "scale" in joint:
                    shape = recipe.solver.result.scale_shape(weight.shape, grid)
                    self.scales[_key(name)] = nn.Parameter(torch.ones(shape))
                if "code" in joint:
                    self.positions[_key(name)] = nn.Parameter(torch.zeros(weight.shape))

    def optimizer_groups(self) -> list[dict[str, Any]]:
        """One group per parameter, with its kind, its name in the model and `rms`, the unit of its learning rate."""
        kinds = {"router": self.routers, "norm": self.norms, "scale": self.scales, "code": self.positions}
        return [
            {"params": [weight], "kind": kind, "name": _name(key), "rms": 1.0 if kind == "code" else _rms(weight)}
            for kind, weights in kinds.items()
            for key, weight in weights.items()
        ]

    def router(self, block: Block) -> Tensor:
        """The router [E, D] of the experts that the block still has, differentiable."""
        return self.routers[router_key(block)][block.kept]

    def put_router(self, block: Block, weight: Tensor) -> None:
        self.routers[router_key(block)].data[block.kept] = weight

    # --- once all blocks are written ------------------------------------------------------------------------

    @cached_property
    def codes(self) -> dict[str, QuantizedWeight]:
        """All quantized weights by parameter name, read from the block files, on the model's device."""
        blocks = (read_block(self.run, block.index)[0] for block in self.moe.blocks)
        return {
            name: replace(weight, **{field: getattr(weight, field).to(self.moe.device) for field in weight.FIELDS})
            for block in blocks
            for name, weight in block.items()
        }

    @property
    def kept_rows(self) -> dict[str, slice | Tensor]:
        """The rows of each trained tensor that the pruned model keeps, by parameter name of the model."""
        rows: dict[str, slice | Tensor] = defaultdict(lambda: slice(None))
        for block in self.moe.moe_blocks:
            if block.calibrates:
                rows[block.router_parameter_name] = block.kept
            rows |= {name: block.kept for name, (part, _) in block.weights().items() if part == "experts"}
        return rows

    def start_joint(self, optimizer: torch.optim.Optimizer) -> None:
        """Sets scales and positions to the solver's results and resets the optimizer."""
        kept = self.kept_rows
        for key, scale in self.scales.items():
            scale.data[kept[_name(key)]] = self.codes[_name(key)].scale.to(scale)
        for block in self.moe.blocks if self.positions else ():
            for name, weight in self.moe.read(block.weights()).items():
                weight = block.as_parameter(name, weight)[kept[name]]
                position = self.positions[_key(name)]
                position.data[kept[name]] = start_positions(weight, self.codes[name]).to(position)
        optimizer.state.clear()  # moments of the per-block stage do not apply here
        for group in optimizer.param_groups:
            if group["kind"] != "code":  # the unit of codes is a step of the grid
                group["rms"] = _rms(group["params"][0][kept[group["name"]]])

    def routers_and_norms(self) -> dict[str, Tensor]:
        """Routers and norms by parameter name, in the dtypes that they have in the model, and differentiable."""
        trained = {block.router_parameter_name: self.router(block) for block in self.moe.calibrated_blocks}
        trained |= {_name(key): weight for key, weight in self.norms.items()}
        return {name: weight.to(self._dtypes[name]) for name, weight in trained.items()}

    @property
    def _dtypes(self) -> dict[str, torch.dtype]:
        return {name: tensor.dtype for name, tensor in self.moe.model.state_dict().items()}

    def decoded(self) -> dict[str, Tensor]:
        """The decoded weights by parameter name, differentiable; empty if neither scales nor codes are trained."""
        kept, dtypes, weights = self.kept_rows, self._dtypes, {}
        for block in self.moe.blocks if self.scales or self.positions else ():
            for name in block.weights():
                scale, position = (
                    trained[_key(name)][kept[name]] if trained else None for trained in (self.scales, self.positions)
                )
                weights[name] = block.as_parameter(name, decode(self.codes[name], scale, position, dtypes[name]))
        return weights

    def finished(self) -> FinishedBlocks:
        """The compressed model with all trained parameters, after the last epoch."""
        kept = self.kept_rows
        scales = {_name(key): scale[kept[_name(key)]] for key, scale in self.scales.items()}
        codes = {}
        for name, position in ((_name(key), position.detach()) for key, position in self.positions.items()):
            solved = self.codes[name]
            codes[name] = solved.nearest(position[kept[name]]).to(solved.codes.dtype)
        return FinishedBlocks(self.moe.weights, self.run, self.routers_and_norms(), scales, codes, self.moe.unquantized)

    def untrained(self) -> FinishedBlocks:
        """The compressed model without calibration: the solver's codes and scales, the original's routers and norms."""
        return FinishedBlocks(self.moe.weights, self.run, unquantized=self.moe.unquantized)


def router_key(block: Block) -> str:
    return f"block_{block.index:03d}"


def _rms(tensor: Tensor) -> float:
    return float(tensor.detach().square().mean().sqrt())


def _key(name: str) -> str:
    """A parameter's name as a key of a ParameterDict, which allows no dots."""
    return name.replace(".", "/")


def _name(key: str) -> str:
    return key.replace("/", ".")
