"""benchmarks/gait.py: the parts of the walker's reward, from its observations."""

import numpy as np
import pytest
from conftest import benchmark
from dm_control import suite

from agent.errors import UsageError


def test_the_parts_multiply_to_the_reward_of_the_task():
    gait, env = benchmark("gait"), suite.load("walker", "walk", task_kwargs={"random": 0})
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


def test_a_run_of_another_task_is_refused(tmp_path, capsys, monkeypatch):
    gait = benchmark("gait")
    saved = {"task": "dmc:cartpole_swingup", "replay": {}}
    monkeypatch.setattr(gait, "find_checkpoint", lambda run: run)
    monkeypatch.setattr(gait, "read_checkpoint", lambda path: saved)
    with pytest.raises(UsageError, match="give the folder of a finished run"):
        gait.rows_of("runs/a")
