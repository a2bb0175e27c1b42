"""Evaluation and recorded episodes in environments that misbehave."""

import math

import numpy as np
import pytest
import torch
from conftest import Metronome, counters, metronomes, untrained

from agent.errors import BadStep, EnvironmentFailure
from agent.evaluation import recording, rounds
from agent.evaluation.episodes import Evaluator, run_episodes
from agent.evaluation.recording import record
from agent.evaluation.rollout_error import NAIVE, RolloutErrors, crossings, format_results, not_finite_notes
from agent.evaluation.video import record_episode
from agent.runs.presets import preset


class Lasting(Metronome):
    """Episodes of a length that the seed says; 0 never ends."""

    made, lasts = 0, staticmethod(lambda seed: 10)

    def reset(self, *, seed=None, options=None):
        self.length = type(self).lasts(seed or 1)
        return super().reset(seed=seed)


def lasting(lengths):
    """make_envs of a kind whose episode with the seed s lasts lengths(s) steps."""
    kind = type("Kind", (Lasting,), {"lasts": staticmethod(lengths)})
    return lambda count: metronomes(count, kind)


def test_an_episode_that_never_ends_is_cut_counted_and_said(monkeypatch):
    monkeypatch.setattr(rounds, "MAX_STEPS", 25)
    said = []
    rows = run_episodes(untrained(metronomes), lasting(lambda seed: 0 if seed == 2 else 10), 4, 0, say=said.append)
    assert [row["length"] for row in rows] == [10, 10, 25, 10]
    assert [row["cut"] for row in rows] == [False, False, True, False]
    assert len(said) == 1
    assert said[0].startswith("note: 1 of 4 episodes did not end and were cut off after 25 agent steps")


def test_a_recorded_episode_that_never_ends_is_cut(monkeypatch):
    monkeypatch.setattr(recording, "MAX_STEPS", 25)
    said, agent = [], untrained(metronomes)
    make_envs = lasting(lambda seed: 0 if seed == 2 else 10)
    recorded = record(None, agent.spaces, make_envs, range(1, 4), say=said.append)
    assert recorded.episodes.length.tolist() == [11, 26, 11]
    assert not recorded.terminal.any()
    assert "1 of 3 episodes did not end and were cut off after 25 agent steps" in said[0]
    monkeypatch.setattr(recording, "MOST_BYTES", 3 * 8 * 15)  # two float32 numbers a row
    assert record(None, agent.spaces, make_envs, range(1, 4), say=said.append).episodes.length.tolist() == [11, 16, 11]


def test_a_video_of_an_episode_that_never_ends_is_cut(monkeypatch):
    monkeypatch.setattr("agent.evaluation.video.MAX_STEPS", 12)
    env = lasting(lambda seed: 0)(1).envs[0]
    env.render = lambda: np.zeros((8, 8, 3))
    frames, *_ = record_episode(untrained(metronomes), env, preset("debug").eval)
    assert len(frames) == 12


def test_long_evaluations_say_how_far_they_are(monkeypatch):
    monkeypatch.setattr(rounds, "QUIET_SECONDS", 0.0)
    said = []
    run_episodes(untrained(metronomes), lasting(lambda seed: 5 * seed), 3, 1, parallel=2, say=said.append)
    assert len(said) == 10 + 15  # the second round's other copy does not count
    assert said[6].startswith("evaluation episodes: 1 of 3 over, 7 steps of the others played, returns so far ")
    assert said[10].startswith("evaluation episodes: 2 of 3 over, 1 steps")
    monkeypatch.setattr(rounds, "QUIET_SECONDS", 1000.0)
    said.clear()
    run_episodes(untrained(metronomes), metronomes, 3, 1, say=said.append)
    assert said == []


class Bad(Metronome):
    """`bad` is returned in step 5 of an episode, as a reward or in an observation."""

    bad, where, seeds = math.nan, "reward", range(100)

    def reset(self, *, seed=None, options=None):
        self.judged = seed in self.seeds
        return super().reset(seed=seed)

    def step(self, action):
        obs, reward, *rest = super().step(action)
        if self.time == 5 and self.judged:
            if self.where == "reward":
                reward = self.bad
            else:
                obs = {"state": np.full(2, self.bad, np.float32)}
        return obs, reward, *rest


def bad(**values):
    kind = type("Kind", (Bad,), values)
    return lambda count: metronomes(count, kind)


@pytest.mark.parametrize("values", [{}, {"bad": 1e39}, {"where": "observation"}, {"seeds": [2]}])
def test_what_is_not_finite_is_no_return_and_no_recording(values):
    agent = untrained(metronomes)
    with pytest.raises(BadStep, match="^in step 5 of an evaluation episode: the environment's .* not a finite float32"):
        run_episodes(agent, bad(**values), 3, 0)
    for player in (agent, None):
        with pytest.raises(BadStep, match="^in step 5 of a recorded episode: the environment's"):
            record(player, agent.spaces, bad(**values), range(3))


class Ended(Metronome):
    """After its first episode, which the seed 0 makes a short one, it returns what it likes."""

    def reset(self, *, seed=None, options=None):
        self.episodes = 1 if seed is not None else self.episodes + 1
        self.length = 3 if seed == 0 else 10
        return super().reset(seed=seed)

    def step(self, action):
        obs, reward, *rest = super().step(action)
        return obs, math.nan if self.episodes > 1 else reward, *rest


def test_copies_whose_episode_is_over_may_return_anything():
    rows = run_episodes(untrained(metronomes), lambda count: metronomes(count, Ended), 2, 0)
    assert [row["length"] for row in rows] == [3, 10]
    assert all(math.isfinite(row["return"]) for row in rows)
    recorded = record(None, untrained(metronomes).spaces, lambda count: metronomes(count, Ended), range(2))
    assert recorded.episodes.reward.isfinite().all()


class Levels(Metronome):
    """Ten levels."""

    def reset(self, *, seed=None, options=None):
        if seed is not None and seed >= 10:
            raise ValueError(f"there is no level {seed}")
        return super().reset(seed=seed)


def test_a_reset_that_refuses_the_seeds_is_told_them():
    agent = untrained(metronomes)
    said = "in the reset with the seeds 8 to 10: ValueError: there is no level 10; .*any whole number: use seed % 1000"
    with pytest.raises(EnvironmentFailure, match=said):
        run_episodes(agent, lambda count: metronomes(count, Levels), 3, 8)
    with pytest.raises(EnvironmentFailure, match="in the reset with the seed 10: ValueError"):
        record(None, agent.spaces, lambda count: metronomes(count, Levels), range(10, 11))


def only_one(count):
    """As an environment of which one copy may exist."""
    if count > 1:
        raise OSError(98, "Address already in use")
    return counters(count)


def test_where_one_copy_can_be_made_it_plays_all_episodes(monkeypatch):
    monkeypatch.setattr(rounds, "_said", set())
    agent, said = untrained(), []
    rows = run_episodes(agent, only_one, 5, 50, say=said.append)
    many = run_episodes(agent, counters, 5, 50)
    assert [(row["seed"], row["return"], row["length"]) for row in rows] == [
        (row["seed"], row["return"], row["length"]) for row in many
    ]
    recorded = record(agent, agent.spaces, only_one, range(5), say=said.append)
    side_by_side = record(agent, agent.spaces, counters, range(5))
    assert torch.equal(recorded.episodes.length, side_by_side.episodes.length)
    assert torch.equal(recorded.episodes.obs["state"], side_by_side.episodes.obs["state"])
    assert torch.equal(recorded.episodes.reward, side_by_side.episodes.reward)
    assert torch.equal(recorded.terminal, side_by_side.terminal)
    assert recorded.contacts is None
    assert len(said) == 1
    assert "only one copy of the environment can be made" in said[0]
    assert "Address already in use" in said[0]


def test_where_none_can_be_made_the_first_reason_is_given():
    def none(count):
        raise OSError(f"no robot for {count}")

    with pytest.raises(EnvironmentFailure, match="OSError: no robot for 4"):
        run_episodes(untrained(), none, 4, 0)


def test_a_close_that_fails_keeps_the_episodes(capsys):
    class Hanging(Metronome):
        def close(self):
            self.viewer.close()

    rows = Evaluator(preset("debug").eval, untrained(metronomes), lambda n: metronomes(n, Hanging), 1)(final=True)
    assert len(rows) == 10
    assert "note: closing the environment failed: AttributeError" in capsys.readouterr().err


def test_predictions_that_are_not_finite_are_no_better_than_anything():
    row = {"policy": "agent", "loops": "2", **dict.fromkeys(NAIVE, 0.5)}
    row |= {"reward": 0.1, "reward_copy": 1.0, "reward_mean": 1.0}
    errors = [{**row, "step": step, "observation": 0.1 if step < 3 else math.nan} for step in range(1, 6)]
    results = RolloutErrors(crossings(errors), errors)
    results.notes = not_finite_notes(results)
    text = format_results(results)
    assert "better than both" not in text
    assert "no better than the last state from step 3 on, no better than the mean from step 3 on" in text
    assert "note: the predictions are not finite from step 3 on (agent, 2 loops)" in text
    assert results.to_dict()["errors"][4]["observation"] is None
