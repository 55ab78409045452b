"""The arrows of the README, enforced: hawq ← envs ← search; the cluster only in search."""

import ast
from pathlib import Path

import pytest

ALLOWED = {
    "hawq": {"hawq"},
    "envs": {"hawq", "envs"},
    "search": {"hawq", "envs", "search", "ray", "optuna", "mmdet", "mmengine", "mmcv"},
}
GUARDED = set().union(*ALLOWED.values())
DRAWERS = {"utils", "util", "helpers", "misc", "common", "base", "core"}
ROOT = Path(__file__).parents[1]


def sources(package: str) -> list[Path]:
    found = sorted((ROOT / package).rglob("*.py"))
    assert found, f"{package} has no sources: the test looks in the wrong place"
    return found


def imports(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            # A relative import stays inside its package.
            names.add(path.relative_to(ROOT).parts[0] if node.level else node.module.split(".")[0])
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            # Detection imports mmdetection by name, where it needs it.
            names |= {a.value.split(".")[0] for a in node.args if isinstance(a, ast.Constant)}
    return names


@pytest.mark.parametrize("package", ALLOWED)
def test_imports_point_one_way(package):
    wrong = {
        str(path.relative_to(ROOT)): sorted(outside)
        for path in sources(package)
        if (outside := imports(path) & GUARDED - ALLOWED[package])
    }
    assert not wrong


def test_mmdetection_has_one_door():
    tasks = ROOT / "search" / "tasks"
    may = {tasks / "mmcv_ops.py", *tasks.glob("detect*.py")}
    others = {path for package in ALLOWED for path in sources(package)} - may
    assert not sorted(path for path in others if imports(path) & {"mmdet", "mmengine", "mmcv"})


@pytest.mark.parametrize("package", ALLOWED)
def test_there_is_no_drawer_for_odds_and_ends(package):
    names = {name for path in sources(package) for name in (path.stem, path.parent.name)}
    assert not names & DRAWERS


@pytest.mark.parametrize("package", ALLOWED)
def test_libraries_do_not_print(package):
    printing = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in sources(package)
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == "print"
    ]
    assert not printing
