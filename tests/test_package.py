"""The package as people install it: the console command, configs by name, and how OpenMP threads wait.

`.ci/wheel` proves the same for a wheel in an environment of its own.
"""

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import jobs
import pytest
import yaml
from jsonargparse import auto_parser

from eacmoe_lightning.cli import FUNCTIONS, main
from eacmoe_lightning.commands.analyze import analyze
from eacmoe_lightning.commands.configs import NamedConfigParser, config_names, find_config
from eacmoe_lightning.commands.fit import parse_fit

pytestmark = pytest.mark.filterwarnings("ignore:LightningCLI's args", "ignore:.*deprecated")
PROJECT = tomllib.loads((jobs.ROOT / "pyproject.toml").read_text())["project"]
STUDY = "study-"  # how the names of configs of `study` begin
NAMES = [
    "deepseek-moe-16b",
    "deepseek-v2-lite",
    "glm-4.5-air",
    "gpt-oss-20b",
    "granite-4.0-h-small",
    "minimax-m2",
    "mixtral-8x7b",
    "olmoe-1b-7b",
    "phi-3.5-moe",
    "qwen1.5-moe",
    "qwen3-30b-a3b",
    "qwen3.6-35b-a3b",
    "study-tiny",
    "tiny",
    "tiny-2.06",
    "tiny-2.54",
]


# --- the console command


def test_one_console_command():
    """Never `lightning`, which is another program's."""
    assert PROJECT["scripts"] == {"eacmoe": "eacmoe_lightning.cli:main"}


@pytest.mark.parametrize("words", [[], ["--help"]])
def test_help_names_every_command(words, capsys):
    main(words)
    said = capsys.readouterr().out
    commands = "fit validate test predict plan report table serve chat analyze export prune study"
    for command in commands.split():
        assert f"\n{command} " in said


def test_version(capsys):
    main(["--version"])
    assert capsys.readouterr().out.strip() == PROJECT["version"]


def test_an_unknown_command(capsys):
    with pytest.raises(SystemExit) as end:
        main(["fitt", "--config", "tiny"])
    assert end.value.code == 1
    said = capsys.readouterr().err
    assert "there is no command fitt: fit, validate, test, predict, plan, sensitivity, report, table" in said


# --- configs


def test_shipped_configs_are_those_of_the_folder():
    assert config_names() == NAMES
    assert config_names() == sorted(path.stem for path in (jobs.ROOT / "configs").glob("*.yaml"))


@pytest.mark.parametrize("name", NAMES)
def test_every_shipped_config_parses(name, tmp_path, monkeypatch):
    """By its name, in a directory without configs."""
    monkeypatch.chdir(tmp_path)
    values = yaml.safe_load((jobs.ROOT / "configs" / f"{name}.yaml").read_text())
    if name.startswith(STUDY):
        parser = auto_parser(FUNCTIONS["study"], as_positional=False, parser_class=NamedConfigParser)
        parsed = parser.parse_args(["--config", name])
        assert {key: parsed[key] for key in values} == values
    else:
        module, data, run = parse_fit(["--config", name])
        assert module.name_or_path == values["model"]["name_or_path"] == data.tokenizer
        assert values["trainer"]["default_root_dir"] == f"runs/{name}"
        assert run == str(tmp_path / "runs" / name)  # absolute, so that the run is found from another directory


@pytest.mark.parametrize("name", NAMES)
def test_header_has_the_command(name):
    command = "study" if name.startswith(STUDY) else "fit"
    assert f"#   eacmoe {command} --config {name}\n" in (jobs.ROOT / "configs" / f"{name}.yaml").read_text()


def test_a_file_wins(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny").mkdir()  # a directory does not
    assert Path(find_config("tiny")).samefile(jobs.ROOT / "configs" / "tiny.yaml")
    (tmp_path / "tiny").rmdir()
    (tmp_path / "tiny").write_text("trainer:\n  default_root_dir: runs/mine\n")
    assert find_config("tiny") == "tiny"
    assert parse_fit(["--config", "tiny"])[2] == str(tmp_path / "runs" / "mine")


def test_a_config_may_be_yaml_itself():
    words = ["--config", "tiny-2.06", "--config", "{trainer: {default_root_dir: runs/mine}}"]
    assert parse_fit(words)[2] == str(Path("runs/mine").absolute())


@pytest.mark.parametrize(
    "words, option",
    [
        (["fit", "--config", "tinny"], "--config"),
        (["validate", "--config", "tinny"], "--config"),
        (["plan", "--config", "tinny"], "--config"),
        (["study", "--config", "tinny"], "--config"),
        (["fit", "-c", "tinny"], "--config"),
        (["analyze", "--model", "bundled", "--output", "none", "--cross", "tinny"], "--cross"),
        (["fit", "--config", "tinny/tiny.yaml"], "--config"),
    ],
)
def test_an_unknown_config_is_one_error_with_the_names(words, option, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        main(words)
    said = capsys.readouterr().err
    assert end.value.code == 1 and said.count("error: ") == 1 and "usage" not in said
    assert "there is no config tinny" in said and f"({option})" in said and ", ".join(NAMES) in said
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["fit", "validate", "study"])
def test_help_of_config_lists_the_names(command, capsys):
    with pytest.raises(SystemExit) as end:
        main([command, "--help"])
    assert end.value.code == 0
    assert ",".join(NAMES) in "".join(capsys.readouterr().out.split())  # argparse breaks lines after hyphens


def test_cross_takes_a_name(tmp_path):
    with pytest.raises(FileNotFoundError, match="/no/such/model"):  # what is wrong is not the config
        analyze("/no/such/model", str(tmp_path / "none"), cross="tiny-2.06")


# --- how threads wait


def run(script: str, **variables: str) -> tuple[str, str]:
    """Output and errors of a Python script in a process with these variables; libgomp says there what it took."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    kept |= {"PYTHONPATH": str(jobs.ROOT), "OMP_DISPLAY_ENV": "verbose"} | variables
    done = subprocess.run(
        [sys.executable, "-c", script], env=kept, cwd=jobs.ROOT, capture_output=True, text=True, check=True
    )
    return done.stdout.strip(), done.stderr


BRIEF = "1000"
COUNT = "import os; print(os.environ.get('GOMP_SPINCOUNT'), eacmoe_lightning.waiting.spins())"
WITH_LOG = "import logging; logging.basicConfig(level=logging.INFO); "


@pytest.mark.parametrize(
    "first, variables, count, spins",
    [
        ("", {}, f"{BRIEF} False", BRIEF),
        ("", {"OMP_WAIT_POLICY": "active"}, "None True", "30000000000"),
        ("", {"OMP_WAIT_POLICY": "passive"}, "None False", "0"),
        ("", {"GOMP_SPINCOUNT": "20"}, "20 False", "20"),
        ("import torch; ", {}, "None True", "300000"),
    ],
)
def test_threads_wait_briefly_unless_the_user_chose(first, variables, count, spins):
    said, errors = run(f"{WITH_LOG}{first}import eacmoe_lightning; {COUNT}", **variables)
    assert said == count
    if "GOMP_SPINCOUNT" in errors:  # other OpenMP libraries do not print it
        assert f"GOMP_SPINCOUNT = '{spins}'" in errors
    # a program that loaded torch first is told what it can do, and not as a warning
    assert errors.count("INFO:eacmoe_lightning:torch was loaded before eacmoe_lightning") == bool(first)


def test_the_command_line_sets_it():
    start = "import runpy, sys; sys.argv = ['train.py', '--version']; runpy.run_path('train.py', run_name='__main__')"
    assert run(f"{start}; import eacmoe_lightning; {COUNT}")[0].split() == [PROJECT["version"], BRIEF, "False"]
