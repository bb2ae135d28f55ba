"""Humming's kernels without a GPU.

Here: the order of rows, skipped pairs, biases and kept copies, with a stand-in that computes what Humming documents of
its inputs. With humming-kernels installed (it needs no GPU to import; CI has it not): our tensors against its own
schema, our bits against its own source, compiled as C++; and, slow, its kernels for our weights compiled for SM80
and SM90. Never: a product on a GPU.
"""

import ctypes
import importlib
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from test_kernels import error, experts_reference, random_weight, tensors
from torch import Tensor

from eacmoe_lightning.runtime import kernels

HUMMING = importlib.util.find_spec("humming")
needs_humming = pytest.mark.skipif(HUMMING is None, reason="humming-kernels is not installed")
MODULE = "eacmoe_lightning.runtime.humming_kernels"


def integers(words: Tensor, bits: int) -> Tensor:
    """The numbers in little-endian int32 words [..., W], as float64 [..., W * 32 / bits]."""
    stream = np.unpackbits(words.contiguous().numpy().view(np.uint8), axis=-1, bitorder="little")
    return torch.from_numpy(stream.reshape(*words.shape[:-1], -1, bits) @ 2.0 ** np.arange(bits))


class StandIn:
    """humming's two functions, by what its schema and its tests say of their arguments."""

    def __init__(self) -> None:
        self.num_copies = 0

    def prepare(self, tensors, shape_n, shape_k, weight_schema, num_experts, torch_dtype, device):
        self.num_copies += 1
        assert tensors["weight_scale"].dtype == torch_dtype == weight_schema.bs_dtype
        codes = integers(tensors["weight"], weight_schema.bits)
        zeros = integers(tensors["zero_point"].transpose(-1, -2), weight_schema.bits).transpose(-1, -2)
        steps = codes.unflatten(-1, (-1, weight_schema.weight_scale_group_size)) - zeros[..., None]
        weight = (steps * tensors["weight_scale"][..., None].double()).flatten(-2)
        assert weight.shape == (*([num_experts] if num_experts else []), shape_n, shape_k)
        return SimpleNamespace(num_experts=num_experts), {"weight": weight}

    def forward(self, config, inputs, weight, outputs, compute_config, locks, expert_layout=None):
        outputs.fill_(torch.nan)  # behind the last expert nothing is written
        if compute_config == {"gemm_type": "dense"}:
            return outputs.copy_(inputs.double() @ weight.T)
        assert compute_config == {"gemm_type": "grouped_contiguous"} and len(expert_layout) == config.num_experts + 1
        for e, (begin, end) in enumerate(zip(expert_layout[:-1], expert_layout[1:], strict=True)):
            outputs[begin:end] = (inputs[begin:end].double() @ weight[e].T).to(outputs.dtype)
        return outputs


@pytest.fixture
def humming(monkeypatch):
    """Our module over the stand-in, and the operators that call it."""
    own = StandIn()
    names = {
        "dtypes": {"DataType": SimpleNamespace(from_str=lambda name: name, from_torch_dtype=lambda dtype: dtype)},
        "forward": {"humming_forward": own.forward},
        "schema": {"HummingWeightSchema": lambda b_dtype, **kw: SimpleNamespace(bits=int(b_dtype[4:]), **kw)},
        "transform": {"prepare_and_transform_humming_tensors": own.prepare},
    }
    for name, content in {"": {}, **names}.items():
        module = ModuleType(f"humming.{name}" if name else "humming")
        module.__dict__.update(content)
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.delitem(sys.modules, MODULE, raising=False)
    own.kernels = importlib.import_module(MODULE)
    monkeypatch.delitem(sys.modules, MODULE)
    monkeypatch.setattr(kernels, "cuda_kernels", lambda: [own.kernels])
    return own


@pytest.mark.parametrize("dtype, tolerance", [(torch.float16, 1e-3), (torch.bfloat16, 8e-3)])
@pytest.mark.parametrize("bits", range(2, 9))
def test_linear(bits, dtype, tolerance, humming, monkeypatch):
    monkeypatch.setattr(kernels, "unpack", None)  # decoding is an error
    q = random_weight((128, 192), bits, 64)
    own, bias = tensors(q), torch.randn(128, generator=torch.Generator().manual_seed(1))
    for count in (1, 17):
        x = torch.randn(2, count, 192, generator=torch.Generator().manual_seed(count)).to(dtype)
        reference = x.double() @ q.dequantize(torch.float64).T + bias.double()
        assert error(kernels._linear_cuda(x, *own, bias, bits, False), reference) < tolerance
    assert kernels._linear_cuda(x[:, :0], *own, bias, bits, False).shape == (2, 0, 128)
    assert humming.num_copies == 1  # kept


@pytest.mark.parametrize("count", [1, 50])
def test_experts(count, humming, monkeypatch):
    """Skipped pairs (ids -1 and 5), an expert without tokens, biases."""
    monkeypatch.setattr(kernels, "unpack", None)
    g = torch.Generator().manual_seed(count)
    up, down = random_weight((5, 256, 128), 3, 32), random_weight((5, 128, 128), 2, 128, seed=1)
    up_bias, down_bias = torch.randn(5, 256, generator=g), torch.randn(5, 128, generator=g)
    ids = torch.stack([torch.randperm(6, generator=g)[:3] for _ in range(count)])
    ids[0, 0] = -1
    ids[ids == 4] = 3
    weights, x = torch.rand(count, 3, generator=g), torch.randn(count, 128, generator=g).half()
    packed = (*tensors(up), up_bias, [3] * 5, *tensors(down), down_bias, [2], True, "silu", False)
    result = kernels._experts_cuda(x, ids, weights, *packed)
    decoded = (q.dequantize(torch.float64) for q in (up, down))
    reference = experts_reference(x, ids, weights, *decoded, up_bias, down_bias, True, "silu")
    assert result.dtype == torch.float16 and error(result, reference) < 2e-3
    assert kernels._experts_cuda(x[:0], ids[:0], weights[:0], *packed).shape == (0, 128)


def test_what_it_does_not_take(humming):
    """float32, odd shapes and groups, experts with bits of their own, one expert of a stack, codes that change."""
    takes, x = humming.kernels.takes, torch.zeros(1, 128, dtype=torch.float16)
    codes, scale, zero_point = tensors(random_weight((128, 128), 3, 64))
    assert takes(x, (codes, scale, 128, 3)) and not takes(x.float(), (codes, scale, 128, 3))
    for rows, width, group in [(100, 128, 64), (128, 96, 32), (128, 384, 48)]:
        odd = tensors(random_weight((rows, width), 3, group))
        assert not takes(x, (odd[0], odd[1], width, 3))
    stack = tensors(random_weight((2, 128, 128), 3, 64))
    assert takes(x, (stack[0], stack[1], 128, 3)) and not takes(x, (stack[0][1], stack[1][1], 128, 3))
    assert not takes(x, (stack[0], stack[1], 128, (2, 3)))
    kernels._linear_cuda(x, codes, scale, zero_point, None, 3, False)
    codes.zero_()
    assert not takes(x, (codes, scale, 128, 3))
    expected = x @ (-zero_point.half() * scale).repeat_interleave(64, -1).T
    torch.testing.assert_close(kernels._linear_cuda(x, codes, scale, zero_point, None, 3, False), expected)


def test_a_copy_goes_with_its_weight(humming):
    codes, *rest = tensors(random_weight((128, 64), 4, 64))
    kernels._linear_cuda(torch.zeros(1, 64).half(), codes, *rest, None, 4, False)
    assert len(humming.kernels._copies) == 1
    del codes
    assert not len(humming.kernels._copies)


@pytest.mark.parametrize("chosen, names", [("humming", ["humming", "triton"]), ("triton", ["triton"]), ("decode", [])])
def test_choosing(chosen, names, monkeypatch):
    monkeypatch.setenv("EACMOE_CUDA", chosen)
    monkeypatch.setattr(kernels, "import_module", lambda name: name)
    assert kernels.cuda_kernels.__wrapped__() == [f"eacmoe_lightning.runtime.{name}_kernels" for name in names]
    monkeypatch.setenv("EACMOE_CUDA", "marlin")
    with pytest.raises(ValueError, match="EACMOE_CUDA='marlin'"):
        kernels.cuda_kernels.__wrapped__()


def test_a_library_that_cannot_be_loaded_leaves_the_next_kernel(monkeypatch):
    def load(name):
        if "humming" in name:
            raise OSError("libnvrtc.so: cannot open shared object file")
        return name

    monkeypatch.setenv("EACMOE_CUDA", "humming")
    monkeypatch.setattr(kernels, "import_module", load)
    assert kernels.cuda_kernels.__wrapped__() == ["eacmoe_lightning.runtime.triton_kernels"]


UNPACK = """
#include <stddef.h>
#include <stdint.h>
#define CUDA_INLINE inline
#define PRAGMA_UNROLL
#define PRAGMA_UNROLL_COUNT(n)
#define MIN(a, b) ((a) < (b) ? (a) : (b))
#define __global__ static
struct { unsigned x; } blockIdx, threadIdx;
#include "pack_weight.cuh"
extern "C" void unpack(uint32_t* in, uint32_t* out, long blocks) {
  for (long i = 0; i < blocks; i++) common_unpack_weight<BITS>(in + i * BITS, out + i * 32);
}
"""


@needs_humming
@pytest.mark.parametrize("bits", range(2, 9))
def test_bits_lie_as_its_own_source_reads_them(bits, tmp_path):
    from eacmoe_lightning.runtime import humming_kernels

    source = Path(HUMMING.origin).parent / "include/humming/kernel/pack_weight.cuh"
    (tmp_path / "humming/utils").mkdir(parents=True)
    (tmp_path / "humming/utils/all.cuh").touch()
    (tmp_path / "pack_weight.cuh").write_text(source.read_text())
    (tmp_path / "unpack.cpp").write_text(UNPACK)
    command = ["g++", "-shared", "-fPIC", f"-I{tmp_path}", f"-DBITS={bits}", tmp_path / "unpack.cpp"]
    subprocess.run([*command, "-o", tmp_path / "unpack.so"], check=True)
    library = ctypes.CDLL(str(tmp_path / "unpack.so"))

    def theirs(words: Tensor) -> Tensor:
        words = words.contiguous()
        out = torch.empty(*words.shape[:-1], words.shape[-1] * 32 // bits, dtype=torch.int32)
        library.unpack(
            ctypes.c_void_p(words.data_ptr()), ctypes.c_void_p(out.data_ptr()), ctypes.c_long(out.numel() // 32)
        )
        return out

    q = random_weight((3, 128, 192), bits, 64)
    made = humming_kernels.humming_tensors(*tensors(q), bits, torch.float16)
    assert torch.equal(theirs(made["weight"]), q.codes.int())
    assert torch.equal(theirs(made["zero_point"].transpose(-1, -2)).transpose(-1, -2), q.zero_point.int())
    assert torch.equal(made["weight_scale"], q.scale)


WITHOUT_GPU = """
import contextlib, sys
from types import SimpleNamespace

import torch

sm = int(sys.argv[1])
torch.version.cuda = "13.0"
torch.cuda.current_device = lambda: 0
torch.cuda.device = lambda device=None: contextlib.nullcontext()
from humming import device

rates = dict.fromkeys(("float16", "bfloat16"), 989.0 if sm == 90 else 312.0)
card = SimpleNamespace(index=0, name="", is_ppu=False, sm_version=sm, sm_major=sm // 10, sm_minor=sm % 10)
card.sm_count, card.memory_bandwidth_gbps = (132, 3350.0) if sm == 90 else (108, 2039.0)
card.max_smem_size, card.default_smem_size = (227 if sm == 90 else 163) << 10, 48 << 10
card.tensorcore_tops, card.max_registers_per_sm, card.l2_cache_size = rates, 65536, 50 << 20
card.max_threads_per_sm, card.max_threads_per_block = 2048, 1024
device.current_device._value, device.current_device._index = card, 0
device.DeviceInfo._instances[0] = device.current_device
"""

SCHEMA = """
from test_kernels import random_weight, tensors

from eacmoe_lightning.runtime import humming_kernels


def prepare(tensors, shape_n, shape_k, weight_schema, num_experts, torch_dtype, device):
    weight_schema.validate_tensors(tensors, shape_n, shape_k, torch_dtype, num_experts)
    assert weight_schema.is_compatible_with(HummingInputSchema(), torch_dtype), weight_schema
    return prepare_layer_config(shape_n, shape_k, weight_schema, num_experts=num_experts, torch_dtype=torch_dtype), {}


from humming.schema import HummingInputSchema
from humming.transform import prepare_layer_config

humming_kernels.prepare_and_transform_humming_tensors = prepare
for bits in range(2, 9):
    for shape in ((128, 192), (3, 128, 192)):
        for dtype in (torch.float16, torch.bfloat16):
            for group in humming_kernels.GROUPS[:2]:
                config = humming_kernels._copy(*tensors(random_weight(shape, bits, group)), bits, dtype)["config"]
                assert config.b_dtype.num_bits == bits and config.weight_scale_group_size == group
"""

COMPILE = """
import json

from humming.dtypes import DataType
from humming.kernel.humming import HummingKernel
from humming.schema import HummingWeightSchema
from humming.transform import prepare_layer_config
from humming.tune import get_heuristics_config

bits, rows, cols, num_experts = map(int, sys.argv[2:])
kinds = DataType.from_str(f"uint{bits}"), DataType.from_torch_dtype(torch.bfloat16)
schema = HummingWeightSchema(b_dtype=kinds[0], bs_dtype=kinds[1], weight_scale_group_size=128, has_zero_point=True)
config = prepare_layer_config(rows, cols, schema, num_experts=num_experts or None, torch_dtype=torch.bfloat16)
kind = "grouped_contiguous" if num_experts else "dense"
tuning = get_heuristics_config(config, shape_m=64, gemm_type=kind, device=0)
made = []
HummingKernel.register_kernel = lambda kernel: made.append(kernel) or setattr(kernel, "kernel_id", 0)
HummingKernel.prepare_kernels(config.to_str(), json.dumps({"gemm_type": kind}), [(0, 1 << 30, tuning)], 0)
with open(made[0].kernel_filename, "rb") as file:
    assert file.read(4) == b"\\x7fELF"
print("compiled", tuning)
"""


def without_gpu(script: str, *words: str, **environment: str) -> str:
    """What a script says that believes in a GPU of compute capability words[0]."""
    paths = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    command = [sys.executable, "-c", WITHOUT_GPU + script, *words]
    environment = os.environ | {"PYTHONPATH": paths, "HUMMING_DISABLE_PARALLEL_BUILD": "1"} | environment
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@needs_humming
def test_its_schema_takes_our_tensors():
    without_gpu(SCHEMA, "80")


@needs_humming
@pytest.mark.slow
@pytest.mark.parametrize("sm", ["80", "90"])
def test_its_kernels_compile_for_our_weights(sm, tmp_path):
    """One grouped kernel of 3 bit; about a minute each."""
    assert "compiled" in without_gpu(COMPILE, sm, "3", "2816", "2048", "60", HUMMING_CACHE_DIR=str(tmp_path))
