"""Code that comes with a model runs only on the user's word."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jobs
import pytest
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
SMALL = {"model__joint_epochs": 0, "data__num_windows": 4, "data__num_heldout_windows": 1}
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


def own(out: Path, tiny: Path, folder: str = "") -> Path:
    """A model of a type that only code beside it, or in a folder there, knows, with stacked experts on disk."""
    stacked = dict(AutoModelForCausalLM.from_pretrained(tiny).state_dict())
    auto_map = {auto: f"{folder}{reference}" for auto, reference in AUTO_MAP.items()}
    changed(tiny, out, lambda _: stacked, model_type="own_moe", auto_map=auto_map)
    (out / folder).mkdir(exist_ok=True)
    (out / folder / "own.py").write_text(CODE)
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
    words = ["fit", *jobs.options(folder, tmp_path / "run", **SMALL)]
    output = run(tmp_path, words)
    assert "--model.trust_remote_code true" in output and "auto_map" in output, output
    assert "Traceback" not in output and "y/N" not in output and not (tmp_path / "ran").exists()

    output = run(tmp_path, [*words, "--model.trust_remote_code", "true"])
    assert "perplexity" in output and (tmp_path / "run" / "report.json").exists(), output
    assert (tmp_path / "ran").exists()


TOGETHER = """
import torch
from transformers import AutoModelForCausalLM
ours = load("run", trust_remote_code=True)
assert type(ours).__name__ == "OwnForCausalLM"
ids = torch.arange(8)[None]
for folder, limit in (("run/compressed", 0), ("dense", 1e-5)):
    theirs = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    assert (ours(ids).logits - theirs(ids).logits).abs().max() <= limit
"""


@pytest.mark.parametrize("beside", ["", "code/"])
def test_a_result_carries_its_code_and_is_not_mixed_up_with_another(beside, tiny_model_dir, tmp_path):
    folder, other = (own(tmp_path / name, tiny_model_dir("mixtral"), beside) for name in ("model", "other"))
    (other / beside / "own.py").write_text(CODE + "\nCHANGED = True\n")
    trust = ["--trust_remote_code", "true"]
    words = ["fit", *jobs.options(folder, tmp_path / "run", **SMALL), "--model.trust_remote_code", "true"]
    assert "perplexity" in run(tmp_path, words)
    folder.rename(tmp_path / "gone")
    dense = ["export", "--source", "run", "--output", "dense", "--format", "dense"]
    assert "--trust_remote_code true" in run(tmp_path, dense) and not (tmp_path / "dense").exists()
    assert "tensors compared" in (output := run(tmp_path, [*dense, *trust])), output
    output = run(tmp_path, ["analyze", "--model", str(other), "--output", "out", *trust], TOGETHER)
    assert "open each model in a process of its own" in output and "AssertionError" not in output, output


TOKENIZER = """
from transformers import PreTrainedTokenizerFast

class OwnTokenizer(PreTrainedTokenizerFast):
    def _encode_plus(self, *args, **kwargs):
        open("ran", "w").close()
        return super()._encode_plus(*args, **kwargs)
"""


def test_a_tokenizer_with_code_travels_with_a_model_that_transformers_knows(tiny_model_dir, tmp_path):
    folder, trust = tmp_path / "model", ["--trust_remote_code", "true"]
    shutil.copytree(tiny_model_dir("mixtral"), folder)
    (folder / "own.py").write_text(TOKENIZER)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config |= {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": [None, "own.OwnTokenizer"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    words = ["fit", *jobs.options(folder, tmp_path / "run", **SMALL), "--model.trust_remote_code", "true"]
    assert "perplexity" in (output := run(tmp_path, words)), output
    folder.rename(tmp_path / "gone")
    small = [*trust, "--output", "out", "--num_windows", "2", "--window_length", "64"]
    for command in (
        ["analyze", "--texts", "{prose: 'bundled:prose[:10%]'}"],
        ["study", "--heldout", "{prose: 'bundled:prose[:10%]'}", "--bounds", "0.01", "--num_questions", "0"],
        ["prune", "--texts", "{prose: 'bundled:prose[:10%]'}", "--num_heldout_windows", "2", "--pruning.keep", "3"],
    ):
        (tmp_path / "ran").unlink()
        output = run(tmp_path, [*command, "--model", "run", *small])
        assert "error" not in output and (tmp_path / "ran").exists(), output
        shutil.rmtree(tmp_path / "out")


def test_classes_that_are_registered_first_need_no_trust(tiny_model_dir, tmp_path):
    folder = own(tmp_path / "model", tiny_model_dir("mixtral"))
    (tmp_path / "own.py").write_text(CODE)
    output = run(tmp_path, ["plan", *jobs.options(folder, tmp_path / "run")], REGISTERS)
    assert "3 blocks" in output, output
