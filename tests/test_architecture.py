"""The tree shows the architecture: modules import downwards only, and Lightning stays at the edge."""

import ast
from importlib import import_module
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "eacmoe_lightning"

ROOMS = (  # each may import from itself and from those before it
    ("version", "waiting", "configurable", "targets", "moved"),
    ("quantization",),
    ("routers",),
    ("run",),
    ("models",),
    ("text",),
    ("runtime",),
    ("skipping",),
    ("pruning",),
    ("calibration",),
    ("compressed",),
    ("evaluation",),
    ("exports",),
    ("offload",),
    ("planning",),
    ("study",),
    ("analysis",),
    ("job",),
    ("callbacks",),
    ("commands",),
    ("cli",),
)
LIGHTNING = ("job", "callbacks", "commands.fit", "commands.trainer", "cli")  # that may import it


def modules() -> dict[str, Path]:
    """Every module of the package by its name without the package's."""
    found = {}
    for path in [*PACKAGE.rglob("*.py"), *(PACKAGE / "callbacks").resolve().glob("*.py")]:
        inside = path.relative_to(PACKAGE if path.is_relative_to(PACKAGE) else PACKAGE.parent)
        name = ".".join(inside.with_suffix("").parts).removesuffix(".__init__")
        found[name] = path
    return found


def imported(path: Path) -> set[str]:
    """Full names that a module imports, also inside functions; not those for type checkers only."""
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
    """The modules of the package that each of them imports."""
    known, edges = modules(), {}
    for name, path in known.items():
        own = {
            full.removeprefix("eacmoe_lightning.") for full in imported(path) if full.startswith("eacmoe_lightning.")
        }
        edges[name] = {full if full in known else full.rpartition(".")[0] for full in own} - {name, ""}
    return edges


def test_no_circles():
    edges, finished = graph(), set()

    def visit(name: str, way: tuple[str, ...]) -> None:
        assert name not in way, " -> ".join((*way[way.index(name) :], name))
        if name not in finished:
            for other in sorted(edges.get(name, ())):
                visit(other, (*way, name))
            finished.add(name)

    for name in sorted(edges):
        visit(name, ())
    assert len(finished) > 100  # the graph was read at all


def test_imports_point_downwards():
    level = {room: i for i, rooms in enumerate(ROOMS) for room in rooms}
    edges = {name: others for name, others in graph().items() if name != "__init__"}
    rooms = {name.partition(".")[0] for name in edges}
    assert rooms == set(level), "a room is missing in ROOMS, or is gone"
    upward = [
        f"{name} -> {other}"
        for name, others in edges.items()
        for other in others
        if level[other.partition(".")[0]] > level[name.partition(".")[0]]
    ]
    assert not upward


def test_lightning_stays_at_the_edge():
    found = {name for name, path in modules().items() if any(n.split(".")[0] == "lightning" for n in imported(path))}
    assert found and all(name.startswith(LIGHTNING) for name in found), sorted(found)


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
def test_class_paths_of_older_configs(path):
    module, _, name = path.rpartition(".")
    found = getattr(import_module(module), name)
    assert getattr(import_module(found.__module__), name) is found
