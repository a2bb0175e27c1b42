"""The import directions and the sizes that keep the project readable."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("envs", "world_model", "agent")
SCRIPTS = ("train_agent.py", "evaluate.py")
FORBIDDEN = {
    "envs": {"torch", "world_model", "agent", "experiments"},
    "world_model": {"gymnasium", "dm_control", "envs", "agent", "experiments"},
    "agent": {"dm_control", "envs", "experiments"},
    "experiments": {"envs", "agent"},
}
ROOMS = {  # room of agent/: the rooms that it may import, its own included
    "": set(),
    "data": {""},
    "logs": {""},
    "learning": {"", "data"},
    "execution": {"", "data", "learning"},
    "evaluation": {"", "data", "logs", "learning"},
    "training": {"", "data", "logs", "learning", "execution", "evaluation"},
    "interop": {"", "data", "logs", "learning", "execution", "evaluation", "training"},
    "runs": {"", "data", "logs", "learning", "execution", "evaluation", "training", "interop"},
}
SOURCES = [path for package in (*PACKAGES, "experiments") for path in sorted((ROOT / package).glob("**/*.py"))]
SOURCES += [ROOT / name for name in SCRIPTS]
MODULES = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in SOURCES}


def imported(path):
    """The dotted names that a file imports anywhere: in functions and under TYPE_CHECKING too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in MODULES else node.module


def name_of(path):
    return str(path.relative_to(ROOT))


def room_of(module):
    """The room of a module of agent/; the files beside the rooms are the base."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in ROOMS else ""


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_imports_go_one_way(path):
    package = path.relative_to(ROOT).parts[0]
    names = {name.split(".")[0] for name in imported(path)}
    assert not names & FORBIDDEN.get(package, set())
    assert not names & {"train_agent", "evaluate"}, "nobody imports the scripts"
    if "interop" not in path.parts:
        assert "stable_baselines3" not in names


@pytest.mark.parametrize("module", [name for name in MODULES if name.startswith("agent.")])
def test_the_rooms_of_the_agent_depend_in_one_direction(module):
    room, path = room_of(module), MODULES[module]
    if path.name == "__init__.py" and path.parent.name == "agent":
        return  # names the public class
    used = {room_of(name) for name in imported(path) if name.split(".")[0] == "agent"}
    assert used <= ROOMS[room] | {room}


def test_no_file_imports_itself_through_others():
    """Depth first over the files: a file that is met again while it is still open closes a circle."""
    edges = {}
    for module, path in MODULES.items():
        package = f"{module}.__init__"
        names = {f"{name}.__init__" if f"{name}.__init__" in MODULES else name for name in imported(path)}
        edges[module] = sorted(name for name in names & MODULES.keys() if name not in (module, package))
    done, open_ = set(), []

    def visit(module):
        assert module not in open_, " -> ".join([*open_[open_.index(module) :], module])
        if module in done:
            return
        open_.append(module)
        for name in edges[module]:
            visit(name)
        open_.pop()
        done.add(module)

    for module in MODULES:
        visit(module)


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


def test_the_update_shows_the_algorithm_on_one_screen():
    """In the order of the paper: posterior states, losses, imagination, lambda-returns, gradients, steps."""
    source = (ROOT / "agent" / "learning" / "dreamer.py").read_text(encoding="utf-8")
    classes = {node.name: node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)}
    dreamer = classes["Dreamer"]
    assert not dreamer.bases, "Dreamer inherits nothing"
    update = next(node for node in dreamer.body if isinstance(node, ast.FunctionDef) and node.name == "update")
    assert update.end_lineno - update.lineno < 70
    text = ast.get_source_segment(source, update)
    steps = ["observe_sequence", "world.loss", "imagine", "lambda_return", "behavior.losses", "replay_loss", "backward"]
    places = [text.index(step) for step in [*steps, "optimizer_step"]]
    assert places == sorted(places)
