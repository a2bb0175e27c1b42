"""The import directions and the sizes that keep the project readable."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("envs", "world_model", "agent")
SCRIPTS = ("train_agent.py", "evaluate.py")
FORBIDDEN = {
    "envs": {"torch", "world_model", "agent"},
    "world_model": {"gymnasium", "dm_control", "envs", "agent"},
    "agent": {"dm_control", "envs"},
}
SOURCES = [path for package in PACKAGES for path in sorted((ROOT / package).glob("**/*.py"))]
SOURCES += [ROOT / name for name in SCRIPTS]


def imported(path):
    """The top-level packages that a file imports anywhere, in functions too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module.split(".")[0]


def name_of(path):
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_imports_go_one_way(path):
    package = path.relative_to(ROOT).parts[0]
    found = set(imported(path))
    assert not found & FORBIDDEN.get(package, set())
    assert not found & {"train_agent", "evaluate"}, "nobody imports the scripts"
    if path.name not in ("baselines.py", "baseline_trainer.py"):
        assert "stable_baselines3" not in found


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_files_stay_short(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 350


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_functions_fit_a_screen_and_say_what_they_are(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree) or path.name == "__init__.py"
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 75, f"{node.name} is too long"
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{node.name} has no docstring"
