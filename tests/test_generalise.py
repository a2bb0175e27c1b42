"""benchmarks/generalise.py: bodies of other masses, rows that were not trained on, and what nets say of them."""

import csv
import sys

import numpy as np
import pytest
import torch
from conftest import benchmark


@pytest.fixture
def study(monkeypatch):
    module = benchmark("generalise")
    threads = torch.get_num_threads()
    yield module
    torch.set_num_threads(threads)


def test_the_mass_changes_what_actions_do_and_is_told(study):
    light, same, heavy = (study.play("dmc:cartpole_swingup", mass, 1, 5) for mass in (0.5, 1.0, 4.0))
    assert np.array_equal(light["prev_action"], heavy["prev_action"])
    assert np.array_equal(light["obs/state"][0, :-1], heavy["obs/state"][0, :-1])
    assert {float(rows["obs/state"][3, -1]) for rows in (light, same, heavy)} == {0.5, 1.0, 4.0}
    moved = [np.abs(rows["obs/state"][5] - rows["obs/state"][0])[:-1].sum() for rows in (light, same, heavy)]
    assert moved[0] > moved[1] > moved[2]


def test_a_heavier_body_is_the_one_that_mujoco_would_build(study, monkeypatch):
    played, make = [], study.make_env
    monkeypatch.setattr(study, "make_env", lambda *args, **more: played.append(make(*args, **more)) or played[-1])
    study.play("dmc:walker_walk", 2.0, 1, 5)
    found = played[0].unwrapped._env.physics.model
    own = make("dmc:walker_walk").unwrapped._env.physics.model
    np.testing.assert_allclose(found.body_subtreemass, 2 * own.body_subtreemass)
    # about half: the armature of the joints keeps its inertia
    np.testing.assert_allclose(found.body_invweight0[1:], own.body_invweight0[1:] / 2, rtol=0.2)


@pytest.mark.parametrize(
    ("words", "message"), [(["--between", "0.4"], "--between must lie"), (["--beyond", "1.2"], "--beyond must be")]
)
def test_masses_that_are_not_what_their_column_says_are_refused(study, monkeypatch, tmp_path, capsys, words, message):
    monkeypatch.setattr(sys, "argv", ["generalise.py", "dmc:acrobot_swingup", *words, "--out", str(tmp_path / "a.csv")])
    assert study.main() == 2
    assert message in capsys.readouterr().err


def test_pairs_lie_within_the_rows_that_are_asked_for(study):
    first = np.zeros(20, bool)
    first[[0, 12]] = True
    number = np.concatenate([np.arange(12.0), np.arange(8.0)]).astype(np.float32)
    rows = {"obs/state": number[:, None], "prev_action": number[:, None], "is_first": first}
    assert rows["obs/state"][study.within(rows, 3, 2, 8).start, 0].tolist() == [2, 3, 4, 2, 3, 4]
    assert rows["obs/state"][study.within(rows, 3, 6, 100).start, 0].tolist() == [6, 7, 8]
    with pytest.raises(study.UsageError, match="give other --rows"):
        study.within(rows, 3, 10, 100)


def test_the_study_measures_every_net_and_goes_on(study, monkeypatch, tmp_path, capsys):
    words = ["--episodes", 2, "--rows", 60, "--updates", 200, "--width", 16, "--loops", 2, "--steps", 4]
    for seeds in ([0], [0, 1]):
        given = ["dmc:cartpole_swingup", *words, "--seeds", *seeds, "--out", tmp_path / "rows.csv"]
        monkeypatch.setattr(sys, "argv", ["generalise.py", *map(str, given)])
        assert study.main() == 0
    with (tmp_path / "rows.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["seed"], row["net"]) for row in rows] == [(seed, net) for seed in "01" for net in study.NETS]
    assert all(0 < float(row["same"]) < 1 for row in rows)
    assert rows[0]["params"] == rows[1]["params"]
    assert float(rows[2]["flops"]) == pytest.approx(float(rows[0]["flops"]), rel=0.03)
    lines = capsys.readouterr().out.splitlines()
    assert lines[-4].startswith("| 4 | looped |")
    assert "times (" in lines[-1]


def test_a_task_without_masses_is_refused(study, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(sys, "argv", ["generalise.py", "toy:cue", "--out", str(tmp_path / "rows.csv")])
    assert study.main() == 2
    assert "has no masses to change" in capsys.readouterr().err
