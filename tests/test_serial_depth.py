"""benchmarks/serial_depth.py: the transitions it measures on are those of the world, with the n that made them."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from conftest import benchmark, untrained

from agent.learning.dreamer import Dreamer
from agent.runs.presets import preset
from agent.spaces import spaces_of
from envs import make_vector_env
from envs.toy import Serial


@pytest.fixture
def depth(monkeypatch):
    module = benchmark("serial_depth")
    monkeypatch.setattr(module, "EPISODES", 3)
    return module


def test_the_map_applied_n_times_leads_to_the_position_it_asks_for(depth):
    world = Serial(16, 2)
    rows = depth.transitions(untrained(partial(make_vector_env, "toy:serial16x2", seed=0)), "toy:serial16x2", 0)
    assert rows["bits"] == 8
    assert rows["next"].shape == (50 * 3, 8)
    places = (rows["next"].numpy() > 0).reshape(50, 3, 2, 4) @ 2 ** np.arange(4)
    n = rows["n"].numpy().reshape(50, 3)
    for step in range(1, 50):
        for episode in range(3):
            place = places[step - 1, episode]
            for _ in range(n[step, episode]):
                place = world.map[place]
            assert (place == places[step, episode]).all()
    assert set(n.ravel()) == set(range(9))


def test_the_picture_and_the_correlation_of_loops_that_are_n(depth, tmp_path):
    n = np.arange(9).repeat(3)
    assert depth.rank_correlation(n + 1, n) == pytest.approx(1.0)
    assert depth.rank_correlation(8 - n, n) == pytest.approx(-1.0)
    assert np.isnan(depth.rank_correlation(np.ones(27), n))
    depth.draw(tmp_path / "depth.png", n, n + 1, np.zeros(27), np.ones(27))
    assert (tmp_path / "depth.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_of_another_world_is_refused(depth, finished, monkeypatch):
    monkeypatch.setattr("sys.argv", ["serial_depth.py", str(finished[0])])
    with pytest.raises(SystemExit, match="is a run of toy:cue5; give one of toy:serial"):
        depth.main()


def test_a_run_of_an_older_toy_serial_is_refused(depth, monkeypatch):
    older = {"task": "toy:serial", "spaces": {"obs": {"state": 17}, "action": {"size": 2, "discrete": True}}}
    monkeypatch.setattr(depth, "find_checkpoint", lambda run: run)
    monkeypatch.setattr(depth, "read_checkpoint", lambda path: older)
    monkeypatch.setattr("sys.argv", ["serial_depth.py", "some-run"])
    with pytest.raises(SystemExit, match="'state': 17.*than the task has now.*'state': 24"):
        depth.main()


def test_thresholds_without_an_exit_rule_are_refused(depth, monkeypatch, capsys):
    make_envs = partial(make_vector_env, "toy:serial16", seed=0)
    config = preset("debug")
    model = replace(config.model, core="gru")
    agent = Dreamer(model, config.behavior, config.optimizer, spaces_of(make_envs(1)))
    saved = {"task": "toy:serial16", "spaces": agent.spaces.plain()}
    monkeypatch.setattr(depth, "find_checkpoint", lambda run: run)
    monkeypatch.setattr(depth, "read_checkpoint", lambda path: saved)
    monkeypatch.setattr(depth.Dreamer, "from_checkpoint", lambda saved, device: agent)
    monkeypatch.setattr("sys.argv", ["serial_depth.py", "some-run", "--thresholds", "0.1"])
    with pytest.raises(SystemExit, match="some-run has no exit rule with a threshold; leave out --thresholds"):
        depth.main()
    monkeypatch.setattr("sys.argv", ["serial_depth.py", "some-run"])
    depth.main()
    shown = capsys.readouterr().out
    assert "at most 1 loops: error" in shown
    assert "at most 2 loops" not in shown
