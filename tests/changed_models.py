"""Originals with other tensors and other options in their config, and how `fit` refuses them."""

import json
from collections.abc import Callable
from pathlib import Path

import jobs
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from eacmoe_lightning.cli import main

Tensors = dict[str, Tensor]


def changed(folder: Path, out: Path, change: Callable[[Tensors], Tensors] = dict, **config) -> Path:
    """A copy of a model in one file with other tensors and other options in its config."""
    out.mkdir()
    for file in folder.iterdir():
        if file.is_file() and file.suffix != ".safetensors":
            (out / file.name).write_bytes(file.read_bytes())
    (out / "config.json").write_text(json.dumps(json.loads((folder / "config.json").read_text()) | config))
    save_file(change(load_file(folder / "model.safetensors")), out / "model.safetensors", {"format": "pt"})
    return out


def refused(folder: Path, run: Path, capsys) -> str:
    """The message with which `fit` refuses a model; it has claimed no run directory."""
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main(["fit", *jobs.options(folder, run)])
    assert not (run / "run.json").exists()
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error


def float8(tensors: Tensors) -> Tensors:
    """Experts in scaled float8."""
    out = {}
    for key, weight in tensors.items():
        out[key] = weight
        if ".experts." in key:
            scale = weight.abs().max() / 448
            out |= {key: (weight / scale).to(torch.float8_e4m3fn), f"{key}_scale_inv": scale.reshape(1, 1)}
    return out
