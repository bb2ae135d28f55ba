"""Originals whose files or configs have an unusual form, but a plain meaning: they are read as they are meant."""

import torch
from changed_models import changed

from eacmoe_lightning.models.checkpoint import Checkpoint
from eacmoe_lightning.models.self_check import check_parts
from eacmoe_lightning.models.streamed import StreamedModel


def test_a_config_without_head_dim_takes_yarn(tiny_model_dir, tmp_path, tokens):
    """transformers multiplies by a `head_dim` of null, which is what Mixtral's config has."""
    yarn = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 1024}
    logits = []
    for head_dim in (None, 16):
        folder = tmp_path / str(head_dim)
        changed(tiny_model_dir("mixtral"), folder, rope_parameters=yarn, head_dim=head_dim)
        moe = StreamedModel(Checkpoint(str(folder)))
        check_parts(moe, tokens)
        logits.append(moe.logits(tokens))
    assert torch.equal(*logits)
