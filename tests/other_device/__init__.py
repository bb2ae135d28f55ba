"""A device that stands in for a GPU where there is none: `other:0` (device.cpp). Importing this registers it.

An operation that gets tensors of two devices is refused there as it is on CUDA, and host code that reads the memory of
its tensors ends the process. So a job that runs on it mixes no devices. It has no kernels of its own, no streams and no
speed: those need a GPU.

It changes torch for the whole process: import it in a process of its own.
"""

from __future__ import annotations

import contextlib
import subprocess
import tempfile
import types
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.accelerators import Accelerator, AcceleratorRegistry
from lightning.pytorch.strategies import SingleDeviceStrategy, StrategyRegistry
from torch.utils import cpp_extension

from eacmoe_lightning.runtime import kernels

SOURCE = Path(__file__).with_name("device.cpp")
DEVICE = torch.device("cpu")  # until it is registered


def reads() -> int:
    """How often the host has waited for a value or a size of the device."""
    return torch.ops.other_device.reads()


class OtherAccelerator(Accelerator):
    """`--trainer.accelerator other`, together with `--trainer.strategy other`."""

    def setup_device(self, device: torch.device) -> None: ...

    def teardown(self) -> None: ...

    def get_device_stats(self, device: Any) -> dict[str, Any]:
        return {}

    @staticmethod
    def parse_devices(devices: Any) -> list[int]:
        return [0]

    @staticmethod
    def get_parallel_devices(devices: Any) -> list[torch.device]:
        return [DEVICE]

    @staticmethod
    def auto_device_count() -> int:
        return 1

    @staticmethod
    def is_available() -> bool:
        return True

    @staticmethod
    def name() -> str:
        return "other"


class OtherStrategy(SingleDeviceStrategy):
    """Lightning takes strangers' accelerators for CPUs, so the strategy has to name the device."""

    strategy_name = "other"

    def __init__(self, accelerator: Accelerator | None = None, **options: Any) -> None:
        super().__init__(device=DEVICE, accelerator=accelerator, **options)


def _build(folder: str) -> Path:
    """The device as a shared library; about half a minute."""
    built = Path(folder) / "other_device.so"
    includes = [word for path in cpp_extension.include_paths() for word in ("-isystem", path)]
    libraries = [f"-L{path}" for path in cpp_extension.library_paths()]
    command = ["c++", "-O1", "-std=c++20", "-fPIC", "-shared", *includes, str(SOURCE), "-o", str(built), *libraries]
    subprocess.run([*command, "-ltorch", "-ltorch_cpu", "-lc10"], check=True)
    return built


def _module() -> types.ModuleType:
    """What torch asks of a device: `torch.other`."""
    made = types.ModuleType("torch.other")
    made.is_available = made.is_initialized = lambda: True
    made.device_count, made.current_device = (lambda: 1), (lambda: 0)
    made.device = lambda device: contextlib.nullcontext()
    made.synchronize = made.manual_seed = made.manual_seed_all = lambda *_: None
    made._is_in_bad_fork = lambda: False
    made.get_rng_state = lambda device=None: torch.empty(0, dtype=torch.uint8)
    made.set_rng_state = lambda state, device=None: None
    made.get_amp_supported_dtype = lambda: [torch.bfloat16, torch.float16]
    return made


def _register() -> torch.device:
    with tempfile.TemporaryDirectory() as folder:
        torch.ops.load_library(_build(folder))
    torch.utils.rename_privateuse1_backend("other")
    torch._register_device_module("other", _module())
    torch.utils.generate_methods_for_privateuse1_backend(for_storage=True)
    kernels._ops.impl("linear", kernels._linear, "PrivateUse1")
    kernels._ops.impl("experts", kernels._experts, "PrivateUse1")
    AcceleratorRegistry.register("other", OtherAccelerator)
    StrategyRegistry.register("other", OtherStrategy)
    return torch.device("other", 0)


DEVICE = _register()
