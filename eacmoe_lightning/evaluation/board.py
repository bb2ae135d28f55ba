"""What a run shows in TensorBoard: flat scalars from its results, its hyperparameters, and how the charts are arranged.

The part of a tag before the first `/` is the group of cards that TensorBoard puts it in. Values of blocks are one curve
with the block's index as the step, so that a model of many blocks has as many cards as one of few.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any

from eacmoe_lightning.routers.expert_shift import RATES
from eacmoe_lightning.run.block_file import BlockStats

Scalars = dict[str, float]
MEAN = "mean_of_texts"
JUDGED = ("kl", "same_top")  # of the divergence
FIRST_OPTIONS = ("bits", "block_epochs", "joint_epochs", "model", "router_method")
OPTIONS = (
    *("dtype", "quantizer", "bits", "target_bits", "target_gb", "attention_bits", "head_bits", "group_size"),
    *("router_method", "router_epochs", "router_lr"),
    *("block_epochs", "block_lr", "joint_epochs", "joint_lr"),
    *("calibration", "num_windows", "window_length", "batch_size", "criterion", "keep", "alpha"),
)

GUIDE = """
| cards | horizontal axis | what they show |
|---|---|---|
| `quality` | none, one point a run | the finished model on held-out text: perplexity; `loss_increase`, what it lost to the original in nats per token; `kl`, how far its predictions are from the original's (KL divergence, nats per token); `same_top`, share of tokens where both find the same token most likely; share of tokens whose experts changed |
| `quality_details` | none | the original's perplexity, and further figures of each text |
| `before_calibration` | none | the same with the original's routers, where no block was trained |
| `blocks` | block | relative squared error of a block's output on windows it was not trained on, before and after its training; share of the quantized weights that the training changed; the pass that was taken |
| `quantization_error` | block | relative squared error of each weight matrix's output |
| `expert_shift` | block | share of tokens for which any, half or all of the selected experts changed, and share of all selections that changed, before and after the router's calibration |
| `router`, `block_stage`, `joint_stage` | step | losses while training; a new block begins where the curve jumps |
| `experts` | block | experts that too few tokens reached (starved); how often the busiest expert is selected, relative to the mean |
| `pruning` | block | experts that stay; share of the selections that went to the others |
| `cost`, `size` | block, or none for totals | seconds of each phase, memory, disk traffic; megabytes and bits of the result |
| `validate`, `test` | none | results of these commands |

HPARAMS compares runs side by side, CUSTOM SCALARS has several curves in one chart, IMAGES shows which experts are
selected how often (rows: blocks, columns: experts), TEXT has the report.
"""  # noqa: E501


def heldout_scalars(result: dict[str, Any], group: str) -> Scalars:
    """The scalars of an evaluation (`evaluate`).

    `GROUP/FIGURE/TEXT` is one of the figures by which a model is judged: `perplexity`, `loss_increase` (nats per
    token), `kl`, `same_top`, or the `mean` of whatever else is measured by text. They are averaged over the texts too,
    with equal weights, but for the perplexity. `GROUP/expert_shift/RATE` is over all texts.
    `GROUP_details/FIGURE/TEXT` are the other numbers of a text. Standard errors and numbers of tokens are left to the
    report.

    Args:
        result: parts by text, or with a part `texts` by text; `perplexity` and `expert_shift` among them.
        group: the first part of every tag.
    """
    texts = result["perplexity"].keys()
    parts = {name: part if part.keys() == texts else part.get("texts", {}) for name, part in result.items()}
    if all({"original", "compressed"} <= streams.keys() for streams in result["perplexity"].values()):
        parts["loss_increase"] = {
            text: {"mean": math.log(streams["compressed"] / streams["original"])}
            for text, streams in result["perplexity"].items()
        }
    judged: dict[str, Scalars] = {}
    details: Scalars = {}
    for part, by_text in parts.items():
        for text, values in by_text.items() if by_text.keys() == texts else ():
            for name, value in _numbers(values) if isinstance(values, dict) else ():
                figure = _figure(part, name, len(values) == 1)
                if figure in (part, *JUDGED):
                    judged.setdefault(figure, {})[text] = value
                else:
                    details[f"{group}_details/{figure}/{text}"] = value
    scalars = {f"{group}/{figure}/{text}": value for figure, row in judged.items() for text, value in row.items()}
    scalars |= {
        f"{group}/{figure}/{MEAN}": sum(row.values()) / len(row)
        for figure, row in judged.items()
        if figure != "perplexity"
    }
    if shift := result["expert_shift"]:
        scalars |= {f"{group}/expert_shift/{rate}": value for rate, value in shift["mean"].items()}
    return scalars | details


def _figure(part: str, name: str, is_only_one: bool) -> str:
    """What a number is called: `compressed/kl/p99` of the divergence is `kl/p99`, `original/kl/mean` `original/kl`."""
    words = [word for word in name.split("/") if word not in ("compressed", "mean")]
    if is_only_one and len(words) == 1:
        words = []  # the perplexity of an original that is evaluated alone
    return "/".join(words if part == "divergence" else [part, *words])


def _numbers(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """The numbers in nested dictionaries, with their keys joined by `/`."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _numbers(value, f"{prefix}{name}/")
        elif isinstance(value, int | float) and name != "tokens" and not name.endswith("error"):
            yield f"{prefix}{name}", float(value)


def report_scalars(report: dict[str, Any]) -> Scalars:
    """Bits, size and seconds of a finished run, from its report."""
    return {
        "size/bits_per_weight": report["bits"]["true"],
        "size/megabytes": report["size_bytes"]["compressed"] / 1e6,
        "cost/total_seconds": report["cost"]["total_seconds"],
    }


def compared(quality: Scalars, finished: Scalars) -> list[str]:
    """The tags by which HPARAMS compares runs: quality over all texts, `finished`, quality by text."""
    tags = [tag for tag in quality if re.match("quality/(?!perplexity/|expert_shift/)", tag)]
    means = [tag for tag in tags if tag.endswith(f"/{MEAN}")]
    return [*means, *finished, *(tag for tag in tags if tag not in means)]


def hyperparameters(settings: dict[str, Any], seed: int) -> dict[str, str | float]:
    """What HPARAMS lists of a run's settings (`QESC.settings`), by the options' names; empty ones are left out."""
    by_option = {name.rpartition(".")[2]: value for name, value in settings.items()}
    chosen: dict[str, Any] = {"model": by_option["name_or_path"].rstrip("/").rpartition("/")[2]}
    for option in OPTIONS:
        value = by_option.get(option)
        if option.endswith("_lr") and isinstance(value, dict):
            chosen |= {f"{option[:-2]}{kind}_lr": rate for kind, rate in value.items()}
        else:
            chosen[option] = value
    chosen["seed"] = seed
    return {name: _simple(value) for name, value in chosen.items() if value is not None}


def _simple(value: Any) -> str | float:
    """A number or a string; a list of one is its element."""
    if isinstance(value, list) and len(value) == 1:
        return _simple(value[0])
    return value if isinstance(value, int | float | str) and not isinstance(value, bool) else str(value)


def block_scalars(stats: BlockStats) -> Scalars:
    """The scalars of a finished block, for the step `stats.block`."""
    names = {name: name.removeprefix(f"{stats.name}.").removesuffix(".weight") for name in stats.error}
    scalars = {f"quantization_error/{names[name]}": value for name, value in stats.error.items()}
    for when, rates in stats.expert_shift.items():
        scalars |= {f"expert_shift/{rate}/{when}": rates[rate] for rate in (*RATES, "selections")}
    if stats.starved is not None:
        scalars["experts/starved"] = len(stats.starved)
    if stats.pruning is not None:
        scalars["pruning/experts"] = len(stats.pruning.kept)
        scalars["pruning/removed_selections"] = stats.pruning.removed_selections
    if (trained := stats.reconstruction) is not None:
        scalars |= {"blocks/codes_moved": trained.moved, "blocks/pass_taken": trained.taken}
        if trained.held_back:
            scalars["blocks/output_error/before_training"] = trained.held_back[0]
            scalars["blocks/output_error/after_training"] = trained.held_back[trained.taken]
    return scalars


def layout(trains_blocks: bool, trains_jointly: bool) -> dict[str, dict[str, list]]:
    """The charts of CUSTOM SCALARS, for `SummaryWriter.add_custom_scalars`; tags are regular expressions.

    Args:
        trains_blocks, trains_jointly: whether the run has a block stage, and a joint stage.
    """
    shift = {
        f"share of {what}: before and after calibration": [f"^expert_shift/{rate}/"]
        for rate, what in (
            ("any", "tokens with a changed expert"),
            ("all", "tokens with all experts changed"),
            ("selections", "selections that changed"),
        )
    }
    error = {"error of the block's output, before and after its training": ["^blocks/output_error/"]}
    losses = {
        **{"router": ["^router/"]},
        **({"block stage: trained on, and held back": ["^block_stage/"]} if trains_blocks else {}),
        **({"joint stage": ["^joint_stage/"]} if trains_jointly else {}),
    }
    charts = {
        "From block to block": {
            **(error if trains_blocks else {}),
            **{"quantization error of each matrix": ["^quantization_error/"]},
            **shift,
            **{"busiest expert, relative to the mean": ["^experts/busiest_over_mean/"]},
        },
        "Losses, step by step": losses,
        "Cost from block to block": {"seconds by phase": ["^cost/seconds/"], "megabytes": ["^cost/.*megabytes"]},
    }
    return {category: {title: ["Multiline", tags] for title, tags in row.items()} for category, row in charts.items()}
