"""`eacmoe export`: writes another program's format, reloads it, and keeps it only if it is the same model."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Literal

from eacmoe_lightning import targets
from eacmoe_lightning.compressed.card import write_export_card
from eacmoe_lightning.exports import compressed_tensors, dense, gguf_file, gptq
from eacmoe_lightning.exports.check import Difference
from eacmoe_lightning.exports.linears import original_of
from eacmoe_lightning.exports.source import Source
from eacmoe_lightning.run.files import whole_directory
from eacmoe_lightning.run.lock import LOCK, RunLock
from eacmoe_lightning.skipping.stored import KEY as SKIPPING
from eacmoe_lightning.target_rules import Target
from eacmoe_lightning.weight_grids import WeightGrid

WRITERS = {"compressed-tensors": compressed_tensors, "gptq": gptq, "gptq_v2": gptq, "dense": dense, "gguf": gguf_file}
NEED_LIBRARY = ("compressed-tensors", "gguf")


def export(
    source: str,
    output: str,
    format: Literal["compressed-tensors", "gptq", "gptq_v2", "gguf", "dense"] | None = None,
    target: Literal[targets.ENGINES] | None = None,
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
    tensor_parallel: int = 1,
    trust_remote_code: bool = False,
) -> Difference:
    """Writes a compressed model in a format that other programs load, reloads it and compares every weight.

    Args:
        source: A run directory or a compressed directory.
        output: The directory to write; it must be empty or not exist.
        format: compressed-tensors (pack-quantized), gptq (zero points less 1, symmetric), gptq_v2 (true zero points),
            gguf (for llama.cpp) or dense (decoded, as large as the original); null: the first of the
            target's formats that can hold the model.
        target: The engine that will load the export; null: the first that loads the format. A model that the engine is
            known not to load, or to load wrongly, is refused.
        dtype: Dtype of everything that is not quantized; auto: the one the model was calibrated in.
        tensor_parallel: Number of devices over which the engine will split each linear; group sizes that do not allow
            the split are refused.
        trust_remote_code: Whether Python code that came with the model may run, where transformers has no class for it.

    Raises:
        FileNotFoundError: the source holds no compressed model.
        ValueError: the target does not load such a model, the output is not empty, or another process is at work in it.
        StoreError: a file of the source is damaged, or the export reloads as another model; nothing is kept then.
    """
    rows = targets.find(format, target)
    place = Path(output)
    if place.exists() and (not place.is_dir() or any(file.name != LOCK for file in place.iterdir())):
        raise ValueError(f"{output} (--output) is not empty: pass an empty directory or one that does not exist")
    with RunLock(place, "--output"):
        return _export(Source(source, dtype, trust_remote_code), place, rows, tensor_parallel)


def _export(opened: Source, place: Path, rows: list[Target], tensor_parallel: int) -> Difference:
    weights = opened.grids()
    original = original_of(opened.moe)
    row = targets.choose(rows, weights, original, tensor_parallel)
    left = row.left_decoded(weights, original)
    opened.decode(weight.name for weight in left)
    weights = [weight for weight in weights if weight not in left]
    writer = WRITERS[row.format]
    if row.format in NEED_LIBRARY:
        writer.require_library()
    has_run, verdict = _verdict(row, weights, original.model_type)
    with whole_directory(place) as partial:
        try:
            writer.write(opened, weights, row, partial)
            difference = writer.read_back(opened, row, partial)
            launch = [f"Start {row.engine} with `{row.launch}`."] if row.launch else []
            seen = [f"For {row.engine}: {verdict}.", *launch, f"Read back after writing: {difference}."]
            write_export_card(opened.path, opened.moe, partial, row.format, seen)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    if left:
        names = left[0].name + (" ..." if len(left) > 1 else "")
        print(f"{len(left)} linears that {row.engine} does not load packed are decoded: {names}")
    print(f"{place}: {row.format} for {row.engine} ({row.version}). Reloaded: {difference}")
    if row.launch:
        print(f"start {row.engine} with {row.launch}")
    if SKIPPING in opened.directory_config:
        print(f"warning: {row.engine} does not know this model's skipping rule and runs every selected expert")
    print(verdict if has_run else f"warning: {verdict}")
    return difference


def _verdict(row: Target, weights: list[WeightGrid], model_type: str) -> tuple[bool, str]:
    """Whether the engine is known to run such an export, and what is known."""
    if model_type in row.fails:
        return False, row.fails[model_type]
    if row.trial is None:
        return False, f"{row.engine} was never run on an export of this package: try it before you serve it"
    if untried := row.trial.untried(weights):
        settings = ", ".join(untried)
        return False, f"{row.trial.version} was never run on an export with {settings}: try it before you serve it"
    return True, f"{row.trial.version} has run such exports; checked: {row.trial.how}"
