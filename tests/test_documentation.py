"""What README, docs and CONTRIBUTING tell people to type works.

Commands are parsed as the command line would parse them, and run nothing: a documented run takes minutes. Configs,
files and options in them have to exist, also those in the running text. Python runs, on a small run of the bundled
model; a snippet that begins with a comment such as `# my_losses.py` is a file of this name, which commands may name.
A block that cannot run (a hub, a GPU) says so in a comment right before it: `<!-- not run: needs a hub -->`.
"""

import ast
import inspect
import re
import tomllib
from collections.abc import Iterator
from contextlib import redirect_stdout
from functools import cache
from importlib.util import find_spec
from io import StringIO
from pathlib import Path

import documents
import jobs
import pytest
import yaml
from jsonargparse import auto_parser
from torch.distributed.run import get_args_parser
from torch.utils.tensorboard import SummaryWriter
from transformers import AutoTokenizer

import eacmoe_lightning
from eacmoe_lightning.cli import COMMANDS, FUNCTIONS, main
from eacmoe_lightning.commands.chat import options as chat_options
from eacmoe_lightning.commands.configs import NamedConfigParser, config_names, find_config
from eacmoe_lightning.commands.fit import ParsedOnly, parse_fit
from eacmoe_lightning.commands.plan import options as plan_options
from eacmoe_lightning.commands.report import options as report_options
from eacmoe_lightning.commands.sensitivity import options as sensitivity_options
from eacmoe_lightning.commands.serve import options as serve_options
from eacmoe_lightning.commands.table import options as table_options
from eacmoe_lightning.commands.table_file import read_table, refuse_overridden
from eacmoe_lightning.quantization.quantizers import Quantizer
from eacmoe_lightning.routers.losses import RouterLoss
from eacmoe_lightning.text.sampled import sampled_source
from eacmoe_lightning.text.sources import bundled_names

pytestmark = pytest.mark.filterwarnings("ignore:LightningCLI's args", "ignore:.*deprecated", "ignore:.*was deprecated")
PATHS = [path for place in (jobs.ROOT, jobs.ROOT / "docs") for path in sorted(place.glob("*.md"))]
PATHS = [path for path in PATHS if path.name != "CHANGELOG.md"]  # history, as the pages of findings are
PATHS += [jobs.ROOT / "docs" / "findings" / "README.md"]
DOCUMENTS = {name: documents.read(jobs.ROOT / name, name) for name in (str(p.relative_to(jobs.ROOT)) for p in PATHS)}
BLOCKS = [block for blocks, _ in DOCUMENTS.values() for block in blocks]
SHELL, PYTHON = ("bash", "sh", "shell", "console"), ("python", "py")
# other people's: taken as they are
GIVEN = ("git", "cd", ".", "source", "ruff", "tensorboard", "export", "mkdir", "scancel", "scontrol", "vllm")
GIVEN += ("transformers", "llama-server", "curl")
OURS = ("eacmoe", "python", "python3", "torchrun", "fabric", "srun", "sbatch", "pytest", "pip")
LAUNCHERS = ("fabric run", "python train.py")  # without what they launch
INPUTS = ("model", "source", "evaluate", "name_or_path", "predict", "calibration", "heldout", "texts", "cross")
BASES = {"--model.router_loss": RouterLoss, "--model.quantizer": Quantizer}  # their arguments are options too
OPTION = re.compile(r"(?<![\w-])--[A-Za-z][\w.-]*(?:\*)?")
MODULE = re.compile(r"# (\w+\.py)\n")  # how a snippet begins that is a file
PLACEHOLDER = re.compile(r"[A-Z_]{2,}(:\d+)?|[A-Z]")  # FILE, HOST:29500, N
PROJECT = tomllib.loads((jobs.ROOT / "pyproject.toml").read_text())["project"]


def is_shell(block: documents.Block) -> bool:
    """Blocks without a language are, where they begin like a command of ours."""
    return block.language in SHELL or (not block.language and block.text.split(maxsplit=1)[0] in OURS)


@cache
def all_commands() -> list[documents.Command]:
    """Those of all shell blocks that are not exempt."""
    shell = [block for block in BLOCKS if is_shell(block) and block.exemption is None]
    return [command for block in shell for command in documents.commands(block.text, str(block))]


def python_blocks(document: str) -> list[documents.Block]:
    """The snippets of a document that run; those of the API page are signatures."""
    if document == "docs/api.md":
        return []
    return [block for block in DOCUMENTS[document][0] if block.language in PYTHON and block.exemption is None]


# --- what is checked


def check(words: tuple[str, ...]) -> None:
    """Fails unless the command could be typed.

    Raises:
        AssertionError, ValueError, OSError: with what is wrong.
    """
    program, rest = words[0], words[1:]
    if program == "eacmoe":
        parse(rest)
    elif program in ("python", "python3") and rest[0] == "-m":
        assert rest[1].partition(".")[0] in ("build", "venv", *GIVEN) or find_spec(rest[1]), rest[1]
    elif program in ("python", "python3"):
        assert Path(rest[0]).is_file(), rest[0]
        if rest[0] == "train.py":
            parse(rest[1:])
        else:
            assert options_in(rest[1:]) <= script_options(rest[0]), sorted(script_options(rest[0]))
    elif program == "torchrun":
        launched = get_args_parser().parse_args(rest)
        check((*([] if launched.no_python else ["python"]), launched.training_script, *launched.training_script_args))
    elif program == "fabric":
        from lightning.fabric.cli import _run

        assert rest[0] == "run"
        launched = _run.make_context("run", list(rest[1:])).params
        check(("python", launched["script"], *launched["script_args"]))
    elif program == "srun":
        check(rest[next(i for i, word in enumerate(rest) if word in OURS) :])
    elif program == "sbatch":
        script = next(i for i, word in enumerate(rest) if word.endswith(".sh"))
        assert Path(rest[script]).is_file(), rest[script]
        parse(("fit", *rest[script + 1 :]))
    elif program == "pip":
        check_pip(rest)
    elif program == "pytest":
        assert all(Path(word.partition("::")[0]).exists() for word in rest if "/" in word or word.endswith(".py"))
    else:
        assert program in GIVEN or Path(program).is_file(), f"{program}: not known here"


def parse(words: tuple[str, ...]) -> None:
    """Parses the words of `eacmoe` to objects, without a run, and looks for the files that they name."""
    command, rest = words[0], list(words[1:])
    assert command in COMMANDS, f"{command} is none of {', '.join(COMMANDS)}"
    if "--help" in rest:
        help_of(command)
        return
    try:
        if command in FUNCTIONS:
            parser = auto_parser(FUNCTIONS[command], as_positional=False, parser_class=NamedConfigParser)
            parser.instantiate(parser.parse_args(rest))
        elif command == "report":
            report_options().parse_args(rest)
        elif command == "table":
            given, more = table_options().parse_known_args(rest)
            refuse_overridden(more, read_table(given.table), given.table)
            parse_fit(more)
        elif command in ("serve", "chat"):  # what they do not know goes to the server
            given, _ = (serve_options if command == "serve" else chat_options)().parse_known_args(rest)
            if given.model is not None:
                check_input("--model", given.model)
        elif command in ("plan", "sensitivity"):
            parse_fit((plan_options if command == "plan" else sensitivity_options)().parse_known_args(rest)[1])
        else:
            ParsedOnly([command, *rest])
    except SystemExit as end:
        raise AssertionError(f"the command line refuses {' '.join(words)}") from end
    for option, value in zip(rest, rest[1:], strict=False):
        if option.startswith("--") and option.rpartition(".")[2].lstrip("-") in INPUTS:
            check_input(option, value)


def check_input(option: str, value: str) -> None:
    """A model, text or config: there, made by another documented command, or somebody else's."""
    value = yaml.safe_load(value) if value.startswith(("{", "[")) else value
    if not isinstance(value, str):
        for item in value.values() if isinstance(value, dict) else value:
            check_input(option, item)
        return
    if (sampled := sampled_source(value)) is not None:
        if sampled.model is None or sampled.is_server:
            return
        value = sampled.model
    value = re.sub(r"\[[\d%]*:[\d%]*\]$", "", value)
    if value.startswith("bundled:"):
        assert value.removeprefix("bundled:") in bundled_names(), value
    elif option == "--cross":
        find_config(value, option)
    elif value != "bundled" and not PLACEHOLDER.fullmatch(value) and not Path(value).exists() and value not in made():
        place = value.partition("/")
        assert place[1] and not Path(place[0]).exists() and place[0] != "runs", f"{option} {value}: there is none"


@cache
def made() -> set[str]:
    """Directories that documented commands and shipped configs leave, with what is known to lie in them."""
    places = {f"runs/{name}" for name in config_names()}
    for command in all_commands():
        for option, value in zip(command.words, command.words[1:], strict=False):
            if option in ("--output", "--trainer.default_root_dir"):
                places.add(value)
    return places | {f"{place}/{inside}" for place in places for inside in ("compressed", "dense")}


def check_pip(words: tuple[str, ...]) -> None:
    """Our own extras exist; other people's packages are taken as they are."""
    for word in words[1:]:
        own = re.match(r"(?:\.|eacmoe[-_]lightning)(?:\[(.*)\])?", word)
        if own and own[1]:
            assert set(own[1].split(",")) <= PROJECT["optional-dependencies"].keys(), word
        assert "/" not in word or Path(word).exists(), word


def options_in(words: tuple[str, ...]) -> set[str]:
    return {word.partition("=")[0] for word in words if word.startswith("--") and len(word) > 2}


@cache
def script_options(path: str) -> set[str]:
    """The options of a script with an `argparse` of its own, from its source; it may pass others on to `fit`."""
    source = Path(path).read_text()
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    adding = [call for call in calls if getattr(call.func, "attr", "") == "add_argument"]
    names = {arg.value for call in adding for arg in call.args if isinstance(arg, ast.Constant)}
    passed_on = help_of("fit") if "argparse.REMAINDER" in source else set()
    return {name for name in names if name.startswith("--")} | {"--help"} | passed_on


@cache
def help_of(command: str) -> set[str]:
    """The options that the help of a command names."""
    with redirect_stdout(StringIO()) as printed, pytest.raises(SystemExit) as end:
        main([command, "--help"])
    assert end.value.code in (0, None)
    return set(OPTION.findall(printed.getvalue()))


@cache
def known_options() -> set[str]:
    """The options of all commands, scripts and launchers."""
    scripts = [str(path) for folder in ("benchmarks", "examples", "recipes") for path in Path(folder).rglob("*.py")]
    ours = [help_of(command) for command in COMMANDS] + [script_options(path) for path in scripts]
    ours += [OPTION.findall(path.read_text()) for path in Path("examples").glob("*.sh")]  # of sbatch
    return set().union(*ours, get_args_parser()._option_string_actions, ("--accelerator", "--devices"))


def check_options(span: str, known: set[str]) -> None:
    for option in OPTION.findall(span):
        parent, _, name = option.rpartition(".")
        if option.endswith("*") or PLACEHOLDER.fullmatch(name):
            assert any(one.startswith(parent) for one in known), f"{option} in `{span}`"
        elif parent in BASES:
            assert any(name in inspect.signature(kind).parameters for kind in BASES[parent].__subclasses__()), option
        else:
            assert option in known, f"{option} in `{span}`"


def check_span(span: str) -> None:
    """Inline code: a command, perhaps not a whole one, or options."""
    program = span.split(maxsplit=1)[0] if span.strip() else ""
    if program in GIVEN:
        return
    if program not in OURS or " " not in span or span in LAUNCHERS:
        check_options(span, known_options())
        return
    for command in documents.commands(span, span):
        is_ours = command.words[0] == "eacmoe" or command.words[1] == "train.py"
        words = command.words[1:] if command.words[0] == "eacmoe" else command.words[2:]
        if is_ours and words and not PLACEHOLDER.fullmatch(words[0]):
            assert words[0] in COMMANDS or words[0].startswith("-"), span
            check_options(span, help_of(words[0]) if words[0] in COMMANDS else known_options())
            for option, value in zip(words, words[1:], strict=False):
                if option == "--config" and not PLACEHOLDER.fullmatch(value):
                    find_config(value)
        elif not is_ours:
            check(command.words)


# --- the documents


@pytest.fixture(scope="module", autouse=True)
def checkout(tmp_path_factory) -> Iterator[Path]:
    """A directory that looks like the checkout, in which runs may be left; it is the current one."""
    place = tmp_path_factory.mktemp("checkout")
    for path in jobs.ROOT.iterdir():
        if path.name != "runs" and not path.name.startswith("."):
            (place / path.name).symlink_to(path)
    (place / ".ci").symlink_to(jobs.ROOT / ".ci")
    for block in (block for document in DOCUMENTS for block in python_blocks(document)):
        if name := MODULE.match(block.text):
            (place / name[1]).write_text(block.text)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.syspath_prepend(place)
        yield place


def test_there_is_something_to_check():
    assert "README.md" in DOCUMENTS and len(DOCUMENTS) > 4
    assert len(all_commands()) > 15 and sum(block.language in PYTHON for block in BLOCKS) > 2


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_blocks_have_a_language_and_exemptions_a_reason(block):
    assert block.exemption is None or len(block.exemption) > 5, "why is it not run?"
    assert block.language or is_shell(block) or not re.search(r"^\s*(eacmoe|python|pip) ", block.text, re.MULTILINE)


@pytest.mark.parametrize("command", all_commands(), ids=str)
def test_commands(command, monkeypatch):
    for variable in command.variables:
        monkeypatch.setenv(*variable.split("=", 1))
    check(command.words)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_commands_and_options_in_the_text(document):
    for span in documents.inline_code(DOCUMENTS[document][1]):
        check_span(span)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_to_files(document):
    for target in re.findall(r"\]\(([^)#\s]+)", DOCUMENTS[document][1]):
        if "://" not in target:
            assert (jobs.ROOT / document).parent.joinpath(target).exists(), target


@pytest.fixture(scope="module")
def finished(checkout) -> Path:
    """`runs/tiny`: the bundled model with the config of this name, from a few windows."""
    words = ["--data.num_windows=8", "--data.window_length=64", "--data.num_heldout_windows=1"]
    main(["fit", "--config", "tiny", "--trainer.enable_progress_bar=false", "--model.joint_epochs=1", *words])
    return checkout / "runs" / "tiny"


@pytest.mark.slow
@pytest.mark.parametrize("document", [name for name in DOCUMENTS if python_blocks(name)])
def test_python(document, finished):
    """The snippets of a document, one after another. A reader has a model, its tokenizer, inputs, a TensorBoard."""
    names = {"model": eacmoe_lightning.load("runs/tiny"), "summary_writer": SummaryWriter("runs/snippets"), "step": 0}
    names["tokenizer"] = AutoTokenizer.from_pretrained("runs/tiny/compressed")
    names["inputs"] = names["tokenizer"]("The whale", return_tensors="pt")
    names["eacmoe_lightning"] = eacmoe_lightning
    for block in python_blocks(document):
        lines = "\n" * (block.line - 1) + block.text  # errors name the document's line
        exec(compile(lines, block.document, "exec"), names)
    names["summary_writer"].close()


# --- and the checks check


def test_reading_a_document(tmp_path):
    (tmp_path / "page.md").write_text(
        "Text with `one span\nover lines` and ``a `tick` ``.\n\n"
        "```bash\n"
        "$ A=1 eacmoe fit --config tiny \\\n  --model.bits '[3, 2]'   # a comment\n"
        "cd x && python train.py plan > plan.txt; eacmoe fit ...\n"
        "```\n"
        "<!-- not run: needs a hub -->\n\n"
        "```python\nload()\n```\n"
        "Between.\n"
        "```python\nprint(1)\n```\n"
    )
    blocks, prose = documents.read(tmp_path / "page.md", "page.md")
    assert [(str(b), b.language, b.exemption) for b in blocks] == [
        ("page.md:5", "bash", None),
        ("page.md:12", "python", "needs a hub"),
        ("page.md:16", "python", None),
    ]
    assert documents.inline_code(prose)[:2] == ["one span over lines", "a `tick`"]
    assert [command.words for command in documents.commands(blocks[0].text, "here")] == [
        ("eacmoe", "fit", "--config", "tiny", "--model.bits", "[3, 2]"),
        ("cd", "x"),
        ("python", "train.py", "plan"),
        ("eacmoe", "fit"),
    ]


@pytest.mark.parametrize(
    "line",
    [
        "eacmoe fitt --config tiny",
        "eacmoe fit --config tinny",
        "eacmoe fit --config tiny --model.bitz 3",
        "eacmoe fit --config tiny --model.bits three",
        "eacmoe fit --config tiny --model.router_loss.nothing 3 --model.router_loss MSE",
        "eacmoe plan --config tiny --processors 2",
        "eacmoe validate --config tiny --model.evaluate runs/nothing",
        "eacmoe analyze --model bundled --output out --alpha 0.3",
        "eacmoe analyze --model bundled --output out --cross tinny",
        "eacmoe analyze --model bundled --output out --texts '[bundled:nothing]'",
        "eacmoe prune --model runs/tiny --output out --pruning.criterion magic",
        "eacmoe export --source runs/tiny --output out --format ggug",
        "eacmoe study --config tiny",
        "python nothing.py",
        "python benchmarks/pesf.py --nothing",
        "torchrun --nproc 2 train.py fit --config tinny",
        "torchrun --nothing 2 train.py fit --config tiny",
        "sbatch --nodes 2 examples/slurm.sh --config tinny",
        "sbatch examples/nothing.sh --config tiny",
        "fabric run --devices 2 train.py fit --config tiny --model.bitz 3",
        "pip install -e '.[nothing]'",
        "pytest tests/test_nothing.py",
        "make everything",
    ],
)
def test_wrong_commands_are_found(line):
    (command,) = documents.commands(line, "here")
    with pytest.raises((AssertionError, ValueError, OSError, SystemExit)):
        check(command.words)


@pytest.mark.parametrize(
    "span",
    [
        "--model.bitz 3",
        "--model.router_loss.nothing",
        "--rates.*",
        "eacmoe fitt",
        "eacmoe fit --config tinny",
        "eacmoe export --alphas",
        "python train.py fit --model.bitz",
        "python benchmarks/nothing.py",
        "python benchmarks/pesf.py --nothing",
    ],
)
def test_wrong_code_in_the_text_is_found(span):
    with pytest.raises((AssertionError, ValueError, OSError)):
        check_span(span)
