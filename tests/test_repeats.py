"""dmc:TASK@repeatN and gym:ID@repeatN: simulator steps of an action, and what is counted, summed and ended."""

import csv
from functools import partial
from typing import Any

import gymnasium as gym
import numpy as np
import pytest

from agent.evaluation.episodes import run_episodes
from envs import TaskError, TaskId, dmc, make_env, make_vector_env, position_entries
from envs.variants import Repeat


class Clock(gym.Env):
    """Observes how many simulator steps its episode has; step t pays t. It terminates, or never ends, by its length."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 60}
    observation_space, action_space = gym.spaces.Box(0.0, np.inf, (1,)), gym.spaces.Box(-2.0, 2.0, (1,))
    total = 0  # simulator steps of all copies
    actions: list[float] = []

    def __init__(self, length: int | None = None, render_mode: str | None = None) -> None:
        self.length, self.render_mode, self.time = length, render_mode, 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.time = 0
        return np.zeros(1, np.float32), {}

    def step(self, action):
        self.time += 1
        Clock.total += 1
        Clock.actions.append(float(action[0]))
        return np.full(1, self.time, np.float32), float(self.time), self.time == self.length, False, {}


@pytest.fixture
def clocks(monkeypatch):
    """Clock10-v0 terminates after 10 simulator steps, ClockCut-v0 is truncated after 10."""
    monkeypatch.setattr(Clock, "total", 0)
    monkeypatch.setattr(Clock, "actions", [])
    gym.register("Clock10-v0", entry_point=partial(Clock, 10), max_episode_steps=99)
    gym.register("ClockCut-v0", entry_point=Clock, max_episode_steps=10)
    yield
    for name in ("Clock10-v0", "ClockCut-v0"):
        del gym.registry[name]


# ---------------------------------------------------------------------- names


@pytest.mark.parametrize(
    ("text", "name", "parts"),
    [
        ("dmc:walker_walk", "dmc:walker_walk", ("walker_walk", "", 2)),
        ("dmc:walker-walk@repeat1", "dmc:walker_walk@repeat1", ("walker_walk", "", 1)),
        ("dmc:walker_walk@repeat32", "dmc:walker_walk@repeat32", ("walker_walk", "", 32)),
        ("dmc:walker_walk@nov@repeat4", "dmc:walker_walk@repeat4@nov", ("walker_walk", "nov", 4)),
        ("dmc:fish_swim@repeat4@fast-pixels", "dmc:fish_swim@repeat4@fast_pixels", ("fish_swim", "fast_pixels", 4)),
        ("gym:CartPole-v1", "gym:CartPole-v1", ("CartPole-v1", "", 1)),
        ("gym:CartPole-v1@repeat8", "gym:CartPole-v1@repeat8", ("CartPole-v1", "", 8)),
        ("gym:CartPole-v1@grid@repeat8", "gym:CartPole-v1@repeat8@grid", ("CartPole-v1", "grid", 8)),
    ],
)
def test_names_say_how_often_an_action_is_repeated(text: str, name: str, parts: tuple[str, str, int]) -> None:
    task = TaskId.parse(text)
    assert str(task) == name
    assert (task.base, task.variant, task.action_repeat) == parts
    assert TaskId.parse(name) == task


def test_names_of_folders_and_images() -> None:
    task = TaskId.parse("dmc:walker_walk@pixels@repeat4")
    assert (task.slug, task.draws, task.is_slow) == ("dmc-walker_walk-repeat4-pixels", True, True)
    shown = ("dmc:walker_walk@repeat4@pixels", "dmc:walker_walk@pixels@repeat4", "gym:A-v0@repeat2@image", "atari:pong")
    assert all(map(TaskId.shows_images, (*shown, "dmc:walker_walk@fast-pixels")))
    assert not any(map(TaskId.shows_images, ("atari", "image", "pixels")))  # values of other options
    assert not any(map(TaskId.shows_images, ("dmc:walker_walk@repeat4", "gym:A-v0@repeat2@grid", "toy:cue")))


@pytest.mark.parametrize("mark", [f"repeat{wrong}" for wrong in ("0", "33", "x", "", "-1", "04", "4.0", "100")])
@pytest.mark.parametrize("task", ["dmc:walker_walk", "gym:CartPole-v1"])
def test_repeats_out_of_range_are_refused_with_the_range(task: str, mark: str) -> None:
    with pytest.raises(TaskError) as caught:
        TaskId.parse(f"{task}@{mark}")
    assert f"there is no @{mark.replace('-', '_') if task.startswith('dmc') else mark}" in str(caught.value)
    assert "@repeat1 to @repeat32" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("dmc:walker_walk@repeat2@repeat4", ["@repeat2 and @repeat4 cannot be combined", "give one"]),
        ("dmc:walker_walk@nov@repeat2@pixels", ["@nov and @pixels cannot be combined"]),
        ("gym:CartPole-v1@grid@image", ["@grid and @image cannot be combined"]),
        ("dmc:walker_walk@repaet4", ["no variant @repaet4", "@nov", "@repeat1 to @repeat32"]),
        ("gym:CartPole-v1@4", ["no variant @4", "@grid", "@repeat1 to @repeat32"]),
        ("dmc:dog_run@repeat4@nov", ["mixes positions and velocities"]),
        ("toy:cue@repeat4", ["toy tasks have no variants", "leave @repeat4 behind cue out"]),
        ("atari:pong@repeat4", ["atari tasks have no variants", "leave @repeat4 behind pong out"]),
    ],
)
def test_what_does_not_combine_is_refused(text: str, parts: list[str]) -> None:
    with pytest.raises(TaskError) as caught:
        TaskId.parse(text)
    assert [part for part in parts if part not in str(caught.value)] == []


# ---------------------------------------------------------------------- steps, rewards and ends


@pytest.mark.parametrize(
    ("repeat", "rewards"),
    [(1, [*range(1, 11)]), (4, [10, 26, 19]), (5, [15, 40]), (10, [55]), (32, [55])],
)
@pytest.mark.parametrize(("name", "ends"), [("Clock10-v0", (True, False)), ("ClockCut-v0", (False, True))])
def test_rewards_are_summed_and_an_episode_ends_inside_a_repeat(
    clocks: None, name: str, ends: tuple[bool, bool], repeat: int, rewards: list[float]
) -> None:
    env = make_env(f"gym:{name}@repeat{repeat}", seed=0)
    for episode in range(1, 3):
        env.reset()
        paid, over = [], (False, False)
        while not any(over):
            observation, reward, *over, _ = env.step(np.array([0.5], np.float32))
            paid.append(reward)
            assert observation["state"][0] == min(10, repeat * len(paid))
        assert (paid, tuple(over)) == (rewards, ends)
        assert Clock.total == 10 * episode
    assert set(Clock.actions) == {1.0}  # scaled to the bounds, the same in every simulator step
    env.close()


def test_frames_per_second_follow(clocks: None) -> None:
    env = make_env("gym:Clock10-v0@repeat4", render=True)
    assert env.metadata["render_fps"] == 15
    assert Clock.metadata["render_fps"] == 60
    env.close()
    with pytest.raises(ValueError, match="at least once"):
        Repeat(Clock(), 0)


def test_training_and_evaluations_count_simulator_steps(clocks: None, make_trainer: Any, tmp_path: Any) -> None:
    """An episode of 10 steps takes three actions of 4, the last of which ends after two."""
    task = TaskId.parse("gym:Clock10-v0@repeat4")
    make_envs = partial(make_vector_env, task, seed=0)
    settings = {"envs": 2, "steps": 480, "ratio": 0.0, "eval_every": 0}
    trainer = make_trainer(tmp_path, make_envs, repeat=task.action_repeat, **settings)
    Clock.total = 0
    assert trainer.run()
    replay, row = trainer.replay, trainer.row
    rows = {name: value[:, : replay.count] for name, value in replay.rows.items()}
    actions = int((~rows["is_first"]).sum() + (~row["is_first"]).sum())
    assert trainer.step == 4 * actions == 480  # every action counts its repeats, the last of an episode too
    evaluated = 10 * 10  # of ten episodes, at the end of the run
    assert Clock.total == 10 * actions // 3 + evaluated
    np.testing.assert_array_equal(rows["obs/state"][0, :4, 0], [0, 4, 8, 10])
    np.testing.assert_array_equal(rows["reward"][0, :4], [0, 10, 26, 19])
    np.testing.assert_array_equal(rows["is_terminal"][0, :4], [False, False, False, True])
    with (tmp_path / "episodes.csv").open(newline="") as file:
        episodes = list(csv.DictReader(file))
    assert {(float(row["return"]), int(row["length"])) for row in episodes} == {(55.0, 12)}
    played = run_episodes(trainer.agent, make_envs, 3, seed=5, repeat=task.action_repeat)
    assert {(row["return"], row["length"], len(row["loop_counts"]) > 0) for row in played} == {(55.0, 12, True)}


@pytest.mark.parametrize(("repeat", "actions"), [(1, 1000), (2, 500), (16, 63)])
def test_control_suite_episodes_last_1000_simulator_steps(repeat: int, actions: int) -> None:
    """The same simulation, whatever the repeat: states agree where actions do."""
    plain, env = (make_env(f"dmc:cartpole_swingup@repeat{times}", seed=0) for times in (1, repeat))
    plain.reset()
    env.reset()
    push, steps, over = np.array([0.1], np.float32), 0, False
    while not over:
        state, reward, terminated, truncated, _ = env.step(push)
        expected = 0.0
        for _ in range(min(repeat, 1000 - steps * repeat)):
            there, paid, *_ = plain.step(push)
            expected += paid
        np.testing.assert_array_equal(state["state"], there["state"])
        assert reward == pytest.approx(expected)
        steps, over = steps + 1, terminated or truncated
    assert (steps, terminated, truncated) == (actions, False, True)
    assert env.get_wrapper_attr("metadata")["render_fps"] == pytest.approx(100 / repeat)
    for each in (plain, env):
        each.close()


def test_views_and_repeats_combine() -> None:
    both = make_env("dmc:walker_walk@nov@repeat8", seed=1)
    assert isinstance(both.unwrapped, dmc.DMControl)
    assert both.unwrapped._repeat == 8
    mask = position_entries("dmc:walker_walk@repeat8")
    assert both.observation_space["state"].shape == (mask.sum(),)
    both.close()


def test_a_run_and_its_checkpoint_follow(script: Any) -> None:
    words = ("gym:CartPole-v1@repeat4", "--preset", "debug", "--no-video", "--eval.episodes", 2)
    done = script("train_agent.py", *words, "--steps", 500, "--run-dir", "run")
    assert done.returncode == 0, done.stderr
    assert "500 simulator steps, 4 per action" in done.stdout
    done = script("evaluate.py", "policy", "run", "--episodes", 2)
    assert done.returncode == 0, done.stderr
    assert "gym:CartPole-v1@repeat4" in done.stdout
    short = script("train_agent.py", *words, "--steps", 300, "--run-dir", "short")
    assert "(400 steps of gym:CartPole-v1@repeat4)" in short.stderr
