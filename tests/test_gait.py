"""benchmarks/gait.py: the parts of the walker's reward, from its observations."""

import numpy as np
import pytest
from conftest import benchmark
from dm_control import suite

from agent.errors import UsageError


@pytest.fixture
def gait(monkeypatch):
    """The script, which reads gait.saved in place of a file."""
    module = benchmark("gait")
    monkeypatch.setattr(module, "find_checkpoint", lambda run: run)
    monkeypatch.setattr(module, "read_checkpoint", lambda path: module.saved)
    height = np.zeros((1, 60, 24), np.float32)
    height[0, :41, module.HEIGHT] = np.linspace(0.0, 1.2, 41)
    rows = {"obs/state": height, "reward": np.ones((1, 60)), "is_first": np.arange(60)[None] == 0}
    config = {"seed": 3, "dataset": None, "model": {"core": "looped"}}
    module.saved = {"task": "dmc:walker_walk", "config": config, "replay": {"rows": rows, "count": 41}}
    return module


def test_the_parts_multiply_to_the_reward_of_the_task(gait):
    env = suite.load("walker", "walk", task_kwargs={"random": 0})
    rng, observations, rewards, speeds = np.random.default_rng(0), [], [], []
    for episode in range(4):
        env.reset()
        for _ in range(30):
            physics = env.physics
            physics.named.data.qpos["rootz"] = 0.3 * (episode - 2.5)
            physics.named.data.qvel["rootx"] = episode
            step = env.step(rng.uniform(-0.1, 0.1, 6))
            columns = [np.ravel(step.observation[name]) for name in ("orientations", "height", "velocity")]
            observations.append(np.concatenate(columns))
            rewards.append(step.reward)
            speeds.append(env.physics.horizontal_velocity())
    observed = np.array(observations)
    parts = gait.parts_of(observed)
    # The task takes the speed of the centre of mass.
    exact = gait.parts_of(np.concatenate([observed[:, :16], np.array(speeds)[:, None], observed[:, 17:]], 1))
    reward = (3 * exact["standing"] + exact["upright"]) / 4 * (5 * exact["moving"] + 1) / 6
    np.testing.assert_allclose(reward, rewards, atol=1e-6)
    assert np.corrcoef(parts["moving"], exact["moving"])[0, 1] > 0.7


def test_the_rows_of_a_run_are_cut_into_tenths_of_its_time(gait):
    rows = gait.rows_of("runs/a")
    assert [row["steps"] for row in rows] == list(range(8, 81, 8))  # two simulator steps each
    assert [row["reward"] for row in rows] == [0.5] * 10
    standing = [row["standing"] for row in rows]
    assert standing == sorted(standing)
    assert standing[-1] > 0.9


def test_runs_that_do_not_hold_their_own_time_are_refused(gait):
    gait.saved["config"]["dataset"] = "data"
    with pytest.raises(UsageError, match="give another run"):
        gait.rows_of("runs/a")
    gait.saved["config"]["dataset"] = None
    gait.saved["replay"]["count"] = 61
    with pytest.raises(UsageError, match="give another run"):
        gait.rows_of("runs/a")
    gait.saved["task"] = "dmc:cartpole_swingup"
    with pytest.raises(UsageError, match="give the folder of a finished run"):
        gait.rows_of("runs/a")
