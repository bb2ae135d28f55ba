"""Our K-quants beside llama.cpp's, at the same size: GGUF files of runs, and of `llama-quantize` with the same types.

    eacmoe fit --config tiny --model.target llama.cpp --trainer.default_root_dir runs/kquant
    python benchmarks/gguf_quality.py runs/kquant --llama-bin PATH/build/bin

For every run the original is quantized by `llama-quantize` to the run's own types, tensor by tensor, so the files have
the same size: without an importance matrix, and with one (`llama-imatrix`) of the run's calibration text. All files
then meet the original in `llama-perplexity --kl-divergence`, on the run's held-out texts and those of --far
(far_texts.py). `llama_programs.py` says how to build the three programs. `--also NAME=FILE` adds files of other tools,
such as AutoRound's (gguf_autoround.py).

The table shows nats lost per token and the mean divergence KL(original || file).
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from statistics import mean

import gguf
from kept_rows import write_rows
from llama_programs import IN_FLOAT32, as_gguf, divergence, run, unquantized_gguf

from eacmoe_lightning.compressed.opening import open_model
from eacmoe_lightning.text.documents import read_documents

PLAIN = ("F32", "F16", "BF16")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", help="finished runs of one original, for the target llama.cpp")
    parser.add_argument("--llama-bin", type=Path, required=True, help="folder of the three programs")
    parser.add_argument("--also", nargs="*", default=[], metavar="NAME=FILE", help="GGUF files of other tools")
    parser.add_argument("--calibration", default="bundled:calibration", help="text of the importance matrix")
    parser.add_argument("--heldout", nargs="+", default=["bundled:prose", "bundled:code", "bundled:german"])
    parser.add_argument("--far", type=Path, help="folder of texts")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--windows", type=int, default=16, help="of each text")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--work", type=Path, default=Path("runs/gguf_quality"))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    work = args.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    original = open_model(open_model(args.runs[0]).original, "float32")
    dense = unquantized_gguf(original.streamed(), original.name, work / "original")
    threads = ["-t", str(args.threads)]

    matrix = work / "imatrix.gguf"
    if not matrix.exists():
        (work / "calibration.txt").write_text("\n".join(read_documents(args.calibration)))
        words = ["-m", str(dense), "-f", str(work / "calibration.txt"), "-c", str(args.context), "-o", str(matrix)]
        run(args.llama_bin / "llama-imatrix", *words, *threads)

    files = {"original": dense}
    for path in args.runs:
        ours = files[path.name] = as_gguf(path, work / path.name)
        for name, options in (("llama.cpp", []), ("llama.cpp, imatrix", ["--imatrix", str(matrix)])):
            file = work / f"{path.name}-{'imatrix' if options else 'plain'}.gguf"
            if not file.exists():
                quantize(args.llama_bin / "llama-quantize", dense, ours, file, options, args.threads)
            files[f"{path.name}: {name}"] = file

    files |= {name: Path(file) for name, _, file in (each.partition("=") for each in args.also)}

    texts = {source.rpartition(":")[2]: "\n".join(read_documents(source)) for source in args.heldout}
    far = {file.stem: file.read_text() for file in sorted(args.far.glob("*.txt"))} if args.far else {}
    rows = {name: {"megabytes": file.stat().st_size / 1e6, "texts": {}} for name, file in files.items()}
    for text, content in (texts | far).items():
        (work / f"{text}.txt").write_text(content)
        base = work / f"{text}.kld"
        words = ["-f", str(work / f"{text}.txt"), "-c", str(args.context), "-b", str(args.context), *IN_FLOAT32]
        words += ["--chunks", str(args.windows), *threads, "--kl-divergence-base", str(base)]
        run(args.llama_bin / "llama-perplexity", "-m", str(dense), *words)
        for name, file in files.items():
            rows[name]["texts"][text] = divergence(args.llama_bin / "llama-perplexity", "-m", str(file), *words)
        base.unlink()
    show(rows, list(texts), list(far))
    write_rows(args.json, rows)


def quantize(program: Path, dense: Path, like: Path, out: Path, options: list[str], threads: int) -> None:
    """Quantizes a file to the types that another one has, tensor by tensor."""
    types = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(like).tensors}
    kept = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(dense).tensors}
    asked = {name: kind for name, kind in types.items() if kind not in PLAIN}
    for name, kind in kept.items():
        if name in ("token_embd.weight", "output.weight"):
            flag = "--token-embedding-type" if name.startswith("token") else "--output-tensor-type"
            options = [*options, flag, types.get(name, kind).lower()]
    words = []
    for name, kind in asked.items():
        words += ["--tensor-type", f"^{re.escape(name)}$={kind.lower()}"]
    run(program, *options, *words, str(dense), str(out), "Q8_0", str(threads))
    made = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(out).tensors}
    different = {name: (kind, made[name]) for name, kind in types.items() if made[name] != kind}
    if different:
        out.unlink()
        raise SystemExit(f"{program} gave other types than {like} has: {different}")


def show(rows: dict, texts: list[str], far: list[str]) -> None:
    columns = [*texts, *(["far"] if far else [])]
    print(f"{'':40s} {'MB':>7s} " + " ".join(f"{name:>17s}" for name in columns))
    for name, row in rows.items():
        cells = []
        for column in columns:
            figures = [row["texts"][text] for text in (far if column == "far" else [column])]
            cells.append(f"{mean(f['log_ppl_ratio'] for f in figures):8.4f} {mean(f['kl.mean'] for f in figures):8.4f}")
        print(f"{name:40s} {row['megabytes']:7.2f} " + " ".join(f"{cell:>17s}" for cell in cells))


if __name__ == "__main__":
    main()
