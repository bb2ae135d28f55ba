"""Code that comes with a model runs only on the user's word."""

import os
import subprocess
import sys
from pathlib import Path

import jobs
from changed_models import changed
from transformers import AutoModelForCausalLM

CODE = """
from transformers import MixtralConfig, MixtralForCausalLM

open("ran", "w").close()

class OwnConfig(MixtralConfig):
    model_type = "own_moe"

class OwnForCausalLM(MixtralForCausalLM):
    config_class = OwnConfig
"""
AUTO_MAP = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"}
SCRIPT = """
import sys
from eacmoe_lightning import load
from eacmoe_lightning.cli import main
{setup}
main(sys.argv[1:])
"""
REGISTERS = """
from transformers import AutoConfig, AutoModelForCausalLM
from own import OwnConfig, OwnForCausalLM
AutoConfig.register("own_moe", OwnConfig)
AutoModelForCausalLM.register(OwnConfig, OwnForCausalLM)
"""


def own(out: Path, tiny: Path) -> Path:
    """A model of a type that only code beside it knows, with stacked experts on disk."""
    stacked = dict(AutoModelForCausalLM.from_pretrained(tiny).state_dict())
    changed(tiny, out, lambda _: stacked, model_type="own_moe", auto_map=AUTO_MAP)
    (out / "own.py").write_text(CODE)
    return out


def run(folder: Path, words: list[str], setup: str = "", **environment: str) -> str:
    """The output of a command in its own process, started in `folder`, which answers no question."""
    (folder / "script.py").write_text(SCRIPT.format(setup=setup))
    path = os.pathsep.join([str(jobs.ROOT), str(folder)])
    done = subprocess.run(
        [sys.executable, "script.py", *words],
        cwd=folder, env={**os.environ, "PYTHONPATH": path, "HF_MODULES_CACHE": str(folder / "modules")},
        stdin=subprocess.DEVNULL, capture_output=True, text=True,
    )  # fmt: skip
    return done.stdout + done.stderr


def test_code_of_a_model_runs_only_on_the_users_word(tiny_model_dir, tmp_path):
    folder = own(tmp_path / "model", tiny_model_dir("mixtral"))
    small = {"model__joint_epochs": 0, "data__num_windows": 4, "data__num_heldout_windows": 1}
    words = ["fit", *jobs.options(folder, tmp_path / "run", **small)]
    output = run(tmp_path, words)
    assert "--model.trust_remote_code true" in output and "auto_map" in output, output
    assert "Traceback" not in output and "y/N" not in output and not (tmp_path / "ran").exists()

    output = run(tmp_path, [*words, "--model.trust_remote_code", "true"])
    assert "perplexity" in output and (tmp_path / "run" / "report.json").exists(), output
    assert (tmp_path / "ran").exists()


def test_classes_that_are_registered_first_need_no_trust(tiny_model_dir, tmp_path):
    folder = own(tmp_path / "model", tiny_model_dir("mixtral"))
    (tmp_path / "own.py").write_text(CODE)
    output = run(tmp_path, ["plan", *jobs.options(folder, tmp_path / "run")], REGISTERS)
    assert "3 blocks" in output, output
