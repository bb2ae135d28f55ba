"""What needs a GPU, checked and measured on one, in parts that each end within a minute or two.

    python benchmarks/gpu.py wheels DIR            collects what a machine without network lacks (run it elsewhere)
    python benchmarks/gpu.py install DIR           installs from there what is missing, and leaves torch alone
    python benchmarks/gpu.py --output gpu.jsonl    all parts
    python benchmarks/gpu.py kernels pesf          some of them
    python benchmarks/gpu.py --miniature           all code paths with tiny shapes, without a GPU

The machine needs a GPU, torch 2.11 or newer with Triton, transformers and lightning. This package need not be installed
there: the script runs from a checkout. Without the compiled CPU kernels only the CPU's side of `fit` is slower.

Parts:
    kernels   Triton's and Humming's products and Triton's column loop against float64: every bit width, mixed bits,
              odd shapes, 1 to 33 tokens and many, biases, activations, skipped pairs, more than 2 GiB of codes
    experts   packed experts of Qwen3-30B-A3B's and Mixtral's shapes at 1 to 4096 tokens beside transformers' bf16
              `grouped_mm`: time, and share of the bandwidth or arithmetic that this card reached in the same run
    pesf      prefill of one-layer models of Qwen1.5-MoE's and Mixtral's shapes with PESF at alpha 0.3 and 0.7
    block     one block of Qwen3-30B-A3B's shapes calibrated, seconds by phase; the column loop in Triton and in torch
    fit       `fit` of the bundled model on the GPU beside the same on the CPU: perplexities and seconds
    memory    what models loaded at 3 bit and in bf16 take on the GPU, beside the size of the files
    formats   exports for vLLM and SGLang: Humming's products by its schemas of their formats, every width; vLLM itself,
              where it is installed, on exports of the bundled model

Rows are printed as they come and appended to --output, a JSON object a line. Every part runs in a process of its own
(in miniature in one): what breaks it, as an illegal access does for good, does not reach the next. The exit code is 0
where all parts ran and every check held.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from importlib import metadata
from pathlib import Path

HERE = Path(__file__).resolve().parent
PARTS = ("kernels", "experts", "pesf", "block", "fit", "memory", "formats")
COMMANDS = ("wheels", "install")


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("parts", nargs="*", metavar="PART", help=f"any of {', '.join(PARTS)}; default: all")
    made.add_argument("--output", type=Path, help="JSON-lines file that rows are appended to")
    made.add_argument("--miniature", action="store_true", help="tiny shapes; on the CPU where there is no GPU")
    made.add_argument("--limit", type=float, default=300, help="seconds after which a part is ended")
    made.add_argument("--scratch", help="directory for temporary files; the system's by default")
    made.add_argument("--processes", type=int, default=min(8, os.cpu_count() or 1), help="of `kernels`, which compile")
    made.add_argument("--windows", type=int, default=32, help="of `block`")
    made.add_argument("--length", type=int, default=2048, help="tokens of a window of `block`")
    made.add_argument("--solver-gib", type=float, nargs="*", default=[2.0], help="of `block`: a run for each")
    made.add_argument("--fit-windows", type=int, default=32, help="of `fit`")
    made.add_argument("--fit-length", type=int, default=256, help="tokens of a window of `fit`")
    made.add_argument("--cpu-result", type=Path, help="output of an earlier `fit`, whose CPU side is taken from there")
    return made


def main() -> int:
    if sys.argv[1:2] and sys.argv[1] in COMMANDS:
        from gpu_parts import wheels

        return wheels.main(sys.argv[1:])
    options = parser().parse_args()
    if unknown := set(options.parts) - set(PARTS):
        parser().error(f"{', '.join(sorted(unknown))}: the parts are {', '.join(PARTS)}")
    parts = options.parts or PARTS
    if len(parts) == 1 or options.miniature:
        device = open_device(options.miniature)
        passed = {part: run(part, options, device) for part in parts}
    else:
        words = sys.argv[1:]
        for part in options.parts:
            words.remove(part)
        passed = {part: run_alone(part, words, options.limit) for part in parts}
    print("\n" + "\n".join(f"{part:8s} {'passed' if ok else 'FAILED'}" for part, ok in passed.items()), flush=True)
    return int(not all(passed.values()))


def run_alone(part: str, words: list[str], limit: float) -> bool:
    """A part in a process of its own; whether it passed."""
    print(f"\n--- {part}", flush=True)
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, __file__, part, *words], start_new_session=True)
    try:
        code = process.wait(limit)
        print(f"--- {part}: {time.perf_counter() - start:.0f} s", flush=True)
        return code == 0
    except subprocess.TimeoutExpired:
        print(f"{part} was ended after {limit:.0f} s (--limit)", flush=True)
        return False
    finally:
        end_group(process)


def end_group(process: subprocess.Popen) -> None:
    """Ends a part with all the processes that it started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


def run(part: str, options: argparse.Namespace, device) -> bool:
    """A part in this process: prints and writes its rows. Whether it ran to its end and all that it checks holds."""
    common = {"part": part, "device": device.name, "miniature": options.miniature, "versions": versions()}
    passed = True
    try:
        module = importlib.import_module(f"gpu_parts.{part}")
        for row in module.rows(options, device):
            passed &= row.get("passed", True)
            print(module.line(row) + ("" if row.get("passed", True) else "  FAILED"), flush=True)
            write(options.output, row | common)
    except Exception:
        traceback.print_exc()
        write(options.output, common | {"error": traceback.format_exc(limit=-3), "passed": False})
        return False
    return passed


def versions() -> dict[str, str]:
    """Of what runs on the GPU."""
    names = ("torch", "triton", "transformers", "lightning", "humming-kernels")
    return {name: metadata.version(name) for name in names if importlib.util.find_spec(name.partition("-")[0])}


def write(path: Path | None, row: dict) -> None:
    if path is not None:
        with path.open("a") as file:
            file.write(json.dumps(row) + "\n")


def open_device(is_miniature: bool):
    """The GPU; in miniature without one the CPU, with Triton interpreted: decided before anything imports Triton."""
    import torch

    has_gpu = torch.cuda.is_available()
    if not has_gpu:
        if not is_miniature:
            raise SystemExit("no GPU is visible to torch: --miniature runs everything with tiny shapes on this CPU")
        os.environ["TRITON_INTERPRET"] = "1"
    sys.path[:0] = [str(HERE.parent)]  # the checkout
    from gpu_parts.device import Device, stand_in

    if not has_gpu:
        stand_in()
    torch.manual_seed(0)
    return Device(torch.device("cuda", 0) if has_gpu else torch.device("cpu"), is_miniature)


if __name__ == "__main__":
    sys.exit(main())
