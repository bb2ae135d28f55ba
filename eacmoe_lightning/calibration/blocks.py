"""QESC, block by block (EAC-MoE, section 4): the phases of each block, in the paper's order.

    read       loads the block's weights from disk
    observe    runs the full-precision block on x and records which experts it selects; then removes the experts that
               the pruning rule does not keep, so that all later phases see the pruned block
    attention  quantizes the attention projections on x_hat, the output of the compressed prefix
    router     calibrates the router, outside this module: a LightningModule trains it, or a closed form solves it
    experts    quantizes shared and routed experts on the tokens that the calibrated router sends to each
    block      trains codes, scales, norms and router of the whole block towards the original block's output on x,
               outside this module too; the paper has no such stage
    replay     runs x_hat through the compressed block

Only the current block's weights need to be in memory. Dequantized weights replace the original ones in place. When a
block is finished, its codes are on disk and its memory is free.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
from torch import Tensor

from eacmoe_lightning.calibration.inputs import BlockInputs
from eacmoe_lightning.calibration.overflow import overflow_in
from eacmoe_lightning.calibration.recipe import Recipe
from eacmoe_lightning.calibration.solver import BlockSolver
from eacmoe_lightning.calibration.streams import Streams
from eacmoe_lightning.models.block import Block, Call
from eacmoe_lightning.models.checkpoint import put
from eacmoe_lightning.models.experts import Groups
from eacmoe_lightning.models.moe import MoEModel
from eacmoe_lightning.models.routing import Routing
from eacmoe_lightning.models.shrink import keep_experts
from eacmoe_lightning.pruning.rule import PruningRule
from eacmoe_lightning.pruning.scores import ExpertScores, measured
from eacmoe_lightning.quantization.quantizers import QuantizedWeight
from eacmoe_lightning.routers import ridge
from eacmoe_lightning.routers.expert_shift import change_counts, change_rates, expert_load
from eacmoe_lightning.run.block_file import (
    BlockStats,
    Reconstruction,
    RemovedExperts,
    read_block,
    read_stats,
    write_block,
)
from eacmoe_lightning.run.directory import RunDirectory
from eacmoe_lightning.run.files import REMEDY, StoreError
from eacmoe_lightning.run.ranks import Ranks

log = logging.getLogger(__name__)
PHASES = ("read", "observe", "attention", "router", "experts", "block", "replay")


class Calibration:
    """Takes the blocks of a model through the phases, one at a time.

    Args:
        moe: the original model; its blocks are loaded, replaced and released one at a time.
        recipe: bits and quantizer.
        streams: the hidden streams of this process's calibration windows.
        run: the directory that finished blocks are written to.
        ranks: the processes of the run.
        phase: (block, phase) -> the context manager in which that phase runs, for timing and callbacks.
        pruning: chooses the experts to keep; None keeps all.
        trained_norms: the norms that the block stage trains, by parameter name.
    """

    def __init__(
        self,
        moe: MoEModel,
        recipe: Recipe,
        streams: Streams,
        run: RunDirectory,
        ranks: Ranks,
        phase: Callable[[int, str], AbstractContextManager] = lambda block, phase: nullcontext(),
        pruning: PruningRule | None = None,
        trained_norms: Collection[str] = (),
    ) -> None:
        self.moe, self.recipe, self.streams, self.run, self.ranks = moe, recipe, streams, run, ranks
        self.phase, self.pruning, self.trained_norms = phase, pruning, set(trained_norms)
        self.at: int | None = None  # the block that the streams have reached
        self.entered = False  # whether that block has been observed and its attention solved
        self.solved = False  # whether all its weights are
        self.solver: BlockSolver | None = None
        self.stats: BlockStats | None = None  # of the current block
        self._teacher: Routing | None = None  # the original router's output on x, for all tokens of this process
        self.inputs: BlockInputs | None = None  # of the current block

    @property
    def block(self) -> Block:
        return self.moe.blocks[self.at]

    # --- the phases of a block ------------------------------------------------------------------------

    @torch.no_grad()
    def enter(self, index: int, routers: dict[int, Tensor] | None, take_solved: bool = False) -> None:
        """Brings the streams to block `index`, observes it and solves its attention. Idempotent.

        If `index` is the number of blocks, brings both streams to the end of the model.

        Args:
            routers: calibrated weights [E, D] of earlier blocks, needed where a block's file is missing and the block
                is computed again. None if that is not possible.
            take_solved: take the solver's results for this block from the file that `solve` has kept.

        Raises:
            StoreError: an earlier block's file, or that of `take_solved`, is missing and cannot be computed again.
        """
        num_blocks = len(self.moe.blocks)
        if self.at == index and (self.entered or index == num_blocks):
            return
        self._bring_streams(index, routers)
        if index < num_blocks:
            self._observe_and_solve_attention(take_solved)

    def remove_solved(self, num_blocks: int) -> None:
        """Removes what `solve` has kept of the first blocks; no checkpoint may lead back into their training."""
        if self.ranks.is_first:
            for index in range(num_blocks):
                self.run.solved(index).unlink(missing_ok=True)

    def _observe_and_solve_attention(self, take_solved: bool = False) -> None:
        block, streams = self.block, self.streams
        with self.phase(block.index, "read"):
            self.moe.load(block.index)
        self.solver = BlockSolver(block, len(self.moe.blocks), self.recipe, self.ranks)
        self.stats = BlockStats(block.index, block.name)
        with self.phase(block.index, "observe"):
            with self._measured() as scores:
                self._observe()
            if scores is not None:
                self._prune(scores)
            self.inputs = BlockInputs(block, streams)
        self.entered, self.solved = True, take_solved
        if take_solved:
            if not (path := self.run.solved(block.index)).exists():
                raise StoreError(
                    f"{path} is missing, from which the training of block {block.index} goes on: continue from another "
                    "checkpoint (--ckpt_path), or start again in another directory (--trainer.default_root_dir)"
                )
            quantized, _, self.stats = read_block(self.run, block.index, is_finished=False)
            self.solver.solved = quantized
            self._put(quantized, {})
            return
        with self.phase(block.index, "attention"), self._overflow_named():
            self._solve_part("attention")
            if block.is_moe:
                self.inputs.keep_router_input()
                self._count_shift("before", self.inputs.route())
                self._count_sources()

    def _observe(self) -> None:
        """Runs x through the original block and keeps its router's output, also on disk for the joint stage."""
        self._teacher = self.streams.advance(self.block, "x")
        if self._teacher is not None:
            self.streams.write_teacher(self.at, self._teacher.logits)

    def _measured(self) -> AbstractContextManager[ExpertScores | None]:
        """A context that scores the block's experts, if some of them are to be removed."""
        prunes = self.pruning is not None and self.block.is_moe
        if not prunes:
            return nullcontext()
        streams = self.streams
        return measured(self.block, self.pruning.criterion, [partial(streams.counted, rows=r) for r in streams.slices])

    def _prune(self, scores: ExpertScores) -> None:
        """Removes the experts that the pruning rule does not keep from the current block."""
        block, values = self.block, scores.finish(self.ranks)
        known = self.pruning.kept and self.pruning.kept[block.index]
        kept = known or self.pruning.choose(values, block.top_k, Groups.of(block).number)
        removed = sorted(set(range(block.num_experts)) - set(kept))
        share = float(scores.load[removed].sum() / scores.load.sum())
        below = self.pruning.below_alpha(values, kept)
        self.stats.pruning = RemovedExperts(kept, removed, share, values.tolist(), below)
        if below:
            log.warning(
                "block %d: experts %s are below alpha=%g (--pruning.alpha) and stay, because every token selects %d",
                block.index, below, self.pruning.alpha, block.top_k,
            )  # fmt: skip
        keep_experts(block, kept)

    @torch.no_grad()
    def solve(self, router: Tensor | None, keep: bool = False) -> None:
        """Solves shared and routed experts under the calibrated router, unless that is done.

        Args:
            router: [E, D] with a row for each expert of the original; a pruned block takes the rows of the experts it
                kept. None if the block has no router to calibrate.
            keep: write the results to a file until the next block is entered (see `enter`).
        """
        if self.solved:
            return
        block = self.block
        with self.phase(block.index, "experts"), self._overflow_named():
            if block.calibrates:
                block.router_weight.copy_(router[block.kept])
            self._solve_part("shared")
            if block.is_moe and self.recipe.quantizes:
                with self.inputs.of_experts() as (rows, routing):
                    self.solver.solve_experts(rows, routing)
            if block.is_moe:
                self.stats.starved = self.solver.starved
        self.stats.error = self.solver.error
        if keep:
            self._write(is_finished=False)
        self.solved = True

    def drop_weights(self) -> None:
        """Frees the memory of the block's quantized weights until `take_trained`."""
        self.streams.forget_attention()
        for name in self.solver.solved:
            put(self.moe.model, name, self.moe.model.get_parameter(name).detach().to("meta"))

    @torch.no_grad()
    def take_trained(
        self, quantized: dict[str, QuantizedWeight], others: dict[str, Tensor], stats: Reconstruction
    ) -> None:
        """Takes what the block stage has trained: quantized weights, and router and norms, by parameter name."""
        self.streams.forget_attention()
        self.solver.solved |= quantized
        self.stats.reconstruction = stats
        self._put(quantized, others)

    @torch.no_grad()
    def leave(self) -> BlockStats:
        """Replays the compressed block and writes it. Returns the block's statistics."""
        block, streams = self.block, self.streams
        with self.phase(block.index, "replay"):
            routing = streams.advance(block, "x_hat")
            if block.is_moe:
                self._count_shift("after", routing)
        self._write()
        self.moe.release(self.at)
        self.at, self.entered, self.solved = self.at + 1, False, False
        self.inputs.delete()
        self._teacher = self.inputs = None
        streams.step(self.at)
        return self.stats

    def _overflow_named(self) -> AbstractContextManager:
        return overflow_in(f"{self.block.name} (block {self.at}), with the compressed weights", self.moe.model.dtype)

    def _solve_part(self, part: str) -> None:
        if self.recipe.quantizes:
            self.inputs.solve_part(self.solver, part, keep=part == "attention")

    # --- the router's training rows ---------------------------------------------------------------------

    def router_rows(self, window_ids: Tensor) -> tuple[Tensor, Tensor]:
        """The router's training rows of the windows with these global indices [b].

        Returns:
            Inputs [b*T, D] and teacher logits [b*T, E] of the experts that the block still has.
        """
        return self.inputs.rows(self._teacher, self.streams.local(window_ids))

    @torch.no_grad()
    def ridge_router(self, num_targets: int, strength: float) -> Tensor:
        """The closed-form router [E, D] of the current block (see `ridge`).

        If the sums of all experts do not fit into `solver_gib`, they are solved in parts, with one pass over the
        router's inputs for each part.
        """
        weight = self.block.router_weight.float()
        num_experts, width = weight.shape
        shared, updated = num_targets == num_experts, []
        together = ridge.experts_together(num_experts, width, self.recipe.solver_gib, shared)
        for start in range(0, num_experts, together):
            experts = slice(start, min(start + together, num_experts))
            sums = ridge.NormalEquations(experts, width, weight.device, shared)
            for x, target in self._ridge_rows():
                residual = self.block.logit_map.products(target) - self.block.router_products(x)
                sums.add(x.float(), residual, self.block.choice(target).topk(num_targets, dim=-1).indices)
            for total in (sums.gram, sums.cross, sums.squares):
                self.ranks.sum(total)
            updated.append(ridge.solve(weight, sums, strength))
        return torch.cat(updated)

    def _ridge_rows(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches on the model's device: inputs [n, D], teacher logits [n, E] of the experts that the block has."""
        for rows in self.streams.slices:
            x, target = self.inputs.rows(self._teacher, rows)
            yield tuple(self.streams.to_device(self.streams.counted(part, rows)) for part in (x, target))

    # --- the block stage's training rows -----------------------------------------------------------------

    def block_rows(self, window_ids: Tensor) -> tuple[Call, Tensor, Tensor | None]:
        """The block stage's training rows of the windows with these global indices [b]; after `solve`.

        Returns:
            The block's call on x_hat; its target, the original block's output on x [b, T, D]; and the original
            router's logits [b*T, E] for the experts that the block still has, None for a dense block.
        """
        local = self.streams.local(window_ids)
        teacher = None
        if self.block.is_moe:
            logits = self._teacher.logits.view(*self.streams.windows.shape, -1)[local].flatten(0, 1)
            teacher = self.streams.to_device(logits[:, self.block.kept])
        return (*self.streams.block_rows(self.block, local), teacher)

    # --- statistics ----------------------------------------------------------------------------------------

    def _count_shift(self, when: str, routing: Routing) -> None:
        """Records change rates and expert loads on the calibration stream under the router's current weights."""
        routing, teacher, sum_ = self._counted(routing), self._counted(self._teacher), self.ranks.sum
        student_ids = self.block.original_ids(routing.ids)
        counts = sum_(change_counts(teacher.ids, student_ids))
        tokens, top_k = sum_(torch.tensor(len(routing.ids))), routing.ids.shape[1]
        self.stats.expert_shift[when] = change_rates(counts, int(tokens), top_k)
        name, ids = ("original", teacher.ids) if when == "before" else ("compressed", student_ids)
        load = sum_(expert_load(ids, self._teacher.logits.shape[1]))
        self.stats.expert_load[name] = load.tolist()

    def _count_sources(self) -> None:
        """Records the original router's loads by calibration text, and warns if the first router starves experts."""
        teacher, streams, num_experts = self._teacher, self.streams, self._teacher.logits.shape[1]
        if streams.sources is None:
            return
        for windows in streams.sources:
            tokens = streams.counted(windows.repeat_interleave(len(teacher.ids) // len(windows)))
            load = self.ranks.sum(expert_load(streams.counted(teacher.ids)[tokens], num_experts))
            self.stats.source_load.append(load.tolist())
        fewest = self.recipe.min_expert_tokens if self.recipe.quantizes else 0
        starved = [e for e, load in enumerate(self.stats.expert_load["original"]) if load < fewest]
        if starved and self.at == self.moe.moe_blocks[0].index and self.ranks.is_first:
            log.warning(
                "block %d: fewer than %d tokens (--model.min_expert_tokens) select each of %d of the %d experts: %s. "
                "More windows (--data.num_windows) or other texts (--data.calibration) reach more of them",
                *(self.at, fewest, len(starved), num_experts, ", ".join(map(str, starved[:16]))),
            )

    def _counted(self, routing: Routing) -> Routing:
        """The routing of the tokens that count."""
        return Routing(*(self.streams.counted(part) for part in (routing.logits, routing.ids, routing.weights)))

    # --- between blocks -----------------------------------------------------------------------------------

    def _bring_streams(self, index: int, routers: dict[int, Tensor] | None) -> None:
        """Brings both streams to the input of block `index`: from memory, from files, or by running earlier blocks."""
        if self.at == index:
            return
        exists = [self.run.block(i).exists() for i in range(index)]
        start = self.at
        if start is None:
            first_missing = exists.index(False) if False in exists else index
            start = next((i for i in range(first_missing, 0, -1) if self.streams.can_read(i)), 0)
            self.streams.embed()
            if start:
                self.streams.read(start)
            for i in range(start):
                self.shrink(i)
        for i in range(start, index):
            self.at = i
            if exists[i]:
                with self.moe.loaded(i):
                    self._observe()
                    self._restore(i)
                    self.streams.advance(self.block, "x_hat")
                self.streams.step(i + 1, keep=False)
            else:
                if routers is None:
                    raise StoreError(
                        f"{self.run.block(i)} is missing, and a block that was trained cannot be computed by itself: "
                        f"delete {self.run.path / 'checkpoints'} and continue with --ckpt_path auto, which computes "
                        "the blocks again"
                    )
                log.warning("block %d is not in %s: computing it again", i, self.run.path)
                self._observe_and_solve_attention()
                self.solve(routers.get(i))
                self.leave()
        self.at, self.entered = index, False

    def shrink(self, index: int) -> None:
        """Removes from a block the experts that the run has pruned, whether or not its weights are in memory."""
        if self.pruning is not None and self.moe.blocks[index].is_moe:
            keep_experts(self.moe.blocks[index], read_stats(self.run, index).pruning.kept)

    def _restore(self, index: int) -> None:
        """Loads the weights and router of a finished block into the model."""
        block = self.moe.blocks[index]
        quantized, others, _ = read_block(self.run, index)
        self.shrink(index)
        if self.recipe.quantizes and quantized.keys() != block.weights().keys():
            raise StoreError(
                f"{self.run.block(index)} does not hold the weights of {block.name}: "
                f"{sorted(quantized.keys() ^ block.weights().keys())[0]} is in only one of them; {REMEDY}"
            )
        self._put(quantized, others)

    def _put(self, quantized: dict[str, QuantizedWeight], others: dict[str, Tensor]) -> None:
        """Copies quantized weights, and others by parameter name, into the current block."""
        block = self.moe.blocks[self.at]
        weights = block.weights()
        for name, q in quantized.items():
            decoded = q.dequantize(weights[name][1].dtype)
            if weights[name][1].is_meta:
                put(self.moe.model, name, block.as_parameter(name, decoded).contiguous())
            else:
                weights[name][1].copy_(decoded)
        for name, tensor in others.items():
            block.layer.get_parameter(name.removeprefix(f"{block.name}.")).copy_(tensor)

    def _write(self, is_finished: bool = True) -> None:
        if not self.ranks.is_first:
            return
        block = self.block
        trained = {block.router_parameter_name} if block.calibrates else set()
        trained |= self.trained_norms
        others = {n: p for n, p in block.layer.named_parameters(block.name) if n in trained}
        write_block(self.run, self.stats, self.solver.solved, others, is_finished)
