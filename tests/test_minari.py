"""Data sets of Minari become data sets of this project: with a module that gives what Minari's gives."""

import sys
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest

from agent.data.dataset import load_dataset

ACTIONS = gym.spaces.Box(-2.0, 6.0, (1,), np.float32)
OBSERVATIONS = gym.spaces.Dict({"b": gym.spaces.Box(-9, 9, (2,), np.float64), "a": gym.spaces.Discrete(3)})


def episode(number, steps):
    """Observations that tell episode and step; actions over their whole range."""
    at = np.arange(steps + 1)
    return SimpleNamespace(
        observations={"b": np.stack([np.full(steps + 1, number), at], -1).astype(float), "a": at % 3},
        actions=np.linspace(-2.0, 6.0, steps, dtype=np.float32)[:, None],
        rewards=10.0 * at[1:],
        terminations=at[1:] == (steps if number % 2 else -1),
        truncations=at[1:] == (-1 if number % 2 else steps),
    )


@pytest.fixture
def minari(monkeypatch):
    episodes = [episode(number, 3 + number % 4) for number in range(20)] + [episode(20, 0)]

    def load_dataset(name):
        if name != "known/v0":
            raise FileNotFoundError(name)
        return SimpleNamespace(
            env_spec=SimpleNamespace(id="Known-v0", entry_point="far.away:Known", kwargs={"size": 3}),
            observation_space=OBSERVATIONS, action_space=ACTIONS,
            iterate_episodes=lambda: iter(episodes),
        )  # fmt: skip

    monkeypatch.setitem(sys.modules, "minari", SimpleNamespace(load_dataset=load_dataset))
    return episodes


def test_each_row_is_an_arrival(minari, script, tmp_path):
    made = script("evaluate.py", "dataset", "minari:known/v0", tmp_path / "data")
    assert made.returncode == 0, made.stderr
    assert "gym:far:Known-v0: 20 whole episodes" in made.stdout
    assert "note: its environment was made with {'size': 3}" in made.stdout
    dataset = load_dataset(tmp_path / "data")
    assert dataset.task == "gym:far:Known-v0"
    assert dataset.spaces.obs == {"state": 5}
    rows, start = dataset.train, 0
    for number in (n for n in range(20) if n % 10 != 9):
        steps = 3 + number % 4
        here = slice(start, start + steps + 1)
        state = rows["obs/state"][here]
        assert state[:, :3].argmax(1).tolist() == [at % 3 for at in range(steps + 1)]  # "a" comes first, one-hot
        assert state[:, 3].tolist() == [number] * (steps + 1)
        assert state[:, 4].tolist() == list(range(steps + 1))
        assert rows["reward"][here].tolist() == [10.0 * at for at in range(steps + 1)]
        assert rows["prev_action"][here, 0].tolist() == pytest.approx([0.0, *np.linspace(-1.0, 1.0, steps)])
        assert rows["is_first"][here].tolist() == [True] + [False] * steps
        assert rows["is_last"][here].tolist() == [False] * steps + [True]
        assert rows["is_terminal"][here][-1] == bool(number % 2)
        start += steps + 1
    assert start == len(rows["reward"])


def test_actions_beyond_the_bounds_are_cut_off_and_counted(minari, script, tmp_path):
    minari[3].actions[:2] = 9.0
    made = script("evaluate.py", "dataset", "minari:known/v0", tmp_path / "data")
    assert made.returncode == 0, made.stderr
    assert "has none; 2 actions lie beyond what a task with Box(-2.0, 6.0, (1,), float32) takes" in made.stdout
    actions = load_dataset(tmp_path / "data").train["prev_action"]
    assert float(actions.max()) == 1.0


def test_what_is_missing_is_said(minari, script, tmp_path, monkeypatch):
    refused = script("evaluate.py", "dataset", "minari:other/v0", tmp_path / "data")
    assert refused.returncode == 2
    assert "minari download other/v0" in refused.stderr
    monkeypatch.setitem(sys.modules, "minari", None)
    refused = script("evaluate.py", "dataset", "minari:known/v0", tmp_path / "data")
    assert refused.returncode == 2
    assert "pip install minari" in refused.stderr
