"""The shape of the package: imports run one way, also those inside of functions; packages hold names, not logic.

import-linter holds the layers of imports at the top of modules (`make check`). Imports inside of functions are hidden
from it, so a circle could hide there.
"""

import ast
import graphlib
import re
from pathlib import Path

import pytest

import flashcomm

ROOT = Path(flashcomm.__file__).parent
MODULES = {
    ".".join(("flashcomm", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__"): path
    for path in sorted(ROOT.rglob("*.py"))
}


def imports_of(path: Path) -> dict[str, bool]:
    """Our own modules that a module imports, wherever it does; True if at its top."""
    found: dict[str, bool] = {}
    tree = ast.parse(path.read_text())
    # Types alone are no dependency.
    ignored = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if node in ignored:
            continue
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path} has a relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in MODULES else str(node.module) for name in names]
        else:
            continue
        for name in names:
            if name in MODULES:
                found[name] = found.get(name, False) or node in tree.body
    return found


IMPORTS = {name: imports_of(path) for name, path in MODULES.items()}


def circle(imports: dict[str, dict[str, bool]]) -> list[str]:
    try:
        graphlib.TopologicalSorter(imports).prepare()
    except graphlib.CycleError as error:
        return error.args[1]
    return []


def test_imports_have_no_circle_not_even_a_lazy_one():
    assert circle(IMPORTS) == []


def test_the_check_finds_a_circle():
    assert circle({**IMPORTS, "flashcomm.errors": {"flashcomm.collectives.call": False}})


def test_transports_know_nothing_of_those_who_use_them():
    """As import-linter says, and inside of functions too."""
    above = ("flashcomm.collectives", "flashcomm.planner", "flashcomm.policy", "flashcomm.measured")
    for name, imported in IMPORTS.items():
        if name.startswith("flashcomm.transports"):
            assert not [other for other in imported if other.startswith(above)], name


def test_only_the_command_imports_the_command():
    for name, imported in IMPORTS.items():
        if not name.startswith("flashcomm.cli"):
            assert not [other for other in imported if other.startswith("flashcomm.cli")], name


@pytest.mark.parametrize("path", [p for p in MODULES.values() if p.name == "__init__.py"], ids=lambda p: p.parent.name)
def test_packages_hold_names_and_no_logic(path):
    functions = [node.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)]
    assert set(functions) <= {"__getattr__"}
    assert not [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ClassDef)]


def test_classes_of_the_core_fit_on_a_few_screens():
    lengths = {
        f"{name}.{node.name}": (node.end_lineno or 0) - node.lineno + 1
        for name, path in MODULES.items()
        if name.startswith(("flashcomm.collectives", "flashcomm.transports"))
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ClassDef)
    }
    assert {name: lines for name, lines in lengths.items() if lines >= 200} == {}


# Of Python in a string too.
SLEEP = re.compile(r"\btime\.sleep\b|from time import .*\bsleep\b")


def test_tests_wait_for_events():
    """A sleep is too short on a busy machine and too long on any other: `events` has what waits instead."""
    tests = Path(__file__).parent
    sleepers = {path.relative_to(tests).as_posix() for path in tests.rglob("*.py") if SLEEP.search(path.read_text())}
    assert sleepers - {"test_architecture.py"} == {"events.py"}
