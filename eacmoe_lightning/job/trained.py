"""The trained parameters: routers and norms of the original, scales and positions of its quantized weights.

`tuning/codes.py` defines positions. Routers and norms exist from the start. Scales and positions exist only while their
weights are trained: those of one block in the block stage, all in the joint stage. The codes themselves do not change;
they are in memory only where they are needed (`holding`).
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from eacmoe_lightning.compressed.finished import FinishedBlocks
from eacmoe_lightning.models.block import Block, Call
from eacmoe_lightning.models.routing import Routing
from eacmoe_lightning.models.streamed import StreamedModel
from eacmoe_lightning.quantization.quantizers import QuantizedWeight
from eacmoe_lightning.run.block_file import read_block
from eacmoe_lightning.run.directory import RunDirectory
from eacmoe_lightning.run.hidden import State
from eacmoe_lightning.tuning.codes import Matrix, Movable, codes_of, in_training, movable, trains_weights

log = logging.getLogger(__name__)
KEPT_NUMBERS = 1 << 24  # weights of a block that may stay decoded between its forward and backward pass, 20 bytes each


class TrainedParts:
    """The trained parameters and the compressed model that they give.

    A router's key names its block (`block_003`). A norm's key is the name of the model's parameter, with `/` in place
    of dots. The LightningModule registers both dictionaries, so that Lightning knows their parameters. Scales and
    positions change from block to block, which DistributedDataParallel does not allow, so they are not registered:
    the module keeps them in checkpoints (`state`) and averages their gradients over processes.

    Args:
        moe: the original model.
        run: the run whose block files hold the finished codes.
        trains_norms: whether norms are among the parameters.
        resident: whether the joint stage has room for the codes of all blocks. Otherwise they are read block by block,
            and scales and positions stay in host memory.
    """

    def __init__(self, moe: StreamedModel, run: RunDirectory, trains_norms: bool, resident: bool = True) -> None:
        self.moe, self.run, self.resident = moe, run, resident
        self.routers, self.norms = nn.ParameterDict(), nn.ParameterDict()  # [E, D]; [D]
        self._offsets: dict[str, float] = {}  # that the norms add to their weights, by parameter name
        self.scales: dict[str, nn.Parameter] = {}  # by parameter name, in the shape of the scales
        self.moved: dict[str, Movable] = {}  # by parameter name
        self.codes: dict[str, QuantizedWeight] = {}  # weights in training that are in memory, as at its start
        self.block: int | None = None  # index of the block in training; None: all, or none
        self._checked: set[int] = set()  # the blocks whose files were read before
        routers = moe.read(block.router_parameter_name for block in moe.calibrated_blocks)
        for block in moe.calibrated_blocks:
            router = routers[block.router_parameter_name].float().clone()
            self.routers[router_key(block)] = nn.Parameter(router)
        if not self.routers:  # an optimizer needs a parameter, though none of these routers can be calibrated
            self.routers["none"] = nn.Parameter(torch.zeros(1))
        if trains_norms:
            for name, weight in moe.read(name for name, _ in moe.norms()).items():
                self.norms[_key(name)] = nn.Parameter(weight.float().clone())
                self._offsets[name] = moe.norm_offset(name)

    def optimizer_groups(self) -> list[dict[str, Any]]:
        """One group per parameter in training, with its kind, its name in the model and `rms`.

        `rms` is the unit of its learning rate: its root mean square (of norms that multiply by 1 + weight, that of the
        sum), or for codes a step of the grid.
        """
        rows, blocks = self.kept_rows, self._blocks

        def rms(kind: str, name: str, weight: Tensor) -> float:
            if kind == "code":
                return 1.0
            weight = weight.detach()[rows[name]] if kind == "router" else weight.detach()
            return float((weight + self._offsets.get(name, 0.0)).square().mean().sqrt())

        routers = {b.router_parameter_name: self.routers[router_key(b)] for b in blocks if b.calibrates}
        kinds = {
            "router": routers or ({} if self.moe.calibrated_blocks else dict(self.routers)),
            "norm": {_name(key): weight for key, weight in self._norms(None if self.block is None else blocks)},
            "scale": self.scales,
            "code": {name: moved.position for name, moved in self.moved.items()},
        }
        return [
            {"params": [weight], "kind": kind, "name": f"{kind} {name}", "rms": rms(kind, name, weight)}
            for kind, weights in kinds.items()
            for name, weight in weights.items()
        ]

    @property
    def _blocks(self) -> list[Block]:
        return self.moe.blocks if self.block is None else [self.moe.blocks[self.block]]

    def _norms(self, blocks: Collection[Block] | None) -> list[tuple[str, nn.Parameter]]:
        """The trained norms of some blocks with their keys, or of the whole model."""
        prefixes = None if blocks is None else tuple(f"{block.name}." for block in blocks)
        return [item for item in self.norms.items() if prefixes is None or _name(item[0]).startswith(prefixes)]

    def router(self, block: Block) -> Tensor:
        """The router [E, D] of the experts that the block still has, differentiable."""
        return self.routers[router_key(block)][block.kept]

    def put_router(self, block: Block, weight: Tensor) -> None:
        self.routers[router_key(block)].data[block.kept] = weight

    @property
    def kept_rows(self) -> dict[str, slice | Tensor]:
        """The rows of each original tensor that the pruned model keeps, by parameter name of the model."""
        rows: dict[str, slice | Tensor] = defaultdict(lambda: slice(None))
        for block in self.moe.moe_blocks:
            if block.calibrates:
                rows[block.router_parameter_name] = block.kept
            rows |= {name: block.kept for name, (part, _) in block.weights().items() if part == "experts"}
        return rows

    # --- quantized weights in training ------------------------------------------------------------------------

    def start(
        self, optimizer: torch.optim.Optimizer, block: Block | None, kinds: Collection[str], reach: float
    ) -> None:
        """Makes parameters of scales and codes, and resets the optimizer.

        The block stage has called `take_codes` before; the joint stage reads the codes from the blocks' files.

        Args:
            optimizer: gets groups for them, and loses its moments.
            block: the block whose weights are trained; None trains all.
            kinds: what is trained of them: `scale`, `code`.
            reach: how many steps of the grid training can move a code (`tuning.codes.movable`).
        """
        kept, self.block = self.kept_rows, None if block is None else block.index
        number = 0
        for block in self._blocks if trains_weights(kinds) else ():
            with self.holding(block):
                names = [name for name in block.weights() if name in self.codes]
                if "scale" in kinds:
                    self.scales |= {name: self._parameter(self.codes[name].scale.float()) for name in names}
                for name, weight in self.moe.read(names).items() if "code" in kinds else ():
                    moved = movable(block.as_parameter(name, weight)[kept[name]], self.codes[name], reach)
                    place = moved.place.to(self._home)
                    self.moved[name] = replace(moved, position=self._parameter(moved.position), place=place)
                    number += self.codes[name].codes.numel()
        if self.moved:
            log.info(
                "%d of %d codes are within %.3f steps of another and may change",
                sum(len(moved.place) for moved in self.moved.values()),
                number,
                reach,
            )
        self._regroup(optimizer)

    def stop(self, optimizer: torch.optim.Optimizer) -> None:
        """Forgets the weights in training."""
        self.scales, self.moved, self.codes, self.block = {}, {}, {}, None
        self._regroup(optimizer)

    def _regroup(self, optimizer: torch.optim.Optimizer) -> None:
        optimizer.state.clear()
        optimizer.param_groups.clear()
        for group in self.optimizer_groups():
            optimizer.add_param_group(group)

    def gather_moments(self, optimizer: torch.optim.Optimizer) -> None:
        """Moves AdamW's moments to their parameters; Lightning brings all of a checkpoint's to the model's device."""
        for parameter, state in optimizer.state.items():
            for name, tensor in state.items():
                if isinstance(tensor, Tensor) and tensor.device != parameter.device:
                    state[name] = tensor.to(parameter.device)

    @property
    def _home(self) -> torch.device:
        """Where scales and positions are."""
        return self.moe.device if self.resident or self.block is not None else torch.device("cpu")

    def _parameter(self, tensor: Tensor) -> nn.Parameter:
        return nn.Parameter(tensor.to(self._home))

    def take_codes(self, codes: Mapping[str, QuantizedWeight]) -> None:
        """Takes quantized weights by parameter name to the model's device, to train them."""
        self.codes |= {
            name: replace(weight, **{field: getattr(weight, field).to(self.moe.device) for field in weight.FIELDS})
            for name, weight in codes.items()
        }

    @contextmanager
    def holding(self, block: Block) -> Iterator[None]:
        """The codes of a block's weights are in memory inside the `with` block; they stay if there is room for all.

        Those of the block in training are there anyway.
        """
        if self.block is not None:
            yield
            return
        names = block.weights().keys()
        if not names & self.codes.keys():
            self.take_codes(read_block(self.run, block.index, is_checked=block.index not in self._checked)[0])
            self._checked.add(block.index)
        yield
        if not self.resident:
            for name in names & self.codes.keys():
                del self.codes[name]

    def state(self) -> dict[str, Any]:
        """Scales and positions, for a checkpoint."""
        return {
            "block": self.block,
            "scales": {name: scale.detach() for name, scale in self.scales.items()},
            "moved": {name: (moved.position.detach(), moved.place, moved.starts) for name, moved in self.moved.items()},
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Takes scales and positions from a checkpoint; an optimizer must be configured after it."""
        self.block = state["block"]
        self.scales = {name: self._parameter(scale) for name, scale in state["scales"].items()}
        self.moved = {
            name: Movable(self._parameter(position), place.to(self._home), starts)
            for name, (position, place, starts) in state["moved"].items()
        }

    def unregistered(self) -> list[nn.Parameter]:
        """The parameters that Lightning's strategy does not know."""
        return [*self.scales.values(), *(moved.position for moved in self.moved.values())]

    def values(self, block: Block) -> dict[str, Tensor]:
        """Copies of all that is trained of a block, in host memory."""
        return {name: tensor.detach().to("cpu", copy=True) for name, tensor in self.of(block).items()}

    def put_values(self, block: Block, values: dict[str, Tensor]) -> None:
        """Sets what is trained of a block to what `values` returned."""
        for name, tensor in self.of(block).items():
            tensor.data.copy_(values[name])

    def put(self, block: Block, tensors: Mapping[str, Tensor]) -> None:
        """Sets the router and the norms of a block, by parameter name."""
        if block.calibrates:
            self.put_router(block, tensors[block.router_parameter_name])
        for key, norm in self._norms([block]):
            norm.data.copy_(tensors[_name(key)])

    def put_finished(self, block: Block) -> None:
        """Sets the router and the norms of a block to those in its file."""
        self.put(block, read_block(self.run, block.index)[1])

    def of(self, block: Block) -> dict[str, nn.Parameter]:
        """What is trained of a block."""
        trained = {"router": self.routers[router_key(block)]} if block.calibrates else {}
        trained |= {f"norm {_name(key)}": norm for key, norm in self._norms([block])}
        trained |= {f"scale {name}": self.scales[name] for name in block.weights() if name in self.scales}
        return trained | {f"code {name}": self.moved[name].position for name in block.weights() if name in self.moved}

    @cached_property
    def outside(self) -> dict[str, nn.Parameter]:
        """What is trained outside of the blocks: norms, by parameter name."""
        in_blocks = tuple(f"{block.name}." for block in self.moe.blocks)
        return {name: norm for key, norm in self.norms.items() if not (name := _name(key)).startswith(in_blocks)}

    # --- the compressed model -----------------------------------------------------------------------------------

    def routers_and_norms(self, blocks: Collection[Block] | None = None) -> dict[str, Tensor]:
        """Routers and norms by parameter name, in the dtypes that they have in the model, and differentiable.

        Of all blocks and of the model's end, or of `blocks` alone.
        """
        chosen = self.moe.blocks if blocks is None else blocks
        trained = {block.router_parameter_name: self.router(block) for block in chosen if block.calibrates}
        trained |= {_name(key): weight for key, weight in self._norms(blocks)}
        return self.as_stored(trained)

    def as_stored(self, trained: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Trained tensors by parameter name, in the dtypes that they have in the model, and differentiable."""
        return {name: weight.to(self._dtypes[name]) for name, weight in trained.items()}

    @cached_property
    def _dtypes(self) -> dict[str, torch.dtype]:
        return {name: tensor.dtype for name, tensor in self.moe.model.state_dict().items()}

    def forward(self, block: Block, call: Call) -> tuple[State, Routing | None]:
        """Runs a block with its weights in training, as `Block.forward`; differentiable."""
        weights = self.routers_and_norms([block]) | self.decoded(block)
        weights = {name.removeprefix(f"{block.name}."): weight for name, weight in weights.items()}
        return block.forward(call, weights=weights, expert=self.expert(block))

    def decoded(self, block: Block) -> dict[str, Tensor]:
        """The block's weights in training but for the experts', by parameter name, differentiable.

        In a large block the backward pass decodes them again instead of keeping what decoding computes on its way.
        """
        decode = self._recomputed(block, lambda name: self._in_training(name)[0].decode(self._dtypes[name]))
        return {
            name: decode(name)
            for name, (part, _) in block.weights().items()
            if part != "experts" and self._trains(name)
        }

    def expert(self, block: Block) -> Callable[[int, Tensor], Tensor] | None:
        """Runs one of the block's experts on rows [n, D] with its weights in training; None if they are not trained.

        The weights of one expert at a time are decoded, in the backward pass of a large block again.
        """
        names = [f"{block.name}.{block.experts_name}.{p}" for p in block.experts.projections] if block.is_moe else []
        if not any(self._trains(name) for name in names):
            return None

        weights = [(self._in_training(name), self._dtypes[name]) for name in names]

        def run(expert: int, x: Tensor) -> Tensor:
            return block.experts.output(x, expert, *(experts[expert].decode(dtype) for experts, dtype in weights))

        return self._recomputed(block, run)

    def _recomputed(self, block: Block, run: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """The function, or in a large block one whose backward pass computes it again. The results are the same."""
        if sum(self.codes[name].codes.numel() for name in self.trained_weights(block)) <= KEPT_NUMBERS:
            return run
        return partial(checkpoint, run, use_reentrant=False, preserve_rng_state=False)

    def _trains(self, name: str) -> bool:
        return name in self.scales or name in self.moved

    def _in_training(self, name: str) -> list[Matrix]:
        return in_training(self.codes[name], self.scales.get(name), self.moved.get(name))

    def trained_weights(self, block: Block) -> set[str]:
        """The names of the block's quantized weights in training."""
        return {name for name in block.weights() if self._trains(name)}

    def trained(self, name: str, weight: QuantizedWeight) -> QuantizedWeight:
        """A weight as it is now, from what it was at the start of training."""
        codes = {"codes": codes_of(weight, self.moved[name])} if name in self.moved else {}
        changed = replace(weight, **codes)
        if name in self.scales:
            changed = changed.with_scale(self.scales[name].detach().to(weight.scale.device).half())
        return changed

    def finished(self) -> FinishedBlocks:
        """The compressed model with all trained parameters, after the last epoch."""
        return FinishedBlocks(self.moe.weights, self.run, self.routers_and_norms(), self.trained, self.moe.unquantized)

    def untrained(self) -> FinishedBlocks:
        """The compressed model without calibration: the blocks' codes and scales, the original's routers and norms."""
        return FinishedBlocks(self.moe.weights, self.run, unquantized=self.moe.unquantized)


def router_key(block: Block) -> str:
    return f"block_{block.index:03d}"


def _key(name: str) -> str:
    """A parameter's name as a key of a ParameterDict, which allows no dots."""
    return name.replace(".", "/")


def _name(key: str) -> str:
    return key.replace("/", ".")
