"""Codecs: the bound holds for every final weight, lossless codecs restore every bit, and records detect damage."""

import json
import math
import struct
import zlib

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from eacmoe_lightning.models.moe import MoEModel
from eacmoe_lightning.models.originals import load_original
from eacmoe_lightning.offload.codecs import Bound, RecordError, codec, decode, decode_packed, nvcomp, read_header
from eacmoe_lightning.offload.codecs.bound import before_cast
from eacmoe_lightning.offload.codecs.packed import bit_stream, whole_codes
from eacmoe_lightning.quantization.grid import Grid, round_to_nearest
from eacmoe_lightning.quantization.packing import pack
from eacmoe_lightning.run.files import StoreError

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LOSSY = ("sz3", "uniform", "entropy")
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).rpartition(".")[2])


def gaussian(*shape: int, seed: int = 0, std: float = 0.02) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * std


def same_bits(a: Tensor, b: Tensor) -> bool:
    return (
        a.shape == b.shape
        and a.dtype == b.dtype
        and torch.equal(a.view(-1).view(torch.uint8), b.view(-1).view(torch.uint8))
    )


# --- the bound


def exact_errors(weight: Tensor, decoded: Tensor) -> list[float]:
    """|w - w'| in Python floats: rounded once, by the subtraction."""
    return [abs(a - b) for a, b in zip(weight.flatten().tolist(), decoded.flatten().tolist(), strict=True)]


def meaning_of(mode: str, value: float, weight: Tensor) -> float:
    """The bound in weight units, computed with numpy."""
    w = weight.double().numpy()
    return value * {"absolute": 1.0, "range": w.max() - w.min(), "mean": np.abs(w).mean()}[mode]


@st.composite
def tensors(draw) -> Tensor:
    shape = draw(st.lists(st.integers(1, 7), min_size=1, max_size=4))
    dtype = draw(st.sampled_from(DTYPES))
    kind = draw(st.sampled_from(["gaussian", "uniform", "constant", "zeros", "sparse", "many magnitudes", "any"]))
    count, seed = math.prod(shape), draw(st.integers(0, 2**31))
    rng = np.random.default_rng(seed)
    size = 10.0 ** draw(st.integers(-7, 4))
    if kind == "any":
        width = 16 if dtype == torch.float16 else 32
        values = draw(
            st.lists(st.floats(allow_nan=False, allow_infinity=False, width=width), min_size=count, max_size=count)
        )
        values = np.array(values)
    elif kind == "many magnitudes":
        values = rng.normal(size=count) * 10.0 ** rng.integers(-30, 30, count)
    else:
        values = {
            "gaussian": rng.normal(size=count) * size,
            "uniform": rng.uniform(-size, size, count),
            "constant": np.full(count, size * rng.normal()),
            "zeros": np.zeros(count),
            "sparse": rng.normal(size=count) * size * (rng.random(count) < 0.1),
        }[kind]
    tensor = torch.tensor(values).float().to(dtype)
    limit = torch.finfo(dtype).max
    return tensor.clamp(-limit, limit).reshape(shape)


@settings(max_examples=150, deadline=None)
@given(
    weight=tensors(),
    name=st.sampled_from(LOSSY),
    mode=st.sampled_from(["absolute", "range", "mean"]),
    value=st.floats(-9, 1).map(lambda e: 10.0**e),
)
@example(weight=torch.full((3, 5), 0.3, dtype=torch.bfloat16), name="sz3", mode="range", value=0.1)
@example(weight=torch.zeros(1, 1), name="uniform", mode="mean", value=0.5)
@example(
    weight=torch.tensor([65504.0, 65472.0, -65504.0], dtype=torch.float16), name="sz3", mode="absolute", value=30.0
)
@example(weight=torch.tensor([3e38, -3e38, 1e-45]), name="sz3", mode="range", value=1e-3)
def test_the_bound_holds_for_every_final_weight(weight, name, mode, value):
    record = codec(f"{name}:{mode}:{value!r}").encode(weight)
    decoded, header = decode(record), read_header(record)
    assert decoded.dtype == weight.dtype and decoded.shape == weight.shape
    bound = meaning_of(mode, value, weight)
    assert max(exact_errors(weight, decoded)) <= bound * (1 + 1e-12)
    if header.codec == "lossless":
        assert same_bits(weight, decoded)
    assert header.bound["absolute"] == pytest.approx(bound, rel=1e-9)


@dtypes
@pytest.mark.parametrize("name", LOSSY)
@pytest.mark.parametrize("alpha", [0.03, 0.1, 0.3, 0.8])
def test_the_bound_holds_and_is_used_on_many_weights(name, alpha, dtype):
    weight = gaussian(512, 256).to(dtype)
    record = codec(f"{name}:mean:{alpha}").encode(weight)
    header = read_header(record)
    error = (weight.double() - decode(record).double()).abs().max().item()
    assert header.codec == name and error == header.bound["error"]
    bound = alpha * weight.double().abs().mean().item()
    assert 0.49 * bound < error <= bound  # the cast costs at most half of the bound
    assert header.bits_per_weight < {0.03: 9.1, 0.1: 5, 0.3: 3.5, 0.8: 2.5}[alpha]


@pytest.mark.parametrize("name", LOSSY)
def test_the_bound_holds_on_the_bundled_models_experts(name):
    block = MoEModel(load_original("bundled")).moe_blocks[2]
    for projection in block.experts.projections:
        for expert in (0, 7):
            weight = block.experts.weight(projection)[expert]
            bound = 0.1 * weight.double().abs().mean().item()
            decoded = decode(codec(f"{name}:mean:0.1").encode(weight))
            assert (weight.double() - decoded.double()).abs().max().item() <= bound
            assert not torch.equal(weight, decoded)


def test_casting_alone_would_break_the_bound():
    """Why `before_cast` is needed: if the compressor gets the bound itself, the bfloat16 weights exceed it."""
    weight = gaussian(256, 256).bfloat16()
    bound = 0.1 * weight.double().abs().mean().item()
    decoded = decode(codec(f"sz3:absolute:{bound!r}").encode(weight.float()))
    assert (decoded.double() - weight.double()).abs().max() <= bound
    assert (decoded.bfloat16().double() - weight.double()).abs().max() > bound
    assert 0.5 * bound < before_cast(weight, bound) < bound


def test_before_cast_by_hand():
    # bfloat16 in [1, 2) has steps of 1/128; 0.01 = 1.28 steps allows one step, reached below 1.5 steps
    assert before_cast(torch.tensor([1.5], dtype=torch.bfloat16), 0.01) == 0.01
    # 0.015 = 1.92 steps allows one step as well: up to 1.5 steps
    assert before_cast(torch.tensor([1.5], dtype=torch.bfloat16), 0.015) == 1.5 / 128
    # less than one step: the weight itself, reached below half a step
    assert before_cast(torch.tensor([1.5], dtype=torch.bfloat16), 0.007) == 0.5 / 128
    assert before_cast(torch.tensor([1.5]), 0.015) == 0.015


def test_a_bound_below_the_dtypes_precision_is_stored_losslessly():
    weight = gaussian(64, 64).bfloat16()
    record = codec("sz3:mean:1e-6").encode(weight)
    assert read_header(record).codec == "lossless" and same_bits(decode(record), weight)
    assert read_header(record).bound["effective"] == 0
    assert len(record) <= len(codec("lossless").encode(weight)) + 256


@pytest.mark.parametrize("specification", ["sz3:mean:0.1", "uniform:absolute:0.1", "packed:3:8"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_infinite_weights_are_refused(specification, bad):
    weight = gaussian(8, 8)
    weight[3, 5] = bad
    with pytest.raises(ValueError, match="NaN or infinite.*repair"):
        codec(specification).encode(weight)
    assert same_bits(decode(codec("lossless").encode(weight)), weight)


# --- lossless


@settings(max_examples=60, deadline=None)
@given(weight=tensors(), name=st.sampled_from(["plain", "lossless"]))
@example(weight=torch.zeros(0, 4), name="lossless")
def test_lossless_codecs_restore_every_bit(weight, name):
    assert same_bits(decode(codec(name).encode(weight)), weight)


def test_upper_bytes_of_bfloat16_compress():
    record = codec("lossless").encode(gaussian(256, 1024).bfloat16())
    assert 10 < read_header(record).bits_per_weight < 11.5  # 8 of mantissa and sign, about 2.7 of exponent


# --- packed codes


@pytest.mark.parametrize("name", ["packed", "packed-zstd", "packed-entropy"])
@pytest.mark.parametrize("bits", range(2, 9))
def test_packed_codes_come_back(bits, name):
    weight = gaussian(3, 24, 64)
    q = round_to_nearest(weight, Grid(bits, 32))
    tensors = (pack(q.codes, bits), q.scale, q.zero_point)
    record = codec(f"{name}:{bits}:32").encode_packed(tensors, torch.bfloat16)
    for decoded, original in zip(decode_packed(record), tensors, strict=True):
        assert same_bits(decoded, original)
    assert torch.equal(decode(record), q.dequantize(torch.bfloat16))
    assert codec(f"{name}:{bits}:32").encode(weight.bfloat16()) == codec(f"{name}:{bits}:32").encode(weight.bfloat16())


@pytest.mark.parametrize("bits", range(2, 9))
def test_whole_codes_are_the_codes_in_order(bits):
    codes = torch.randint(0, 2**bits, (5, 40), generator=torch.Generator().manual_seed(bits)).to(torch.uint8)
    packed, fit = pack(codes, bits), 8 // bits
    symbols = whole_codes(packed, bits)
    expected = [sum(int(c) << (bits * i) for i, c in enumerate(group)) for group in codes.view(-1, fit)]
    assert symbols.tolist() == expected
    assert torch.equal(bit_stream(symbols, bits), packed.view(-1))


def test_entropy_coding_comes_near_the_entropy_of_the_codes():
    weight = gaussian(512, 1024)
    for bits in (2, 3, 4):
        codes = round_to_nearest(weight, Grid(bits, 128)).codes
        symbols = (
            codes.view(-1, 8 // bits).double() @ 2.0 ** (bits * torch.arange(8 // bits)).double()
        )  # 8 // bits codes
        share = torch.bincount(symbols.long()).double() / symbols.numel()
        entropy = -(share[share > 0] * share[share > 0].log2()).sum().item() / (8 // bits)
        header = read_header(codec(f"packed-zstd:{bits}:128").encode(weight))
        coded = 8 * header.options["parts"][0] / weight.numel()
        assert coded < bits and abs(coded - entropy) < 0.05 * entropy


# --- records


def test_a_record_describes_itself():
    weight = gaussian(24, 40).bfloat16()
    record = codec("sz3:mean:0.25").encode(weight)
    magic, length, crc = struct.unpack_from("<8sII", record)
    assert magic == b"eacmoe1\n" and zlib.crc32(record[16 : 16 + length]) == crc and (16 + length) % 64 == 0
    header = json.loads(record[16 : 16 + length])
    assert header["codec"] == "sz3" and header["dtype"] == "bfloat16" and header["shape"] == [24, 40]
    assert header["bound"]["mode"] == "mean" and header["bound"]["value"] == 0.25
    assert 0 < header["bound"]["error"] <= header["bound"]["absolute"]
    assert header["payload_bytes"] == len(record) - 16 - length
    assert codec("sz3:mean:0.25").encode(weight) == record  # encoding is deterministic


@pytest.mark.parametrize(
    "specification",
    [
        "plain",
        "lossless",
        "sz3:mean:0.1",
        "uniform:range:0.01",
        "entropy:mean:0.5",
        "packed-zstd:3:8",
        "packed-entropy:3:8",
    ],
)
def test_all_damage_is_detected(specification):
    record = codec(specification).encode(gaussian(16, 24).bfloat16())
    for position in range(0, len(record), 7):
        broken = bytearray(record)
        broken[position] ^= 1 << position % 8
        with pytest.raises(RecordError, match="expert 5"):
            decode(broken, name="expert 5")
    for length in (0, 5, 15, 16, 100, len(record) - 1):
        with pytest.raises(RecordError, match="expert 5 is truncated"):
            decode(record[:length], name="expert 5")
    assert issubclass(RecordError, StoreError)
    decode(record + b"more")  # a longer buffer is allowed


def test_decoding_fills_a_given_tensor():
    weight = gaussian(8, 16).bfloat16()
    for specification in ("plain", "lossless", "sz3:mean:0.1", "packed:4:16"):
        record, out = codec(specification).encode(weight), torch.empty(2, 8, 16, dtype=torch.bfloat16)
        assert decode(record, out[1]).data_ptr() == out[1].data_ptr()
        assert torch.equal(out[1], decode(record))
        for wrong in (out, out[0].float(), torch.empty(16, 8, dtype=torch.bfloat16).t()):
            with pytest.raises(ValueError, match="out is"):
                decode(record, wrong)


@pytest.mark.parametrize(
    ("specification", "message"),
    [
        ("zip", "not one of"),
        (["lossless"], "neither a string"),
        ("sz3", "missing 2 required"),
        ("sz3:mean", "missing 1 required"),
        ("sz3:mean:-1", "not a positive number"),
        ("sz3:mean:nan", "not a positive number"),
        ("sz3:relative:0.1", "not one of absolute, range, mean"),
        ("packed:9:64", "2 to 8"),
        ("packed:3:12", "multiple of 8"),
    ],
)
def test_bad_specifications_are_named(specification, message):
    with pytest.raises(ValueError, match=message) as caught:
        codec(specification)
    assert repr(specification) in str(caught.value)
    with pytest.raises(ValueError, match="not float64"):
        codec("lossless").encode(torch.zeros(2, dtype=torch.float64))


def test_a_codec_of_a_later_version_is_named():
    record = codec("plain").encode(gaussian(4, 4))
    (length,) = struct.unpack_from("<I", record, 8)
    text = record[16 : 16 + length].replace(b'"plain"', b'"later"')
    with pytest.raises(RecordError, match="'later'"):
        decode(struct.pack("<8sII", b"eacmoe1\n", length, zlib.crc32(text)) + text + record[16 + length :])


@pytest.mark.parametrize("specification", [Bound("mean", 0.1), None], ids=["bounded", "lossless"])
@dtypes
def test_nvcomp_or_why_not(specification, dtype):
    weight, coder = gaussian(64, 96).to(dtype), nvcomp.NvComp(specification)
    if reason := nvcomp.missing():
        with pytest.raises(ValueError, match="nvcomp needs"):
            coder.encode(weight)
        pytest.skip(reason)
    decoded = decode(coder.encode(weight))
    if specification is None:
        assert same_bits(decoded, weight)
    else:
        assert max(exact_errors(weight, decoded)) <= 0.1 * weight.double().abs().mean().item()
