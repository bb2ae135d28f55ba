"""The shapes of a model, without its weights."""

from __future__ import annotations

import torch
from transformers import AutoConfig

from eacmoe_lightning.models.moe import MoEModel
from eacmoe_lightning.models.originals import resolve_model
from eacmoe_lightning.models.transformers_loader import empty_model


def load_shapes(name_or_path: str, dtype: str) -> MoEModel:
    """The model without its weights, from its config.json alone.

    Raises:
        FileNotFoundError: there is no config.json, or it is not that of a causal language model.
    """
    try:
        config = AutoConfig.from_pretrained(resolve_model(name_or_path))
        stored = config.get_text_config().dtype or torch.bfloat16
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"no config.json for {name_or_path!r} (--model.name_or_path): pass a directory that holds one, or a "
            f"hub id that this machine can reach; weights are not needed. {error}"
        ) from error
    return MoEModel(empty_model(config, stored if dtype == "auto" else getattr(torch, dtype)))
