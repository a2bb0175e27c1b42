"""Every message to the person at the terminal says what to do: all of them are looked at, in the source."""

import ast
import sys

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT))
from tests.faults.fuzz import REMEDY

PROGRAMS = "evaluate.py", "train_agent.py"
ERRORS = "UsageError", "TaskError"
PASSED_ON = {
    "networks of these sizes cannot be ({}): {}",  # sizes to give
    "{}{}",  # why a run was left out
    "{} has the action space {}; {}",  # what is supported
    "{} has an empty observation; {}",
    "{} has the observation space {}; {}",
    "gym:{} cannot be made: {}",  # Gymnasium says what to type
    "gym:{} cannot be made: {}{}",  # what to install
    "{} ({}: {})",  # a line of `rendering.py` with what to set
    "{}; {}{}",  # what was meant, and the suites
    "gym:{} cannot be drawn: it does not offer the render mode {}",  # a note: the run goes on
}
"""Messages that end in the words of another one."""


def text(node):
    """The literal words of an expression, with {} for what is put in; None where it has none of its own."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(part.value if isinstance(part, ast.Constant) else "{}" for part in node.values)
    return None


def messages():
    files = [ROOT / name for name in PROGRAMS]
    for folder in ("agent", "envs", "world_model"):
        files += sorted((ROOT / folder).rglob("*.py"))
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            named = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ERRORS
            if named and node.args and (words := text(node.args[0])) is not None:
                yield pytest.param(words, id=f"{file.relative_to(ROOT)}:{node.lineno}")


def test_there_are_messages():
    assert len(list(messages())) > 100


@pytest.mark.parametrize("words", list(messages()))
def test_a_message_says_what_to_do(words):
    assert words in PASSED_ON or REMEDY.search(words), words
