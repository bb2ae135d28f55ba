"""What `fit` does before its first batch: it checks options, model, data and machine, and begins or resumes the run.

What can be refused is refused before anything long starts and before the run directory holds anything. Then the model
is checked on one window, calibration text is sampled if a model writes it, and bits are chosen if a size was given.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lightning.pytorch import Trainer

from eacmoe_lightning import targets
from eacmoe_lightning.budget.rest import Rest
from eacmoe_lightning.budget.target import BySize
from eacmoe_lightning.calibration.head import check_head, quantize_head
from eacmoe_lightning.calibration.recipe import Recipe
from eacmoe_lightning.exports.linears import original_of
from eacmoe_lightning.job.sampling import SampledTexts
from eacmoe_lightning.models.checkpoint import Checkpoint
from eacmoe_lightning.models.moe import MoEModel
from eacmoe_lightning.models.streamed import StreamedModel
from eacmoe_lightning.planning.checks import check_disk, check_memory, check_original, warn_of_guessing
from eacmoe_lightning.planning.sizes import job_of
from eacmoe_lightning.pruning.rule import PruningRule
from eacmoe_lightning.run.block_file import write_head
from eacmoe_lightning.run.files import StoreError, read_json, write_json
from eacmoe_lightning.run.memory import Watch, available_memory

if TYPE_CHECKING:
    from eacmoe_lightning.job.qesc import QESC

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class BegunRun:
    """What the checks have opened and chosen.

    Attributes:
        moe: the original; its linears that cannot be packed are left out of quantization.
        texts: the calibration texts that a model wrote.
        recipe, pruning: as asked for, or with the widths and the experts that have the size asked for.
        is_resident: whether the joint stage has room for all blocks.
    """

    moe: StreamedModel
    texts: SampledTexts
    recipe: Recipe
    pruning: PruningRule | None
    is_resident: bool


def begin(module: QESC) -> BegunRun:
    """Checks a run, and begins or resumes it; every process calls it.

    Raises:
        ValueError, FileNotFoundError: an option does not suit the model, the data, the machine, the target or the run
            in the directory; or another job works there.
    """
    trainer, data, run = module.trainer, module.trainer.datamodule, module.run
    resumes = getattr(trainer, "resumes", trainer.ckpt_path is not None)
    others = _folders_of_loggers(trainer, run.path)
    if trainer.is_global_zero:
        module.lock.refuse_if_taken()
        run.check(module.settings(), resumes, others)  # before a large model is read
    moe, choice = open_original(module)
    memory = available_memory(moe.device)
    job = job_of(module, data, moe, trainer.world_size, moe.device.type, memory)
    is_resident = check_memory(moe, module.recipe, job)
    texts = SampledTexts(data, run, moe, module.ranks, module.name_or_path, module.dtype_name, module.trust_remote_code)
    texts.check()
    if trainer.is_global_zero:
        if not resumes:
            print(check_disk(moe, module.recipe, job, run.path.absolute()))
            if not is_resident:
                print("the joint stage streams the blocks, because they do not fit into memory together")
            for text, share in data.fullness.items():
                print(f"the windows of {text} are {share:.0%} full")
        module.lock.take()
        run.check(module.settings(), resumes, others)  # another job may have ended in between
        watch = Watch()
        if not resumes or _is_lost(run.unquantized):
            window, positions = data.checked_window(moe.config.vocab_size)
            state = check_original(moe, window, positions)
            if data.reads_text:
                warn_of_guessing(moe, window, state)
            checked = watch.cost()
            write_json(run.unquantized, moe.unquantized)
        watch_head = Watch()
        head = {} if run.head.exists() else quantize_head(moe, module.recipe)
        if head and not resumes:
            check_head(moe, head, window.to(moe.device), state)
        head_cost = watch_head.cost()
        texts.prepare(resumes)
    trainer.strategy.barrier()
    watch_sampling = Watch()
    texts.make()
    if trainer.is_global_zero:
        identity, sampled = module.identity(), watch_sampling.cost()
        run.start(identity, resumes, others)
        if not resumes:
            run.add_cost(None, "check", checked)
            if texts.texts:
                run.add_cost(None, "sample", sampled)
        if head:
            write_head(run, head)
            run.add_cost(None, "head", head_cost)
    trainer.strategy.barrier()
    moe.leave(read_json(run.unquantized))
    recipe, pruning = _choose_bits(module, choice) if choice is not None else (module.recipe, module.pruning)
    return BegunRun(moe, texts, recipe, pruning, is_resident)


def _is_lost(unquantized: Path) -> bool:
    """Whether a run that goes on has lost what the check of the model found, so that the model is checked again."""
    try:
        read_json(unquantized)
    except StoreError as error:
        log.warning("%s: the model is checked again", str(error).partition(";")[0])
        return True
    return False


def _folders_of_loggers(trainer: Trainer, run: Path) -> set[str]:
    """What the trainer's loggers may have made in the run directory before the run began, by name."""
    paths = {getattr(logger, "log_dir", None) or logger.save_dir for logger in trainer.loggers}
    inside = [Path(os.path.relpath(path, run)).parts for path in paths if path is not None]
    return {parts[0] for parts in inside if parts and parts[0] != os.pardir}


def open_original(module: QESC) -> tuple[StreamedModel, BySize | None]:
    """The original, opened; data, recipe, pruning, size, target and router loss suit it.

    With a size, also what bits are chosen with.

    Raises:
        ValueError, FileNotFoundError: one of them does not.
    """
    weights = Checkpoint(module.name_or_path, module.dtype_name, module.trust_remote_code)
    moe = StreamedModel(weights, module.trainer.strategy.root_device)
    module.trainer.datamodule.check_model(moe, "fit")
    return moe, check_options(module, moe, module.trainer.world_size)


def check_options(module: QESC, moe: MoEModel, processes: int = 1) -> BySize | None:
    """Checks that recipe, pruning, size, target and router loss suit the model, of which shapes are enough.

    Returns:
        With a size, what bits are chosen with.

    Raises:
        ValueError, FileNotFoundError: one of them does not.
    """
    module.recipe.check(moe, processes)
    if module.pruning is not None:
        module.pruning.check(moe)
    choice = None
    if module.chosen_bits.size:
        rest = Rest.of(moe, module.name_or_path, module.trust_remote_code)
        choice = module.chosen_bits.check(moe, rest, module.fingerprint, processes)
    elif module.targets:
        targets.choose(module.targets, module.recipe.grids(moe), original_of(moe), module.tensor_parallel)
    for block in moe.moe_blocks:
        module.router_loss.num_targets(block.num_experts, block.top_k)  # raises now if its k does not fit the model
    return choice


def _choose_bits(module: QESC, choice: BySize) -> tuple[Recipe, PruningRule | None]:
    """The widths that have the size that was asked for, from the run directory if they are chosen."""
    if module.trainer.is_global_zero:
        watch = Watch()
        if module.chosen_bits.take(module.run, choice, module.trainer.datamodule, module.fingerprint):
            module.run.add_cost(None, "sensitivity", watch.cost())
    module.trainer.strategy.barrier()
    return module.chosen_bits.chosen(module.run)
