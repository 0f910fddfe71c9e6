"""Who may import whom: nothing imports upward, and only `flower/` knows Flower."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import fl_rebasin

ROOT = Path(fl_rebasin.__file__).parent
FILES = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.rglob("*.py"))
BASE = {"forward", "state_dicts"}
ALLOWED = {
    "forward": set(),
    "state_dicts": set(),
    "metrics": {"state_dicts"},
    "symmetry": {"symmetry", *BASE},
    "matching": {"matching", "symmetry", *BASE},
    "merging": {"merging", "matching", "symmetry", *BASE},
    "flower": {"flower", "merging", "matching", "symmetry", *BASE},
    "describe": {"symmetry"},
    "__init__": {"flower", "merging", "matching", "symmetry", "metrics", "state_dicts"},
}


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


@pytest.mark.parametrize("file", FILES)
def test_imports_go_downward(file: str) -> None:
    own = {n.split(".")[1] for n in imports(ROOT / file) if n.startswith("fl_rebasin.")}
    assert own <= ALLOWED[folder_of(file)]


def test_every_row_of_the_table_is_needed() -> None:
    used: dict[str, set[str]] = {name: set() for name in ALLOWED}
    for file in FILES:
        own = {n.split(".")[1] for n in imports(ROOT / file) if n.startswith("fl_rebasin.")}
        used[folder_of(file)] |= own
    assert used == ALLOWED


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
