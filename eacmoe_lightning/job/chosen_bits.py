"""Bits chosen by size: `fit` measures sensitivities before its first block, unless they are given, and allocates once.

The run directory keeps both: `sensitivity/` and `allocation.json`. A job that goes on reads the allocation.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from eacmoe_lightning.budget import picture
from eacmoe_lightning.budget import sensitivity as sensitivities
from eacmoe_lightning.budget.allocation import Allocation
from eacmoe_lightning.budget.measure import DROPS, WIDTHS, Text, default_probes, identity_of, measure
from eacmoe_lightning.budget.rest import Rest
from eacmoe_lightning.budget.sensitivity import Sensitivity
from eacmoe_lightning.budget.target import BySize, SizeTarget, loading
from eacmoe_lightning.calibration.recipe import Recipe
from eacmoe_lightning.job.data import TextWindows
from eacmoe_lightning.models.moe import MoEModel
from eacmoe_lightning.models.originals import stored_name
from eacmoe_lightning.models.streamed import StreamedModel
from eacmoe_lightning.pruning.rule import PruningRule
from eacmoe_lightning.run.directory import RunDirectory
from eacmoe_lightning.run.files import read_json, write_json
from eacmoe_lightning.target_rules import Target
from eacmoe_lightning.text.sources import stored_sources

FILE, SENSITIVITY = "allocation.json", "sensitivity"  # in the run directory


@dataclass(frozen=True)
class ChosenBits:
    """What a run was asked for, and the bits that it chooses if that is a size.

    Attributes:
        recipe: as asked for, before bits are chosen.
        pruning: the rule as asked for; with `keep` experts are dropped too.
        size: what the result shall take; empty: no size was given.
        path: output of `eacmoe sensitivity`; None: the run measures them.
        rows: of the target's formats (`targets.for_calibration`); empty: no target.
        tensor_parallel: number of devices that the target splits each linear over.
    """

    recipe: Recipe
    pruning: PruningRule | None = None
    size: SizeTarget = field(default_factory=SizeTarget)
    path: str | None = None
    rows: list[Target] = field(default_factory=list)
    tensor_parallel: int = 1

    def __post_init__(self) -> None:
        if self.pruning is not None and self.pruning.keep == "auto" and not self.size:
            raise ValueError(
                "keep=auto (--pruning.keep) needs a size: pass --model.target_bits or --model.target_gb too"
            )
        if self.path is not None and not self.size:
            raise ValueError(
                "sensitivity (--model.sensitivity) serves a size: pass --model.target_bits or --model.target_gb too"
            )

    def settings(self) -> dict[str, Any]:
        """What the result depends on besides the recipe, by option; nothing if no size was given.

        Raises:
            FileNotFoundError: there are no sensitivities at the given path.
        """
        if not self.size:
            return {}
        chosen = {"model.target_bits": self.size.bits, "model.target_gb": self.size.gb}
        if self.path is not None:
            chosen["model.sensitivity"] = self._digest
        return chosen

    @cached_property
    def _digest(self) -> str:
        """Of the given sensitivities, as they are at the start of a run."""
        sensitivities.read(self.path)  # or raises
        return hashlib.sha256((Path(self.path) / sensitivities.FILE).read_bytes()).hexdigest()

    def measured(self, num_windows: int, window_length: int) -> dict[str, int]:
        """Of `planning.sizes.Job`, what says how much a run measures."""
        if not self.size or self.path is not None:
            return {}
        return {"measured_widths": len(WIDTHS), "probe_windows": default_probes(num_windows, window_length)}

    def check(self, moe: MoEModel, rest: Rest, fingerprint: str | None, processes: int = 1) -> BySize:
        """Checks that there is an allocation of this size, before anything long starts.

        Args:
            moe, rest, fingerprint: of the original; without a fingerprint only its blocks are compared.
            processes: of the run.

        Returns:
            What `take` allocates with, without sensitivities if the run measures them.

        Raises:
            FileNotFoundError: there are no sensitivities at the given path.
            ValueError: the size cannot be had, the target loads it at no width, or the sensitivities are of another
                model or other settings.
        """
        if not self.recipe.quantizes:
            raise ValueError(
                "--model.quantizer none has no bits to choose: leave out --model.target_bits and target_gb"
            )
        if self.pruning is not None and self.pruning.keep is None:
            raise ValueError(
                "alpha (--pruning.alpha) keeps a number of experts that is not known before, so no size "
                "(--model.target_bits, --model.target_gb) can be met: pass --pruning.keep, a number or auto"
            )
        if self.path is None and processes > 1:
            raise ValueError(
                f"{processes} processes cannot measure sensitivities: run `eacmoe sensitivity` with the same options "
                "in one, and pass its --output as --model.sensitivity"
            )
        sensitivity = None
        if self.path is not None:
            sensitivity = sensitivities.read(self.path)
            refuse_other(sensitivity, self.recipe, fingerprint, [block.name for block in moe.blocks], self.path)
            self._check_criterion(sensitivity)
        rows = loading(self.recipe, moe, self.rows, self.tensor_parallel)
        choice = BySize(self.size, self.recipe, moe, rows, rest, sensitivity, self.tensor_parallel, self.pruning)
        choice.check()
        return choice

    def _check_criterion(self, sensitivity: Sensitivity) -> None:
        """Raises ValueError if experts are removed by another criterion than sensitivities were measured with."""
        measured = sensitivity.identity.get("pruning.criterion")  # None: without --drops
        if self.pruning is None or measured == self.pruning.criterion:
            return
        options = f"--pruning.criterion {self.pruning.criterion} --pruning.keep N"  # its rule is none without a number
        remedy = f"run `eacmoe sensitivity` with {options} (any N serves all) and another --output"
        if measured is None:
            raise ValueError(
                f"{self.path} (--model.sensitivity) does not say what the model loses without some experts, as it was "
                f"measured without --drops: {remedy}"
            )
        raise ValueError(
            f"{self.path} (--model.sensitivity) says what the model loses without experts chosen by {measured}, and "
            f"this run chooses them by {self.pruning.criterion}: pass --pruning.criterion {measured}, or {remedy}"
        )

    def take(self, run: RunDirectory, choice: BySize, data: TextWindows, fingerprint: str) -> bool:
        """Writes the allocation, unless the run directory has it; for the first process.

        Args:
            choice: from `check`.
            data: with the text to measure sensitivities on.
            fingerprint: of the original.

        Returns:
            Whether it was missing.
        """
        if (given := choice.sensitivity) is not None:  # their directory may be gone when the job ends
            sensitivities.write(run.path / SENSITIVITY, given.identity, given.widths, given.blocks, given.damage)
        if (run.path / FILE).exists():
            return False
        if choice.sensitivity is None:
            options = {"drops": DROPS, "criterion": self.pruning.criterion} if self.pruning else {}
            sensitivity = measured(run.path / SENSITIVITY, choice.recipe, choice.moe, data, fingerprint, **options)
            choice = replace(choice, sensitivity=sensitivity)
        allocation = choice.allocate()
        sizes = picture.curve(choice.allocator(allocation.kept))
        write_json(run.path / FILE, allocation.record() | {"curve": sizes})
        print(f"{allocation.described()}; {choice.around()}")
        return True

    def result(self, run: RunDirectory) -> dict[str, Any]:
        """For the report: what was asked for, the bits that came out and the damage that was predicted."""
        allocation = read_json(run.path / FILE)
        asked = {"target_bits": self.size.bits, "target_gb": self.size.gb}
        return {
            "asked": {name: value for name, value in asked.items() if value},
            "bits": allocation["bits"],
            "predicted": allocation["damage"],
            "predicted_by_part": allocation["by_part"],
            "curve": allocation["curve"],
        }

    def figures(
        self, run: RunDirectory, recipe: Recipe, moe: StreamedModel, report: dict[str, Any]
    ) -> dict[str, Figure]:
        """For TensorBoard: what weights lose, the bits that were chosen, and sizes beside this run's divergence."""
        sensitivity = sensitivities.read(run.path / SENSITIVITY)
        bits, texts = report["allocation"]["bits"], (report.get("divergence") or {}).get("texts", {})
        points = {text: (bits, streams["compressed"]["kl"]["mean"]) for text, streams in texts.items()}
        return {
            "loss of each weight": picture.heat_map(sensitivity),
            "bits chosen by size": picture.allocation_map(recipe.grids(moe)),
            "size and divergence": picture.curve_figure(report["allocation"]["curve"], points),
        }

    def chosen(self, run: RunDirectory) -> tuple[Recipe, PruningRule | None]:
        """The recipe with the run's widths, and the rule that keeps its experts; None if all stay."""
        allocation = Allocation.of_record(read_json(run.path / FILE))
        return allocation.applied(self.recipe, self.pruning)


def refuse_other(
    sensitivity: Sensitivity, recipe: Recipe, fingerprint: str | None, blocks: list[str], path: str
) -> None:
    """Raises ValueError if sensitivities are of another original, or of weights quantized otherwise."""
    now = json.loads(json.dumps(identity_of(recipe, fingerprint)))
    different = [key for key, value in now.items() if sensitivity.identity.get(key) != value]
    is_other = "model.fingerprint" in different and fingerprint is not None
    if is_other or [block["name"] for block in sensitivity.blocks] != blocks:
        raise ValueError(f"{path} (--model.sensitivity) holds sensitivities of another model than --model.name_or_path")
    different = [key for key in different if key != "model.fingerprint"]
    if different:
        key = different[0]
        raise ValueError(
            f"{path} (--model.sensitivity) was measured with {key}={sensitivity.identity.get(key)!r}, and this run has "
            f"{now[key]!r} (--{key}): measure again with this setting, or pass that one"
        )


def measured(output: Path, recipe: Recipe, moe: StreamedModel, data: TextWindows, fingerprint: str, **more: Any):
    """`measure` on the calibration windows of a data module; `more` are its further arguments."""
    num_probes = more.pop("num_probes", None) or default_probes(*data.calibration_windows.shape)
    identity = identity_of(recipe, fingerprint) | {
        "model.name_or_path": stored_name(moe.weights.name_or_path),
        "model.dtype": str(moe.model.dtype).removeprefix("torch."),
        "data.calibration": stored_sources(data.calibration),
        "data.calibration_digest": data.calibration_digest,
    }
    text = Text(data.calibration_windows, data.calibration_weights, data.calibration_positions)
    return measure(
        moe, recipe, text, output, identity, num_probes=num_probes, batch_size=data.batch_size, seed=data.seed,
        on_block=lambda block: print(f"sensitivity: block {block} of {len(moe.blocks)} measured", flush=True), **more,
    )  # fmt: skip
