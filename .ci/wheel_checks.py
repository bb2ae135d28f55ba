"""What holds in the environment that `.ci/wheel` made, and for its sdist and wheel: `wheel_checks.py PLACE`."""

import sys
import tarfile
import zipfile
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path

import torch
import yaml
from transformers import AutoTokenizer

import eacmoe_lightning
from eacmoe_lightning.commands.configs import SHIPPED, config_names
from eacmoe_lightning.quantization import column_loop
from eacmoe_lightning.runtime import kernels

CHECKOUT, PLACE = Path(__file__).resolve().parent.parent, Path(sys.argv[1])


def names_in(archive: Path) -> set[str]:
    """Files of the sdist, without its folder, or of the wheel."""
    if archive.suffix == ".whl":
        return set(zipfile.ZipFile(archive).namelist())
    with tarfile.open(archive) as opened:
        return {member.name.partition("/")[2] for member in opened if member.isfile()}


# The package is the installed one, and nothing generic came with it.
assert Path(eacmoe_lightning.__file__).is_relative_to(PLACE / "environment"), eacmoe_lightning.__file__
for generic in ("callbacks", "configs", "tests", "benchmarks", "docs", "train", "recipes", "examples"):
    assert find_spec(generic) is None, find_spec(generic)
scripts = [e.name for e in entry_points(group="console_scripts") if e.dist.name == "eacmoe-lightning"]
assert scripts == ["eacmoe"], scripts

# Configs and kernels are in the archives, and in the package.
(sdist,), (wheel,) = (PLACE / "dist").glob("*.tar.gz"), (PLACE / "dist").glob("*.whl")
in_sdist, in_wheel = names_in(sdist), names_in(wheel)
in_checkout = {path.name for path in (CHECKOUT / "configs").rglob("*.yaml")}
for names in (in_sdist, in_wheel):
    assert in_checkout == {Path(name).name for name in names if name.startswith("eacmoe_lightning/configs/")}
assert config_names() == sorted(path.stem for path in (CHECKOUT / "configs").glob("*.yaml"))
for name in config_names():
    assert yaml.safe_load((SHIPPED / f"{name}.yaml").read_text())
sources = {f"eacmoe_lightning/csrc/{path.name}" for path in (CHECKOUT / "eacmoe_lightning" / "csrc").iterdir()}
assert any(name.endswith(".h") for name in sources) and sources <= in_sdist, sources - in_sdist
assert not [name for name in in_sdist if name.endswith(".so")]
for library in ("runtime/_kernels", "quantization/_column_loop"):
    assert [name for name in in_wheel if name.startswith(f"eacmoe_lightning/{library}.") and name.endswith(".so")]
assert kernels.library() is not None and column_loop.library() is not None

# The model loads and generates.
model = eacmoe_lightning.load("runs/tiny")
tokenizer = AutoTokenizer.from_pretrained("runs/tiny/compressed")
with torch.inference_mode():
    output = model.generate(**tokenizer("The whale", return_tensors="pt"), max_new_tokens=8)
assert output.shape[1] > 8
print(tokenizer.decode(output[0]))
