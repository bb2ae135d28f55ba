"""What a finished job leaves in its run directory: `compressed/`, believed only once it is read back, and `dense/`."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from eacmoe_lightning.compressed.directory import CompressedWeights, save_compressed
from eacmoe_lightning.exports.export import export
from eacmoe_lightning.models.moe import MoEModel
from eacmoe_lightning.models.streamed import StreamedModel
from eacmoe_lightning.quantization.grid import Quantized
from eacmoe_lightning.run.directory import RunDirectory
from eacmoe_lightning.run.files import StoreError
from eacmoe_lightning.skipping.apply import resting


@torch.no_grad()
def write_result(
    run: RunDirectory,
    moe: MoEModel,
    name_or_path: str,
    quantized_blocks: Iterable[dict[str, Quantized]],
    description: dict[str, Any],
    tokens: Tensor,
) -> None:
    """Writes `compressed/` (see `save_compressed`) and compares its logits with those of the model in memory.

    A model that is not quantized and has the same number of experts in every block is an ordinary one: `dense/` holds
    it as every program loads it.

    Args:
        run: where.
        moe, name_or_path, quantized_blocks, description: of `save_compressed`.
        tokens: [B, T] on which they are compared.

    Raises:
        StoreError: a weight is not quantized, or the reloaded logits differ at all.
    """
    save_compressed(run.compressed, moe, name_or_path, quantized_blocks, description)
    tokens = tokens.to(moe.device)
    here = moe.logits(tokens)
    again = StreamedModel(CompressedWeights(run.compressed), moe.device)
    with resting(again.model):  # a setting of skipping that the directory has
        there = again.logits(tokens)
    if not torch.equal(here, there):
        raise StoreError(
            f"{run.compressed} does not give the logits of the model that was written: they differ by up to "
            f"{(here - there).abs().max():.3g}. This is a defect of eacmoe-lightning; the run's blocks are kept"
        )
    if description.get("quantizer") == "none" and len({block.num_experts for block in moe.moe_blocks}) == 1:
        shutil.rmtree(run.dense, ignore_errors=True)
        export(str(run.path), str(run.dense), "dense")
