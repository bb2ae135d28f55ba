"""One decoder layer: its linears by part, its router and its experts, and how it runs.

Letters: B batch, T sequence, N = B*T tokens, D hidden, F expert width, E experts, K top_k.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, MutableMapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from eacmoe_lightning.models.experts import Experts, Groups, run_by_expert
from eacmoe_lightning.models.routing import (
    Handles,
    LogitMap,
    Products,
    Reached,
    Routing,
    Watcher,
    forward_replaced,
    keep_logits,
    show_routing,
)
from eacmoe_lightning.routers.choice import Scoring, find_scoring
from eacmoe_lightning.routers.router_weights import forced_weights
from eacmoe_lightning.run.hidden import State


@dataclass(frozen=True)
class Call:
    """The arguments with which the model's own loop calls a layer for one batch (`MoEModel.call`).

    Attributes:
        args, kwargs: the arguments.
        shared: what earlier blocks put into dicts that all blocks share (Gemma 4's keys and values): by name of the
            argument, what each holds.
        history: outputs of earlier blocks that the model's loop keeps for later ones, by number of the block.
        within: makes the context in which the layer runs (`models.resumption`).
    """

    args: tuple
    kwargs: dict[str, Any]
    shared: dict[str, dict[str, Any]] = field(default_factory=dict)
    history: dict[str, Any] = field(default_factory=dict)
    within: Callable[[], AbstractContextManager] = nullcontext

    @property
    def hidden(self) -> Tensor:
        """[B, T, ...], the hidden states among the arguments."""
        return self.args[0] if self.args else self.kwargs["hidden_states"]

    def with_hidden(self, hidden: Tensor) -> Call:
        """The same call for other hidden states."""
        if self.args:
            return replace(self, args=(hidden, *self.args[1:]))
        return replace(self, kwargs=self.kwargs | {"hidden_states": hidden})

    def shared_dicts(self) -> dict[str, MutableMapping]:
        """The arguments that are dicts, by name."""
        return {name: value for name, value in self.kwargs.items() if isinstance(value, MutableMapping)}


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
    top_k: int = 0  # experts that a token selects
    is_remembered: bool = False  # whether the model's loop needs this block's output again after the next block
    # linears that stay as they are, with the reason: name in the layer -> why
    unquantized: dict[str, str] = field(default_factory=dict)
    # in a pruned block, the original numbers of its experts [E]
    kept: slice | Tensor = field(default_factory=lambda: slice(None))
    scoring: Scoring | None = None  # how logits become the scores that a correction is added to; see `learn_scoring`
    knows_scoring: bool = False  # whether it was looked for

    @property
    def is_moe(self) -> bool:
        return self.experts is not None

    @property
    def num_experts(self) -> int:
        return self.experts.num_experts if self.is_moe else 0

    def linear(self, name: str) -> nn.Linear:
        return self.layer.get_submodule(name)

    @property
    def moe(self) -> nn.Module:
        """The module that holds router and experts."""
        return self.layer.get_submodule(self.experts_name.rpartition(".")[0])

    def counting_modules(self) -> Iterator[nn.Module]:
        """All modules that may store the number of experts or of their groups, without shared experts."""
        yield self.moe
        yield from self.router.modules()
        yield self.experts.module

    @property
    def expert_numbers(self) -> list[int]:
        """The original numbers of this block's experts."""
        return list(range(self.num_experts)) if isinstance(self.kept, slice) else self.kept.tolist()

    def original_ids(self, ids: Tensor) -> Tensor:
        """This block's expert ids [N, K] as ids of the original."""
        return ids if isinstance(self.kept, slice) else self.kept.to(ids.device)[ids]

    @property
    def calibrates(self) -> bool:
        """Whether the router has one matrix [E, R] that its logits follow from, which can be calibrated.

        The routers of ZAYA and Inkling have rows for more than the experts; they stay as they are.
        """
        return self.is_moe and len(self._router_matrices) == 1

    @property
    def router_weight(self) -> nn.Parameter:
        """[E, R], the only matrix of the router with one row per expert."""
        return self.router.get_parameter(self._router_parameter)

    @property
    def _router_matrices(self) -> list[str]:
        return [n for n, p in self.router.named_parameters() if p.ndim == 2 and len(p) == self.num_experts]

    @property
    def _router_parameter(self) -> str:
        rows = self._router_matrices
        if len(rows) != 1:
            raise ValueError(f"{self.name}: the router has {len(rows)} matrices with {self.num_experts} rows, not 1")
        return rows[0]

    @property
    def router_matrix(self) -> nn.Module:
        """The module inside the router, or the router itself, that owns `router_weight`."""
        return self.router.get_submodule(self._router_parameter.rpartition(".")[0]) if self.calibrates else self.router

    @property
    def router_bias(self) -> Tensor | None:
        """[E], the bias that is added to the logits, if the router has one (gpt_oss)."""
        return getattr(self.router_matrix, "bias", None) if self.calibrates else None

    @property
    def logit_map(self) -> LogitMap:
        """What the router makes of its matrix's products, the router's bias added."""
        return LogitMap.of(self.router)

    def router_logits(self, x: Tensor, weight: Tensor | None = None) -> Tensor:
        """[N, R] -> [N, E] in float32, with the router's weight or another one in its place."""
        return self.logit_map(self.router_products(x, weight))

    def router_products(self, x: Tensor, weight: Tensor | None = None) -> Tensor:
        """The same before `logit_map`, so linear in the weight."""
        weight = self.router_weight if weight is None else weight
        bias = self.router_bias
        with torch.autocast(x.device.type, enabled=False):
            return nn.functional.linear(x.float(), weight.float(), None if bias is None else bias.float())

    @property
    def correction(self) -> Tensor | None:
        """[E], what is added to the experts' scores for the selection alone (DeepSeek-V3); None without one."""
        for owner in (*self.router.modules(), self.moe):
            for name, tensor in (*owner.named_buffers(recurse=False), *owner.named_parameters(recurse=False)):
                if self.is_correction(name, tensor):
                    return tensor.detach().flatten()
        return None

    def is_correction(self, name: str, tensor: Tensor) -> bool:
        """Whether this tensor of the router, or of the module around it, is the `correction`."""
        return "bias" in name and tensor.numel() == self.num_experts and tensor is not self.router_bias

    def learn_scoring(self, routing: Routing) -> None:
        """Finds, once, how the router turns logits into the scores that its correction is added to, if it has one."""
        if self.knows_scoring:
            return
        self.knows_scoring = True
        if (correction := self.correction) is not None and correction.any():
            self.scoring = find_scoring(routing.logits, routing.ids, correction, Groups.of(self).number)

    def choice(self, logits: Tensor) -> Tensor:
        """Router logits [N, E] -> the values [N, E] whose largest are selected, differentiable.

        These are the logits themselves unless the router adds a correction to its scores (`learn_scoring`).
        """
        return logits if self.scoring is None else self.scoring(logits) + self.correction.to(logits)

    # --- running the block -------------------------------------------------------------------

    def forward(
        self,
        call: Call,
        force_ids: Tensor | None = None,
        weights: dict[str, Tensor] | None = None,
        expert: Callable[[int, Tensor], Tensor] | None = None,
    ) -> tuple[State, Routing | None]:
        """Runs the block: its call -> what it hands to the next block, and its routing.

        That is the layer's output as it is: hidden states, or a tuple of them and of more. If more than the output goes
        on to later blocks, it is a dict of the `output` and of `shared` and `history`, as in `Call`.

        With `force_ids` [N, K] the given experts run instead of the router's choice, with the weights
        that the router's scores give them (EAC-MoE, table 1). `weights` replace the layer's, by name in the layer;
        `expert` runs in the place of each expert: its number, rows [n, D] -> [n, D].
        """
        routings: list[Routing] = []

        def record(routing: Routing, _: Tensor | None) -> Routing | None:
            forced = None
            if force_ids is not None:
                weights = forced_weights(self.router, routing.logits, routing.weights, routing.ids, force_ids)
                forced = routing = Routing(routing.logits, force_ids, weights)
            self.learn_scoring(routing)
            routings.append(routing)
            return forced

        before = {name: dict(values) for name, values in call.shared_dicts().items()}
        handle = self.watch_router(record) if self.is_moe else None
        try:
            with self.experts_run_by(expert), call.within():
                if weights is None:
                    output = self.layer(*call.args, **call.kwargs)
                else:
                    output = torch.func.functional_call(self.layer, weights, call.args, call.kwargs)
        finally:
            if handle is not None:
                handle.remove()
        return self._handed_over(call, before, output), routings[0] if routings else None

    def _handed_over(self, call: Call, before: dict[str, dict], output: Any) -> State:
        """The block's state from its output, and from what its run changed in the dicts among its arguments."""
        shared = dict(call.shared)
        for name, values in call.shared_dicts().items():
            added = {key: value for key, value in values.items() if before[name].get(key) is not value}
            if added:
                shared[name] = shared.get(name, {}) | added
        history = call.history | ({str(self.index): output} if self.is_remembered else {})
        return {"output": output, "shared": shared, "history": history} if shared or history else output

    def watch_router(self, watcher: Watcher) -> RemovableHandle | Handles:
        """Calls `watcher` with each pass's routing and the router's input; a routing that it returns runs instead.

        Together with `route`, this is the only place that knows how a router returns its decision.
        """
        products, handles = Products(), Handles()
        if self.router_matrix is not self.router:
            handles.append(self.router_matrix.register_forward_hook(partial(keep_logits, products)))
        hook = partial(show_routing, watcher, products)
        handles.append(self.router.register_forward_hook(hook, with_kwargs=True))
        return handles

    def watch_experts(self, watcher: Callable[[Tensor, Tensor, Tensor, Tensor], None]) -> RemovableHandle:
        """Calls `watcher` with what the experts read, x [N, D], ids [N, K], weights [N, K], and return, [N, D]."""

        def show(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Tensor) -> None:
            hidden, ids, weights, *_ = (*args, *kwargs.values())
            watcher(hidden.reshape(-1, hidden.shape[-1]), ids, weights, output.reshape(-1, output.shape[-1]))

        return self.experts.module.register_forward_hook(show, with_kwargs=True)

    def route(self, x: Tensor) -> Routing:
        """The router's output for its inputs [N, D]; only of routers that read nothing else (`routes_alone`)."""
        routings: list[Routing] = []
        handle = self.watch_router(lambda routing, _: routings.append(routing))
        try:
            self.router(x)
        finally:
            handle.remove()
        return routings[0]

    def routing(self, call: Call) -> Routing:
        """The router's output in this call of the block. Later modules of the block do not run."""
        routings: list[Routing] = []

        def stop(routing: Routing, _: Tensor | None) -> None:
            routings.append(routing)
            raise Reached

        self._run_until_reached(call, self.watch_router(stop))
        return routings[0]

    def routes_alone(self, call: Call) -> bool:
        """Whether `route` on what the router's matrix reads gives the routing of the block.

        It does not where the router reads more than hidden states (token ids, a bias of the module around it), or
        where it changes its input before the product with its matrix.
        """
        expected = self.routing(call)
        try:
            routing = self.route(self.router_input(call))
        except (TypeError, ValueError, RuntimeError, IndexError):
            return False
        return torch.equal(routing.ids, expected.ids) and torch.equal(routing.weights, expected.weights)

    def router_input(self, call: Call) -> Tensor:
        """What the router's matrix reads in this call, [N, R]. Later modules of the block do not run."""
        reached: dict[str, Tensor] = {}

        def note(name: str, module: nn.Module, args: tuple, kwargs: dict) -> None:
            reached[name] = _rows(args, kwargs)

        def stop(*_) -> None:
            raise Reached

        handles = Handles(
            module.register_forward_pre_hook(partial(note, name), with_kwargs=True)
            for name, module in (("router", self.router), ("matrix", self.router_matrix))
        )
        handles.append(self.router.register_forward_hook(stop))
        self._run_until_reached(call, handles)
        if not reached:
            raise RuntimeError(f"{self.name}: no token reached the router")
        return reached.get("matrix", reached["router"])  # a matrix that is read without being called has no input

    def input_of(self, module: nn.Module, call: Call) -> Tensor:
        """The input [N, I] of `module` in this call. Later modules of the block do not run."""
        reached: list[Tensor] = []

        def stop(_, args, kwargs):
            reached.append(_rows(args, kwargs))
            raise Reached

        self._run_until_reached(call, module.register_forward_pre_hook(stop, with_kwargs=True))
        if not reached:
            raise RuntimeError(f"{self.name}: no token reached {type(module).__name__}")
        return reached[0]

    def _run_until_reached(self, call: Call, hooks: RemovableHandle | Handles) -> None:
        """Runs the block until one of these hooks raises `Reached`, and removes them."""
        try:
            with call.within():
                self.layer(*call.args, **call.kwargs)
        except Reached:
            pass
        finally:
            hooks.remove()

    def without_experts(self) -> AbstractContextManager[None]:
        """Makes the routed experts return zeros at no cost, to compute what does not depend on them."""
        return forward_replaced(self.experts.module, lambda hidden, *args, **kwargs: torch.zeros_like(hidden))

    def experts_run_by(self, expert: Callable[[int, Tensor], Tensor] | None) -> AbstractContextManager[None]:
        """Makes `expert` run in the place of each routed expert (see `forward`); None changes nothing."""
        if expert is None:
            return nullcontext()

        def forward(hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
            rows = hidden_states.reshape(-1, hidden_states.shape[-1])
            out = run_by_expert(rows, top_k_index, top_k_weights, self.num_experts, expert)
            return out.view(hidden_states.shape)

        return forward_replaced(self.experts.module, forward)

    def depends_on_experts(self, module: nn.Module, call: Call) -> bool:
        """Whether the input of `module` changes if the routed experts return zeros."""
        with self.without_experts():
            without_experts = self.input_of(module, call)
        return not torch.equal(without_experts, self.input_of(module, call))

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

    def input_groups(self, call: Call) -> list[list[str]]:
        """Groups of linears that read the same tensor (q, k, v), in the order in which they run.

        A linear that does not run is moved to `unquantized`, because its inputs are unknown.
        """
        seen: list[tuple[Tensor, list[str]]] = []
        handles = Handles()
        for name in self.linears:

            def note(module, args, name=name):
                for x, names in seen:
                    if x is args[0]:
                        names.append(name)
                        return
                seen.append((args[0], [name]))

            handles.append(self.linear(name).register_forward_pre_hook(note))
        try:
            self.layer(*call.args, **call.kwargs)
        finally:
            handles.remove()
        groups = [names for _, names in seen]
        ran = {name for names in groups for name in names}
        for name in [name for name in self.linears if name not in ran]:
            self.leave(name, "the model reads its weight without calling it, so its inputs are unknown")
        return groups

    def leave(self, name: str, reason: str) -> None:
        """Excludes a linear from quantization."""
        del self.linears[name]
        self.unquantized[name] = reason


def _rows(args: tuple, kwargs: dict) -> Tensor:
    """The hidden states among a module's arguments, as rows [N, I]."""
    x = args[0] if args else kwargs["hidden_states"]
    return x.reshape(-1, x.shape[-1])
