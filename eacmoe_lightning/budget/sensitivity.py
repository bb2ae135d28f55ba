"""Sensitivities: what each weight of a model loses at each width, in nats of KL divergence per token.

Measured are, at some widths, the damage D_p(w) of a block's part p quantized alone (attention, shared experts, routed
experts), and the error e_ij(w) of each projection j of each routed expert i (`measure.py`). A part's damage is shared
out among the experts by what they do to the block's output:

    d_ij(w) ~ (1 - u) m_i e_ij(w) + u n e_j(w)

n_i is the number of tokens that select expert i, n its mean over the block's experts, and e_j the mean of e_ij over the
selections. Other texts select other experts: an allocation by calibrated frequencies alone would fit the calibration
text. So m_i is the square root of n_i, scaled to the same sum, and a share u of the tokens counts as evenly spread.
Between measured widths the logarithm is linear in the width. Beyond the last one the damage falls by the last measured
ratio per bit, at least by a half and at most to a quarter, the ratio of squared rounding errors.

An allocation's damage is the sum over its weights: errors of different weights are nearly uncorrelated, and the
divergence is quadratic in small errors.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

from eacmoe_lightning.run.files import StoreError, write_json

FILE, BLOCKS = "sensitivity.json", "blocks"
UNKNOWN = 0.1  # u
FASTEST, SLOWEST = 0.25, 0.5  # damage at one bit more, as a share
LEAST = 1e-12  # nats; keeps logarithms finite


def probe_name(block: int, part: str, width: float) -> str:
    return f"{block:03d}.{part}.{width:g}"


def drop_name(share: float) -> str:
    return f"all.drop.{share:g}"


def interpolated(measured: Mapping[float, float], width: float) -> float:
    """The value at a width from values at some widths (see the module), made to fall with the width."""
    widths = sorted(measured)
    values = list(accumulate((max(measured[w], LEAST) for w in widths), min))
    if width >= widths[-1]:
        ratio = (values[-1] / values[-2]) ** (1 / (widths[-1] - widths[-2])) if len(widths) > 1 else FASTEST
        return values[-1] * min(max(ratio, FASTEST), SLOWEST) ** (width - widths[-1])
    i = next(i for i, high in enumerate(widths) if width <= high and i)  # below the first one too
    share = (width - widths[i - 1]) / (widths[i] - widths[i - 1])
    return math.exp((1 - share) * math.log(values[i - 1]) + share * math.log(values[i]))


@dataclass(frozen=True)
class Sensitivity:
    """The sensitivities of one model.

    Attributes:
        identity: what they were measured on.
        widths: measured bits, ascending.
        blocks: by block, its result (`measure.measure`): `name`, `relative_error`, and with experts `load`, `error`
            and, if missing experts were measured, `score`.
        damage: nats by probe (`probe_name`).
        unknown: u of the module's formula.
    """

    identity: dict[str, Any]
    widths: tuple[float, ...]
    blocks: list[dict[str, Any]]
    damage: dict[str, float]
    unknown: float = UNKNOWN

    def part(self, block: int, part: str, width: float) -> float:
        """Nats that a block loses with one of its parts at this width; routed experts all together."""
        return interpolated(
            {w: self.damage[n] for w in self.widths if (n := probe_name(block, part, w)) in self.damage}, width
        )

    @property
    def drops(self) -> list[float]:
        """The shares of the experts, ascending, that were measured as missing in every block."""
        return sorted(self.identity.get("drops", []))

    def dropped(self, share: float) -> float:
        """Nats that the whole model loses without this share of the experts: linear between measured shares and 0."""
        if share <= 0:
            return 0.0
        points = [(0.0, 0.0), *((measured, self.damage[drop_name(measured)]) for measured in self.drops)]
        i = next((i for i, (right, _) in enumerate(points) if share <= right and i), len(points) - 1)
        (left, low), (right, high) = points[i - 1], points[i]
        return low + (high - low) * (share - left) / (right - left)

    def experts(self, block: int, width: float) -> dict[str, list[float]]:
        """By projection, the nats of each routed expert of a block with this weight alone at this width."""
        load = self.blocks[block]["load"]
        selections, shares = max(sum(load), 1), {}
        roots = [math.sqrt(n) for n in load]
        flat = [root * selections / max(sum(roots), 1) for root in roots]
        for projection in self.blocks[block]["error"]:
            errors = [self._error(block, projection, e, width) for e in range(len(load))]
            mean = sum(n * error for n, error in zip(load, errors, strict=True)) / selections
            even = self.unknown * selections / len(load) * mean
            shares[projection] = [(1 - self.unknown) * m * e + even for m, e in zip(flat, errors, strict=True)]
        scale = self.part(block, "experts", width) / sum(map(sum, shares.values()))
        return {projection: [scale * share for share in values] for projection, values in shares.items()}

    def _error(self, block: int, projection: str, expert: int, width: float) -> float:
        by_width = self.blocks[block]["error"][projection]
        return interpolated({w: by_width[f"{w:g}"][expert] for w in self.widths}, width)


def write(
    output: Path,
    identity: dict[str, Any],
    widths: Sequence[float],
    blocks: list[dict[str, Any]],
    damage: dict[str, float],
) -> Sensitivity:
    content = {"identity": identity, "widths": list(widths), "damage": damage, "blocks": blocks}
    write_json(output / FILE, content)
    return read(output)


def read(path: str | Path) -> Sensitivity:
    """Sensitivities that `eacmoe sensitivity` has measured.

    Args:
        path: its output.

    Raises:
        FileNotFoundError: there are none, or the measurement is not finished.
        StoreError: the file is damaged.
    """
    file = Path(path) / FILE
    if not file.exists():
        more = ""
        if (Path(path) / BLOCKS).is_dir():
            more = ": the measurement is not finished; the same `eacmoe sensitivity` goes on"
        raise FileNotFoundError(f"{path} (--model.sensitivity) holds no {FILE}{more}")
    try:
        content = json.loads(file.read_text())
        return Sensitivity(content["identity"], tuple(content["widths"]), content["blocks"], dict(content["damage"]))
    except (ValueError, KeyError, TypeError) as error:
        raise StoreError(f"{file} is damaged ({error!r}): measure again into another directory") from error
