"""benchmarks/jumps.py, jump_exits.py, exits.py and choice.py on one short run with jumps."""

import csv
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import benchmark, spawn

from world_model import ExitRule


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A debug run with jumps, and a data set that it has not learned from."""
    folder = tmp_path_factory.mktemp("jumps")
    words = "--preset", "debug", "--no-video", "--model.jump", "4", "--run-dir", "run"
    done = spawn(folder, "train_agent.py", "gym:Pendulum-v1", *words)
    assert done.returncode == 0, done.stderr
    done = spawn(folder, "evaluate.py", "collect", "gym:Pendulum-v1", "data", "--run", "run", "--episodes", "12")
    assert done.returncode == 0, done.stderr
    return folder / "run", folder / "data"


def rows_of(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_jumps_start_from_the_same_states_whatever_divides_the_times(trained, tmp_path, capsys, monkeypatch):
    study, places = benchmark("jumps"), []
    monkeypatch.setattr(study, "ROUNDS", 2)
    predict = study.open_loop
    monkeypatch.setattr(study, "open_loop", lambda *args, **more: places.append(args[3]) or predict(*args, **more))
    words = [*map(str, trained), "--jumps", "1", "3", "--times", "12", "16", "--windows", "64", "--csv"]
    assert study.main([*words, str(tmp_path / "jumps.csv")]) == 0
    assert places[0] is places[1]
    one, three = rows_of(tmp_path / "jumps.csv")
    assert float(one["error_16"]) > 0
    assert float(one["se_12"]) > 0
    assert three["error_16"] == ""  # steps of three do not end there
    assert float(three["ms"]) > 0
    assert study.main([*words[:2], "--jumps", "8"]) == 2
    assert "was trained with --model.jump 4" in capsys.readouterr().err
    assert study.main([*words[:2], "--jumps", "1", "--times", "500"]) == 2  # an episode has 200 steps
    assert "give shorter --times" in capsys.readouterr().err


def test_exits_are_compared_by_windows_that_overlap_in_part(trained, tmp_path, monkeypatch, capsys):
    study = benchmark("exits")
    words = [*map(str, trained), "--brief", "--windows", "400", "--starts", "8", "--repeats", "1", "--csv"]
    monkeypatch.setattr(sys, "argv", ["exits.py", *words, str(tmp_path / "exits.csv")])
    study.main()
    own, drawn, fixed = rows_of(tmp_path / "exits.csv")
    assert (own["rule"], drawn["rule"]) == ("own (gate)", "random, own histogram")
    assert float(own["d_error"]) == 0.0
    assert float(fixed["d_error_se"]) > 0.0
    assert "rank correlation" in capsys.readouterr().out


def test_what_further_loops_bring_is_ranked_and_the_kl_is_that_of_the_model(trained, tmp_path, monkeypatch, capsys):
    study = benchmark("choice")
    words = [*map(str, trained), "--pairs", "1:2", "--csv", str(tmp_path / "choice.csv")]
    monkeypatch.setattr(sys, "argv", ["choice.py", *words])
    study.main()
    assert [row["ranking"] for row in rows_of(tmp_path / "choice.csv")] == ["gate", "ridge", "network", "hindsight"]
    assert "KL (nats)" in capsys.readouterr().out
    world, held = study.Dreamer.load(trained[0], "cpu").averaged.world, study.load_dataset(trained[1]).held_out
    world.core.rule = ExitRule()
    world.core.cfg = replace(world.core.cfg, max_loops=2)  # the filter, too, runs two loops of every step
    episodes = study.pad_episodes(held)
    states, _ = study.posterior_states(world, episodes)
    embed = world.post_embed(world.observation_model(episodes.obs))
    with torch.no_grad():
        posterior, prior = world.posterior(states.deter, embed), world.prior_probs(states.deter)
        known = world.latents.kl(torch.log(posterior), torch.log(prior))
    row = torch.arange(known.shape[1])
    predicted = (row >= 3) & (row < episodes.length[:, None])
    torch.testing.assert_close(study.predict(world, held, 2, 16_000).kl[1], known[predicted], atol=1e-4, rtol=1e-3)


def test_exits_over_different_times_are_compared_with_every_control():
    study = benchmark("jump_exits")
    error = torch.tensor([[[1.0, 1.0], [1.0, 1.0], [2.0, 2.0]], [[9.0, 5.0], [3.0, 5.0], [3.0, 1.0]]])  # (K, R, W)
    rest = torch.tensor([[[0.3, 0.01], [0.0, 0.2], [0.0, 0.0]], [[0.9, 0.9], [0.1, 0.4], [0.0, 0.0]]])
    steps = study.Steps(error, torch.tensor([[1, 1], [2, 3]]), np.arange(2), rest)
    assert steps.settled(0.1).tolist() == [[2, 3], [2, 3]]  # within 0.1 nats from there on
    assert steps.settled(0.3).tolist() == [[1, 1], [2, 3]]
    assert steps.own.tolist() == [[1.0, 1.0], [3.0, 1.0]]
    found = steps.controls()
    assert found["random"].tolist() == [[1.25, 1.25], [6.0, 4.0]]  # depths 1, 1, 2, 3
    assert found["within"].tolist() == [[1.0, 1.0], [3.0, 3.0]]  # at the second k 2 and 3
    assert found["fixed"].tolist() == [[1.0, 1.0], [4.5, 5.0]]  # mean 1.75: a quarter of 1, three of 2
    first, second, both = study.rows_of(steps, [1, 4])
    assert (first["within_more"], second["within_more"], both["k"]) == (0.0, 50.0, "all")
    assert both["random_more"] == pytest.approx(100 * (3.125 - 1.5) / 1.5)
    assert study.equal_depth(steps) is None
    assert study.equal_depth(steps._replace(depth=torch.full((2, 2), 2))) == 2
    text = "\n".join(study.report(steps, [first, second, both], [1, 4]))
    assert "rank correlation of loops and k: 0.9" in text
    assert "0.000 (0.1 nats), 0.707 (0.2 nats), 1.000 (0.5 nats)" in text


def test_exits_over_different_times_of_a_run(trained, tmp_path, capsys):
    study = benchmark("jump_exits")
    words = [*map(str, trained), "--jumps", "1", "4", "--windows", "50", "--csv", str(tmp_path / "rows.csv")]
    assert study.main([*words, "--states", "4", "8"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("dreams of ") == 2 or "no fixed depth" in printed
    rows = rows_of(tmp_path / "rows.csv")
    assert [row["k"] for row in rows] == ["1", "4", "all"]
    assert [row["rank"] == "" for row in rows] == [True, True, False]
    assert rows[-1]["rank_known_0.1"] != ""
    assert study.main([*map(str, trained), "--jumps", "1", "8"]) == 2
    assert "give --jumps from 1 to that" in capsys.readouterr().err
    assert study.main([*words, "--no-times", "--max-loops", "7"]) == 0  # the run's own cap is lower
    names = rows_of(tmp_path / "rows.csv")[0].keys()
    assert "error_7" in names
    assert "error_8" not in names


def test_inside_alone_every_step_has_the_depth_that_is_asked_for(trained):
    study = benchmark("jump_exits")
    world = study.Dreamer.load(trained[0], "cpu").averaged.world
    with study.always(world, 3), torch.no_grad():
        dream = world.imagine(world.initial(5), torch.zeros(5, 2, world.action_size), 2, jump=4)
    assert (dream.loops.depth == 3).all()
    assert world.core.cfg.max_loops is None
    assert type(world.core.rule) is not ExitRule
