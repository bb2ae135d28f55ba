"""Size, error and throughput of each codec on trained and on random experts.

    python benchmarks/codecs.py --json codecs.json
    python benchmarks/codecs.py --tensors bundled --bounds 0.1 0.3

Tensors: `bundled`, the experts of the bundled model (every block, every --stride-th expert), and `mixtral`, one
projection of a Mixtral-sized expert, 14336 x 4096, drawn from N(0, 0.02^2); both in bfloat16. For comparison with the
package's codecs, `zstd` compresses the unchanged bfloat16 bytes at level 3. `packed` and `packed-zstd` round to nearest
in groups of 128 (only the first 1024 rows of a tensor), and are decoded to the codes that kernels read.

Rows: tensor, codec, bits_per_weight (of whole records), ratio (to bfloat16), rms_error (relative to the weights' RMS),
error (the largest, as a share of the bound), compress_MB_s and decompress_MB_s (bfloat16 bytes per second of CPU time
in one thread; compress includes the codec's check of the bound).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import zstandard
from kept_rows import write_rows
from torch import Tensor

from eacmoe_lightning.models.moe import MoEModel
from eacmoe_lightning.models.originals import load_original
from eacmoe_lightning.offload.codecs import codec, decode, decode_packed, read_header

ROWS_TO_PACK = 1024


def bundled(stride: int) -> list[Tensor]:
    return [
        block.experts.weight(projection)[expert].bfloat16().contiguous()
        for block in MoEModel(load_original("bundled")).moe_blocks
        for projection in block.experts.projections
        for expert in range(0, block.num_experts, stride)
    ]


def mixtral(rows: int) -> list[Tensor]:
    return [(torch.randn(rows, 4096, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16()]


def timed(action: Callable[[Any], Any], inputs: list[Any]) -> tuple[list[Any], float]:
    start = time.process_time()
    outputs = [action(each) for each in inputs]
    return outputs, time.process_time() - start


def raw_zstd(weight: Tensor) -> bytes:
    return zstandard.ZstdCompressor(level=3).compress(weight.view(torch.uint8).numpy())


def measure(name: str, weights: list[Tensor]) -> dict[str, Any]:
    if name.startswith("packed"):
        weights = [weight[:ROWS_TO_PACK] for weight in weights]
    nbytes = sum(weight.nbytes for weight in weights)
    if name == "zstd":
        records, compress = timed(raw_zstd, weights)
        _, decompress = timed(zstandard.ZstdDecompressor().decompress, records)
        decoded, bounds = weights, None
    else:
        records, compress = timed(codec(name).encode, weights)
        decoded, _ = timed(decode, records)  # warms up
        _, decompress = timed(decode_packed if name.startswith("packed") else decode, records)
        bounds = [read_header(record).bound for record in records]
    stored = sum(len(record) for record in records)
    square = sum((w.double() - d.double()).square().sum().item() for w, d in zip(weights, decoded, strict=True))
    energy = sum(w.double().square().sum().item() for w in weights)
    return {
        "codec": name,
        "bits_per_weight": 16 * stored / nbytes,
        "ratio": nbytes / stored,
        "rms_error": (square / energy) ** 0.5,
        "error": max(bound["error"] / bound["absolute"] for bound in bounds) if bounds and bounds[0] else None,
        "compress_MB_s": nbytes / compress / 1e6,
        "decompress_MB_s": nbytes / decompress / 1e6,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tensors", nargs="+", choices=["bundled", "mixtral"], default=["bundled", "mixtral"])
    parser.add_argument("--bounds", nargs="+", type=float, default=[0.03, 0.1, 0.3, 0.8], help="relative to mean |w|")
    parser.add_argument("--bits", nargs="+", type=int, default=[2, 3, 4])
    parser.add_argument("--stride", type=int, default=4, help="take every so many-th expert of the bundled model")
    parser.add_argument("--rows", type=int, default=14336, help="rows of the Mixtral-sized projection")
    parser.add_argument("--json", type=Path, help="file for the rows")
    args = parser.parse_args()
    torch.set_num_threads(1)
    names = ["zstd", "plain", "lossless"]
    names += [f"{kind}:mean:{bound:g}" for bound in args.bounds for kind in ("sz3", "uniform")]
    names += [f"{kind}:{bits}:128" for bits in args.bits for kind in ("packed", "packed-zstd")]
    rows = []
    for tensor in args.tensors:
        weights = bundled(args.stride) if tensor == "bundled" else mixtral(args.rows)
        for name in names:
            row = {"tensor": tensor} | measure(name, weights)
            rows.append(row)
            print(
                f"{tensor:8s} {name:18s} {row['bits_per_weight']:6.2f} bits {row['ratio']:6.2f} x"
                f"   rms {row['rms_error']:.4f} {row['compress_MB_s']:7.0f} MB/s in {row['decompress_MB_s']:7.0f} out",
                flush=True,
            )
            write_rows(args.json, rows)


if __name__ == "__main__":
    main()
