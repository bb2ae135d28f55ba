"""Activations beyond the range of the model's dtype: where they appeared, and which option widens the range."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from eacmoe_lightning.quantization.gptq import NotFinite


def overflow(what: str, dtype: torch.dtype, option: str = "--model.dtype") -> ValueError:
    """The error for values that a dtype cannot hold.

    Args:
        what: begins the message: what holds them, with the block by name.
        dtype: the dtype that they are in.
        option: the option that sets it.
    """
    name, largest = str(dtype).rpartition(".")[2], torch.finfo(dtype).max
    if dtype == torch.float16:
        reason = f"beyond float16, whose largest value is {largest:g}. Pass {option} bfloat16 or float32"
    elif dtype == torch.float32:
        reason = (
            "NaN or infinite in float32. The weights were finite when the run began, so look at what the model's own "
            "forward pass gives on the calibration text"
        )
    else:
        reason = f"NaN or infinite in {name}. Pass {option} float32"
    return ValueError(f"{what} is {reason}. Another {option} is another run (--trainer.default_root_dir)")


def refuse_overflow(what: str, output: Tensor, stored: torch.dtype | None = None) -> None:
    """Raises ValueError if the output of `what` holds NaN or infinite values.

    Args:
        what: see `overflow`.
        output: activations in the model's dtype.
        stored: dtype in which they are stored (`--model.stream_dtype`); None for the model's.
    """
    if not torch.isfinite(output).all():
        raise overflow(what, output.dtype)
    if stored not in (None, output.dtype) and not torch.isfinite(output.to(stored)).all():
        raise overflow(what, stored, "--model.stream_dtype")


@contextmanager
def overflow_in(what: str, dtype: torch.dtype) -> Iterator[None]:
    """Names the block and the dtype where a solver meets NaN or infinite values among a linear's inputs."""
    try:
        yield
    except NotFinite as error:
        raise overflow(f"an input of a linear in {what}", dtype) from error
