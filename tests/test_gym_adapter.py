"""Gymnasium tasks: every space becomes a vector, or is refused with a reason."""

import sys
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces

from envs import EPISODE_LIMIT, TaskError, TaskId, endless, make_env
from envs.gym_adapter import GymAdapter


class Recorder(gym.Env):
    """Keeps the last action it was given and observes a sample of its observation space."""

    def __init__(self, observation_space: spaces.Space, action_space: spaces.Space) -> None:
        self.observation_space, self.action_space = observation_space, action_space
        self.last_action: Any = None

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict]:
        super().reset(seed=seed)
        return self.observation_space.sample(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict]:
        assert self.action_space.contains(action), action
        self.last_action = action
        return self.observation_space.sample(), np.float32(1.5), np.bool_(False), False, {}


VECTOR = spaces.Box(-1, 1, (3,), np.float64)
NONE = spaces.Discrete(2)


@pytest.mark.parametrize(
    ("space", "size"),
    [
        (VECTOR, 3),
        (spaces.Box(-1, 1, (), np.float32), 1),
        (spaces.Box(0, 9, (2, 3), np.int64), 6),
        (spaces.Discrete(4, start=2), 4),
        (spaces.MultiDiscrete([2, 3]), 5),
        (spaces.MultiBinary(3), 3),
        (spaces.Dict(b=spaces.Discrete(2), a=spaces.Tuple([VECTOR, spaces.Discrete(3)])), 8),
    ],
)
def test_vector_observations_become_one_float32_vector(space: spaces.Space, size: int) -> None:
    env = GymAdapter(Recorder(space, NONE))
    observation, _ = env.reset()
    assert observation["state"].shape == (size,)
    observation, reward, terminated, _, _ = env.step(0)
    assert env.observation_space.contains(observation)
    assert observation["state"].dtype == np.float32
    assert (type(reward), type(terminated)) == (float, bool)


def test_unsupported_spaces_are_refused_with_a_reason() -> None:
    with pytest.raises(TaskError, match="supported are Box"):
        GymAdapter(Recorder(spaces.Text(3), NONE))
    for action in (spaces.MultiDiscrete([2, 2]), spaces.Tuple([NONE]), spaces.Box(0, 5, (1,), np.int64)):
        with pytest.raises(TaskError, match="supported are Discrete and Box"):
            GymAdapter(Recorder(VECTOR, action))


def test_an_observation_that_breaks_its_space_is_reported() -> None:
    recorder = Recorder(VECTOR, NONE)
    env = GymAdapter(recorder)
    recorder.reset = lambda **_: (np.zeros(5), {})  # type: ignore[method-assign]
    with pytest.raises(TaskError, match="5 numbers.*says 3"):
        env.reset()


def test_box_actions_are_scaled_and_clipped() -> None:
    low, high = np.array([[-2.0, 0.0], [1.0, -8.0]]), np.array([[2.0, 1.0], [3.0, -4.0]])
    recorder = Recorder(VECTOR, spaces.Box(low, high, dtype=np.float64))
    env = GymAdapter(recorder)
    assert env.action_space == spaces.Box(-1.0, 1.0, (4,), np.float32)
    for action, expected in [(-1, low), (0, (low + high) / 2), (1, high), (5, high)]:
        env.step(np.full(4, action, np.float32))
        np.testing.assert_allclose(recorder.last_action, expected)


def test_unbounded_actions_are_clipped_and_passed_through() -> None:
    low, high = np.float32([-np.inf, 0.0, -1e30]), np.float32([np.inf, np.inf, 1e30])
    recorder = Recorder(VECTOR, spaces.Box(low, high))
    env = GymAdapter(recorder)
    for action, expected in [([0.5, 0.5, 0.25], [0.5, 0.5, 0.25]), ([7, -0.5, -7], [1, 0, -1])]:
        env.step(np.array(action, np.float32))
        np.testing.assert_allclose(recorder.last_action, expected)


def test_discrete_actions_start_at_zero() -> None:
    recorder = Recorder(VECTOR, spaces.Discrete(3, start=-1))
    env = GymAdapter(recorder)
    assert env.action_space == spaces.Discrete(3)
    env.step(np.int64(2))
    assert recorder.last_action == 1


def test_gymnasium_mujoco_task(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)  # MuJoCo writes its warnings to a file in the current folder
    env = make_env("gym:InvertedPendulum-v5", seed=0)
    env.reset()
    observation, _, _, _, _ = env.step(env.action_space.sample())
    assert observation["state"].shape == (4,)
    env.close()


def test_a_users_own_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "own_world.py").write_text(
        "import gymnasium as gym\n"
        "from gymnasium.envs.classic_control import PendulumEnv\n"
        "gym.register('Own-v0', entry_point=lambda **kwargs: PendulumEnv(**kwargs), max_episode_steps=3)\n"
    )
    (tmp_path / "half_world.py").write_text("import a_module_nobody_has\n")
    (tmp_path / "bad_world.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    task = TaskId.parse("gym:own_world:Own-v0")
    assert (str(task), task.slug) == ("gym:own_world:Own-v0", "gym-own_world-Own-v0")
    assert not endless(task)
    try:
        env = make_env(task, seed=0)
        env.reset()
        assert [env.step(np.ones(1, np.float32))[3] for _ in range(3)] == [False, False, True]
        env.close()
        with pytest.raises(TaskError, match="did you mean gym:own_world:Own-v0"):
            TaskId.parse("gym:own_world:Owm-v0")
    finally:
        gym.registry.pop("Own-v0", None)
    with pytest.raises(TaskError, match="'half_world' needs 'a_module_nobody_has'"):
        TaskId.parse("gym:half_world:Own-v0")
    with pytest.raises(TaskError, match="importing 'bad_world' failed: ZeroDivisionError"):
        TaskId.parse("gym:bad_world:Own-v0")


def test_missing_drawing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    env = make_env("gym:CartPole-v1", render=True)
    env.reset()
    monkeypatch.setitem(sys.modules, "pygame", None)  # as if it were not installed
    with pytest.raises(TaskError, match="pygame"):
        env.render()


class Plain(gym.Env):
    """As people write them: no render_mode, and it never ends."""

    observation_space, action_space = spaces.Box(-1.0, 1.0, (2,)), spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        return np.zeros(2, np.float32), {}

    def step(self, action):
        return np.zeros(2, np.float32), 0.0, False, False, {}


def fails() -> gym.Env:
    raise OSError("no such file: maze.txt")


def test_environments_without_render_mode_or_end_and_with_broken_constructors() -> None:
    gym.register("PlainTest-v0", entry_point=Plain)
    gym.register("FailsTest-v0", entry_point=fails)
    try:
        task = TaskId.parse("gym:PlainTest-v0")
        env = make_env(task, seed=0)
        env.reset()
        assert endless(task)
        assert env.get_wrapper_attr("_max_episode_steps") == EPISODE_LIMIT
        with pytest.raises(TaskError, match="cannot be made: OSError: no such file: maze.txt"):
            make_env("gym:FailsTest-v0")
        with pytest.raises(TaskError, match="cannot be (made|drawn)"):
            make_env(task, render=True)
    finally:
        for name in ("PlainTest-v0", "FailsTest-v0"):
            gym.registry.pop(name)


def test_empty_spaces_are_refused() -> None:
    nothing = spaces.Box(-1.0, 1.0, (0,))
    with pytest.raises(TaskError, match="empty observation"):
        GymAdapter(Recorder(nothing, spaces.Discrete(2)))
    with pytest.raises(TaskError, match="has the action space"):
        GymAdapter(Recorder(VECTOR, nothing))
