"""llama.cpp's command-line tools, for the benchmarks that judge by them.

They build from llama.cpp's sources, for example those in the source distribution of llama-cpp-python:

    cmake -S vendor/llama.cpp -B build -DLLAMA_CURL=OFF
    cmake --build build --target llama-perplexity llama-quantize llama-imatrix
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path

from eacmoe_lightning.compressed.directory import save_compressed
from eacmoe_lightning.exports.export import export
from eacmoe_lightning.models.streamed import StreamedModel

LINES = {  # our figure: llama-perplexity's line
    "log_ppl_ratio": r"Mean ln\(PPL\(Q\)/PPL\(base\)\)",
    "kl.mean": "Mean    KLD",
    "kl.median": "Median  KLD",
    "kl.p90": "90.0%   KLD",
    "kl.p99": "99.0%   KLD",
    "kl.p99_9": "99.9%   KLD",
    "kl.max": "Maximum KLD",
    "same_top": "Same top p",
    "mean_dp": "Mean    Δp",
    "rms_dp": "RMS Δp",
}
TRIES = 20
PERCENT = ("same_top", "mean_dp", "rms_dp")
IN_FLOAT32 = ("-ctk", "f32", "-ctv", "f32", "-fa", "off")  # its cache of keys and values is in float16 by default


def run(program: str | Path, *words: str) -> str:
    """What a program prints; through a file, since llama.cpp's logger may lose the end of a pipe."""
    with tempfile.TemporaryFile("w+") as printed:
        done = subprocess.run([str(program), *words], stdout=printed, stderr=subprocess.PIPE, text=True)
        printed.seek(0)
        output = printed.read()
    if done.returncode:
        raise SystemExit(f"{program} failed: {(output + done.stderr).strip()[-1500:]}")
    return output


def as_gguf(source: Path, out: Path) -> Path:
    """The GGUF file of a run or a compressed directory, written once."""
    if not out.exists():
        export(str(source), str(out), "gguf")
    return out / "model.gguf"


def unquantized_gguf(model: StreamedModel, name: str, folder: Path) -> Path:
    """The GGUF file of a model as it is, in its dtype, written once."""
    if not folder.exists():
        save_compressed(folder, model, name, [{} for _ in model.blocks], {"method": "none", "quantizer": "none"})
    return as_gguf(folder, folder.with_name(f"{folder.name}-gguf"))


def divergence(program: str | Path, *words: str) -> dict[str, float]:
    """The figures that `llama-perplexity --kl-divergence` prints, shares as shares.

    Its logger sometimes loses the end of what it prints; then it runs again.
    """
    for _ in range(TRIES):
        output = run(program, *words, "--kl-divergence")
        matches = {name: re.search(rf"^{line}\s*:\s*(-?[\d.]+)", output, re.MULTILINE) for name, line in LINES.items()}
        if None not in matches.values():
            return {name: float(match[1]) / (100 if name in PERCENT else 1) for name, match in matches.items()}
    raise SystemExit(f"{program} printed no line for {[n for n, match in matches.items() if match is None]}: {output}")
