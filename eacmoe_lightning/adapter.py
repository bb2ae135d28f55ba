"""What differs between MoE models, in one file: where a causal LM keeps its blocks, router, experts.

Every MoE of transformers 5 has the same joints under different names: a list of decoder layers, in
each a *router* that returns ``(router_logits [N,E], expert_weights [N,K], expert_ids [N,K])``, and an
*experts* module with the stacked weights ``gate_up_proj [E,2F,D]`` and ``down_proj [E,D,F]``. They are
found here by structure, never by class name, so that a new model needs no entry in a table. What is
found is checked: `MoEModel` refuses a model in which a block's router or experts cannot be told apart.

Letters: B batch, T sequence, N = B*T tokens, D hidden, F expert width, E experts, K top_k.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

import eacmoe_lightning.deepseek  # noqa: F401  (registers model_type "deepseek")
from eacmoe_lightning.forced_selection import forced_weights
from eacmoe_lightning.models.transformers_loader import select_in_router
from eacmoe_lightning.pruning.surgery import KEPT, keep_experts


@dataclass
class Routing:
    """What one router said for N tokens."""

    logits: Tensor  # [N, E] float32, before any softmax
    ids: Tensor  # [N, K] int64, the experts that were run
    weights: Tensor  # [N, K] their weights


class _Reached(BaseException):
    """Ends a forward pass at the module whose input was wanted."""


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
        """The two weights in the order in which a token meets them."""
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
    # of a pruned block: [E] the numbers that its experts have in the original
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
        """The numbers that this block's experts have in the original."""
        return list(range(self.num_experts)) if isinstance(self.kept, slice) else self.kept.tolist()

    def original_ids(self, ids: Tensor) -> Tensor:
        """This block's expert numbers [N, K] as the original counts them."""
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
        """[E], the bias that is part of the logits, where the router has one (gpt_oss)."""
        owner = self._router_parameter.rpartition(".")[0]
        return getattr(self.router.get_submodule(owner), "bias", None)

    def router_logits(self, x: Tensor, weight: Tensor | None = None) -> Tensor:
        """[N, D] -> [N, E] in float32, for the block's router or another weight in its place."""
        weight = self.router_weight if weight is None else weight
        bias = self.router_bias
        with torch.autocast(x.device.type, enabled=False):
            return nn.functional.linear(x.float(), weight.float(), None if bias is None else bias.float())

    # --- running the block -------------------------------------------------------------------

    def forward(self, hidden: Tensor, kwargs: dict, force_ids: Tensor | None = None) -> tuple[Tensor, Routing | None]:
        """Runs the block: [B, T, D] -> [B, T, D] and what its router said.

        With `force_ids` [N, K] the given experts run instead of the router's own choice, with the
        weights that this router's scores give to them (EAC-MoE, table 1).
        """
        routing: list[Routing] = []

        def record(module, args, output):
            logits, weights, ids = output
            if force_ids is not None:
                weights = forced_weights(module, logits, weights, ids, force_ids)
                ids = force_ids
            routing.append(Routing(logits.float(), ids, weights))
            return logits, weights, ids

        handle = self.router.register_forward_hook(record) if self.is_moe else None
        try:
            output = self.layer(hidden, **kwargs)
        finally:
            if handle is not None:
                handle.remove()
        output = output[0] if isinstance(output, tuple) else output
        return output, routing[0] if routing else None

    def input_of(self, module: nn.Module, hidden: Tensor, kwargs: dict) -> Tensor:
        """The tokens [N, I] that reach `module` for this hidden stream; what lies behind is not run."""
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
        """The routed experts give zeros, at no cost: for what does not depend on them."""
        module = self.experts.module
        module.forward = lambda hidden, *args, **kwargs: torch.zeros_like(hidden)
        try:
            yield
        finally:
            del module.forward  # the class has its own

    def depends_on_experts(self, module: nn.Module, hidden: Tensor, kwargs: dict) -> bool:
        """Whether what reaches `module` is another thing where the routed experts give zeros."""
        with self.without_experts():
            alone = self.input_of(module, hidden, kwargs)
        return not torch.equal(alone, self.input_of(module, hidden, kwargs))

    def route(self, x: Tensor) -> Routing:
        """What the router says of [N, D] inputs."""
        logits, weights, ids = self.router(x)
        return Routing(logits.float(), ids, weights)

    def weights(self) -> dict[str, tuple[str, Tensor]]:
        """Everything that is quantized: parameter name in the model -> (part, view [..., O, I])."""
        found = {f"{self.name}.{n}.weight": (part, self.linear(n).weight) for n, part in self.linears.items()}
        if self.is_moe:
            for projection in self.experts.projections:
                found[f"{self.name}.{self.experts_name}.{projection}"] = ("experts", self.experts.weight(projection))
        return found

    def as_parameter(self, name: str, weight: Tensor) -> Tensor:
        """A weight [..., O, I] of `weights` in the layout that its parameter has in the model."""
        transposed = self.weights()[name][0] == "experts" and self.experts.module.is_transposed
        return weight.transpose(-1, -2) if transposed else weight

    @property
    def router_parameter_name(self) -> str:
        return f"{self.name}.{self.router_name}.{self._router_parameter}"

    def input_groups(self, hidden: Tensor, kwargs: dict) -> list[list[str]]:
        """Linears that read the same tensor (q, k, v), in the order in which they run."""
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
            raise ValueError(f"{self.name}: {sorted(missing)} did not run, so nothing is known of their inputs")
        return groups


class MoEModel:
    """A causal LM as embedding, blocks and head, so that it can be run one block at a time."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.config = model.config.get_text_config()
        self.decoder, self.blocks = find_blocks(model)
        shrink_as_pruned(self.config, self.blocks)
        for block in self.moe_blocks:
            _keep_float32(block)
        if not any(block.is_moe for block in self.blocks):
            raise ValueError(
                f"{model.config.model_type!r} has no routed experts in any of its {len(self.blocks)} blocks: it is a "
                "dense model, and there is no router to calibrate. Pass a Mixture-of-Experts model "
                "(--model.name_or_path), for example `bundled`"
            )

    # --- where the weights are: here always in memory; `streaming.StreamedModel` fetches them ---------------

    def load(self, index: int) -> None:
        """Brings a block's original weights into memory, unless they are there."""

    def release(self, index: int) -> None:
        """Frees the memory of a block's weights; what was done to them is lost."""

    @contextmanager
    def loaded(self, index: int) -> Iterator[Block]:
        """The block with its weights in memory, for as long as the context lasts."""
        self.load(index)
        try:
            yield self.blocks[index]
        finally:
            self.release(index)

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Weights by their names in the model, whether or not their block is in memory."""
        state = self.model.state_dict()
        return {name: state[name] for name in names if name in state}

    # --- its parts ----------------------------------------------------------------------------------

    @property
    def moe_blocks(self) -> list[Block]:
        return [block for block in self.blocks if block.is_moe]

    @property
    def top_k(self) -> int:
        router = self.moe_blocks[0].router
        for owner, name in ((router, "top_k"), (self.config, "num_experts_per_tok"), (self.config, "moe_topk")):
            if isinstance(getattr(owner, name, None), int):
                return getattr(owner, name)
        raise ValueError(f"{self.config.model_type}: neither router nor config says how many experts a token selects")

    @property
    def num_experts(self) -> int:
        return self.moe_blocks[0].num_experts

    @property
    def is_pruned(self) -> bool:
        return any(not isinstance(block.kept, slice) for block in self.moe_blocks)

    @property
    def device(self) -> torch.device:
        return self.model.device

    def embed(self, input_ids: Tensor) -> tuple[Tensor, list[dict]]:
        """[B, T] -> hidden [B, T, D] as block 0 receives it, and each block's own keyword arguments.

        The masks and position embeddings come from the model's own forward pass with the blocks
        replaced by recorders, so nothing of it is rebuilt here.
        """
        seen: list[dict] = []
        first: list[Tensor] = []

        def recorder(hidden, *args, **kwargs):
            first.append(hidden)
            seen.append(kwargs)
            return hidden

        for block in self.blocks:
            block.layer.forward = recorder  # an instance attribute shadows the method
        try:
            self.decoder(input_ids=input_ids, use_cache=False)
        finally:
            for block in self.blocks:
                del block.layer.forward
        return first[0], seen

    def head(self, hidden: Tensor) -> Tensor:
        """[B, T, D] after the last block -> logits [B, T, V]."""
        return self.model.get_output_embeddings()(self.final_norm(hidden))

    @torch.no_grad()
    def logits(self, input_ids: Tensor) -> Tensor:
        """[B, T] -> [B, T, V], with one block after another."""
        hidden, kwargs = self.embed(input_ids)
        for index in range(len(self.blocks)):
            with self.loaded(index) as block:
                hidden, _ = block.forward(hidden, kwargs[index])
        return self.head(hidden)

    @property
    def final_norm(self) -> nn.Module:
        norms = [m for n, m in self.decoder.named_children() if "norm" in n and "embed" not in n]
        if len(norms) != 1:
            raise ValueError(f"{self.config.model_type}: {len(norms)} final norms found, not 1")
        return norms[0]

    def norms(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Every one-dimensional weight of a normalisation, by its name in the model."""
        for name, parameter in self.model.named_parameters():
            if parameter.ndim == 1 and "norm" in name.rpartition(".")[0].rpartition(".")[2]:
                yield name, parameter

    @contextmanager
    def recorded_logits(self) -> Iterator[dict[int, Tensor]]:
        """While the model runs inside: each MoE block's router logits [N, E] by block index, with gradients."""
        logits: dict[int, Tensor] = {}
        handles = [
            block.router.register_forward_hook(
                lambda m, args, out, i=block.index: logits.__setitem__(i, out[0].float())
            )
            for block in self.moe_blocks
        ]
        try:
            yield logits
        finally:
            for handle in handles:
                handle.remove()

    @torch.no_grad()
    def put(self, tensors: dict[str, Tensor]) -> None:
        """Copies tensors into the model's parameters of these names."""
        parameters = dict(self.model.named_parameters())
        for name, tensor in tensors.items():
            parameters[name].copy_(tensor)


def shrink_as_pruned(config: PreTrainedConfig, blocks: list[Block]) -> None:
    """Takes out of the blocks of a model what the config of a pruned model says was removed."""
    for index, kept in getattr(config, KEPT, {}).items():
        keep_experts(blocks[int(index)], kept)


def _keep_float32(block: Block) -> None:
    """Takes the router out of mixed precision: in bfloat16 its logits would flip selections by themselves."""
    router, own = block.router, block.router.__dict__.get("forward")
    if not (isinstance(own, partial) and own.func is _without_autocast):
        router.forward = partial(_without_autocast, router, own)


def _without_autocast(router: nn.Module, own: Callable | None, hidden: Tensor, *args, **kwargs):
    """A router's forward pass, by `own` where it had replaced the class's."""
    forward = own or partial(type(router).forward, router)
    if not torch.is_autocast_enabled(hidden.device.type):
        return forward(hidden, *args, **kwargs)
    with torch.autocast(hidden.device.type, enabled=False):
        return forward(hidden.to(next(router.parameters()).dtype), *args, **kwargs)


# --- finding the parts ---------------------------------------------------------------------------


def find_blocks(model: PreTrainedModel) -> tuple[nn.Module, list[Block]]:
    """The decoder that owns the longest list of layers, and its layers as `Block`s."""
    num_layers = model.config.get_text_config().num_hidden_layers
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == num_layers:
            decoder = model.get_submodule(name.rpartition(".")[0])
            blocks = [_find_parts(i, f"{name}.{i}", layer) for i, layer in enumerate(module)]
            break
    else:
        raise ValueError(f"{model.config.model_type}: no list of {num_layers} decoder layers found")
    moe_names = {block.experts_name.rpartition(".")[0] for block in blocks if block.is_moe}
    for block in blocks:  # a dense block's feed-forward sits where the others keep their experts
        for linear in block.linears:
            if any(linear.startswith(f"{moe}.") for moe in moe_names):
                block.linears[linear] = "shared"
    return decoder, blocks


def _find_parts(index: int, name: str, layer: nn.Module) -> Block:
    block = Block(index, name, layer)
    for path, module in layer.named_modules():
        down = getattr(module, "down_proj", None)
        if len(getattr(down, "shape", ())) == 3:  # a stack: dense, packed or offloaded
            block.experts, block.experts_name = Experts(module), path
    if block.is_moe:
        moe_name = block.experts_name.rpartition(".")[0]
        moe = layer.get_submodule(moe_name)
        routers = [
            (path, child)
            for path, child in moe.named_children()
            if child is not block.experts.module
            and any(p.ndim == 2 and len(p) == block.num_experts for p in child.parameters())
            and getattr(child, "out_features", block.num_experts) == block.num_experts
            and not any(isinstance(m, nn.Linear) and len(m.weight) != block.num_experts for m in child.modules())
        ]
        if len(routers) != 1:
            raise ValueError(f"{name}: {len(routers)} modules beside the experts look like a router, not 1")
        select_in_router(moe, routers[0][0])
        block.router_name, block.router = f"{moe_name}.{routers[0][0]}", routers[0][1]
    for path, module in layer.named_modules():
        if not isinstance(module, nn.Linear) or module.out_features == 1:
            continue  # a one-row linear is a shared expert's gate: it stays as it is
        if block.is_moe and (path == block.router_name or path.startswith(f"{block.router_name}.")):
            continue
        inside_moe = block.is_moe and path.startswith(f"{block.experts_name.rpartition('.')[0]}.")
        block.linears[path] = "shared" if inside_moe else "attention"
    return block
