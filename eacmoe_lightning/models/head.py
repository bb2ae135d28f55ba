"""A model's output head: the linear that makes logits of hidden states, and the embedding that may share its weight."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel


@dataclass(frozen=True)
class OutputHead:
    """Where the output head of a model is.

    Attributes:
        module: name of the linear in the model.
        weight: name of the parameter that it multiplies by; of a head that is tied to the embedding, that of the
            embedding, under which both are stored.
        shape: [V, D] of the weight.
        is_tied: whether the embedding has the same weight.
        embedding: name of the embedding's parameter; None if it is no table of rows (nn.Embedding).
    """

    module: str
    weight: str
    shape: tuple[int, int]
    is_tied: bool
    embedding: str | None


def output_head(model: PreTrainedModel) -> OutputHead:
    """The output head of a model, which may be on the meta device.

    Raises:
        ValueError: it has none, or none that can be quantized.
    """
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    of = f"{model.config.model_type} (--model.head_bits)"
    if not isinstance(head, nn.Linear):
        what = "no output head" if head is None else f"a {type(head).__name__} for an output head, not a linear layer"
        raise ValueError(f"{of} has {what}, so there is none to quantize: leave the option out")
    sharing = [name for name, tensor in model.state_dict(keep_vars=True).items() if tensor is head.weight]
    names = {id(module): name for name, module in model.named_modules()}
    own, others = f"{names[id(head)]}.weight", set(sharing)
    others.discard(own)
    of_embedding = f"{names[id(embedding)]}.weight" if isinstance(embedding, nn.Embedding) else None
    if not others:
        return OutputHead(names[id(head)], own, tuple(head.weight.shape), False, of_embedding)
    if others != {of_embedding}:
        raise ValueError(
            f"{of}: the output head shares its weight with {', '.join(sorted(others))}, and only one that it shares "
            "with the embedding can be quantized: leave the option out"
        )
    return OutputHead(names[id(head)], of_embedding, tuple(head.weight.shape), True, of_embedding)
