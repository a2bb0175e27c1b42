"""benchmarks/jumps.py, exits.py and choice.py on one short run with jumps."""

import csv
import sys
from dataclasses import replace

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
