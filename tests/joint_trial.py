"""The joint stage of a finished run beside one forward and backward pass of the whole model."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import torch
from torch import Tensor

from eacmoe_lightning.calibration.streams import Streams
from eacmoe_lightning.job import trained
from eacmoe_lightning.job.joint_stage import JointStage
from eacmoe_lightning.job.trained import TrainedParts
from eacmoe_lightning.models.block import Block
from eacmoe_lightning.models.checkpoint import Checkpoint
from eacmoe_lightning.models.moe import inputs
from eacmoe_lightning.models.routing import Routing
from eacmoe_lightning.models.streamed import StreamedModel
from eacmoe_lightning.routers.losses import TopKMSE
from eacmoe_lightning.run.directory import RunDirectory
from eacmoe_lightning.run.ranks import Ranks
from eacmoe_lightning.tuning.losses import distillation, selection


@contextmanager
def stage_of(original: Path, run: Path, is_resident: bool) -> Iterator[tuple[JointStage, Tensor]]:
    """The joint stage at its start, of a run that had none, and two windows [2, T]."""
    moe = StreamedModel(Checkpoint(str(original)))
    directory = RunDirectory(run)
    windows = torch.randint(1, 4096, (2, 24), generator=torch.Generator().manual_seed(0))
    streams = Streams(moe, windows, 0, 2, directory, Ranks(), keep_teachers=True)
    with torch.no_grad():
        streams.embed()
        for block in moe.blocks:
            with moe.loaded(block.index):
                if (routing := streams.advance(block, "x")) is not None:
                    streams.write_teacher(block.index, routing.logits)
                streams.advance(block, "x_hat")
            streams.step(block.index + 1, keep=False)
    parts = TrainedParts(moe, directory, True, is_resident)
    parts.start(torch.optim.AdamW(parts.optimizer_groups()), None, ("router", "norm", "scale", "code"), 0.05)
    stage = JointStage(parts, {}, TopKMSE(), 0.2, nullcontext)
    stage.calibration = SimpleNamespace(streams=streams)
    stage.open()
    yield stage, windows


def at_once(stage: JointStage, windows: Tensor) -> Tensor:
    """The losses by one forward pass of the whole model."""
    parts, model, streams, numbers = stage.parts, stage.compressed, stage.calibration.streams, torch.arange(2)
    with torch.no_grad():
        target = parts.moe.head(streams.last_rows(numbers), windows).float().log_softmax(-1)
    students, weights = {}, parts.routers_and_norms()

    def note(block: Block, routing: Routing, _: Tensor | None) -> None:
        block.learn_scoring(routing)
        students[block.index] = routing.logits

    with ExitStack() as running:
        for block in model.blocks:
            model.load(block.index)
            running.enter_context(parts.holding(block))
            weights |= parts.decoded(block)
            running.enter_context(block.experts_run_by(parts.expert(block)))
            if block.is_moe:
                block.watch_router(partial(note, block))
        logits = torch.func.functional_call(model.model, weights, kwargs=inputs(windows, None)).logits
    losses = distillation(logits, target).flatten()
    chosen = []
    for block in model.moe_blocks:
        student, teacher = block.choice(students[block.index]), block.choice(streams.teacher_rows(block, numbers))
        chosen.append(selection(student, teacher, stage.router_loss, block.top_k))
    return losses + stage.weight * torch.stack(chosen).mean(0)


def gradients(stage: JointStage, losses: Tensor) -> dict[str, Tensor]:
    """The gradients of everything that the stage trains; zeros where there is none."""
    parts = stage.parts
    named = {f"router {name}": weight for name, weight in parts.routers.items()}
    named |= {f"norm {name}": weight for name, weight in parts.norms.items()}
    named |= {f"scale {name}": weight for name, weight in parts.scales.items()}
    named |= {f"code {name}": moved.position for name, moved in parts.moved.items()}
    for weight in named.values():
        weight.grad = None
    losses.mean().backward()
    return {name: torch.zeros_like(w) if w.grad is None else w.grad.clone() for name, w in named.items()}


def assert_equals_the_whole(folder: Path, run: Path) -> None:
    """Streamed block by block, losses and gradients are those of the model at once, and no block stays in memory.

    The one decodes experts again in the backward pass, as it does in large blocks, the other keeps them.
    """
    with patch.object(trained, "KEPT_NUMBERS", 0), stage_of(folder, run, False) as (stage, windows):
        losses = stage.losses({"index": torch.arange(2), "input_ids": windows})
        found = gradients(stage, losses)
        assert not stage.parts.codes and all(p.is_meta for b in stage.compressed.blocks for p in b.layer.parameters())
    with stage_of(folder, run, True) as (stage, windows):
        expected = at_once(stage, windows)
        torch.testing.assert_close(losses, expected, rtol=1e-4, atol=1e-5)
        for name, gradient in gradients(stage, expected).items():
            error = (found[name] - gradient).norm() / gradient.norm().clamp(min=1e-6)
            assert error < 1e-3, f"{name}: {error}"
    assert sum(gradient.any() for gradient in found.values()) > len(found) / 2
