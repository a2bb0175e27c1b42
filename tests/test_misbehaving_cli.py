"""Environments that misbehave, at the command line: one line, and what was done before is kept."""

import shutil
import sys

import gymnasium as gym
import pytest
import torch
from conftest import ROOT

from agent.environment_failures import environment_traceback
from agent.errors import EnvironmentFailure, failures
from envs import TaskError

ENVIRONMENTS = """
import gymnasium as gym, numpy as np

class Base(gym.Env):
    observation_space, action_space = gym.spaces.Box(0.0, 1.0, (4,)), gym.spaces.Discrete(2)  # as toy:cue5

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.time = 0
        return np.zeros(4, np.float32), {"path": np.zeros(int(self.np_random.integers(1, 5)))}

    def step(self, action):
        self.time += 1
        return np.full(4, self.time % 3, np.float32), 1.0, self.time == 12, False, {"contacts": "many"}

class Raises(Base):
    def step(self, action):
        return 1 / (3 - self.time) and super().step(action)

class Bad(Base):
    def step(self, action):
        obs, _, *rest = super().step(action)
        return obs, float("nan") if self.time == 5 else 1.0, *rest

class OldStep(Base):
    def step(self, action):
        return super().step(action)[:4]

class OldReset(Base):
    def reset(self):
        return super().reset()[0]

class Falls(Base):
    def reset(self, *, seed=None, options=None):
        return self.robot.stand()

class Still(Base):
    def step(self, action):
        return np.zeros(4, np.float32), *super().step(action)[1:]

class Board(Base):
    observation_space = gym.spaces.Box(0, 2, (3, 3), np.uint8)

    def reset(self, *, seed=None, options=None):
        return np.ones((3, 3), np.uint8), super().reset(seed=seed)[1]

    def step(self, action):
        return np.ones((3, 3), np.uint8), *super().step(action)[1:]

for kind in (Base, *Base.__subclasses__()):
    gym.register(f"Odd{kind.__name__}-v0", entry_point=kind, max_episode_steps=50)
"""
NAMES = ("Base", "Raises", "Bad", "OldStep", "OldReset", "Falls", "Still", "Board")


@pytest.fixture
def odd(tmp_path, monkeypatch):
    """The module odd_ones, with the environments."""
    (tmp_path / "odd_ones.py").write_text(ENVIRONMENTS)
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("odd_ones", None)
    for name in NAMES:
        gym.registry.pop(f"Odd{name}-v0", None)


@pytest.fixture
def run_of(finished, tmp_path):
    """run_of(name): a run whose task is one of these environments."""

    def make(name):
        run = shutil.copytree(finished[0], tmp_path / f"run-{name}")
        content = torch.load(run / "checkpoints" / "latest.pt", weights_only=True)
        torch.save(content | {"task": f"gym:odd_ones:Odd{name}-v0"}, run / "checkpoints" / "latest.pt")
        return run

    return make


@pytest.mark.parametrize(
    ("name", "command", "said"),
    [
        ("Raises", "policy", "in step 4 of an evaluation episode: ZeroDivisionError: division by zero"),
        ("Raises", "model", "in step 4 of a recorded episode: ZeroDivisionError: division by zero"),
        ("Bad", "policy", "in step 5 of an evaluation episode: the environment's reward is nan"),
        ("Bad", "model", "in step 5 of a recorded episode: the environment's reward is nan"),
        ("OldStep", "policy", "gym:odd_ones:OddOldStep-v0, in step 1 of an episode: step() returned 4 values"),
        ("OldReset", "policy", "gym:odd_ones:OddOldReset-v0: its reset takes no seed"),
        ("Falls", "policy", "in the reset with the seeds 1000000000 to 1000000009: AttributeError: "),
    ],
)
def test_an_evaluation_ends_in_one_line(odd, run_of, script, name, command, said):
    run = run_of(name)
    done = script("evaluate.py", command, run)
    assert done.returncode == 1
    assert done.stdout == ""
    *before, line = done.stderr.splitlines()
    assert line.startswith(f"error: the environment failed: {said}")
    assert not (run / "model").exists()
    if name in ("Raises", "Falls"):  # its author wants to see where
        assert before[0] == "Traceback (most recent call last):"
        assert "odd_ones.py" in before[1]
        assert not any(str(ROOT) in shown for shown in before)
    else:
        assert before == []


def test_infos_of_any_form_are_left_out(odd, run_of, script):
    run = run_of("Base")
    assert script("evaluate.py", "policy", run).returncode == 0
    words = ("--horizon", 2, "--episodes", 2, "--windows", 2, "--max-loops", 1)
    done = script("evaluate.py", "model", run, *words)
    assert done.returncode == 0, done.stderr


def test_observations_that_never_change_are_nothing_to_predict(odd, run_of, script):
    done = script("evaluate.py", "model", run_of("Still"), "--episodes", 2)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: the recorded observations never change, so there is nothing to predict\n"


def test_predictions_that_are_not_finite_are_shown_as_such(odd, run_of, script):
    run = run_of("Base")
    path = run / "checkpoints" / "latest.pt"
    content = torch.load(path, weights_only=True)
    for value in leaves(content["agent"]):
        if value.is_floating_point() and value.ndim > 1:
            value.fill_(1e38)
    torch.save(content, path)
    done = script("evaluate.py", "model", run, "--horizon", 2, "--episodes", 2, "--windows", 2, "--max-loops", 1)
    assert done.returncode == 0, done.stderr
    assert "better than both" not in done.stdout
    assert "note: the predictions are not finite from step 1 on (agent, 1 loop)" in done.stdout
    assert "NaN" not in (run / "model" / "model.json").read_text()


def leaves(tree):
    """All tensors of nested dictionaries."""
    for value in tree.values():
        if isinstance(value, dict):
            yield from leaves(value)
        elif isinstance(value, torch.Tensor):
            yield value


def test_a_data_set_is_written_whole_or_not_at_all(odd, script, tmp_path):
    done = script("evaluate.py", "collect", "gym:odd_ones:OddBad-v0", "data", "--episodes", 10)
    assert (done.returncode, done.stdout) == (1, "")
    assert "the environment's reward is nan" in done.stderr
    assert not (tmp_path / "data").exists()


def test_training_that_cannot_begin_leaves_nothing_behind(odd, script, tmp_path):
    for name, said in (("OldReset", "its reset takes no seed"), ("Falls", "AttributeError")):
        done = script("train_agent.py", f"gym:odd_ones:Odd{name}-v0", "--preset", "debug", "--run-dir", "run")
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.splitlines()[-1].startswith("error: the environment fails in its first reset: ")
        assert said in done.stderr
        assert not (tmp_path / "run").exists()


def test_grids_are_named_in_the_header(odd, script):
    words = ("--preset", "debug", "--steps", 220, "--eval.episodes", 1, "--train.eval-every", 0, "--no-video")
    done = script("train_agent.py", "gym:odd_ones:OddBoard-v0", *words, "--run-dir", "run")
    assert done.returncode == 0, done.stderr
    assert "grid         observation, 3 x 3 codes, 0 to 2, is one-hot, 27 numbers; gym:odd_ones:OddBoard" in done.stdout


def test_a_video_of_what_does_not_draw_is_one_line(odd, run_of, script):
    done = script("evaluate.py", "policy", run_of("Base"), "--episodes", 1, "--video")
    assert done.returncode == 0
    assert done.stdout.splitlines()[-1] == (
        "no video: gym:odd_ones:OddBase-v0 cannot be drawn: it does not offer the render mode 'rgb_array'"
    )
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["polcy", "x"], "there is no command 'polcy'; did you mean policy?"),
        (["xyz"], "there is no command 'xyz'; the commands are policy, model"),
        (["collect", "gym:maze.py:Maze-v0", "d"], "'maze.py' is a file.* did you mean gym:maze:Maze-v0?"),
        (["collect", "gym:sub/maze.py:Maze-v0", "d"], "did you mean gym:maze:Maze-v0, with PYTHONPATH=sub in front"),
        (["collect", "gym:envs:Maze-v0", "d"], "a package 'envs' of its own.*for example gym:my_envs:Maze-v0"),
        (["collect", "gym:agent.maze:Maze-v0", "d"], "a package 'agent' of its own.*gym:my_agent.maze:Maze-v0"),
    ],
)
def test_what_was_meant_is_named(script, words, said):
    done = script("evaluate.py", *words)
    assert (done.returncode, done.stdout) == (2, "")
    assert len(done.stderr.splitlines()) == 1
    with pytest.raises(AssertionError, match=said):
        raise AssertionError(done.stderr)


def test_a_folder_of_runs_names_them(finished, script):
    run = finished[0]
    for folder in (run.parent, run.parent.parent):
        done = script("evaluate.py", "policy", folder)
        assert done.returncode == 2
        assert f"{folder} is not a run folder but holds runs; give one of them: {run}" in done.stderr


def test_a_traceback_begins_where_this_program_ends():
    with pytest.raises(EnvironmentFailure) as theirs, failures():
        gym.make("CartPole-v1").step(0)  # Gymnasium's own complaint
    assert environment_traceback(theirs.value).startswith("Traceback")
    with pytest.raises(EnvironmentFailure, match="^no such task$") as ours, failures():
        raise TaskError("no such task")
    assert environment_traceback(ours.value) == ""
