"""Whether an engine loads given weights: a `Target` is a row of the table in `targets.py`, with its rules."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Literal

from eacmoe_lightning.weight_grids import Original, WeightGrid, split_projection, wholes_of

ROW_PARALLEL = ("o_proj", "out_proj", "down_proj")  # tensor parallelism splits them along their inputs
ONE_LINEAR_EACH = ("compressed-tensors", "gptq", "gptq_v2")
MAX_DECODED = 0.05  # largest share of the weights that an export writes decoded because a format cannot pack them

# What may have bits of its own among routed experts: one width for those of the whole model, for those of a block, for
# each projection of a block's, or for each projection of each expert.
Granularity = Literal["model", "block", "projection", "expert"]


@dataclass(frozen=True)
class Trial:
    """Exports of this package that an engine loaded and ran with the same logits as ours.

    Attributes:
        version: version of the engine.
        symmetric, asymmetric: bits of the symmetric and of the asymmetric weights that were run.
        mixed: whether a model with weights of different bits was run.
        how: how the result was checked.
        group_sizes: group sizes that were run, where others run differently; None: any.
    """

    version: str
    symmetric: tuple[int, ...]
    asymmetric: tuple[int, ...]
    mixed: bool
    how: str
    group_sizes: tuple[int, ...] | None = None

    def untried(self, weights: Iterable[WeightGrid]) -> list[str]:
        """The properties of these weights that no trial covered; empty: all were covered."""
        weights = list(weights)
        kinds = sorted({(w.bits, w.symmetric) for w in weights})
        groups = sorted({w.group_size for w in weights if self.group_sizes and w.group_size not in self.group_sizes})
        missing = [
            f"{bits} bit {'symmetric' if symmetric else 'asymmetric'}"
            for bits, symmetric in kinds
            if bits not in (self.symmetric if symmetric else self.asymmetric)
        ]
        missing += [f"groups of {size}" for size in groups]
        return missing + (["several bits in one model"] if len({bits for bits, _ in kinds}) > 1 > self.mixed else [])


@dataclass(frozen=True)
class Target:
    """What one engine loads in one format.

    Attributes:
        engine: name of the engine (`--target`, `--model.target`).
        format: one of `targets.FORMATS`.
        version: version of the engine that was run, or whose sources were read.
        trial: the exports that it has run; None: none.
        bits: supported bits.
        symmetric: whether the zero point must be the middle code.
        symmetric_bits: by part, the bits at which it must be although it need not be at others.
        group_sizes: supported group sizes; None: any.
        mixing: where routed experts must have the same bits and group size: across the whole `model`, within a `block`,
            or only within a `weight`. Attention and shared experts may differ.
        multiple: a number of which in_features and out_features must be multiples where zero points are stored
            (compressed-tensors stores none of symmetric weights).
        fuses: whether it loads the linears of `FUSED` as one, so that they must have the same bits and group size.
        names: names under which it looks for weights: those of the `original` checkpoint, or those of transformers'
            modules with the stacks of experts split (`unstacked`).
        packs: the linears that it loads packed, by model type: unstacked names of modules. Types that are not there are
            refused. None: all linears of all types.
        fails: by model type, why the engine does not run what it loads.
        launch: the option that the engine must be started with.
        note: a remark for readers of the table.
    """

    engine: str
    format: str
    version: str
    trial: Trial | None
    bits: tuple[int, ...]
    symmetric: bool
    group_sizes: tuple[int, ...] | None
    mixing: Literal["model", "block", "weight"]
    multiple: int = 1
    fuses: bool = False
    symmetric_bits: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    names: Literal["original", "unstacked"] = "original"
    packs: Mapping[str, re.Pattern[str]] | None = None
    fails: Mapping[str, str] = field(default_factory=dict)
    launch: str = ""
    note: str = ""

    @property
    def verified(self) -> bool:
        return self.trial is not None

    @property
    def name(self) -> str:
        return f"{self.engine} ({self.format}{'' if self.verified else ', unverified'})"

    @property
    def granularity(self) -> Granularity:
        """What may have bits of its own: in a GGUF file, all experts of a projection are one tensor of one type."""
        if self.mixing != "weight":
            return self.mixing
        return "projection" if self.format == "gguf" else "expert"

    def widths(self, part: str, symmetric: bool) -> tuple[int, ...]:
        """The bits at which it loads weights of a part that are symmetric or not."""
        only_symmetric = () if symmetric else self.symmetric_bits.get(part, ())
        return tuple(b for b in self.bits if b not in only_symmetric and symmetric >= self.symmetric)

    def problems(
        self, weights: Iterable[WeightGrid], original: Original | None = None, tensor_parallel: int = 1
    ) -> list[str]:
        """Why the engine would not load these weights correctly, each reason with its remedy; empty: none is known.

        Args:
            weights: every quantized weight.
            original: None: a model whose experts every engine finds.
            tensor_parallel: number of devices over which the engine splits each linear.
        """
        weights = list(weights)
        on_lattice = [w for w in weights if w.on_lattice]
        if on_lattice and self.format != "dense":
            return [_counted(on_lattice, self._lattice)]
        in_blocks = [w for w in weights if w.kquant]
        if in_blocks and self.format not in ("gguf", "dense"):
            return [_counted(in_blocks, self._in_blocks)]
        if original is not None and (unreadable := self._unreadable(weights, original)):
            return [unreadable]
        left = self.left_decoded(weights, original)
        weights = [w for w in weights if not w.on_lattice and not w.kquant and w not in left]
        problems = [_counted([w for w in weights if w.bits not in self.bits], self._bits)]
        shared_symmetry = self.format != "compressed-tensors"  # gptq says once whether zero points count
        asymmetric = [w for w in weights if not (all(v.symmetric for v in weights) if shared_symmetry else w.symmetric)]
        middle = [w for w in asymmetric if self.symmetric or w.bits in self.symmetric_bits.get(w.part, ())]
        problems += [_counted(middle, self._asymmetric)]
        groups = [w for w in weights if self.group_sizes is not None and w.group_size not in self.group_sizes]
        problems += [_counted(groups, self._group_size)]
        problems += [_counted([w for w in weights if not self._fits(w)], self._multiple)]
        problems += [self._mixed([w for w in weights if w.part == "experts"]), self._unlike(weights)]
        cut = [w for w in weights if not self._divides(w, tensor_parallel)]
        problems += [_counted(cut, lambda w: self._tensor_parallel(w, tensor_parallel))]
        return [problem for problem in problems if problem]

    def left_decoded(self, weights: Iterable[WeightGrid], original: Original | None = None) -> list[WeightGrid]:
        """Linears that an export writes decoded: the engine does not load them packed, or the format cannot pack them.

        Of the second kind, none if they are more than `MAX_DECODED` of all weights; `problems` then names them.
        """
        weights = list(weights)
        unfit = [w for w in weights if w.part != "experts" and not self._fits(w)]
        if self.fuses:
            unfit = [w for whole in _wholes(weights) if any(w in unfit for w in whole) for w in whole]
        few = sum(prod(w.shape) for w in unfit) <= MAX_DECODED * sum(prod(w.shape) for w in weights)
        return [w for w in weights if (few and w in unfit) or (w.part != "experts" and not self._packs(w, original))]

    def _fits(self, weight: WeightGrid) -> bool:
        """Whether rows and columns of the linears in a weight are multiples of `multiple`, if zero points need it."""
        return not self._stores_zero_points(weight) or not any(n % self.multiple for n in _linear_shape(weight))

    def _stores_zero_points(self, weight: WeightGrid) -> bool:
        return self.format != "compressed-tensors" or not weight.symmetric

    def _divides(self, weight: WeightGrid, devices: int) -> bool:
        """Whether a weight can be split for tensor parallelism with whole groups, and whole words of zero points, on
        every device."""
        out_features, in_features = _linear_shape(weight)
        if devices == 1:
            return True
        if weight.name.removesuffix(".weight").rpartition(".")[2] in ROW_PARALLEL:
            return in_features % (devices * weight.group_size) == 0
        words = 32 if self.multiple > 1 and self._stores_zero_points(weight) else 1
        return out_features % devices == 0 and out_features // devices * weight.bits % words == 0

    def _packs(self, weight: WeightGrid, original: Original | None) -> bool:
        """Whether the engine loads a weight packed."""
        if self.packs is None or original is None:
            return True
        pattern, name = self.packs.get(original.model_type), weight.name.removesuffix(".weight")
        modules = [name]
        if weight.part == "experts":
            modules = [f"{name.rpartition('.')[0]}.0.{projection}" for projection in split_projection(name)]
        return pattern is not None and all(pattern.fullmatch(module) for module in modules)

    def _unreadable(self, weights: list[WeightGrid], original: Original) -> str | None:
        """Why the engine would not find the experts."""
        kind = original.model_type
        others = "--format dense" if original.stacked else "--format dense or --format compressed-tensors"
        if self.packs is not None and not all(self._packs(w, original) for w in weights if w.part == "experts"):
            return (
                f"{self.version} does not load packed experts of the model type {kind!r} and would compute with "
                f"uninitialised weights: export with {others}, which plain transformers loads, or run the compressed "
                f"model with this package (calibrated without --model.target {self.engine})"
            )
        if self.names == "original" and self.format in ONE_LINEAR_EACH and original.stacked:
            return (
                f"the original {kind} keeps the experts of a block in one tensor ({original.stacked}), and {self.name} "
                f"needs a linear for each: export with {others}"
            )
        return None

    def _lattice(self, weight: WeightGrid) -> str:
        return (
            f"{weight.name} is on a lattice, but {self.name} loads group-wise codes only: calibrate with "
            "--model.quantizer gptq, or export with --format dense"
        )

    def _in_blocks(self, weight: WeightGrid) -> str:
        return (
            f"{weight.name} is in llama.cpp's blocks ({weight.kquant}), but {self.name} loads group-wise codes only: "
            "calibrate with --model.quantizer gptq, or export with --format gguf or --format dense"
        )

    def _bits(self, weight: WeightGrid) -> str:
        option = {"attention": "attention_bits", "shared": "shared_expert_bits", "experts": "bits"}[weight.part]
        return (
            f"{weight.name} has {weight.bits} bits, but {self.name} loads {_either(self.bits)}: calibrate with one of "
            f"these (--model.{option}, --model.overrides), or use another --target"
        )

    def _asymmetric(self, weight: WeightGrid) -> str:
        only = "symmetric weights only" if self.symmetric else f"{weight.part} of {weight.bits} bits only if symmetric"
        return (
            f"{weight.name} is asymmetric, but {self.name} loads {only}: calibrate with --model.symmetric true, or "
            "export with --format gptq_v2 or --format dense"
        )

    def _group_size(self, weight: WeightGrid) -> str:
        return (
            f"{weight.name} has groups of {weight.group_size}, but {self.name} loads "
            f"{_either(self.group_sizes or ())}: calibrate with one of these (--model.group_size), or use another "
            "--target"
        )

    def _multiple(self, weight: WeightGrid) -> str:
        out_features, in_features = _linear_shape(weight)
        return (
            f"{weight.name} has linears of {out_features} x {in_features}, but both must be multiples of "
            f"{self.multiple}, the number of values that the format packs together: use another --format"
        )

    def _mixed(self, experts: list[WeightGrid]) -> str | None:
        if self.mixing == "weight":
            return None
        grids: dict[int | None, set[tuple[int, int]]] = {}
        for weight in experts:
            key = weight.block if self.mixing == "block" else None
            grids.setdefault(key, set()).add((weight.bits, weight.group_size))
        for block, block_grids in grids.items():
            if len(block_grids) > 1:
                where = "the model" if block is None else f"block {block}"
                listed = _either(
                    [f"{bits} bits in groups of {group_size}" for bits, group_size in sorted(block_grids)], "and"
                )
                return (
                    f"the experts of {where} have {listed}, but {self.name} reads one grid for all of them and would "
                    "decode the others wrongly: calibrate with one (--model.bits, --model.overrides), or export with "
                    "--format gptq_v2 --target gptqmodel or --format dense"
                )
        return None

    def _unlike(self, weights: list[WeightGrid]) -> str | None:
        """Why linears that the engine loads as one are refused: the first whose parts have different grids."""
        for whole in _wholes(weights) if self.fuses else []:
            grids = {(w.bits, w.group_size) for w in whole}
            if len(grids) > 1:
                names = _either([w.name.removesuffix(".weight") for w in whole], "and")
                listed = _either([f"{bits} bits in groups of {group}" for bits, group in sorted(grids)], "and")
                return (
                    f"{names} have {listed}, but {self.name} loads them as one linear with one grid: quantize them "
                    "alike, or use another --target"
                )
        return None

    def _tensor_parallel(self, weight: WeightGrid, devices: int) -> str:
        out_features, in_features = weight.shape[-2:]
        return (
            f"{weight.name} is {out_features} x {in_features} in groups of {weight.group_size} and cannot be split for "
            f"--tensor_parallel {devices} without splitting a group: calibrate with a smaller --model.group_size, or "
            "use fewer devices or expert parallelism"
        )


def _linear_shape(weight: WeightGrid) -> tuple[int, int]:
    """[O, I] of each linear that engines see in a weight: gate and up of a stack of experts are two."""
    parts = len(split_projection(weight.name)) if weight.part == "experts" else 1
    return weight.shape[-2] // parts, weight.shape[-1]


def _wholes(weights: Iterable[WeightGrid]) -> list[list[WeightGrid]]:
    """Weights that vLLM and SGLang load as one linear, together; all others, but stacks of experts, alone."""
    wholes: dict[str, list[WeightGrid]] = {}
    for weight in weights:
        if weight.part != "experts":
            module = weight.name.removesuffix(".weight")
            wholes.setdefault((wholes_of(module) or [module])[0], []).append(weight)
    return list(wholes.values())


def _counted(weights: list[WeightGrid], describe) -> str | None:
    """Describes the problem of the first of these weights, and counts the others that have it; None without weights."""
    if not weights:
        return None
    others = Counter(weight.part for weight in weights[1:])
    more = ", ".join(f"{number} of {part}" for part, number in others.items())
    return describe(weights[0]) + (f" (the same applies to {more})" if more else "")


def _either(values: Iterable[object], word: str = "or") -> str:
    *first, last = [str(value) for value in values]
    return f"{', '.join(first)} {word} {last}" if first else last
