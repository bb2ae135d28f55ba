"""An export is kept only if it reloads as the same model: every weight and the logits are compared with ours."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from eacmoe_lightning.compressed.loading import load
from eacmoe_lightning.exports import reload
from eacmoe_lightning.exports.source import Source
from eacmoe_lightning.models.remote_code import registered_code
from eacmoe_lightning.run.files import StoreError, first_of
from eacmoe_lightning.skipping.apply import set_skipping

WEIGHT_LIMIT = {"float32": 1e-6, "float16": 2e-3, "bfloat16": 1.6e-2}  # about 8, 2 and 2 times the dtype's epsilon
LOGIT_LIMIT = {"float32": 1e-3, "float16": 5e-2, "bfloat16": 2e-1}  # looser: rounding can change selected experts
SEED, NUM_WINDOWS, WINDOW_LENGTH = 0, 4, 64


@dataclass(frozen=True)
class Difference:
    """How far a reloaded model is from ours.

    Attributes:
        logits: root mean square of the differences between logits, divided by the root mean square of our logits.
        largest_logit: largest difference between two logits.
        weights: largest difference between two sketches of a row, divided by the norm of the row.
        num_tensors: number of tensors compared.
    """

    logits: float
    largest_logit: float
    weights: float
    num_tensors: int

    def __str__(self) -> str:
        return (
            f"{self.num_tensors} tensors compared; rows differ by at most {self.weights:.2g} of their norm; logits "
            f"differ by at most {self.largest_logit:.2g}, and by {self.logits:.2g} of their size on average"
        )


class Reference:
    """Our decoded model, reduced to what a comparison needs: logits on random tokens, sketches and norms of weights."""

    def __init__(self, source: Source) -> None:
        model = load(source.path, dtype=source.dtype_name, packed=False)
        set_skipping(model, None)  # no other engine knows a skipping rule
        generator = torch.Generator().manual_seed(SEED)
        vocabulary = model.config.get_text_config().vocab_size
        self.dtype_name = source.dtype_name
        module = type(model).__module__
        self.has_own_code = registered_code(model.config.model_type) is not None
        is_known = self.has_own_code or module.startswith("transformers.")
        self.imports = [] if is_known else [module]  # registers a model type of ours
        self.tokens = torch.randint(vocabulary, (NUM_WINDOWS, WINDOW_LENGTH), generator=generator)
        self.seen = reload.look(model, self.tokens)
        weights = {name: t for name, t in model.state_dict().items() if t.is_floating_point() and t.numel()}
        self.norms = {name: _norms(t) for name, t in weights.items()}
        self.dtypes = {name: str(t.dtype).rpartition(".")[2] for name, t in weights.items()}

    def compare(self, seen: dict[str, Tensor], what: str | Path, rounded: str | None = None) -> Difference:
        """Compares another model with this one.

        Args:
            seen: what `reload.look` returned for the other model.
            what: the other model's name in error messages.
            rounded: the narrowest dtype that the weights passed through; None: the dtype of each in the model, which
                keeps some in float32.

        Raises:
            StoreError: a tensor is missing, or the models differ by more than rounding in the dtype explains.
        """
        if missing := sorted(self.seen.keys() - seen.keys()):
            raise StoreError(f"{what} was reloaded without {first_of(missing, 'tensor')}")
        deviations, excess = {}, {}  # by tensor: deviation, and deviation divided by what rounding explains
        for name, norms in self.norms.items():
            if seen[name].shape != self.seen[name].shape:
                raise StoreError(
                    f"{what}: {name} was reloaded with {seen[name].numel()} rows instead of {self.seen[name].numel()}"
                )
            deviation = float(((seen[name] - self.seen[name]).abs() / norms).nan_to_num(nan=torch.inf).max())
            limits = (WEIGHT_LIMIT[dtype] for dtype in (self.dtypes[name], rounded or self.dtypes[name]))
            deviations[name], excess[name] = deviation, deviation / max(limits)
        ours, theirs = self.seen["logits"], seen["logits"]
        delta = theirs - ours
        rms = float((delta.square().mean() / ours.square().mean()).sqrt())
        difference = Difference(rms, float(delta.abs().max()), max(deviations.values()), len(self.norms))
        worst = max(excess, key=excess.get)
        logit_limit = max(LOGIT_LIMIT[dtype] for dtype in (self.dtype_name, rounded or self.dtype_name))
        if not (excess[worst] <= 1 and rms <= logit_limit):
            raise StoreError(
                f"{what} does not reload as the same model, so it is not kept: {difference}"
                f"{f'; the worst tensor is {worst}' if excess[worst] else ''}"
            )
        return difference

    def compare_loaded(self, directory: Path) -> Difference:
        """Compares the model that transformers loads in a fresh process, as the class that its config names.

        Raises:
            StoreError: the model cannot be loaded, or it differs.
        """
        with tempfile.TemporaryDirectory() as folder:
            tokens, out = Path(folder) / "tokens.safetensors", Path(folder) / "out.safetensors"
            save_file({"tokens": self.tokens}, tokens)
            command = [sys.executable, "-P", reload.__file__, str(directory), str(tokens), str(out), self.dtype_name]
            command.append("trust" if self.has_own_code else "no-trust")
            done = subprocess.run([*command, *self.imports], capture_output=True, text=True)
            if done.returncode:
                raise StoreError(
                    f"{directory} cannot be loaded by transformers, so it is not kept: {done.stderr.strip()[-1500:]}"
                )
            return self.compare(load_file(out), directory)

    def compare_decoded(
        self, source: Source, tensors: dict[str, Tensor], what: Path, rounded: str | None = None
    ) -> Difference:
        """Compares the model built from checkpoint tensors under the original's names.

        Args:
            source: the model that was exported.
            tensors: decoded tensors under the names of the original's checkpoint.
            what, rounded: see `compare`.

        Raises:
            StoreError: the names are not those of the original, or the model differs.
        """
        model, loading = type(source.skeleton).from_pretrained(
            None, config=source.config, state_dict=tensors, dtype=source.dtype, output_loading_info=True
        )
        if mismatched := sorted([*loading["missing_keys"], *loading["unexpected_keys"]]):
            raise StoreError(
                f"{what} has {len(mismatched)} missing or unexpected tensors, the first ones {mismatched[:3]}"
            )
        return self.compare(reload.look(model.eval(), self.tokens), what, rounded)


def _norms(tensor: Tensor) -> Tensor:
    """The norm of each row that `reload.sketch` sees, float64 [rows]; 1 for a row of zeros."""
    rows = tensor.detach().reshape(-1, tensor.shape[-1] if tensor.ndim else 1)
    norms = torch.cat([chunk.double().norm(dim=-1) for chunk in rows.split(4096)])
    return torch.where(norms > 0, norms, 1.0)
