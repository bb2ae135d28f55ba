"""How OpenMP threads wait for work: in a loop for a moment, then asleep, unless the environment says otherwise.

OpenMP's own choice is to spin for some milliseconds. A thread that spins keeps its core from everybody else, so on a
machine with other jobs every product waits for threads that wait. Threads that sleep at once must be woken for the next
small product (`benchmarks/waiting.py` measures both). OpenMP reads the setting once, when torch loads it.
"""

from __future__ import annotations

import logging
import os
import sys

# some hundredths of a millisecond in GNU's runtime, 1 ms (the shortest) in LLVM's and Intel's
BRIEF = {"GOMP_SPINCOUNT": "1000", "KMP_BLOCKTIME": "1"}
POLICY, ACTIVE = "OMP_WAIT_POLICY", "active"

_came_first = False  # whether torch was loaded with its own choice


def spins() -> bool:
    """Whether torch's threads spin for long after each operation."""
    return _came_first or os.environ.get(POLICY, "").lower() == ACTIVE


def wait_briefly() -> None:
    """Sets BRIEF where torch is not loaded yet and the user has not chosen."""
    global _came_first
    if any(name in os.environ for name in (POLICY, *BRIEF)):
        return
    if "torch" not in sys.modules:
        os.environ.update(BRIEF)
    else:
        _came_first = True
        logging.getLogger("eacmoe_lightning").info(
            "torch was loaded before eacmoe_lightning, and its threads wait in its own way: on a busy machine, set "
            "%s in the environment or import eacmoe_lightning first",
            " ".join(f"{name}={value}" for name, value in BRIEF.items()),
        )
