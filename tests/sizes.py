"""What the tests of bits by size measure: a recipe, windows, and the sensitivities of tiny models."""

from pathlib import Path

import torch

from eacmoe_lightning.budget.measure import Text, measure
from eacmoe_lightning.budget.sensitivity import Sensitivity
from eacmoe_lightning.calibration.recipe import Recipe
from eacmoe_lightning.models.checkpoint import Checkpoint
from eacmoe_lightning.models.streamed import StreamedModel

RECIPE = Recipe(group_size=32, min_expert_tokens=32, symmetric=False)
WINDOWS = torch.randint(0, 256, (10, 32), generator=torch.Generator().manual_seed(1))


def streamed(folder: Path) -> StreamedModel:
    return StreamedModel(Checkpoint(str(folder), "float32"))


def measured(folder: Path, output: Path, **more) -> Sensitivity:
    return measure(streamed(folder), RECIPE, Text(WINDOWS), output, {}, num_probes=2, batch_size=3, **more)
