"""The promises of envs/: task names, seeds, honest episode ends in vectors, drawing, and errors that help."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces

import envs
from envs import TaskError, TaskId, dmc, make_env, make_vector_env, rendering

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
        ("serial16x2", ["did you mean toy:serial16x2?"]),
        ("procgen:coinrun", ["no suite 'procgen'", "dmc:walker_walk", "gym:Pendulum-v1", "toy:cue"]),
        ("dm:walker_walk", ["did you mean dmc:walker_walk?"]),
        ("my_package:MyEnv-v0", ["did you mean gym:my_package:MyEnv-v0?"]),
        ("dmc:walker_wlak", ["no dmc task 'walker_wlak'", "did you mean dmc:walker_walk"]),
        ("gym:Pendulm-v1", ["no Gymnasium task", "did you mean gym:Pendulum-v1"]),
        ("gym:no_such_module:MyEnv-v0", ["'no_such_module'", "importable", "PYTHONPATH", "install"]),
        ("toy:cuee", ["no toy world 'cuee'", "cue, serial, counter"]),
        ("toy:serial1", ["4, 8, 16, .. positions"]),
        ("toy:serial100", ["a power of two"]),
        ("toy:serial16x0", ["1 register or more"]),
        ("toy:serialx2", ["no toy world 'serialx2'", "serial64x3"]),
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


@pytest.mark.parametrize(("suite", "unit"), [("atari100k", "agent steps"), ("dmc", "simulator steps")])
def test_steps_have_the_unit_of_their_suite(suite: str, unit: str) -> None:
    assert TaskId(suite, "pong").unit == unit


# --- drawing


@pytest.fixture
def undecided(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """As in a fresh process on Linux without a screen; `_works` stands in for the probes."""
    monkeypatch.setattr(rendering, "_chosen_here", False)
    monkeypatch.setattr(rendering, "_users_broken", None)
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
    undecided.setenv("MUJOCO_GL", "disable")
    assert "switches drawing off" in str(envs.prepare_rendering(True))
    undecided.setenv("MUJOCO_GL", "osmesa")
    for want in (True, False):
        assert envs.prepare_rendering(want) is None
        assert os.environ["MUJOCO_GL"] == "osmesa"


def test_a_users_choice_that_does_not_work_costs_the_video_alone(undecided: pytest.MonkeyPatch) -> None:
    undecided.setenv("MUJOCO_GL", "egl")
    assert envs.prepare_rendering(False) is None
    assert os.environ["MUJOCO_GL"] == "disable"  # with egl, importing dm_control would fail
    assert "MUJOCO_GL=egl does not work here" in str(envs.prepare_rendering(True))
    assert os.environ["MUJOCO_GL"] == "disable"


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
    for chosen in ({}, {"MUJOCO_GL": "egl"}):  # where egl works, it is the first suspect
        broken = run_python(code, FIRST_ON_PATH=str(tmp_path), **chosen).stdout
        assert "dm_control cannot be imported" in broken or "MUJOCO_GL=egl does not work here; unset it" in broken


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
