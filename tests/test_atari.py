"""Atari games: names, the two protocols, and lives."""

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.vector import SyncVectorEnv

from agent.evaluation.atari_scores import human_normalised, scores
from envs import TaskError, TaskId, make_env, make_vector_env, tasks
from envs.atari import Atari, games

pytest.importorskip("ale_py", reason="the Atari games are not installed")
pytest.importorskip("cv2", reason="the Atari games are not installed")


@pytest.mark.parametrize("text", ["atari:SpaceInvaders", "atari:space-invaders", "Atari:space_invaders"])
def test_a_games_name_may_be_written_in_many_ways(text):
    assert str(TaskId.parse(text)) == "atari:space_invaders"


@pytest.mark.parametrize(("text", "hint"), [("atari:pongg", "atari:pong"), ("atari100k:boxxing", "atari100k:boxing")])
def test_unknown_games_come_with_a_suggestion(text, hint):
    with pytest.raises(TaskError, match=f"did you mean {hint}"):
        TaskId.parse(text)


def test_the_hundred_thousand_protocol():
    task = TaskId.parse("atari100k:pong")
    env = make_env(task, seed=0)
    obs, _ = env.reset()
    ale = env.unwrapped.ale
    assert obs["image"].shape == (64, 64, 3)
    assert obs["image"].dtype == np.uint8
    assert env.action_space.n == 6
    assert ale.getFloat("repeat_action_probability") == 0.0
    before = ale.getEpisodeFrameNumber()
    assert before <= 30 + 1
    env.step(0)
    assert ale.getEpisodeFrameNumber() == before + 4
    assert (task.action_repeat, task.evaluation_episodes) == (1, 100)
    env.close()
    assert make_env("atari:pong").unwrapped.ale.getFloat("repeat_action_probability") == 0.25


def test_the_same_seed_plays_the_same_game():
    def play(seed):
        env = make_env("atari:breakout", seed=seed)
        images = [env.reset()[0]["image"]]
        images += [env.step(i % env.action_space.n)[0]["image"] for i in range(40)]
        env.close()
        return np.stack(images)

    assert np.array_equal(play(1), play(1))
    assert not np.array_equal(play(1), play(2))


def lose_lives(lives_end: bool, steps: int = 1500) -> list[tuple[int, bool]]:
    """(lives before the reset, whether the game itself was over) of every ending of Breakout without moving."""
    env = make_env("atari100k:breakout", seed=0, lives_end=lives_end)
    env.reset()
    endings = []
    for step in range(steps):
        *_, terminated, truncated, info = env.step(1 if step % 3 == 0 else 0)  # fire, or nothing
        if terminated or truncated:
            endings.append((info["lives"], env.unwrapped.ale.game_over()))
            env.reset()
    env.close()
    return endings


def test_the_loss_of_a_life_ends_an_episode_where_it_is_wanted_and_the_game_goes_on():
    endings = lose_lives(True)
    assert [lives for lives, _ in endings[:5]] == [4, 3, 2, 1, 0]
    assert [over for _, over in endings[:5]] == [False] * 4 + [True]
    whole = lose_lives(False, 3000)
    assert whole
    assert all(over for _, over in whole)


def test_games_in_processes_of_their_own():
    envs = make_vector_env("atari:pong", 2, seed=3, apart=True)
    same = make_vector_env("atari:pong", 2, seed=3, apart=False)
    one, other = envs.reset(seed=3)[0], same.reset(seed=3)[0]
    assert one["image"].shape == (2, 64, 64, 3)
    assert np.array_equal(one["image"], other["image"])
    envs.close()
    same.close()


@pytest.mark.parametrize(
    ("copies", "cores", "apart"), [(2, 2, True), (10, 2, True), (1, 2, True), (2, 1, True), (1, 1, False)]
)
def test_games_go_into_processes_where_that_pays(monkeypatch, copies, cores, apart):
    started = []
    monkeypatch.setattr(tasks, "cores", lambda: cores)
    monkeypatch.setattr(tasks, "Processes", lambda makers, **how: started.append(len(makers)))
    monkeypatch.setattr(tasks, "make_env", lambda task, seed, lives_end: gym.make("CartPole-v1"))  # is made faster
    envs = make_vector_env("atari:pong", copies, seed=0, apart=True)
    assert started == ([copies] if apart else [])
    if not apart:
        assert isinstance(envs, SyncVectorEnv)
        envs.close()


@pytest.mark.parametrize(
    ("task", "cores", "parallel"),
    [
        ("atari:pong", 2, False),
        ("atari:pong", tasks.MANY_CORES, True),
        ("dmc:walker_walk@pixels", 64, True),
        ("dmc:walker_walk", 64, False),
        ("gym:CartPole-v1", 64, False),
        ("toy:cue", 64, False),
    ],
)
def test_evaluations_use_processes_where_a_step_is_slow_and_there_are_cores(monkeypatch, task, cores, parallel):
    monkeypatch.setattr(tasks, "cores", lambda: cores)
    assert tasks.TaskId.parse(task).is_parallel is parallel


def test_scores_are_put_between_random_play_and_a_human():
    assert human_normalised("atari100k:pong", -20.7) == 0.0
    assert human_normalised("atari:pong", 14.6) == pytest.approx(1.0)
    assert human_normalised("atari100k:boxing", 79.0) == pytest.approx((79.0 - 0.1) / (12.1 - 0.1))
    assert human_normalised("dmc:walker_walk", 900.0) is None
    assert human_normalised("atari:tetris", 900.0) is None
    assert len(scores()) == 26
    assert set(scores()) <= set(games())


def test_what_the_reset_of_a_life_brings_is_not_lost(monkeypatch):
    env = make_env("atari100k:breakout", seed=0, lives_end=True)
    env.reset()
    atari = env
    while not isinstance(atari, Atari):
        atari = atari.env
    atari.over, step = False, atari.env.step
    monkeypatch.setattr(atari.env, "step", lambda action: (step(action)[0], 5.0, *step(action)[2:]))
    env.reset()
    assert env.step(0)[1] == 10.0
    assert env.step(0)[1] == 5.0
    monkeypatch.setattr(atari.env, "step", lambda action: (step(action)[0], 5.0, True, *step(action)[3:]))
    env.reset()  # what ends with the life is not paid in the next game
    monkeypatch.setattr(atari.env, "step", step)
    assert env.step(0)[1] == 0.0
    env.close()
