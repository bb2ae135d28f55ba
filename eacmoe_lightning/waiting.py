"""How OpenMP threads wait for work: asleep, not in a loop, unless the environment says otherwise.

A thread that spins keeps its core from everybody else, so on a machine with other jobs every product waits for threads
that wait (`benchmarks/waiting.py` measures it). OpenMP reads the policy once, when torch loads it.
"""

from __future__ import annotations

import logging
import os
import sys

VARIABLE, PASSIVE = "OMP_WAIT_POLICY", "passive"


def wait_passively() -> None:
    """Sets the policy where torch is not loaded yet and the user has not chosen one."""
    if VARIABLE in os.environ or "GOMP_SPINCOUNT" in os.environ:
        return
    if "torch" not in sys.modules:
        os.environ[VARIABLE] = PASSIVE
    else:
        logging.getLogger("eacmoe_lightning").info(
            "torch was loaded before eacmoe_lightning, and %s is not set: on a busy machine, set %s=%s in the "
            "environment or import eacmoe_lightning first",
            VARIABLE,
            VARIABLE,
            PASSIVE,
        )
