"""One decoder layer: its linears by part, its router and its experts, and how it runs.

Letters: B batch, T sequence, N = B*T tokens, D hidden, F expert width, E experts, K top_k.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from eacmoe_lightning.routers.router_weights import forced_weights


@dataclass
class Routing:
    """One router's output for N tokens."""

    logits: Tensor  # [N, E] float32, before any softmax
    ids: Tensor  # [N, K] int64, the experts that ran
    weights: Tensor  # [N, K], their weights


# Gets a routing and, if it is known, the router's input. A routing that it returns runs instead.
Watcher = Callable[[Routing, Tensor | None], Routing | None]


def _routing_of(output: tuple[Tensor, Tensor, Tensor]) -> Routing:
    logits, weights, ids = output
    return Routing(logits.float(), ids, weights)


def _show_routing(watcher: Watcher, router: nn.Module, args: tuple, output: tuple) -> tuple | None:
    """A router's forward hook, bound to a watcher by `partial` so that a model with it can be copied and pickled."""
    changed = watcher(_routing_of(output), args[0] if args else None)
    return None if changed is None else (output[0], changed.weights, changed.ids)


class _Reached(BaseException):
    """Ends a forward pass at the module whose input is recorded."""


@dataclass
class Experts:
    """The routed experts of one block as 2-D problems: views that write through to the model."""

    module: nn.Module

    @property
    def num_experts(self) -> int:
        return self.module.down_proj.shape[0]

    @property
    def up_name(self) -> str:
        return "gate_up_proj" if self.module.has_gate else "up_proj"

    @property
    def projections(self) -> tuple[str, str]:
        """The two weights in the order in which they are applied."""
        return self.up_name, "down_proj"

    def weight(self, projection: str) -> Tensor:
        """[E, O, I] view of `gate_up_proj`, `up_proj` or `down_proj`."""
        weight = getattr(self.module, projection)
        return weight.transpose(1, 2) if self.module.is_transposed else weight

    def bias(self, projection: str, expert: int) -> Tensor | None:
        return getattr(self.module, f"{projection}_bias")[expert] if self.module.has_bias else None

    def intermediate(self, x: Tensor, expert: int) -> Tensor:
        """The input of `down_proj`: [n, D] -> [n, F] (gate, up and activation of one expert)."""
        h = nn.functional.linear(x, self.weight(self.up_name)[expert], self.bias(self.up_name, expert))
        return self.module._apply_gate(h) if self.module.has_gate else self.module.act_fn(h)

    def output(self, x: Tensor, expert: int) -> Tensor:
        """One expert: [n, D] -> [n, D]."""
        h = self.intermediate(x, expert)
        return nn.functional.linear(h, self.weight("down_proj")[expert], self.bias("down_proj", expert))


@dataclass
class Block:
    """One decoder layer: its linears by part, its router and its experts (None in a dense block)."""

    index: int
    name: str  # e.g. model.layers.3
    layer: nn.Module
    router: nn.Module | None = None
    experts: Experts | None = None
    router_name: str = ""
    experts_name: str = ""
    linears: dict[str, str] = field(default_factory=dict)  # name in the layer -> attention | shared
    # in a pruned block, the original numbers of its experts [E]
    kept: slice | Tensor = field(default_factory=lambda: slice(None))

    @property
    def is_moe(self) -> bool:
        return self.experts is not None

    @property
    def num_experts(self) -> int:
        return self.experts.num_experts if self.is_moe else 0

    def linear(self, name: str) -> nn.Linear:
        return self.layer.get_submodule(name)

    @property
    def expert_numbers(self) -> list[int]:
        """The original numbers of this block's experts."""
        return list(range(self.num_experts)) if isinstance(self.kept, slice) else self.kept.tolist()

    def original_ids(self, ids: Tensor) -> Tensor:
        """This block's expert ids [N, K] as ids of the original."""
        return ids if isinstance(self.kept, slice) else self.kept.to(ids.device)[ids]

    @property
    def router_weight(self) -> nn.Parameter:
        """[E, D], the only matrix of the router with one row per expert."""
        return self.router.get_parameter(self._router_parameter)

    @property
    def _router_parameter(self) -> str:
        rows = [n for n, p in self.router.named_parameters() if p.ndim == 2 and len(p) == self.num_experts]
        if len(rows) != 1:
            raise ValueError(f"{self.name}: the router has {len(rows)} matrices with {self.num_experts} rows, not 1")
        return rows[0]

    @property
    def router_bias(self) -> Tensor | None:
        """[E], the bias that is added to the logits, if the router has one (gpt_oss)."""
        owner = self._router_parameter.rpartition(".")[0]
        return getattr(self.router.get_submodule(owner), "bias", None)

    def router_logits(self, x: Tensor, weight: Tensor | None = None) -> Tensor:
        """[N, D] -> [N, E] in float32, with the router's weight or another one in its place."""
        weight = self.router_weight if weight is None else weight
        bias = self.router_bias
        with torch.autocast(x.device.type, enabled=False):
            return nn.functional.linear(x.float(), weight.float(), None if bias is None else bias.float())

    # --- running the block -------------------------------------------------------------------

    def forward(self, hidden: Tensor, kwargs: dict, force_ids: Tensor | None = None) -> tuple[Tensor, Routing | None]:
        """Runs the block: [B, T, D] -> [B, T, D] and its routing.

        With `force_ids` [N, K] the given experts run instead of the router's choice, with the weights
        that the router's scores give them (EAC-MoE, table 1).
        """
        routings: list[Routing] = []

        def record(routing: Routing, _: Tensor | None) -> Routing:
            if force_ids is not None:
                weights = forced_weights(self.router, routing.logits, routing.weights, routing.ids, force_ids)
                routing = Routing(routing.logits, force_ids, weights)
            routings.append(routing)
            return routing

        handle = self.watch_router(record) if self.is_moe else None
        try:
            output = self.layer(hidden, **kwargs)
        finally:
            if handle is not None:
                handle.remove()
        output = output[0] if isinstance(output, tuple) else output
        return output, routings[0] if routings else None

    def watch_router(self, watcher: Watcher) -> RemovableHandle:
        """Calls `watcher` with each pass's routing and the router's input; a routing that it returns runs instead.

        Together with `route`, this is the only place that knows how a router returns its decision.
        """
        return self.router.register_forward_hook(partial(_show_routing, watcher))

    def input_of(self, module: nn.Module, hidden: Tensor, kwargs: dict) -> Tensor:
        """The input [N, I] of `module` for these hidden states. Later modules of the block do not run."""
        reached: list[Tensor] = []

        def stop(_, args, kwargs):
            x = args[0] if args else kwargs["hidden_states"]
            reached.append(x.reshape(-1, x.shape[-1]))
            raise _Reached

        handle = module.register_forward_pre_hook(stop, with_kwargs=True)
        try:
            self.layer(hidden, **kwargs)
        except _Reached:
            pass
        finally:
            handle.remove()
        if not reached:
            raise RuntimeError(f"{self.name}: no token reached {type(module).__name__}")
        return reached[0]

    @contextmanager
    def without_experts(self) -> Iterator[None]:
        """Makes the routed experts return zeros at no cost, to compute what does not depend on them."""
        module = self.experts.module
        module.forward = lambda hidden, *args, **kwargs: torch.zeros_like(hidden)
        try:
            yield
        finally:
            del module.forward  # uncovers the method of the class

    def depends_on_experts(self, module: nn.Module, hidden: Tensor, kwargs: dict) -> bool:
        """Whether the input of `module` changes if the routed experts return zeros."""
        with self.without_experts():
            without_experts = self.input_of(module, hidden, kwargs)
        return not torch.equal(without_experts, self.input_of(module, hidden, kwargs))

    def route(self, x: Tensor) -> Routing:
        """The router's output for inputs [N, D]."""
        return _routing_of(self.router(x))

    def weights(self) -> dict[str, tuple[str, Tensor]]:
        """Every weight that is quantized: parameter name in the model -> (part, view [..., O, I])."""
        weights = {f"{self.name}.{n}.weight": (part, self.linear(n).weight) for n, part in self.linears.items()}
        if self.is_moe:
            for projection in self.experts.projections:
                weights[f"{self.name}.{self.experts_name}.{projection}"] = ("experts", self.experts.weight(projection))
        return weights

    def as_parameter(self, name: str, weight: Tensor) -> Tensor:
        """A weight [..., O, I] from `weights`, in the layout of its parameter in the model."""
        transposed = self.weights()[name][0] == "experts" and self.experts.module.is_transposed
        return weight.transpose(-1, -2) if transposed else weight

    @property
    def router_parameter_name(self) -> str:
        return f"{self.name}.{self.router_name}.{self._router_parameter}"

    def input_groups(self, hidden: Tensor, kwargs: dict) -> list[list[str]]:
        """Groups of linears that read the same tensor (q, k, v), in the order in which they run."""
        seen: list[tuple[Tensor, list[str]]] = []
        handles = []
        for name in self.linears:

            def note(module, args, name=name):
                for x, names in seen:
                    if x is args[0]:
                        names.append(name)
                        return
                seen.append((args[0], [name]))

            handles.append(self.linear(name).register_forward_pre_hook(note))
        try:
            self.layer(hidden, **kwargs)
        finally:
            for handle in handles:
                handle.remove()
        groups = [names for _, names in seen]
        missing = set(self.linears) - {name for names in groups for name in names}
        if missing:
            raise ValueError(f"{self.name}: {sorted(missing)} did not run, so their inputs are unknown")
        return groups
