"""An export is believed only once it was read back: every weight and the logits, against our own decoded model."""

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
from eacmoe_lightning.run.files import StoreError
from eacmoe_lightning.skipping.apply import set_skipping

WEIGHT_LIMIT = {"float32": 1e-6, "float16": 2e-3, "bfloat16": 1.6e-2}  # 2, 4 and 4 units in the last place
LOGIT_LIMIT = {"float32": 1e-3, "float16": 5e-2, "bfloat16": 2e-1}  # routers turn rounding into other selections
SEED, NUM_WINDOWS, WINDOW_LENGTH = 0, 4, 64


@dataclass(frozen=True)
class Difference:
    """How far a reloaded model is from ours.

    Attributes:
        logits: root mean square of the difference, relative to that of our logits.
        largest_logit: the largest difference of any logit.
        weights: the largest difference of a row's sketch, relative to the norm of the row.
        num_tensors: that were compared.
    """

    logits: float
    largest_logit: float
    weights: float
    num_tensors: int

    def __str__(self) -> str:
        return (
            f"{self.num_tensors} tensors compared, largest difference of a row {self.weights:.2g} of its size; logits "
            f"differ by {self.largest_logit:.2g} at most, by {self.logits:.2g} of their size on average"
        )


class Reference:
    """Our decoded model, as far as a comparison needs it."""

    def __init__(self, source: Source) -> None:
        model = load(source.path, dtype=source.dtype_name, packed=False)
        set_skipping(model, None)  # a rule of skipping is ours alone
        generator = torch.Generator().manual_seed(SEED)
        vocabulary = model.config.get_text_config().vocab_size
        self.dtype_name = source.dtype_name
        own = type(model).__module__
        self.imports = [] if own.startswith("transformers.") else [own]  # before transformers knows the model type
        self.tokens = torch.randint(vocabulary, (NUM_WINDOWS, WINDOW_LENGTH), generator=generator)
        self.seen = reload.look(model, self.tokens)
        self.norms = {name: _norms(t) for name, t in model.state_dict().items() if t.is_floating_point()}

    def compare(self, seen: dict[str, Tensor], what: str | Path, rounded: str | None = None) -> Difference:
        """The difference of another model from this one.

        Args:
            seen: `reload.look` of the other.
            what: how it is called in an error.
            rounded: the narrowest dtype that weights went through on their way; None: the model's.

        Raises:
            StoreError: a tensor is missing, or they differ by more than rounding in the dtype does.
        """
        if missing := sorted(self.seen.keys() - seen.keys()):
            raise StoreError(f"{what} was read back without {missing[0]} and {len(missing) - 1} more")
        worst, worst_name = 0.0, ""
        for name, norms in self.norms.items():
            if seen[name].shape != self.seen[name].shape:
                raise StoreError(f"{what}: {name} was read back with another shape")
            apart = float(((seen[name] - self.seen[name]).abs() / norms).nan_to_num(nan=torch.inf).max())
            if apart > worst:
                worst, worst_name = apart, name
        ours, theirs = self.seen["logits"], seen["logits"]
        apart = theirs - ours
        rms = float((apart.square().mean() / ours.square().mean()).sqrt())
        difference = Difference(rms, float(apart.abs().max()), worst, len(self.norms))
        limits = {self.dtype_name, rounded or self.dtype_name}
        if not (worst <= max(WEIGHT_LIMIT[d] for d in limits) and rms <= max(LOGIT_LIMIT[d] for d in limits)):
            raise StoreError(
                f"{what} does not give our model when it is read back, so it is not kept: {difference}"
                f"{f'; the worst tensor is {worst_name}' if worst_name else ''}"
            )
        return difference

    def compare_loaded(self, directory: Path) -> Difference:
        """The difference of what `AutoModelForCausalLM.from_pretrained` gives in a fresh process.

        Raises:
            StoreError: it cannot be loaded there, or differs.
        """
        with tempfile.TemporaryDirectory() as folder:
            tokens, out = Path(folder) / "tokens.safetensors", Path(folder) / "out.safetensors"
            save_file({"tokens": self.tokens}, tokens)
            command = [sys.executable, "-P", reload.__file__, str(directory), str(tokens), str(out), self.dtype_name]
            done = subprocess.run([*command, *self.imports], capture_output=True, text=True)
            if done.returncode:
                raise StoreError(
                    f"{directory} cannot be loaded by transformers, so it is not kept: {done.stderr.strip()[-1500:]}"
                )
            return self.compare(load_file(out), directory)

    def compare_decoded(
        self, source: Source, tensors: dict[str, Tensor], what: Path, rounded: str | None = None
    ) -> Difference:
        """The difference of the model that checkpoint tensors under original names give; `rounded` as in `compare`.

        Raises:
            StoreError: names are missing, or it differs.
        """
        tensors = {n: t.to(source.dtype) if t.is_floating_point() else t for n, t in tensors.items()}
        model, loading = type(source.skeleton).from_pretrained(
            None, config=source.config, state_dict=tensors, dtype=source.dtype, output_loading_info=True
        )
        if strange := sorted([*loading["missing_keys"], *loading["unexpected_keys"]]):
            raise StoreError(f"{what} has other tensors than the original: {strange[:3]}")
        return self.compare(reload.look(model.eval(), self.tokens), what, rounded)


def _norms(tensor: Tensor) -> Tensor:
    """[rows] float64, of the rows that `reload.sketch` sees; 1 for a row of zeros."""
    rows = tensor.detach().reshape(-1, tensor.shape[-1] if tensor.ndim else 1)
    norms = torch.cat([chunk.double().norm(dim=-1) for chunk in rows.split(4096)])
    return torch.where(norms > 0, norms, 1.0)
