"""The model card (`README.md`) of compressed directories and exports, as model hubs show it.

`huggingface_hub` writes the front matter. The card ends with a digest of itself, by which a card that somebody has
edited is recognized; that one is never replaced.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from transformers.utils import cached_file

from eacmoe_lightning.compressed.format import DRAFT, METHOD, read_config, runs_packed
from eacmoe_lightning.compressed.sizes import HEAD, stored_parts
from eacmoe_lightning.models.moe import MoEModel
from eacmoe_lightning.models.originals import resolve_model
from eacmoe_lightning.models.transformers_loader import auto_class
from eacmoe_lightning.run.files import write_atomically
from eacmoe_lightning.run.provenance import TRAINER_OPTIONS, command_line
from eacmoe_lightning.version import __version__

log = logging.getLogger(__name__)
NAME = "README.md"
SIGNATURE = "<!-- written by eacmoe-lightning; sha256 {} of the above -->\n"
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
PASSED_ON = ("license", "license_name", "license_link", "language")  # from the base model's card
PARTS = {
    "experts": "routed experts",
    "shared": "shared experts",
    "attention": "attention and dense blocks",
    HEAD: "output head",
}
QUALITY, MADE = "## Quality", "## How it was made"
PAPER = "EAC-MoE, [arXiv 2508.01625](https://arxiv.org/abs/2508.01625)"
LIBRARIES = {"gguf": "gguf", "gptq": "gptqmodel", "gptq_v2": "gptqmodel"}  # by export format; others: transformers
LOAD = (
    '```python\nimport eacmoe_lightning\nfrom transformers import AutoTokenizer\n\npath = "path/to/this/directory"\n'
    "model = eacmoe_lightning.load(path)\ntokenizer = AutoTokenizer.from_pretrained(path)\n```\n\n"
    "needs the package eacmoe-lightning. `fit` and `prune` reload what they write and compare its logits. "
)
WITH_IMAGES = "Images go through the original's processor, whose files lie here. "
PACKED = (
    "Weights stay packed in memory. With `trust_remote_code=True` `{}.from_pretrained` needs no import of the package."
)
SERVED = " vLLM 0.32 was seen to serve such directories on CPUs, through the package's plugin."
DECODED = "Weights are decoded as they are loaded; `eacmoe export` writes the model for other engines."


def write_card(directory: Path, moe: MoEModel, report: dict[str, Any] | None = None) -> None:
    """Writes or updates the card of a compressed directory, unless somebody has edited it.

    Args:
        directory: the compressed directory.
        moe: its model, on any device.
        report: of the run; None: there is none yet, and the card says nothing about quality.
    """
    config = read_config(directory)
    sections = {
        "## How to load it": _how_to_load(config, moe),
        "## Bits": bits_by_part(directory, moe, directory),
        QUALITY: quality(report),
        MADE: _made(config, report) + _commands(command_of(report)),
    }
    _put(directory, _card(config, moe, METHOD, sections))


def _how_to_load(config: dict[str, Any], moe: MoEModel) -> str:
    text = LOAD + (WITH_IMAGES if _is_wrapper(moe) else "")
    if not runs_packed(config):
        return text + DECODED
    has_equal_blocks = len({block.num_experts for block in moe.moe_blocks}) == 1
    packed = PACKED.format(auto_class(moe.model.config).__name__)
    return text + packed + (SERVED if has_equal_blocks and not _is_wrapper(moe) else "")


def _is_wrapper(moe: MoEModel) -> bool:
    """Whether the language model is inside a model that sees images."""
    return moe.model.config.get_text_config() is not moe.model.config


def write_export_card(source: Path, moe: MoEModel, directory: Path, format: str, seen: Sequence[str]) -> None:
    """Writes the card of an export.

    Args:
        source: the compressed directory that was exported.
        moe: its model, on any device.
        directory: the export.
        format: its format.
        seen: what is known of engines that load it, a sentence each.
    """
    config, report = read_config(source), report_beside(source)
    commands = [command_of(report)] if report else []
    sections = {
        "## Format": " ".join([f"`{format}`.", *seen]),
        "## Bits": bits_by_part(source, moe, directory),
        QUALITY: quality(report) or section(source / NAME, QUALITY),
        MADE: _made(config, report) + _commands(*commands, command_of(None)),
    }
    _put(directory, _card(config, moe, format, sections))


def bits_by_part(source: Path, moe: MoEModel, directory: Path) -> str:
    """The table of bits a weight: of the codes and, where the directory is the source itself, of all that is stored.

    Args:
        source: a compressed directory.
        moe: its model.
        directory: the source, or an export of it.
    """
    parts, counted = stored_parts(source, moe), sum(parameter.numel() for parameter in moe.model.parameters())
    files = [file for kind in ("*.safetensors", "*.gguf") for file in directory.glob(kind) if file.name != DRAFT]
    total, rest = sum(file.stat().st_size for file in files), counted - sum(number for number, _, _ in parts.values())
    listed = [(title, *parts[part]) for part, title in PARTS.items() if part in parts]
    rows = [(title, number, f"{codes:.3g}", size) for title, number, codes, size in listed]
    rows.append(("routers, norms, embeddings, others", rest, "", total - sum(size for _, _, size in parts.values())))
    lines = ["| part | weights | bits of the codes | bits with everything stored |", "|---|---|---|---|"]
    for part, number, codes, size in rows:
        stored = f"{8 * size / max(number, 1):.2f}" if directory == source else ""
        lines.append(f"| {part} | {number / 1e6:,.2f} million | {codes} | {stored} |")
    lines.append(f"| all | {counted / 1e6:,.2f} million | | {8 * total / counted:.2f} |")
    return "\n".join(lines) + f"\n\nBits a weight. The files of weights have {total / 1e6:,.1f} MB."


def add_quality_to_card(directory: Path, report: dict[str, Any]) -> None:
    """Puts the table of a report into a card that has none, unless somebody has edited it."""
    path, table = directory / NAME, quality(report)
    if not table or not path.exists() or section(path, QUALITY):
        return
    text = path.read_text("utf-8")
    body = text[: text.rstrip().rfind("\n") + 1]
    _put(directory, body.replace(MADE, f"{QUALITY}\n\n{table}\n\n{MADE}", 1))


def quality(report: dict[str, Any] | None) -> str:
    """The table of perplexity and divergence on held-out text; empty without an evaluation."""
    if not report or not report.get("perplexity"):
        return ""
    divergence = report.get("divergence", {}).get("texts", {})
    rows = []
    for text, values in sorted(report["perplexity"].items()):
        row = [text, f"{values['original']:.3f}", f"{values['compressed']:.3f}", "", ""]
        if measured := divergence.get(text, {}).get("compressed"):
            row[3:] = f"{measured['kl']['mean']:.4f}", f"{measured['same_top']:.1%}"
        rows.append(f"| {' | '.join(row)} |")
    head = [
        "| held-out text | perplexity, original | this model | KL divergence | same top token |",
        "|---|---|---|---|---|",
    ]
    return "\n".join([*head, *rows]) + "\n\nKL divergence from the original, in nats per token."


def section(card: Path, heading: str) -> str:
    """The text under a heading of a card; empty if there is none."""
    if not card.exists():
        return ""
    found = re.search(
        rf"^{heading}\n\n(.*?)(?=\n\n## |\n\n<!-- |\Z)", card.read_text("utf-8"), re.DOTALL | re.MULTILINE
    )
    return found[1] if found else ""


def is_edited(card: Path) -> bool:
    """Whether there is a card that is not as this package wrote it."""
    if not card.exists():
        return False
    text = card.read_text("utf-8", errors="replace")
    body, last = text[: text.rstrip().rfind("\n") + 1], text[text.rstrip().rfind("\n") + 1 :]
    return last != SIGNATURE.format(_digest(body))


def report_beside(directory: Path) -> dict[str, Any] | None:
    """The report of the run whose `compressed/` a directory is; None if it is none."""
    try:
        return json.loads((directory.resolve().parent / "report.json").read_text())
    except (OSError, ValueError):
        return None


def command_of(report: dict[str, Any] | None) -> str:
    """The command that made a report, or that runs now, without the folder of its program; `eacmoe` for train.py.

    Options on which the result does not depend are left out: where a run was written, that it went on, its checkpoints
    and most of the trainer's. So the card of a job that was killed and resumed has the bytes of an undisturbed one's.
    """
    command = report["command"] if report else command_line()
    try:
        program, *words = shlex.split(command)
    except ValueError:  # an older version did not quote it
        return command
    kept, is_dropped = [], False
    for word in words:
        if word.startswith("--"):
            option = word.removeprefix("--").partition("=")[0]
            group, _, name = option.partition(".")
            is_dropped = option == "ckpt_path" or group == "checkpoint"
            is_dropped |= group == "trainer" and name not in TRAINER_OPTIONS
        if not is_dropped:
            kept.append(word)
    name = Path(program).name
    return shlex.join(["eacmoe" if name == "train.py" else name, *kept])


def base_data(name_or_path: str) -> dict[str, Any]:
    """What the base model's card says about its license and languages; empty if there is no card."""
    path = Path(resolve_model(name_or_path))
    try:
        card = path / NAME if path.is_dir() else Path(cached_file(name_or_path, NAME))
        data = ModelCard.load(card, ignore_metadata_errors=True).data.to_dict()
    except (OSError, ValueError):
        return {}
    return {key: data[key] for key in PASSED_ON if data.get(key)}


def _card(config: dict[str, Any], moe: MoEModel, kind: str, sections: dict[str, str]) -> str:
    name, original = config["original"]["name_or_path"], config["original"]["config"]
    base = base_data(name)
    is_quantized, is_pruned = bool(config["quantization"]["bits"]), "pruning" in config["quantization"]
    is_hub = HUB_ID.fullmatch(name) is not None and not Path(name).exists()
    words = [word for word, is_so in (("quantized", is_quantized), ("pruned", is_pruned)) if is_so]
    tags = ["mixture-of-experts", original["model_type"], *words, "eacmoe"]
    tags += ["custom_code"] if kind == METHOD else []
    relation = {"base_model": name, **({"base_model_relation": "quantized"} if is_quantized else {})} if is_hub else {}
    task = "image-text-to-text" if _is_wrapper(moe) and kind != "gguf" else "text-generation"
    library = LIBRARIES.get(kind, "transformers")
    data = ModelCardData(**base, **relation, tags=tags, library_name=library, pipeline_tag=task)
    model = f"[{name}](https://huggingface.co/{name})" if is_hub else f"`{name}`"
    license = base.get("license_name") or base.get("license")
    terms = f"Its license, {license}, applies to this model too." if license else (
        "Its license applies to this model too; no card was found that states it."
    )  # fmt: skip
    title = f"# {Path(name).name}, {' and '.join(words) or 'converted'}"
    body = "\n\n".join(f"{heading}\n\n{text}" for heading, text in sections.items() if text)
    return f"---\n{data.to_yaml()}\n---\n\n{title}\n\nMade from {model}. {terms}\n\n{body}\n\n"


def _made(config: dict[str, Any], report: dict[str, Any] | None) -> str:
    quantization, router = config["quantization"], (report or {}).get("router", {})
    steps = []
    if quantization["bits"]:
        steps.append(f"quantized by {quantization.get('quantizer', quantization.get('method', 'an unknown method'))}")
    if (router_method := quantization.get("router_method", "none")) != "none":
        steps.append(f"routers calibrated ({router_method})")
    if pruning := quantization.get("pruning"):
        steps.append(f"experts removed ({', '.join(f'{k} {v}' for k, v in pruning.items() if v is not None)})")
    for stage in ("block", "joint"):
        if epochs := router.get(f"{stage}_epochs"):
            steps.append(f"{stage} stage of {epochs} epochs")
    return f"eacmoe-lightning {__version__} ({PAPER}): {', '.join(steps) or 'converted'}."


def _commands(*commands: str | None) -> str:
    return "\n\n```bash\n" + "\n".join(command for command in commands if command) + "\n```"


def _put(directory: Path, text: str) -> None:
    path = directory / NAME
    if is_edited(path):
        log.warning("%s was edited, so it is left as it is", path)
        return
    write_atomically(path, lambda partial: partial.write_text(text + SIGNATURE.format(_digest(text)), "utf-8"))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
