"""What may import what: as the diagram in `docs/architecture.md` says, and nothing upward."""

import ast
import graphlib
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

import fl_rebasin

ROOT = Path(fl_rebasin.__file__).parent
FILES = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.rglob("*.py"))
ARCHITECTURE = (ROOT.parent / "docs" / "architecture.md").read_text()
DIAGRAM = set(re.findall(r"^  (\w+) --> (\w+)$", ARCHITECTURE, re.MULTILINE))


def imports(path: Path) -> set[str]:
    """Dotted names of all modules that a file imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.add(node.module or "")
    return found


def folder_of(file: str) -> str:
    return file.split("/")[0].removesuffix(".py")


def arrows_of(file: str) -> set[tuple[str, str]]:
    """The arrows between parts (folders, or files beside them) that a file needs."""
    found = {n.split(".")[1] for n in imports(ROOT / file) if n.startswith("fl_rebasin.")}
    return {(folder_of(file), name) for name in found - {folder_of(file)}}


@pytest.mark.parametrize("file", FILES)
def test_every_import_is_in_the_diagram(file: str) -> None:
    assert arrows_of(file) <= DIAGRAM


def test_every_arrow_of_the_diagram_is_an_import() -> None:
    assert set().union(*map(arrows_of, FILES)) == DIAGRAM


def test_nothing_imports_upward() -> None:
    graph: dict[str, set[str]] = {}
    for upper, lower in DIAGRAM:
        graph.setdefault(upper, set()).add(lower)
    graphlib.TopologicalSorter(graph).prepare()  # Raises CycleError.


NAMES = sorted(set(re.findall(r"`((?:flower|matching|merging|symmetry)\.[\w.]+)`", ARCHITECTURE)))


@pytest.mark.parametrize("name", NAMES)
def test_every_name_in_the_document_exists(name: str) -> None:
    parts = name.split(".")
    for split in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(["fl_rebasin", *parts[:split]]))
        except ModuleNotFoundError:
            continue
        for part in parts[split:]:
            found = getattr(found, part)
        return
    pytest.fail(f"{name} does not exist")


def test_no_two_files_or_classes_share_a_name() -> None:
    names = [Path(file).stem for file in FILES if not file.endswith("__init__.py")]
    for file in FILES:
        tree = ast.parse((ROOT / file).read_text())
        names += [
            node.name
            for node in tree.body
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_")
        ]
    assert sorted(names) == sorted(set(names))


@pytest.mark.parametrize("file", [file for file in FILES if not file.startswith("flower/")])
def test_only_flower_imports_flower(file: str) -> None:
    assert not {n for n in imports(ROOT / file) if n.split(".")[0] in ("flwr", "ray")}


@pytest.mark.parametrize("name", ["simulations", "examples"])
def test_scripts_use_public_modules_only(name: str) -> None:
    folder = ROOT.parent / name
    used = {n for path in folder.rglob("*.py") for n in imports(path) if n.startswith("fl_rebasin")}
    assert used
    assert used <= {"fl_rebasin", "fl_rebasin.flower", "fl_rebasin.metrics"}


def test_the_core_is_imported_without_flower() -> None:
    code = "import sys, fl_rebasin; fl_rebasin.derive_spec; assert 'flwr' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
