"""Writes a finished job's model into its run directory: `compressed/`, which is reloaded and compared, and `dense/`."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from eacmoe_lightning.calibration.overflow import refuse_overflow
from eacmoe_lightning.compressed.directory import CompressedWeights, save_compressed
from eacmoe_lightning.compressed.format import read_config, runs_packed
from eacmoe_lightning.exports.export import export
from eacmoe_lightning.models.block import Block, Call
from eacmoe_lightning.models.moe import MoEModel
from eacmoe_lightning.models.streamed import StreamedModel
from eacmoe_lightning.quantization.grid import Quantized
from eacmoe_lightning.run.directory import RunDirectory
from eacmoe_lightning.run.files import StoreError
from eacmoe_lightning.run.hidden import State
from eacmoe_lightning.runtime.packed_modules import packed_in_place
from eacmoe_lightning.skipping.apply import resting

# largest difference of a reloaded model's logits from the written one's, by the dtype it computes in
RELOADED_LIMIT = {torch.float32: 1e-5, torch.float64: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-2}
PACKED_LIMIT = 0.02  # largest difference of a block with packed weights from the same decoded, by its output's norm


@torch.no_grad()
def write_result(
    run: RunDirectory,
    moe: MoEModel,
    name_or_path: str,
    quantized_blocks: Iterable[dict[str, Quantized]],
    description: dict[str, Any],
    tokens: Tensor,
    fingerprint: str | None,
    trust_remote_code: bool = False,
    head: dict[str, Quantized] | None = None,
) -> None:
    """Writes `compressed/` (see `save_compressed`) and compares its logits with those of the model in memory.

    What is compared is the model with decoded weights, whose logits may differ by the order of sums alone (on some CPUs
    it depends on where weights lie in memory), and block by block the packed modules with decoded weights. (A packed
    output head was tried before the first block.)

    A model that is not quantized and has the same number of experts in every block is an ordinary one. It is also
    written to `dense/`, which every program loads.

    Args:
        run: the run directory.
        moe, name_or_path, quantized_blocks, description, trust_remote_code, head: see `save_compressed`.
        tokens: [B, T] to compare the logits on.
        fingerprint: of the original, see `save_compressed`.

    Raises:
        StoreError: a weight is not quantized, or what is reloaded differs.
        ValueError: the logits are not finite.
    """
    about = description, fingerprint, trust_remote_code, head
    save_compressed(run.compressed, moe, name_or_path, quantized_blocks, *about)
    tokens = tokens.to(moe.device)
    logits = moe.logits(tokens)
    refuse_overflow("the logits of the compressed model (its final norm or its head)", logits)
    reloaded = StreamedModel(CompressedWeights(run.compressed), moe.device)
    with resting(reloaded.model):  # without the skipping rule that the directory may hold
        reloaded_logits = _checked_logits(reloaded, run.compressed, tokens)
    if _difference(reloaded_logits, logits) > RELOADED_LIMIT[reloaded.model.dtype]:
        raise StoreError(
            f"{run.compressed} reloads with logits that differ from the written model's by up to "
            f"{(logits - reloaded_logits).abs().max():.3g}. This is a bug in eacmoe-lightning; the run's blocks stay"
        )
    if description.get("quantizer") == "none" and len({block.num_experts for block in moe.moe_blocks}) == 1:
        shutil.rmtree(run.dense, ignore_errors=True)
        export(str(run.path), str(run.dense), "dense", trust_remote_code=trust_remote_code)


def _checked_logits(moe: StreamedModel, directory: Path, tokens: Tensor) -> Tensor:
    """The logits [B, T, V] of a compressed directory's decoded model; each block is also run with packed modules.

    Raises:
        StoreError: a block does not run packed, or gives something else.
    """
    is_packed, state = runs_packed(read_config(directory)), None
    for index, block in enumerate(moe.blocks):
        with moe.loaded(index):
            call = moe.call(index, tokens, state)
            state, _ = block.forward(call)
            if is_packed and (quantized := moe.weights.quantized(index)):
                _check_packed(moe, block, call, quantized, state, directory)
    return moe.head(state, tokens)


def _check_packed(
    moe: StreamedModel, block: Block, call: Call, quantized: dict[str, Quantized], decoded: State, directory: Path
) -> None:
    """Compares a block with packed modules with what it hands over with decoded weights."""
    try:
        with packed_in_place(moe.model, quantized):
            got = block.layer(*call.args, **call.kwargs)
    except (AttributeError, TypeError, RuntimeError) as error:
        raise StoreError(
            f"{directory} was written, but {block.name} does not run with packed weights ({error}): load it with "
            "packed=False"
        ) from error
    own, packed = (tree_leaves(state)[0].float() for state in (decoded, got))
    if (difference := _difference(packed, own)) > PACKED_LIMIT:
        raise StoreError(
            f"{directory} was written, but {block.name} with packed weights differs from the same decoded by "
            f"{difference:.2g} of its output: load it with packed=False"
        )


def _difference(found: Tensor, expected: Tensor) -> float:
    """Of [..., D], relative; the median over tokens, because rounding may send a few of them to other experts."""
    found, expected = found.float(), expected.float()
    return float(((found - expected).norm(dim=-1) / expected.norm(dim=-1).clamp(min=1e-30)).median())
