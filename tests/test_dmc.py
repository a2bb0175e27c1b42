"""Control Suite tasks: observation format, time limits and terminations, action scaling."""

from collections import OrderedDict
from types import SimpleNamespace
from typing import Any

import dm_env
import gymnasium as gym
import numpy as np
import pytest
from dm_env import specs
from gymnasium.utils.env_checker import check_env

from envs import TaskError, TaskId, dmc, make_env, position_entries


@pytest.mark.parametrize("name", ["cartpole_swingup", "ball_in_cup_catch", "humanoid_stand", "lqr_lqr_2_1"])
def test_control_suite_tasks_step(name: str) -> None:
    env = make_env(f"dmc:{name}", seed=0)
    observation, info = env.reset()
    assert set(info) == {dmc.CONTACTS}
    assert info[dmc.CONTACTS] >= 0
    assert list(observation) == ["state"]
    for _ in range(3):
        observation, reward, terminated, truncated, _ = env.step(env.action_space.sample())
        assert observation["state"].dtype == np.float32
        assert env.observation_space.contains(observation)
        assert isinstance(reward, float)
        assert (terminated, truncated) == (False, False)
    env.close()


def test_control_suite_passes_the_gymnasium_checker() -> None:
    check_env(dmc.DMControl("pendulum", "swingup"), skip_render_check=True)


def test_time_limit_truncates_after_500_agent_steps() -> None:
    env = make_env("dmc:cartpole_swingup", seed=0)
    env.reset()
    steps, over = 0, False
    while not over:
        _, _, terminated, truncated, _ = env.step(np.zeros(1, np.float32))
        steps, over = steps + 1, terminated or truncated
    assert (steps, terminated, truncated) == (500, False, True)
    env.close()


class FakeControl:
    """Stands in for dm_control: `length` steps of reward 1, then a last step with `discount`."""

    def __init__(self, length: int, discount: float) -> None:
        self.length, self.discount = length, discount
        self.time = 0
        self.actions: list[np.ndarray] = []
        self.physics = SimpleNamespace(data=SimpleNamespace(ncon=2))

    def observation_spec(self) -> dict[str, specs.Array]:
        return OrderedDict(time=specs.Array((), float), pair=specs.Array((2, 1), float))

    def action_spec(self) -> specs.BoundedArray:
        return specs.BoundedArray((3,), float, minimum=[-1.0, -2.0, -1e10], maximum=[1.0, 6.0, 1e10])

    def control_timestep(self) -> float:
        return 0.02

    def _observation(self) -> dict[str, Any]:
        return OrderedDict(time=float(self.time), pair=np.array([[7.0], [8.0]]))

    def reset(self) -> dm_env.TimeStep:
        self.time = 0
        return dm_env.restart(self._observation())  # reward and discount are None here

    def step(self, action: np.ndarray) -> dm_env.TimeStep:
        self.actions.append(np.array(action))
        self.time += 1
        last = self.time == self.length
        kind = dm_env.StepType.LAST if last else dm_env.StepType.MID
        return dm_env.TimeStep(kind, 1.0, self.discount if last else 1.0, self._observation())


def fake_task(monkeypatch: pytest.MonkeyPatch, length: int, discount: float) -> tuple[gym.Env, FakeControl]:
    fake = FakeControl(length, discount)
    monkeypatch.setattr(dmc, "load_task", lambda *_, **__: fake)
    return dmc.DMControl("walker", "walk", repeat=2), fake


@pytest.mark.parametrize(("discount", "expected"), [(0.0, (True, False)), (1.0, (False, True))])
def test_only_discount_zero_terminates(
    monkeypatch: pytest.MonkeyPatch, discount: float, expected: tuple[bool, bool]
) -> None:
    env, fake = fake_task(monkeypatch, length=3, discount=discount)
    observation, info = env.reset()
    assert info == {dmc.CONTACTS: 2}
    np.testing.assert_array_equal(observation["state"], np.float32([0, 7, 8]))
    assert env.step(np.zeros(3, np.float32))[1:4] == (2.0, False, False)
    observation, reward, terminated, truncated, _ = env.step(np.zeros(3, np.float32))
    assert (reward, fake.time) == (1.0, 3)  # stopped inside the repeat
    assert (terminated, truncated) == expected
    assert observation["state"][0] == 3
    assert env.metadata["render_fps"] == pytest.approx(25)


def test_actions_are_scaled_to_the_actuators(monkeypatch: pytest.MonkeyPatch) -> None:
    env, fake = fake_task(monkeypatch, length=99, discount=1.0)
    env.reset()
    for action in ([-1, -1, -1], [0.5, 0, 0.5], [9, 9, 9]):
        env.step(np.array(action, np.float32))
    expected = [[-1, -2, -1], [0.5, 2, 0.5], [1, 6, 1]]
    np.testing.assert_allclose(fake.actions, np.repeat(expected, 2, axis=0))


VELOCITIES = {"velocity", "body_velocities", "arm_vel", "object_vel", "com_velocity"}


@pytest.mark.parametrize(
    "name",
    ["walker_walk", "cartpole_swingup", "finger_spin", "swimmer_swimmer6", "manipulator_bring_ball", "humanoid_run"],
)
def test_nov_leaves_the_velocities_out_and_nothing_else(name: str) -> None:
    whole, without = make_env(f"dmc:{name}", seed=3), make_env(f"dmc:{name.replace('_', '-')}@nov", seed=3)
    full, part = whole.reset()[0]["state"], without.reset()[0]["state"]
    entries = whole.unwrapped._env.observation_spec()
    sizes = {key: int(np.prod(spec.shape)) for key, spec in entries.items()}
    pieces = dict(zip(sizes, np.split(full, np.cumsum(list(sizes.values()))[:-1]), strict=True))
    kept = [piece for key, piece in pieces.items() if key not in VELOCITIES]
    assert 0 < len(part) < len(full)
    np.testing.assert_array_equal(part, np.concatenate(kept))
    assert without.observation_space["state"].shape == part.shape
    np.testing.assert_array_equal(part, full[position_entries(f"dmc:{name}")])
    whole.close()
    without.close()


def test_every_task_without_velocities_says_what_it_is() -> None:
    assert TaskId.parse("dmc:walker_walk@nov").slug == "dmc-walker_walk-nov"
    assert TaskId.parse("dmc:walker_walk@nov").variant == "nov"
    for wrong, hint in (("dmc:walker_walk@novel", "@nov"), ("dmc:dog_run@nov", "mixes"), ("dmc:walk@nov", "did")):
        with pytest.raises(TaskError, match=hint):
            TaskId.parse(wrong)
    for wrong in ("dmc:dog_run", "dmc:walker_walk@nov", "toy:cue"):
        with pytest.raises(TaskError, match="nov"):
            position_entries(wrong)
