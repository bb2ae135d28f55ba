"""Checkpoints with a linear for each expert where neither the model nor its original has one: stacked as they are read.

GPTQModel and llm-compressor split the stacks of experts of a model in memory (`model.layers.0.mlp.experts.gate_up_proj`
[E, O, I]) and write `model.layers.0.mlp.experts.3.gate_proj.weight`, whatever the original's names were. For many types
transformers reads such names itself; the others are found here. `gate_proj` is the first half of an expert's rows, and
`up_proj` the second; where the rows of gate and up alternate (gpt-oss), the program decides which rows they are. `w1`,
`w3` and `w2` are other names of `gate_proj`, `up_proj` and `down_proj`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from eacmoe_lightning.models.decoding.scheme import Split
from eacmoe_lightning.models.forms import bring_into_form

LINEAR = re.compile(r"(?P<experts>.+)\.(?P<expert>\d+)\.(?P<linear>\w+)\.(?P<kind>weight|bias)")
NAMES = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}


@dataclass(frozen=True)
class Stack:
    """The tensors on disk that become one parameter of a block's experts.

    Attributes:
        linears: their keys, [E][1 or 2], in the order of the rows.
        is_transposed: whether the parameter holds the matrices of the experts transposed.
        alternates: whether the rows of an expert's two linears alternate in the parameter.
    """

    linears: tuple[tuple[str, ...], ...]
    is_transposed: bool = False
    alternates: bool = False

    def of(self, tensors: Iterable[Tensor]) -> Tensor:
        """The parameter [E, O, I], [E, I, O] if it is transposed, or [E, O] of biases; tensors in the order of keys.

        Raises:
            RuntimeError: they do not fit each other.
        """
        tensors, stack = iter(tensors), None
        for expert, keys in enumerate(self.linears):
            parts = [next(tensors) for _ in keys]
            rows = torch.stack(parts, 1).flatten(0, 1) if self.alternates else torch.cat(parts)
            if stack is None:
                stack = rows.new_empty(len(self.linears), *rows.shape)
            if rows.shape != stack.shape[1:]:
                raise RuntimeError(f"{keys[0]} has rows of another shape than {self.linears[0][0]}")
            stack[expert] = rows
        return stack.mT.contiguous() if self.is_transposed else stack

    @property
    def keys(self) -> list[str]:
        return [key for keys in self.linears for key in keys]


def find_stacks(model: PreTrainedModel, unknown: Iterable[str], split: Split | None) -> dict[str, Stack]:
    """The stacks, by name of the parameter, that can be made of tensors whose names the model does not know.

    Args:
        model: on any device; its experts are brought into the common form.
        unknown: keys of tensors on disk that are no part of any parameter.
        split: what `gate_proj` and `up_proj` are where the rows of gate and up alternate in the model.

    Raises:
        ValueError: a linear is missing, or there is no telling which rows the linears are.
    """
    found: dict[str, dict[int, dict[str, str]]] = {}  # by parameter of one expert's linear: keys by expert and linear
    for key in unknown:
        if match := LINEAR.fullmatch(key):
            linear = NAMES.get(match["linear"], match["linear"])
            stack = _stack_of(linear, match["experts"], model)
            name = f"{stack}_bias" if match["kind"] == "bias" else stack
            if stack is not None and _parameter(model, name) is not None:  # some programs write biases of zeros
                found.setdefault(name, {}).setdefault(int(match["expert"]), {})[linear] = key
    if found:
        bring_into_form(model)
    return {name: _stack(model, name, experts, split) for name, experts in found.items()}


def _stack_of(linear: str, experts: str, model: PreTrainedModel) -> str | None:
    """The parameter that holds a linear of every expert; None if the model has none."""
    wholes = {"gate_proj": ("gate_up_proj",), "up_proj": ("gate_up_proj", "up_proj")}.get(linear, (linear,))
    names = (f"{experts}.{whole}" for whole in wholes)
    return next((name for name in names if _parameter(model, name) is not None), None)


def _parameter(model: PreTrainedModel, name: str) -> Tensor | None:
    try:
        return model.get_parameter(name)
    except AttributeError:
        return None


def _stack(model: PreTrainedModel, name: str, experts: dict[int, dict[str, str]], split: Split | None) -> Stack:
    module, stack = model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2].removesuffix("_bias")
    wanted = ("gate_proj", "up_proj") if stack == "gate_up_proj" and stack not in experts[min(experts)] else (stack,)
    alternates = len(wanted) > 1 and not getattr(module, "is_concatenated", True)
    if alternates and split is None:
        raise ValueError(
            f"{experts[min(experts)][wanted[0]]} is one of a linear for each expert, and {type(module).__name__} "
            "alternates the rows of gate and up, so there is no telling which rows it holds: pass the model that it "
            "was made of"
        )
    number = len(_parameter(model, name))
    missing = [(e, linear) for e in range(number) for linear in wanted if linear not in experts.get(e, {})]
    if missing:
        expert, linear = missing[0]
        raise ValueError(
            f"of the linears of {name.rpartition('.')[0]}, {len(missing)} are missing, such as {linear} of expert "
            f"{expert}: a file is missing, or it is of a model with fewer experts"
        )
    if len(experts) > number:
        raise ValueError(f"{name.rpartition('.')[0]} has {number} experts, and the files hold {len(experts)} of them")
    keys = tuple(tuple(experts[e][linear] for linear in wanted) for e in range(number))
    is_matrix = not name.endswith("_bias")
    return Stack(keys, is_matrix and getattr(module, "is_transposed", False), alternates and split == "alternating")
