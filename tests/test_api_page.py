"""The pages that people read: the API page is of today's docstrings, links lead somewhere, all rooms are named."""

import importlib.util
import re
from pathlib import Path

import pytest
import test_architecture

import eacmoe_lightning
from eacmoe_lightning import callbacks

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted(path.relative_to(ROOT) for path in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
LINK = re.compile(r"\]\(([^)\s]+)\)")


def load_script():
    spec = importlib.util.spec_from_file_location("api_page", ROOT / "docs" / "api.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


def without_code(text: str) -> str:
    return re.sub(r"```.*?```", "", text, flags=re.DOTALL)


def anchors(text: str) -> set[str]:
    """As GitHub makes them from headings."""
    found: list[str] = []
    for heading in re.findall(r"^#+ (.+)$", without_code(text), re.MULTILINE):
        slug = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        found.append(f"{slug}-{found.count(slug)}" if slug in found else slug)
    return set(found)


def test_the_api_page_is_of_these_docstrings():
    made, kept = load_script().page(), (ROOT / "docs" / "api.md").read_text()
    assert made == kept, "docs/api.md is older than the docstrings: run `python docs/api.py`"


def test_the_api_page_has_all_that_the_package_and_the_callbacks_offer():
    headings = set(re.findall(r"^### (\w+)$", (ROOT / "docs" / "api.md").read_text(), re.MULTILINE))
    assert {*eacmoe_lightning.__all__, *callbacks.__all__} - {"__version__"} <= headings


def test_a_docstring_becomes_markdown():
    docstring = """What it is.

Args:
    name: the first
        goes on.
    *rest, other: more.

Returns:
    A number.

After all."""
    assert load_script().markdown(docstring) == [
        *("What it is.", "", "**Args**", ""),
        *("- `name`: the first", "  goes on.", "- `*rest`, `other`: more.", ""),
        *("**Returns**", "", "A number.", "", "After all."),
    ]


def test_a_call_is_written_as_in_the_source():
    def short(a, b: "int" = 2, *, c: "str | None" = None) -> "list[int]": ...

    def long(first_argument_of_many: int, *more: float, last_of_all_the_arguments: "str" = "x", **options) -> None: ...

    script = load_script()
    assert script.call("f", short) == ["f(a, b: int = 2, *, c: str | None = None) -> list[int]"]
    assert script.call("a.name.that.is.long", long) == [
        "a.name.that.is.long(",
        *("    first_argument_of_many: int,", "    *more: float,"),
        *("    last_of_all_the_arguments: str = 'x',", "    **options,"),
        ") -> None",
    ]


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_links_lead_somewhere(page):
    text = (ROOT / page).read_text()
    for link in LINK.findall(without_code(text)):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target.read_text()), link


def test_the_pages_name_every_room():
    package = test_architecture.PACKAGE
    rooms = [room for row in test_architecture.ROOMS for room in row if (package / room).is_dir()]
    table = (ROOT / "docs" / "architecture.md").read_text().partition("## Rooms")[2].partition("\n## ")[0]
    cells = re.findall(r"^\| (`.*?) \|", table, re.MULTILINE)
    assert [room for cell in cells for room in re.findall(r"`(\w+)/`", cell)] == rooms  # in the order of imports
    tree = (ROOT / "README.md").read_text().partition("eacmoe_lightning/\n")[2].partition("```")[0]
    assert set(rooms) <= set(re.findall(r"^  (\w+)/", tree, re.MULTILINE))
