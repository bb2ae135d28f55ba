"""The output head on the grid: rounded to nearest before the first block, so that all later work sees the result.

A head that is tied to the embedding shares its codes with it: the compressed model embeds tokens by decoded rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from eacmoe_lightning.calibration.recipe import Recipe
from eacmoe_lightning.models.head import output_head
from eacmoe_lightning.models.moe import MoEModel
from eacmoe_lightning.quantization.grid import Quantized, round_to_nearest
from eacmoe_lightning.run.hidden import State
from eacmoe_lightning.runtime.packed_modules import packed_in_place

ROWS = 4096  # that are rounded at a time: the search needs several times their memory in float32
PACKED_LIMIT = 0.02  # largest difference of what a packed head gives from what it gives decoded, by its norm


@torch.no_grad()
def quantize_head(moe: MoEModel, recipe: Recipe) -> dict[str, Quantized]:
    """The output head by the name of its parameter, in host memory; empty if the recipe leaves it as it is.

    Args:
        moe: the original; what is outside of its blocks is in memory.
        recipe: `Recipe.check` has accepted the model.
    """
    if recipe.head_bits is None:
        return {}
    name, grid = output_head(moe.model).weight, recipe.head_grid
    parts = [round_to_nearest(rows, grid) for rows in moe.model.get_parameter(name).split(ROWS)]
    fields = (torch.cat([getattr(part, field) for part in parts]).cpu() for field in Quantized.FIELDS)
    return {name: Quantized(*fields, grid.bits)}


@torch.no_grad()
def check_head(moe: MoEModel, head: dict[str, Quantized], window: Tensor, state: State) -> None:
    """Checks that the model computes the same with the packed head, and a tied embedding, as with them decoded.

    Args:
        moe: the original.
        head: from `quantize_head`.
        window: token ids [1, T].
        state: what the last block hands over for them.

    Raises:
        ValueError: it does not.
    """
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


def embedding_of(moe: MoEModel, head: dict[str, Quantized]) -> dict[str, Tensor]:
    """The compressed model's embedding [V, D] by the name of its parameter; empty if it is the original's."""
    if not head or not output_head(moe.model).is_tied:
        return {}
    return _decoded(moe, head)


def _decoded(moe: MoEModel, head: dict[str, Quantized]) -> dict[str, Tensor]:
    dtypes = {name: moe.model.get_parameter(name).dtype for name in head}
    return {name: weight.dequantize(dtypes[name]).to(moe.device) for name, weight in head.items()}
