"""Writes six texts of kinds that are neither calibrated nor bundled, from what is installed beside this package.

    pip install django==5.2.9 && python benchmarks/far_texts.py far_texts
    python benchmarks/far_texts.py far_texts --measure runs/one runs/two

A gain on text like the calibration's is partly overfitting; these tell how far it reaches. The same versions of the
packages give the same texts, up to the order in which Python imports its own modules (`logs`). `--measure` compares
compressed models with their original on them and on the bundled held-out texts: nats lost per token, and the
divergence KL(original || compressed) in nats per token. The latter cannot fall by luck on text that the original itself
predicts badly.

| text | from |
|---|---|
| documentation | the descriptions of installed packages |
| languages | Django's messages in Spanish, Italian, Dutch, Polish, Portuguese and Swedish |
| headers | the C++ headers of torch |
| tables | zones of tzdata, characters of Unicode, values of functions |
| logs | what `python -v` says while it imports |
| licences | the licences of installed packages |
"""

from __future__ import annotations

import argparse
import json
import math
import random
import re
import subprocess
import sys
import unicodedata
from collections.abc import Callable, Iterator
from importlib.metadata import distribution
from importlib.util import find_spec
from pathlib import Path

import torch
from kept_rows import write_rows

from eacmoe_lightning.compressed.opening import open_model
from eacmoe_lightning.evaluation import divergence
from eacmoe_lightning.text.sources import heldout_names
from eacmoe_lightning.text.windows import read_windows

PIECE = 1_500  # characters after which a text goes on with its next source, so that its first windows hold of many
CHARACTERS = 150_000  # of a text, at most: 16 windows of 512 tokens of the bundled tokenizer are 15 to 30 thousand
PACKAGES = (
    "torch", "transformers", "lightning", "tokenizers", "datasets", "numpy", "safetensors", "huggingface_hub",
    "jsonargparse", "tensorboard", "torchmetrics", "pyarrow", "pandas", "fsspec", "filelock", "tqdm", "requests",
)  # fmt: skip
LANGUAGES = ("es", "it", "nl", "pl", "pt", "sv")
IMPORTED = "asyncio, concurrent.futures, ctypes, decimal, email.mime.text, http.server, json, logging.config, sqlite3"


def documentation() -> Iterator[str]:
    for package in PACKAGES:
        yield distribution(package).metadata.get_payload()[:15_000]


def licences() -> Iterator[str]:
    seen = set()
    for package in PACKAGES:
        for file in sorted(distribution(package).files or [], key=str):
            if re.search(r"licen[cs]e|notice|copying", file.name, re.I) and (path := Path(file.locate())).is_file():
                text = path.read_text(errors="replace")[:12_000]
                if text not in seen:
                    seen.add(text)
                    yield text


def languages() -> Iterator[str]:
    root = Path(find_spec("django").origin).parent
    for language in LANGUAGES:
        texts = [path.read_text() for path in sorted(root.rglob(f"locale/{language}/LC_MESSAGES/django.po"))]
        messages = re.findall(r'^msgstr(?:\[\d\])? ((?:".*"\n)+)', "\n".join(texts), re.M)
        said = ["".join(json.loads(line) for line in message.splitlines()) for message in messages]
        yield "\n".join(m for m in said if len(m) > 20 and "Project-Id-Version" not in m)[:25_000]


def headers() -> Iterator[str]:
    folder = Path(find_spec("torch").origin).parent / "include" / "ATen" / "core"
    paths = sorted(folder.rglob("*.h"))
    random.Random(0).shuffle(paths)
    for path in paths:
        yield path.read_text()[:8_000]


def tables() -> Iterator[str]:
    zones = Path(find_spec("tzdata").origin).parent / "zoneinfo" / "zone1970.tab"
    yield zones.read_text()[:20_000]
    named = ((code, unicodedata.name(chr(code), "")) for code in range(0x80, 0x2800))
    rows = [f"{code:04X},{name},{unicodedata.category(chr(code))}" for code, name in named if name]
    yield "code,name,category\n" + "\n".join(random.Random(0).sample(rows, 600))
    values = (x / 20 for x in range(1, 1000))
    lines = (f"{x:8.2f} {math.sin(x):10.6f} {math.log(x):10.6f} {math.sqrt(x):10.6f} {x * x:12.4f}" for x in values)
    yield "       x     sin(x)     log(x)    sqrt(x)          x^2\n" + "\n".join(lines)


def logs() -> Iterator[str]:
    run = subprocess.run([sys.executable, "-I", "-v", "-c", f"import {IMPORTED}"], capture_output=True, text=True)
    numbers: dict[str, str] = {}
    text = re.sub(r"0x[0-9a-f]+", lambda m: numbers.setdefault(m[0], f"0x{len(numbers):08x}"), run.stderr)
    yield text.replace(sys.base_prefix, "/usr").replace(sys.prefix, "/usr")


TEXTS: dict[str, Callable[[], Iterator[str]]] = {
    text.__name__: text for text in (documentation, languages, headers, tables, logs, licences)
}


def mixed(texts: list[str]) -> str:
    """Pieces of the texts in turn, cut at line ends."""
    left, pieces = [iter(_pieces(text)) for text in texts], []
    while left:
        turn = [(text, next(text, None)) for text in left]
        pieces += [piece for _, piece in turn if piece is not None]
        left = [text for text, piece in turn if piece is not None]
    return "\n\n".join(pieces)


def _pieces(text: str) -> Iterator[str]:
    start = 0
    while start < len(text):
        end = text.find("\n", start + PIECE) + 1 or len(text)
        yield text[start:end].strip("\n")
        start = end


def measure(runs: list[str], paths: dict[str, Path], num_windows: int, length: int) -> dict[str, dict[str, dict]]:
    """By run and text, the figures of `compare`. All models are in memory."""
    opened = [open_model(run) for run in runs]
    original = open_model(opened[0].original)
    models = {run: one.in_memory().model for run, one in zip(runs, opened, strict=True)}
    teacher = original.in_memory().model.float()
    figures: dict[str, dict[str, dict]] = {run: {} for run in runs}
    for text, source in {**{name: f"bundled:{name}" for name in heldout_names()}, **paths}.items():
        windows = read_windows(str(source), original.directory, num_windows, length)
        for run, figure in compare(models, teacher, windows).items():
            figures[run][text] = figure
    return figures


def compare(
    models: dict[str, torch.nn.Module], teacher: torch.nn.Module, windows: torch.Tensor
) -> dict[str, dict[str, float]]:
    """By model, in nats per token of the windows [S, T]: `lost`, `kl` and `original`, the original's own loss."""
    parts: dict[str, list[divergence.PerToken]] = {name: [] for name in models}
    for ids in windows.split(4):
        expected, targets = next_token_logits(teacher, ids), ids[:, 1:].flatten()
        for name, model in models.items():
            parts[name].append(divergence.compare(expected, next_token_logits(model, ids), targets))
    tokens = {name: divergence.joined(own) for name, own in parts.items()}
    return {
        name: {
            "lost": float((own.nll.double() - own.base_nll.double()).mean()),
            "kl": float(own.kl.double().mean()),
            "original": float(own.base_nll.double().mean()),
        }
        for name, own in tokens.items()
    }


@torch.no_grad()
def next_token_logits(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Token ids [B, T] -> logits [B * (T-1), V] of every token but the first."""
    return model(ids).logits[:, :-1].flatten(0, 1)


def table(figures: dict[str, dict[str, dict]]) -> str:
    """Means of the calibrated domains, German and the far texts, then each text: nats lost, divergence."""
    first = next(iter(figures.values()))
    inside = [text for text in first if text not in TEXTS and text != "german"]
    groups = {"in": inside, "german": ["german"], "far": list(TEXTS)} | {text: [text] for text in TEXTS}
    lines = ["| run | " + " | ".join(groups) + " |", "|---" * (len(groups) + 1) + "|"]
    for run, texts in figures.items():
        cells = []
        for group in groups.values():
            lost, kl = (sum(texts[text][kind] for text in group) / len(group) for kind in ("lost", "kl"))
            cells.append(f"{lost:.4f}, {kl:.4f}")
        lines.append(f"| {Path(run).name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--measure", nargs="+", default=[], help="run directories to compare on the texts")
    parser.add_argument("--windows", type=int, default=16, help="windows of each text")
    parser.add_argument("--window_length", type=int, default=512)
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    options = parser.parse_args()
    paths = {name: options.folder / f"{name}.txt" for name in TEXTS}
    if options.measure:
        figures = measure(options.measure, paths, options.windows, options.window_length)
        print(table(figures))
        write_rows(options.json, figures)
        return
    options.folder.mkdir(parents=True, exist_ok=True)
    for name, path in paths.items():
        text = mixed(list(TEXTS[name]()))[:CHARACTERS]
        path.write_text(text)
        print(f"{path}: {len(text)} characters")


if __name__ == "__main__":
    main()
