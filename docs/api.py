"""Writes api.md beside this script from the docstrings of what people call from Python: `python docs/api.py`.

A test compares the page with what this script makes, so that it is never older than the code.
"""

from __future__ import annotations

import inspect
import re
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

PAGE = Path(__file__).with_name("api.md")
PACKAGE = "eacmoe_lightning"
WIDTH = 100  # of a signature on one line
HEADINGS = ("Args", "Attributes", "Returns", "Yields", "Raises")  # of parts of a docstring
ITEM = re.compile(r"    ([*\w.]+(?:, [*\w.]+)*): (.*)")  # of such a part: names and the first line of their text

# Title, text, and what belongs there: where it is imported from, its names, and for a class what people call of it.
SECTIONS: list[tuple[str, str, list[tuple[str, dict[str, list[str]]]]]] = [
    (
        "Load and run",
        "`load` is all that most programs need.",
        [
            ("", {"load": [], "load_offloaded": [], "offload_experts": [], "pesf": []}),
            ("compressed.opening", {"open_model": [], "OpenedModel": ["streamed", "in_memory"]}),
        ],
    ),
    (
        "Calibrate",
        "`examples/calibrate.py` puts them together.",
        [
            ("job.qesc", {"QESC": []}),
            ("calibration.recipe", {"Recipe": []}),
            ("job.data", {"TextWindows": []}),
            ("commands.trainer", {"calibration_trainer": [], "CalibrationTrainer": []}),
            ("pruning.rule", {"PruningRule": []}),
        ],
    ),
    (
        "Callbacks",
        "`fit` adds them to the trainer. Yours may be a `BlockCallback`, which is told of blocks and phases.",
        [
            (
                "callbacks",
                {
                    "LayerwiseQuantization": [],
                    "ExpertFrequency": [],
                    "ExpertPruning": [],
                    "CompressedModel": [],
                    "RoutingReport": [],
                    "PhaseCost": [],
                    "BoardLayout": [],
                    "TokenScores": [],
                    "BlockProgress": [],
                },
            ),
            ("job.block_callback", {"BlockCallback": ["on_phase_start", "on_phase_end", "on_block_end"]}),
        ],
    ),
    (
        "Router losses",
        "Options of `--model.router_loss`. A subclass of `RouterLoss` from anywhere works too.",
        [
            (
                "routers.losses",
                {
                    "RouterLoss": ["forward", "num_targets"],
                    "TopKMSE": [],
                    "MSE": [],
                    "SelectionHinge": [],
                    "SelectionKL": [],
                },
            ),
        ],
    ),
    (
        "Quantizers",
        "Options of `--model.quantizer`. A subclass of `Quantizer` from anywhere works too.",
        [
            (
                "quantization.quantizers",
                {
                    "Quantizer": ["solve", "arithmetic", "working_bytes"],
                    "GPTQ": [],
                    "RoundToNearest": [],
                    "LatticeGPTQ": [],
                    "Arithmetic": [],
                },
            ),
            ("quantization.grid", {"Grid": [], "Quantized": ["dequantize"], "round_to_nearest": []}),
        ],
    ),
    (
        "Skip experts",
        "",
        [
            (
                "skipping",
                {
                    "skipping": [],
                    "set_skipping": [],
                    "current_rule": [],
                    "PESF": [],
                    "Demand": [],
                    "Truncation": [],
                    "EES": ["calibrate"],
                    "ODP": ["calibrate"],
                },
            ),
        ],
    ),
    (
        "Offload experts",
        "",
        [
            ("offload", {"Offload": ["close"]}),
            ("offload.counters", {"Counters": ["to_dict", "log", "reset"]}),
            ("offload.codecs", {"codec": []}),
        ],
    ),
    (
        "Commands as functions",
        "",
        [
            ("exports.export", {"export": []}),
            ("commands.analyze", {"analyze": []}),
            ("commands.prune", {"prune": []}),
            ("commands.study", {"study": []}),
        ],
    ),
    (
        "Models and text",
        "",
        [
            ("models.moe", {"MoEModel": ["embed", "head", "logits", "loaded"]}),
            ("models.streamed", {"StreamedModel": []}),
            ("text.documents", {"read_documents": [], "documents": []}),
            ("text.windows", {"read_windows": [], "token_windows": [], "cut_windows": [], "Windows": []}),
            ("text.rows", {"Conversation": []}),
        ],
    ),
]


def page() -> str:
    """The whole page."""
    lines = ["# Python API", "", "Made from docstrings by `python docs/api.py`.", ""]
    seen: list[str] = []  # anchors; GitHub numbers those that are equal but for their case
    for title, _, groups in SECTIONS:
        links = []
        for name in (name for _, members in groups for name in members):
            again = seen.count(name.lower())
            links.append(f"[{name}](#{name.lower()}{f'-{again}' if again else ''})")
            seen.append(name.lower())
        lines.append(f"- **{title}**: {', '.join(links)}")
    for title, text, groups in SECTIONS:
        lines += ["", f"## {title}", *(["", text] if text else [])]
        for place, members in groups:
            module = f"{PACKAGE}.{place}" if place else PACKAGE
            for name, methods in members.items():
                lines += entry(module, name, getattr(import_module(module), name), methods)
    return "\n".join(lines) + "\n"


def entry(module: str, name: str, member: Any, methods: list[str]) -> list[str]:
    """A function or class: where it is from, its call and docstring, and those of its methods."""
    lines = ["", f"### {name}", "", "```python", f"from {module} import {name}", ""]
    lines += [*call(name, member), "```", "", *markdown(inspect.getdoc(member) or "")]
    for method in methods:
        found = inspect.getattr_static(member, method)
        function = getattr(found, "__func__", found)  # of a class method
        lines += ["", "```python", *call(f"{name}.{method}", function), "```"]
        if text := inspect.getdoc(function):
            lines += ["", *markdown(text)]
    return lines


def call(name: str, member: Any) -> list[str]:
    """How it is called: in one line if that is short, else an argument a line."""
    function = constructor(member) if inspect.isclass(member) else member
    if isinstance(function, str):
        return [name + function]
    found = inspect.signature(function)
    arguments = arguments_of(list(found.parameters.values()))
    has_result = not inspect.isclass(member) and found.return_annotation is not found.empty
    ending = f") -> {_text(found.return_annotation)}" if has_result else ")"
    line = f"{name}({', '.join(arguments)}{ending}"
    return [line] if len(line) <= WIDTH else [f"{name}(", *(f"    {argument}," for argument in arguments), ending]


def constructor(kind: type) -> Any:
    """The `__init__` that takes a class's arguments; as text where it is not the package's."""
    owner = next(base for base in kind.__mro__ if "__init__" in vars(base))
    if owner.__module__.startswith(PACKAGE):
        return owner.__init__
    named = [
        p
        for p in inspect.signature(owner.__init__).parameters.values()
        if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]
    return "(...)" if len(named) > 1 else "()"  # more than self: arguments of the class that it extends


def arguments_of(parameters: list[inspect.Parameter]) -> list[str]:
    """As in the source, without self."""
    texts = []
    for p in parameters:
        if p.name in ("self", "cls"):
            continue
        if p.kind is p.KEYWORD_ONLY and "*" not in texts and not any(text.startswith("*") for text in texts):
            texts.append("*")
        stars = {p.VAR_POSITIONAL: "*", p.VAR_KEYWORD: "**"}.get(p.kind, "")
        annotation = "" if p.annotation is p.empty else f": {_text(p.annotation)}"
        default = "" if p.default is p.empty else "..." if type(p.default).__name__.startswith("_") else repr(p.default)
        texts.append(f"{stars}{p.name}{annotation}" + (f"{' = ' if annotation else '='}{default}" if default else ""))
    return texts


def markdown(text: str) -> list[str]:
    """A docstring: its parts with names become lists."""
    lines, part = [], None
    for line in text.split("\n"):
        if line.endswith(":") and line[:-1] in HEADINGS:
            part = line[:-1]
            lines += [f"**{part}**", ""]
        elif part is None or not line.strip():
            lines.append(line)
        elif not line.startswith("    "):  # text goes on after the part
            part = None
            lines.append(line)
        elif item := ITEM.match(line):
            lines.append(f"- {', '.join(f'`{name}`' for name in item[1].split(', '))}: {item[2]}")
        else:
            lines.append(line[6:] if line.startswith("        ") else line[4:])
    return lines


def _text(annotation: Any) -> str:
    return annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)


if __name__ == "__main__":
    sys.path.insert(0, str(PAGE.parent.parent))  # this checkout, whatever is installed
    PAGE.write_text(page())
    print(f"{PAGE}: written")
