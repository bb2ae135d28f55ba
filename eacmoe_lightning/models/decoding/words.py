"""Codes in 32-bit words with scales and zero points: GPTQ, AWQ and AutoRound."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from eacmoe_lightning.models.decoding.arithmetic import unpack_words
from eacmoe_lightning.models.decoding.scheme import REMEDY, Scheme, Split, require
from eacmoe_lightning.models.weight_files import Stored

AUTO_ROUND = "auto-round"
IN_HALVES = ("gptqmodel", "eacmoe-lightning")  # programs that take a stack's first half for gate, whatever it holds
OWN_SIZES = ("dynamic", "extra_config", "layer_config")  # options with group sizes of some linears
SIZES = (16, 32, 64, 128, 256, 512, 1024)  # of their groups


class Words(Scheme):
    """What GPTQ and AWQ have in common."""

    @property
    def split(self) -> Split | None:
        if self.config.get("provider") == AUTO_ROUND:
            return "alternating"
        programs = str((self.config.get("meta") or {}).get("quantizer"))
        return "halves" if any(program in programs for program in IN_HALVES) else None


class GPTQ(Words):
    """Codes packed along the inputs; the inputs of a group are listed in `g_idx` (activation order)."""

    def __init__(self, config: Mapping[str, Any], stored: Mapping[str, Stored]) -> None:
        form = config.get("checkpoint_format") or config.get("format") or "gptq"
        form = "marlin" if config.get("is_marlin_format") else form
        if form not in ("gptq", "gptq_v2"):
            raise ValueError(
                f"it is GPTQ in the format {form!r}, in the order of a kernel, and only 'gptq' and 'gptq_v2' can be "
                "decoded: pass the model that it was made of"
            )
        super().__init__(config, stored)

    def find(self, stored: Mapping[str, Stored]) -> dict[str, dict[str, str]]:
        return _words(stored, ("qweight", "qzeros", "scales", "g_idx"), self.config.get("sym") is True)

    def decode(self, key: str, parts: Mapping[str, Tensor]) -> Tensor:
        qweight, scales, qzeros, group = (parts.get(kind) for kind in ("qweight", "scales", "qzeros", "g_idx"))
        groups, out_features = scales.shape
        if group is not None and (not group.numel() or not group.any()):
            group = None  # ExLlamaV2 too takes zeros for the ordinary order
        if qzeros is not None and qzeros.numel():
            bits = qzeros.shape[1] * 32 // out_features
        else:
            qzeros, bits = None, self._bits(len(qweight), groups, group)
        codes = unpack_words(qweight.T, bits)  # [O, I]
        in_features = codes.shape[-1]
        if group is None:
            if groups > 1 and self.config.get("desc_act"):
                raise ValueError(
                    f"{key}: its inputs are in the order of their importance (`desc_act`), and no `g_idx` says which "
                    f"group each is in: {REMEDY}"
                )
            group = torch.arange(in_features) // _group_size(key, self.config, groups, in_features)
        elif len(group.unique()) < groups:
            raise ValueError(f"{key}: its `g_idx` does not put inputs into each of its {groups} groups: {REMEDY}")
        group = group.long()
        zero_point: Tensor | int = 2 ** (bits - 1)
        if qzeros is not None:
            zero_point = self._zero_point(key, codes, qzeros, group, bits)
        return (codes - zero_point).float() * scales.float().T[:, group]

    def _bits(self, words: int, groups: int, group: Tensor | None) -> int:
        """The width of codes that take this number of words along the inputs."""
        if group is not None:
            return words * 32 // group.numel()
        group_size = self.config.get("group_size") or -1
        return words * 32 // (groups * group_size) if group_size > 0 else self.config["bits"]

    def _whole(self, qzeros: Tensor, bits: int) -> Tensor:
        """Zero points [G, O] from their words, with the 1 that version 1 of the format has taken off each.

        GPTQModel takes it off whole words. So a zero point of 0 has borrowed from the next code of its word, and adding
        to the words gives that back.
        """
        if self._is_v2:
            return unpack_words(qzeros, bits)
        if 32 % bits:  # codes cross words
            return (unpack_words(qzeros, bits) + 1) & (2**bits - 1)
        ones = sum(1 << place for place in range(0, 32, bits))
        return unpack_words((qzeros.long() + ones).to(torch.int32), bits)

    def _zero_point(self, key: str, codes: Tensor, qzeros: Tensor, group: Tensor, bits: int) -> Tensor | int:
        """The zero point of each code [O, I], from the words of each group, less 1 in version 1 of the format.

        The config says which version it is. Zero points of symmetric weights are in the middle, whatever it says.

        Raises:
            ValueError: the rows lie one step beside 0 by the config, and around 0 in the other version.
        """
        middle, left_out, is_symmetric = 2 ** (bits - 1), int(not self._is_v2), self.config.get("sym")
        stored = unpack_words(qzeros, bits)  # [G, O]
        first = int(stored.flatten()[0])
        if (stored == first).all():
            is_middle = is_symmetric is not False and first in (middle, middle - 1)
            if is_middle or (is_symmetric and not first):  # some leave zeros in the place of what nobody reads
                return middle
        zero_point = self._whole(qzeros, bits).T[:, group]
        if bits <= 4:  # the steps of more bits are so small that a mean of one may be the model's own
            mean = (codes - zero_point).float().mean(-1)  # of each row, in steps
            other = mean + (1 if left_out else -1)
            if mean.abs().median() > 0.6 and other.abs().median() < 0.3:
                this, that = ("gptq", "gptq_v2") if left_out else ("gptq_v2", "gptq")
                raise ValueError(
                    f"{key}: its rows lie one step beside 0 as {this!r}, and around 0 as {that!r}, so its zero points "
                    f'are stored as in {that!r}: write "checkpoint_format": "{that}" in the `quantization_config` of '
                    "config.json (--model.name_or_path)"
                )
        return zero_point

    @property
    def _is_v2(self) -> bool:
        """Whether zero points are stored as they are by the config; version 1 stores them less 1."""
        return (self.config.get("checkpoint_format") or self.config.get("format")) == "gptq_v2"

    def describe(self) -> str:
        return f"GPTQ, {self.config.get('bits')} bits in groups of {self.config.get('group_size')}"


class AWQ(Words):
    """Codes packed along the outputs, in the order of the GEMM kernel."""

    ORDER = {4: (0, 2, 4, 6, 1, 3, 5, 7), 8: (0, 2, 1, 3)}  # outputs of a word, from its lowest bits

    def __init__(self, config: Mapping[str, Any], stored: Mapping[str, Stored]) -> None:
        version = str(config.get("version") or config.get("format") or "gemm").lower()
        self._num_bits = config.get("bits", config.get("w_bit", 4))
        if version != "gemm" or self._num_bits not in self.ORDER:
            raise ValueError(
                f"it is AWQ of version {version!r} with {self._num_bits} bits; version 'gemm' with 4 or 8 is known"
            )
        super().__init__(config, stored)

    def find(self, stored: Mapping[str, Stored]) -> dict[str, dict[str, str]]:
        is_symmetric = self.config.get("sym") is True or self.config.get("zero_point") is False
        return _words(stored, ("qweight", "qzeros", "scales"), is_symmetric)

    def decode(self, key: str, parts: Mapping[str, Tensor]) -> Tensor:
        scales = parts["scales"].float()  # [G, O]
        bits = parts["qweight"].shape[1] * 32 // scales.shape[1]
        codes = self._unpack(parts["qweight"], bits)  # [I, O]
        group = torch.arange(len(codes)) // _group_size(key, self.config, len(scales), len(codes))
        zero_point = self._unpack(parts["qzeros"], bits)[group] if "qzeros" in parts else 2 ** (bits - 1)
        return ((codes - zero_point).float() * scales[group]).T.contiguous()

    def _unpack(self, words: Tensor, bits: int) -> Tensor:
        order = torch.tensor(self.ORDER[bits])
        return unpack_words(words, bits).unflatten(-1, (-1, len(order)))[..., order.argsort()].flatten(-2)

    def describe(self) -> str:
        group_size = self.config.get("group_size", self.config.get("q_group_size"))
        return f"AWQ, {self._num_bits} bits in groups of {group_size}"


def auto_round(config: Mapping[str, Any], stored: Mapping[str, Stored]) -> Scheme:
    """The scheme of AutoRound's own configs, which stores words as GPTQ or AWQ does."""
    form, config = (
        str(config.get("packing_format") or "auto_gptq").rpartition(":")[2],
        {**config, "provider": AUTO_ROUND},
    )
    if form == "auto_gptq" or (form == "auto_round" and config.get("sym")):
        return GPTQ({**config, "checkpoint_format": "gptq"}, stored)
    if form == "auto_awq":
        return AWQ({**config, "version": "gemm"}, stored)
    raise ValueError(
        f"it is quantized by auto-round in the format {form!r}, and only 'auto_gptq', 'auto_awq' and symmetric "
        "'auto_round' can be decoded: pass the full-precision model that it was made of"
    )


def _words(stored: Iterable[str], kinds: Sequence[str], is_symmetric: bool) -> dict[str, dict[str, str]]:
    """`Scheme.parts` of linears in words: all have `qweight` and `scales`, and `qzeros` unless they are symmetric.

    What one linear has, all have.

    Raises:
        ValueError: a linear lacks something.
    """
    parts: dict[str, dict[str, str]] = {}
    for key in stored:
        if key.endswith(".qweight"):
            name = key.removesuffix(".qweight")
            found = {kind: f"{name}.{kind}" for kind in kinds if f"{name}.{kind}" in stored}
            require(key, found, ("scales",) if is_symmetric else ("scales", "qzeros"))
            parts[f"{name}.weight"] = found
    common = set().union(*parts.values())
    for key, found in parts.items():
        require(key, found, [kind for kind in kinds if kind in common])
    return parts


def _group_size(key: str, config: Mapping[str, Any], groups: int, in_features: int) -> int:
    """The number of inputs of all groups but the last, which may have fewer.

    Raises:
        ValueError: scales are of other groups than the config says, and it has no own sizes of linears.
    """
    size = config.get("group_size") or config.get("q_group_size") or in_features
    has_own_size = size < 0 or any(config.get(name) for name in OWN_SIZES)
    for width in (size, *(SIZES if has_own_size else ())):
        if width > 0 and groups == -(-in_features // width):
            return width
    if not has_own_size or in_features % groups:
        raise ValueError(
            f"{key}: it has scales for {groups} groups, and {in_features} inputs in groups of {size} "
            f"(`quantization_config` in config.json) have {-(-in_features // size)}: {REMEDY}"
        )
    return in_features // groups
