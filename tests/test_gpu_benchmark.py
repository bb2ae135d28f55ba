"""benchmarks/gpu.py without a GPU: all its parts in miniature, what becomes of failures, and the wheels' way offline.

Needs Triton (`pip install triton`) for the parts; bfloat16 and Humming run on a GPU only.
"""

import importlib.util
import json
import os
import subprocess
import sys
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
SCRIPT = BENCHMARKS / "gpu.py"
TRITON = importlib.util.find_spec("triton")
needs_triton = pytest.mark.skipif(TRITON is None, reason="Triton is not installed: the GPU's code is not tested")
PARTS = ("kernels", "experts", "pesf", "block", "fit", "memory", "formats")


def run(*words: str, code: int = 0) -> str:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "passive", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, SCRIPT, *words], capture_output=True, text=True, env=environment, timeout=900
    )
    assert done.returncode == code, done.stdout[-3000:] + done.stderr[-6000:]
    return done.stdout


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> dict[str, list[dict]]:
    """The rows of each part of a miniature run."""
    output = tmp_path_factory.mktemp("gpu") / "rows.jsonl"
    said = run("--miniature", "--processes", "2", "--output", str(output))
    assert all(f"{part:8s} passed" in said for part in PARTS)
    found = [json.loads(line) for line in output.read_text().splitlines()]
    assert all(row.get("passed", True) and row["miniature"] and row["device"] == "cpu" for row in found)
    return {part: [row for row in found if row["part"] == part] for part in PARTS}


@needs_triton
@pytest.mark.slow
def test_kernels_in_miniature(rows):
    cases = [row["case"] for row in rows["kernels"]]
    assert all(any(f" {bits} bit" in case for case in cases) for bits in range(2, 9))
    assert all(any(word in case for case in cases) for word in ("mixed", "relu", "float16", "candidates", "linear"))
    assert all(row["error"] <= row["bound"] and "failure" not in row for row in rows["kernels"])
    assert any(row["error"] > 1e-8 for row in rows["kernels"])  # it did compute in another precision


@needs_triton
@pytest.mark.slow
def test_experts_and_pesf_in_miniature(rows):
    limits, *measured = rows["experts"]
    assert all(value > 0 for value in limits["limits"].values())
    backends = {(row["shape"], row["tokens"], row["backend"], row["bits"]) for row in measured}
    each = [("grouped_mm", 16), *(("triton", bits) for bits in (2, 3, 4))]
    assert backends == {(s, n, *backend) for s in ("qwen3",) for n in (1, 3) for backend in each}
    assert all(row["ms"] > 0 and row["wall_ms"] > 0 and 0 < row["limit_share"] < 1 for row in measured)
    assert {(row["backend"], row["alpha"]) for row in rows["pesf"]} == {
        (backend, alpha) for backend in ("bf16", "triton 3 bit") for alpha in (0.0, 0.3, 0.7)
    }
    by_alpha = {a: [r["pairs_dropped"] for r in rows["pesf"] if r["alpha"] == a] for a in (0.0, 0.3, 0.7)}
    assert max(by_alpha[0.0]) == 0 and max(by_alpha[0.7]) > 0.05
    pairs = zip(by_alpha[0.3], by_alpha[0.7], strict=True)
    assert all(mild <= strong for mild, strong in pairs)


@needs_triton
@pytest.mark.slow
def test_block_fit_and_memory_in_miniature(rows):
    block = {row["what"]: row for row in rows["block"]}
    assert block["block"]["tokens"] == 32 and 0 < block["block"]["error"] < 1
    phases = {row["phase"] for row in rows["block"] if row["what"] == "phase"}
    assert phases >= {"read", "observe", "attention", "router", "experts", "replay"}
    solved = [row["error"] for row in rows["block"] if row["what"] == "GPTQ"]
    assert len(solved) == 4 and len(set(solved)) == 1
    assert {row["loop"] for row in rows["block"] if row["what"] == "column loop"} == {"triton", "torch"}
    sides = {row["side"]: row for row in rows["fit"] if "side" in row}
    texts = {row["text"]: row for row in rows["fit"] if "text" in row}
    assert set(sides) == {"gpu", "cpu"} and set(texts) == {"prose"}
    assert sides["gpu"]["seconds"]["experts"] > 0
    assert texts["prose"]["gpu"]["compressed"] == sides["gpu"]["perplexity"]["prose"]["compressed"] > 1
    models = [(row["model"], row["bits"]) for row in rows["memory"] if "bits" in row]
    assert models == [(name, bits) for name in ("bundled", "qwen3, 2 blocks") for bits in (16, 3)]
    assert rows["memory"][1]["file_bytes"] < 0.3 * rows["memory"][0]["file_bytes"]
    assert 0 < rows["memory"][-1]["logits_error"] < 1e-5  # Triton's products beside decoded weights
    products = [(r["format"], r["bits"], r["symmetric"]) for r in rows["formats"] if r["reader"] == "decoded"]
    assert len(set(products)) == len(products) == 2 * 7 * 2


def test_without_a_gpu_it_says_what_to_do():
    done = subprocess.run(
        [sys.executable, SCRIPT, "kernels"],
        capture_output=True,
        text=True,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
        timeout=100,
    )
    assert done.returncode == 1 and "--miniature" in done.stderr
    assert (
        "the parts are kernels, experts"
        in subprocess.run([sys.executable, SCRIPT, "kernel"], capture_output=True, text=True, timeout=100).stderr
    )


# --- the machinery, in this process -----------------------------------------------------------------------------------


@pytest.fixture
def gpu(monkeypatch):
    """The script as a module."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import gpu

    return gpu


def test_a_part_that_fails_is_written_and_told(gpu, monkeypatch, tmp_path, capfd):
    options = gpu.parser().parse_args(["--miniature", "--output", str(tmp_path / "rows")])
    monkeypatch.setattr(gpu.importlib, "import_module", lambda name: failing)
    assert not gpu.run("fit", options, gpu_device())
    first, second = map(json.loads, (tmp_path / "rows").read_text().splitlines())
    assert first["value"] == 1 and "no luck" in second["error"] and not second["passed"]
    assert "no luck" in capfd.readouterr().err


def gpu_device():
    from gpu_parts.device import Device

    return Device(torch.device("cpu"), True)


class failing:
    @staticmethod
    def rows(options, device):
        yield {"value": 1}
        raise ArithmeticError("no luck")

    @staticmethod
    def line(row) -> str:
        return str(row)


def test_a_part_is_ended_at_its_limit_with_all_that_it_started(gpu, monkeypatch, tmp_path):
    script = tmp_path / "part.py"
    script.write_text(
        "import subprocess, sys, time\n"
        f"p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        f"open({str(tmp_path / 'pid')!r}, 'w').write(str(p.pid))\n"
        "time.sleep(60)\n"
    )
    monkeypatch.setattr(gpu, "__file__", str(script))
    assert not gpu.run_alone("fit", [], 3.0)
    for code in (0, 3):
        script.write_text(f"raise SystemExit({code})")
        assert gpu.run_alone("fit", [], 60.0) == (code == 0)
    state = Path(f"/proc/{(tmp_path / 'pid').read_text()}/stat")
    assert not state.exists() or state.read_text().split()[2] == "Z"


def test_a_process_in_which_cuda_failed_runs_no_further_case(gpu, monkeypatch):
    from gpu_parts import kernels

    case = kernels.Case("triton", (8, 16), (1,), 3, "float32", 16)
    monkeypatch.setattr(kernels, "_broken", "")

    def fail(case):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(kernels, "_module", fail)
    row = kernels.check(case, gpu_device())
    assert not row["passed"] and "illegal memory access" in kernels.line(row)
    assert kernels.check(case, gpu_device()) is None


def test_the_worst_row_counts(gpu):
    """By hand: the second row is off by 0.3 of its norm 5, the third should be zero and is."""
    from gpu_parts.kernels import _worst

    expected = torch.tensor([[1.0, 0.0], [3.0, 4.0], [0.0, 0.0]]).double()
    result = expected.clone()
    result[1, 0] += 1.5
    assert _worst(result, expected) == pytest.approx(0.3)
    result[2, 0] = 1e-30
    assert _worst(result, expected) == float("inf")
    result[0, 0] = float("nan")
    assert _worst(result, expected) == float("inf")


def make_wheel(folder: Path, name: str, needs: list[str]) -> Path:
    path = folder / f"{name}-1.0-py3-none-any.whl"
    info = f"{name}-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr(f"{name}.py", "value = 7\n")
        metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n"
        wheel.writestr(f"{info}/METADATA", metadata + "".join(f"Requires-Dist: {need}\n" for need in needs))
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    return path


def test_collecting_follows_needs_and_leaves_torch_out(gpu, monkeypatch, tmp_path):
    from gpu_parts import wheels

    needs = {"alpha": ["beta>=2", "torch>=2", 'gamma; extra == "more"', 'delta; python_version < "3.12"'], "beta": []}
    asked = []

    def download(requirement, directory, python, machine):
        asked.append(str(requirement))
        return make_wheel(directory, requirement.name, needs[requirement.name])

    monkeypatch.setattr(wheels, "download", download)
    monkeypatch.setattr(wheels, "needs", lambda: [wheels.Requirement("alpha"), wheels.Requirement("numpy")])
    wheels.collect(tmp_path, wheels.BROUGHT, "3.12", "x86_64")
    assert asked == ["alpha", "beta>=2"]
    assert wheels.names_in("# comment\nPy_Yaml==1.0\nzipp @ file:///x\n") == {"py-yaml", "zipp"}


def test_our_needs_are_those_of_the_package(gpu):
    from gpu_parts import wheels

    names = {requirement.name for requirement in wheels.needs()} - wheels.BROUGHT
    assert {"jsonargparse", "pysz", "zstandard", "constriction", "humming-kernels"} <= names
    assert not names & {"torch", "transformers", "lightning", "datasets"}


def test_installing_without_a_network(tmp_path):
    """What is there stays; what is missing comes from its wheel, without its needs."""
    make_wheel(tmp_path, "eacmoe_probe", ["surely_missing>=3"])
    make_wheel(tmp_path, "torch", [])
    said = run("install", str(tmp_path), "--target", str(tmp_path / "site"))
    assert f"torch {version('torch')} is there (here 1.0)" in said
    assert (tmp_path / "site" / "eacmoe_probe.py").exists() and not (tmp_path / "site" / "torch.py").exists()
