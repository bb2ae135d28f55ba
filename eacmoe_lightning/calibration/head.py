"""The output head on the grid: rounded to nearest before the first block, so that all later work sees the result.

A head that is tied to the embedding shares its codes with it: the compressed model embeds tokens by decoded rows. In
llama.cpp's blocks an embedding of its own is rounded too, as llama.cpp's files have it.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from eacmoe_lightning.calibration.recipe import Recipe
from eacmoe_lightning.models.head import output_head
from eacmoe_lightning.models.moe import MoEModel
from eacmoe_lightning.quantization import kquant_gptq
from eacmoe_lightning.quantization.grid import Quantized, round_to_nearest
from eacmoe_lightning.quantization.kquant import TYPES, KQuant
from eacmoe_lightning.run.hidden import State
from eacmoe_lightning.runtime.packed_modules import packed_in_place
from eacmoe_lightning.weight_grids import WeightGrid

ROWS = 4096  # that are rounded at a time: the search needs several times their memory in float32
PACKED_LIMIT = 0.02  # largest difference of what a packed head gives from what it gives decoded, by its norm


@torch.no_grad()
def quantize_head(moe: MoEModel, recipe: Recipe) -> dict[str, Quantized | KQuant]:
    """The output head by the name of its parameter, in host memory; empty if the recipe leaves it as it is.

    In llama.cpp's blocks the embedding is quantized with it.

    Args:
        moe: the original; what is outside of its blocks is in memory.
        recipe: `Recipe.check` has accepted the model.
    """
    return {grid.name: _rounded(moe.model.get_parameter(grid.name), grid, recipe) for grid in recipe.outside(moe)}


def _rounded(weight: Tensor, how: WeightGrid, recipe: Recipe) -> Quantized | KQuant:
    """A matrix [V, D] rounded to nearest, some rows at a time."""
    if how.kquant:  # the solver divides the rows itself
        same = torch.eye(weight.shape[-1], device=weight.device)
        parts = [kquant_gptq.solve(weight, same, TYPES[how.kquant], search=True, refine=1)[0]]
    else:
        parts = [round_to_nearest(rows, recipe.head_grid) for rows in weight.split(ROWS)]
    fields = {field: torch.cat([getattr(part, field) for part in parts]).cpu() for field in parts[0].FIELDS}
    return replace(parts[0], **fields)


@torch.no_grad()
def check_head(moe: MoEModel, head: dict[str, Quantized | KQuant], window: Tensor, state: State) -> None:
    """Checks that the model computes the same with the packed head, and a tied embedding, as with them decoded.

    Those in llama.cpp's blocks always run decoded.

    Args:
        moe: the original.
        head: from `quantize_head`.
        window: token ids [1, T].
        state: what the last block hands over for them.

    Raises:
        ValueError: it does not.
    """
    if any(isinstance(weight, KQuant) for weight in head.values()):
        return
    option = f"head_bits (--model.head_bits): {moe.config.model_type}"

    def run() -> dict[str, Tensor]:
        return {"logits": moe.head(state, window), "embeddings": moe.embed(window)}

    expected = moe.with_weights(_decoded(moe, head), run)
    try:
        with packed_in_place(moe.model, head):
            found = run()
    except (AttributeError, TypeError, RuntimeError) as error:
        raise ValueError(f"{option} does not run with a packed output head ({error}): leave the option out") from error
    for what, values in expected.items():
        apart, size = (torch.linalg.vector_norm(x.float(), dim=-1) for x in (found[what] - values, values))
        difference = float((apart / size.clamp(min=1e-30)).median())
        if not difference <= PACKED_LIMIT:
            raise ValueError(
                f"{option} computes other {what} with a packed output head than with the same decoded; they differ by "
                f"{difference:.2g} of their size: leave the option out"
            )


def embedding_of(moe: MoEModel, head: dict[str, Quantized | KQuant]) -> dict[str, Tensor]:
    """The compressed model's embedding [V, D] by the name of its parameter; empty if it is the original's."""
    name = output_head(moe.model).embedding if head else None
    return _decoded(moe, {name: head[name]}) if name in head else {}


def _decoded(moe: MoEModel, head: dict[str, Quantized | KQuant]) -> dict[str, Tensor]:
    dtypes = {name: moe.model.get_parameter(name).dtype for name in head}
    return {name: weight.dequantize(dtypes[name]).to(moe.device) for name, weight in head.items()}
