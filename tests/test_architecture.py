"""The architecture of the package: imports point downwards, without circles, and Lightning stays at the edge."""

import ast
from importlib import import_module
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "eacmoe_lightning"

ROOMS = (  # each may import from itself and from earlier ones
    ("version", "waiting", "configurable", "gptqmodel", "weight_grids", "target_rules", "targets", "moved"),
    ("quantization",),
    ("routers",),
    ("run",),
    ("tuning",),
    ("models",),
    ("text",),
    ("runtime",),
    ("skipping",),
    ("pruning",),
    ("calibration",),
    ("compressed",),
    ("evaluation",),
    ("exports",),
    ("serving",),
    ("offload",),
    ("planning",),
    ("budget",),
    ("study",),
    ("analysis",),
    ("job",),
    ("callbacks",),
    ("commands",),
    ("cli",),
    ("__main__",),
)
LIGHTNING = ("job", "callbacks", "commands.fit", "commands.trainer", "cli")  # modules that may import Lightning


def modules() -> dict[str, Path]:
    """The files of the package's modules, by module name without the package's prefix."""
    files = {}
    for path in [*PACKAGE.rglob("*.py"), *(PACKAGE / "callbacks").resolve().glob("*.py")]:
        inside = path.relative_to(PACKAGE if path.is_relative_to(PACKAGE) else PACKAGE.parent)
        name = ".".join(inside.with_suffix("").parts).removesuffix(".__init__")
        files[name] = path
    return files


def imported(path: Path) -> set[str]:
    """Full names that a module imports, including imports inside functions, but not those only for type checkers."""
    tree, names = ast.parse(path.read_text()), set()
    typing_only = {
        node
        for branch in ast.walk(tree)
        if isinstance(branch, ast.If) and getattr(branch.test, "id", "") == "TYPE_CHECKING"
        for node in ast.walk(branch)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node not in typing_only:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def graph() -> dict[str, set[str]]:
    """By module, the modules of the package that it imports."""
    known, edges = modules(), {}
    for name, path in known.items():
        internal = {
            full.removeprefix("eacmoe_lightning.") for full in imported(path) if full.startswith("eacmoe_lightning.")
        }
        edges[name] = {full if full in known else full.rpartition(".")[0] for full in internal} - {name, ""}
    return edges


def test_no_circles():
    edges, finished = graph(), set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join((*path[path.index(name) :], name))
        if name not in finished:
            for other in sorted(edges.get(name, ())):
                visit(other, (*path, name))
            finished.add(name)

    for name in sorted(edges):
        visit(name, ())
    assert len(finished) > 100  # the graph is not empty


def test_imports_point_downwards():
    level = {room: i for i, rooms in enumerate(ROOMS) for room in rooms}
    edges = {name: others for name, others in graph().items() if name != "__init__"}
    rooms = {name.partition(".")[0] for name in edges}
    assert rooms == set(level), "ROOMS does not list the rooms of the package"
    upward = [
        f"{name} -> {other}"
        for name, others in edges.items()
        for other in others
        if level[other.partition(".")[0]] > level[name.partition(".")[0]]
    ]
    assert not upward


def test_lightning_stays_at_the_edge():
    users = {name for name, path in modules().items() if any(n.split(".")[0] == "lightning" for n in imported(path))}
    assert users and all(name.startswith(LIGHTNING) for name in users), sorted(users)


@pytest.mark.parametrize(
    "path",
    [
        "eacmoe_lightning.router_loss.TopKMSE",
        "eacmoe_lightning.qesc.QESC",
        "eacmoe_lightning.data.TextWindows",
        "eacmoe_lightning.checkpoint_io.AtomicCheckpointIO",
        "eacmoe_lightning.recipe.Recipe",
        "eacmoe_lightning.callbacks.RoutingReport",
    ],
)
def test_class_paths_in_older_configs(path):
    module, _, name = path.rpartition(".")
    cls = getattr(import_module(module), name)
    assert getattr(import_module(cls.__module__), name) is cls
