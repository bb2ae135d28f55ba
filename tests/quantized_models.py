"""Models in the formats of quantized checkpoints, made word by word from the formats' definitions."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from eacmoe_lightning.models.checkpoint import Checkpoint
from eacmoe_lightning.models.streamed import StreamedModel
from eacmoe_lightning.quantization.grid import Grid, round_to_nearest

Tensors = dict[str, Tensor]
Change = Callable[[str, Tensor], Tensors]
# the names that Mixtral's linears have where stacks of experts were split
LINEARS = {"block_sparse_moe": "mlp", "w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}


def quantized(folder: Path, out: Path, config: dict[str, Any] | None, change: Change, **values: Any) -> Path:
    """A copy of a model with other tensors for each weight of its linears, and a `quantization_config`."""
    out.mkdir()
    for file in folder.iterdir():
        if file.is_file() and file.suffix != ".safetensors":
            (out / file.name).write_bytes(file.read_bytes())
    described = json.loads((folder / "config.json").read_text()) | {"quantization_config": config} | values
    (out / "config.json").write_text(json.dumps(described))
    tensors = {}
    for key, weight in load_file(folder / "model.safetensors").items():
        is_linear = weight.ndim == 2 and "layers" in key and not key.endswith("gate.weight")
        tensors |= change(key, weight) if is_linear else {key: weight.to(getattr(torch, described["dtype"]))}
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    return out


def assert_decoded(folder: Path, expected: dict[str, Tensor], dtype: str = "auto") -> None:
    """The checkpoint gives exactly these parameters, and neither its config nor its model is quantized."""
    checkpoint = Checkpoint(str(folder), dtype)
    read = checkpoint.read(expected)
    for name, tensor in expected.items():
        assert read[name].dtype == tensor.dtype and torch.equal(read[name], tensor), name
    assert "quantization_config" not in checkpoint.skeleton().config.to_dict()


def float8(block: tuple[int, int]) -> Change:
    """Weights in float8 with a scale for each block; the last blocks of a row or column may be cut off."""

    def change(key: str, weight: Tensor) -> dict[str, Tensor]:
        scale = torch.stack(
            [
                torch.stack([part.abs().max() / 448 for part in rows.split(block[1], 1)])
                for rows in weight.split(block[0], 0)
            ]
        )
        grid = scale.repeat_interleave(block[0], 0)[: len(weight)].repeat_interleave(block[1], 1)[:, : weight.shape[1]]
        return {key: (weight / grid).to(torch.float8_e4m3fn), f"{key}_scale_inv": scale}

    return change


def nvfp4(key: str, weight: Tensor) -> tuple[Tensors, Tensor]:
    """Codes, a scale for 16 inputs in float8, the unit of the scales, and the weight that they are, word by word."""
    generator = np.random.default_rng(len(key))
    rows, columns = weight.shape
    codes = generator.integers(0, 16, (rows, columns))
    scale = torch.from_numpy(generator.uniform(1, 400, (rows, columns // 16))).to(torch.float8_e4m3fn)
    whole = torch.tensor(1e-4)
    values = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    decoded = np.empty((rows, columns), np.float32)
    for row in range(rows):
        for column in range(columns):
            code = codes[row, column]
            unit = np.float32(float(scale[row, column // 16])) * np.float32(float(whole))
            decoded[row, column] = np.float32(-values[code - 8] if code >= 8 else values[code]) * unit
    packed = torch.from_numpy((codes[:, ::2] | codes[:, 1::2] << 4).astype(np.uint8))
    name = key.removesuffix("weight")
    parts = {key: packed, f"{key}_scale": scale, f"{key}_scale_2": whole, f"{name}input_scale": torch.tensor(0.5)}
    return parts, torch.from_numpy(decoded)


def grids(key: str, weight: Tensor, bits: int, group: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, Tensor]:
    """Random codes [O, I], zero points [G, O], scales [G, O], and the weight that they are."""
    generator = np.random.default_rng(len(key))
    (rows, columns), groups = weight.shape, int(group.max()) + 1
    codes = generator.integers(0, 2**bits, (rows, columns))
    zeros = generator.integers(1, 2**bits, (groups, rows))
    scales = generator.uniform(0.01, 0.03, (groups, rows)).astype(np.float16)
    decoded = np.empty((rows, columns), np.float32)
    for row in range(rows):
        for column in range(columns):
            g = group[column]
            decoded[row, column] = np.float32(scales[g, row]) * (int(codes[row, column]) - int(zeros[g, row]))
    return codes, zeros, scales, torch.from_numpy(decoded)


def words(codes: np.ndarray, bits: int) -> np.ndarray:
    """[R, n] -> int32 [R, n * bits / 32]; each row is written as one long integer."""
    rows = [sum(int(code) << (bits * i) for i, code in enumerate(row)) for row in codes]
    size = codes.shape[1] * bits // 8
    return np.stack([np.frombuffer(row.to_bytes(size, "little"), "<i4") for row in rows]).astype(np.int32)


def rounded(weight: Tensor, symmetric: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """4-bit codes [O, I], zero points and scales [O, G] of a weight in groups of 32, and the weight that they are."""
    q = round_to_nearest(weight.float(), Grid(4, 32, symmetric))
    return q.codes, q.zero_point, q.scale, q.dequantize(torch.float32)


def gptq_parts(
    weight: Tensor, symmetric: bool, left_out: int = 0, kinds: str = "qweight qzeros scales g_idx"
) -> Tensors:
    """Tensors of the format by kind; zero points are stored less `left_out`."""
    codes, zeros, scales, _ = rounded(weight, symmetric)
    parts = {
        "qweight": torch.from_numpy(words(codes.numpy(), 4).T.copy()),
        "qzeros": torch.from_numpy(words(zeros.T.numpy() - left_out, 4)),
        "scales": scales.T.contiguous(),
        "g_idx": torch.arange(weight.shape[1], dtype=torch.int32) // 32,
    }
    return {kind: parts[kind] for kind in kinds.split()}


def gptq_model(folder: Path, out: Path, config: dict[str, Any], **options: Any) -> tuple[Path, Tensors]:
    """A model in the format, and the weights that are stored in it."""
    expected: Tensors = {}

    def change(key: str, weight: Tensor) -> Tensors:
        expected[key] = rounded(weight, options["symmetric"])[-1]
        return {
            f"{key.removesuffix('.weight')}.{kind}": tensor for kind, tensor in gptq_parts(weight, **options).items()
        }

    config = {"quant_method": "gptq", "bits": 4, "group_size": 32} | config
    return quantized(folder, out, config, change), {key: w for key, w in expected.items() if "self_attn" in key}


def renamed(folder: Path, rename: Callable[[str], str | None]) -> Path:
    """Other keys in a model's file; None leaves a tensor out."""
    tensors = load_file(folder / "model.safetensors")
    tensors = {name: tensor for key, tensor in tensors.items() if (name := rename(key)) is not None}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def split(key: str) -> str:
    """The names that Mixtral's linears have where stacks of experts were split."""
    return ".".join(LINEARS.get(word, word) for word in key.split("."))


def read(folder: Path) -> None:
    StreamedModel(Checkpoint(str(folder))).load_all()
