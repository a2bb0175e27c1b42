"""benchmarks/distil.py: an ensemble is better than its members, and a net can learn what it says."""

import csv
import sys

import pytest
import torch
from conftest import benchmark


@pytest.fixture
def study(monkeypatch):
    module = benchmark("distil")
    threads = torch.get_num_threads()
    yield module
    torch.set_num_threads(threads)


def test_an_ensemble_is_measured_beside_what_learned_from_it(study, monkeypatch, tmp_path, script):
    made = script("evaluate.py", "collect", "gym:Pendulum-v1", tmp_path / "data", "--episodes", 20)
    assert made.returncode == 0, made.stderr
    words = [tmp_path / "data", "--updates", 150, "--members", 3, "--width", 16, "--seeds", 0, "--loops", 2]
    for steps in ([2], [2, 1]):
        given = [*words, "--out", tmp_path / "rows.csv", "--steps", *steps]
        monkeypatch.setattr(sys, "argv", ["distil.py", *map(str, given)])
        assert study.main() == 0
    with (tmp_path / "rows.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["k"] for row in rows] == ["2", "1"]  # the first was not measured again
    for row in rows:
        assert float(row["ensemble"]) < float(row["members"])  # the error of a mean is at most the mean error
        assert 0 < float(row["distilled"]) < 1
        assert float(row["longer"]) < float(row["single"])


def test_the_share_of_the_way_is_a_ratio_of_means(study):
    errors = [("0.5", "0.3", "0.4"), ("0.7", "0.3", "0.3")]
    names, about = ("single", "members", "ensemble", "distilled", "longer"), {"data": "a", "k": "4", "loops": "2"}
    about |= {"width": "64", "updates": "9", "members_count": "5"}
    rows = [about | dict(zip(names, (one, one, both, it, it), strict=True)) for one, both, it in errors]
    *_, line = study.report(rows)
    assert line == "| a | 4 | 2 | 64 | 9 | 5 | 0.6000 | 0.6000 | 0.3000 | 0.3500 | 0.3500 | 0.83 (0.50 to 1.00) |"
    rows[0]["ensemble"] = "0.6"
    assert study.report(rows)[-1].endswith("|  |")


def test_images_are_refused(study, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(sys, "argv", ["distil.py", str(tmp_path)])
    assert study.main() == 2
    assert "error:" in capsys.readouterr().err
