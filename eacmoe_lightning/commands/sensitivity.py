"""`eacmoe sensitivity` measures what each weight of a model loses at each width, for any number of sizes afterwards."""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

import torch

from eacmoe_lightning.budget import picture
from eacmoe_lightning.budget.measure import DROPS, default_probes, dropped_shares
from eacmoe_lightning.budget.target import allocator_of, loading
from eacmoe_lightning.commands.fit import parse_fit
from eacmoe_lightning.job.chosen_bits import measured
from eacmoe_lightning.job.sampling import SampledTexts
from eacmoe_lightning.models.checkpoint import Checkpoint
from eacmoe_lightning.models.fingerprint import fingerprint
from eacmoe_lightning.models.streamed import StreamedModel
from eacmoe_lightning.pruning.rule import keeps_all
from eacmoe_lightning.run.device import device_of
from eacmoe_lightning.run.directory import RunDirectory
from eacmoe_lightning.run.lock import RunLock
from eacmoe_lightning.run.ranks import Ranks

log = logging.getLogger(__name__)


def options() -> argparse.ArgumentParser:
    """The options of `sensitivity` in addition to those of `fit`."""
    program = f"{Path(sys.argv[0]).name} sensitivity"
    parser = argparse.ArgumentParser(prog=program, description=__doc__, allow_abbrev=False, add_help=False)
    parser.add_argument("--output", type=Path, required=True, help="directory for the sensitivities, new or unfinished")
    parser.add_argument("--widths", type=float, nargs="+", default=[2, 3, 4], help="bits that are measured")
    parser.add_argument("--probe_windows", type=int, help="calibration windows for the probes; 4096 tokens")
    parser.add_argument(
        "--drops", type=float, nargs="*", default=DROPS, help="shares of the experts that are measured as missing"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="device to run on")
    return parser


def sensitivity(words: list[str]) -> None:
    """Measures what each weight of a model loses at each width, once, for any number of sizes.

    It takes the options of `fit` (model, quantizer, groups, calibration text) and those of `options`. `fit` and `plan`
    read the result as `--model.sensitivity`. A killed measurement goes on with the same command.

    Raises:
        ValueError, FileNotFoundError: as in `fit`, for options that do not suit the model.
    """
    parser = options()
    if "-h" in words or "--help" in words:
        parser.print_help()  # those of fit follow
        parse_fit(words)
    chosen, words = parser.parse_known_args(words)
    device = device_of(chosen.device)
    module, data, _ = parse_fit(words)
    if module.pruning is None and any(word.startswith("--pruning.criterion") for word in words):
        raise ValueError("--pruning.criterion chooses no experts by itself: pass --pruning.keep as well, any number")
    if not module.recipe.quantizes:
        raise ValueError("--model.quantizer none quantizes nothing, so no width loses anything: pass another quantizer")
    widths = sorted(int(width) if float(width).is_integer() else width for width in set(chosen.widths))
    if chosen.probe_windows is None:
        chosen.probe_windows = default_probes(data.num_calibration_windows, data.window_length)
    _check(chosen, widths, data.num_calibration_windows)
    for width in widths:
        module.recipe.uniform(width)  # raises now
    weights = Checkpoint(module.name_or_path, module.dtype_name, module.trust_remote_code)
    moe = StreamedModel(weights, device)
    data.check_model(moe, "fit")
    module.recipe.check(moe)
    run, ranks = RunDirectory(chosen.output), Ranks()
    texts = SampledTexts(data, run, moe, ranks, module.name_or_path, module.dtype_name, module.trust_remote_code)
    texts.check()
    rows = loading(module.recipe, moe, module.targets, module.tensor_parallel)  # raises now
    drops = sorted(chosen.drops)
    if drops and (reason := next(filter(None, map(keeps_all, moe.moe_blocks)), None)):
        log.info("without --drops, which measures missing experts: %s", reason)
        drops = []
    if drops and (real := dropped_shares(moe.moe_blocks, drops)) != drops:
        log.info("of --drops %s, the shares %s of the experts of a block can be missing", drops, real)
    with RunLock(chosen.output, "--output"):
        texts.prepare(continues=(chosen.output / "identity.json").exists())
        texts.make()
        found = measured(
            chosen.output, module.recipe, moe, data, fingerprint(module.name_or_path), num_probes=chosen.probe_windows,
            widths=widths, drops=drops,
            criterion=module.pruning.criterion if module.pruning else "reap",
        )  # fmt: skip
        allocator = allocator_of(module.recipe, moe, rows, found)
        picture.write(chosen.output, found, allocator, module.name_or_path)


def _check(chosen: argparse.Namespace, widths: list[float], num_windows: int) -> None:
    """Raises ValueError if an option of the command is out of its range."""
    if len(widths) < 2:
        raise ValueError(f"--widths {widths[0]:g} is one width: pass two or more, such as 2 4; others lie between them")
    if wrong := [share for share in chosen.drops if not 0 < share < 1]:
        raise ValueError(
            f"--drops {wrong[0]:g} is no share of the experts between 0 and 1: pass 0.25 for a quarter of them"
        )
    if not 1 <= chosen.probe_windows < num_windows:
        raise ValueError(
            f"--probe_windows {chosen.probe_windows} of {num_windows} calibration windows (--data.num_windows) leave "
            f"none to the solver or to the probes: pass 1 to {num_windows - 1}"
        )
