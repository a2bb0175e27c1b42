"""benchmarks/words.py: what is asked of a world model of words, on one that knows and one that does not."""

import csv
from itertools import pairwise

import numpy as np
import pytest
import torch
from conftest import benchmark, spawn

from agent.learning.dreamer import Dreamer
from envs.words import product


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A debug run of short words, two generators a step."""
    folder = tmp_path_factory.mktemp("words")
    words = "--preset", "debug", "--no-video", "--steps", "300", "--run-dir", "run", "--model.loop.mean-loops", "2"
    done = spawn(folder, "train_agent.py", "toy:words1-4x2", *words)
    assert done.returncode == 0, done.stderr
    return folder / "run"


def test_words_of_one_length_are_played_and_their_places_read():
    study = benchmark("words")
    played = study.play("toy:words6x2", 5, 7)
    assert played.obs.shape[:2] == (4, 5)  # three steps of two generators, and the query
    assert played.action.shape == (4, 5, 5)
    shown = played.obs[:3, :, :6].unflatten(-1, (2, 3)).argmax(-1)  # (3, W, 2)
    for word, places in zip(shown.transpose(0, 1).flatten(1), played.places, strict=True):
        assert product(word.numpy()).tolist() == places.tolist()


def test_the_last_observation_is_not_seen_and_a_model_that_knows_it_is_all_right(trained, monkeypatch):
    study = benchmark("words")
    world, played = Dreamer.load(trained, "cpu").averaged.world, study.play("toy:words4x2", 40, 7)
    right, depth = study.predict(world, played)
    assert right.shape == (40, 5)
    assert depth.shape == (3, 40)  # the second generators, the query, and the prediction
    assert study.share(right.all(-1)) < 0.5
    answer = torch.nn.functional.one_hot(played.places, 5).flatten(1).float()
    known = torch.cat([torch.zeros(40, 11), answer], -1)
    monkeypatch.setattr(world, "decode", lambda state: {"state": known})
    assert study.judge(world, played)["whole"] == 1.0


def test_another_exit_rule_is_asked_instead_of_the_own_one(trained, capsys, tmp_path):
    study = benchmark("words")
    words = [str(trained), "--lengths", "4", "--words", "20", "--csv", str(tmp_path / "words.csv")]
    for threshold, loops in (("0.0", 4.0), ("1e9", 1.0)):  # nothing is still enough, and everything is
        assert study.main([*words, "--exit", "residual", "--exit-threshold", threshold]) == 0
        with (tmp_path / "words.csv").open(newline="") as file:
            assert float(next(csv.DictReader(file))["loops"]) == loops
    capsys.readouterr()


def test_controls_have_the_depths_of_the_own_rule(trained, monkeypatch):
    study = benchmark("words")
    world, played = Dreamer.load(trained, "cpu").averaged.world, study.play("toy:words4x2", 200, 7)
    depths, predict = [], study.predict
    monkeypatch.setattr(study, "predict", lambda *args: depths.append(predict(*args)[1]) or predict(*args))
    improvement, seen = world.core.rule.improvement, []
    monkeypatch.setattr(world.core.rule, "improvement", lambda *args: seen.append(improvement(*args)) or seen[-1])
    predict(world, played)
    world.core.rule.threshold = float(torch.cat(seen).median())  # about half of the predictions stop
    assert len(set(predict(world, played)[1].flatten().tolist())) > 1
    row = study.judge(world, played)
    own, *drawn, fixed, full = (depth.float().mean().item() for depth in depths)
    assert own == pytest.approx(row["loops"])
    assert np.mean(drawn) == pytest.approx(own, abs=0.1)
    assert fixed == round(own)
    assert full == world.run_cap
    assert any((one != other).any() for one, other in pairwise(depths[1:-2]))


def test_a_row_for_every_length(trained, tmp_path, capsys):
    study = benchmark("words")
    assert study.main([str(trained), "--lengths", "3", "8", "--words", "30", "--csv", str(tmp_path / "rows.csv")]) == 0
    with (tmp_path / "rows.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["run"], row["length"]) for row in rows] == [("run", "3"), ("run", "8")]
    assert all(0.0 <= float(row["place"]) <= 1.0 and float(row["random"]) <= 1.0 for row in rows)
    assert study.main([str(trained), "--lengths", "65"]) == 2
    assert "1 to 64 generators" in capsys.readouterr().err


def test_runs_of_other_tasks_are_refused(finished, capsys):
    study = benchmark("words")
    assert study.main([str(finished[0])]) == 2
    assert "give runs of toy:words" in capsys.readouterr().err
