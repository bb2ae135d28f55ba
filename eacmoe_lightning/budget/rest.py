"""What a compressed directory holds besides its quantized weights, in bytes: a size in gigabytes counts it too."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from eacmoe_lightning.models.checkpoint import Checkpoint
from eacmoe_lightning.models.draft import read_draft
from eacmoe_lightning.models.moe import MoEModel
from eacmoe_lightning.models.original_files import OriginalFiles
from eacmoe_lightning.models.originals import license_files, processor_files, read_config, resolve_model
from eacmoe_lightning.models.tokenizer import load_tokenizer
from eacmoe_lightning.planning.sizes import packed_bytes
from eacmoe_lightning.weight_grids import WeightGrid

CARD_BYTES = 16_384  # model card, generation config, code that imports this package
HEADER_BYTES = 160  # of a tensor in the header of its file and in the index, besides its names


@dataclass(frozen=True)
class Rest:
    """Everything but the quantized weights.

    Attributes:
        files: bytes of tokenizer, processor, licenses, config, card and draft layers.
        dtype: in which the original stores its tensors.
        in_float32: those that it stores in float32 instead, by parameter name.
    """

    files: int
    dtype: torch.dtype
    in_float32: frozenset[str] = frozenset()

    @classmethod
    def of(cls, moe: MoEModel, name_or_path: str, trust_remote_code: bool = False) -> Rest:
        """The rest of an original, by its name or path.

        Draft layers, tokenizer and dtypes count if their files are there (`plan` needs none).
        """
        source = resolve_model(name_or_path)
        config = read_config(source)[0]
        dtype = getattr(config.get_text_config(), "dtype", None) or moe.model.dtype
        total = CARD_BYTES + len(json.dumps(config.to_dict(), indent=2, default=str))
        with suppress(FileNotFoundError):
            total += sum(tensor.nbytes for tensor in read_draft(OriginalFiles(source), moe.model).values())
        total += sum(file.stat().st_size for file in (*processor_files(source), *license_files(source)))
        with suppress(FileNotFoundError, OSError, ValueError), tempfile.TemporaryDirectory() as folder:
            load_tokenizer(source, trust_remote_code).save_pretrained(folder)
            total += sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file())
        in_float32: frozenset[str] = frozenset()
        with suppress(FileNotFoundError):
            in_float32 = Checkpoint(name_or_path, trust_remote_code=trust_remote_code).in_float32
        return cls(total, dtype, in_float32)

    def nbytes(self, moe: MoEModel, outside: Sequence[WeightGrid] = ()) -> int:
        """The most bytes that the rest takes: an estimate, a little high.

        Besides the files: embeddings, head, routers, norms, and headers of all tensors. It grows if the check of the
        model leaves linears unquantized.

        Args:
            moe: the original.
            outside: how its output head is quantized (`Recipe.outside`); empty: it stays as it is.
        """
        grids = {grid.name: grid for grid in outside}
        quantized = {name for block in moe.blocks for name in block.weights()}
        trained = {name for name, _ in moe.norms()} | {block.router_parameter_name for block in moe.calibrated_blocks}
        total, seen = self.files, set()
        for name, tensor in moe.model.state_dict(keep_vars=True).items():
            if id(tensor) in seen:
                continue  # tied
            seen.add(id(tensor))
            total += HEADER_BYTES + 2 * len(name)
            if name in quantized:
                numbers = tensor.shape[0] if tensor.ndim == 3 else 1
                total += 3 * (HEADER_BYTES + 2 * len(name)) + 12 * numbers  # codes, scales, zero points; bits in config
                continue
            if name in grids:
                total += 3 * (HEADER_BYTES + 2 * len(name)) + packed_bytes([grids[name]])
                continue
            if name in self.in_float32:
                total += tensor.numel() * 4
                continue
            is_narrow = tensor.is_floating_point() and name not in trained
            total += tensor.numel() * min(tensor.element_size(), self.dtype.itemsize if is_narrow else 8)
        return total
