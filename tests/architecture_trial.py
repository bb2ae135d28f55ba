"""One architecture's way from a saved original to its exports; `docs/models.py` makes its table of the same steps."""

import json
from functools import cache, cached_property
from pathlib import Path

import architectures
import gguf_models
import torch
from safetensors import safe_open
from test_packed_loading import compress
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

import eacmoe_lightning
from eacmoe_lightning import targets
from eacmoe_lightning.commands.trainer import calibration_trainer
from eacmoe_lightning.exports import dense
from eacmoe_lightning.exports.export import export
from eacmoe_lightning.exports.source import Source
from eacmoe_lightning.job.data import TextWindows
from eacmoe_lightning.job.qesc import QESC
from eacmoe_lightning.models.block import Block
from eacmoe_lightning.models.moe import MoEModel
from eacmoe_lightning.models.routing import Routing
from eacmoe_lightning.models.transformers_loader import empty_model

STEPS = ("fit", "load", "generate", "pesf", "dense", "gptq_v2")
ALPHA = 0.95  # so large that an expert is rare in nearly every sequence


@cache
def text() -> TextWindows:
    """Four windows of 64 tokens to calibrate on, and two of held-out text."""
    return TextWindows(
        heldout={"prose": "bundled:prose"},
        num_windows=4,
        window_length=64,
        batch_size=2,
        num_heldout_windows=2,
        heldout_batch_size=2,
    )


class Trial:
    """The steps of one architecture, each of which raises if something is wrong.

    Args:
        name: of the architecture in `architectures.SETTINGS`.
        folder: where the original, the run and the exports go.
        tokenizer: is saved beside the original.
    """

    def __init__(self, name: str, folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
        self.name, self.folder, self.tokenizer = name, folder, tokenizer
        self.tokens = torch.randint(1, 4096, (2, 40), generator=torch.Generator().manual_seed(0))  # [B, T]
        self._errors: dict[str, Exception] = {}

    def passes(self, step: str) -> Exception | None:
        """Runs a step unless it ran before: None, or what it raised."""
        if step not in self._errors:
            try:
                getattr(self, step)()
                self._errors[step] = None
            except Exception as error:
                self._errors[step] = error
        return self._errors[step]

    # --- the original

    @cached_property
    def original(self) -> Path:
        """The saved original."""
        folder = self.folder / "original"
        architectures.build(self.name).save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        return folder

    def stored_in(self, dtype: torch.dtype) -> Path:
        """The original as a checkpoint of this dtype, in which the model's own exceptions stay float32."""
        folder = self.folder / f"original-{str(dtype).removeprefix('torch.')}"
        if not folder.exists():
            AutoModelForCausalLM.from_pretrained(self.original, dtype=dtype).save_pretrained(folder)
            self.tokenizer.save_pretrained(folder)
        return folder

    @cached_property
    def has_float32_parts(self) -> bool:
        """Whether transformers keeps some parameters or buffers of a bfloat16 model in float32."""
        model = empty_model(architectures.config_of(self.name), torch.bfloat16)
        return any(tensor.dtype == torch.float32 for tensor in model.state_dict().values())

    # --- the steps

    def fit(self) -> None:
        """The whole job at 8 bit: its figures are those of transformers, and it changes little."""
        report = fit(self.original, self.run)
        perplexity = report["perplexity"]["prose"]
        assert_perplexity(perplexity["original"], self.original, torch.float32)
        original = AutoModelForCausalLM.from_pretrained(self.original, dtype=torch.float32).eval()
        with torch.no_grad():
            expected, got = original(self.tokens).logits, self.decoded(self.tokens).logits
        difference = float((got - expected).square().mean().sqrt() / expected.square().mean().sqrt())
        assert difference < 0.5, f"8-bit weights change logits by {difference:.2g} of their size"
        measured = perplexity_of(self.decoded)
        assert abs(perplexity["compressed"] / measured - 1) < 1e-3, (perplexity["compressed"], measured)

    @property
    def run(self) -> Path:
        return self.folder / "run"

    @property
    def is_compressed(self) -> bool:
        """Whether `fit` wrote a compressed model, be it right or wrong."""
        return (self.run / "compressed").is_dir()

    @property
    def is_refused(self) -> bool:
        """Whether `fit` raised a ValueError before it computed anything."""
        return isinstance(self.passes("fit"), ValueError) and not (self.run / "blocks").exists()

    @cached_property
    def decoded(self) -> PreTrainedModel:
        return eacmoe_lightning.load(self.run, packed=False)

    @cached_property
    def packed(self) -> PreTrainedModel:
        return eacmoe_lightning.load(self.run)

    @torch.no_grad()
    def load(self) -> None:
        """Packed weights give the logits of decoded ones."""
        got, expected = self.packed(self.tokens).logits, self.decoded(self.tokens).logits
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)

    @torch.no_grad()
    def generate(self) -> None:
        """Greedy tokens of the packed model, after a left-padded prompt, are those of the decoded model."""
        mask = torch.ones(2, 12, dtype=torch.long)
        mask[0, :3] = 0
        words = [
            model.generate(self.tokens[:, :12], attention_mask=mask, max_new_tokens=8, do_sample=False, pad_token_id=0)
            for model in (self.packed, self.decoded)
        ]
        assert words[0].shape == (2, 20) and torch.equal(*words), words

    @torch.no_grad()
    def pesf(self) -> None:
        """Skipping experts of the packed model is the decoded model with the weights of rare experts at zero."""
        with eacmoe_lightning.pesf(self.packed, alpha=ALPHA) as report:
            got = self.packed(self.tokens).logits
        assert report.summary()["dropped"] > 0, "the report counts no expert that was left out"
        expected = without_rare_experts(self.decoded, self.tokens)
        assert not torch.equal(expected, self.decoded(self.tokens).logits)
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)

    @torch.no_grad()
    def dense(self) -> None:
        """The decoded export is the same model in plain transformers, under the original's tensor names."""
        folder, source = self.folder / "dense", Source(self.run)
        weights = source.grids()
        folder.mkdir()
        dense.write(source, weights, targets.choose(targets.find("dense", None), weights), folder)
        model = AutoModelForCausalLM.from_pretrained(folder).eval()
        # on some CPUs the order of sums depends on where weights lie in memory
        torch.testing.assert_close(model(self.tokens).logits, self.decoded(self.tokens).logits, rtol=1e-5, atol=1e-5)
        assert tensor_names(folder) == tensor_names(self.original)

    def gptq_v2(self) -> None:
        """The export decodes to the same model by the format's rules (`export` checks that)."""
        export(str(self.run), str(self.folder / "gptq"), "gptq_v2", "gptqmodel")

    def gguf(self) -> None:
        """The export of a type that llama.cpp runs, with the settings that it computes; of others it is refused."""
        source = self.run
        if self.name in gguf_models.CHANGES:
            original, source = self.folder / "gguf-original", self.folder / "gguf-compressed"
            gguf_models.build(self.name).save_pretrained(original)
            self.tokenizer.save_pretrained(original)
            compress(original, source)
        export(str(source), str(self.folder / "gguf"), "gguf")

    def left(self) -> dict[str, str]:
        """The matrices of blocks that are neither quantized nor routers nor biases: name in the block -> why."""
        quantization = json.loads((self.run / "compressed" / "config.json").read_text())["quantization"]
        moe = MoEModel(empty_model(architectures.config_of(self.name), torch.float32))
        left: dict[str, str] = {}
        for block in moe.blocks:
            for module_name, module in block.layer.named_modules():
                if block.is_moe and f"{module_name}.".startswith(f"{block.router_name}."):
                    continue
                for parameter_name, parameter in module.named_parameters(recurse=False):
                    name = f"{module_name}.{parameter_name}".lstrip(".")
                    full_name = f"{block.name}.{name}"
                    if parameter.ndim > 1 and full_name not in quantization["bits"] and not name.endswith("bias"):
                        stated = quantization.get("unquantized", {}).get(full_name)
                        left[name] = stated or reason(module)
        return left


def reason(module: nn.Module) -> str:
    """Why the matrix of a module is not quantized, if the run does not say so itself."""
    if isinstance(module, nn.Linear) and module.out_features == 1:
        return "one output"
    kinds = {nn.Conv1d: "convolution", nn.Embedding: "embedding"}
    return next((name for kind, name in kinds.items() if isinstance(module, kind)), "no linear layer")


def fit(original: Path, run: Path, dtype: str = "auto", **options) -> dict:
    """Runs a small job at 8 bit in this process and returns its report."""
    small = {"bits": 8, "attention_bits": 8, "group_size": 32, "min_expert_tokens": 32}
    passes = {"block_epochs": 1, "joint_epochs": 0}
    module = QESC(str(original), dtype=dtype, **small | passes | options)
    trainer = calibration_trainer(run, progress_bar=False, accelerator="cpu")
    trainer.fit(module, text())
    return json.loads((run / "report.json").read_text())


@torch.no_grad()
def perplexity_of(model: PreTrainedModel) -> float:
    """By the model's own forward pass, over the held-out windows of `fit`."""
    (windows,) = text().heldout_windows.values()
    logits = model(windows, use_cache=False).logits.float()
    return float(F.cross_entropy(logits[:, :-1].flatten(0, 1), windows[:, 1:].flatten()).exp())


def assert_perplexity(reported: float, original: Path, dtype: torch.dtype) -> None:
    """The report's perplexity of the original is that of transformers."""
    expected = perplexity_of(AutoModelForCausalLM.from_pretrained(original, dtype=dtype).eval())
    assert abs(reported / expected - 1) < 1e-4, f"the report says {reported}, transformers' forward pass {expected}"


def without_rare_experts(model: PreTrainedModel, input_ids: Tensor) -> Tensor:
    """Logits of the model where, in each block, the experts that a sequence rarely selects have the weight 0."""
    batch, length = input_ids.shape

    def watch(block: Block):
        def zero(routing: Routing, _) -> Routing:
            ids, weights = routing.ids, routing.weights.clone()
            top_k = ids.shape[1]
            for b in range(batch):
                rows = range(b * length, (b + 1) * length)
                counts = [0] * block.num_experts
                for n in rows:
                    for e in ids[n].tolist():
                        if e < block.num_experts:  # others compute nothing
                            counts[e] += 1
                for n in rows:
                    for k, e in enumerate(ids[n].tolist()):
                        if e < block.num_experts and counts[e] < ALPHA * length * top_k / block.num_experts:
                            weights[n, k] = 0
            return Routing(routing.logits, ids, weights)

        return block.watch_router(zero)

    handles = [watch(block) for block in MoEModel(model).moe_blocks]
    try:
        return model(input_ids).logits
    finally:
        for handle in handles:
            handle.remove()


def tensor_names(folder: Path) -> set[str]:
    names: set[str] = set()
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            names |= set(file.keys())
    return names
