"""Runs the quick tests on the lowest versions that pyproject.toml allows, in an environment made for it.

    python scripts/lowest_versions.py
    python scripts/lowest_versions.py transformers==5.17.0 torch==2.11.0     # these two, and the lowest of all others
    python scripts/lowest_versions.py --environment ~/lowest -- tests/test_streaming.py -x

A requirement on the command line takes the place of the lowest version of its package. What follows `--` goes to
pytest, in the place of `-m "not slow"`. The environment is kept if it is named, and used again if it is there already.
Everything comes from the package index; torch is then a CUDA build that takes about 8 GB of disk, but needs no GPU.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import tomllib
import venv
from importlib.metadata import distributions
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
REQUIREMENT = re.compile(r"(?P<name>[A-Za-z0-9._-]+)(?:\[[^\]]*\])?\s*(?P<versions>[^;]*)")


def lowest_versions(pyproject: Path = ROOT / "pyproject.toml") -> dict[str, str]:
    """The lowest version of each package that the project needs, also for its exports: `>=2.10,<2.16` gives 2.10.

    Raises:
        ValueError: a requirement has no lower bound.
    """
    project = tomllib.loads(pyproject.read_text())["project"]
    lowest = {}
    for requirement in project["dependencies"] + project["optional-dependencies"]["export"]:
        name, versions = REQUIREMENT.match(requirement).group("name", "versions")
        bound = re.search(r"(?:>=|==|~=)\s*([0-9][0-9.a-z]*?)(?:\.\*)?\s*(?:,|$)", versions)
        if bound is None:
            raise ValueError(f"{requirement!r} in pyproject.toml has no lower bound")
        lowest[name] = bound[1]
    return lowest


def main(arguments: list[str]) -> int:
    at = arguments.index("--") if "--" in arguments else len(arguments)
    own, tests = arguments[:at], arguments[at + 1 :] or ["-m", "not slow"]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("requirements", nargs="*", help="such as transformers==5.17.0")
    parser.add_argument("--environment", type=Path, help="folder of the virtual environment")
    options = parser.parse_args(own)
    constraints = {name: f"{name}=={version}" for name, version in lowest_versions().items()}
    constraints |= {REQUIREMENT.match(requirement)["name"]: requirement for requirement in options.requirements}
    with tempfile.TemporaryDirectory() as scratch:
        environment = options.environment or Path(scratch) / "environment"
        if not environment.exists():
            venv.create(environment, with_pip=True)
        python = environment / "bin" / "python"
        file = Path(scratch) / "lowest.txt"
        file.write_text("\n".join(constraints.values()) + "\n")
        subprocess.run([python, "-m", "pip", "install", "-q", "-c", file, "-e", f"{ROOT}[test]"], check=True)
        _print_versions(environment, constraints)
        return subprocess.run([python, "-m", "pytest", "-q", "-rs", *tests], cwd=ROOT).returncode


def _print_versions(environment: Path, names: dict[str, str]) -> None:
    (packages,) = environment.glob("lib/python*/site-packages")
    installed = {_normal(found.name): found.version for found in distributions(path=[str(packages)])}
    for name in names:
        print(f"{name} {installed[_normal(name)]}")
    print(flush=True)


def _normal(name: str) -> str:
    return re.sub("[-_.]+", "-", name).lower()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
