"""QESC, block by block (EAC-MoE, section 4): what happens between two blocks of a model, in the paper's order.

    observe    the full-precision block runs on x and says which experts it selects
    attention  GPTQ of the attention projections, on what the compressed prefix really produces (x_hat)
    router     calibrated outside, by a LightningModule or in closed form, on the rows offered here
    experts    GPTQ of shared and routed experts; the calibrated router decides which tokens each one sees
    replay     x_hat runs through the compressed block

Both streams rest in the run directory between blocks. Quantized weights replace the original ones in place (as
dequantized values), so one model is in memory: blocks before the current one are compressed, the others original.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from eacmoe_lightning import expert_shift, ridge
from eacmoe_lightning.adapter import Block, MoEModel, Routing
from eacmoe_lightning.gptq import gptq, output_error
from eacmoe_lightning.grid import Quantized, pack, round_to_nearest, unpack
from eacmoe_lightning.memory import peak_memory, reset_peak_memory
from eacmoe_lightning.ranks import Ranks
from eacmoe_lightning.recipe import Recipe
from eacmoe_lightning.store import RunDirectory, StoreError, read_tensors, write_tensors

log = logging.getLogger(__name__)

PHASES = ("observe", "attention", "router", "experts", "replay")
HESSIAN_BYTES = 2 << 30  # experts are solved together as far as their Hessians fit in this


class Calibration:
    """The two streams of this process's windows, and the block that they have reached.

    Args:
        moe: the original model; its blocks are replaced one after another.
        recipe: bits and solver.
        windows: [S, T] token ids of this process.
        first_window: global index of the first of them.
        batch_size: windows per forward pass.
        run: where blocks and streams are kept.
        ranks: the processes.
        on_phase: called with (block, phase) when a phase begins.
    """

    def __init__(
        self,
        moe: MoEModel,
        recipe: Recipe,
        windows: Tensor,
        first_window: int,
        batch_size: int,
        run: RunDirectory,
        ranks: Ranks,
        on_phase: Callable[[int, str], None] = lambda block, phase: None,
    ) -> None:
        self.moe, self.recipe, self.windows, self.first_window = moe, recipe, windows, first_window
        self.run, self.ranks, self.on_phase = run, ranks, on_phase
        self.slices = [slice(i, i + batch_size) for i in range(0, len(windows), batch_size)]
        self.at: int | None = None  # the block that the streams have reached
        self.entered = False  # whether it was observed and its attention solved
        self.x = self.x_hat = torch.empty(0)  # [S, T, D] original and compressed stream, before block `at`
        self.x_next = torch.empty(0)
        self.kwargs: dict[int, list[dict]] = {}  # by batch size: each block's keyword arguments
        self.teacher: Routing | None = None  # what the original router says of x, all tokens of this process
        self.router_input = torch.empty(0)  # [S, T, D] what reaches the router in the compressed stream
        self.solved: dict[str, Quantized] = {}
        self.stats: dict = {}
        self._teachers: dict[int, Tensor] = {}  # by block: the original router's logits, for the joint stage

    @property
    def block(self) -> Block:
        return self.moe.blocks[self.at]

    # --- the four verbs of a block --------------------------------------------------------------

    @torch.no_grad()
    def enter(self, index: int, routers: dict[int, Tensor]) -> None:
        """Brings the streams to block `index`, observes it and solves its attention. Idempotent.

        With the number of blocks as index, both streams are brought to the end of the model.

        Args:
            routers: calibrated weights [E, D] of the blocks before, for files that must be computed again.
        """
        if self.at == index and (self.entered or index == len(self.moe.blocks)):
            return
        self._bring_streams(index, routers)
        if index < len(self.moe.blocks):
            self._observe_and_solve_attention()

    @torch.no_grad()
    def leave(self, router: Tensor | None) -> dict:
        """Solves the experts under the calibrated router [E, D], replays the block and writes it.

        Returns:
            The block's statistics, as in the report.
        """
        block = self.block
        with self.phase("experts"):
            if block.is_moe:
                block.router_weight.copy_(router)
                self._count_shift("after")
            self._solve(self._part_groups("shared"))
            if block.is_moe:
                self._solve_experts()
        with self.phase("replay"):
            self.x_hat = self._forward(self.x_hat)
            self.x = self.x_next
        self._write()
        stats, self.at, self.entered = self.stats, self.at + 1, False
        self.x_next = self.router_input = torch.empty(0)
        self.teacher = None
        self._write_streams()
        return stats

    def _observe_and_solve_attention(self) -> None:
        block = self.block
        self.solved, self.stats = {}, {"block": block.index, "name": block.name, "error": {}}
        with self.phase("observe"):
            self.x_next = self._observe()
            first = self.slices[0]
            self._groups = block.input_groups(self._to_model(self.x_hat[first]), self._kwargs(first))
        with self.phase("attention"):
            self._solve(self._part_groups("attention"))
            if block.is_moe:
                rows = self._input_of(block.router)
                self.router_input = torch.cat(list(rows)).view(*self.x_hat.shape[:2], -1)
                self._count_shift("before")
        self.entered = True

    def _observe(self) -> Tensor:
        """x through the original block; what its router says is kept, on disk too for the joint stage."""
        routings: list[Routing | None] = []
        output = self._forward(self.x, routings)
        if self.block.is_moe:
            self.teacher = _concatenate(routings)
            path = self.run.teacher(self.at, self.ranks.rank, self.ranks.world)
            write_tensors(path, {"logits": self.teacher.logits.half()}, self._windows_note)
        return output

    # --- the router's rows ------------------------------------------------------------------------

    def router_rows(self, window_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Training rows of some windows of this process, by global index [b]: inputs [b*T, D], teacher logits [b*T, E]."""
        local = window_ids - self.first_window
        teacher = self.teacher.logits.view(*self.router_input.shape[:2], -1)
        return self.router_input[local].flatten(0, 1), teacher[local].flatten(0, 1)

    def joint_rows(self, window_ids: Tensor) -> tuple[Tensor, dict[int, Tensor]]:
        """For the joint stage, of some windows by global index [b]: the original's last hidden state [b, T, D], and
        by MoE block the original router's logits [b*T, E]."""
        local = window_ids - self.first_window
        if not self._teachers:
            for block in self.moe.moe_blocks:
                tensors, _ = read_tensors(self.run.teacher(block.index, self.ranks.rank, self.ranks.world))
                self._teachers[block.index] = tensors["logits"].view(*self.x.shape[:2], -1)
        return self.x[local], {i: logits[local].flatten(0, 1).float() for i, logits in self._teachers.items()}

    @torch.no_grad()
    def restore_all(self) -> None:
        """Puts every written block in the model's place, whatever is in memory; streams are not needed."""
        for block in self.moe.blocks:
            self._restore(block.index)
        self.at, self.entered = None, False

    @torch.no_grad()
    def ridge_router(self, num_targets: int, strength: float) -> Tensor:
        """The closed-form router [E, D] of the current block (see `ridge`)."""
        x, teacher = self.router_input.flatten(0, 1), self.teacher.logits
        residual = teacher - self.block.router_logits(x)
        gram, cross = ridge.normal_equations(x.float(), residual, teacher.topk(num_targets, dim=-1).indices)
        self.ranks.sum(gram)
        self.ranks.sum(cross)
        return ridge.solve(self.block.router_weight.float(), gram, cross, strength)

    def _count_shift(self, when: str) -> None:
        """Change rates and loads on the calibration stream, with the router as it is now."""
        routing = self._route()
        counts = self.ranks.sum(expert_shift.change_counts(self.teacher.ids, routing.ids))
        tokens = self.ranks.sum(torch.tensor(len(routing.ids)))
        self.stats.setdefault("expert_shift", {})[when] = expert_shift.change_rates(
            counts, int(tokens), routing.ids.shape[1]
        )
        if when == "before":
            load = self.ranks.sum(expert_shift.expert_load(self.teacher.ids, self.block.num_experts))
            self.stats["expert_load"] = {"original": load.tolist()}
        else:
            load = self.ranks.sum(expert_shift.expert_load(routing.ids, self.block.num_experts))
            self.stats["expert_load"]["compressed"] = load.tolist()

    def _route(self) -> Routing:
        return _concatenate([self.block.route(self.router_input[s].flatten(0, 1)) for s in self.slices])

    # --- solving ------------------------------------------------------------------------------------

    def _part_groups(self, part: str) -> list[list[str]]:
        return [names for names in self._groups if self.block.linears[names[0]] == part]

    def _solve(self, groups: list[list[str]]) -> None:
        """Quantizes groups of linears that share their input, one after another in the order of the run."""
        for names in groups:
            hessian = self._hessian(self._input_of(self.block.linear(names[0])))
            for name in names:
                self._quantize(f"{self.block.name}.{name}.weight", hessian)

    def _hessian(self, inputs: Iterator[Tensor]) -> Tensor:
        """2/n sum x x^T over all processes, [I, I] float32."""
        total, tokens = None, torch.zeros((), dtype=torch.int64)
        for x in inputs:
            product = x.float().T @ x.float()
            total = product if total is None else total.add_(product)
            tokens += len(x)
        return self.ranks.sum(total) * (2 / int(self.ranks.sum(tokens)))

    def _quantize(self, name: str, hessian: Tensor) -> None:
        part, weight = self.block.weights()[name]
        grid = self.recipe.grid(self.block.index, len(self.moe.blocks), part)
        quantized = self._solver(weight, hessian, grid)
        self.stats["error"][name] = float(output_error(weight, quantized, hessian))
        self._put(name, quantized)

    def _solver(self, weight: Tensor, hessian: Tensor, grid) -> Quantized:
        if self.recipe.quantizer == "rtn":
            return round_to_nearest(weight, grid)
        return gptq(weight, hessian, grid, self.recipe.damping, self.recipe.act_order)

    def _put(self, name: str, quantized: Quantized) -> None:
        """Keeps the codes and puts their values in the weight's place."""
        weight = self.block.weights()[name][1]
        weight.copy_(quantized.dequantize(weight.dtype))
        self.solved[name] = quantized

    def _solve_experts(self) -> None:
        """Both projections of every expert, as many experts at a time as their Hessians allow."""
        block, experts = self.block, self.block.experts
        x = self.router_input.flatten(0, 1)
        routing = self._route()
        tokens, token_weights = self._expert_tokens(routing)
        names = {p: f"{block.name}.{block.experts_name}.{p}" for p in experts.projections}
        grid = self.recipe.grid(block.index, len(self.moe.blocks), "experts")
        parts: dict[str, list[Quantized]] = {p: [] for p in experts.projections}
        errors: dict[str, list[float]] = {p: [] for p in experts.projections}
        width = max(experts.weight(p).shape[-1] for p in experts.projections)
        chunk = max(1, HESSIAN_BYTES // (4 * width * width))
        for start in range(0, block.num_experts, chunk):
            chosen = range(start, min(start + chunk, block.num_experts))
            for projection in experts.projections:
                weight = experts.weight(projection)
                hessian = torch.zeros(len(chosen), weight.shape[-1], weight.shape[-1], device=weight.device)
                for i, e in enumerate(chosen):
                    rows = x[tokens[e]]
                    rows = (rows if projection == experts.up_name else experts.intermediate(rows, e)).float()
                    hessian[i] = rows.T @ (rows * token_weights[e][:, None])
                self.ranks.sum(hessian)
                quantized, error = self._solve_stack(weight[chosen.start : chosen.stop], hessian, grid)
                parts[projection].append(quantized)
                errors[projection] += error.tolist()
                weight[chosen.start : chosen.stop] = quantized.dequantize(weight.dtype)
        for projection, name in names.items():
            stack = parts[projection]
            fields = (torch.cat([getattr(q, f) for q in stack]) for f in ("codes", "scale", "zero_point"))
            self.solved[name] = Quantized(*fields, bits=grid.bits)
            self.stats["error"][name] = sum(errors[projection]) / len(errors[projection])

    def _solve_stack(self, weight: Tensor, hessian: Tensor, grid) -> tuple[Quantized, Tensor]:
        """A stack of experts [S, O, I], divided among the processes and shared."""
        world, rank = self.ranks.world, self.ranks.rank
        num = len(weight)
        shares = [range(num * r // world, num * (r + 1) // world) for r in range(world)]
        groups = weight.shape[-1] // grid.group_size
        codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
        scale = torch.empty((*weight.shape[:-1], groups), dtype=torch.float16, device=weight.device)
        zero = torch.empty((*weight.shape[:-1], groups), dtype=torch.uint8, device=weight.device)
        mine = slice(shares[rank].start, shares[rank].stop)
        if len(shares[rank]):
            solved = self._solver(weight[mine], hessian[mine], grid)
            codes[mine], scale[mine], zero[mine] = solved.codes, solved.scale, solved.zero_point
        for source, share in enumerate(shares):
            if len(share):
                for tensor in (codes, scale, zero):
                    self.ranks.broadcast(tensor[share.start : share.stop], source)
        quantized = Quantized(codes, scale, zero, grid.bits)
        return quantized, output_error(weight, quantized, hessian)

    def _expert_tokens(self, routing: Routing) -> tuple[list[Tensor], list[Tensor]]:
        """For each expert the tokens [n] that its Hessians are made of, and their weights [n].

        They are those that the router sends it. An expert with fewer than `min_expert_tokens` (over all
        processes) is starved: it borrows the other tokens that the router scores highest for it.
        """
        num_experts, wanted = self.block.num_experts, self.recipe.min_expert_tokens
        load = self.ranks.sum(expert_shift.expert_load(routing.ids, num_experts)).tolist()
        self.stats["starved"] = [e for e in range(num_experts) if load[e] < wanted]
        probabilities = routing.logits.softmax(-1)
        tokens, weights = [], []
        for e in range(num_experts):
            routed = (routing.ids == e).any(-1)
            chosen = routed
            if load[e] < wanted:
                score = routing.logits[:, e].masked_fill(routed, -torch.inf)
                best = torch.full((wanted - load[e],), -torch.inf, device=score.device)
                top = score.topk(min(len(best), len(score))).values
                best[: len(top)] = top
                threshold = torch.cat(self.ranks.gather(best)).topk(len(best)).values[-1]
                chosen = routed | ((score >= threshold) & score.isfinite())
            index = chosen.nonzero().squeeze(1)
            tokens.append(index)
            weights.append(probabilities[index, e].square() if self.recipe.affinity else torch.ones(len(index)))
        return tokens, weights

    # --- running the current block --------------------------------------------------------------------

    def _kwargs(self, rows: slice) -> dict:
        return self.kwargs[len(self.windows[rows])][self.at]

    def _forward(self, stream: Tensor, routings: list | None = None) -> Tensor:
        """[S, T, D] through the block as it now is."""
        outputs = []
        for rows in self.slices:
            output, routing = self.block.forward(self._to_model(stream[rows]), self._kwargs(rows))
            outputs.append(output.to(stream.dtype))
            if routings is not None:
                routings.append(routing)
        return torch.cat(outputs)

    def _input_of(self, module) -> Iterator[Tensor]:
        for rows in self.slices:
            yield self.block.input_of(module, self._to_model(self.x_hat[rows]), self._kwargs(rows))

    def _to_model(self, stream: Tensor) -> Tensor:
        return stream.to(self.moe.device, self.moe.model.dtype)

    # --- between blocks: files --------------------------------------------------------------------------

    @torch.no_grad()
    def _bring_streams(self, index: int, routers: dict[int, Tensor]) -> None:
        """Puts both streams before block `index`, from memory, from files or by running what lies before."""
        if self.at == index:
            return
        exists = [self.run.block(i).exists() for i in range(index)]
        first_missing = exists.index(False) if False in exists else index
        start = 0
        if self.at is None:
            self._embed()
            for candidate in range(first_missing, 0, -1):
                if self._everybody_has(candidate):
                    self._read_streams(candidate)
                    start = candidate
                    break
            for i in range(start):
                self._restore(i)
        else:
            start = self.at
        for i in range(start, index):
            self.at = i
            if exists[i]:
                self.x = self._observe()
                self._restore(i)
                self.x_hat = self._forward(self.x_hat)
            else:
                log.warning("block %d is not in %s: computing it again", i, self.run.path)
                self._observe_and_solve_attention()
                self.leave(routers.get(i))
        self.at, self.entered = index, False

    def _embed(self) -> None:
        hidden = []
        for rows in self.slices:
            h, kwargs = self.moe.embed(self.windows[rows].to(self.moe.device))
            self.kwargs.setdefault(len(h), kwargs)
            hidden.append(h)
        self.x = self.x_hat = torch.cat(hidden).float()

    def _restore(self, index: int) -> None:
        """Puts a written block's weights and router in the model's place."""
        self.at = index
        quantized, others, _ = read_block(self.run, index)
        expected = self.block.weights()
        if quantized.keys() != expected.keys():
            raise StoreError(f"{self.run.block(index)} holds other weights than {self.block.name} of this model")
        for name, q in quantized.items():
            expected[name][1].copy_(q.dequantize(self.moe.model.dtype))
        if self.block.is_moe:
            self.block.router_weight.copy_(others[self.block.router_parameter_name])

    def _write(self) -> None:
        if not self.ranks.is_first:
            return
        tensors, bits = {}, {}
        for name, q in self.solved.items():
            tensors |= {
                f"{name}.codes": pack(q.codes, q.bits),
                f"{name}.scale": q.scale,
                f"{name}.zero_point": q.zero_point,
            }
            bits[name] = {"bits": q.bits, "in_features": q.codes.shape[-1]}
        if self.block.is_moe:
            tensors[self.block.router_parameter_name] = self.block.router_weight
        write_tensors(self.run.block(self.block.index), tensors, {"quantized": bits, "stats": self.stats})

    def _write_streams(self) -> None:
        path = self.run.streams(self.at, self.ranks.rank, self.ranks.world)
        write_tensors(path, {"x": self.x, "x_hat": self.x_hat}, self._windows_note)
        self.ranks.barrier()
        for old in path.parent.glob("block_*.safetensors"):  # a checkpoint may lie one block behind
            if int(old.stem.rpartition("_")[2]) < self.at - 1:
                old.unlink()

    def _everybody_has(self, index: int) -> bool:
        """Whether every process finds its streams before block `index`, and the teacher's logits up to there."""
        rank, world = self.ranks.rank, self.ranks.world
        files = [self.run.teacher(b.index, rank, world) for b in self.moe.moe_blocks if b.index < index]
        found = all(path.exists() for path in (self.run.streams(index, rank, world), *files))
        return int(self.ranks.sum(torch.tensor(int(found)))) == world

    def _read_streams(self, index: int) -> None:
        path = self.run.streams(index, self.ranks.rank, self.ranks.world)
        tensors, note = read_tensors(path)
        if note != self._windows_note:
            raise StoreError(f"{path} holds the streams of other windows; delete it and continue with --ckpt_path last")
        self.x, self.x_hat = tensors["x"], tensors["x_hat"]

    @property
    def _windows_note(self) -> dict:
        return {"windows": [self.first_window, len(self.windows)]}

    @contextmanager
    def phase(self, name: str):
        """Announces a phase of the current block, and writes down what it cost."""
        self.on_phase(self.block.index, name)
        reset_peak_memory()
        start = time.perf_counter()
        yield
        if self.ranks.is_first:
            self.run.add_cost(self.block.index, name, time.perf_counter() - start, peak_memory())


def read_block(run: RunDirectory, index: int) -> tuple[dict[str, Quantized], dict[str, Tensor], dict]:
    """A written block: quantized weights, other tensors (the router) and statistics, by parameter name."""
    tensors, note = read_tensors(run.block(index))
    quantized = {}
    for name, spec in note["quantized"].items():
        codes = unpack(tensors.pop(f"{name}.codes"), spec["bits"], spec["in_features"])
        quantized[name] = Quantized(
            codes, tensors.pop(f"{name}.scale"), tensors.pop(f"{name}.zero_point"), spec["bits"]
        )
    return quantized, tensors, note["stats"]


def _concatenate(routings: list[Routing]) -> Routing:
    return Routing(*(torch.cat([getattr(r, f) for r in routings]) for f in ("logits", "ids", "weights")))
