"""Packages for a machine that can fetch nothing: collected where there is a network, installed there.

    python benchmarks/gpu.py wheels DIR [--there FILE]    FILE: what `pip list --format=freeze` says on that machine
    python benchmarks/gpu.py install DIR [--target DIR]

What the parts need beside torch, lightning and transformers, with the needs of that in turn, as wheels; nothing that
torch, lightning and transformers bring, and nothing of FILE. `datasets` is left out: all texts are in the package.
Installing never changes what is there: a package that is installed stays, whatever its version.
"""

from __future__ import annotations

import argparse
import email
import re
import subprocess
import sys
import tempfile
import tomllib
import zipfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name, parse_wheel_filename

ROOT = Path(__file__).resolve().parent.parent.parent
LEFT_OUT = {"datasets", "click"}  # of our own needs: the parts do not come to them
OPTIONAL = ["humming-kernels"]
BROUGHT = {  # by torch with CUDA, lightning and transformers; setuptools by Python's tools
    "torch", "triton", "torchvision", "torchaudio", "lightning", "pytorch-lightning", "transformers", "setuptools",
    "lightning-utilities", "numpy", "packaging", "pyyaml", "filelock", "fsspec", "jinja2", "markupsafe", "networkx",
    "sympy", "mpmath", "typing-extensions", "huggingface-hub", "hf-xet", "tokenizers", "safetensors", "regex",
    "requests", "tqdm", "typer", "aiohttp", "torchmetrics", "cuda-bindings", "cuda-pathfinder",
}  # fmt: skip
GLIBC = range(5, 40)  # of the platform tags that are taken


def main(words: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    collecting = commands.add_parser("wheels", help="collect")
    collecting.add_argument("directory", type=Path)
    collecting.add_argument("--there", type=Path, help="packages of the other machine, a NAME==VERSION a line")
    collecting.add_argument("--python", default="3.12", help="version of Python there")
    collecting.add_argument("--machine", default="x86_64", help="processor there: x86_64 or aarch64")
    installing = commands.add_parser("install", help="install")
    installing.add_argument("directory", type=Path)
    installing.add_argument(
        "--target", type=Path, help="directory for the packages, for PYTHONPATH; default: as pip does"
    )
    options = parser.parse_args(words)
    if options.command == "install":
        return install(options.directory, options.target)
    there = options.there.read_text() if options.there else ""
    collect(options.directory, names_in(there) | BROUGHT, options.python, options.machine)
    return 0


def names_in(freeze: str) -> set[str]:
    return {canonicalize_name(re.split(r"[=@\s]", line)[0]) for line in freeze.splitlines() if line[:1].isalnum()}


def needs() -> list[Requirement]:
    """Of this package, as its pyproject.toml says."""
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    found = [Requirement(text) for text in [*declared, *OPTIONAL]]
    return [requirement for requirement in found if canonicalize_name(requirement.name) not in LEFT_OUT]


def collect(directory: Path, there: set[str], python: str, machine: str) -> None:
    """Downloads wheels until nothing is missing."""
    directory.mkdir(parents=True, exist_ok=True)
    environment = {
        "python_version": python, "python_full_version": f"{python}.0", "sys_platform": "linux", "os_name": "posix",
        "platform_system": "Linux", "platform_machine": machine, "implementation_name": "cpython",
        "platform_python_implementation": "CPython",
    }  # fmt: skip
    pending, seen = needs(), set(there)
    while pending:
        requirement = pending.pop()
        name = canonicalize_name(requirement.name)
        if name in seen:
            continue
        seen.add(name)
        wheel = download(requirement, directory, python, machine)
        print(wheel.name, f"{wheel.stat().st_size / 2**20:.1f} MiB", flush=True)
        extras = requirement.extras or {""}
        for needed in requirements_of(wheel):
            if needed.marker is None or any(needed.marker.evaluate(environment | {"extra": e}) for e in extras):
                pending.append(needed)
    print(f"{sum(wheel.stat().st_size for wheel in directory.glob('*.whl')) / 2**20:.1f} MiB in {directory}")


def download(requirement: Requirement, directory: Path, python: str, machine: str) -> Path:
    """The wheel of one package, without its needs (torch would be among them)."""
    platforms = [f"manylinux_2_{minor}_{machine}" for minor in reversed(GLIBC)] + [f"manylinux2014_{machine}"]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    command += ["--python-version", python, "--implementation", "cp"]
    command += [word for platform in platforms for word in ("--platform", platform)]
    with tempfile.TemporaryDirectory(dir=directory) as folder:
        subprocess.run([*command, "--dest", folder, f"{requirement.name}{requirement.specifier}"], check=True)
        (wheel,) = Path(folder).glob("*.whl")
        return wheel.rename(directory / wheel.name)


def requirements_of(wheel: Path) -> list[Requirement]:
    with zipfile.ZipFile(wheel) as content:
        (metadata,) = (name for name in content.namelist() if re.fullmatch(r"[^/]+\.dist-info/METADATA", name))
        fields = email.message_from_bytes(content.read(metadata))
    return [Requirement(text) for text in fields.get_all("Requires-Dist") or []]


def install(directory: Path, target: Path | None) -> int:
    """Installs what is missing, without needs and without a network."""
    missing = []
    for wheel in sorted(directory.glob("*.whl")):
        name, found, *_ = parse_wheel_filename(wheel.name)
        try:
            print(f"{name} {version(name)} is there (here {found})")
        except PackageNotFoundError:
            missing.append(wheel)
    if not missing:
        return 0
    command = [sys.executable, "-m", "pip", "install", "--no-index", "--no-deps", "--no-compile"]
    command += ["--target", str(target)] if target else []
    return subprocess.run([*command, *map(str, missing)]).returncode
