"""The source `self`: calibration text that a model writes itself.

    self[:NUM][:MODEL]

NUM is the number of windows; without it the source takes its share of `--data.num_windows`. MODEL writes them: the
original of the run if it is left out, else a run directory, a compressed directory or another model of the same
tokenizer, or the address of a server (`http://HOST:PORT/v1`, text/server.py). text/openings.py says how they begin.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

SELF = re.compile(r"self(:(?P<num>[-+]?\d+))?(:(?P<model>.*))?", re.S)
URL = re.compile(r"https?://")
FORMS = "pass self, self:NUM, self:MODEL or self:NUM:MODEL, where MODEL is a directory or http://HOST:PORT/v1"


@dataclass(frozen=True)
class SampledSource:
    """`self[:NUM][:MODEL]`.

    Attributes:
        num: windows; None takes the share of `--data.num_windows`.
        model: directory or address of what writes the text; None is the original of the run.
    """

    num: int | None = None
    model: str | None = None

    @property
    def is_server(self) -> bool:
        return self.model is not None and URL.match(self.model) is not None

    @property
    def stored(self) -> str:
        """The source as runs store it, with the absolute path of a directory of this machine."""
        model = self.model
        if model is not None and not self.is_server and Path(model).expanduser().exists():
            model = os.path.abspath(Path(model).expanduser())
        return ":".join(["self", *([] if self.num is None else [str(self.num)]), *([] if model is None else [model])])


def sampled_source(source: str) -> SampledSource | None:
    """The parts of a source `self...`; None for any other source.

    Raises:
        ValueError: the number is not 1 or more, or what follows a colon is empty.
    """
    if (match := SELF.fullmatch(source)) is None:
        return None
    num, model = match["num"], match["model"]
    if model == "":
        raise ValueError(f"--data.calibration: {source!r} ends with a colon: {FORMS}")
    if num is not None and int(num) < 1:
        raise ValueError(f"--data.calibration: {source!r}: the number of windows must be at least 1; {FORMS}")
    return SampledSource(None if num is None else int(num), model)
