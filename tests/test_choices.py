"""Every value of every choice of the world model and its training makes a whole run: it learns, is stopped and goes on,
is evaluated, and is exported."""

import csv

import gymnasium as gym
import numpy as np
import pytest
import yaml
from gymnasium import spaces

from agent.settings import value_of

CHOICES = {
    "model.objective": ["redundancy", "sigreg"],
    "model.latents": ["simplicial", "gaussian"],
    "model.core": ["certified", "contracting", "stacked", "gru"],
    "behavior.decisions": ["plan", "both", "expansion"],
    "behavior.jump": ["3"],
    "train.sampling": ["recent", "model-error", "value-error"],
}
NEEDS = {"behavior.jump": ("--model.jump", "4")}


PICTURES = "gym:Pictures-v0"
ON_IMAGES = {"model.objective": ["sigreg"], "model.latents": ["gaussian"]}
"""Also where observations are images and actions discrete."""


class Pictures(gym.Env):
    """One of three stripes is lit, and the action that names it is rewarded."""

    observation_space = spaces.Box(0, 255, (64, 64, 3), np.uint8)
    action_space = spaces.Discrete(3)

    def _show(self):
        self._lit = int(self.np_random.integers(3))
        picture = np.zeros((64, 64, 3), np.uint8)
        picture[:, 21 * self._lit : 21 * self._lit + 21] = 200
        return picture

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self._show(), {}

    def step(self, action):
        reward = float(action == self._lit)
        return self._show(), reward, False, False, {}


@pytest.fixture(scope="module", autouse=True)
def _pictures():
    gym.register("Pictures-v0", entry_point=Pictures, max_episode_steps=20)
    yield
    del gym.registry["Pictures-v0"]


def cases(task, choices):
    return [(task, field, value) for field, values in choices.items() for value in values]


CASES = [*cases("gym:Pendulum-v1", CHOICES), *cases(PICTURES, ON_IMAGES)]


@pytest.mark.parametrize(("task", "field", "value"), CASES)
def test_a_choice_trains_resumes_evaluates_and_exports(task, field, value, script, tmp_path):
    whole_run(script, tmp_path, task, field, value, *NEEDS.get(field, ()))


def test_a_data_set_in_the_replay_makes_a_whole_run(script, tmp_path):
    done = script("evaluate.py", "collect", "gym:Pendulum-v1", "data", "--episodes", "10")
    assert done.returncode == 0, done.stderr
    whole_run(script, tmp_path, "gym:Pendulum-v1", "dataset", "data")


def whole_run(script, folder, task, field, value, *more):
    run, words = folder / "run", ("--preset", "debug", "--no-video", f"--{field}", value, *more)
    done = script("train_agent.py", task, *words, "--run-dir", run)
    assert done.returncode == 0, done.stderr
    done = script("train_agent.py", "--resume", run, "--steps", "700")
    assert done.returncode == 0, done.stderr
    assert str(value_of(yaml.safe_load((run / "config.yaml").read_text()), field)) == value
    with (run / "eval.csv").open(newline="") as file:
        assert {row["step"] for row in csv.DictReader(file)} >= {"300", "600", "700"}
    done = script("evaluate.py", "policy", run, "--episodes", "2")
    assert done.returncode == 0, done.stderr
    done = script("evaluate.py", "export", run, folder / "policy.pt2")
    assert done.returncode == 0, done.stderr
    assert ("loops per step" in done.stdout) == (value not in ("stacked", "gru"))
