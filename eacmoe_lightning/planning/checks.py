"""What `fit` checks before its first block: memory for the joint stage, disk space, the original's weights."""

from __future__ import annotations

import logging
import math
import shutil
from pathlib import Path

import torch
from torch import Tensor

from eacmoe_lightning.calibration.recipe import Recipe
from eacmoe_lightning.evaluation.streams import next_token_nll
from eacmoe_lightning.models.block import Block, Call
from eacmoe_lightning.models.checkpoint import Checkpoint
from eacmoe_lightning.models.documents import DocumentsAlone
from eacmoe_lightning.models.moe import MoEModel
from eacmoe_lightning.models.self_check import Differs, check_parts
from eacmoe_lightning.models.streamed import StreamedModel
from eacmoe_lightning.planning.joint import is_resident, joint_memory
from eacmoe_lightning.planning.sizes import Job, disk_use, sampling_bytes
from eacmoe_lightning.run.hidden import State
from eacmoe_lightning.run.memory import available_memory
from eacmoe_lightning.runtime.packed_modules import PackedLinear

GB = 1e9
GUESSING_MARGIN = 1.0  # nats: random weights lose about what equal probabilities do, or a little more
log = logging.getLogger(__name__)


def check_memory(moe: MoEModel, recipe: Recipe, job: Job) -> bool:
    """Whether the joint stage has room for all blocks; otherwise it streams them.

    Raises:
        ValueError: it needs more memory than there is even then.
    """
    if not job.joint_epochs or is_resident(moe, recipe, job):
        return True
    needed, host = joint_memory(moe, recipe, job, False), available_memory(torch.device("cpu"))
    if not needed.fits(job, job.memory, host):
        trained = [f"--model.joint_{kind}_lr 0" for kind in ("code", "scale") if kind in job.joint_kinds]
        smaller = " or ".join([*trained, "smaller batches (--data.batch_size)"])
        if job.device == "cpu":
            memory, there = f"{(needed.device + needed.host) / GB:.1f} GB of memory", f"{job.memory / GB:.1f} GB"
        else:
            memory = f"{needed.device / GB:.1f} GB of memory and {needed.host / GB:.1f} GB of the host's"
            there = f"{job.memory / GB:.1f} and {host / GB:.1f} GB"
        raise ValueError(
            f"the joint stage (--model.joint_epochs {job.joint_epochs}) needs {memory}, though only one block at a "
            f"time is in memory, but {there} are available. {smaller} make it smaller, --model.joint_epochs 0 leaves "
            "it out"
        )
    return False


def check_sampling(moe: MoEModel, windows: int, window_length: int) -> None:
    """Raises ValueError if the original, which is loaded as a whole to write calibration text, needs too much memory.

    Args:
        moe: the original.
        windows, window_length: of a batch.
    """
    needed, available = sampling_bytes(moe, windows, window_length), available_memory(moe.device)
    if needed > available:
        raise ValueError(
            f"--data.calibration self: the original writes the text, and then the whole model is in memory: "
            f"{needed / GB:.1f} GB, but {available / GB:.1f} GB are available. Pass self:RUN, the run directory of a "
            "first `fit` on other text (--model.router_method none --model.joint_epochs 0 is quick), whose compressed "
            "model then writes; or self:URL, the address of a server that has the model (http://HOST:PORT/v1)"
        )


def check_disk(moe: MoEModel, recipe: Recipe, job: Job, folder: Path) -> str:
    """A sentence about the disk space that the run needs.

    Raises:
        ValueError: the run needs more than is free.
    """
    use = disk_use(moe, recipe, job)
    needed = sum(use.values())
    free = shutil.disk_usage(next(place for place in (folder, *folder.parents) if place.exists())).free
    parts = ", ".join(f"{name} {size / GB:.2f}" for name, size in use.items() if size)
    summary = f"{folder} will take up to {needed / GB:.2f} GB ({parts}); {free / GB:.2f} GB are free"
    if needed > free:
        raise ValueError(
            f"{summary}: use fewer or shorter windows (--data.num_windows, --data.window_length), --model.stream_dtype "
            "bfloat16, or another --trainer.default_root_dir"
        )
    return summary


def check_original(moe: StreamedModel, window: Tensor, position_ids: Tensor | None = None) -> State:
    """Checks that the weights are finite, and that the model as parts is the model. Reads every weight once.

    If a part differs, all is checked a second time, and only warned of where it agrees then: a misfit shows again, what
    the machine did once does not.

    With `position_ids`, also checks that the model keeps the documents of the window apart.

    Args:
        moe: the original model.
        window: token ids [1, T] to run.
        position_ids: [1, T], as in `MoEModel.call`.

    Returns:
        What the last block hands over for the window.

    Raises:
        ValueError: a tensor holds NaN or infinite values, in the checkpoint or only in the dtype of the run; or a part
            differs from the model's own forward pass (`models.self_check.check_parts`); or documents change each other
            (`models.documents.DocumentsAlone`).
    """
    for name, parameter in moe.model.named_parameters():
        if not parameter.is_meta:
            _check_finite(moe, name, parameter)

    def check_block(block: Block) -> None:
        for name, parameter in block.layer.named_parameters(prefix=block.name):
            _check_finite(moe, name, parameter)

    window = window.to(moe.device)
    position_ids = None if position_ids is None else position_ids.to(moe.device)

    def check() -> State:
        alone = None if position_ids is None else DocumentsAlone(moe, window, position_ids)

        def check_run(block: Block, call: Call) -> None:
            leave_unpackable(block, call)
            if alone is not None:
                alone.check(block, call)

        return check_parts(moe, window, check_block, check_run, position_ids)

    try:
        return check()
    except Differs as error:
        state = check()
        log.warning(
            "the model agrees with its own forward pass only when both run again, so on this machine two runs of one "
            "job may differ. The first try: %s",
            error,
        )
        return state


@torch.no_grad()
def warn_of_guessing(moe: MoEModel, window: Tensor, state: State) -> None:
    """Warns if the original predicts text worse than a model that gives all tokens the same probability.

    Nothing else tells weights that were decoded wrongly, or another model's tokenizer, from a model that is as it is.

    Args:
        moe: the original.
        window: token ids [1, T] of calibration text.
        state: what the last block hands over for them.
    """
    window = window.to(moe.device)
    logits = moe.head(state, window)
    loss, guessing = float(next_token_nll(logits, window).mean()), math.log(logits.shape[-1])
    if loss > guessing + GUESSING_MARGIN:
        log.warning(
            "the original predicts the calibration text worse than by guessing: it loses %.1f nats a token on a window "
            "of it, and equal probabilities lose %.1f. Are its weights damaged, quantized by another scheme than its "
            "config.json says, or from another model than its tokenizer?",
            *(loss, guessing),
        )


def leave_unpackable(block: Block, call: Call) -> None:
    """Excludes from quantization the linears with which the model's code does not run once they are packed.

    Some models read the weight of a layer instead of calling the layer, for example to convert its dtype.
    """
    if _runs_packed(block, call, list(block.linears)):
        return
    for name in list(block.linears):
        if not _runs_packed(block, call, [name]):
            block.leave(name, "the model's code reads its weight, which a packed layer does not have")


def _runs_packed(block: Block, call: Call, names: list[str]) -> bool:
    """Whether the block runs with these linears packed; their codes are arbitrary."""
    before = {name: block.linear(name) for name in names if block.linear(name).in_features % 8 == 0}
    try:
        for name, linear in before.items():
            packed = PackedLinear(linear, 8, linear.in_features).to(linear.weight.device)
            for tensor in packed.weight.tensors:
                tensor.zero_()
            block.layer.set_submodule(name, packed)
        block.forward(call)
    except (AttributeError, TypeError):
        return False
    except RuntimeError as error:  # of a kernel, which says nothing about the model's code
        log.warning("%s: packed linears could not be tried: %s", block.name, error)
    finally:
        for name, linear in before.items():
            block.layer.set_submodule(name, linear)
    return True


def _check_finite(moe: StreamedModel, name: str, parameter: Tensor) -> None:
    if torch.isfinite(parameter).all():
        return
    stored = Checkpoint(moe.weights.name_or_path, "float32").read([name])[name]
    if torch.isfinite(stored).all():
        dtype = str(parameter.dtype).rpartition(".")[2]
        raise ValueError(
            f"{name} of the original model holds values up to {stored.abs().max():.3g}, but {dtype} ends at "
            f"{torch.finfo(parameter.dtype).max:g} (--model.dtype): pass --model.dtype bfloat16 or float32"
        )
    raise ValueError(
        f"{name} of {moe.weights} holds NaN or infinite values: the checkpoint is damaged. Download or repair it"
    )
