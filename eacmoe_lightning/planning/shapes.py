"""The shapes of a model, without its weights, and the size of its files."""

from __future__ import annotations

import torch

from eacmoe_lightning.calibration.recipe import num_quantized
from eacmoe_lightning.models.checkpoint import Checkpoint, running_dtype
from eacmoe_lightning.models.decoding.schemes import stored_bits
from eacmoe_lightning.models.moe import MoEModel
from eacmoe_lightning.models.originals import read_config
from eacmoe_lightning.models.transformers_loader import empty_model


def load_shapes(name_or_path: str, dtype: str, trust_remote_code: bool = False) -> MoEModel:
    """The model without its weights, from its config.json alone.

    Raises:
        FileNotFoundError: there is no config.json, or it is not that of a causal language model.
    """
    try:
        config, _ = read_config(name_or_path, trust_remote_code)
        stored = config.get_text_config().dtype or torch.bfloat16
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"no config.json for {name_or_path!r} (--model.name_or_path): pass a directory that holds one, or a "
            f"hub id that this machine can reach; weights are not needed. {error}"
        ) from error
    return MoEModel(empty_model(config, running_dtype(stored) if dtype == "auto" else getattr(torch, dtype)))


def stored_share(name_or_path: str, moe: MoEModel) -> float:
    """Bytes of an original's files per byte that its weights take in memory.

    If its weights are not there, the share follows from config.json: from the dtype, or from the bits of the scheme
    that its linears or, in MXFP4, its experts are quantized by.

    Raises:
        ValueError: the weights are there, and `Checkpoint` refuses them.
    """
    parameters, itemsize = sum(p.numel() for p in moe.model.parameters()), moe.model.dtype.itemsize
    try:
        return Checkpoint(name_or_path).files.size_bytes / (parameters * itemsize)
    except FileNotFoundError:
        config, quantization = read_config(name_or_path)
    dtype = config.get_text_config().dtype or moe.model.dtype
    if quantization is None:
        return dtype.itemsize / itemsize
    quantized = num_quantized(moe)
    if quantization.get("quant_method") == "mxfp4":
        weights = (weight for block in moe.blocks for part, weight in block.weights().values() if part == "experts")
        quantized = sum(weight.numel() for weight in weights)
    stored = quantized * stored_bits(quantization) / 8 + (parameters - quantized) * dtype.itemsize
    return stored / (parameters * itemsize)
