"""Exports in their engines: GPTQModel, llama.cpp and vLLM load them, and their logits are compared with ours.

    python benchmarks/export_check.py --json export_check.json
    python benchmarks/export_check.py --engines llama.cpp --cases 3 --sources runs/tiny runs/tiny-2.06
    python benchmarks/export_check.py --engines llama.cpp --cases --families gguf
    python benchmarks/export_check.py --engines gptqmodel --cases --families all
    python benchmarks/export_check.py --engines vllm --cases "4 symmetric" --families mixtral olmoe deepseek_v2

Models: the bundled one, rounded to nearest in groups of 128 (CASES); the runs or compressed directories in --sources;
and with --families tiny random models of other architectures (tests/architectures.py), 3 bit in groups of 32, Mixtral's
with a sentencepiece tokenizer. "all" are those that `eacmoe_lightning/gptqmodel.py` lists, "gguf" those of
tests/gguf_models.py, for llama.cpp; names alone are taken from there where only llama.cpp runs. Where only vLLM runs,
they are symmetric, 4 bit in groups of 64, with dimensions that its kernels take.
`eacmoe_lightning.exports.export` exports each model. The engine loads it in a separate environment and runs it on the
bundled held-out texts. Missing environments are created under --work: GPTQModel's takes 6 GB, llama.cpp is compiled for
some minutes. Of vLLM the CPU build runs, without this package's plugin, in bfloat16 and in float16; its kernels for
4-bit experts need a CPU with AMX. Rows:

    logits      root mean square of the difference from our decoded float32 model, relative to that of its logits
    yardstick   the same for our model in bfloat16, beside vLLM in its type: the effect of rounding alone
    control     with weights as the engine decodes them, but in float32, so that activations are not rounded; of vLLM
                what it makes of the `dense` export in the same type
    int8        vLLM only: the same for our model with activations that are rounded to 8 bit, as vLLM rounds them
    unread      GPTQModel only: tensors of the export that its model has no place for, and places that get none
    perplexity  of both, and the share of positions with the same most likely token
    tokens      llama.cpp only: the share of held-out texts with the same token ids as the original tokenizer's

    --python ENGINE=PATH uses an existing environment.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from environments import python_of
from kept_rows import write_rows
from serve_check import random_original, vllm_python
from tokenizers import Tokenizer
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel

from eacmoe_lightning import gptqmodel
from eacmoe_lightning.compressed.directory import save_compressed
from eacmoe_lightning.compressed.loading import load
from eacmoe_lightning.exports.export import export
from eacmoe_lightning.models.moe import MoEModel
from eacmoe_lightning.models.originals import BUNDLED, load_original
from eacmoe_lightning.quantization.grid import Grid, round_to_nearest
from eacmoe_lightning.text.documents import read_documents
from eacmoe_lightning.text.sources import heldout_names
from eacmoe_lightning.text.windows import token_windows

HERE = Path(__file__).resolve().parent
GROUP_SIZE, WINDOWS_PER_TEXT, WINDOW_LENGTH = 128, 4, 128
PACKAGES = {
    "gptqmodel": [["torch==2.14.1"], ["gptqmodel==7.7.*"]],
    "llama.cpp": [["llama-cpp-python==0.3.36", "gguf>=0.18", "numpy"]],
}
FORMATS = {"gptqmodel": ("gptq", "gptq_v2"), "llama.cpp": ("gguf",), "vllm": ("compressed-tensors", "gptq")}
DTYPES = {"vllm": ("bfloat16", "float16")}  # that an engine runs in; the others choose by themselves
CASES = {  # name: bits of attention, of gate and up, of down; symmetric
    "2": (4, 2, 2, False),
    "3": (4, 3, 3, False),
    "4": (4, 4, 4, False),
    "4 symmetric": (4, 4, 4, True),
    "8 symmetric": (8, 8, 8, True),
    "mixed": (4, 2, 3, False),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines", nargs="*", choices=list(FORMATS), default=list(FORMATS))
    parser.add_argument("--cases", nargs="*", choices=list(CASES), default=list(CASES))
    parser.add_argument("--sources", nargs="*", type=Path, default=[])
    parser.add_argument("--families", nargs="*", default=[])
    parser.add_argument("--work", type=Path, default=Path("runs/export_check"))
    parser.add_argument("--python", nargs="*", default=[], metavar="ENGINE=PATH")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    work = args.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    pythons = dict(choice.split("=", 1) for choice in args.python)
    subjects = {case: rounded(work / "models" / case.replace(" ", "-"), *CASES[case]) for case in args.cases}
    subjects |= {str(path): path for path in args.sources}
    if args.engines == ["vllm"]:
        subjects |= {name: for_vllm(work / "models" / f"{name}-vllm", name) for name in args.families}
    else:
        subjects |= {
            name: random_model(work / "models" / name, build)
            for name, build in models_of(args.families, args.engines).items()
        }
    tokenizer = AutoTokenizer.from_pretrained(BUNDLED)
    texts = {name: read_documents(f"bundled:{name}") for name in heldout_names()}
    windows = [token_windows(documents, tokenizer, WINDOWS_PER_TEXT, WINDOW_LENGTH) for documents in texts.values()]
    tokens = torch.cat(windows)
    np.save(work / "tokens.npy", tokens.numpy())
    joined = ["\n".join(documents) for documents in texts.values()]
    (work / "texts.json").write_text(json.dumps(joined))
    rows = []
    for engine in args.engines:
        environment = work / "environments" / engine
        python = pythons.get(engine)
        if python is None:
            python = vllm_python(environment) if engine == "vllm" else python_of(environment, PACKAGES[engine])
        for name, source in subjects.items():
            ours = run_ours(source, tokens, "float32")
            for form in FORMATS[engine]:
                row = {"engine": engine, "format": form, "model": name}
                out = work / "exports" / f"{Path(name).name.replace(' ', '-')}-{engine}-{form}"
                try:
                    difference = None if out.exists() else export(str(source), str(out), form, engine)
                except ValueError as error:
                    rows.append(row | {"refused": str(error).splitlines()[0]})
                    continue
                row["weights"] = difference and difference.weights
                for dtype in DTYPES.get(engine, (None,)):
                    rows.append(row | run(python, engine, source, out, dtype, ours, tokens, joined, work))
                    print(json.dumps(rows[-1]), flush=True)
    write_rows(args.json, rows)
    print(table(rows))


def run(
    python: str,
    engine: str,
    source: Path,
    out: Path,
    dtype: str | None,
    ours: Tensor,
    tokens: Tensor,
    texts: list[str],
    work: Path,
) -> dict:
    """What an engine makes of an export, beside our logits in float32.

    Args:
        source: the compressed directory, or the run.
        out: the export.
        dtype: that the engine runs in; None: its own.
        texts: the held-out texts as they are in work / "texts.json".
    """
    try:
        seen, about = run_engine(python, engine, out, work, dtype)
    except RuntimeError as error:
        return {"dtype": dtype, "failed": str(error).splitlines()[-1]}
    normalized = engine == "vllm"  # it gives log-probabilities
    ours = ours.log_softmax(-1) if normalized else ours
    row = about | {"dtype": dtype} | compare(ours, torch.from_numpy(seen["logits"]), tokens)
    row["yardstick"] = relative(run_ours(source, tokens, dtype or "bfloat16", normalized), ours)
    if engine == "gptqmodel":
        row["control"] = relative(torch.from_numpy(seen["control"]), ours)
    if engine == "llama.cpp":
        directory = next(path for path in (source / "compressed", source) if path.exists())
        theirs = Tokenizer.from_file(str(directory / "tokenizer.json")).encode_batch(texts, False, False)
        same = [list(seen[f"ids_{i}"]) == encoding.ids for i, encoding in enumerate(theirs)]
        row["tokens"] = sum(same) / len(same)
        control, _ = run_engine(python, engine, out, work, decoded=work / "decoded")
        control = compare(ours, torch.from_numpy(control["logits"]), tokens)
        row["control"], row["control_same_token"] = control["logits"], control["same_token"]
    if engine == "vllm":
        row["int8"] = relative(run_ours(source, tokens, "float32", normalized, packed=True, activations="int8"), ours)
        dense = work / "exports" / f"{source.name.replace(' ', '-')}-dense"
        control = dense.with_name(f"{dense.name}-{dtype}.npy")
        if not dense.exists():
            export(str(source), str(dense), "dense")
        if not control.exists():
            np.save(control, run_engine(python, engine, dense, work, dtype)[0]["logits"])
        row["control"] = relative(torch.from_numpy(np.load(control)), ours)
    return row


def table(rows: list[dict]) -> str:
    """The rows as a table in Markdown, for docs/findings/exports.md."""
    lines = ["| engine, format | model | logits | bf16 | int8 | same top token | perplexity ours -> theirs | decoded |"]
    lines.append("|---" * 8 + "|")
    for row in rows:
        engine = " ".join(filter(None, (row["engine"], row.get("dtype"))))
        name = f"| {engine}, `{row['format']}` | {row['model']} |"
        if problem := row.get("refused") or row.get("failed"):
            lines.append(f"{name} {problem} |" + " |" * 5)
            continue
        logits, bf16, control = (f"{row[key]:.4f}".lstrip("0") for key in ("logits", "yardstick", "control"))
        if row["control"] < 1e-3:
            control = f"{row['control']:.0e}".replace("e-0", "e-")
        perplexities = f"{row['perplexity_ours']:.3f} -> {row['perplexity']:.3f}"
        int8 = f"{row['int8']:.4f}".lstrip("0") if "int8" in row else ""
        same = f"{100 * row['same_token']:.1f} %"
        lines.append(f"{name} {logits} | {bf16} | {int8} | {same} | {perplexities} | {control} |")
    return "\n".join(lines)


def rounded(folder: Path, attention: int, up: int, down: int, symmetric: bool) -> Path:
    """A compressed directory of the bundled model, rounded to nearest."""
    return folder if folder.exists() else round_model(folder, "bundled", GROUP_SIZE, attention, up, down, symmetric)


def models_of(families: list[str], engines: list[str]) -> dict[str, Callable[[], PreTrainedModel]]:
    """What builds each of the tests' tiny models, by its name."""
    sys.path.append(str(HERE.parent / "tests"))
    import architectures
    import gguf_models

    if families == ["gguf"] or engines == ["llama.cpp"]:
        names = gguf_models.NAMES if families == ["gguf"] else families
        return {name: partial(gguf_models.build, name) for name in names if name in gguf_models.NAMES}
    families = sorted(gptqmodel.PACKED) if families == ["all"] else families
    return {name: partial(architectures.build, name) for name in families if name in architectures.ARCHITECTURES}


def random_model(folder: Path, build: Callable[[], PreTrainedModel]) -> Path:
    """A compressed directory of one of the tests' tiny models."""
    from test_gguf import sentencepiece_tokenizer

    if not folder.exists():
        original = folder.with_name(f"{folder.name}-original")
        build().save_pretrained(original)
        AutoTokenizer.from_pretrained(BUNDLED).save_pretrained(original)
        round_model(folder, str(original), 32, 4, 3, 3, False)
        if folder.name == "mixtral":
            sentencepiece_tokenizer().save(str(folder / "tokenizer.json"))
    return folder


def for_vllm(folder: Path, family: str) -> Path:
    """A compressed directory of a tiny random model, symmetric with 4 bit, that vLLM's kernels for CPUs take."""
    if not folder.exists():
        original = random_original(folder.with_name(f"{family}-vllm-original"), family)
        round_model(folder, str(original), 64, 4, 4, 4, True)
    return folder


def round_model(folder: Path, original: str, group_size: int, attention: int, up: int, down: int, symmetric: bool):
    moe, blocks, left = MoEModel(load_original(original, "float32")), [], {}
    for block in moe.blocks:
        quantized = {}
        for name, (part, weight) in block.weights().items():
            if weight.shape[-1] % group_size:
                left[name] = "its inputs are no multiple of the group size"
                continue
            bits = attention if part == "attention" else down if "down_proj" in name else up
            quantized[name] = round_to_nearest(weight, Grid(bits, group_size, symmetric))
        moe.put({name: block.as_parameter(name, q.dequantize()) for name, q in quantized.items()})
        blocks.append(quantized)
    save_compressed(folder, moe, original, blocks, {"method": "round to nearest", "unquantized": left})
    return folder


@torch.no_grad()
def run_ours(source: Path, tokens: Tensor, dtype: str, normalized: bool = False, packed: bool = False, **options):
    """Logits [B, T, V] of our model, decoded if it isn't `packed`; `normalized`: log-probabilities."""
    model = load(source, dtype=dtype, packed=packed, **options)
    logits = torch.cat([model(row[None], use_cache=False).logits.float() for row in tokens])
    return logits.log_softmax(-1) if normalized else logits


def run_engine(
    python: str, engine: str, export: Path, work: Path, dtype: str | None = None, decoded: Path | None = None
) -> tuple[dict, dict]:
    """The arrays that an engine computes with an export, and the engine's description of itself.

    Raises:
        RuntimeError: the engine does not run the export.
    """
    out = work / "seen.npz"
    job = {"export": str(export), "tokens": str(work / "tokens.npy"), "texts": str(work / "texts.json")}
    job |= {"out": str(out), "decoded": decoded and str(decoded), "dtype": dtype}
    env = {"PYTHONPATH": "", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [python, str(HERE / "export_engines.py"), engine, json.dumps(job)]
    done = subprocess.run(command, env=os.environ | env, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{engine} does not run {export}: {done.stderr.strip()[-1500:]}")
    return dict(np.load(out)), json.loads(done.stdout.strip().splitlines()[-1])


def relative(other: Tensor, ours: Tensor) -> float:
    return float(((other - ours).square().mean() / ours.square().mean()).sqrt())


def compare(ours: Tensor, theirs: Tensor, tokens: Tensor) -> dict[str, float]:
    """Difference of logits, both perplexities, and the share of positions with the same most likely token."""

    def perplexity(logits: Tensor) -> float:
        return float(torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).exp())

    return {
        "logits": relative(theirs, ours),
        "perplexity": perplexity(theirs),
        "perplexity_ours": perplexity(ours),
        "same_token": float((ours.argmax(-1) == theirs.argmax(-1)).float().mean()),
    }


if __name__ == "__main__":
    sys.exit(main())
