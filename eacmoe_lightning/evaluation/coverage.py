"""Which experts saw how many tokens of which calibration text, by the original's routers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from eacmoe_lightning.run.block_file import BlockStats


def coverage(
    blocks: Sequence[BlockStats], windows: dict[str, int], fullness: dict[str, float] | None = None
) -> dict[str, Any]:
    """For the report: by calibration text, its windows and what its tokens reach.

    Args:
        blocks: statistics of the MoE blocks.
        windows: number of windows by text, in the order of `BlockStats.source_load`.
        fullness: share of the windows' tokens that are of the text, by text, where something fills them up.

    Returns:
        By text: `windows`; `full`, of `fullness`; `selections`, how often its tokens select an expert; `experts` and
        `reached`, the number of experts of all blocks and of those that some token selects; `only`, how many no other
        text reaches; `blocks`, the expert loads [E] by block. Empty if the blocks were solved before loads were counted
        by text.
    """
    if any(len(block.source_load) != len(windows) for block in blocks):
        return {}
    loads = [{block.block: block.source_load[number] for block in blocks} for number in range(len(windows))]
    reached = [{(block, e) for block, row in load.items() for e, n in enumerate(row) if n} for load in loads]
    num_experts = sum(len(row) for row in loads[0].values())
    return {
        name: {
            "windows": number,
            **({"full": fullness[name]} if fullness and name in fullness else {}),
            "selections": sum(sum(row) for row in load.values()),
            "experts": num_experts,
            "reached": len(mine),
            "only": len(mine.difference(*(other for other in reached if other is not mine))),
            "blocks": load,
        }
        for (name, number), load, mine in zip(windows.items(), loads, reached, strict=True)
    }


def coverage_lines(report: dict[str, Any]) -> list[str]:
    """A line for each calibration text, for the summary."""
    return [
        f"calibrated on {name}: {text['windows']} windows{_full(text)}, which reach {text['reached']} of "
        f"{text['experts']} experts" + (f", {text['only']} of them alone" if len(report["coverage"]) > 1 else "")
        for name, text in report.get("coverage", {}).items()
    ]


def _full(text: dict[str, Any]) -> str:
    return f", {text['full']:.0%} full" if "full" in text else ""
