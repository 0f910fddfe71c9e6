"""Who may import whom: only `flower/` knows Flower, and nothing imports upward."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import fl_rebasin

ROOT = Path(fl_rebasin.__file__).parent
FILES = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.rglob("*.py"))
ALLOWED = {
    "axes.py": set(),
    "spec.py": {"axes"},
    "runtime.py": {"spec"},
    "twin.py": {"axes", "runtime", "spec"},
    "unify.py": set(),
    "rules": {"rules", "unify"},
    "trace.py": {"rules", "runtime", "spec", "twin", "unify"},
    "readoff.py": {"axes", "spec", "unify"},
    "selfcheck.py": {"spec", "twin"},
    "fingerprint.py": set(),
    "derive.py": {
        "axes",
        "fingerprint",
        "readoff",
        "runtime",
        "selfcheck",
        "spec",
        "trace",
        "twin",
    },
    "stored.py": {"axes", "fingerprint", "spec"},
    "describe.py": {"derive", "spec", "stored"},
    "assignment.py": set(),
    "objective.py": {"spec"},
    "descent.py": {"assignment", "axes", "objective", "spec"},
    "nearness.py": {"axes", "spec"},
    "matching.py": {"descent", "nearness", "objective", "spec"},
    "modes.py": set(),
    "activations.py": {
        "assignment",
        "axes",
        "descent",
        "matching",
        "modes",
        "nearness",
        "objective",
        "spec",
    },
    "straight_through.py": {"descent", "matching", "objective", "spec"},
    "topologies.py": {"assignment", "descent", "matching", "nearness", "objective", "spec"},
    "merging.py": {"nearness", "objective", "spec", "topologies"},
    "batchnorm.py": {"modes", "spec"},
    "least_squares.py": {"batchnorm", "modes", "runtime", "spec"},
    "heads.py": {"modes", "runtime", "spec"},
    "metrics.py": {"merging", "spec"},
    "flower": {
        "activations",
        "batchnorm",
        "derive",
        "flower",
        "heads",
        "least_squares",
        "matching",
        "merging",
        "modes",
        "nearness",
        "objective",
        "spec",
        "stored",
        "straight_through",
        "topologies",
    },
    "__init__.py": {
        "activations",
        "batchnorm",
        "derive",
        "flower",
        "heads",
        "least_squares",
        "matching",
        "merging",
        "metrics",
        "spec",
        "stored",
        "straight_through",
    },
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


@pytest.mark.parametrize("file", FILES)
def test_imports_go_downward(file: str) -> None:
    allowed = ALLOWED[file.split("/")[0]]
    own = {n.split(".")[1] for n in imports(ROOT / file) if n.startswith("fl_rebasin.")}
    assert own <= allowed


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
