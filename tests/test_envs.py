"""The promises of envs/: one observation format, honest episode ends, seeds, and errors that help."""

import json
import os
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import dm_env
import gymnasium as gym
import numpy as np
import pytest
from dm_env import specs
from gymnasium import spaces
from gymnasium.utils.env_checker import check_env

import envs
from envs import TaskError, TaskId, dmc, make_env, make_vector_env, rendering, toy
from envs.gym_adapter import GymAdapter

ROOT = Path(__file__).resolve().parents[1]


def run_python(code: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh process, where nothing has chosen a drawing backend yet."""
    environment = {key: value for key, value in os.environ.items() if key != "MUJOCO_GL"}
    path = os.pathsep.join(filter(None, [variables.pop("FIRST_ON_PATH", ""), str(ROOT)]))
    environment.update(variables, PYTHONPATH=path)
    return subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


# --- task names


def test_every_control_suite_task_has_a_unique_name_that_parses() -> None:
    rendering.prepare_rendering(False)
    from dm_control import suite

    theirs = {f"{domain}_{task}": (domain, task) for domain, task in suite.ALL_TASKS}
    assert len(theirs) == len(suite.ALL_TASKS)
    assert theirs == dmc.TASKS
    for name in theirs:
        assert str(TaskId.parse(f"dmc:{name}")) == f"dmc:{name}"


def test_task_id_text_slug_and_repeat() -> None:
    task = TaskId.parse(" DMC:ball-in-cup-catch ")
    assert (task.suite, task.name, task.action_repeat) == ("dmc", "ball_in_cup_catch", 2)
    assert str(task) == "dmc:ball_in_cup_catch"
    assert task.slug == "dmc-ball_in_cup_catch"
    assert TaskId("gym", "my_package:ALE/Pong-v5").slug == "gym-my_package-ALE-Pong-v5"
    assert TaskId.parse("gym:CartPole-v1").action_repeat == TaskId.parse("toy:cue").action_repeat == 1
    assert TaskId.parse("toy:cue") == TaskId("toy", "cue")


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("walker_walk", ["names no suite", "did you mean dmc:walker_walk?", "gym:Pendulum-v1", "toy:cue"]),
        ("walker-wlak", ["did you mean dmc:walker_walk?"]),
        ("Pendulum-v1", ["did you mean gym:Pendulum-v1?"]),
        ("cue5", ["did you mean toy:cue5?"]),
        ("atari:Pong", ["no suite 'atari'", "dmc:walker_walk", "gym:Pendulum-v1", "toy:cue"]),
        ("dm:walker_walk", ["did you mean dmc:walker_walk?"]),
        ("my_package:MyEnv-v0", ["did you mean gym:my_package:MyEnv-v0?"]),
        ("dmc:walker_wlak", ["no dmc task 'walker_wlak'", "did you mean dmc:walker_walk"]),
        ("gym:Pendulm-v1", ["no Gymnasium task", "did you mean gym:Pendulum-v1"]),
        ("gym:no_such_module:MyEnv-v0", ["'no_such_module'", "importable", "PYTHONPATH", "install"]),
        ("toy:cuee", ["no toy world 'cuee'", "cue, serial, counter"]),
        ("toy:serial1", ["2 positions"]),
        ("dmc:", ["no dmc task ''"]),
        ("", ["names no suite"]),
    ],
)
def test_wrong_names_are_answered_with_help(text: str, parts: list[str]) -> None:
    with pytest.raises(TaskError) as caught:
        TaskId.parse(text)
    for part in parts:
        assert part in str(caught.value)
    assert isinstance(caught.value, ValueError)


def test_missing_control_suite_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dmc, "installed", lambda: False)
    with pytest.raises(TaskError, match="pip install dm-control"):
        TaskId.parse("dmc:walker_walk")


def test_importing_and_parsing_stay_light() -> None:
    code = (
        "import envs, sys\n"
        "for text in ('toy:cue', 'gym:Pendulum-v1', 'dmc:walker_walk'): envs.TaskId.parse(text)\n"
        "print([name for name in ('torch', 'dm_control', 'mujoco') if name in sys.modules])"
    )
    assert run_python(code).stdout.strip() == "[]"


# --- the Control Suite


@pytest.mark.parametrize("name", ["cartpole_swingup", "ball_in_cup_catch", "humanoid_stand", "lqr_lqr_2_1"])
def test_control_suite_tasks_step(name: str) -> None:
    env = make_env(f"dmc:{name}", seed=0)
    observation, info = env.reset()
    assert info == {}
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
    observation, _ = env.reset()
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


# --- seeds


def trajectory(env: gym.Env, seed: int | None, steps: int = 20) -> np.ndarray:
    """Rows of observation and reward under fixed actions, two episodes at most."""
    actions = np.random.default_rng(0)
    rows = [np.append(env.reset(seed=seed)[0]["state"], 0.0)]
    for _ in range(steps):
        space = env.action_space
        if isinstance(space, spaces.Discrete):
            action: Any = int(actions.integers(space.n))
        else:
            action = actions.uniform(-1, 1, space.shape).astype(np.float32)
        observation, reward, terminated, truncated, _ = env.step(action)
        rows.append(np.append(observation["state"], reward))
        if terminated or truncated:
            rows.append(np.append(env.reset()[0]["state"], 0.0))
    return np.array(rows)


@pytest.mark.parametrize(
    "task",
    ["dmc:reacher_easy", "dmc:lqr_lqr_2_1", "gym:Pendulum-v1", "toy:serial", "toy:cue5", "toy:counter"],
)
def test_seed_decides_the_trajectory(task: str) -> None:
    env, made_with_seed = make_env(task, seed=1), make_env(task, seed=1)
    first = trajectory(env, 5)
    np.testing.assert_array_equal(first, trajectory(env, 5))  # reseeding in place
    same = trajectory(make_env(task, seed=1), 5)
    np.testing.assert_array_equal(first, same)  # and in another instance
    np.testing.assert_array_equal(trajectory(made_with_seed, None), trajectory(env, 1))
    others = [trajectory(env, seed) for seed in range(6, 12)]
    assert any(other.shape != first.shape or (other != first).any() for other in others)
    env.close()


def test_seeds_beyond_32_bits_are_accepted() -> None:
    env = make_env("dmc:pendulum_swingup")
    env.reset(seed=2**40 + 3)
    env.close()


# --- Gymnasium tasks


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
    for image in (spaces.Box(0, 255, (8, 8, 3), np.uint8), spaces.Box(0, 255, (8, 8), np.uint8)):
        with pytest.raises(TaskError, match="pixels are not supported yet"):
            GymAdapter(Recorder(spaces.Dict(image=image), NONE))
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
    try:
        env = make_env(task, seed=0)
        env.reset()
        assert [env.step(np.ones(1, np.float32))[3] for _ in range(3)] == [False, False, True]
        env.close()
        with pytest.raises(TaskError, match="did you mean gym:Own-v0"):
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


# --- vector environments


def test_vector_env_puts_the_reset_row_after_the_last_row() -> None:
    vector = make_vector_env("toy:counter", num_envs=2, seed=3)
    observations, _ = vector.reset(seed=3)
    assert observations["state"].shape == (2, 2)
    assert observations["state"].dtype == np.float32
    clock, over, ends = np.zeros(2), np.zeros(2, bool), []
    for _ in range(60):
        observations, rewards, terminated, truncated, _ = vector.step(vector.action_space.sample())
        clock = np.where(over, 0, clock + 1)  # the row after an end is the reset row
        np.testing.assert_array_equal(observations["state"][:, 0], clock)
        np.testing.assert_array_equal(rewards, clock)
        over = terminated | truncated
        ends += list(zip(observations["state"][over, 1] % 2, terminated[over], truncated[over], strict=True))
    assert {end[1:] for end in ends} == {(True, False), (False, True)}
    assert all(terminated == (odd == 0) for odd, terminated, _ in ends)
    vector.close()


def test_vector_env_seeds_copies_apart() -> None:
    vector = make_vector_env(TaskId.parse("dmc:reacher_easy"), num_envs=2, seed=4)
    made, _ = vector.reset()
    given, _ = vector.reset(seed=4)
    np.testing.assert_array_equal(made["state"], given["state"])
    assert (made["state"][0] != made["state"][1]).any()
    vector.close()
    with pytest.raises(ValueError, match="at least 1"):
        make_vector_env("toy:cue", num_envs=0, seed=0)


# --- toy worlds


@pytest.mark.parametrize("name", ["cue", "cue0", "cue50", "serial", "serial5", "counter"])
def test_toy_worlds_pass_the_gymnasium_checker_and_draw(name: str) -> None:
    check_env(toy.make_toy(name), skip_render_check=True)
    env = make_env(f"toy:{name}", seed=0, render=True)
    env.reset()
    frame = env.render()
    assert frame.dtype == np.uint8
    assert frame.shape[2] == 3
    assert frame.shape[0] % 2 == frame.shape[1] % 2 == 0
    with pytest.raises(TaskError, match="render=True"):
        toy.make_toy(name).render()


def play(env: toy.ToyWorld, policy: Any, episodes: int) -> float:
    """Mean return; `policy(state, is_first)` sees observations only."""
    total = 0.0
    for episode in range(episodes):
        observation, _ = env.reset(seed=0) if episode == 0 else env.reset()
        first, over = True, False
        while not over:
            action = policy(observation["state"], first)
            observation, reward, terminated, truncated, _ = env.step(action)
            total, first, over = total + reward, False, terminated or truncated
    return total / episodes


class Remember:
    """The best policy for Cue: keep the cue of the first observation."""

    def __call__(self, state: np.ndarray, first: bool) -> int:
        if first:
            self.cue = int(state[:2].argmax())
        return self.cue


def foresee(env: toy.Serial) -> Any:
    """The best policy for Serial: apply the map n times."""

    def policy(state: np.ndarray, first: bool) -> int:
        position = int(state[: env.positions].argmax())
        for _ in range(int(state[env.positions :].argmax())):
            position = int(env.map[position])
        return position % 2

    return policy


def test_best_and_random_policies_reach_the_stated_returns() -> None:
    rng = np.random.default_rng(0)

    def guess(state: np.ndarray, first: bool) -> int:
        return int(rng.integers(2))

    for delay in (0, 20):
        cue = toy.Cue(delay)
        assert play(cue, Remember(), 20) == cue.optimal_return
    assert play(toy.Cue(3), guess, 600) == pytest.approx(toy.Cue.random_return, abs=0.15)
    for serial in (toy.Serial(), toy.Serial(positions=7)):
        assert play(serial, foresee(serial), 5) == serial.optimal_return
        assert play(serial, guess, 60) == pytest.approx(serial.random_return, abs=2.0)
    counted = play(toy.Counter(), lambda *_: np.zeros(1, np.float32), 600)
    assert counted == pytest.approx(toy.Counter.optimal_return, abs=3.0)


def test_cue_shows_nothing_between_cue_and_query() -> None:
    seen: dict[int, np.ndarray] = {}
    for seed in range(20):
        env = toy.Cue(delay=4)
        rows = [env.reset(seed=seed)[0]["state"]]
        for step in range(6):
            observation, reward, terminated, truncated, _ = env.step(seed // 10)
            rows.append(observation["state"])
            assert (reward != 0, terminated, truncated) == (step == 5, step == 5, False)
        cue = int(rows[0][:2].argmax())
        if cue in seen:
            np.testing.assert_array_equal(np.array(rows[1:]), seen[cue])
        seen[cue] = np.array(rows[1:])
    np.testing.assert_array_equal(seen[0], seen[1])
    np.testing.assert_array_equal(seen[0], [[0, 0, 1, 0]] * 4 + [[0, 0, 0, 1], [0, 0, 0, 0]])


def test_serial_moves_by_the_power_it_shows() -> None:
    env = toy.Serial(positions=16)
    ring = [0]
    while len(ring) < 16:
        ring.append(int(env.map[ring[-1]]))
    assert sorted(ring) == list(range(16))  # one cycle through all positions
    np.testing.assert_array_equal(env.map, toy.Serial(positions=16).map)
    state = env.reset(seed=0)[0]["state"]
    powers = set()
    for step in range(50):
        position, power = int(state[:16].argmax()), int(state[16:].argmax())
        assert state.sum() == 2
        powers.add(power)
        observation, reward, terminated, truncated, _ = env.step(1)
        state = observation["state"]
        expected = ring[(ring.index(position) + power) % 16]
        assert int(state[:16].argmax()) == expected
        assert reward == expected % 2
        assert (terminated, truncated) == (False, step == 49)
    assert powers == set(range(9))


# --- drawing


@pytest.fixture
def undecided(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """As in a fresh process on Linux without a screen; `_works` stands in for the probes."""
    monkeypatch.setattr(rendering, "_chosen_here", False)
    monkeypatch.setattr(rendering, "_works", {"egl": False, "osmesa": False, "glfw": False})
    monkeypatch.setattr(rendering, "sys", SimpleNamespace(platform="linux", modules={}, executable=""))
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.setenv("MUJOCO_GL", "")  # set first, so that the end of the test restores the real value
    return monkeypatch


def test_backends_are_tried_in_order(undecided: pytest.MonkeyPatch) -> None:
    assert envs.rendering_backend() is None
    rendering._works["glfw"] = True
    assert envs.rendering_backend() is None  # there is no display
    undecided.setenv("DISPLAY", ":0")
    assert envs.rendering_backend() == "glfw"
    rendering._works["osmesa"] = True
    assert envs.rendering_backend() == "osmesa"
    rendering._works["egl"] = True
    assert envs.rendering_backend() == "egl"


def test_prepare_rendering_chooses_before_the_import(undecided: pytest.MonkeyPatch) -> None:
    assert envs.prepare_rendering(False) is None
    assert os.environ["MUJOCO_GL"] == "disable"
    assert "libegl1 libegl-mesa0 libgl1-mesa-dri" in str(envs.prepare_rendering(True))
    assert os.environ["MUJOCO_GL"] == "disable"
    rendering._works["osmesa"] = True
    assert envs.prepare_rendering(True) is None  # our own 'disable' may be taken back
    assert os.environ["MUJOCO_GL"] == "osmesa"
    assert envs.prepare_rendering(False) is None
    assert os.environ["MUJOCO_GL"] == "osmesa"  # and a later state-only environment keeps it
    rendering.sys.modules["dm_control._render"] = SimpleNamespace(BACKEND="disable")
    assert "before the first environment" in str(envs.prepare_rendering(True))


def test_the_users_choice_is_kept(undecided: pytest.MonkeyPatch) -> None:
    rendering._works["osmesa"] = True
    for value, message in [("disable", "switches drawing off"), ("egl", "MUJOCO_GL=egl does not work here")]:
        undecided.setenv("MUJOCO_GL", value)
        assert message in str(envs.prepare_rendering(True))
        assert envs.prepare_rendering(False) is None
        assert os.environ["MUJOCO_GL"] == value
    undecided.setenv("MUJOCO_GL", "osmesa")
    assert envs.prepare_rendering(True) is None


def test_state_only_work_needs_no_opengl() -> None:
    code = """
import json, os
from envs import TaskError, make_env
steps = []
for task in ("dmc:quadruped_escape", "dmc:cartpole_swingup"):  # the first asks for OpenGL at each reset
    env = make_env(task, seed=0)
    env.reset()
    steps += [env.step(env.action_space.sample())[1] for _ in range(3)]
messages = []
for draw in (env.render, lambda: make_env("dmc:cartpole_swingup", render=True)):
    try: draw()
    except TaskError as error: messages.append(str(error))
print(json.dumps([len(steps), os.environ["MUJOCO_GL"], *messages]))
"""
    done = run_python(code, MUJOCO_GL="disable")
    steps, backend, first, second = json.loads(done.stdout)
    assert (steps, backend) == (6, "disable")
    assert "render=True" in first
    assert "MUJOCO_GL=disable switches drawing off" in second


def test_an_import_broken_by_mujoco_gl_is_explained(tmp_path: Path) -> None:
    package = tmp_path / "dm_control"  # fails as the real one does where the OpenGL library is missing
    package.mkdir()
    (package / "__init__.py").write_text("None.eglQueryString")
    code = "import envs\ntry: envs.make_env('dmc:walker_walk')\nexcept envs.TaskError as e: print(e)"
    broken = run_python(code, MUJOCO_GL="egl", FIRST_ON_PATH=str(tmp_path)).stdout
    assert "MUJOCO_GL=egl does not work here; unset it" in broken
    broken = run_python(code, FIRST_ON_PATH=str(tmp_path)).stdout
    assert "dm_control cannot be imported" in broken


def test_frames_are_drawn_where_a_backend_works() -> None:
    code = """
from envs import make_env, prepare_rendering
problem = prepare_rendering(True)
if problem: print(problem)
else:
    task = "dmc:cartpole_swingup"
    state_only, drawn = make_env(task), make_env(task, seed=0, render=True)
    state_only.reset(); drawn.reset()
    print("frame", drawn.render().shape, drawn.render().dtype, drawn.render().std() > 1)
    drawn.close()
"""
    output = run_python(code).stdout
    if "no OpenGL backend works here" in output:
        pytest.skip("no OpenGL on this computer")
    assert "frame (240, 320, 3) uint8 True" in output
