"""Writes a finished job's model into its run directory: `compressed/`, which is reloaded and compared, and `dense/`."""

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
    trust_remote_code: bool = False,
) -> None:
    """Writes `compressed/` (see `save_compressed`) and compares its logits with those of the model in memory.

    A model that is not quantized and has the same number of experts in every block is an ordinary one. It is also
    written to `dense/`, which every program loads.

    Args:
        run: the run directory.
        moe, name_or_path, quantized_blocks, description, trust_remote_code: see `save_compressed`.
        tokens: [B, T] to compare the logits on.

    Raises:
        StoreError: a weight is not quantized, or the reloaded logits are not identical.
    """
    save_compressed(run.compressed, moe, name_or_path, quantized_blocks, description, trust_remote_code)
    tokens = tokens.to(moe.device)
    logits = moe.logits(tokens)
    reloaded = StreamedModel(CompressedWeights(run.compressed), moe.device)
    with resting(reloaded.model):  # without the skipping rule that the directory may hold
        reloaded_logits = reloaded.logits(tokens)
    if not torch.equal(logits, reloaded_logits):
        raise StoreError(
            f"{run.compressed} reloads with logits that differ from the written model's by up to "
            f"{(logits - reloaded_logits).abs().max():.3g}. This is a bug in eacmoe-lightning; the run's blocks stay"
        )
    if description.get("quantizer") == "none" and len({block.num_experts for block in moe.moe_blocks}) == 1:
        shutil.rmtree(run.dense, ignore_errors=True)
        export(str(run.path), str(run.dense), "dense")
