"""Evaluation episodes, open-loop pictures and videos of an agent."""

import numpy as np
import pytest
import torch
from conftest import counters, untrained

from agent.evaluation.episodes import loop_shares, run_episodes
from agent.evaluation.plots import predict_open_loop
from agent.evaluation.video import record_episode, save_video
from agent.runs.presets import preset
from envs import make_env


def test_evaluation_does_not_depend_on_how_many_play_at_once():
    agent = untrained()
    one, three, all_at_once = (run_episodes(agent, counters, 7, 50, parallel=n) for n in (1, 3, 10))
    for row, same, again in zip(one, three, all_at_once, strict=True):
        for key in ("episode", "seed", "return", "length"):
            assert row[key] == same[key] == again[key]
        assert row["mean_loops"] == pytest.approx(same["mean_loops"], abs=0.2)
    assert [row["seed"] for row in one] == list(range(50, 57))
    assert len({row["return"] for row in one}) > 1
    assert all(row["return"] == row["length"] * (row["length"] + 1) / 2 for row in one)


def test_evaluation_leaves_the_generators_alone_and_repeats_itself():
    agent = untrained()
    before = torch.get_rng_state()
    one = run_episodes(agent, counters, 4, 50, explore=True)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(3)
    assert run_episodes(agent, counters, 4, 50, explore=True) == one


def test_evaluation_obeys_the_loop_limit():
    agent = untrained()
    assert {row["mean_loops"] for row in run_episodes(agent, counters, 3, 0, max_loops=1)} == {1.0}
    with pytest.raises(ValueError, match="at least 1 episode"):
        run_episodes(agent, counters, 0, 0)


def test_the_loops_of_an_evaluation_are_counted_episode_by_episode():
    class Counting:
        """Takes 1, 3, 1, 3, .. loops, in every environment alike."""

        run_cap, steps = 3, 0

        def act(self, obs, memory, is_first, explore=True, max_loops=None):
            self.steps = 1 if is_first.any() else self.steps + 1
            return np.zeros(len(is_first), int), None, np.full(len(is_first), 1 if self.steps % 2 else 3)

    rows = run_episodes(Counting(), counters, 5, 50, parallel=2)
    for row in rows:
        assert row["loop_counts"] == [(row["length"] + 1) // 2, 0, row["length"] // 2]
        assert row["mean_loops"] == pytest.approx(1 + 2 * (row["length"] // 2) / row["length"])
    ones, steps = sum(row["loop_counts"][0] for row in rows), sum(row["length"] for row in rows)
    assert len({row["length"] for row in rows}) > 1
    assert loop_shares(rows) == pytest.approx([ones / steps, 0.0, 1 - ones / steps])


def test_an_open_loop_prediction_leaves_the_generators_alone(make_trainer, tmp_path):
    trainer = make_trainer(tmp_path, counters, steps=120, ratio=0.0, eval_every=0)
    assert predict_open_loop(trainer.agent, trainer.replay, 0) is None  # nothing to show yet
    trainer.run()
    before = torch.get_rng_state(), trainer.replay.state_dict()["rng"]
    one, same = (predict_open_loop(trainer.agent, trainer.replay, 0) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert trainer.replay.state_dict()["rng"] == before[1]
    assert one.picture.dtype == np.uint8
    assert one.picture.shape[2] == 3
    assert np.array_equal(one.picture, same.picture)
    assert one.clips == {}


def test_a_video_shows_every_step(tmp_path):
    agent, cfg = untrained(), preset("debug").eval
    env = make_env("toy:counter", render=True)
    frames, loops, fps, total = record_episode(agent, env, cfg)
    assert len(frames) == len(loops)
    assert total == len(frames) * (len(frames) + 1) / 2
    assert fps == 10.0
    line = save_video(tmp_path / "v.mp4", agent, lambda: make_env("toy:counter", render=True), cfg)
    assert line.startswith("video ")
    assert list(tmp_path.glob("v.*"))


def test_a_video_never_stops_a_run(tmp_path):
    line = save_video(tmp_path / "v.mp4", untrained(), lambda: make_env("toy:counter"), preset("debug").eval)
    assert line.startswith("no video: ")
    assert not list(tmp_path.iterdir())
